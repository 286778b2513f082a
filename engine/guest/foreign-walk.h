/* Between foreign.c (the VMM itself), foreign-walk.c (everybody else), foreign-proc.c (one of them) and
 * foreign-known.c (those that have not run since the look before). */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "guest/foreign-known.h"
#include "guest/foreign.h"

/* Add a finding, one per kind and process. The caller excludes others. comm is read from /proc. `fmt` goes on
 * after "process PID (COMM) ". */
void ffs_foreign_add(struct ffs_foreign *f, enum ffs_foreign_kind kind, pid_t pid, const char *fmt, ...)
	FFS_PRINTF(4, 5);

/* Call fn for each entry of an open directory of /proc that is a number, until fn returns non-zero; 0, what
 * fn returned, or -errno. Allocates nothing. */
int ffs_foreign_each(int dir, int (*fn)(void *arg, int dir, const char *number), void *arg);

/* Does the mapping [start, end) of dev:ino at file offset show memory of a region? NULL, or the first such
 * region. With `hva` set: only at another address than the region's own (a second mapping). */
const struct ffs_region *ffs_foreign_region(const struct ffs_geometry *geo, uint64_t dev, uint64_t ino,
	uint64_t start, uint64_t end, uint64_t offset, bool hva);

/* Look at every other process; `known` as for ffs_foreign_scan(). 0 or -errno with the sentence. */
int ffs_foreign_walk(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign_known **known,
	struct ffs_foreign *out, struct ffs_error *err);

#define FFS_WALK_WORKERS 4u

/* One pass over the other processes. */
struct ffs_walk {
	atomic_uint refs;
	int proc; /* /proc */
	struct ffs_proc_id vmm;
	pid_t self;
	bool fds;          /* a region is shared: holding its file open for writing is enough to write it */
	atomic_bool query; /* the kernel knows PROCMAP_QUERY, as far as we know */
	bool stale;        /* the mutant that takes everybody known for quiet */
	_Atomic uint64_t progress;
	atomic_uint quiet;
	_Atomic pid_t at[FFS_WALK_WORKERS]; /* what each is looking at; 0: it has ended */

	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned running;
	bool abandoned;
	int failure;
	unsigned unreadable;
	pid_t first_unreadable;
	struct ffs_foreign found;
	unsigned reports;                         /* findings of any process, dropped ones too */
	struct ffs_foreign_known *before, *after; /* before: constant; NULL: nobody is known, or is to be */
	/* of each region's inode, all processes together: shared mappings that may write; -1: not known */
	int64_t shared[FFS_MAX_REGIONS];
	struct ffs_geometry geo; /* not under lock: never changes */
};

/* A mapping or a descriptor open for writing of task `task` (of process `pid`): a finding when it is of guest
 * memory and not of the VMM's own address space. Any thread, without walk->lock. */
void ffs_walk_mapping(struct ffs_walk *w, pid_t pid, pid_t task, uint64_t dev, uint64_t ino, uint64_t start,
	uint64_t end, uint64_t offset);
void ffs_walk_descriptor(struct ffs_walk *w, pid_t pid, pid_t task, uint64_t dev, uint64_t ino);
/* Look at the process with that number in /proc. 0, 1 (both: done, or gone), or -errno: -EACCES when we may
 * not. */
int ffs_walk_process(struct ffs_walk *w, const char *number);
