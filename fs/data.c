/* Owns the reading of branches: memory and vmstate through the engine, manifest.json and `wait` when they are
 * ready.
 *
 * Threads: FUSE workers read inline (a page copy at most is waited for); what waits for a capture is parked
 * with the shot and answered by the reaper. The tree lock is held for looking up only, never while reading.
 */
#include "data.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ack.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "fork.h"
#include "keyed.h"
#include "nodes.h"
#include "ops.h"
#include "park.h"

#define READ_MAX (1u << 20)

static pthread_key_t buffer_key;
static pthread_once_t buffer_once = PTHREAD_ONCE_INIT;
static int buffer_error;

static void make_key(void)
{
	buffer_error = pthread_key_create(&buffer_key, free);
}

/* A worker's own read buffer: a fresh one a read would cost its page faults each time. */
static char *worker_buffer(void)
{
	pthread_once(&buffer_once, make_key);
	if (buffer_error)
		return NULL;
	char *buf = pthread_getspecific(buffer_key);

	if (!buf) {
		buf = malloc(READ_MAX);
		if (buf && pthread_setspecific(buffer_key, buf)) {
			free(buf);
			return NULL;
		}
	}
	return buf;
}

/* ---- open ---- */

static const char *file_name(const struct ffs_node *node)
{
	return node->key.kind == FFS_KIND_DISK ? node->key.key : ffs_kind_name(node->key.kind);
}

int ffs_data_check_open(struct ffs_node *node, int flags, struct ffs_error *err)
{
	int mode = flags & O_ACCMODE;

	if (mode == O_WRONLY || (flags & O_TRUNC))
		return -ffs_error_set(
			err, EPERM, "%s of a branch never changes: open it for reading", file_name(node));
	if (mode == O_RDWR && node->key.kind == FFS_KIND_DISK)
		return -ffs_error_set(err, EPERM,
			"disk %s of a branch is read-only: run a child on an overlay of it (snapshot=on, or "
			"qemu-img create "
			"-b)",
			node->key.key);
	/* for private mappings, as QEMU makes them */
	if (mode == O_RDWR && ffs_kind_is_manifest(node->key.kind))
		return -ffs_error_set(err, EPERM, "manifest.json is read-only");
	return 0;
}

static bool is_memory(enum ffs_kind kind)
{
	return kind == FFS_KIND_LIVE_MEMORY || kind == FFS_KIND_NAMED_MEMORY || kind == FFS_KIND_FORK_MEMORY;
}

/* The file behind a node once its branch is ready. */
static int backing_fd(const struct ffs_node *node, const struct ffs_shot *shot)
{
	if (node->key.kind == FFS_KIND_DISK) {
		int i = ffs_named_disk(node->named, node->key.key);

		if (shot->stored)
			return ffs_stored_disk_fd(shot->stored, node->key.key);
		return i < 0 ? -ENOENT : ffs_branch_disk_fd(shot->branch, (unsigned)i);
	}
	if (is_memory(node->key.kind))
		return shot->stored ? ffs_stored_memory_fd(shot->stored) : ffs_branch_memory_fd(shot->branch);
	return shot->stored ? ffs_stored_vmstate_fd(shot->stored) : ffs_branch_vmstate_fd(shot->branch);
}

/* Tree lock held. */
static int open_backing(struct ffs_fs *fs, struct ffs_node *node, struct ffs_shot *shot)
{
	if (node->pass_opens++)
		return 0;
	int fd = backing_fd(node, shot);
	int id = fd < 0 ? fd : ffs_passthrough_open(&fs->pass, fd);

	if (id < 0) {
		node->pass_opens--;
		return id;
	}
	node->backing_id = (uint32_t)id;
	return 0;
}

static enum ffs_open_how how_of(const struct ffs_node *node)
{
	if (ffs_kind_is_manifest(node->key.kind))
		return FFS_OPEN_DIRECT;
	return node->key.mode == FFS_MODE_PASS     ? FFS_OPEN_PASS
	       : node->key.mode == FFS_MODE_DIRECT ? FFS_OPEN_DIRECT
						   : FFS_OPEN_CACHED;
}

void ffs_data_release(struct ffs_fs *fs, struct ffs_handle *h)
{
	struct ffs_node *n = h->node;

	if (h->counted && h->live->gen)
		ffs_gen_close(h->live->gen, ffs_now_ns());
	if (h->counted)
		ffs_reaper_push(fs->reaper, NULL); /* the lease has a new end */
	h->counted = false;
	if (h->shot && how_of(n) == FFS_OPEN_PASS && n->pass_opens && --n->pass_opens == 0) {
		ffs_passthrough_close(&fs->pass, n->backing_id);
		n->backing_id = 0;
	}
}

void ffs_data_opened(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, struct ffs_node *node,
	struct ffs_shot *shot, struct ffs_live *live, int flags)
{
	enum ffs_open_how how = how_of(node);
	struct ffs_error err = {0};
	uint32_t backing = 0;
	uint64_t id = 0;
	int r = -ENOMEM;

	pthread_mutex_lock(&fs->lock);
	struct ffs_handle *h = ffs_handle_new(fs, node, flags, who);

	if (h) {
		r = how == FFS_OPEN_PASS ? open_backing(fs, node, shot) : 0;
		h->shot = r < 0 ? NULL : ffs_shot_ref(shot);
		if (h->shot)
			h->shot->opens++;
		h->live = live ? ffs_live_ref(live) : NULL;
		if (node->key.kind == FFS_KIND_FORK_MEMORY) {
			h->overlay = ffs_overlay_ref(node->fork->overlay);
		}
		if (live && node->key.kind == FFS_KIND_LIVE_MEMORY)
			h->overlay = ffs_overlay_ref(live->fork->overlay);
		h->counted = live != NULL;
		h->txn = NULL;
		id = h->id;
		backing = node->backing_id;
		if (r < 0) {
			ffs_data_release(fs, h);
			ffs_handle_unref(fs, h);
		}
	} else if (live && live->gen) {
		ffs_gen_close(live->gen, ffs_now_ns());
	}
	pthread_mutex_unlock(&fs->lock);
	if (r < 0 && how == FFS_OPEN_PASS && shot->stored && atomic_exchange(&fs->store_pass, false)) {
		/* a stacked file system, say; the kernel looks the name up again and finds the node we serve
		 */
		ffs_log(FFS_LOG_INFO, "the kernel does not serve files of the store by itself (%s): we do",
			strerror(-r));
		fuse_reply_err(req, ESTALE);
	} else if (r < 0) {
		ffs_error_errno(&err, -r, "%s can't be served", file_name(node));
		ffs_reply_failure(fs, req, who, ffs_node_dir_ino(node), -r, &err);
	} else if (ffs_reply_open(req, id, how, backing) != 0) {
		pthread_mutex_lock(&fs->lock);
		ffs_data_release(fs, h);
		ffs_handle_unref(fs, h);
		pthread_mutex_unlock(&fs->lock);
	}
}

void ffs_named_open(struct ffs_call *call, struct ffs_node *node, int flags)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_error err = {0};
	struct ffs_shot *shot = NULL;
	int code = ffs_data_check_open(node, flags, &err);

	pthread_mutex_lock(&fs->lock);
	if (!code && (!node->named->shot || (node->fork && node->fork->removed))) {
		code = -ffs_error_set(
			&err, ENOENT, "the %s was removed", node->named->shot ? "fork" : "branch");
	} else if (!code && node->named->shot->state == FFS_BRANCH_FAILED) {
		code = EIO;
		err = node->named->shot->failure;
	} else if (!code && node->fork && node->fork->failure.code) {
		code = -ffs_error_set(&err, EIO, "%s", node->fork->failure.text);
	} else if (!code && node->key.kind == FFS_KIND_FORK_MEMORY && node->fork->changing) {
		code = -ffs_error_set(
			&err, EBUSY, "a payload of fork '%s' is just being written", node->fork->name);
	} else if (!code && (flags & O_ACCMODE) == O_RDWR && node->key.mode != FFS_MODE_DIRECT) {
		/* the kernel looks the name up again and is given the writers' node */
		ffs_retry_note(fs, call->who.tid, node->ino, FFS_RETRY_WRITER);
		code = ESTALE;
	} else if (!code && node->key.mode == FFS_MODE_PASS &&
		   !ffs_shot_is_file(node->named->shot, is_memory(node->key.kind))) {
		/* converted since: the name has another node now */
		code = ESTALE;
	} else if (!code) {
		ffs_retry_take(fs, call->who.tid, node->ino);
		shot = ffs_shot_ref(node->named->shot);
		ffs_keyed_used(node->named);
		if (node->key.kind == FFS_KIND_FORK_MEMORY) {
			node->fork->fixed = true;
			ffs_ack_opened(node->fork, false);
		}
	}
	pthread_mutex_unlock(&fs->lock);
	if (code) {
		ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(node), code, &err);
		return;
	}
	ffs_data_opened(fs, call->req, &call->who, node, shot, NULL, flags);
	ffs_shot_unref(shot);
}

/* ---- read ---- */

/* Parked until a shot settles: reads of manifest.json and fsyncs. */
struct shot_wait {
	struct ffs_waiter waiter;
	struct ffs_parked *p; /* referenced */
};

/* Tree lock held. */
static void shot_wait_gone(struct ffs_parked *p)
{
	struct shot_wait *w = p->data;

	/* the list's entry goes with its request; when it is being settled right now there is no list any
	 * more */
	if (w && ffs_list_linked(&w->waiter.link)) {
		ffs_list_del(&w->waiter.link);
		p->data = NULL;
		atomic_fetch_sub(&p->refs, 1);
		free(w);
	}
}

static void reply_failed_shot(
	struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, struct ffs_handle *h)
{
	pthread_mutex_lock(&fs->lock);
	struct ffs_error err = h->shot->failure;

	pthread_mutex_unlock(&fs->lock);
	ffs_reply_failure(fs, req, who, ffs_node_dir_ino(h->node), EIO, &err);
}

static void reply_stored_manifest(fuse_req_t req, struct ffs_stored *stored, size_t size, uint64_t off)
{
	char *buf = worker_buffer();
	ssize_t n =
		buf ? ffs_stored_read_manifest(stored, buf, size < READ_MAX ? size : READ_MAX, off) : -ENOMEM;

	if (n < 0)
		fuse_reply_err(req, (int)-n);
	else
		fuse_reply_buf(req, buf, (size_t)n);
}

static void reply_fork_manifest(
	struct ffs_fs *fs, fuse_req_t req, struct ffs_handle *h, size_t size, uint64_t off)
{
	size_t len;
	char *text = ffs_fork_manifest(fs, h->node->fork, h->shot, &len);

	if (!text)
		fuse_reply_err(req, EIO);
	else
		ffs_reply_text(fs, req, h, text, len, size, off);
}

/* The branch has settled: answer a read of manifest.json or an fsync (size 0 and no buffer wanted). */
static void answer_settled(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who,
	struct ffs_handle *h, bool sync, size_t size, uint64_t off)
{
	/* fixed since it settled */
	const struct ffs_shot *s = h->shot;

	if (s->state == FFS_BRANCH_FAILED)
		reply_failed_shot(fs, req, who, h);
	else if (sync)
		fuse_reply_err(req, 0);
	else if (h->node->fork)
		reply_fork_manifest(fs, req, h, size, off);
	else if (s->stored)
		reply_stored_manifest(req, s->stored, size, off);
	else if (!s->manifest)
		fuse_reply_err(req, EIO);
	else if (off >= s->manifest_len)
		fuse_reply_buf(req, NULL, 0);
	else
		fuse_reply_buf(
			req, s->manifest + off, s->manifest_len - off < size ? s->manifest_len - off : size);
}

static void shot_settled(struct ffs_waiter *waiter, struct ffs_shot *shot)
{
	struct shot_wait *w = ffs_container(waiter, struct shot_wait, waiter);
	struct ffs_parked *p = w->p;
	struct ffs_fs *fs = p->fs;

	pthread_mutex_lock(&fs->lock);
	bool mine = ffs_parked_claim(p);

	p->data = NULL;
	pthread_mutex_unlock(&fs->lock);
	if (mine)
		answer_settled(fs, ffs_parked_req(p), &p->who, p->handle, p->flags, p->size, p->offset);
	ffs_parked_unref(p);
	free(w);
}

/* Answer now if the shot has settled, else park. */
static void wait_for_shot(struct ffs_call *call, struct ffs_handle *h, bool sync, size_t size, uint64_t off)
{
	struct ffs_fs *fs = call->fs;

	pthread_mutex_lock(&fs->lock);
	bool writing = h->shot->state == FFS_BRANCH_WRITING;

	pthread_mutex_unlock(&fs->lock);
	if (!writing) {
		answer_settled(fs, call->req, &call->who, h, sync, size, off);
		return;
	}
	struct ffs_parked *p = ffs_park(call, false);

	if (!p)
		return;
	struct shot_wait *w = calloc(1, sizeof(*w));
	bool mine = false;

	pthread_mutex_lock(&fs->lock);
	p->handle = ffs_handle_ref(h);
	p->size = size;
	p->offset = off;
	p->flags = sync;
	if (!w || h->shot->state != FFS_BRANCH_WRITING) {
		mine = ffs_parked_claim(p);
	} else if (!p->claimed) {
		w->waiter.settled = shot_settled;
		w->p = ffs_parked_ref(p);
		p->data = w;
		p->gone = shot_wait_gone;
		ffs_list_add(&h->shot->waiters, &w->waiter.link);
		w = NULL;
	}
	writing = h->shot->state == FFS_BRANCH_WRITING;
	pthread_mutex_unlock(&fs->lock);
	free(w);
	if (mine && writing)
		fuse_reply_err(ffs_parked_req(p), ENOMEM);
	else if (mine)
		answer_settled(fs, ffs_parked_req(p), &p->who, h, sync, size, off);
	ffs_parked_unref(p);
}

/* Of memory, vmstate or a disk, wherever the branch is. */
static ssize_t read_piece(
	const struct ffs_handle *h, char *buf, size_t size, uint64_t off, struct ffs_error *err)
{
	enum ffs_kind kind = h->node->key.kind;
	const struct ffs_shot *s = h->shot;

	if (kind == FFS_KIND_DISK) {
		int i = ffs_named_disk(h->node->named, h->node->key.key);

		if (s->stored)
			return ffs_stored_read_disk(s->stored, h->node->key.key, buf, size, off);
		return i < 0 ? -EIO : ffs_branch_read_disk(s->branch, (unsigned)i, buf, size, off);
	}
	if (is_memory(kind))
		return s->stored ? ffs_stored_read_memory(s->stored, buf, size, off, err)
				 : ffs_branch_read_memory(s->branch, buf, size, off);
	return s->stored ? ffs_stored_read_vmstate(s->stored, buf, size, off)
			 : ffs_branch_read_vmstate(s->branch, buf, size, off);
}

void ffs_data_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off, int flags)
{
	struct ffs_fs *fs = call->fs;
	enum ffs_kind kind = h->node->key.kind;
	ssize_t n;

	/* last_use_ns has one writer's worth of meaning: a lost update is another read's */
	pthread_mutex_lock(&fs->lock);
	if (h->live && h->live->gen)
		ffs_gen_touch(h->live->gen, ffs_now_ns());
	bool writing = h->shot->state == FFS_BRANCH_WRITING;

	pthread_mutex_unlock(&fs->lock);
	if (ffs_kind_is_manifest(kind)) {
		if (writing && (flags & O_NONBLOCK))
			fuse_reply_err(call->req, EAGAIN);
		else
			wait_for_shot(call, h, false, size, off);
		return;
	}
	char *buf = worker_buffer();

	if (!buf) {
		fuse_reply_err(call->req, ENOMEM);
		return;
	}
	if (size > READ_MAX)
		size = READ_MAX;
	struct ffs_error err = {0};

	n = read_piece(h, buf, size, off, &err);
	if (n < 0) {
		if (h->shot->branch)
			ffs_branch_failure(h->shot->branch, &err);
		ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(h->node), (int)-n, &err);
		return;
	}
	if (h->overlay)
		ffs_overlay_apply(h->overlay, buf, (size_t)n, off);
	atomic_fetch_add_explicit(&fs->count.reads, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&fs->count.read_bytes, (unsigned long long)n, memory_order_relaxed);
	fuse_reply_buf(call->req, buf, (size_t)n);
}

/* ---- sync and wait ---- */

#ifdef FFS_FAULTS
static void fsync_task(struct ffs_task *t)
{
	int r = FFS_FAULT("fs-fsync");

	if (ffs_task_claim(t)) {
		struct ffs_call call = {.fs = t->call.fs, .req = ffs_parked_req(t->p), .who = t->call.who};

		if (r < 0)
			fuse_reply_err(call.req, -r);
		else
			wait_for_shot(&call, t->handle, true, 0, 0);
	}
}
#endif

void ffs_data_fsync(struct ffs_call *call, struct ffs_handle *h)
{
	ffs_caller_of(call->req, &call->who);
#ifdef FFS_FAULTS
	struct ffs_task *t = ffs_task_new(call, false);

	if (!t)
		return;
	pthread_mutex_lock(&call->fs->lock);
	t->handle = ffs_handle_ref(h);
	pthread_mutex_unlock(&call->fs->lock);
	ffs_task_start(t, fsync_task);
#else
	wait_for_shot(call, h, true, 0, 0);
#endif
}

static void answer_wait(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, struct ffs_handle *h,
	int r, const struct ffs_error *err, size_t size, uint64_t off)
{
	static const char text[] = "ready\n";
	struct ffs_error why = {0};

	if (r == -ENOENT)
		ffs_error_set(&why, ENOENT, "the branch was removed");
	if (r < 0)
		ffs_reply_failure(fs, req, who, ffs_node_dir_ino(h->node), -r, err ? err : &why);
	else if (off >= sizeof(text) - 1)
		fuse_reply_buf(req, NULL, 0);
	else
		fuse_reply_buf(
			req, text + off, sizeof(text) - 1 - off < size ? sizeof(text) - 1 - off : size);
}

void ffs_wait_answer_all(struct ffs_list *claimed, int r, const struct ffs_error *err)
{
	for (struct ffs_list *e = claimed->next, *next; e != claimed; e = next) {
		struct ffs_parked *p = ffs_container(e, struct ffs_parked, link);

		next = e->next;
		answer_wait(p->fs, ffs_parked_req(p), &p->who, p->handle, r, err, p->size, p->offset);
		ffs_parked_unref(p);
	}
}

/* Tree lock held: 1: not yet; 0: ready; -errno. */
static int wait_state(const struct ffs_named *n, struct ffs_error *err)
{
	if (!n->shot)
		return -ENOENT;
	if (n->shot->state == FFS_BRANCH_FAILED) {
		*err = n->shot->failure;
		return -EIO;
	}
	return n->shot->state == FFS_BRANCH_WRITING;
}

void ffs_wait_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off, int flags)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_named *n = h->node->named;
	struct ffs_error err = {0};

	ffs_caller_of(call->req, &call->who);
	pthread_mutex_lock(&fs->lock);
	int r = wait_state(n, &err);

	pthread_mutex_unlock(&fs->lock);
	if (r == 1 && (flags & O_NONBLOCK)) {
		fuse_reply_err(call->req, EAGAIN);
		return;
	}
	if (r <= 0) {
		answer_wait(fs, call->req, &call->who, h, r, r == -EIO ? &err : NULL, size, off);
		return;
	}
	struct ffs_parked *p = ffs_park(call, false);
	bool mine = false;

	if (!p)
		return;
	pthread_mutex_lock(&fs->lock);
	p->handle = ffs_handle_ref(h);
	p->size = size;
	p->offset = off;
	r = wait_state(n, &err);
	if (r == 1)
		ffs_parked_wait(p, &n->waits);
	else
		mine = ffs_parked_claim(p);
	pthread_mutex_unlock(&fs->lock);
	if (mine)
		answer_wait(fs, ffs_parked_req(p), &p->who, h, r, r == -EIO ? &err : NULL, size, off);
	ffs_parked_unref(p);
}
