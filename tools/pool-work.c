/* What takes time: to start a child, to hand one out, to end one; each in a thread of its own, as it waits for a VM.
 *
 * A thread has the child of its place and nothing else of the pool but what pool.h puts under a lock. It takes template_lock
 * (held while a template is made: the reading of a branch), then, nested or not, lock (held for the start of a process).
 * What waits, waits for the VM, and ends when the VM does, which is how the main thread ends a wait. */
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "pool.h"
#include "progress.h"

/* ---- templates ---- */

void pool_template_put(struct pool_template *t)
{
	if (!t || atomic_fetch_sub(&t->refs, 1) > 1)
		return;
	ffs_restore_end(&t->r);
	ffs_tree_close(&t->tree);
	free(t);
}

static int make_template(struct pool *p, struct pool_template **out, struct ffs_error *err)
{
	struct pool_template *t = calloc(1, sizeof(*t));
	int got;

	if (!t)
		return ffs_error_set(err, ENOMEM, "no memory for a pool");
	atomic_store(&t->refs, 1);
	t->tree = (struct ffs_tree)FFS_TREE_INIT;
	ffs_restore_init(&t->r, &t->tree, p->target, p->how);
	got = ffs_tree_open(&t->tree, p->how->mount, err);
	if (!got)
		got = ffs_restore_plan(&t->r, p->how, err);
	if (!got && t->r.conf.jailer)
		got = ffs_error_set(err, ENOTSUP,
			"a pool has no children in jails: should it be killed, nobody would know of the "
			"jails of those that are idle");
	/* of a branch that is whole the children outlive the daemon, and the next ones are as fast as the first */
	if (!got && t->r.writing)
		got = ffs_wait_branch(&t->tree, p->target, false, err);
	t->r.writing = false;
	if (!got)
		got = ffs_restore_begin(&t->r, p->how, err);
	if (got < 0)
		pool_template_put(t);
	else
		*out = t;
	return got;
}

struct pool_template *pool_template_get(struct pool *p, struct ffs_error *err)
{
	struct pool_template *t = NULL;

	pthread_mutex_lock(&p->template_lock);
	if (!p->template || atomic_load(&p->template->bad)) {
		if (make_template(p, &t, err) == 0) {
			pool_template_put(p->template);
			p->template = t;
		}
	} else {
		t = p->template;
	}
	if (t)
		atomic_fetch_add(&t->refs, 1);
	pthread_mutex_unlock(&p->template_lock);
	return t;
}

/* ---- a start ---- */

/* Loaded and stopped; or, where its agent is to be healthy, running and answering. */
static int start(struct pool_job *j)
{
	struct pool *p = j->pool;
	struct pool_child *c = &p->child[j->at];
	const struct ffs_restore_gate gate = {&p->lock, &p->closed};
	struct ffs_restore view;
	int got = FFS_FAULT("pool-start");

	if (got < 0)
		return ffs_error_errno(&j->err, -got, "pool-start");
	c->of = pool_template_get(p, &j->err);
	if (!c->of)
		return -j->err.code;
	view = c->of->r;
	view.began_ns = ffs_now_ns();
	view.paused = !view.healthy;
	c->vm.watch = &p->watch[j->watch];
	got = view.healthy ? ffs_restore_hooks_before(&view, &c->vm, &j->err) : 0;
	if (!got)
		got = ffs_restore_load(&view, &c->vm, &gate, &j->err);
	if (!got && view.healthy) {
		got = ffs_restore_run(&view, &c->vm, &j->err);
		if (!got)
			got = ffs_restore_await(&view, &c->vm, &j->err);
		c->runs = true;
	}
	ffs_restore_hooks_close(&view, &c->vm);
	if (got < 0)
		atomic_store(&c->of->bad, true);
	return got;
}

/* ---- handing out ---- */

/* A branch may have been removed, and another made in its place: then what is idle is not what is asked for. Where the tree
 * cannot be asked (its daemon has ended) the branch is as it was. */
static bool is_stale(const struct ffs_restore *r)
{
	struct json_object *status = NULL;
	struct ffs_error why = {0};
	char path[176];
	bool stale;

	snprintf(path, sizeof(path), "%s/branches/%s/status", r->target.sandbox, r->target.branch);
	if (ffs_tree_json(r->tree, path, &status, &why) < 0)
		return why.code == ENOENT;
	stale = strcmp(ffs_json_string(status, "id"), ffs_json_string(r->status, "id")) != 0;
	json_object_put(status);
	return stale;
}

/* What the child has to be told before it runs, or is told while it stands still. */
static int prepare(struct pool_job *j, struct ffs_restore *view, char epoch[40], struct ffs_error *err)
{
	struct pool_child *c = &j->pool->child[j->at];
	int got = 0;

	if (j->order->n_boxes && j->pool->target->fork[0])
		return ffs_error_set(err, EINVAL,
			"the pool is of fork %s, whose payloads its children have: for payloads of your own "
			"serve %s/%s",
			j->pool->target->fork, view->target.sandbox, view->target.branch);
	if (j->order->n_boxes && c->runs)
		return ffs_error_set(err, EINVAL,
			"the idle children of this pool run already (--healthy), so a payload would come too "
			"late: serve one without");
	if (j->order->n_boxes)
		got = pool_order_fork(view, j->order, epoch, err);
	else if (j->order->no_ack)
		view->ack.n = 0;
	if (!got && !c->runs)
		got = ffs_restore_hooks_before(view, &c->vm, err);
	return got;
}

static char *make_line(struct pool_job *j, struct ffs_restore *view, const char *epoch, uint64_t main_pid)
{
	struct pool_child *c = &j->pool->child[j->at];
	struct json_object *o, *main;
	char *text;

	/* the order's fork is gone */
	view->target = *j->pool->target;
	o = ffs_restore_line(view, &c->vm);
	json_object_object_add(o, "epoch", *epoch ? json_object_new_string(epoch) : NULL);
	if (j->order->main) {
		main = json_object_new_object();
		json_object_object_add(main, "pid", main_pid ? json_object_new_uint64(main_pid) : NULL);
		json_object_object_add(o, "main", main);
	}
	text = strdup(
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(o);
	return text;
}

static int go(struct pool_job *j, struct ffs_restore *view, uint64_t *main_pid)
{
	struct pool_child *c = &j->pool->child[j->at];
	int got = 0;

	if (!c->runs) {
		got = ffs_restore_run(view, &c->vm, &j->err);
		if (!got)
			got = ffs_restore_await(view, &c->vm, &j->err);
	}
	if (!got && j->order->main)
		got = pool_order_main(&c->vm, j->order, j->pool->how->ready_s, main_pid, &j->err);
	return got;
}

static int hand(struct pool_job *j)
{
	struct pool_child *c = &j->pool->child[j->at];
	struct ffs_restore view = c->of->r;
	int expected = POOL_OPEN, got;
	char epoch[40] = "";
	uint64_t main_pid = 0;

	if (is_stale(&c->of->r)) {
		atomic_store(&c->of->bad, true);
		return ffs_error_set(&j->err, ESTALE, "the branch is not there any more");
	}
	view.began_ns = j->asked_ns;
	view.paused = false;
	/* counted without a lock by whoever uses it, so it is not shared */
	view.notes = json_object_new_array();
	got = prepare(j, &view, epoch, &j->err);
	if (!got && !atomic_compare_exchange_strong(&j->order->state, &expected, POOL_BEGUN))
		got = ffs_error_set(&j->err, ECANCELED, "who asked has gone");
	if (!got) {
		j->touched = true;
		got = go(j, &view, &main_pid);
	}
	if (!got && !(j->line = make_line(j, &view, epoch, main_pid)))
		got = ffs_error_set(&j->err, ENOMEM, "no memory for an answer");
	ffs_restore_hooks_close(&view, &c->vm);
	if (view.page != c->of->r.page)
		free(view.page);
	json_object_put(view.notes);
	/* of its own fork: then the branch it was made of is another */
	return got == -ESTALE && !j->touched ? -ESTALE : got;
}

/* ---- an end ---- */

static void end(struct pool_child *c)
{
	if (c->of)
		c->of->r.ops->let_go(&c->of->r, &c->vm);
	ffs_child_destroy(&c->vm);
	pool_template_put(c->of);
	c->of = NULL;
}

/* While it is started the main thread may kill it, by the descriptor that this closes. */
static void end_failed(struct pool *p, struct pool_child *c)
{
	pthread_mutex_lock(&p->lock);
	c->failed = true;
	pthread_mutex_unlock(&p->lock);
	end(c);
}

/* ---- threads ---- */

static void work(struct pool_job *j)
{
	struct pool *p = j->pool;

	switch (j->kind) {
	case POOL_JOB_START:
		j->result = start(j);
		if (j->result < 0)
			end_failed(p, &p->child[j->at]);
		break;
	case POOL_JOB_HAND:
		j->result = hand(j);
		break;
	case POOL_JOB_END:
		end(&p->child[j->at]);
		break;
	}
	pthread_mutex_lock(&p->lock);
	j->next = p->done;
	p->done = j;
	pthread_mutex_unlock(&p->lock);
	/* fails only when the counter is full, and then it is readable */
	if (eventfd_write(p->wake, 1) < 0)
		return;
}

static void *thread_of(void *arg)
{
	work(arg);
	return NULL;
}

void pool_job_run(struct pool *p, struct pool_job job)
{
	struct pool_job *j = &p->child[job.at].job;

	*j = job;
	j->pool = p;
	j->threaded = true;
	p->running++;
	if (pthread_create(&j->thread, NULL, thread_of, j) == 0)
		return;
	j->threaded = false;
	work(j);
}
