/* What is read from strangers: a manifest, a packed index, an import stream, a fork.
 *
 *   -DFUZZ_TARGET=manifest|index|stream|fork   a fuzzer of it (meson option `fuzz`, by clang: tests/README.md
 *                                              says how)
 *   -DFFS_REPLAY                               a plain program: every file of the directories named
 *                                              (corpus/manifest, …) is tried, and those called seed* with
 *                                              their bytes changed in turn, and cut short
 *
 * Each input is tried as it is and with its checksums made right. Whatever the input, nothing may crash, and
 * what was accepted must be usable. */
#include "fuzz-store.h"

#include <dirent.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "store/forks.h"
#include "store/internal.h"

#define MEMORY (1u << 20)

#define STRING(x) #x
#define NAME_OF(x) STRING(x)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_manifest(const unsigned char *text, size_t len)
{
	struct json_object *o = NULL, *again = NULL;
	struct ffs_manifest m = {0};
	bool sealed = false;
	char *out = NULL;

	if (ffs_manifest_parse((const char *)text, len, &o, &sealed, NULL) < 0)
		return;
	if (ffs_manifest_load(o, true, &m, NULL) == 0) {
		/* written anew, with its members that nobody knows, it can be read again */
		if (ffs_manifest_text(o, &out, &len, NULL) < 0 ||
			ffs_manifest_parse(out, len, &again, &sealed, NULL) < 0 || !sealed)
			abort();
		json_object_put(again);
		free(out);
		ffs_manifest_clear(&m);
	}
	json_object_put(o);
}

static void try_index(const unsigned char *bytes, size_t len)
{
	unsigned char *again = NULL;
	size_t again_len = 0;
	struct ffs_index x;

	if (ffs_index_decode(bytes, len, &x, NULL) < 0)
		return;
	for (uint64_t i = 0; i < x.n_chunks; i++)
		if (x.kind[i] != FFS_CHUNK_ZERO &&
			(x.pack[i] >= x.n_packs ||
				(uint64_t)x.offset[i] + x.stored[i] > x.packs[x.pack[i]].size))
			abort();
	if (ffs_index_encode(&x, &again, &again_len) < 0 || again_len != len)
		abort();
	free(again);
	ffs_index_clear(&x);
}

static ssize_t read_zeros(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	if (off > MEMORY || len > MEMORY - off)
		abort();
	memset(buf, 0, len);
	return (ssize_t)len;
}

static void try_fork(const unsigned char *text, size_t len)
{
	const struct ffs_mailbox_memory mem = {.size = MEMORY, .fd = -1, .read = read_zeros};
	struct ffs_fork_record r = {0}, again = {0};
	char *out = NULL;

	if (ffs_fork_record_parse((const char *)text, len, NULL, NULL, &r, NULL) < 0)
		return;
	/* what is accepted can be written anew, and means the same; there is no mailbox in that memory */
	if (ffs_fork_record_text(&r, &out, &len, NULL) < 0 ||
		ffs_fork_record_parse(out, len, r.name, r.branch, &again, NULL) < 0 || again.n != r.n)
		abort();
	if ((ffs_fork_record_check(&r, &mem, NULL) == 0) != (r.n == 0))
		abort();
	ffs_fork_record_clear(&again);
	ffs_fork_record_clear(&r);
	free(out);
}

/* The branch is whole, and comes out of the store as it went in. */
static void check_stored(struct ffs_store *st)
{
	int fd = memfd_create("again", MFD_CLOEXEC);
	struct ffs_stored *s = NULL;

	if (fd < 0 || ffs_stored_open(st, "s", "b", &s, NULL) < 0 || ffs_stored_verify(s, NULL, NULL) < 0)
		abort();
	if (ffs_stored_export(s, fd, NULL, NULL) < 0 || lseek(fd, 0, SEEK_SET) < 0 ||
		ffs_store_import(st, fd, "s", "c", FFS_STORE_PACKED, NULL, NULL) < 0)
		abort();
	ffs_stored_unref(s);
	close(fd);
}

static void try_stream(const unsigned char *bytes, size_t len)
{
	char dir[] = "/dev/shm/forkfs-fuzz-XXXXXX";
	int fd = memfd_create("stream", MFD_CLOEXEC);
	struct ffs_store *st = NULL;

	if (fd < 0 || !mkdtemp(dir))
		abort();
	if (ffs_pwrite_full(fd, bytes, len, 0) != (ssize_t)len || ffs_store_open(dir, &st, NULL) < 0)
		abort();
	if (ffs_store_import(st, fd, "s", "b", FFS_STORE_MEMORY, NULL, NULL) == 0)
		check_stored(st);
	ffs_store_close(st);
	close(fd);
	if (ffs_store_remove_tree(AT_FDCWD, dir) < 0)
		abort();
}

static const struct target {
	const char *name;
	void (*try)(const unsigned char *bytes, size_t len);
	unsigned char *(*repair)(const unsigned char *in, size_t *len);
	size_t stride; /* of the bytes that the replay changes: an import takes a while */
} targets[] = {
	{"manifest", try_manifest, repair_manifest, 1},
	{"index", try_index, repair_index, 1},
	{"stream", try_stream, repair_stream, 5},
	{"fork", try_fork, repair_fork, 7},
};

static const struct target *target_named(const char *name)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(targets); i++)
		if (strcmp(targets[i].name, name) == 0)
			return &targets[i];
	return NULL;
}

static void try_both(const struct target *t, const unsigned char *data, size_t size)
{
	/* a copy of exactly that size: so that a sanitizer sees a read beyond it */
	unsigned char *copy = malloc(size ? size : 1), *right;

	if (!copy)
		abort();
	memcpy(copy, data, size);
	t->try(copy, size);
	right = t->repair(copy, &size);
	free(copy);
	if (!right)
		return;
	right = realloc(right, size ? size : 1);
	if (!right)
		abort();
	t->try(right, size);
	free(right);
}

#ifdef FUZZ_TARGET
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	try_both(target_named(NAME_OF(FUZZ_TARGET)), data, size);
	return 0;
}
#endif

#ifdef FFS_REPLAY
static int replay(const struct target *t, const char *path, bool vary)
{
	static const unsigned char with[] = {0xff, 0x80, 0x01};
	char *bytes = NULL;
	size_t len = 0;

	if (ffs_read_file(path, 1 << 20, &bytes, &len) < 0) {
		fprintf(stderr, "%s cannot be read\n", path);
		return -1;
	}
	unsigned char *at = (unsigned char *)bytes;

	try_both(t, at, len);
	for (size_t i = 0; vary && i < len; i += t->stride) {
		for (unsigned k = 0; k < FFS_ARRAY_LEN(with); k++) {
			at[i] ^= with[k];
			try_both(t, at, len);
			at[i] ^= with[k];
		}
		try_both(t, at, i);
	}
	free(bytes);
	return 0;
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		const char *base = strrchr(argv[i], '/');
		const struct target *t = base ? target_named(base + 1) : NULL;
		struct dirent **list = NULL;
		int n = t ? scandir(argv[i], &list, NULL, alphasort) : -1, tried = 0;

		if (n < 0) {
			fprintf(stderr, "%s is no directory of a corpus\n", argv[i]);
			return 1;
		}
		for (int k = 0; k < n; k++) {
			char path[600];

			snprintf(path, sizeof(path), "%s/%.250s", argv[i], list[k]->d_name);
			if (list[k]->d_name[0] != '.') {
				if (replay(t, path, strncmp(list[k]->d_name, "seed", 4) == 0) < 0)
					return 1;
				tried++;
			}
			free(list[k]);
		}
		free(list);
		if (!tried) {
			fprintf(stderr, "%s is empty\n", argv[i]);
			return 1;
		}
		printf("%s: %d inputs\n", t->name, tried);
	}
	return argc > 1 ? 0 : 1;
}
#endif
