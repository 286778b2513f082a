/* The store: what is published is what was written, in both formats; names, removal, sharing, recovery. */
#include "store-kit.h"

#include <sys/file.h>

#define SIZE (9 * MIB + 12345)

static void test_round_trip(void **state)
{
	static const enum ffs_store_kind kinds[] = {FFS_STORE_DENSE, FFS_STORE_PACKED};
	static const uint64_t sizes[] = {SIZE, 64 * KIB, 4096, 1, 2 * MIB};
	struct ffs_error err = {0};
	struct kit k;

	kit_open(&k);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(kinds); i++)
		for (unsigned j = 0; j < FFS_ARRAY_LEN(sizes); j++) {
			unsigned char *want;
			int fd = make_memory(sizes[j], j + 1, &want);
			struct ffs_stored *s = NULL;
			char name[32], text[16];

			snprintf(name, sizeof(name), "b%u.%u", i, j);
			assert_ok(put_branch(k.st, name, fd, sizes[j], kinds[i], NULL, &err), err);
			assert_ok(ffs_stored_open(k.st, "sbx1", name, &s, &err), err);
			assert_int_equal(ffs_stored_kind(s), kinds[i]);
			check_memory(s, want, sizes[j]);
			assert_int_equal(ffs_stored_read_vmstate(s, text, sizeof(text), 0), 12);
			assert_memory_equal(text, "device state", 12);
			assert_string_equal(ffs_stored_id(s), "11111111-2222-4333-8444-555555555555");
			assert_int_equal(ffs_stored_time_ns(s), 1767323045000006000ull);
			ffs_stored_unref(s);
			free(want);
			close(fd);
		}
	kit_close(&k);
}

/* A dense memory is one file without a hole, private, and as long as the memory. */
static void test_dense_file(void **state)
{
	unsigned char *want, *is = malloc(SIZE);
	struct ffs_error err = {0};
	struct kit k;
	struct stat st;
	char path[200];

	kit_open(&k);
	int fd = make_memory(SIZE, 3, &want);

	assert_ok(put_branch(k.st, "b1", fd, SIZE, FFS_STORE_DENSE, NULL, &err), err);
	snprintf(path, sizeof(path), "%s/sbx1/b1/memory.bin", k.path);
	int file = open(path, O_RDONLY);

	assert_true(file >= 0 && fstat(file, &st) == 0);
	assert_int_equal(st.st_size, SIZE);
	assert_true(st.st_blocks * 512 >= st.st_size);
	assert_int_equal(lseek(file, 0, SEEK_HOLE), SIZE);
	assert_int_equal(st.st_mode & 07777, 0600);
	assert_int_equal(pread(file, is, SIZE, 0), SIZE);
	assert_memory_equal(is, want, SIZE);
	snprintf(path, sizeof(path), "%s/sbx1/b1", k.path);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0700);
	close(file);
	close(fd);
	free(want);
	free(is);
	kit_close(&k);
}

static void test_manifest_members(void **state)
{
	struct ffs_error err = {0};
	struct ffs_stored *s = NULL;
	struct json_object *o = NULL, *v = NULL, *list = NULL;
	unsigned char *want;
	struct kit k;
	char hex[33];

	kit_open(&k);
	int fd = make_memory(SIZE, 4, &want);

	assert_ok(put_branch(k.st, "b1", fd, SIZE, FFS_STORE_DENSE, NULL, &err), err);
	assert_ok(ffs_stored_open(k.st, "sbx1", "b1", &s, &err), err);
	assert_ok(ffs_stored_manifest(s, &o, &err), err);
	assert_true(json_object_object_get_ex(o, "sandbox", &v));
	assert_string_equal(json_object_get_string(v), "sbx1");
	assert_true(json_object_object_get_ex(o, "name", &v));
	assert_string_equal(json_object_get_string(v), "b1");
	/* what nobody here knows is kept */
	assert_true(json_object_object_get_ex(o, "later", &v));
	assert_string_equal(
		json_object_to_json_string_ext(v, JSON_C_TO_STRING_PLAIN), "{\"kept\":[1,\"two\"]}");
	struct ffs_hash h = ffs_hash_of(want, SIZE);

	ffs_hash_hex(&h, hex);
	json_object_object_get_ex(o, "memory", &v);
	assert_true(json_object_object_get_ex(v, "blocks_xxh3_128", &list));
	assert_int_equal(json_object_array_length(list), 5);
	struct json_object *whole = NULL;

	json_object_object_get_ex(v, "xxh3_128", &whole);
	assert_string_equal(json_object_get_string(whole), hex);
	h = ffs_hash_of(want + 4 * FFS_STORE_BLOCK, SIZE - 4 * FFS_STORE_BLOCK);
	ffs_hash_hex(&h, hex);
	assert_string_equal(json_object_get_string(json_object_array_get_idx(list, 4)), hex);
	json_object_put(o);
	ffs_stored_unref(s);
	free(want);
	close(fd);
	kit_close(&k);
}

static void test_newer_format(void **state)
{
	static const char text[] = "{\"format\":2,\"memory\":\"somewhere else\"}";
	struct ffs_error err = {0};
	struct json_object *o = NULL;
	bool sealed;

	assert_int_equal(ffs_manifest_parse(text, strlen(text), &o, &sealed, &err), -ENOTSUP);
	assert_non_null(strstr(err.text, "newer"));
	assert_int_equal(ffs_manifest_parse("{}", 2, &o, &sealed, &err), -EBADMSG);
	assert_int_equal(ffs_manifest_parse("[1]", 3, &o, &sealed, &err), -EBADMSG);
}

static void test_names(void **state)
{
	struct ffs_error err = {0};
	struct ffs_draft *d = NULL, *e = NULL;
	struct ffs_stored *s = NULL;
	unsigned char *want;
	struct kit k;
	int fd;

	kit_open(&k);
	fd = make_memory(4096, 1, &want);
	assert_int_equal(ffs_draft_begin(k.st, "sbx1", "b.partial", &d, &err), -EINVAL);
	assert_int_equal(ffs_draft_begin(k.st, "sbx1", "a/b", &d, &err), -EINVAL);
	assert_int_equal(ffs_draft_begin(k.st, "..", "b", &d, &err), -EINVAL);
	assert_ok(ffs_draft_begin(k.st, "sbx1", "b1", &d, &err), err);
	assert_int_equal(ffs_draft_begin(k.st, "sbx1", "b1", &e, &err), -EBUSY);
	ffs_draft_end(d);
	assert_ok(put_branch(k.st, "b1", fd, 4096, FFS_STORE_DENSE, NULL, &err), err);
	assert_int_equal(put_branch(k.st, "b1", fd, 4096, FFS_STORE_DENSE, NULL, &err), -EEXIST);
	assert_ok(put_branch(k.st, "b2", fd, 4096, FFS_STORE_PACKED, NULL, &err), err);
	assert_int_equal(ffs_store_rename(k.st, "sbx1", "b1", "b2", &err), -EEXIST);
	assert_ok(ffs_store_rename(k.st, "sbx1", "b1", "b3", &err), err);
	assert_int_equal(ffs_stored_open(k.st, "sbx1", "b1", &s, &err), -ENOENT);
	assert_ok(ffs_stored_open(k.st, "sbx1", "b3", &s, &err), err);
	/* what is open can be read to its end though it was removed */
	assert_ok(ffs_store_remove(k.st, "sbx1", "b3", &err), err);
	check_memory(s, want, 4096);
	ffs_stored_unref(s);
	assert_int_equal(ffs_store_remove(k.st, "sbx1", "b3", &err), -ENOENT);
	assert_ok(ffs_store_remove(k.st, "sbx1", "b2", &err), err);
	assert_ok(ffs_store_reap(k.st, "sbx1", &err), err);
	/* the last one takes the sandbox along */
	assert_int_equal(faccessat(ffs_store_fd(k.st), "sbx1", F_OK, 0), -1);
	free(want);
	close(fd);
	kit_close(&k);
}

static void test_rename_and_discard_of_drafts(void **state)
{
	struct json_object *o = make_manifest("11111111-2222-4333-8444-555555555555", 4096);
	struct ffs_error err = {0};
	struct ffs_stored *s = NULL;
	struct ffs_draft *d = NULL;
	unsigned char *want;
	struct kit k;

	kit_open(&k);
	int fd = make_memory(4096, 1, &want), vmstate = make_vmstate();

	assert_ok(ffs_draft_begin(k.st, "sbx1", "b1", &d, &err), err);
	assert_ok(ffs_draft_memory(d, fd, 4096, FFS_STORE_DENSE, NULL, NULL, &err), err);
	assert_ok(ffs_draft_rename(d, "b2", &err), err);
	assert_ok(ffs_draft_file(d, "vmstate", vmstate, &err), err);
	assert_ok(ffs_store_publish(d, o, NULL, &err), err);
	ffs_draft_end(d);
	assert_ok(ffs_stored_open(k.st, "sbx1", "b2", &s, &err), err);
	ffs_stored_unref(s);

	assert_ok(ffs_draft_begin(k.st, "sbx1", "b1", &d, &err), err);
	ffs_draft_discard(d);
	/* its name is free at once */
	assert_ok(put_branch(k.st, "b1", fd, 4096, FFS_STORE_DENSE, NULL, &err), err);
	assert_true(ffs_draft_memory(d, fd, 4096, FFS_STORE_DENSE, NULL, NULL, &err) < 0);
	assert_true(ffs_store_publish(d, o, NULL, &err) < 0);
	ffs_draft_end(d);
	assert_ok(ffs_stored_open(k.st, "sbx1", "b1", &s, &err), err);
	ffs_stored_unref(s);
	json_object_put(o);
	free(want);
	close(fd);
	close(vmstate);
	kit_close(&k);
}

/* Ten generations, each a little different, each from the one before; removed in some order: what is left is whole. */
static void test_generations(void **state)
{
	enum { N = 10 };
	static const unsigned removed[] = {4, 0, 7, 5, 2, 1, 9, 3, 6};
	struct ffs_stored *s[N] = {0};
	unsigned char *want[N];
	struct ffs_error err = {0};
	uint64_t all, shared;
	struct kit k;
	char name[8];
	int fd;

	kit_open(&k);
	for (unsigned i = 0; i < N; i++) {
		fd = make_memory(SIZE, 1, &want[i]);
		for (unsigned j = 1; j <= i; j++) {
			memset(want[i] + j * 700 * KIB, (int)j, 4096);
			assert_int_equal(
				pwrite(fd, want[i] + j * 700 * KIB, 4096, (off_t)(j * 700 * KIB)), 4096);
		}
		snprintf(name, sizeof(name), "g%u", i);
		assert_ok(put_branch(k.st, name, fd, SIZE, FFS_STORE_PACKED, i ? s[i - 1] : NULL, &err), err);
		assert_ok(ffs_stored_open(k.st, "sbx1", name, &s[i], &err), err);
		ffs_stored_sizes(s[i], &all, &shared);
		if (i) /* one chunk of it is new */
			assert_true(all - shared < MIB);
		close(fd);
	}
	for (unsigned i = 0; i < N; i++)
		ffs_stored_unref(s[i]);
	for (unsigned r = 0; r <= FFS_ARRAY_LEN(removed); r++) {
		for (unsigned i = 0; i < N; i++) {
			snprintf(name, sizeof(name), "g%u", i);
			if (ffs_stored_open(k.st, "sbx1", name, &s[i], &err) < 0)
				continue;
			check_memory(s[i], want[i], SIZE);
			ffs_stored_unref(s[i]);
		}
		if (r == FFS_ARRAY_LEN(removed))
			break;
		snprintf(name, sizeof(name), "g%u", removed[r]);
		assert_ok(ffs_store_remove(k.st, "sbx1", name, &err), err);
		assert_ok(ffs_store_reap(k.st, "sbx1", &err), err);
	}
	/* the last one holds what nobody else does */
	assert_ok(ffs_stored_open(k.st, "sbx1", "g8", &s[8], &err), err);
	ffs_stored_sizes(s[8], &all, &shared);
	assert_int_equal(shared, 0);
	ffs_stored_unref(s[8]);
	for (unsigned i = 0; i < N; i++)
		free(want[i]);
	kit_close(&k);
}

static int count_entry(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry)
{
	unsigned *n = arg;

	n[entry]++;
	return 0;
}

static void test_recovery(void **state)
{
	struct ffs_error err = {0}, why = {0};
	struct ffs_store *other = NULL;
	struct ffs_draft *d = NULL;
	unsigned char *want;
	unsigned n[2] = {0};
	struct kit k;
	int fd;

	kit_open(&k);
	fd = make_memory(4096, 1, &want);
	assert_ok(put_branch(k.st, "b1", fd, 4096, FFS_STORE_DENSE, NULL, &err), err);
	assert_ok(put_branch(k.st, "b2", fd, 4096, FFS_STORE_DENSE, NULL, &err), err);
	assert_ok(ffs_store_remove(k.st, "sbx1", "b2", &err), err); /* and not reaped */
	assert_int_equal(mkdirat(ffs_store_fd(k.st), "sbx1/b3.partial", 0700), 0);
	close(openat(ffs_store_fd(k.st), "sbx1/b3.partial/memory.bin", O_CREAT | O_WRONLY, 0600));
	/* one that somebody is writing is left alone */
	assert_ok(ffs_draft_begin(k.st, "sbx1", "b4", &d, &err), err);
	assert_ok(ffs_store_recover(k.st, &err), err);
	assert_ok(ffs_store_each(k.st, NULL, count_entry, n, &err), err);
	assert_int_equal(n[FFS_STORE_ENTRY_BRANCH], 1);
	assert_int_equal(n[FFS_STORE_ENTRY_FAILED], 1);
	assert_int_equal(ffs_store_failure(k.st, "sbx1", "b3", &why), 0);
	assert_non_null(strstr(why.text, "daemon ended"));
	assert_int_equal(faccessat(ffs_store_fd(k.st), "sbx1/b4.partial", F_OK, 0), 0);
	assert_int_equal(faccessat(ffs_store_fd(k.st), "sbx1/b3.partial", F_OK, 0), -1);
	ffs_draft_end(d);
	/* a store has one daemon */
	assert_ok(ffs_store_open(k.path, &other, &err), err);
	assert_int_equal(ffs_store_recover(other, &err), -EBUSY);
	ffs_store_close(other);
	assert_ok(ffs_store_remove(k.st, "sbx1", "b3", &err), err);
	assert_int_equal(ffs_store_failure(k.st, "sbx1", "b3", &why), -ENOENT);
	free(want);
	close(fd);
	kit_close(&k);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round_trip),
		cmocka_unit_test(test_dense_file),
		cmocka_unit_test(test_manifest_members),
		cmocka_unit_test(test_newer_format),
		cmocka_unit_test(test_names),
		cmocka_unit_test(test_rename_and_discard_of_drafts),
		cmocka_unit_test(test_generations),
		cmocka_unit_test(test_recovery),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
