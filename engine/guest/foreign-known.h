/* Processes of an earlier look that have not run since: they have neither got a descriptor nor made a mapping
 * meanwhile, so what was found in them then still holds, and reading three numbers of /proc stands for going
 * through all of their descriptors. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmm/vmm.h"

/* A thread of a process in which nothing was found, while it had no CPU. `turns` counts how often it has got
 * one since it began, so the same number means that it had none in between. `ran_ns` tells it from a later
 * thread of the same number. */
struct ffs_known_thread {
	pid_t pid, tid;
	uint64_t ran_ns, turns;
};

#define FFS_KNOWN_THREADS 8u /* of one process; one with more is looked at each time */

/* What a process was like before it was looked at; n = 0: nothing that would show later that it has not run.
 */
struct ffs_known_mark {
	unsigned n;
	struct ffs_known_thread t[FFS_KNOWN_THREADS];
};

/* Owned by whoever looks; grows under his lock, read by any thread once it is sorted. Of one VMM. */
struct ffs_foreign_known {
	struct ffs_proc_id vmm;
	struct ffs_geometry geo;
	size_t n, cap;
	struct ffs_known_thread *list;
};

/* NULL when out of memory: then the next look is a full one. */
struct ffs_foreign_known *ffs_known_new(struct ffs_proc_id vmm, const struct ffs_geometry *geo);
/* Is that what is known of this VMM's memory, as it is? `k` may be NULL. */
bool ffs_known_fits(
	const struct ffs_foreign_known *k, struct ffs_proc_id vmm, const struct ffs_geometry *geo);
/* Before the look at process `pid` (`proc`: /proc), which counts only if the mark has n > 0. */
void ffs_known_mark(int proc, pid_t pid, struct ffs_known_mark *mark);
void ffs_known_add(struct ffs_foreign_known *k, const struct ffs_known_mark *mark);
void ffs_known_sort(struct ffs_foreign_known *k);
/* Has process `pid` not run since it was added? Then *mark is what it was added with. */
bool ffs_known_quiet(const struct ffs_foreign_known *k, int proc, pid_t pid, struct ffs_known_mark *mark);
