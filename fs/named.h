/* branches/: named branches, made by mkdir or ctl, removed, renamed. */
#pragma once

#include "daemon.h"

/* Tree lock held: reserve a name. *out has a reference for the caller. -EEXIST, -EBUSY, -ESRCH, -EDEADLK …
 * with the sentence. */
int ffs_named_reserve(struct ffs_sbx *sbx, const char *name, const struct ffs_caller *who,
	struct ffs_named **out, struct ffs_error *err);
struct ffs_take_options {
	uint64_t timeout_ns; /* see struct ffs_branch_options */
	bool without_disks;
	enum ffs_branch_mode mode;
	uint64_t max_rate;
	bool force;
	bool has_store; /* for a cached branch: where it goes, if not where the mount's go */
	enum ffs_store_kind store;
};
/* Take the branch of a reserved name and publish it, or give the name back. `wanted` is asked once, with the
 * tree lock held, before publishing: false gives everything back (-EINTR). Pool thread, without the tree
 * lock; waits. */
int ffs_named_take(struct ffs_named *named, const struct ffs_take_options *how, struct ffs_cancel *cancel,
	bool (*wanted)(void *arg), void *arg, struct ffs_error *err);

/* Remove a cached branch as rmdir does, but for what the kernel remembers of its name. -ENOENT: it was
 * removed already. Without the tree lock. */
int ffs_named_drop(struct ffs_named *n, struct ffs_error *err);

/* FUSE handlers; node: branches/ itself. */
void ffs_named_mkdir(struct ffs_call *call, struct ffs_node *dir, const char *name);
void ffs_named_rmdir(struct ffs_call *call, struct ffs_node *dir, const char *name);
void ffs_named_rename(struct ffs_call *call, struct ffs_node *dir, const char *name, struct ffs_node *newdir,
	const char *newname, unsigned flags);
/* Let go of a sandbox whose `detaching` the caller has set (requests.c). Pool or main thread, without the
 * tree lock; waits. */
void ffs_sbx_detach(struct ffs_sbx *s);
