/* What `forkfs doctor` tests: each test does the thing it names and reports lines. */
#pragma once

#include "base/error.h"

enum ffs_finding {
	FFS_FINDING_OK,   /* works */
	FFS_FINDING_INFO, /* nothing to do about it */
	FFS_FINDING_WARN, /* something will be slower, or refused in some cases */
	FFS_FINDING_FAIL, /* forkfs cannot do its work */
};

struct ffs_doctor; /* collects the lines */

/* One line: the name of the test, what was found, and what to do about it (NULL: nothing). */
void ffs_doctor_line(struct ffs_doctor *d, enum ffs_finding finding, const char *name, const char *remedy,
	const char *fmt, ...) FFS_PRINTF(5, 6);

/* The first number in a small file of /proc or /sys; -1 when there is none. */
long long ffs_doctor_number(const char *path);

/* A real injection and real write protection of a child process: shared, anonymous and huge pages. */
void ffs_doctor_uffd(struct ffs_doctor *d);
/* A tiny FUSE session in a mount namespace of its own: reads by passthrough, and whether a client can write
 * through it. */
void ffs_doctor_fuse(struct ffs_doctor *d);
/* Kernel, privileges, KVM, KSM, huge pages, limits, memory. */
void ffs_doctor_kernel(struct ffs_doctor *d);
void ffs_doctor_privileges(struct ffs_doctor *d);
void ffs_doctor_kvm(struct ffs_doctor *d);
void ffs_doctor_memory(struct ffs_doctor *d);
void ffs_doctor_limits(struct ffs_doctor *d);
