/* The small files whose content is made when they are read, and what a handle's poll(2) says. */
#pragma once

#include "nodes.h"

/* "2026-01-02T03:04:05.678901234Z" of ns since the epoch. */
void ffs_rfc3339(uint64_t wall_ns, char out[40]);
/* A new string the caller frees, of a version, capabilities, metrics, status or state file. Without the tree
 * lock, node referenced. -errno and a sentence. */
int ffs_text_make(struct ffs_fs *fs, struct ffs_node *node, char **text, size_t *len, struct ffs_error *err);
bool ffs_text_kind(enum ffs_kind kind);
/* Status of a named branch as a new JSON object. Without the tree lock. */
struct json_object *ffs_named_status(struct ffs_fs *fs, struct ffs_named *named);
/* Status of a fork as a new JSON object; NULL: it was removed. Without the tree lock. */
struct json_object *ffs_fork_status(struct ffs_fs *fs, struct ffs_fork *f);
/* Tree lock held: POLLIN, POLLERR … of an open file. */
unsigned ffs_handle_revents(struct ffs_fs *fs, const struct ffs_handle *h);
