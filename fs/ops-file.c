/* Open files: which module serves which kind.
 *
 * Threads: FUSE workers. What waits is parked by the module (data.c, ctl.c, events.c, live.c). */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ack.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "box.h"
#include "ctl.h"
#include "data.h"
#include "events.h"
#include "live.h"
#include "ops.h"
#include "text.h"

/* The handle of a request, referenced, or NULL (answered EBADF). */
static struct ffs_handle *get_handle(struct ffs_call *call, struct fuse_file_info *fi)
{
	pthread_mutex_lock(&call->fs->lock);
	struct ffs_handle *h = fi ? ffs_handle_by_id(call->fs, fi->fh) : NULL;

	if (h)
		ffs_handle_ref(h);
	pthread_mutex_unlock(&call->fs->lock);
	if (!h)
		fuse_reply_err(call->req, EBADF);
	return h;
}

static void put_handle(struct ffs_call *call, struct ffs_handle *h)
{
	pthread_mutex_lock(&call->fs->lock);
	ffs_handle_unref(call->fs, h);
	pthread_mutex_unlock(&call->fs->lock);
}

/* ---- open ---- */

/* Everything but branches: a handle, direct I/O. */
static void open_plain(struct ffs_call *call, struct ffs_node *node, int flags)
{
	struct ffs_fs *fs = call->fs;
	bool ctl = ffs_kind_is_ctl(node->key.kind);
	struct ffs_error err = {0};
	struct ffs_handle *h;
	uint64_t id = 0;

	if (!ctl && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC))) {
		int r = ffs_error_set(&err, EPERM, "%s is read-only", ffs_kind_name(node->key.kind));

		ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(node), -r, &err);
		return;
	}
	if (ctl)
		ffs_caller_of(call->req, &call->who);
	pthread_mutex_lock(&fs->lock);
	h = ffs_handle_new(fs, node, flags, &call->who);
	if (h && node->key.kind == FFS_KIND_FORK_ACK)
		ffs_ack_opened(node->fork, true);
	if (h && ctl)
		h->txn = ffs_txn_new(fs, node->sbx, flags, &call->who);
	if (h && ctl && !h->txn) {
		ffs_handle_unref(fs, h);
		h = NULL;
	}
	if (h) {
		h->event_seq = ffs_events_next(fs);
		id = h->id;
	}
	pthread_mutex_unlock(&fs->lock);
	bool stream = ctl || node->key.kind == FFS_KIND_EVENTS;

	if (!h)
		fuse_reply_err(call->req, ENOMEM);
	else if (ffs_reply_open(call->req, id, stream ? FFS_OPEN_STREAM : FFS_OPEN_DIRECT, 0) != 0)
		put_handle(call, h);
}

void ffs_op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);

	if (!node)
		return;
	if (ffs_kind_is_live_file(node->key.kind)) {
		ffs_caller_of(req, &call.who);
		ffs_live_open(&call, node, fi->flags);
	} else if (ffs_kind_is_data(node->key.kind)) {
		ffs_named_open(&call, node, fi->flags);
	} else if (ffs_kind_is_box(node->key.kind)) {
		ffs_box_open(&call, node, fi->flags);
	} else {
		open_plain(&call, node, fi->flags);
	}
	ffs_call_end(&call, node);
}

void ffs_op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct ffs_fs *fs = fuse_req_userdata(req);

	pthread_mutex_lock(&fs->lock);
	struct ffs_handle *h = ffs_handle_by_id(fs, fi->fh);

	if (h && !h->released) {
		h->released = true;
		ffs_data_release(fs, h);
		if (h->txn)
			ffs_txn_released(h->txn);
		ffs_handle_unref(fs, h);
	}
	pthread_mutex_unlock(&fs->lock);
	fuse_reply_err(req, 0);
}

/* ---- read and write ---- */

void ffs_reply_text(struct ffs_fs *fs, fuse_req_t req, struct ffs_handle *h, char *text, size_t len,
	size_t size, uint64_t off)
{
	pthread_mutex_lock(&fs->lock);
	if (text && (!off || !h->text)) {
		free(h->text);
		h->text = ffs_steal_ptr(&text);
		h->text_len = len;
	}
	len = off >= h->text_len ? 0 : h->text_len - off < size ? h->text_len - off : size;
	char *part = malloc(len + 1);

	if (part)
		memcpy(part, h->text + (len ? off : 0), len);
	pthread_mutex_unlock(&fs->lock);
	free(text);
	if (part)
		fuse_reply_buf(req, part, len);
	else
		fuse_reply_err(req, ENOMEM);
	free(part);
}

static void read_text(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_error err = {0};
	char *text = NULL;
	size_t len = 0;
	int r = 0;

	/* one content for all reads of a pass, a new one when it starts over */
	if (!off || !h->text)
		r = ffs_text_make(fs, h->node, &text, &len, &err);
	if (r < 0) {
		ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(h->node), -r, &err);
		return;
	}
	ffs_reply_text(fs, call->req, h, text, len, size, off);
}

void ffs_op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);

	if (!node)
		return;
	struct ffs_handle *h = get_handle(&call, fi);

	if (h) {
		enum ffs_kind kind = h->node->key.kind;

		if (h->box)
			ffs_box_read(&call, h, size, (uint64_t)off);
		else if (h->shot)
			ffs_data_read(&call, h, size, (uint64_t)off, fi->flags);
		else if (ffs_text_kind(kind))
			read_text(&call, h, size, (uint64_t)off);
		else if (kind == FFS_KIND_NAMED_WAIT)
			ffs_wait_read(&call, h, size, (uint64_t)off, fi->flags);
		else if (kind == FFS_KIND_FORK_ACK)
			ffs_ack_read(&call, h, size, (uint64_t)off, fi->flags);
		else if (kind == FFS_KIND_EVENTS)
			ffs_events_read(&call, h, size, fi->flags);
		else if (h->txn)
			ffs_ctl_read(&call, h, size, fi->flags);
		else
			fuse_reply_err(req, EISDIR);
		put_handle(&call, h);
	}
	ffs_call_end(&call, node);
}

void ffs_op_write(
	fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct ffs_error err = {0};

	if (!node)
		return;
	struct ffs_handle *h = get_handle(&call, fi);

	if (h && h->txn) {
		ffs_ctl_write(&call, node, h, buf, size);
	} else if (h && h->box) {
		ffs_box_write(&call, node, h, buf, size, (uint64_t)off);
	} else if (h) {
		ffs_error_set(&err, EPERM, "%s of a branch never changes", ffs_kind_name(node->key.kind));
		ffs_reply_failure(call.fs, req, &call.who, ffs_node_dir_ino(node), EPERM, &err);
	}
	if (h)
		put_handle(&call, h);
	ffs_call_end(&call, node);
}

void ffs_op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);

	if (!node)
		return;
	if (!ffs_kind_is_box(node->key.kind)) {
		fuse_reply_err(req, 0);
		ffs_call_end(&call, node);
		return;
	}
	struct ffs_handle *h = get_handle(&call, fi);

	if (h) {
		ffs_box_flush(&call, node, h);
		put_handle(&call, h);
	}
	ffs_call_end(&call, node);
}

void ffs_op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);

	if (!node)
		return;
	struct ffs_handle *h = get_handle(&call, fi);

	if (h && h->shot)
		ffs_data_fsync(&call, h);
	else if (h)
		fuse_reply_err(req, 0);
	if (h)
		put_handle(&call, h);
	ffs_call_end(&call, node);
}

/* ---- poll, lseek ---- */

void ffs_op_poll(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct fuse_pollhandle *ph)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct fuse_pollhandle *old = ph;
	unsigned revents = 0;

	if (!node) {
		if (ph)
			fuse_pollhandle_destroy(ph);
		return;
	}
	struct ffs_handle *h = get_handle(&call, fi);

	if (h) {
		pthread_mutex_lock(&call.fs->lock);
		revents = ffs_handle_revents(call.fs, h);
		/* kept even when it is ready now: it can be consumed and come again */
		if (ph && !h->released) {
			old = h->ph;
			h->ph = ph;
		}
		pthread_mutex_unlock(&call.fs->lock);
	}
	if (old)
		fuse_pollhandle_destroy(old);
	if (h) {
		fuse_reply_poll(req, revents);
		put_handle(&call, h);
	}
	ffs_call_end(&call, node);
}

/* Every file is dense: data up to its end, where the one hole is. */
void ffs_op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct stat st;

	if (!node)
		return;
	pthread_mutex_lock(&call.fs->lock);
	ffs_node_attr(call.fs, node, &st);
	pthread_mutex_unlock(&call.fs->lock);
	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		fuse_reply_err(req, EINVAL);
	else if (off < 0 || off >= st.st_size)
		fuse_reply_err(req, ENXIO);
	else
		fuse_reply_lseek(req, whence == SEEK_DATA ? off : st.st_size);
	ffs_call_end(&call, node);
}
