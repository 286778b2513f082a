/* The memory of one branch: a file of dense offsets in memory, holes where the guest's page was zero, that
 * nobody can write once it is complete.
 *
 * Written with pwrite(2) only (no writable mapping ever exists) by the fault handler, copiers and readers,
 * each its own pages; read by anybody. Reading a hole with pread(2) does not populate it. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define FFS_IMAGE_LARGE (2ul << 20)

struct ffs_image {
	int fd;    /* read-only, from the beginning to ffs_image_close(): what may be given to others */
	int wfd;   /* until it is sealed */
	int mount; /* the file's own tmpfs, until it is sealed; -1: a memfd, or sealed */
	uint64_t size;
	pthread_mutex_t writing; /* with priority inheritance: see image.c */
};

/* Before ffs_image_open(): no image yet. Every one that is initialised is to be closed. */
void ffs_image_init(struct ffs_image *img);
int ffs_image_open(struct ffs_image *img, uint64_t size, struct ffs_error *err);
/* Give [off, off + FFS_IMAGE_LARGE), of which nothing was written, a large page if that is possible: no
 * longer a hole, still zero. Not for the fault path (it clears 2 MiB, and maps). */
bool ffs_image_populate(struct ffs_image *img, uint64_t off);
/* Turn the zero pages of such a piece into holes again, once it is complete. `buf`: its size. */
int ffs_image_trim(struct ffs_image *img, uint64_t off, char *buf);
/* 1 when a page of the range, written or not, is zero; 0 or -errno. `buf` of `size` bytes, whole pages. */
int ffs_image_any_zero(struct ffs_image *img, uint64_t off, uint64_t len, char *buf, size_t size);
/* 0 or -errno (ENOSPC, ENOMEM, …). Allocates only what the kernel does. */
int ffs_image_write(struct ffs_image *img, const void *buf, size_t len, uint64_t off);
/* Against writing, growing, shrinking, through this or any other descriptor. Nobody writes any more. Waits for
 * whoever holds a descriptor for writing in passing, 5 s at most: EBUSY. */
int ffs_image_seal(struct ffs_image *img, struct ffs_error *err);
/* Bytes of memory that it takes; `drop`: give them back, its content is of no use. */
uint64_t ffs_image_settle(struct ffs_image *img, bool drop);
void ffs_image_close(struct ffs_image *img);
