/* Branches on their way to the store and back: written when their capture is complete, served from there,
 * found again by the next daemon. */
#pragma once

#include "daemon.h"

/* Open the mount's store (options), recover it, put its branches into the tree. Before any thread exists. 0
 * when the mount has none. */
int ffs_durable_open(struct ffs_fs *fs, struct ffs_error *err);
/* Show a branch that somebody else has put into the store. -EEXIST; -ENOENT; … Without the tree lock. */
int ffs_durable_adopt(struct ffs_fs *fs, const char *sandbox, const char *name, struct ffs_error *err);
/* Wait until nothing is on its way any more. At the end, every VM let go. */
void ffs_durable_drain(struct ffs_fs *fs);
/* What was counted in fs->n_durable is over. Without the tree lock. */
void ffs_durable_leave(struct ffs_fs *fs);
void ffs_durable_close(struct ffs_fs *fs);

/* Before the take: the draft of a branch that is to go to the store (named->kind); nothing for one that stays
 * in memory. Without the tree lock. */
int ffs_durable_begin(struct ffs_named *n, struct ffs_error *err);
/* The take failed. Without the tree lock. */
void ffs_durable_abort(struct ffs_named *n);
/* The shot is the named branch's: it takes the draft over. Tree lock held. */
void ffs_durable_attach(struct ffs_named *n, struct ffs_shot *s);
/* Its capture is complete, or has failed: true when the shot now goes to the store and settles again later.
 * On the reaper's thread, without the tree lock; the reference of the settle work is kept then. */
bool ffs_durable_take_over(struct ffs_shot *s, enum ffs_branch_state state, const struct ffs_error *why);
/* The manifest as it is in the store: a copy that the caller frees, and its length; NULL: not published. */
char *ffs_durable_manifest(struct ffs_shot *s, size_t *len);
/* Tree lock held, when it settles: the shot that serves the branch from now on (a reference), or NULL: as
 * before. */
struct ffs_shot *ffs_durable_successor(struct ffs_shot *s);
/* The branch is stored in another form, which `s` serves: what others share with it is read from there. fs->names held,
 * the tree lock not. */
void ffs_durable_move_kin(struct ffs_shot *s);
/* The last of a shot. Without the tree lock. */
void ffs_durable_free(struct ffs_shot *s);

/* fs->names held (these two change the store), the tree lock not. */
int ffs_durable_remove(struct ffs_named *n, struct ffs_error *err);
int ffs_durable_rename(struct ffs_named *n, const char *to, struct ffs_error *err);

/* fs->names held, the tree lock not: the directory of its files in the store, a draft's while it is on its way there; the
 * caller closes it. -ENODATA: it is in memory only. */
int ffs_durable_dir(struct ffs_named *n);

/* What a branch's status says of the store. Tree lock not held. */
void ffs_durable_status(struct ffs_shot *s, struct json_object *o);
