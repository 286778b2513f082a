/* The disks of a sandbox, named at attach, and what a branch captures of them.
 *
 * A disk is a regular file that the VMM has open. Inside the pause it is cloned (FICLONE: shared blocks,
 * constant time) into a file without a name in the disk's own directory, or, where the file system shares no
 * blocks, copied there. The order: ffs_disks_check, ffs_disk_images_prepare, ffs_disks_flush (guest running),
 * ffs_disk_images_capture (guest stopped, its I/O drained), ffs_disk_images_seal. Nothing of the VMM's is
 * ever opened for writing. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "base/util.h"
#include "forkfs-engine.h"

/* A file system that shares no blocks makes the pause as long as the copy: beyond this much data it is
 * refused. */
#define FFS_DISK_COPY_MAX (512ull << 20)

struct ffs_disk {
	char id[65];
	char *path;   /* as it was named */
	char *dir;    /* where the file lies, links resolved */
	int fd;       /* read-only */
	bool written; /* the VMM has it open for writing */
};

/* Fixed once opened; any thread. */
struct ffs_disks {
	unsigned n;
	struct ffs_disk disk[FFS_MAX_DISKS];
};

/* One disk of one branch. */
struct ffs_disk_image {
	char id[65];
	char *path;          /* of the disk it was taken of */
	int target;          /* being written; -1 once sealed */
	int fd;              /* read-only, once sealed; -1 */
	bool copied;         /* not cloned */
	uint64_t size;       /* bytes */
	uint64_t capture_ns; /* inside the pause */
};

struct ffs_disk_images {
	unsigned n;
	uint64_t flush_ns, flush_rounds;
	struct ffs_disk_image image[FFS_MAX_DISKS];
};

/* Open and check the named disks: regular files outside of the file system `own_dev` that the VMM has open.
 * -EINVAL, -ENOENT, -ENOTSUP … with a sentence that names disk and remedy. *out may be NULL when n is 0. */
int ffs_disks_open(pid_t vmm, const struct ffs_disk_name *names, unsigned n, dev_t own_dev,
	struct ffs_disks **out, struct ffs_error *err);
void ffs_disks_free(struct ffs_disks *d);
/* Before each branch: the VMM still has each of them open, and for writing if it had. -EBUSY with a sentence.
 */
int ffs_disks_check(const struct ffs_disks *d, pid_t vmm, struct ffs_error *err);
/* Write back what the page cache holds dirty, in rounds, until little is left or it stops shrinking: a clone
 * would do it inside the pause. -EINTR (cancel), -EAGAIN (deadline), -EIO. */
int ffs_disks_flush(const struct ffs_disks *d, struct ffs_cancel *cancel, uint64_t deadline_ns,
	struct ffs_disk_images *images, struct ffs_error *err);

/* Files to capture into, and whether there will be room. -ENOSPC with both figures, -EFBIG (a copy would be
 * too long), -EACCES … */
int ffs_disk_images_prepare(const struct ffs_disks *d, struct ffs_disk_images *out, struct ffs_error *err);
/* Inside the pause. `beat` is called at least every 100 ms of copying. -ETIMEDOUT at the deadline. */
int ffs_disk_images_capture(const struct ffs_disks *d, struct ffs_disk_images *images,
	void (*beat)(void *arg), void *arg, uint64_t deadline_ns, struct ffs_error *err);
/* After the resume: from now on nobody can write them. */
int ffs_disk_images_seal(struct ffs_disk_images *images, struct ffs_error *err);
/* Closes everything; fine on zeroes that were never prepared. */
void ffs_disk_images_close(struct ffs_disk_images *images);
