/* Owns what is done for a request that was made through ctl: reserving what it names, carrying it out.
 *
 * Threads: the pool, without the tree lock (taken inside for short). */
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "attach.h"
#include "attached.h"
#include "convert.h"
#include "ctl.h"
#include "durable.h"
#include "events.h"
#include "fork.h"
#include "guard.h"
#include "keyed.h"
#include "named.h"
#include "nodes.h"
#include "text.h"

/* Bound of a branch that was asked for by ctl: nothing of the tree is locked meanwhile. */
#define CTL_TAKE_NS (30 * FFS_NS_PER_S)

/* ---- admission: reserve, tree lock held ---- */

static int admit_detach(struct ffs_fs *fs, struct ffs_request *req, struct ffs_error *err)
{
	struct ffs_sbx *s = ffs_tree_find(fs, req->name);

	if (!s || (s->attaching && !s->n_branches))
		return ffs_error_set(err, ENOENT, "there is no sandbox '%s'", req->name);
	if (s->attaching || s->detaching)
		return ffs_error_set(err, EBUSY, "sandbox '%s' is just being %s", req->name,
			s->attaching ? "attached" : "detached");
	if (!s->engine)
		return ffs_error_set(err, ESRCH,
			"sandbox '%s' is detached already: it is here for its branches, and goes with the "
			"last of them",
			req->name);
	s->detaching = true;
	req->sbx = ffs_sbx_ref(s);
	return 0;
}

void ffs_request_free_strings(struct ffs_request *req)
{
	free(req->qemu);
	free(req->coop);
	free(req->key);
	free(req->firecracker);
	free(req->said);
	for (unsigned i = 0; i < req->n_disks; i++) {
		free((char *)req->disks[i].id);
		free((char *)req->disks[i].path);
	}
	free(req->disks);
	for (unsigned i = 0; i < req->n_boxes; i++) {
		free(req->boxes[i].name);
		free(req->boxes[i].token);
		free(req->boxes[i].payload);
	}
	free(req->boxes);
}

static int admit_branch(
	struct ffs_sbx *sbx, const struct ffs_caller *who, struct ffs_request *req, struct ffs_error *err)
{
	int r = 0;

	if (req->has_store && req->store != FFS_STORE_MEMORY && !sbx->fs->store)
		return ffs_error_set(err, EOPNOTSUPP,
			"branch: this mount has no store, its branches live in memory: mount it with -o "
			"store=DIR "
			"for '%s'",
			ffs_store_kind_name(req->store));
	/* who takes it, if anybody has to, is seen when it is carried out */
	if (req->key) {
		req->sbx = ffs_sbx_ref(sbx);
		return 0;
	}
	r = ffs_named_reserve(sbx, req->name, who, &req->named, err);
	if (!r && req->has_store)
		req->named->kind = req->store;
	return r;
}

static int admit_convert(struct ffs_sbx *sbx, struct ffs_request *req, struct ffs_error *err)
{
	struct ffs_named *n = ffs_named_find(sbx, req->name);
	int r = n ? ffs_convert_admit(n, err)
		  : ffs_error_set(err, ENOENT, "sandbox '%s' has no branch '%s'", sbx->name, req->name);

	if (!r)
		req->named = ffs_named_ref(n);
	return r;
}

int ffs_request_admit(struct ffs_fs *fs, struct ffs_sbx *sbx, const struct ffs_caller *who,
	struct json_object *o, struct ffs_span raw, struct ffs_request *out, struct ffs_error *err)
{
	struct ffs_request req = {0};
	int r = ffs_request_parse(o, !sbx, raw, &req, err);

	if (!r && req.kind == FFS_REQ_FORK) {
		r = ffs_request_admit_fork(sbx, who, &req, err);
	} else if (!r) {
		pthread_mutex_lock(&fs->lock);
		if (req.kind == FFS_REQ_ATTACH)
			r = ffs_attach_admit(fs, &req, err);
		else if (req.kind == FFS_REQ_DETACH)
			r = admit_detach(fs, &req, err);
		else if (req.kind == FFS_REQ_BRANCH)
			r = admit_branch(sbx, who, &req, err);
		else if (req.kind == FFS_REQ_CONVERT)
			r = admit_convert(sbx, &req, err);
		pthread_mutex_unlock(&fs->lock);
	}
	if (r < 0) {
		ffs_request_free_strings(&req);
	} else {
		*out = req;
	}
	return r;
}

void ffs_request_clear(struct ffs_fs *fs, struct ffs_request *req)
{
	ffs_sbx_unref(req->sbx);
	ffs_named_unref(req->named);
	ffs_fork_unref(req->fork);
	ffs_request_free_strings(req);
	*req = (struct ffs_request){0};
}

/* ---- detach, shutdown ---- */

void ffs_sbx_detach(struct ffs_sbx *s)
{
	struct ffs_fs *fs = s->fs;
	struct json_object *status = NULL;
	char *text = NULL;
	struct ffs_sandbox *engine;
	struct ffs_inval inval;
	int pidfd;

	/* `detaching` keeps everybody else from taking engine away */
	if (ffs_sandbox_status(s->engine, &status) == 0) {
		text = strdup(json_object_to_json_string_ext(
			status, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
		json_object_put(status);
	}
	ffs_sandbox_detach(s->engine);
	pthread_mutex_lock(&fs->lock);
	engine = s->engine;
	pidfd = s->pidfd;
	free(s->last_status);
	s->last_status = text;
	s->engine = NULL;
	s->pidfd = -1;
	s->pid = 0;
	s->detaching = false;
	s->exited = false;
	ffs_gen_end_all(s->gens, ffs_live_ended, NULL);
	ffs_event(fs, "detach", s->name, NULL, NULL, NULL);
	ffs_tree_drop_empty(fs, s);
	ffs_inval_collect(fs, s, &inval);
	pthread_mutex_unlock(&fs->lock);
	ffs_inval_send(fs, &inval);
	if (pidfd >= 0)
		close(pidfd);
	ffs_sandbox_unref(engine);
}

static void run_detach(struct ffs_txn *t, struct ffs_request *req)
{
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct ffs_error err = {0};
	int r = FFS_FAULT("fs-detach");

	if (r < 0) {
		pthread_mutex_lock(&fs->lock);
		req->sbx->detaching = false;
		pthread_mutex_unlock(&fs->lock);
		ffs_txn_failed(t, -r, &err);
		return;
	}
	/* first: a daemon that is killed in between must not attach what its user has let go */
	if (fs->attached)
		ffs_attached_forget(fs->attached, req->name);
	ffs_sbx_detach(req->sbx);
	struct json_object *o = json_object_new_object(), *d = json_object_new_object();

	pthread_mutex_lock(&fs->lock);
	json_object_object_add(d, "name", json_object_new_string(req->name));
	json_object_object_add(d, "branches_left", json_object_new_int64(req->sbx->n_branches));
	pthread_mutex_unlock(&fs->lock);
	json_object_object_add(o, "detach", d);
	ffs_txn_done(t, o);
}

static void run_shutdown(struct ffs_txn *t)
{
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "shutdown", json_object_new_object());
	pthread_mutex_lock(&fs->lock);
	/* when the client has read the answer and closed, or after a second */
	fs->shutdown_at_ns = ffs_now_ns() + FFS_NS_PER_S;
	pthread_mutex_unlock(&fs->lock);
	ffs_txn_done(t, o);
	ffs_reaper_push(fs->reaper, NULL);
}

/* ---- branch ---- */

struct txn_wait {
	struct ffs_waiter waiter;
	struct ffs_txn *txn; /* referenced */
};

static void answer_branch(struct ffs_txn *t, struct ffs_named *named)
{
	struct json_object *o, *status = ffs_named_status(ffs_txn_fs(t), named);
	struct ffs_error err = {0};

	if (!status) {
		ffs_error_set(&err, ENOENT, "the branch was removed meanwhile");
		ffs_txn_failed(t, ENOENT, &err);
		return;
	}
	o = json_object_new_object();
	if (ffs_txn_request(t)->key)
		json_object_object_add(status, "cached", json_object_new_boolean(ffs_txn_request(t)->cached));
	json_object_object_add(o, "branch", status);
	ffs_txn_done(t, o);
}

static void branch_settled(struct ffs_waiter *w, struct ffs_shot *shot)
{
	struct txn_wait *tw = ffs_container(w, struct txn_wait, waiter);
	struct ffs_txn *t = tw->txn;
	struct ffs_fs *fs = ffs_txn_fs(t);

	pthread_mutex_lock(&fs->lock);
	struct ffs_error err = shot->failure;
	bool failed = shot->state == FFS_BRANCH_FAILED;

	pthread_mutex_unlock(&fs->lock);
	if (failed)
		ffs_txn_failed(t, EIO, &err);
	else
		answer_branch(t, ffs_txn_request(t)->named);
	pthread_mutex_lock(&fs->lock);
	ffs_txn_unref(t);
	pthread_mutex_unlock(&fs->lock);
	free(tw);
}

/* Now, or from branch_settled(). */
static void answer_when_settled(struct ffs_txn *t, struct ffs_request *req)
{
	struct txn_wait *tw = calloc(1, sizeof(*tw));
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct ffs_error err = {0};
	bool waits = false;

	pthread_mutex_lock(&fs->lock);
	struct ffs_shot *s = req->named->shot;

	if (s && s->state == FFS_BRANCH_WRITING && tw) {
		tw->waiter.settled = branch_settled;
		tw->txn = ffs_txn_ref(t);
		ffs_list_add(&s->waiters, &tw->waiter.link);
		waits = true;
	} else if (s && s->state == FFS_BRANCH_FAILED) {
		err = s->failure;
	}
	pthread_mutex_unlock(&fs->lock);
	if (waits)
		return;
	free(tw);
	if (err.code)
		ffs_txn_failed(t, EIO, &err);
	else
		answer_branch(t, req->named);
}

static bool txn_wanted(void *arg)
{
	return !ffs_txn_abandoned(arg);
}

static void run_branch(struct ffs_txn *t, struct ffs_request *req)
{
	struct ffs_error err = {0};
	struct ffs_take_options how = {.timeout_ns = CTL_TAKE_NS,
		.without_disks = req->without_disks,
		.mode = req->mode,
		.max_rate = req->max_rate,
		.force = req->force,
		.has_store = req->has_store,
		.store = req->store};
	int r = req->key ? ffs_keyed_get(req->sbx, req->key, ffs_txn_who(t), &how, ffs_txn_cancel(t),
				   txn_wanted, t, &req->named, &req->cached, &err)
			 : ffs_named_take(req->named, &how, ffs_txn_cancel(t), txn_wanted, t, &err);

	if (r < 0)
		ffs_txn_failed(t, -r, &err);
	else if (!req->wait)
		answer_branch(t, req->named);
	else
		answer_when_settled(t, req);
}

static void run_adopt(struct ffs_txn *t, struct ffs_request *req)
{
	struct ffs_error err = {0};
	int r = ffs_durable_adopt(ffs_txn_fs(t), req->name, req->branch, &err);

	if (r < 0) {
		ffs_txn_failed(t, -r, &err);
		return;
	}
	struct json_object *o = json_object_new_object(), *body = json_object_new_object();

	json_object_object_add(body, "name", json_object_new_string(req->name));
	json_object_object_add(body, "branch", json_object_new_string(req->branch));
	json_object_object_add(o, "adopt", body);
	ffs_txn_done(t, o);
}

void ffs_request_run(struct ffs_txn *t)
{
	struct ffs_request *req = ffs_txn_request(t);

	switch (req->kind) {
	case FFS_REQ_ATTACH:
		ffs_attach_run(t, req);
		break;
	case FFS_REQ_DETACH:
		run_detach(t, req);
		break;
	case FFS_REQ_ADOPT:
		run_adopt(t, req);
		break;
	case FFS_REQ_SHUTDOWN:
		run_shutdown(t);
		break;
	case FFS_REQ_BRANCH:
		run_branch(t, req);
		break;
	case FFS_REQ_CONVERT:
		ffs_convert_run(t, req);
		break;
	case FFS_REQ_FORK:
		ffs_request_run_fork(t, req);
		break;
	}
}
