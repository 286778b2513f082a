/* Owns the way from a name and a payload to a page that can be laid over a branch.
 *
 * Threads: the pool, without the tree lock: searching a branch takes as long as reading it may. What was
 * found is remembered with the branch, which never changes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fork.h"

static ssize_t read_memory(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	struct ffs_shot *s = arg;
	ssize_t n = s->stored ? ffs_stored_read_memory(s->stored, buf, len, off, err)
			      : ffs_branch_read_memory(s->branch, buf, len, off);

	if (n < 0 && s->branch)
		ffs_branch_failure(s->branch, err);
	return n;
}

static int heads_of_branch(void *arg, uint64_t *head, size_t pages, uint64_t off, struct ffs_error *err)
{
	struct ffs_shot *s = arg;
	int r = ffs_branch_read_heads(s->branch, head, pages, off);

	if (r < 0)
		ffs_branch_failure(s->branch, err);
	return r;
}

/* Only files in memory that nobody can cut off are mapped: a read of a mapping beyond its end is a SIGBUS. */
static struct ffs_mailbox_memory memory_of(struct ffs_shot *s)
{
	int fd = s->branch && !s->stored ? ffs_branch_memory_fd(s->branch) : -1;

	return (struct ffs_mailbox_memory){
		.size = s->stored ? ffs_stored_memory_size(s->stored) : s->memory_size,
		.fd = fd < 0 ? -1 : fd,
		.read = read_memory,
		.heads = s->branch && !s->stored ? heads_of_branch : NULL,
		.arg = s};
}

/* Failed before this daemon began: neither image nor store. */
static int check_shot(struct ffs_shot *s, struct ffs_error *err)
{
	struct ffs_fs *fs = s->fs;
	int r = 0;

	pthread_mutex_lock(&fs->lock);
	if (s->state == FFS_BRANCH_FAILED || (!s->branch && !s->stored))
		r = ffs_error_set(err, EIO, "the branch failed: %.480s", s->failure.text);
	pthread_mutex_unlock(&fs->lock);
	return r;
}

int ffs_shot_frames(struct ffs_shot *s, struct ffs_mailbox_frames *out, struct ffs_error *err)
{
	struct ffs_fs *fs = s->fs;
	struct ffs_mailbox_memory mem;
	struct ffs_mailbox_frames found;
	int r = check_shot(s, err);

	if (r < 0)
		return r;
	pthread_mutex_lock(&fs->lock);
	bool known = s->frames_known;

	if (known)
		r = ffs_mailbox_frames_copy(out, &s->frames);
	pthread_mutex_unlock(&fs->lock);
	if (known)
		return r < 0 ? ffs_error_set(err, ENOMEM, "no memory") : 0;
	mem = memory_of(s);
	r = ffs_mailbox_scan(&mem, &found, err);
	if (r < 0)
		return r;
	r = ffs_mailbox_frames_copy(out, &found);
	pthread_mutex_lock(&fs->lock);
	if (!s->frames_known) {
		s->frames = found;
		s->frames_known = true;
		found = (struct ffs_mailbox_frames){0};
	}
	pthread_mutex_unlock(&fs->lock);
	ffs_mailbox_frames_free(&found);
	return r < 0 ? ffs_error_set(err, ENOMEM, "no memory") : 0;
}

/* ---- the running guest ---- */

static ssize_t read_running(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	ssize_t n = ffs_sandbox_read_memory(arg, buf, len, off);

	return n < 0 ? ffs_error_errno(err, (int)-n, "the VM's memory can't be read") : n;
}

static int heads_running(void *arg, uint64_t *head, size_t pages, uint64_t off, struct ffs_error *err)
{
	int r = ffs_sandbox_read_heads(arg, head, pages, off);

	return r < 0 ? ffs_error_errno(err, -r, "the VM's memory can't be read") : 0;
}

static int running_memory(struct ffs_sbx *sbx, struct ffs_mailbox_memory *out, struct ffs_error *err)
{
	pthread_mutex_lock(&sbx->fs->lock);
	struct ffs_sandbox *engine = sbx->engine && !sbx->exited ? ffs_sandbox_ref(sbx->engine) : NULL;

	pthread_mutex_unlock(&sbx->fs->lock);
	if (!engine)
		return ffs_error_set(err, ESRCH, "sandbox '%s' has no VM that runs", sbx->name);
	*out = (struct ffs_mailbox_memory){.size = ffs_sandbox_memory_size(engine),
		.fd = -1,
		.read = read_running,
		.heads = heads_running,
		.arg = engine};
	return 0;
}

/* Search it all, and remember what was found. */
static int search_running(struct ffs_sbx *sbx, const struct ffs_mailbox_memory *mem,
	struct ffs_mailbox_frames *out, struct ffs_error *err)
{
	struct ffs_mailbox_frames keep;
	int r = ffs_mailbox_scan(mem, out, err);

	if (r < 0)
		return r;
	if (ffs_mailbox_frames_copy(&keep, out) < 0)
		return 0; /* searched again the next time */
	pthread_mutex_lock(&sbx->fs->lock);
	ffs_mailbox_frames_free(&sbx->frames);
	sbx->frames = keep;
	pthread_mutex_unlock(&sbx->fs->lock);
	return 0;
}

int ffs_sbx_frames(struct ffs_sbx *sbx, struct ffs_mailbox_frames *out, struct ffs_error *err)
{
	struct ffs_mailbox_memory mem;
	int r = running_memory(sbx, &mem, err);

	if (r < 0)
		return r;
	r = search_running(sbx, &mem, out, err);
	ffs_sandbox_unref(mem.arg);
	return r;
}

int ffs_sbx_find_frame(struct ffs_sbx *sbx, const struct ffs_stage_request *req, struct ffs_error *err)
{
	const struct ffs_mailbox_frame *frame;
	struct ffs_mailbox_frames frames = {0};
	struct ffs_mailbox_memory mem;
	int r = running_memory(sbx, &mem, err);

	if (r < 0)
		return r;
	pthread_mutex_lock(&sbx->fs->lock);
	r = ffs_mailbox_frames_copy(&frames, &sbx->frames);
	pthread_mutex_unlock(&sbx->fs->lock);
	/* where it was it mostly is; else it may have come, gone or moved since */
	if (r < 0 || ffs_mailbox_verify(&mem, &frames, NULL) < 0 ||
		ffs_mailbox_find(&frames, req->name, req->token, req->token_len, &frame, NULL) < 0) {
		ffs_mailbox_frames_free(&frames);
		r = search_running(sbx, &mem, &frames, err);
		if (!r)
			r = ffs_mailbox_find(&frames, req->name, req->token, req->token_len, &frame, err);
	}
	ffs_mailbox_frames_free(&frames);
	ffs_sandbox_unref(mem.arg);
	return r;
}

/* ---- pages ---- */

/* The branch's page with the payload in it. */
static int make_page(struct ffs_shot *shot, struct ffs_staged *s, const uint8_t epoch[16], unsigned port,
	struct ffs_error *err)
{
	ssize_t n = read_memory(shot, s->box.page, sizeof(s->box.page), s->box.frame.offset, err);

	if (n != (ssize_t)sizeof(s->box.page))
		return err && err->text[0] ? (n < 0 ? (int)n : -EIO)
					   : ffs_error_set(err, EIO, "the mailbox's page can't be read");
	return ffs_mailbox_lay(
		s->box.frame.id.kind, s->box.payload, epoch, s->box.wants_ack, port, s->box.page, err);
}

/* Whoever starts the child adds the port at which it waits; that no room is left is known now. */
static int check_port(enum ffs_mailbox_kind kind, struct ffs_span payload, struct ffs_error *err)
{
	char with_port[FFS_MAILBOX_PAYLOAD_MAX];
	ssize_t n = ffs_json_add_port(
		payload, FFS_ACK_PORT_KEY, 65535, with_port, ffs_mailbox_layout(kind)->payload_max, err);

	return n < 0 ? (int)n : 0;
}

static int fill(struct ffs_shot *shot, const struct ffs_mailbox_frames *frames,
	const struct ffs_stage_request *req, const uint8_t epoch[16], struct ffs_staged *s,
	struct ffs_error *err)
{
	const struct ffs_mailbox_frame *frame;
	int r = ffs_mailbox_find(frames, req->name, req->token, req->token_len, &frame, err);

	if (r < 0)
		return r;
	s->box.frame = *frame;
	s->box.text = malloc(req->text_len + 1);
	if (!s->box.text)
		return ffs_error_set(err, ENOMEM, "no memory for the payload");
	memcpy(s->box.text, req->text, req->text_len);
	s->box.text_len = req->text_len;
	s->box.wants_ack = req->wants_ack;
	s->box.ack_timeout_ms = req->ack_timeout_ms;
	r = ffs_json_object(s->box.text, s->box.text_len, &s->box.payload, err);
	if (!r)
		r = ffs_mailbox_fits(
			frame->id.kind, s->box.payload.len, frame->offset, shot->memory_size, err);
	if (!r && s->box.wants_ack)
		r = check_port(frame->id.kind, s->box.payload, err);
	return r < 0 ? r : make_page(shot, s, epoch, req->ack_port, err);
}

int ffs_stage_prepare(struct ffs_shot *shot, const struct ffs_stage_request *req, const uint8_t epoch[16],
	struct ffs_staged **out, struct ffs_error *err)
{
	struct ffs_staged *s = calloc(1, sizeof(*s));
	struct ffs_mailbox_frames frames;
	int r = s ? ffs_shot_frames(shot, &frames, err)
		  : ffs_error_set(err, ENOMEM, "no memory for the payload");

	if (!r) {
		r = fill(shot, &frames, req, epoch, s, err);
		ffs_mailbox_frames_free(&frames);
	}
	if (r < 0)
		ffs_staged_free(s);
	else
		*out = s;
	return r;
}
