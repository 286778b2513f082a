/* The working set of a branch: which pieces of its memory its children touch first (docs/format.md). A hint:
 * nothing depends on it but how soon a child has its pages. */
#pragma once

#include <stdint.h>

#include "base/error.h"

#define FFS_WORKING_SET "working-set" /* its file's name beside the branch's other files */

struct ffs_span {
	uint64_t offset, len; /* in memory.bin, multiples of 4096 */
};

struct ffs_working_set {
	unsigned n;
	struct ffs_span *span; /* in order, apart from each other */
};

/* Read and check one that is for memory of that size. -ENOENT: there is none; -EBADMSG: it is damaged, or of
 * other memory. *out is to be freed on success. */
int ffs_working_set_read(
	const char *path, uint64_t memory_size, struct ffs_working_set *out, struct ffs_error *err);
/* Write it, in place of one that is there: at no time is there half of one. */
int ffs_working_set_write(
	const char *path, uint64_t memory_size, const struct ffs_working_set *set, struct ffs_error *err);
/* Spans of a map that has a bit for each `unit` bytes of memory, no more than `limit` bytes of them; *out is
 * to be freed on success. 0 or -ENOMEM. */
int ffs_working_set_of(const uint64_t *map, uint64_t unit, uint64_t memory_size, uint64_t limit,
	struct ffs_working_set *out);
uint64_t ffs_working_set_bytes(const struct ffs_working_set *set);
void ffs_working_set_free(struct ffs_working_set *set);
