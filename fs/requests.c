/* Owns the language of ctl: which objects there are, their keys and types, and how each is carried out.
 *
 * Threads: the pool, without the tree lock (taken inside for short). JSON comes from untrusted clients: every
 * key is known and every type is checked before anything is reserved. */
#include <errno.h>
#include <json-c/json.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "ctl.h"
#include "events.h"
#include "guard.h"
#include "named.h"
#include "nodes.h"
#include "text.h"

/* Bound of a branch that was asked for by ctl: nothing of the tree is locked meanwhile. */
#define CTL_TAKE_NS (30 * FFS_NS_PER_S)

/* ---- checking
 * ---------------------------------------------------------------------------------------------------------
 */

static int known_keys(struct json_object *o, const char *what, const char *const *keys, struct ffs_error *err)
{
	json_object_object_foreach(o, key, value)
	{
		bool found = false;

		for (const char *const *k = keys; *k && !found; k++)
			found = strcmp(key, *k) == 0;
		if (!found)
			return ffs_error_set(err, EINVAL, "%s has no key '%.64s'", what, key);
		(void)value;
	}
	return 0;
}

static int get_string(struct json_object *o, const char *what, const char *key, size_t max, const char **out,
	struct ffs_error *err)
{
	struct json_object *v;

	*out = NULL;
	if (!json_object_object_get_ex(o, key, &v) || !v)
		return 0;
	if (!json_object_is_type(v, json_type_string))
		return ffs_error_set(err, EINVAL, "%s: '%s' is a string", what, key);
	const char *s = json_object_get_string(v);
	size_t len = (size_t)json_object_get_string_len(v);

	if (len > max || strlen(s) != len)
		return ffs_error_set(
			err, EINVAL, "%s: '%s' is longer than %zu bytes or has a NUL in it", what, key, max);
	*out = s;
	return 0;
}

static int get_bool(
	struct json_object *o, const char *what, const char *key, bool *out, struct ffs_error *err)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v) || !v)
		return 0;
	if (!json_object_is_type(v, json_type_boolean))
		return ffs_error_set(err, EINVAL, "%s: '%s' is true or false", what, key);
	*out = json_object_get_boolean(v);
	return 0;
}

static int get_name(
	struct json_object *o, const char *what, const char *noun, char out[80], struct ffs_error *err)
{
	const char *name;
	int r = get_string(o, what, "name", 255, &name, err);

	if (r < 0)
		return r;
	if (!name)
		return ffs_error_set(err, EINVAL, "%s: the key 'name' is missing", what);
	r = ffs_check_name(noun, name, err);
	if (r < 0)
		return r;
	snprintf(out, 80, "%s", name);
	return 0;
}

/* UID:GID[:rw] in decimal */
static int parse_owner(const char *s, struct ffs_request *req, struct ffs_error *err)
{
	unsigned long uid, gid;
	char *end;

	if (*s >= '0' && *s <= '9') {
		uid = strtoul(s, &end, 10);
		if (*end == ':' && end[1] >= '0' && end[1] <= '9') {
			gid = strtoul(end + 1, &end, 10);
			req->owner_writes = strcmp(end, ":rw") == 0;
			if ((!*end || req->owner_writes) && uid < UINT32_MAX && gid < UINT32_MAX) {
				req->has_owner = true;
				req->uid = (uid_t)uid;
				req->gid = (gid_t)gid;
				return 0;
			}
		}
	}
	return ffs_error_set(
		err, EINVAL, "attach: 'owner' is UID:GID or UID:GID:rw in numbers, not '%.64s'", s);
}

static int parse_attach(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const keys[] = {"name", "qemu", "pid", "track", "owner", NULL};
	const char *qemu, *owner;
	struct json_object *pid;
	int r = known_keys(o, "attach", keys, err);

	if (!r)
		r = get_name(o, "attach", "sandbox", req->name, err);
	if (!r)
		r = get_string(
			o, "attach", "qemu", sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1, &qemu, err);
	if (!r)
		r = get_string(o, "attach", "owner", 64, &owner, err);
	if (!r)
		r = get_bool(o, "attach", "track", &req->track, err);
	if (r < 0)
		return r;
	if (json_object_object_get_ex(o, "pid", &pid) && pid) {
		int64_t v = json_object_is_type(pid, json_type_int) ? json_object_get_int64(pid) : 0;

		if (v <= 0 || v > INT_MAX)
			return ffs_error_set(err, EINVAL, "attach: 'pid' is the number of a process");
		req->pid = (pid_t)v;
	}
	if (!qemu && !req->pid)
		return ffs_error_set(err, EINVAL,
			"attach: name the VM by 'qemu' (the path of its QMP socket) or by 'pid'");
	if (qemu && qemu[0] != '/')
		return ffs_error_set(err, EINVAL,
			"attach: the daemon has another working directory: 'qemu' is an absolute path, not "
			"'%s'",
			qemu);
	if (owner) {
		r = parse_owner(owner, req, err);
		if (r < 0)
			return r;
	}
	req->qemu = qemu ? strdup(qemu) : NULL;
	return qemu && !req->qemu ? ffs_error_set(err, ENOMEM, "no memory") : 0;
}

static int parse_choice(struct json_object *o, const char *key, const char *have, const char *later1,
	const char *later2, struct ffs_error *err)
{
	const char *v;
	int r = get_string(o, "branch", key, 64, &v, err);

	if (r < 0 || !v || strcmp(v, have) == 0)
		return r;
	if (strcmp(v, later1) == 0 || strcmp(v, later2) == 0)
		return ffs_error_set(
			err, EOPNOTSUPP, "branch: this version has the %s '%s' only, not '%s'", key, have, v);
	return ffs_error_set(err, EINVAL, "branch: there is no %s '%s'", key, v);
}

static int parse_branch(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const keys[] = {"name", "mode", "store", "wait", NULL};
	int r = known_keys(o, "branch", keys, err);

	if (!r)
		r = get_name(o, "branch", "branch", req->name, err);
	if (!r)
		r = parse_choice(o, "mode", "live", "diff", "full", err);
	if (!r)
		r = parse_choice(o, "store", "memory", "dense", "packed", err);
	return r < 0 ? r : get_bool(o, "branch", "wait", &req->wait, err);
}

static int parse(struct json_object *o, bool root, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const none[] = {NULL}, *const only_name[] = {"name", NULL};
	const char *verb = NULL;
	struct json_object *arg = NULL;
	int n = 0;

	json_object_object_foreach(o, key, value)
	{
		verb = key;
		arg = value;
		n++;
	}
	if (n != 1)
		return ffs_error_set(err, EINVAL, "a request has exactly one key: %s",
			root ? "attach, detach or shutdown" : "branch");
	if (!json_object_is_type(arg, json_type_object))
		return ffs_error_set(err, EINVAL, "'%.64s' takes an object", verb);
	if (root && strcmp(verb, "attach") == 0) {
		req->kind = FFS_REQ_ATTACH;
		return parse_attach(arg, req, err);
	}
	if (root && strcmp(verb, "detach") == 0) {
		int r = known_keys(arg, "detach", only_name, err);

		req->kind = FFS_REQ_DETACH;
		return r < 0 ? r : get_name(arg, "detach", "sandbox", req->name, err);
	}
	if (root && strcmp(verb, "shutdown") == 0) {
		req->kind = FFS_REQ_SHUTDOWN;
		return known_keys(arg, "shutdown", none, err);
	}
	if (!root && strcmp(verb, "branch") == 0) {
		req->kind = FFS_REQ_BRANCH;
		return parse_branch(arg, req, err);
	}
	return ffs_error_set(err, EINVAL, "there is no request '%.64s' here: %s", verb,
		root ? ".forkfs/ctl takes attach, detach, shutdown" : "a sandbox's ctl takes branch");
}

/* ---- admission: reserve, tree lock held
 * --------------------------------------------------------------------------------- */

static int admit_attach(struct ffs_fs *fs, struct ffs_request *req, struct ffs_error *err)
{
	struct ffs_sbx *s = ffs_tree_find(fs, req->name);

	if (s && s->attaching)
		return ffs_error_set(err, EBUSY, "sandbox '%s' is just being attached", req->name);
	if (s && s->detaching)
		return ffs_error_set(err, EBUSY, "sandbox '%s' is just being detached", req->name);
	if (s && s->engine)
		return ffs_error_set(err, EEXIST,
			"sandbox '%s' is attached already (pid %d): detach it or take another "
			"name",
			req->name, (int)s->pid);
	if (fs->closing)
		return ffs_error_set(err, ESHUTDOWN, "the daemon is ending");
	if (s) {
		req->sbx = ffs_sbx_ref(s);
	} else {
		req->sbx = ffs_sbx_new(fs, req->name);
		if (!req->sbx)
			return ffs_error_set(err, ENOMEM, "no memory");
		ffs_tree_add(fs, req->sbx);
	}
	req->sbx->attaching = true;
	return 0;
}

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

int ffs_request_admit(struct ffs_fs *fs, struct ffs_sbx *sbx, const struct ffs_caller *who,
	struct json_object *o, struct ffs_request *out, struct ffs_error *err)
{
	struct ffs_request req = {0};
	int r = parse(o, !sbx, &req, err);

	if (!r) {
		pthread_mutex_lock(&fs->lock);
		if (req.kind == FFS_REQ_ATTACH)
			r = admit_attach(fs, &req, err);
		else if (req.kind == FFS_REQ_DETACH)
			r = admit_detach(fs, &req, err);
		else if (req.kind == FFS_REQ_BRANCH)
			r = ffs_named_reserve(sbx, req.name, who, &req.named, err);
		pthread_mutex_unlock(&fs->lock);
	}
	if (r < 0)
		free(req.qemu);
	else
		*out = req;
	return r;
}

void ffs_request_clear(struct ffs_fs *fs, struct ffs_request *req)
{
	ffs_sbx_unref(req->sbx);
	ffs_named_unref(req->named);
	free(req->qemu);
	*req = (struct ffs_request){0};
}

/* ---- attach
 * ------------------------------------------------------------------------------------------------------------
 */

static void undo_attach(struct ffs_fs *fs, struct ffs_sbx *s)
{
	pthread_mutex_lock(&fs->lock);
	s->attaching = false;
	ffs_tree_drop_empty(fs, s);
	pthread_mutex_unlock(&fs->lock);
}

/* False: the client is gone, nothing was done. */
static bool publish_attach(struct ffs_txn *t, struct ffs_request *req, struct ffs_sandbox *engine, int pidfd)
{
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct ffs_sbx *s = req->sbx;
	struct ffs_inval inval = {0};

	pthread_mutex_lock(&fs->lock);
	bool ok = !ffs_txn_abandoned(t) && !fs->closing;

	if (ok) {
		s->attaching = false;
		s->engine = engine;
		s->exited = false;
		s->pid = ffs_sandbox_pid(engine);
		s->pidfd = pidfd;
		s->memory_size = ffs_sandbox_memory_size(engine);
		s->uid = req->has_owner ? req->uid : fs->uid;
		s->gid = req->has_owner ? req->gid : fs->gid;
		s->writable = !req->has_owner || req->owner_writes;
		s->attached_ns = ffs_wall_ns();
		ffs_event(fs, "attach", s->name, NULL, NULL, NULL);
		/* a directory that was there for its branches has another owner now */
		ffs_inval_collect(fs, s, &inval);
	}
	pthread_mutex_unlock(&fs->lock);
	ffs_inval_send(fs, &inval);
	return ok;
}

static void run_attach(struct ffs_txn *t, struct ffs_request *req)
{
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct ffs_attach_options opt = {
		.name = req->name, .pid = req->pid, .qemu_socket = req->qemu, .track = req->track};
	struct ffs_sandbox *engine = NULL;
	struct ffs_error err = {0};
	int r = FFS_FAULT("fs-attach");

	if (!r)
		r = ffs_sandbox_attach(fs->engine, &opt, ffs_txn_cancel(t), &engine, &err);
	if (!r) {
		r = ffs_guard_check(fs, ffs_sandbox_pid(engine), &err);
		if (r < 0) {
			ffs_sandbox_detach(engine);
			ffs_sandbox_unref(engine);
		}
	}
	if (r < 0) {
		undo_attach(fs, req->sbx);
		ffs_txn_failed(t, -r, &err);
		return;
	}
	int pidfd = (int)syscall(SYS_pidfd_open, ffs_sandbox_pid(engine), 0);

	if (!publish_attach(t, req, engine, pidfd)) {
		ffs_sandbox_detach(engine);
		ffs_sandbox_unref(engine);
		if (pidfd >= 0)
			close(pidfd);
		undo_attach(fs, req->sbx);
		ffs_error_set(&err, EINTR, "attach of '%s' was given up by its client", req->name);
		ffs_txn_failed(t, EINTR, &err);
		return;
	}
	atomic_fetch_add(&fs->count.attaches, 1);
	ffs_reaper_push(fs->reaper, NULL);
	struct json_object *o = json_object_new_object(), *status = NULL;

	if (ffs_sandbox_status(engine, &status) < 0)
		status = json_object_new_object();
	json_object_object_add(o, "attach", status);
	ffs_txn_done(t, o);
}

/* ---- detach, shutdown
 * ----------------------------------------------------------------------------------------------------- */

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

/* ---- branch
 * -------------------------------------------------------------------------------------------------------------
 */

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
	int r = ffs_named_take(req->named, CTL_TAKE_NS, ffs_txn_cancel(t), txn_wanted, t, &err);

	if (r < 0)
		ffs_txn_failed(t, -r, &err);
	else if (!req->wait)
		answer_branch(t, req->named);
	else
		answer_when_settled(t, req);
}

void ffs_request_run(struct ffs_txn *t)
{
	struct ffs_request *req = ffs_txn_request(t);

	switch (req->kind) {
	case FFS_REQ_ATTACH:
		run_attach(t, req);
		break;
	case FFS_REQ_DETACH:
		run_detach(t, req);
		break;
	case FFS_REQ_SHUTDOWN:
		run_shutdown(t);
		break;
	case FFS_REQ_BRANCH:
		run_branch(t, req);
		break;
	}
}
