/* Who writes to the store next, and whether there will be room: branches of the store from before their pause
 * until they are published. */
#pragma once

#include "daemon.h"

struct ffs_write_token;

/* Embedded in what is to be written. Tree lock, but for what is said to be fixed. */
struct ffs_write {
	struct ffs_list link; /* in fs->writes, from begin to end */
	struct ffs_sbx *sbx;  /* referenced as long */
	uint64_t bytes;       /* that it may take; fixed */
	const atomic_ullong *done;
	uint64_t waiting; /* since which arrival; 0: not */
	bool counted;     /* by ffs_write_place() */
	struct ffs_write_token *token;
	void (*run)(struct ffs_write *w);
};

/* Before the pause: keep so much of the store's room for it, of which *done bytes are taken already. -ENOSPC
 * with the figures. Without the tree lock; asks the file system. */
int ffs_write_begin(struct ffs_write *w, struct ffs_sbx *sbx, uint64_t bytes, const atomic_ullong *done,
	struct ffs_error *err);
/* Call run(w) on a writer's thread when its turn has come: the sandboxes in turn, within one in the order of
 * arrival. Once. */
void ffs_write_submit(struct ffs_write *w, void (*run)(struct ffs_write *w));
/* It is published, or given up. Idempotent. Without the tree lock. */
void ffs_write_end(struct ffs_write *w);
/* Its place among those that wait, from 1; 0: it does not wait. Tree lock held. */
unsigned ffs_write_place(struct ffs_write *w);

/* Delete the files of what was removed, some time. Without the tree lock. */
void ffs_write_reap(struct ffs_sbx *sbx);
