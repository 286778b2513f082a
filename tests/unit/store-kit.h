/* What tests of the store share: a store in a directory of its own, memory to write into it, a manifest. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/internal.h"

#define KIB 1024ull
#define MIB (1024 * KIB)

/* Fail with the sentence of a struct ffs_error. */
#define assert_ok(call, err)                                                                                 \
	do {                                                                                                 \
		int ok_r_ = (call);                                                                          \
		if (ok_r_ < 0)                                                                               \
			fail_msg("%s: %d: %s", #call, ok_r_, (err).text);                                    \
	} while (0)

struct kit {
	char dir[64];  /* scratch */
	char path[80]; /* of the store, in it */
	struct ffs_store *st;
};

static inline void kit_open(struct kit *k)
{
	struct ffs_error err = {0};

	snprintf(k->dir, sizeof(k->dir), "/dev/shm/forkfs-store-XXXXXX");
	assert_non_null(mkdtemp(k->dir));
	snprintf(k->path, sizeof(k->path), "%s/st", k->dir);
	assert_ok(ffs_store_open(k->path, &k->st, &err), err);
}

static inline void kit_close(struct kit *k)
{
	ffs_store_close(k->st);
	ffs_store_ops = &ffs_store_ops_real;
	assert_int_equal(ffs_store_remove_tree(AT_FDCWD, k->dir), 0);
}

/* Chunks of every sort: holes, zeros, what compresses, what does not, the same again. */
static inline void fill_memory(unsigned char *m, size_t size, unsigned seed)
{
	uint32_t x = seed * 2654435761u + 1;

	for (size_t c = 0; c * FFS_STORE_CHUNK < size; c++) {
		unsigned char *p = m + c * FFS_STORE_CHUNK;
		size_t len = size - c * FFS_STORE_CHUNK < FFS_STORE_CHUNK ? size - c * FFS_STORE_CHUNK
									  : FFS_STORE_CHUNK;

		if (c % 5 == 0)
			continue;
		for (size_t i = 0; i < len; i++) {
			x = x * 1664525 + 1013904223;
			if (c % 5 == 1)
				p[i] = (unsigned char)(x >> 24);
			else if (c % 5 == 2)
				p[i] = (unsigned char)("forkfs"[i % 6] + (i / 4096) + c);
			else if (c % 5 == 3)
				p[i] = i % 512 ? 0 : (unsigned char)(x >> 24);
			else
				p[i] = (unsigned char)(i * 7); /* the same each time */
		}
	}
}

/* A memfd of `size` bytes, with holes where memory is zero, and a mapping of what is in it. */
static inline int make_memory(size_t size, unsigned seed, unsigned char **map)
{
	int fd = memfd_create("test", MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)size), 0);
	*map = calloc(1, size ? size : 1);
	assert_non_null(*map);
	fill_memory(*map, size, seed);
	for (size_t off = 0; off < size; off += 4096) {
		size_t n = size - off < 4096 ? size - off : 4096;

		if (!ffs_is_zero(*map + off, n))
			assert_int_equal(pwrite(fd, *map + off, n, (off_t)off), (ssize_t)n);
	}
	return fd;
}

static inline int make_vmstate(void)
{
	int fd = memfd_create("vmstate", MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, "device state", 12), 12);
	return fd;
}

static inline struct json_object *make_manifest(const char *id, uint64_t memory_size)
{
	char text[600];

	snprintf(text, sizeof(text),
		"{\"format\":1,\"id\":\"%s\",\"sandbox\":\"x\",\"name\":\"x\",\"instant\":"
		"\"2026-01-02T03:04:05.000006Z\",\"mode\":\"live\",\"memory\":{\"size\":%llu,\"regions\":[]},"
		"\"vmstate\":{\"size\":12},\"vmm\":{\"kind\":\"qemu\"},\"later\":{\"kept\":[1,\"two\"]}}",
		id, (unsigned long long)memory_size);
	struct json_object *o = json_tokener_parse(text);

	assert_non_null(o);
	return o;
}

/* Write a branch and publish it: 0 or -errno. */
static inline int put_branch(struct ffs_store *st, const char *name, int memory, uint64_t size,
	enum ffs_store_kind kind, struct ffs_stored *share, struct ffs_error *err)
{
	struct json_object *o = make_manifest("11111111-2222-4333-8444-555555555555", size);
	int vmstate = make_vmstate();
	struct ffs_draft *d = NULL;
	int r = ffs_draft_begin(st, "sbx1", name, &d, err);

	if (!r)
		r = ffs_draft_memory(d, memory, size, kind, share, NULL, err);
	if (!r)
		r = ffs_draft_file(d, "vmstate", vmstate, err);
	if (!r)
		r = ffs_store_publish(d, o, NULL, err);
	ffs_draft_end(d);
	json_object_put(o);
	close(vmstate);
	return r;
}

/* All of a stored branch's memory is `want`, in pieces of every alignment. */
static inline void check_memory(struct ffs_stored *s, const unsigned char *want, uint64_t size)
{
	static const size_t pieces[] = {1 << 20, 65536, 4096, 100001};
	unsigned char *buf = malloc(1 << 20);
	struct ffs_error err = {0};

	assert_int_equal(ffs_stored_memory_size(s), size);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(pieces); i++)
		for (uint64_t off = 0; off < size;) {
			ssize_t n = ffs_stored_read_memory(s, buf, pieces[i], off, &err);

			if (n <= 0)
				fail_msg("read at %llu: %zd: %s", (unsigned long long)off, n, err.text);
			assert_memory_equal(buf, want + off, (size_t)n);
			off += (uint64_t)n;
		}
	assert_int_equal(ffs_stored_read_memory(s, buf, 1, size, &err), 0);
	free(buf);
}
