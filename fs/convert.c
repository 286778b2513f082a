/* Owns conversions of branches of the store: the new form is written beside the old one while that is served,
 * then the two change places, and so do the shots.
 *
 * Who has the branch open stays with the old shot, whose files were all opened before the old directory goes.
 *
 * Threads: a request's pool thread begins, a writer carries it out in its turn. Locks: fs->names, then the
 * tree lock; fs->names is held across the exchange of the two directories and never across a copy. */
#include "convert.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "durable.h"
#include "events.h"
#include "nodes.h"
#include "writers.h"

struct ffs_conversion {
	struct ffs_write write; /* its place among the writers, and its room */
	struct ffs_fs *fs;
	struct ffs_txn *txn;     /* referenced; its request has the branch */
	struct ffs_named *named; /* referenced */
	struct ffs_shot *old;    /* referenced */
	enum ffs_store_kind kind;
	char name[80]; /* as it was when it began */
	struct ffs_store_progress progress;
};

int ffs_convert_admit(struct ffs_named *n, struct ffs_error *err)
{
	const struct ffs_shot *s = n->shot;

	if (!s || s->state == FFS_BRANCH_WRITING)
		return ffs_error_set(err, EBUSY, "branch '%s' is just being %s: wait until it is ready",
			n->name, s ? "written" : "taken");
	if (s->state == FFS_BRANCH_FAILED)
		return ffs_error_set(err, EIO, "branch '%s' failed: there is nothing to convert", n->name);
	if (!s->stored)
		return ffs_error_set(err, EOPNOTSUPP,
			"branch '%s' is in memory only: only branches of the store are converted (export and "
			"import it)",
			n->name);
	if (n->conversion)
		return ffs_error_set(err, EBUSY, "branch '%s' is just being converted", n->name);
	return 0;
}

void ffs_convert_status(const struct ffs_named *n, struct json_object *o)
{
	const struct ffs_conversion *c = n->conversion;

	if (!c)
		return;
	json_object_object_add(o, "converting_to", json_object_new_string(ffs_store_kind_name(c->kind)));
	json_object_object_add(o, "converted_bytes", json_object_new_uint64(atomic_load(&c->progress.done)));
}

/* ---- the step ---- */

static int gate_enter(void *arg)
{
	struct ffs_conversion *c = arg;
	struct ffs_error why = {0};
	int r;

	pthread_mutex_lock(&c->fs->names);
	pthread_mutex_lock(&c->fs->lock);
	/* another branch may have got the name */
	r = c->named->shot == c->old && strcmp(c->named->name, c->name) == 0 ? 0 : -ENOENT;
	pthread_mutex_unlock(&c->fs->lock);
	if (!r)
		r = ffs_stored_hold(c->old->stored, &why);
	if (r < 0)
		pthread_mutex_unlock(&c->fs->names);
	return r;
}

/* fs->names is held. The branch is served from its new form from now on. */
static void swap(struct ffs_conversion *c)
{
	struct ffs_fs *fs = c->fs;
	struct ffs_named *n = c->named;
	struct ffs_stored *stored = NULL;
	struct ffs_shot *next = NULL;
	struct ffs_error why = {0};

	if (ffs_stored_open(fs->store, n->sbx->name, c->name, &stored, &why) < 0) {
		/* the old one's files are open: it goes on serving until the daemon ends */
		ffs_log(FFS_LOG_WARN, "%s/%s was converted, and is served in its old form: %s", n->sbx->name,
			c->name, why.text);
		return;
	}
	pthread_mutex_lock(&fs->lock);
	next = ffs_shot_of_store(c->old, stored);
	if (next) {
		n->kind = c->kind;
		next->kin = ffs_steal_ptr(&c->old->kin);
		ffs_shot_ref(next);
		ffs_shot_succeed(c->old, next);
		ffs_event(fs, "converted", n->sbx->name, n->name, ffs_shot_id(next), NULL);
	}
	pthread_mutex_unlock(&fs->lock);
	if (!next) {
		ffs_stored_unref(stored);
		return;
	}
	ffs_durable_move_kin(next);
	ffs_shot_unref(next);
}

static void gate_leave(void *arg, int result)
{
	struct ffs_conversion *c = arg;

	if (!result)
		swap(c);
	pthread_mutex_unlock(&c->fs->names);
}

/* ---- the job ---- */

static void answer(struct ffs_txn *t, const char *name, enum ffs_store_kind kind)
{
	struct json_object *o = json_object_new_object(), *body = json_object_new_object();

	json_object_object_add(body, "name", json_object_new_string(name));
	json_object_object_add(body, "store", json_object_new_string(ffs_store_kind_name(kind)));
	json_object_object_add(o, "convert", body);
	ffs_txn_done(t, o);
}

static void free_conversion(struct ffs_conversion *c)
{
	struct ffs_fs *fs = c->fs;

	ffs_write_end(&c->write);
	pthread_mutex_lock(&fs->lock);
	if (c->named->conversion == c)
		c->named->conversion = NULL;
	ffs_named_unref(c->named);
	ffs_txn_unref(c->txn);
	pthread_mutex_unlock(&fs->lock);
	ffs_shot_unref(c->old);
	ffs_durable_leave(fs);
	free(c);
}

static void run_write(struct ffs_write *w)
{
	struct ffs_conversion *c = ffs_container(w, struct ffs_conversion, write);
	struct ffs_publish_gate gate = {.enter = gate_enter, .leave = gate_leave, .arg = c};
	struct ffs_fs *fs = c->fs;
	struct ffs_error err = {0};
	uint64_t dir;
	int r = ffs_store_convert(
		fs->store, c->named->sbx->name, c->name, c->kind, &gate, &c->progress, &err);

	pthread_mutex_lock(&fs->lock);
	c->named->conversion = NULL;
	dir = ffs_branches_node(fs, c->named->sbx);
	pthread_mutex_unlock(&fs->lock);
	/* its files are found anew, of the sort that serves them best */
	if (r > 0)
		ffs_inval_name(fs, dir, c->name);
	if (r < 0)
		ffs_txn_failed(c->txn, -r, &err);
	else
		answer(c->txn, c->name, c->kind);
	free_conversion(c);
}

void ffs_convert_run(struct ffs_txn *t, struct ffs_request *req)
{
	struct ffs_conversion *c = calloc(1, sizeof(*c));
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct ffs_named *n = req->named;
	struct ffs_error err = {0};
	int r = c ? 0 : ffs_error_set(&err, ENOMEM, "no memory");

	if (!r) {
		*c = (struct ffs_conversion){.fs = fs, .named = n, .kind = req->store};
		c->progress.also = ffs_txn_cancel(t);
		pthread_mutex_lock(&fs->lock);
		r = ffs_convert_admit(n, &err);
		if (!r) {
			snprintf(c->name, sizeof(c->name), "%s", n->name);
			ffs_named_ref(n);
			c->txn = ffs_txn_ref(t);
			c->old = ffs_shot_ref(n->shot);
			n->conversion = c;
			fs->n_durable++;
		}
		pthread_mutex_unlock(&fs->lock);
		if (r < 0)
			free(c);
	}
	if (r < 0) {
		ffs_txn_failed(t, -r, &err);
		return;
	}
	r = ffs_write_begin(
		&c->write, n->sbx, n->memory_size >> (c->kind == FFS_STORE_PACKED), &c->progress.done, &err);
	if (r < 0) {
		ffs_txn_failed(t, -r, &err);
		free_conversion(c);
		return;
	}
	ffs_write_submit(&c->write, run_write);
}
