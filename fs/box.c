/* Owns what is written into mailboxes, of a fork and of branch/: bytes that accumulate in an open handle, are
 * checked as they come, and are published when it is closed. A payload is in a fork whole, or not at all.
 *
 * Threads: FUSE workers; writes and listings go to the pool, because what completes a payload, and who lists,
 * searches a branch's memory. One write of a handle at a time: `busy`; all else of a handle is guarded by the
 * tree lock. */
#include "box.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "fork.h"
#include "live.h"
#include "ops.h"
#include "park.h"

/* A payload with the white space around it. */
#define TEXT_MAX 8192u

enum box_state {
	BOX_OPEN,      /* takes bytes */
	BOX_WHOLE,     /* an object, found good: to be published */
	BOX_PUBLISHED, /* white space may follow */
	BOX_SPOILT,    /* a write was refused or interrupted: nothing of it counts */
};

struct ffs_box {
	enum box_state state;
	bool busy;
	struct ffs_json json;
	char *text;
	size_t len;
	struct ffs_staged *staged;
	struct ffs_fork *fork; /* where it goes; referenced */
	struct ffs_live *live; /* of branch/: whose fork that is; referenced */
};

void ffs_box_free(struct ffs_box *b)
{
	if (!b)
		return;
	ffs_staged_free(b->staged);
	ffs_fork_unref(b->fork);
	ffs_live_unref(b->live);
	free(b->text);
	free(b);
}

/* ---- names ---- */

/* NAME or NAME:TOKEN. */
static bool could_be(const char *text)
{
	const char *colon = strchr(text, ':');
	char name[FFS_MAILBOX_NAME_MAX + 2];
	size_t n = colon ? (size_t)(colon - text) : strlen(text);

	if (strlen(text) > FFS_MAILBOX_NAME_MAX + 1 + FFS_MAILBOX_TOKEN_MAX || n > FFS_MAILBOX_NAME_MAX)
		return false;
	snprintf(name, sizeof(name), "%.*s", (int)n, text);
	return ffs_mailbox_check_name(name, NULL) == 0;
}

int ffs_box_lookup(struct ffs_fs *fs, struct ffs_node *dir, const char *name, struct ffs_node **out)
{
	struct ffs_node_key key = {.key = name};

	/* what looks for .git and its like must not find one */
	if (!could_be(name) || name[0] == '.')
		return -ENOENT;
	key.kind = dir->fork ? FFS_KIND_FORK_BOX : FFS_KIND_SBX_BOX;
	key.object = dir->fork ? dir->fork->serial : dir->sbx->serial;
	*out = dir->fork ? ffs_node_get_fork(fs, &key, dir->fork)
			 : ffs_node_get(fs, &key, dir->sbx, NULL, NULL);
	return 0;
}

/* ---- open and read ---- */

/* Tree lock held: the fork that this caller's payload is in or would go to; NULL: none yet. Borrowed. */
static struct ffs_fork *fork_of(struct ffs_call *call, struct ffs_node *node)
{
	if (node->fork)
		return node->fork;
	struct ffs_live *l = ffs_live_of_payload(call, node);

	return l ? l->fork : NULL;
}

void ffs_box_open(struct ffs_call *call, struct ffs_node *node, int flags)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_error err = {0};
	struct ffs_handle *h = NULL;
	uint64_t id = 0;
	int code = 0;

	ffs_caller_of(call->req, &call->who);
	if (flags & O_APPEND)
		code = -ffs_error_set(&err, EINVAL,
			"a payload is written whole, in place of the old one (>): nothing can be appended to "
			"it");
	pthread_mutex_lock(&fs->lock);
	struct ffs_fork *f = fork_of(call, node);

	if (!code && node->fork && node->fork->removed)
		code = -ffs_error_set(&err, ENOENT, "the fork was removed");
	if (!code && node->fork && node->fork->failure.code)
		code = -ffs_error_set(&err, EIO, "%s", node->fork->failure.text);
	if (!code) {
		h = ffs_handle_new(fs, node, flags, &call->who);
		if (h)
			h->box = calloc(1, sizeof(*h->box));
		if (!h || !h->box)
			code = ENOMEM;
	}
	struct ffs_staged *s = code || !f ? NULL : ffs_fork_staged(f, node->key.key);

	if (s && !(flags & O_TRUNC)) {
		h->text = malloc(s->box.text_len + 1);
		if (h->text) {
			memcpy(h->text, s->box.text, s->box.text_len);
			h->text_len = s->box.text_len;
		} else {
			code = ENOMEM;
		}
	}
	if (code && h)
		ffs_handle_unref(fs, h);
	else if (h)
		id = h->id;
	pthread_mutex_unlock(&fs->lock);
	if (code) {
		ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(node), code, &err);
	} else if (ffs_reply_open(call->req, id, FFS_OPEN_FLUSHED, 0) != 0) {
		pthread_mutex_lock(&fs->lock);
		ffs_handle_unref(fs, h);
		pthread_mutex_unlock(&fs->lock);
	}
}

/* What was staged when it was opened. */
void ffs_box_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off)
{
	/* fixed since the open */
	size_t len = off >= h->text_len ? 0 : h->text_len - off < size ? h->text_len - off : size;

	fuse_reply_buf(call->req, len ? h->text + off : NULL, len);
}

/* ---- write ---- */

static bool only_space(const char *s, size_t len)
{
	return strspn(s, " \t\r\n") >= len;
}

/* Take bytes in: 1: the object is whole now; 0; -errno. */
static int accept_bytes(struct ffs_box *b, const char *buf, size_t size, uint64_t off, struct ffs_error *err)
{
	if (b->state == BOX_SPOILT)
		return ffs_error_set(
			err, EINVAL, "an earlier write of this handle was refused: open it again");
	if (b->state != BOX_OPEN && !only_space(buf, size))
		return ffs_error_set(
			err, EBUSY, "this handle has its payload: open it again for another one");
	if (b->state == BOX_PUBLISHED)
		return 0;
	if (off != b->len)
		return ffs_error_set(err, EINVAL, "a payload is written from its beginning to its end");
	if (size > TEXT_MAX - b->len)
		return ffs_error_set(err, EFBIG, "a payload has at most %u bytes", FFS_MAILBOX_PAYLOAD_MAX);
	char *more = realloc(b->text, b->len + size + 1);

	if (!more)
		return ffs_error_set(err, ENOMEM, "no memory for the payload");
	b->text = more;
	memcpy(b->text + b->len, buf, size);
	b->len += size;
	if (b->state == BOX_WHOLE)
		return 0;
	int r = ffs_json_feed(&b->json, buf, size, err);

	if (r < 0)
		return r;
	size_t object = r                             ? b->json.end - b->json.begin
			: only_space(b->text, b->len) ? 0
						      : b->len - b->json.begin;

	if (object > FFS_MAILBOX_PAYLOAD_MAX)
		return ffs_error_set(err, EFBIG, "a payload has at most %u bytes", FFS_MAILBOX_PAYLOAD_MAX);
	return r;
}

static int choose_fork(struct ffs_task *t, struct ffs_box *b, struct ffs_shot **shot, struct ffs_error *err)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_fork *f = t->node->fork;
	int r = 0;

	pthread_mutex_lock(&fs->lock);
	if (f->named->shot && !f->removed) {
		*shot = ffs_shot_ref(f->named->shot);
		b->fork = ffs_fork_ref(f);
	} else {
		r = ffs_error_set(err, ENOENT, "the fork was removed");
	}
	pthread_mutex_unlock(&fs->lock);
	return r;
}

/* What the guest does not publish is refused before it is stopped. */
static int choose_live(struct ffs_task *t, struct ffs_box *b, const struct ffs_stage_request *req,
	struct ffs_shot **shot, struct ffs_error *err)
{
	int r = ffs_sbx_find_frame(t->node->sbx, req, err);

	if (!r)
		r = ffs_live_begin_payload(t, &b->live, shot, err);
	if (!r) {
		pthread_mutex_lock(&t->call.fs->lock);
		b->fork = ffs_fork_ref(b->live->fork);
		pthread_mutex_unlock(&t->call.fs->lock);
	}
	return r;
}

/* The object is whole: is there a mailbox for it? */
static int complete(struct ffs_task *t, struct ffs_box *b, struct ffs_staged **out, struct ffs_error *err)
{
	struct ffs_stage_request req = {.name = t->node->key.key, .text = b->text, .text_len = b->len};
	char token[FFS_MAILBOX_TOKEN_MAX];
	struct ffs_shot *shot = NULL;
	int r = FFS_FAULT("fs-mailbox-write");

	if (r < 0)
		return r;
	ssize_t n = ffs_box_get_token(&t->call, t->node, token);

	if (n > 0) {
		req.token = token;
		req.token_len = (size_t)n;
	}
	r = t->node->fork ? choose_fork(t, b, &shot, err) : choose_live(t, b, &req, &shot, err);
	if (r < 0)
		return r;
	r = ffs_stage_prepare(shot, &req, b->fork->epoch, out, err);
	ffs_shot_unref(shot);
	if (r < 0)
		return r;
	(*out)->who = ffs_caller_who(&t->call.who);
	pthread_mutex_lock(&t->call.fs->lock);
	r = ffs_fork_may_stage(b->fork, &(*out)->box.frame, b->live ? &(*out)->who : NULL, err);
	pthread_mutex_unlock(&t->call.fs->lock);
	return r;
}

static void write_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_box *b = t->handle->box;
	struct ffs_staged *staged = NULL;
	struct ffs_error err = {0};
	int r = 0;

	pthread_mutex_lock(&fs->lock);
	bool busy = b->busy;

	b->busy = true;
	pthread_mutex_unlock(&fs->lock);
	if (busy)
		r = ffs_error_set(&err, EBUSY, "another write of this handle is under way");
	else
		r = accept_bytes(b, t->buf, t->size, t->offset, &err);
	if (r == 1)
		r = complete(t, b, &staged, &err);
	pthread_mutex_lock(&fs->lock);
	bool mine = ffs_parked_claim(t->p);

	if (!busy) {
		b->busy = false;
		if (!mine || (r < 0 && b->state == BOX_OPEN))
			b->state = b->state == BOX_PUBLISHED ? BOX_PUBLISHED : BOX_SPOILT;
		else if (r == 0 && staged) {
			b->staged = ffs_steal_ptr(&staged);
			b->state = BOX_WHOLE;
		}
		if (b->live && b->state == BOX_SPOILT)
			ffs_live_end_payload(b->live, 1);
	}
	pthread_mutex_unlock(&fs->lock);
	ffs_staged_free(staged);
	if (mine)
		ffs_task_answer_write(t, r, &err);
}

void ffs_box_write(struct ffs_call *call, struct ffs_node *node, struct ffs_handle *h, const char *buf,
	size_t size, uint64_t off)
{
	struct ffs_error err = {0};

	ffs_caller_of(call->req, &call->who);
	if (size > TEXT_MAX) {
		ffs_error_set(&err, EFBIG, "a payload has at most %u bytes", FFS_MAILBOX_PAYLOAD_MAX);
		ffs_reply_failure(call->fs, call->req, &call->who, ffs_node_dir_ino(node), EFBIG, &err);
		pthread_mutex_lock(&call->fs->lock);
		if (h->box->state == BOX_OPEN && !h->box->busy)
			h->box->state = BOX_SPOILT;
		pthread_mutex_unlock(&call->fs->lock);
		return;
	}
	struct ffs_task *t = ffs_task_new_write(call, true, node, h, buf, size);

	if (!t)
		return;
	t->offset = off;
	ffs_task_start(t, write_task);
}

/* ---- flush, unlink ---- */

/* Tree lock held. Every close of a copy of the descriptor comes here, also before anything was written. 1: it has a
 * payload that is to be published. */
static int begin_publish(struct ffs_box *b, struct ffs_node *node, struct ffs_error *err)
{
	if (b->busy || b->state == BOX_PUBLISHED || b->state == BOX_SPOILT)
		return 0;
	if (b->state == BOX_OPEN) {
		if (!b->len || only_space(b->text, b->len))
			return 0;
		return ffs_error_set(err, EINVAL,
			"mailbox '%.80s' gets nothing: its handle was closed after %zu bytes, which are no "
			"whole JSON "
			"object",
			node->key.key, b->len);
	}
	/* it is read back with all the white space that came behind it */
	ptrdiff_t begin = b->staged->box.payload.at - b->staged->box.text;

	free(b->staged->box.text);
	b->staged->box.text = ffs_steal_ptr(&b->text);
	b->staged->box.text_len = b->len;
	b->staged->box.payload.at = b->staged->box.text + begin;
	return 1;
}

/* Tree lock held: it is in the fork now, or r says why not. */
static void end_publish(struct ffs_box *b, int r)
{
	if (r < 0)
		ffs_staged_free(b->staged);
	b->staged = NULL;
	b->state = r < 0 ? BOX_SPOILT : BOX_PUBLISHED;
	b->busy = false;
	if (b->live)
		ffs_live_end_payload(b->live, 1);
}

/* Tree lock held: a payload for branch/, which lives in memory. */
static int publish_live(struct ffs_box *b, struct ffs_error *err)
{
	int r = !b->live->gen || b->live->gen->failed
			? ffs_error_set(
				  err, ESTALE, "the snapshot that it was meant for is over: write it again")
			: ffs_fork_stage(b->fork, b->staged, true, err);

	end_publish(b, r);
	return r;
}

/* A payload for a fork: the store may come first. */
static void flush_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_box *b = t->handle->box;
	struct ffs_error err = {0};
	int r = ffs_fork_keep_staged(b->fork, b->staged, &err);

	pthread_mutex_lock(&fs->lock);
	end_publish(b, r);
	pthread_mutex_unlock(&fs->lock);
	ffs_reply_failure(fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node), -r, &err);
}

/* Claimed at once: what is in the fork must be said to be. */
static void start_flush(struct ffs_call *call, struct ffs_node *node, struct ffs_handle *h)
{
	struct ffs_task *t = ffs_task_new(call, false);
	bool mine = false;

	pthread_mutex_lock(&call->fs->lock);
	if (t) {
		t->node = ffs_node_ref(node);
		t->handle = ffs_handle_ref(h);
		mine = ffs_parked_claim(t->p);
	}
	if (!mine)
		end_publish(h->box, -EINTR);
	pthread_mutex_unlock(&call->fs->lock);
	if (mine)
		ffs_task_start(t, flush_task);
	else if (t)
		ffs_task_drop(t);
}

void ffs_box_flush(struct ffs_call *call, struct ffs_node *node, struct ffs_handle *h)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_error err = {0};

	int r = FFS_FAULT("fs-mailbox-flush");

	pthread_mutex_lock(&fs->lock);
	if (!r)
		r = begin_publish(h->box, node, &err);
	if (r == 1 && h->box->live)
		r = publish_live(h->box, &err);
	else if (r == 1)
		h->box->busy = true;
	pthread_mutex_unlock(&fs->lock);
	if (r == 1) {
		start_flush(call, node, h);
		return;
	}
	ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(node), -r, &err);
}

static void unlink_task(struct ffs_task *t)
{
	struct ffs_error err = {0};
	int r = ffs_fork_keep_unstaged(t->node->fork, t->name, &err);

	ffs_reply_failure(
		t->call.fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node), -r, &err);
}

static void start_unlink(struct ffs_call *call, struct ffs_node *dir, const char *name)
{
	struct ffs_task *t = ffs_task_new(call, false);

	if (!t)
		return;
	snprintf(t->name, sizeof(t->name), "%s", name);
	pthread_mutex_lock(&call->fs->lock);
	t->node = ffs_node_ref(dir);
	bool mine = ffs_parked_claim(t->p);

	pthread_mutex_unlock(&call->fs->lock);
	if (mine)
		ffs_task_start(t, unlink_task);
	else
		ffs_task_drop(t);
}

void ffs_box_unlink(struct ffs_call *call, struct ffs_node *dir, const char *name)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_error err = {0};

	if (dir->fork) {
		start_unlink(call, dir, name);
		return;
	}
	pthread_mutex_lock(&fs->lock);
	struct ffs_live *l = ffs_live_of_payload(call, dir);
	struct ffs_fork *f = l ? l->fork : NULL;
	int r = f ? ffs_fork_unstage(f, name, &err)
		  : ffs_error_set(&err, ENOENT, "mailbox '%.80s' has no payload to take back", name);

	if (l && !r)
		ffs_live_end_payload(l, 0);
	pthread_mutex_unlock(&fs->lock);
	ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(dir), -r, &err);
}

/* ---- listing ---- */

static bool listed(const struct ffs_listing *l, const char *name)
{
	for (unsigned i = 0; i < l->n; i++)
		if (strcmp(l->entries[i].name, name) == 0)
			return true;
	return false;
}

/* A name that stands for several frames is listed with the token of each, where a file name can have it. */
static void add_frame(
	struct ffs_listing *l, const struct ffs_mailbox_frames *in, unsigned i, const struct ffs_node *dir)
{
	const struct ffs_mailbox_id *id = &in->frame[i].id;
	char name[FFS_MAILBOX_NAME_MAX + FFS_MAILBOX_TOKEN_MAX + 2];
	unsigned same = 0;

	for (unsigned k = 0; k < in->n; k++)
		same += strcmp(in->frame[k].id.name, id->name) == 0;
	snprintf(name, sizeof(name), "%s", id->name);
	if (same > 1 && !memchr(id->token, '/', id->token_len))
		snprintf(name, sizeof(name), "%s:%s", id->name, id->token);
	if (!listed(l, name))
		ffs_listing_add(l, name,
			dir->fork ? ffs_ino(FFS_KIND_FORK_BOX, dir->fork->serial, name)
				  : ffs_ino(FFS_KIND_SBX_BOX, dir->sbx->serial, name),
			S_IFREG);
}

static int frames_of_fork(struct ffs_fork *f, struct ffs_mailbox_frames *out, struct ffs_error *err)
{
	struct ffs_fs *fs = f->named->sbx->fs;
	struct ffs_shot *shot = NULL;
	int r = 0;

	pthread_mutex_lock(&fs->lock);
	if (f->named->shot && !f->removed)
		shot = ffs_shot_ref(f->named->shot);
	pthread_mutex_unlock(&fs->lock);
	if (shot)
		r = ffs_shot_frames(shot, out, err);
	ffs_shot_unref(shot);
	return r;
}

static void opendir_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_mailbox_frames frames = {0};
	struct ffs_listing l = {0};
	struct ffs_error err = {0};
	int r = t->node->fork ? frames_of_fork(t->node->fork, &frames, &err)
			      : ffs_sbx_frames(t->node->sbx, &frames, &err);

	ffs_listing_add(&l, ".", t->node->ino, S_IFDIR);
	ffs_listing_add(&l, "..",
		t->node->fork ? ffs_ino(FFS_KIND_FORK, t->node->fork->serial, NULL)
			      : ffs_ino(FFS_KIND_SBX, t->node->sbx->serial, NULL),
		S_IFDIR);
	for (unsigned i = 0; i < frames.n; i++)
		add_frame(&l, &frames, i, t->node);
	ffs_mailbox_frames_free(&frames);
	if (!ffs_task_claim(t)) {
		ffs_listing_free(&l);
	} else if (r < 0) {
		ffs_listing_free(&l);
		ffs_reply_failure(
			fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node), -r, &err);
	} else {
		ffs_reply_listing(fs, ffs_parked_req(t->p), &t->call.who, t->node, (int)t->flags, &l);
	}
}

void ffs_box_opendir(struct ffs_call *call, struct ffs_node *dir, int flags)
{
	struct ffs_task *t = ffs_task_new(call, false);

	if (!t)
		return;
	t->flags = (unsigned)flags;
	pthread_mutex_lock(&call->fs->lock);
	t->node = ffs_node_ref(dir);
	pthread_mutex_unlock(&call->fs->lock);
	ffs_task_start(t, opendir_task);
}
