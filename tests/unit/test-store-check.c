/* Damage is found: by verify, wherever it is; by a serving read, which gives EIO and never wrong bytes; on the way into
 * a store. And what export and import carry is what was there. */
#include "store-kit.h"

#define CHILD_SIZE (40 * FFS_STORE_CHUNK)

#define SIZE (640 * KIB + 100)

static void flip(const char *path, uint64_t at, unsigned char with)
{
	int fd = open(path, O_RDWR);
	unsigned char c;

	assert_true(fd >= 0);
	assert_int_equal(pread(fd, &c, 1, (off_t)at), 1);
	c ^= with;
	assert_int_equal(pwrite(fd, &c, 1, (off_t)at), 1);
	close(fd);
}

/* Read all; bytes that are given are the right ones. True: something was refused. */
static bool refused_or_right(struct ffs_stored *s, const unsigned char *want)
{
	static unsigned char buf[100000];
	struct ffs_error err = {0};
	bool refused = false;

	for (uint64_t off = 0; off < SIZE; off += sizeof(buf)) {
		ssize_t n = ffs_stored_read_memory(s, buf, sizeof(buf), off, &err);

		if (n < 0) {
			assert_int_equal(n, -EIO);
			refused = true;
		} else {
			assert_memory_equal(buf, want + off, (size_t)n);
		}
	}
	return refused;
}

static void flips_of(
	struct kit *k, const char *branch, const char *file, unsigned step, const unsigned char *want)
{
	struct ffs_error err = {0};
	struct stat st;
	char path[300];

	snprintf(path, sizeof(path), "%s/sbx1/%s/%s", k->path, branch, file);
	assert_int_equal(stat(path, &st), 0);
	for (uint64_t at = 0; at < (uint64_t)st.st_size; at += step) {
		unsigned char bit = (unsigned char)(1u << (at % 8));
		struct ffs_stored *s = NULL;
		int r;

		flip(path, at, bit);
		err = (struct ffs_error){0};
		r = ffs_stored_open(k->st, "sbx1", branch, &s, &err);
		if (!r) {
			r = ffs_stored_verify(s, NULL, &err);
			if (ffs_stored_kind(s) == FFS_STORE_PACKED)
				refused_or_right(s, want);
		}
		if (r >= 0)
			fail_msg("%s/%s: a flipped bit in byte %llu was not found", branch, file,
				(unsigned long long)at);
		if (!strstr(err.text, strncmp(file, "memory.pack", 11) ? file : "memory"))
			fail_msg("byte %llu of %s: the sentence names another file: %s",
				(unsigned long long)at, file, err.text);
		ffs_stored_unref(s);
		flip(path, at, bit);
	}
}

static void test_flips(void **state)
{
	struct ffs_error err = {0};
	struct ffs_stored *s = NULL;
	unsigned char *want;
	struct kit k;

	kit_open(&k);
	int fd = make_memory(SIZE, 1, &want);

	assert_ok(put_branch(k.st, "dense", fd, SIZE, FFS_STORE_DENSE, NULL, &err), err);
	assert_ok(put_branch(k.st, "packed", fd, SIZE, FFS_STORE_PACKED, NULL, &err), err);
	flips_of(&k, "dense", "manifest.json", 1, want);
	flips_of(&k, "dense", "vmstate", 1, want);
	flips_of(&k, "dense", "memory.bin", 4099, want);
	flips_of(&k, "packed", "memory.idx", 1, want);
	flips_of(&k, "packed", "memory.pack.0", 251, want);
	flips_of(&k, "packed", "vmstate", 1, want);
	for (unsigned i = 0; i < 2; i++) {
		assert_ok(ffs_stored_open(k.st, "sbx1", i ? "packed" : "dense", &s, &err), err);
		assert_ok(ffs_stored_verify(s, NULL, &err), err);
		ffs_stored_unref(s);
	}
	free(want);
	close(fd);
	kit_close(&k);
}

/* A block that verify names is the one. */
static void test_first_wrong_block(void **state)
{
	struct ffs_error err = {0};
	struct ffs_stored *s = NULL;
	unsigned char *want;
	struct kit k;
	char path[200];
	uint64_t size = 7 * MIB;

	kit_open(&k);
	int fd = make_memory(size, 1, &want);

	assert_ok(put_branch(k.st, "b1", fd, size, FFS_STORE_DENSE, NULL, &err), err);
	snprintf(path, sizeof(path), "%s/sbx1/b1/memory.bin", k.path);
	flip(path, 6 * MIB + 5, 1);
	flip(path, 4 * MIB + 5, 1);
	assert_ok(ffs_stored_open(k.st, "sbx1", "b1", &s, &err), err);
	assert_int_equal(ffs_stored_verify(s, NULL, &err), -EBADMSG);
	assert_non_null(strstr(err.text, "memory.bin is damaged at offset 4194304"));
	ffs_stored_unref(s);
	free(want);
	close(fd);
	kit_close(&k);
}

static int export_of(struct kit *k, const char *name)
{
	struct ffs_error err = {0};
	struct ffs_stored *s = NULL;
	int fd = memfd_create("stream", MFD_CLOEXEC);

	assert_ok(ffs_stored_open(k->st, "sbx1", name, &s, &err), err);
	assert_ok(ffs_stored_export(s, fd, NULL, &err), err);
	ffs_stored_unref(s);
	return fd;
}

static void check_branch(struct kit *k, const char *name, enum ffs_store_kind kind, const unsigned char *want)
{
	struct ffs_error err = {0};
	struct ffs_stored *s = NULL;
	struct json_object *o = NULL, *v = NULL;

	assert_ok(ffs_stored_open(k->st, "sbx1", name, &s, &err), err);
	assert_int_equal(ffs_stored_kind(s), kind);
	assert_ok(ffs_stored_verify(s, NULL, &err), err);
	check_memory(s, want, SIZE);
	assert_ok(ffs_stored_manifest(s, &o, &err), err);
	assert_true(json_object_object_get_ex(o, "later", &v));
	assert_true(json_object_object_get_ex(o, "name", &v));
	assert_string_equal(json_object_get_string(v), name);
	json_object_put(o);
	ffs_stored_unref(s);
}

static void test_export_import(void **state)
{
	struct ffs_error err = {0};
	unsigned char *want;
	struct kit k;

	kit_open(&k);
	int fd = make_memory(SIZE, 1, &want), stream;

	assert_ok(put_branch(k.st, "b1", fd, SIZE, FFS_STORE_DENSE, NULL, &err), err);
	/* from one format to the other and back, and once as it is */
	stream = export_of(&k, "b1");
	assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
	assert_ok(ffs_store_import(k.st, stream, "sbx1", "b2", FFS_STORE_PACKED, NULL, &err), err);
	check_branch(&k, "b2", FFS_STORE_PACKED, want);
	close(stream);
	stream = export_of(&k, "b2");
	assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
	assert_ok(ffs_store_import(k.st, stream, "sbx1", "b3", FFS_STORE_DENSE, NULL, &err), err);
	check_branch(&k, "b3", FFS_STORE_DENSE, want);
	assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
	assert_ok(ffs_store_import(k.st, stream, "sbx1", "b4", FFS_STORE_MEMORY, NULL, &err), err);
	check_branch(&k, "b4", FFS_STORE_PACKED, want);
	assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
	assert_int_equal(ffs_store_import(k.st, stream, "sbx1", "b4", FFS_STORE_MEMORY, NULL, &err), -EEXIST);
	close(stream);
	free(want);
	close(fd);
	kit_close(&k);
}

static int count(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry)
{
	++*(unsigned *)arg;
	return 0;
}

/* A stream with a bit flipped, or cut off, or with a byte too few, publishes nothing and leaves nothing. */
/* Put a branch with an id, and a parent or none, into a sandbox. */
static void put_child(struct ffs_store *st, const char *sandbox, const char *name, const char *id,
	const char *parent, int memory, struct ffs_stored *share)
{
	struct json_object *o = make_manifest(id, CHILD_SIZE);
	int vmstate = make_vmstate();
	struct ffs_draft *d = NULL;
	struct ffs_error err = {0};

	json_object_object_add(o, "parent", parent ? json_object_new_string(parent) : NULL);
	assert_ok(ffs_draft_begin(st, sandbox, name, &d, &err), err);
	assert_ok(ffs_draft_memory(d, memory, CHILD_SIZE, FFS_STORE_PACKED, share, NULL, &err), err);
	assert_ok(ffs_draft_file(d, "vmstate", vmstate, &err), err);
	assert_ok(ffs_store_publish(d, o, NULL, &err), err);
	ffs_draft_end(d);
	json_object_put(o);
	close(vmstate);
}

/* An incremental branch goes out whole, and comes in beside its parent sharing its chunks, wherever that is. */
static void test_incremental(void **state)
{
	static const char *const ids[] = {
		"00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"};
	unsigned char *maps[2];
	int memory = make_memory(CHILD_SIZE, 3, &maps[0]), changed = make_memory(CHILD_SIZE, 3, &maps[1]);
	int stream = memfd_create("stream", MFD_CLOEXEC);
	struct ffs_stored *parent = NULL, *child = NULL;
	struct ffs_error err = {0};
	uint64_t all, shared;
	struct kit k, empty;

	memset(maps[1] + 3 * FFS_STORE_CHUNK, 0x5a, 4096);
	assert_int_equal(pwrite(changed, maps[1] + 3 * FFS_STORE_CHUNK, 4096, 3 * FFS_STORE_CHUNK), 4096);
	kit_open(&k);
	put_child(k.st, "sbx1", "p", ids[0], NULL, memory, NULL);
	assert_ok(ffs_stored_open(k.st, "sbx1", "p", &parent, &err), err);
	put_child(k.st, "sbx1", "c", ids[1], ids[0], changed, parent);
	assert_ok(ffs_stored_open(k.st, "sbx1", "c", &child, &err), err);
	assert_ok(ffs_stored_export(child, stream, NULL, &err), err);
	ffs_stored_unref(child);
	ffs_stored_unref(parent);

	/* a store that never saw the parent */
	kit_open(&empty);
	assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
	assert_ok(ffs_store_import(empty.st, stream, "x", "c", FFS_STORE_MEMORY, NULL, &err), err);
	assert_ok(ffs_stored_open(empty.st, "x", "c", &child, &err), err);
	check_memory(child, maps[1], CHILD_SIZE);
	assert_string_equal(child->m.parent, ids[0]);
	ffs_stored_sizes(child, &all, &shared);
	assert_int_equal(shared, 0);
	ffs_stored_unref(child);
	kit_close(&empty);

	/* the parent is there, in another sandbox; a younger branch of this one is no reason to pass it over */
	put_child(k.st, "y", "young", "00000000-0000-4000-8000-00000000000c", NULL, memory, NULL);
	assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
	assert_ok(ffs_store_import(k.st, stream, "y", "c", FFS_STORE_MEMORY, NULL, &err), err);
	assert_ok(ffs_stored_open(k.st, "y", "c", &child, &err), err);
	assert_string_equal(child->m.parent, ids[0]);
	ffs_stored_sizes(child, &all, &shared);
	assert_true(shared > 0 && all - shared < all / 2);
	assert_ok(ffs_store_remove(k.st, "sbx1", "p", &err), err);
	assert_ok(ffs_store_remove(k.st, "sbx1", "c", &err), err);
	assert_ok(ffs_store_reap(k.st, "sbx1", &err), err);
	check_memory(child, maps[1], CHILD_SIZE);
	assert_ok(ffs_stored_verify(child, NULL, &err), err);
	ffs_stored_unref(child);
	kit_close(&k);
	close(memory);
	close(changed);
	close(stream);
	free(maps[0]);
	free(maps[1]);
}

static void test_damaged_streams(void **state)
{
	struct ffs_error err = {0};
	struct stat st;
	unsigned char *want;
	unsigned n = 0;
	struct kit k;

	kit_open(&k);
	int fd = make_memory(SIZE, 1, &want);

	assert_ok(put_branch(k.st, "b1", fd, SIZE, FFS_STORE_PACKED, NULL, &err), err);
	int stream = export_of(&k, "b1");

	assert_int_equal(fstat(stream, &st), 0);
	for (off_t at = 0; at < st.st_size; at += at < 8192 ? 11 : 997) {
		char c;

		assert_int_equal(pread(stream, &c, 1, at), 1);
		c ^= (char)(1u << (at % 8));
		assert_int_equal(pwrite(stream, &c, 1, at), 1);
		assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
		int r = ffs_store_import(k.st, stream, "sbx1", "b2", FFS_STORE_MEMORY, NULL, &err);

		c ^= (char)(1u << (at % 8));
		assert_int_equal(pwrite(stream, &c, 1, at), 1);
		/* four bytes of the stream's header mean nothing yet: its checksum covers them all the same */
		if (r >= 0)
			fail_msg("a flipped bit in byte %lld was taken", (long long)at);
	}
	for (off_t size = 0; size < st.st_size; size += 7919) {
		int cut = memfd_create("cut", MFD_CLOEXEC);
		off_t from = 0;

		for (off_t left = size; left > 0;) {
			char buf[65536];
			ssize_t got = pread(
				stream, buf, left < (off_t)sizeof(buf) ? (size_t)left : sizeof(buf), from);

			assert_int_equal(write(cut, buf, (size_t)got), got);
			left -= got;
			from += got;
		}
		assert_int_equal(lseek(cut, 0, SEEK_SET), 0);
		assert_true(ffs_store_import(k.st, cut, "sbx1", "b2", FFS_STORE_MEMORY, NULL, &err) < 0);
		close(cut);
	}
	assert_ok(ffs_store_each(k.st, NULL, count, &n, &err), err);
	assert_int_equal(n, 1);
	assert_int_equal(faccessat(ffs_store_fd(k.st), "sbx1/b2.partial", F_OK, 0), -1);
	close(stream);
	free(want);
	close(fd);
	kit_close(&k);
}

/* The bytes of an index as docs/format.md has them. */
static void test_golden_index(void **state)
{
	static const unsigned char head[] = {'f', 'o', 'r', 'k', 'f', 's', 'I', 'X', 1, 0, 0, 0, 128, 0, 0, 0,
		0, 0, 1, 0, 1, 0, 0, 0, 5, 0, 2, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0, 0,
		0, 192, 0, 0, 0, 0, 0, 0, 0, 240, 0, 0, 0, 0, 0, 0, 0, 252, 0, 0, 0, 0, 0, 0, 0, 8, 1, 0, 0,
		0, 0, 0, 0, 14, 1, 0, 0, 0, 0, 0, 0, 17, 1, 0, 0, 0, 0, 0, 0};
	static const unsigned char columns[] = {64, 0, 0, 0, 0, 0, 0, 0, 64, 0, 1, 0, /* offset */
		0, 0, 1, 0, 0, 0, 0, 0, 5, 0, 0, 0,                                   /* stored */
		0, 0, 0, 0, 0, 0,                                                     /* pack */
		1, 0, 1};                                                             /* kind */
	static const unsigned char pack_head[] = {
		'f', 'o', 'r', 'k', 'f', 's', 'P', 'K', 1, 0, 0, 0, 64, 0, 0, 0};
	unsigned char pack[FFS_PACK_HEADER], *bytes = NULL, saved[16];
	struct ffs_error err = {0};
	struct ffs_index x, y;
	size_t len = 0;

	assert_int_equal(ffs_index_new(&x, 2 * FFS_STORE_CHUNK + 5), 0);
	x.packs = calloc(1, sizeof(*x.packs));
	x.n_packs = 1;
	memset(x.packs[0].id, 0xab, 16);
	x.packs[0].size = 65 * KIB + 5;
	memset(x.packs[0].hash.b, 0xcd, 16);
	for (unsigned i = 0; i < 3; i++)
		memset(x.hash[i].b, (int)i + 1, 16);
	x.kind[0] = x.kind[2] = FFS_CHUNK_RAW;
	x.offset[0] = 64;
	x.stored[0] = FFS_STORE_CHUNK;
	x.offset[2] = 64 + FFS_STORE_CHUNK;
	x.stored[2] = 5;
	assert_int_equal(ffs_index_encode(&x, &bytes, &len), 0);
	assert_int_equal(len, 273);
	assert_memory_equal(bytes, head, sizeof(head));
	assert_int_equal(bytes[128], 0xab);
	assert_int_equal(bytes[144], 5); /* size of the pack: 66565 */
	assert_int_equal(bytes[145], 4);
	assert_int_equal(bytes[146], 1);
	assert_int_equal(bytes[152], 0xcd);
	assert_int_equal(bytes[192], 1);
	assert_int_equal(bytes[208], 2);
	assert_memory_equal(bytes + 240, columns, sizeof(columns));
	/* its hash, with its own place as zeros */
	memcpy(saved, bytes + 112, 16);
	memset(bytes + 112, 0, 16);
	struct ffs_hash h = ffs_hash_of(bytes, len);

	assert_memory_equal(saved, h.b, 16);
	memcpy(bytes + 112, saved, 16);
	assert_ok(ffs_index_decode(bytes, len, &y, &err), err);
	assert_memory_equal(y.offset, x.offset, 12);
	ffs_pack_header(pack, x.packs[0].id);
	assert_memory_equal(pack, pack_head, sizeof(pack_head));
	assert_int_equal(pack[16], 0xab);
	ffs_index_clear(&x);
	ffs_index_clear(&y);
	free(bytes);
}

/* Chunks whose hashes are the same and whose bytes are not are two chunks. */
static void test_collision(void **state)
{
	struct ffs_error err = {0};
	struct ffs_stored *parent = NULL, *s = NULL;
	unsigned char *want;
	struct kit k;

	kit_open(&k);
	int fd = make_memory(SIZE, 1, &want);

	assert_ok(put_branch(k.st, "b1", fd, SIZE, FFS_STORE_PACKED, NULL, &err), err);
	assert_ok(ffs_stored_open(k.st, "sbx1", "b1", &parent, &err), err);
	assert_ok(ffs_packed_open(parent, &err), err);
	/* as if chunk 1 of the parent had the hash of our other chunk 1 */
	memset(want + FFS_STORE_CHUNK, 0x77, FFS_STORE_CHUNK);
	assert_int_equal(
		pwrite(fd, want + FFS_STORE_CHUNK, FFS_STORE_CHUNK, FFS_STORE_CHUNK), FFS_STORE_CHUNK);
	parent->index.hash[1] = ffs_hash_of(want + FFS_STORE_CHUNK, FFS_STORE_CHUNK);
	assert_ok(put_branch(k.st, "b2", fd, SIZE, FFS_STORE_PACKED, parent, &err), err);
	assert_ok(ffs_stored_open(k.st, "sbx1", "b2", &s, &err), err);
	check_memory(s, want, SIZE);
	ffs_stored_unref(s);
	ffs_stored_unref(parent);
	free(want);
	close(fd);
	kit_close(&k);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_flips),
		cmocka_unit_test(test_first_wrong_block),
		cmocka_unit_test(test_export_import),
		cmocka_unit_test(test_incremental),
		cmocka_unit_test(test_damaged_streams),
		cmocka_unit_test(test_golden_index),
		cmocka_unit_test(test_collision),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
