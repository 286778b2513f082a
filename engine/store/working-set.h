/* The working set of a branch: which pieces of its memory its children touch first (docs/format.md). A hint:
 * nothing depends on it but how soon a child has its pages. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

#define FFS_WORKING_SET "working-set" /* its file's name beside the branch's other files */
#define FFS_WORKING_SET_UNIT                                                                                 \
	65536u /* pieces of it: what a pager's fault brings, and what the kernel maps around one */
#define FFS_WORKING_SET_LIMIT (256ull << 20) /* bytes, where nobody says another */

struct ffs_range {
	uint64_t offset, len; /* in memory.bin, multiples of 4096 */
};

struct ffs_working_set {
	unsigned n;
	struct ffs_range *span; /* in order, apart from each other */
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
/* Set the bits of such a map that its spans touch. */
void ffs_working_set_mark(const struct ffs_working_set *set, uint64_t unit, uint64_t *map);
/* Have the kernel read its pieces of a file of `size` bytes into memory, at most `limit` bytes, in their order and without
 * waiting for them: from disk, from swap, from who serves the file. Before each piece of 128 KiB `wanted` (NULL: always) is
 * asked whether to go on. The bytes that were asked for: a hint, so nothing is said of what cannot be had. */
uint64_t ffs_working_set_read_ahead(const struct ffs_working_set *set, int fd, uint64_t size, uint64_t limit,
	bool (*wanted)(void *arg), void *arg);
uint64_t ffs_working_set_bytes(const struct ffs_working_set *set);
void ffs_working_set_free(struct ffs_working_set *set);
