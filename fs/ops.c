/* The table of operations, the frame of every request, extended attributes, and the operations that are
 * refused.
 *
 * Threads: FUSE workers; nothing here waits. */
#include "ops.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>

#include "base/util.h"
#include "box.h"

#define ERROR_XATTR "user.forkfs.error"
#define TOKEN_XATTR "user.forkfs.token"

struct ffs_node *ffs_call_begin(struct ffs_call *call, fuse_req_t req, fuse_ino_t ino)
{
	const struct fuse_ctx *ctx = fuse_req_ctx(req);

	call->fs = fuse_req_userdata(req);
	call->req = req;
	call->who = (struct ffs_caller){.tid = ctx->pid > 0 ? ctx->pid : 0, .uid = ctx->uid, .gid = ctx->gid};
	atomic_fetch_add_explicit(&call->fs->count.requests, 1, memory_order_relaxed);
	pthread_mutex_lock(&call->fs->lock);
	struct ffs_node *n = ffs_node_by_id(call->fs, ino);

	if (n)
		ffs_node_ref(n);
	pthread_mutex_unlock(&call->fs->lock);
	/* can't be: the kernel asks only for numbers it holds */
	if (!n)
		fuse_reply_err(req, ESTALE);
	return n;
}

void ffs_call_end(struct ffs_call *call, struct ffs_node *node)
{
	pthread_mutex_lock(&call->fs->lock);
	ffs_node_unref(call->fs, node);
	pthread_mutex_unlock(&call->fs->lock);
}

/* ---- refused ---- */

static void refuse(fuse_req_t req, fuse_ino_t ino, int code, const char *why)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct ffs_error err = {0};

	if (!node)
		return;
	if (why)
		ffs_error_set(&err, code, "%s", why);
	ffs_reply_failure(call.fs, req, &call.who, ffs_node_dir_ino(node), code, &err);
	ffs_call_end(&call, node);
}

static const char no_files[] = "files can't be made or removed here: the tree shows VMs and branches";
static const char immutable[] =
	"what the tree shows never changes by hand: sizes, modes, owners and times are fixed";

static void op_setattr(
	fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct ffs_error err = {0};
	struct stat st;

	if (!node)
		return;
	/* `echo … > ctl` and `> mailboxes/NAME` truncate; a time that a write(2) sets along is nothing to us */
	if (!to_set || ((ffs_kind_is_ctl(node->key.kind) || ffs_kind_is_box(node->key.kind)) &&
			       !(to_set & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)))) {
		pthread_mutex_lock(&call.fs->lock);
		ffs_node_attr(call.fs, node, &st);
		pthread_mutex_unlock(&call.fs->lock);
		fuse_reply_attr(req, &st, 0);
	} else {
		ffs_error_set(&err, EPERM, "%s", immutable);
		ffs_reply_failure(call.fs, req, &call.who, ffs_node_dir_ino(node), EPERM, &err);
	}
	ffs_call_end(&call, node);
}

static void op_readlink(fuse_req_t req, fuse_ino_t ino)
{
	refuse(req, ino, EINVAL, NULL);
}

static void op_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
	refuse(req, parent, EPERM, no_files);
}

static void op_create(
	fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
	refuse(req, parent, EPERM, no_files);
}

static void op_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct ffs_call call;
	struct ffs_node *dir = ffs_call_begin(&call, req, parent);
	struct ffs_error err = {0};

	if (!dir)
		return;
	if (ffs_kind_is_boxes(dir->key.kind)) {
		ffs_caller_of(req, &call.who);
		ffs_box_unlink(&call, dir, name);
	} else {
		ffs_error_set(
			&err, EPERM, "files of the tree can't be removed; rmdir removes a whole branch");
		ffs_reply_failure(call.fs, req, &call.who, ffs_node_dir_ino(dir), EPERM, &err);
	}
	ffs_call_end(&call, dir);
}

static void op_symlink(fuse_req_t req, const char *link, fuse_ino_t parent, const char *name)
{
	refuse(req, parent, EPERM, no_files);
}

static void op_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t newparent, const char *newname)
{
	refuse(req, newparent, EPERM, no_files);
}

static void op_access(fuse_req_t req, fuse_ino_t ino, int mask)
{
	/* default_permissions: the kernel has checked */
	refuse(req, ino, 0, NULL);
}

static void op_bmap(fuse_req_t req, fuse_ino_t ino, size_t blocksize, uint64_t idx)
{
	refuse(req, ino, EINVAL, NULL);
}

static void op_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, void *arg, struct fuse_file_info *fi,
	unsigned flags, const void *in_buf, size_t in_bufsz, size_t out_bufsz)
{
	refuse(req, ino, ENOTTY, NULL);
}

static void op_fallocate(
	fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, struct fuse_file_info *fi)
{
	refuse(req, ino, EPERM, immutable);
}

static void op_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in, struct fuse_file_info *fi_in,
	fuse_ino_t ino_out, off_t off_out, struct fuse_file_info *fi_out, size_t len, int flags)
{
	refuse(req, ino_out, EPERM, immutable);
}

static void op_statfs(fuse_req_t req, fuse_ino_t ino)
{
	/* 0 blocks: df leaves it out unless asked */
	struct statvfs st = {.f_bsize = 4096, .f_frsize = 4096, .f_namemax = 255};

	fuse_reply_statfs(req, &st);
}

/* ---- extended attributes ---- */

/* The sentence of a directory, for it and for the files in it. */
static int sentence(struct ffs_call *call, struct ffs_node *node, char out[512])
{
	if (!call->who.sid)
		ffs_caller_of(call->req, &call->who);
	return ffs_sentence_get(call->fs, &call->who, ffs_node_dir_ino(node), out);
}

static void reply_bytes(fuse_req_t req, const char *bytes, size_t len, size_t size)
{
	if (!size)
		fuse_reply_xattr(req, len);
	else if (len > size)
		fuse_reply_err(req, ERANGE);
	else
		fuse_reply_buf(req, bytes, len);
}

static void op_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	char text[512];

	if (!node)
		return;
	if (ffs_kind_is_box(node->key.kind) && strcmp(name, TOKEN_XATTR) == 0) {
		ffs_caller_of(req, &call.who);
		ssize_t n = ffs_box_get_token(&call, node, text);

		if (n < 0)
			fuse_reply_err(req, (int)-n);
		else
			reply_bytes(req, text, (size_t)n, size);
	} else if (strcmp(name, ERROR_XATTR) != 0 || sentence(&call, node, text) < 0)
		fuse_reply_err(req, ENODATA);
	else
		reply_bytes(req, text, strlen(text), size);
	ffs_call_end(&call, node);
}

static void op_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	char text[512];

	if (!node)
		return;
	bool has = ffs_kind_is_dir(node->key.kind) && sentence(&call, node, text) == 0;

	reply_bytes(req, ERROR_XATTR, has ? sizeof(ERROR_XATTR) : 0, size);
	ffs_call_end(&call, node);
}

static void op_setxattr(
	fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct ffs_error err = {0};
	int code = strcmp(name, ERROR_XATTR) == 0 ? EPERM : EOPNOTSUPP;

	if (!node)
		return;
	if (ffs_kind_is_box(node->key.kind) && strcmp(name, TOKEN_XATTR) == 0) {
		ffs_caller_of(req, &call.who);
		code = ffs_box_set_token(&call, node, value, size, &err);
	}
	ffs_reply_failure(call.fs, req, &call.who, ffs_node_dir_ino(node), code, &err);
	ffs_call_end(&call, node);
}

static void op_removexattr(fuse_req_t req, fuse_ino_t ino, const char *name)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct ffs_error err = {0};
	int code = strcmp(name, ERROR_XATTR) == 0 ? EPERM : ENODATA;

	if (!node)
		return;
	if (ffs_kind_is_box(node->key.kind) && strcmp(name, TOKEN_XATTR) == 0) {
		ffs_caller_of(req, &call.who);
		code = ffs_box_remove_token(&call, node);
	}
	ffs_reply_failure(call.fs, req, &call.who, ffs_node_dir_ino(node), code, &err);
	ffs_call_end(&call, node);
}

const struct fuse_lowlevel_ops ffs_operations = {
	.lookup = ffs_op_lookup,
	.forget = ffs_op_forget,
	.forget_multi = ffs_op_forget_multi,
	.getattr = ffs_op_getattr,
	.setattr = op_setattr,
	.readlink = op_readlink,
	.mknod = op_mknod,
	.mkdir = ffs_op_mkdir,
	.unlink = op_unlink,
	.rmdir = ffs_op_rmdir,
	.symlink = op_symlink,
	.rename = ffs_op_rename,
	.link = op_link,
	.open = ffs_op_open,
	.read = ffs_op_read,
	.write = ffs_op_write,
	.flush = ffs_op_flush,
	.release = ffs_op_release,
	.fsync = ffs_op_fsync,
	.opendir = ffs_op_opendir,
	.readdir = ffs_op_readdir,
	.releasedir = ffs_op_releasedir,
	.fsyncdir = ffs_op_fsyncdir,
	.statfs = op_statfs,
	.setxattr = op_setxattr,
	.getxattr = op_getxattr,
	.listxattr = op_listxattr,
	.removexattr = op_removexattr,
	.access = op_access,
	.create = op_create,
	.bmap = op_bmap,
	.ioctl = op_ioctl,
	.poll = ffs_op_poll,
	.fallocate = op_fallocate,
	.copy_file_range = op_copy_file_range,
	.lseek = ffs_op_lseek,
};
