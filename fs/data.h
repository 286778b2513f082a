/* memory.bin, vmstate and manifest.json of any branch: opening, reading, syncing; and the file `wait`. */
#pragma once

#include "daemon.h"

/* Answer an OPEN of a data file: a handle on the shot (referenced by the handle) through `node`. `live`: of a
 * file of branch/, which is already counted as open in its generation. Takes the tree lock; `req` is claimed.
 */
void ffs_data_opened(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, struct ffs_node *node,
	struct ffs_shot *shot, struct ffs_live *live, int flags);
/* OPEN of a file of a named branch. */
void ffs_named_open(struct ffs_call *call, struct ffs_node *node, int flags);
/* Refuse an open that writes: 0 or a positive errno with the sentence. */
int ffs_data_check_open(struct ffs_node *node, int flags, struct ffs_error *err);

void ffs_data_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off, int flags);
void ffs_data_fsync(struct ffs_call *call, struct ffs_handle *h);
void ffs_wait_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off, int flags);
/* Answer claimed reads of `wait`: r 0: ready; -EIO with the reason; -ENOENT: removed. Without the tree lock.
 */
void ffs_wait_answer_all(struct ffs_list *claimed, int r, const struct ffs_error *err);

/* Close what a handle holds of a generation or a backing file (tree lock held, at release). */
void ffs_data_release(struct ffs_fs *fs, struct ffs_handle *h);
