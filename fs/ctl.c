/* Owns transactions: the bytes that came so far, the state, the answer, and who reads it.
 *
 * Threads: writes of one handle come one at a time (the kernel locks the inode, and each LOOKUP of a ctl is
 * an inode of its own); the rest is guarded by the tree lock. Parsing and admission run in the pool, without
 * it. A read never holds a worker: it is parked until the answer is there. */
#include "ctl.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "events.h"
#include "nodes.h"
#include "park.h"

enum txn_state { TXN_OPEN, TXN_ADMITTED, TXN_DONE };

struct ffs_txn {
	unsigned refs;
	struct ffs_fs *fs;
	struct ffs_sbx *sbx;
	struct ffs_caller who;
	struct json_tokener *tok;
	char *raw; /* all that came, `received` bytes: payloads are taken from it as they stand there */
	size_t received;
	enum txn_state state;
	bool wants_answer, abandoned, is_shutdown;
	struct ffs_cancel *cancel;
	struct ffs_request request;
	struct ffs_work work;
	char *result;
	size_t result_len, pos;
	struct ffs_list readers;
};

struct ffs_txn *ffs_txn_new(
	struct ffs_fs *fs, struct ffs_sbx *sbx, int open_flags, const struct ffs_caller *who)
{
	struct ffs_txn *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->tok = json_tokener_new();
	t->cancel = ffs_cancel_new();
	if (!t->tok || !t->cancel) {
		if (t->tok)
			json_tokener_free(t->tok);
		ffs_cancel_unref(t->cancel);
		free(t);
		return NULL;
	}
	/* what follows the object is looked at here, where a newline is welcome */
	json_tokener_set_flags(
		t->tok, JSON_TOKENER_STRICT | JSON_TOKENER_ALLOW_TRAILING_CHARS | JSON_TOKENER_VALIDATE_UTF8);
	t->refs = 1;
	t->fs = fs;
	t->sbx = sbx ? ffs_sbx_ref(sbx) : NULL;
	t->who = *who;
	t->wants_answer = (open_flags & O_ACCMODE) == O_RDWR;
	ffs_list_init(&t->readers);
	return t;
}

struct ffs_txn *ffs_txn_ref(struct ffs_txn *t)
{
	t->refs++;
	return t;
}

void ffs_txn_unref(struct ffs_txn *t)
{
	if (!t || --t->refs)
		return;
	ffs_request_clear(t->fs, &t->request);
	ffs_sbx_unref(t->sbx);
	json_tokener_free(t->tok);
	ffs_cancel_unref(t->cancel);
	free(t->raw);
	free(t->result);
	free(t);
}

void ffs_txn_released(struct ffs_txn *t)
{
	if (t->state == TXN_ADMITTED && t->wants_answer) {
		t->abandoned = true;
		ffs_cancel_set(t->cancel);
	}
	if (t->is_shutdown && t->fs->shutdown_at_ns) {
		t->fs->shutdown_at_ns = 1;
		ffs_reaper_push(t->fs->reaper, NULL);
	}
}

unsigned ffs_txn_revents(const struct ffs_txn *t)
{
	if (!t)
		return 0;
	if (t->state == TXN_OPEN)
		return POLLOUT | POLLWRNORM;
	return t->state == TXN_DONE ? POLLIN | POLLRDNORM : 0;
}

struct ffs_request *ffs_txn_request(struct ffs_txn *t)
{
	return &t->request;
}

struct ffs_fs *ffs_txn_fs(struct ffs_txn *t)
{
	return t->fs;
}

const struct ffs_caller *ffs_txn_who(struct ffs_txn *t)
{
	return &t->who;
}

struct ffs_cancel *ffs_txn_cancel(struct ffs_txn *t)
{
	return t->cancel;
}

bool ffs_txn_abandoned(const struct ffs_txn *t)
{
	return t->abandoned;
}

/* ---- the answer ---- */

/* Tree lock held: the next part of the answer. */
static const char *take_result(struct ffs_txn *t, size_t size, size_t *len)
{
	const char *at = t->result + t->pos;

	*len = t->result_len - t->pos < size ? t->result_len - t->pos : size;
	t->pos += *len;
	return at;
}

static void set_result(struct ffs_txn *t, struct json_object *o)
{
	struct ffs_list claimed;
	char *text = NULL;
	int n = asprintf(&text, "%s\n",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));

	json_object_put(o);
	pthread_mutex_lock(&t->fs->lock);
	t->result = n < 0 ? NULL : text;
	t->result_len = n < 0 ? 0 : (size_t)n;
	t->state = TXN_DONE;
	ffs_parked_claim_all(&t->readers, &claimed);
	pthread_mutex_unlock(&t->fs->lock);
	for (struct ffs_list *e = claimed.next, *next; e != &claimed; e = next) {
		struct ffs_parked *p = ffs_container(e, struct ffs_parked, link);
		size_t len;

		next = e->next;
		pthread_mutex_lock(&t->fs->lock);
		const char *part = take_result(t, p->size, &len);

		pthread_mutex_unlock(&t->fs->lock);
		/* the result is fixed from now on, and p's handle keeps the transaction */
		fuse_reply_buf(ffs_parked_req(p), part, len);
		ffs_parked_unref(p);
	}
}

void ffs_txn_done(struct ffs_txn *t, struct json_object *o)
{
	set_result(t, o);
	ffs_polls_check(t->fs);
}

static struct json_object *failure(int code, const struct ffs_error *err)
{
	struct json_object *o = json_object_new_object();
	const char *name = strerrorname_np(code);

	json_object_object_add(o, "error", json_object_new_string(err->text[0] ? err->text : strerror(code)));
	json_object_object_add(o, "errno", json_object_new_int(code));
	json_object_object_add(o, "code", json_object_new_string(name ? name : ""));
	return o;
}

void ffs_txn_failed(struct ffs_txn *t, int code, const struct ffs_error *err)
{
	ffs_note_failure(t->fs, &t->who,
		ffs_ino(t->sbx ? FFS_KIND_SBX : FFS_KIND_META, t->sbx ? t->sbx->serial : 0, NULL), err);
	ffs_txn_done(t, failure(code, err));
}

void ffs_ctl_read(struct ffs_call *call, struct ffs_handle *h, size_t size, int flags)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_txn *t = h->txn;
	struct ffs_parked *p = NULL;
	const char *part = NULL;
	size_t len = 0;
	int code = 0;

	pthread_mutex_lock(&fs->lock);
	enum txn_state state = t->state;

	if (state == TXN_DONE)
		part = take_result(t, size, &len);
	pthread_mutex_unlock(&fs->lock);
	if (state == TXN_DONE || (state == TXN_OPEN && (h->flags & O_ACCMODE) == O_RDONLY)) {
		fuse_reply_buf(call->req, part, len);
		return;
	}
	struct ffs_error err = {0};

	if (state == TXN_OPEN)
		code = -ffs_error_set(&err, EINVAL,
			"no answer yet: write one JSON object first, then read (%zu bytes came, no whole "
			"object)",
			t->received);
	else if (flags & O_NONBLOCK)
		code = EAGAIN;
	if (code) {
		ffs_reply_failure(fs, call->req, &call->who, ffs_node_dir_ino(h->node), code, &err);
		return;
	}
	p = ffs_park(call, false);
	if (!p)
		return;
	pthread_mutex_lock(&fs->lock);
	p->handle = ffs_handle_ref(h);
	p->size = size;
	bool mine = false;

	if (t->state == TXN_DONE) {
		mine = ffs_parked_claim(p);
		if (mine)
			part = take_result(t, size, &len);
	} else {
		ffs_parked_wait(p, &t->readers);
	}
	pthread_mutex_unlock(&fs->lock);
	if (mine)
		fuse_reply_buf(ffs_parked_req(p), part, len);
	ffs_parked_unref(p);
}

/* ---- the request ---- */

static bool only_space(const char *s, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (!isspace((unsigned char)s[i]))
			return false;
	return true;
}

/* 1: *out is the whole object; 0: more must come. */
static int feed(
	struct ffs_txn *t, const char *buf, size_t len, struct json_object **out, struct ffs_error *err)
{
	if (t->state != TXN_OPEN) {
		if (only_space(buf, len))
			return 0;
		return ffs_error_set(
			err, EBUSY, "this handle has its request: open ctl again for another one");
	}
	if (len > FFS_CTL_MAX - t->received)
		return ffs_error_set(err, EFBIG, "a request has at most %u bytes", FFS_CTL_MAX);
	if (memchr(buf, 0, len))
		return ffs_error_set(
			err, EINVAL, "a request is text: it has a NUL byte after %zu bytes", t->received);
	/* leading space alone would be an empty document to the parser */
	if (!t->received && only_space(buf, len))
		return 0;
	char *more = realloc(t->raw, t->received + len);

	if (!more)
		return ffs_error_set(err, ENOMEM, "no memory for the request");
	t->raw = more;
	memcpy(t->raw + t->received, buf, len);
	t->received += len;
	struct json_object *o = json_tokener_parse_ex(t->tok, buf, (int)len);
	enum json_tokener_error e = json_tokener_get_error(t->tok);

	if (e == json_tokener_continue)
		return 0;
	if (e != json_tokener_success)
		return ffs_error_set(err, EINVAL, "not JSON: %s", json_tokener_error_desc(e));
	size_t end = json_tokener_get_parse_end(t->tok);

	if (!json_object_is_type(o, json_type_object) || !only_space(buf + end, len - end)) {
		int r = ffs_error_set(err, EINVAL, "a request is one JSON object and nothing after it");

		json_object_put(o);
		return r;
	}
	*out = o;
	return 1;
}

static void run_request(struct ffs_work *w)
{
	struct ffs_txn *t = ffs_container(w, struct ffs_txn, work);
	struct ffs_fs *fs = t->fs;

	ffs_request_run(t);
	pthread_mutex_lock(&fs->lock);
	ffs_txn_unref(t);
	pthread_mutex_unlock(&fs->lock);
}

static int accept_bytes(struct ffs_txn *t, const char *buf, size_t len, struct ffs_error *err)
{
	struct json_object *o = NULL;
	int r = feed(t, buf, len, &o, err);

	if (r <= 0) {
		/* a refused object can be asked about: the reader finds the sentence */
		if (r < 0 && t->state == TXN_OPEN)
			set_result(t, failure(-r, err));
		return r;
	}
	r = ffs_request_admit(
		t->fs, t->sbx, &t->who, o, (struct ffs_span){t->raw, t->received}, &t->request, err);
	json_object_put(o);
	if (r < 0) {
		set_result(t, failure(-r, err));
		return r;
	}
	pthread_mutex_lock(&t->fs->lock);
	t->state = TXN_ADMITTED;
	t->is_shutdown = t->request.kind == FFS_REQ_SHUTDOWN;
	t->work.fn = run_request;
	ffs_txn_ref(t);
	pthread_mutex_unlock(&t->fs->lock);
	ffs_pool_submit(t->fs->pool, &t->work);
	return 0;
}

static void write_task(struct ffs_task *task)
{
	struct ffs_error err = {0};
	int r = FFS_FAULT("fs-ctl-write");

	/* from here on it happens, whatever signal comes */
	if (!ffs_task_claim(task))
		return;
	if (!r)
		r = accept_bytes(task->handle->txn, task->buf, task->size, &err);
	ffs_task_answer_write(task, r, &err);
}

void ffs_ctl_write(
	struct ffs_call *call, struct ffs_node *node, struct ffs_handle *h, const char *buf, size_t size)
{
	struct ffs_error err = {0};

	ffs_caller_of(call->req, &call->who);
	if (size > FFS_CTL_MAX) {
		int r = ffs_error_set(&err, EFBIG, "a request has at most %u bytes", FFS_CTL_MAX);

		ffs_reply_failure(call->fs, call->req, &call->who, ffs_node_dir_ino(node), -r, &err);
		return;
	}
	struct ffs_task *t = ffs_task_new_write(call, false, node, h, buf, size);

	if (t)
		ffs_task_start(t, write_task);
}
