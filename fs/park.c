/* Owns parked requests and the tasks that run for them.
 *
 * Threads: handlers park, the pool and the reaper answer. The interrupt callback runs under libfuse's lock of
 * the request and therefore only queues work for the reaper. A claim (tree lock) decides who answers; before
 * answering, ffs_parked_req() takes the callback back, which waits for one that is running. */
#include "park.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nodes.h"

static void interrupted(struct ffs_work *w)
{
	struct ffs_parked *p = ffs_container(w, struct ffs_parked, interrupted);
	struct ffs_fs *fs = p->fs;

	pthread_mutex_lock(&fs->lock);
	bool mine = ffs_parked_claim(p);

	if (mine && p->gone)
		p->gone(p);
	pthread_mutex_unlock(&fs->lock);
	if (mine) {
		atomic_fetch_add(&fs->count.interrupted, 1);
		ffs_cancel_set(p->cancel);
		fuse_reply_err(ffs_parked_req(p), EINTR);
	}
	ffs_parked_unref(p);
}

static void on_interrupt(fuse_req_t req, void *data)
{
	struct ffs_parked *p = data;

	if (atomic_exchange(&p->interrupt_seen, true))
		return;
	ffs_parked_ref(p);
	ffs_reaper_push(p->fs->reaper, &p->interrupted);
}

struct ffs_parked *ffs_park(struct ffs_call *call, bool cancellable)
{
	struct ffs_parked *p = calloc(1, sizeof(*p));

	if (p && cancellable)
		p->cancel = ffs_cancel_new();
	if (!p || (cancellable && !p->cancel)) {
		free(p);
		fuse_reply_err(call->req, ENOMEM);
		return NULL;
	}
	p->fs = call->fs;
	p->req = call->req;
	p->who = call->who;
	atomic_init(&p->refs, 1);
	p->interrupted.fn = interrupted;
	fuse_req_interrupt_func(p->req, on_interrupt, p);
	return p;
}

struct ffs_parked *ffs_parked_ref(struct ffs_parked *p)
{
	atomic_fetch_add_explicit(&p->refs, 1, memory_order_relaxed);
	return p;
}

void ffs_parked_unref(struct ffs_parked *p)
{
	if (!p || atomic_fetch_sub_explicit(&p->refs, 1, memory_order_acq_rel) != 1)
		return;
	if (p->node || p->handle) {
		pthread_mutex_lock(&p->fs->lock);
		if (p->handle)
			ffs_handle_unref(p->fs, p->handle);
		if (p->node)
			ffs_node_unref(p->fs, p->node);
		pthread_mutex_unlock(&p->fs->lock);
	}
	ffs_cancel_unref(p->cancel);
	free(p);
}

bool ffs_parked_claim(struct ffs_parked *p)
{
	if (p->claimed)
		return false;
	p->claimed = true;
	if (ffs_list_linked(&p->link)) {
		ffs_list_del(&p->link);
		/* the list's reference: never the last, the claimer has one */
		atomic_fetch_sub_explicit(&p->refs, 1, memory_order_acq_rel);
	}
	return true;
}

bool ffs_parked_wait(struct ffs_parked *p, struct ffs_list *list)
{
	if (p->claimed)
		return false;
	ffs_parked_ref(p);
	ffs_list_add(list, &p->link);
	return true;
}

void ffs_parked_claim_all(struct ffs_list *list, struct ffs_list *out)
{
	for (struct ffs_list *e = list->next, *next; e != list; e = next) {
		next = e->next;
		ffs_container(e, struct ffs_parked, link)->claimed = true;
	}
	ffs_list_move(out, list);
}

fuse_req_t ffs_parked_req(struct ffs_parked *p)
{
	fuse_req_interrupt_func(p->req, NULL, NULL);
	return p->req;
}

void ffs_parked_fail(struct ffs_parked *p, uint64_t dir_ino, int code, const struct ffs_error *err)
{
	ffs_reply_failure(p->fs, ffs_parked_req(p), &p->who, dir_ino, code, err);
	ffs_parked_unref(p);
}

/* ---- tasks ---- */

struct ffs_task *ffs_task_new(struct ffs_call *call, bool cancellable)
{
	struct ffs_task *t = calloc(1, sizeof(*t));

	if (!t) {
		fuse_reply_err(call->req, ENOMEM);
		return NULL;
	}
	t->call = *call;
	t->p = ffs_park(call, cancellable);
	if (!t->p) {
		free(t);
		return NULL;
	}
	return t;
}

struct ffs_task *ffs_task_new_write(struct ffs_call *call, bool cancellable, struct ffs_node *node,
	struct ffs_handle *h, const char *buf, size_t size)
{
	struct ffs_task *t = ffs_task_new(call, cancellable);

	if (!t)
		return NULL;
	t->buf = malloc(size + 1);
	if (!t->buf) {
		if (ffs_task_claim(t))
			fuse_reply_err(ffs_parked_req(t->p), ENOMEM);
		ffs_task_drop(t);
		return NULL;
	}
	memcpy(t->buf, buf, size);
	t->buf[size] = '\0';
	t->size = size;
	pthread_mutex_lock(&call->fs->lock);
	t->node = ffs_node_ref(node);
	t->handle = ffs_handle_ref(h);
	pthread_mutex_unlock(&call->fs->lock);
	return t;
}

void ffs_task_answer_write(struct ffs_task *t, int r, const struct ffs_error *err)
{
	if (r < 0)
		ffs_reply_failure(
			t->call.fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node), -r, err);
	else
		fuse_reply_write(ffs_parked_req(t->p), t->size);
}

void ffs_task_drop(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;

	ffs_parked_unref(t->p);
	pthread_mutex_lock(&fs->lock);
	if (t->handle)
		ffs_handle_unref(fs, t->handle);
	if (t->node)
		ffs_node_unref(fs, t->node);
	if (t->node2)
		ffs_node_unref(fs, t->node2);
	pthread_mutex_unlock(&fs->lock);
	free(t->buf);
	free(t);
}

static void run_task(struct ffs_work *w)
{
	struct ffs_task *t = ffs_container(w, struct ffs_task, work);

	t->run(t);
	ffs_task_drop(t);
}

void ffs_task_start(struct ffs_task *t, void (*run)(struct ffs_task *t))
{
	t->run = run;
	t->work.fn = run_task;
	ffs_pool_submit(t->call.fs->pool, &t->work);
}

bool ffs_task_claim(struct ffs_task *t)
{
	pthread_mutex_lock(&t->call.fs->lock);
	bool mine = ffs_parked_claim(t->p);

	pthread_mutex_unlock(&t->call.fs->lock);
	return mine;
}
