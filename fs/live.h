/* branch/ and branch@KEY/: opening a file takes a live branch, or joins the caller's generation. */
#pragma once

#include "daemon.h"

/* Tree lock held, call->who filled: the node that this caller's open of the file would get. NULL: no memory.
 */
struct ffs_node *ffs_live_lookup(struct ffs_call *call, struct ffs_node *dir, int kind);
struct ffs_task;

/* A payload for branch/ is whole: the generation of the caller's session that it belongs to, its branch taken
 * if it has none yet (waits). *out and *shot are referenced; t->handle counts as open in the generation. Pool
 * thread, without the tree lock. */
int ffs_live_begin_payload(
	struct ffs_task *t, struct ffs_live **out, struct ffs_shot **shot, struct ffs_error *err);
/* Tree lock held: what is staged in it has changed, or a payload has failed. handles: of the caller's own
 * that are open in the generation. */
void ffs_live_end_payload(struct ffs_live *l, unsigned handles);
/* Tree lock held: the generation that the caller's payloads would go to, or NULL where a new one would begin.
 * Borrowed. */
struct ffs_live *ffs_live_of_payload(struct ffs_call *call, struct ffs_node *node);
/* OPEN of one of its files. Without the tree lock; call->who filled. */
void ffs_live_open(struct ffs_call *call, struct ffs_node *node, int flags);
