/* branch/ and branch@KEY/: opening a file takes a live branch, or joins the caller's generation. */
#pragma once

#include "daemon.h"

/* Tree lock held, call->who filled: the node that this caller's open of the file would get. NULL: no memory.
 */
struct ffs_node *ffs_live_lookup(struct ffs_call *call, struct ffs_node *dir, int kind);
/* OPEN of one of its files. Without the tree lock; call->who filled. */
void ffs_live_open(struct ffs_call *call, struct ffs_node *node, int flags);
