/* Owns the request "fork": its language, and how all its payloads come into a fork at once.
 *
 * Threads: the pool, without the tree lock (taken inside for short). Payloads are taken from the text of the
 * request as they stand there; what json-c made of them is not used. */
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ack.h"
#include "base/log.h"
#include "base/util.h"
#include "ctl.h"
#include "fork.h"
#include "mailbox/ack.h"
#include "text.h"

/* ---- language ---- */

static int parse_timeout(struct json_object *o, struct ffs_box_request *box, struct ffs_error *err)
{
	struct json_object *v;

	box->ack_timeout_ms = FFS_ACK_DEFAULT_MS;
	if (!json_object_object_get_ex(o, "ack_timeout_ms", &v) || !v)
		return 0;
	if (!json_object_is_type(v, json_type_int))
		return ffs_error_set(
			err, EINVAL, "mailbox '%s': 'ack_timeout_ms' is a number of milliseconds", box->name);
	char what[FFS_MAILBOX_NAME_MAX + FFS_MAILBOX_TOKEN_MAX + 40];

	snprintf(what, sizeof(what), "mailbox '%s': ack_timeout_ms", box->name);
	return ffs_ack_timeout(json_object_get_int64(v), what, &box->ack_timeout_ms, err);
}

static int parse_token(struct json_object *o, struct ffs_box_request *box, struct ffs_error *err)
{
	const char *token;
	int r = ffs_request_string(o, "mailbox", "token", FFS_MAILBOX_TOKEN_MAX, &token, err);

	if (r < 0 || !token)
		return r;
	box->token_len = strlen(token);
	r = ffs_mailbox_check_token(FFS_MAILBOX_FORK, token, box->token_len, err);
	if (r < 0)
		return r;
	box->token = strdup(token);
	return box->token ? 0 : ffs_error_set(err, ENOMEM, "no memory");
}

static int parse_box(
	struct json_object *o, struct ffs_span raw, struct ffs_box_request *box, struct ffs_error *err)
{
	static const char *const keys[] = {
		"name", "token", "payload", "wait_for_ack", "ack_timeout_ms", NULL};
	struct ffs_span payload;
	struct ffs_json json = {0};
	const char *name;

	if (!json_object_is_type(o, json_type_object))
		return ffs_error_set(err, EINVAL, "fork: a mailbox is an object with name and payload");
	int r = ffs_request_known_keys(o, "a mailbox", keys, err);

	if (!r)
		r = ffs_request_string(
			o, "mailbox", "name", FFS_MAILBOX_NAME_MAX + 1 + FFS_MAILBOX_TOKEN_MAX, &name, err);
	if (r < 0)
		return r;
	box->name = strdup(name ? name : "");
	if (!box->name)
		return ffs_error_set(err, ENOMEM, "no memory");
	/* NAME:TOKEN is looked up as it is; what is before a token of its own must be a name */
	if (!name)
		return ffs_error_set(err, EINVAL, "fork: a mailbox without name");
	r = parse_token(o, box, err);
	if (!r && box->token)
		r = ffs_mailbox_check_name(box->name, err);
	if (!r)
		r = ffs_request_bool(o, "mailbox", "wait_for_ack", &box->wants_ack, err);
	if (!r)
		r = parse_timeout(o, box, err);
	if (r < 0)
		return r;
	if (!ffs_json_member(raw, "payload", &payload))
		return ffs_error_set(err, EINVAL, "mailbox '%s': the payload is missing", box->name);
	if (ffs_json_feed(&json, payload.at, payload.len, NULL) != 1)
		return ffs_error_set(
			err, EINVAL, "mailbox '%s': the payload must be a JSON object", box->name);
	if (payload.len > FFS_MAILBOX_PAYLOAD_MAX)
		return ffs_error_set(err, EFBIG, "mailbox '%s': the payload is too large: at most %u bytes",
			box->name, FFS_MAILBOX_PAYLOAD_MAX);
	box->payload = malloc(payload.len);
	if (!box->payload)
		return ffs_error_set(err, ENOMEM, "no memory");
	memcpy(box->payload, payload.at, payload.len);
	box->payload_len = payload.len;
	return 0;
}

static int parse_boxes(
	struct json_object *o, struct ffs_span raw, struct ffs_request *req, struct ffs_error *err)
{
	struct json_object *list;
	struct ffs_span boxes, one;

	if (!json_object_object_get_ex(o, "mailboxes", &list) || !list)
		return 0;
	if (!json_object_is_type(list, json_type_array))
		return ffs_error_set(err, EINVAL, "fork: 'mailboxes' is an array");
	size_t n = json_object_array_length(list);

	if (n > FFS_MAILBOX_MAX)
		return ffs_error_set(err, E2BIG, "at most %u mailboxes of a fork get a payload, not %zu",
			FFS_MAILBOX_MAX, n);
	req->boxes = calloc(n ? n : 1, sizeof(*req->boxes));
	if (!req->boxes)
		return ffs_error_set(err, ENOMEM, "no memory");
	ffs_json_member(raw, "mailboxes", &boxes);
	for (; req->n_boxes < n; req->n_boxes++) {
		struct ffs_box_request *box = &req->boxes[req->n_boxes];
		int r = ffs_json_element(boxes, req->n_boxes, &one)
				? parse_box(json_object_array_get_idx(list, req->n_boxes), one, box, err)
				: ffs_error_set(err, EINVAL, "fork: 'mailboxes' is an array");

		if (r < 0) {
			req->n_boxes++; /* its strings are to be freed too */
			return r;
		}
		for (unsigned i = 0; i < req->n_boxes; i++)
			if (strcmp(req->boxes[i].name, box->name) == 0) {
				req->n_boxes++;
				return ffs_error_set(err, EINVAL, "duplicate mailbox name '%s'", box->name);
			}
	}
	return 0;
}

int ffs_request_parse_fork(
	struct json_object *o, struct ffs_span raw, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const keys[] = {"branch", "name", "mailboxes", NULL};
	const char *branch, *name;
	struct ffs_span whole, body;
	int r = ffs_request_known_keys(o, "fork", keys, err);

	if (!r)
		r = ffs_request_string(o, "fork", "branch", 255, &branch, err);
	if (!r)
		r = ffs_check_name("branch", branch ? branch : "", err);
	if (!r)
		r = ffs_request_string(o, "fork", "name", 255, &name, err);
	if (!r)
		r = ffs_check_name("fork", name ? name : "", err);
	/* stricter than the parser that has read it so far */
	if (!r)
		r = ffs_json_object(raw.at, raw.len, &whole, err);
	if (r < 0)
		return r;
	snprintf(req->branch, sizeof(req->branch), "%s", branch);
	snprintf(req->name, sizeof(req->name), "%s", name);
	ffs_json_member(whole, "fork", &body);
	return parse_boxes(o, body, req, err);
}

/* ---- carrying it out ---- */

static int add_payload(struct ffs_shot *shot, struct ffs_fork *f, const struct ffs_box_request *box,
	const struct ffs_caller *who, struct ffs_error *err)
{
	struct ffs_stage_request req = {.name = box->name,
		.token = box->token,
		.token_len = box->token_len,
		.text = box->payload,
		.text_len = box->payload_len,
		.wants_ack = box->wants_ack,
		.ack_timeout_ms = box->ack_timeout_ms,
		.ack_port = f->ack ? f->ack->port : 0};
	struct ffs_staged *s;
	unsigned before = f->n_staged;
	int r = ffs_stage_prepare(shot, &req, f->epoch, &s, err);

	if (r < 0)
		return r;
	s->who = ffs_caller_who(who);
	/* nobody else knows this fork yet */
	r = ffs_fork_stage(f, s, false, err);
	if (r < 0)
		ffs_staged_free(s);
	else if (f->n_staged == before)
		r = ffs_error_set(err, EINVAL, "mailbox '%s' is named twice", box->name);
	return r;
}

int ffs_request_admit_fork(
	struct ffs_sbx *sbx, const struct ffs_caller *who, struct ffs_request *req, struct ffs_error *err)
{
	struct ffs_fs *fs = sbx->fs;
	struct ffs_shot *shot = NULL;
	struct ffs_fork *f = NULL;
	int r = 0;

	pthread_mutex_lock(&fs->lock);
	struct ffs_named *n = ffs_named_find(sbx, req->branch);

	if (!n || !n->shot)
		r = ffs_error_set(err, ENOENT, "sandbox '%s' has no branch '%s'", sbx->name, req->branch);
	else if (ffs_fork_find(n, req->name))
		r = ffs_error_set(err, EEXIST, "branch '%s' has a fork '%s' already", req->branch, req->name);
	else if (!(f = ffs_fork_new(fs, n, req->name)))
		r = ffs_error_set(err, ENOMEM, "no memory for a fork");
	else
		shot = ffs_shot_ref(n->shot);
	pthread_mutex_unlock(&fs->lock);
	bool asks = false;

	for (unsigned i = 0; i < req->n_boxes; i++)
		asks |= req->boxes[i].wants_ack;
	/* before the payloads, which name the port */
	if (!r && asks)
		r = ffs_ack_listen(fs, f, 0, err);
	for (unsigned i = 0; !r && i < req->n_boxes; i++)
		r = add_payload(shot, f, &req->boxes[i], who, err);
	ffs_shot_unref(shot);
	if (r < 0) {
		pthread_mutex_lock(&fs->lock);
		ffs_fork_unref(f);
		pthread_mutex_unlock(&fs->lock);
		return r;
	}
	req->fork = f;
	return 0;
}

void ffs_request_run_fork(struct ffs_txn *t, struct ffs_request *req)
{
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct ffs_error err = {0};

	int r = ffs_fork_keep_new(req->fork, &err);

	if (!r) {
		pthread_mutex_lock(&fs->lock);
		bool abandoned = ffs_txn_abandoned(t);

		pthread_mutex_unlock(&fs->lock);
		if (abandoned) {
			r = ffs_error_set(&err, EINTR, "fork '%s' was given up by its client", req->name);
			if (ffs_fork_keep_removed(req->fork, &err) < 0)
				ffs_log(FFS_LOG_WARN, "%s", err.text);
		}
	}
	struct json_object *status = r < 0 ? NULL : ffs_fork_status(fs, req->fork), *o;

	if (!r && !status)
		r = ffs_error_set(&err, ENOENT, "the fork was removed meanwhile");
	if (r < 0) {
		ffs_txn_failed(t, -r, &err);
		return;
	}
	o = json_object_new_object();
	json_object_object_add(o, "fork", status);
	ffs_txn_done(t, o);
}
