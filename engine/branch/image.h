/* The memory of one branch: a memfd of dense offsets, holes where the guest's page was zero, sealed once
 * complete.
 *
 * Written with pwrite(2) only (no writable mapping ever exists) by the fault
 * handler, copiers and readers, each its own pages; read by anybody. Reading a hole with pread(2) does not
 * populate it. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct ffs_image {
	int fd;
	uint64_t size;
};

int ffs_image_open(struct ffs_image *img, uint64_t size, struct ffs_error *err);
/* 0 or -errno (ENOSPC, ENOMEM, …). Allocates only what the kernel does. */
int ffs_image_write(struct ffs_image *img, const void *buf, size_t len, uint64_t off);
/* Against writing, growing, shrinking and further seals. */
int ffs_image_seal(struct ffs_image *img, struct ffs_error *err);
/* Bytes of memory that it takes; `drop`: give them back, its content is of no use. */
uint64_t ffs_image_settle(struct ffs_image *img, bool drop);
void ffs_image_close(struct ffs_image *img);
