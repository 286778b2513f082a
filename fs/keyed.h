/* Cached branches: taken for a key, found again by it, let go when they are old, too many, or in the way. */
#pragma once

#include "named.h"

int ffs_keyed_init(struct ffs_fs *fs, struct ffs_error *err);
void ffs_keyed_free(struct ffs_fs *fs);

/* The branch of a key: the one that is there, or one that is taken now, by one of all who ask. *out has a
 * reference; *hit: it was there. `wanted` as in ffs_named_take(). Pool thread, without the tree lock; waits,
 * at most how->timeout_ns. */
int ffs_keyed_get(struct ffs_sbx *sbx, const char *key, const struct ffs_caller *who,
	const struct ffs_take_options *how, struct ffs_cancel *cancel, bool (*wanted)(void *arg), void *arg,
	struct ffs_named **out, bool *hit, struct ffs_error *err);
/* A branch of a sandbox did not fit into the memory for images: let cached ones go until it does. True: try
 * again. */
bool ffs_keyed_make_room(struct ffs_sbx *sbx);
/* Tree lock held: somebody opened it. */
void ffs_keyed_used(struct ffs_named *n);
/* Tree lock held: it is its user's now, and never let go (renamed). */
void ffs_keyed_keep(struct ffs_named *n);
/* A branch that was found in the store says that it was taken for that key. Tree lock held. */
void ffs_keyed_adopt(struct ffs_named *n, const char *key);
/* Tree lock held, the reaper's tick: start the pruning that is due; when to come back, 0: not by time. */
uint64_t ffs_keyed_tick(struct ffs_fs *fs, uint64_t now_ns);
