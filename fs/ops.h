/* The FUSE operations. Every one is installed: an operation without a handler would be answered ENOSYS, which
 * the kernel takes as "never ask again". (Locks of both kinds are the exception: without handlers the kernel
 * keeps them itself.) */
#pragma once

#include "nodes.h"

extern const struct fuse_lowlevel_ops ffs_operations;

/* Begin a request: the node, referenced, or NULL (answered ESTALE). call->who has pid, uid and gid only. */
struct ffs_node *ffs_call_begin(struct ffs_call *call, fuse_req_t req, fuse_ino_t ino);
void ffs_call_end(struct ffs_call *call, struct ffs_node *node);

/* ops-dir.c */
void ffs_op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name);
void ffs_op_forget(fuse_req_t req, fuse_ino_t ino, uint64_t nlookup);
void ffs_op_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets);
void ffs_op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void ffs_op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void ffs_op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi);
void ffs_op_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void ffs_op_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi);
void ffs_op_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode);
void ffs_op_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name);
void ffs_op_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent,
	const char *newname, unsigned int flags);

/* A listing that is being made; entries are owned. */
struct ffs_listing {
	struct ffs_dirent *entries;
	unsigned n, room;
	bool failed; /* no memory */
};
void ffs_listing_add(struct ffs_listing *l, const char *name, uint64_t ino, mode_t type);
void ffs_listing_free(struct ffs_listing *l);
/* Answer an OPENDIR with it; takes the entries over. Without the tree lock. */
void ffs_reply_listing(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, struct ffs_node *dir,
	int flags, struct ffs_listing *l);

/* ops-file.c */
/* Answer a read of a text that was made for it (taken over): one content for all reads of a pass. */
void ffs_reply_text(struct ffs_fs *fs, fuse_req_t req, struct ffs_handle *h, char *text, size_t len,
	size_t size, uint64_t off);
void ffs_op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void ffs_op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi);
void ffs_op_write(
	fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi);
void ffs_op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void ffs_op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
void ffs_op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi);
void ffs_op_poll(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct fuse_pollhandle *ph);
void ffs_op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi);
