/* The children of a pool: begun, handed out, ended, and what comes of it; and the guard, which has to know of them.
 *
 * The main thread, as all of the pool's state is its own; what takes time is begun here and done by threads (pool-work.c).
 * It takes pool->lock to take what is done. Nothing here waits, but for a thread that has said that it is through. */
#include <errno.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"
#include "pool.h"

/* ---- the guard ---- */

/* It has been killed, or does not listen: another one, which is told all that this one knew. */
void pool_renew_guard(struct pool *p)
{
	struct ffs_error err = {0};

	if (p->guard.pid > 0 && kill(p->guard.pid, SIGKILL) < 0 && errno != ESRCH)
		ffs_print_failure(
			p->self, &(struct ffs_error){errno, "the guard of the pool cannot be ended"});
	pool_guard_end(&p->guard);
	bool ok = pool_guard_start(&p->guard, &err) == 0 && pool_guard_socket(&p->guard, &p->name);

	for (unsigned i = 0; ok && i < p->book.max; i++) {
		const struct pool_child *c = &p->child[i];
		enum ffs_pool_state s = p->book.place[i].state;

		if (c->dir[0] && s != FFS_POOL_OUT && s != FFS_POOL_FREE)
			ok = pool_guard_child(&p->guard, c->dir,
				s == FFS_POOL_STARTING || s == FFS_POOL_ENDING ? -1 : c->vm.pidfd);
	}
	if (ok)
		return;
	/* without one nothing may be left idle */
	ffs_print_failure(p->self,
		err.code
			? &err
			: &(struct ffs_error){EPIPE, "the guard of the pool does not listen: it is drained"});
	pool_drain(p, false);
}

static void guard_child(struct pool *p, const struct pool_child *c, int pidfd)
{
	if (!pool_guard_child(&p->guard, c->dir, pidfd))
		pool_renew_guard(p);
}

static void unguard(struct pool *p, struct pool_child *c)
{
	if (c->dir[0] && !pool_guard_forget(&p->guard, c->dir)) {
		c->dir[0] = 0;
		pool_renew_guard(p);
	}
	c->dir[0] = 0;
}

/* ---- what is to be done ---- */

void pool_begin_child(struct pool *p, unsigned at)
{
	struct pool_child *c = &p->child[at];
	struct ffs_error err = {0};
	int watch = 0;

	*c = (struct pool_child){0};
	ffs_child_init(&c->vm, at + 1);
	if (ffs_child_make_dir(&c->vm, ffs_restore_dir(p->how), p->target->branch, &err) < 0) {
		ffs_print_failure(p->self, &err);
		ffs_child_release(&c->vm);
		ffs_pool_start_failed(&p->book, at, &err, ffs_now_ns());
		return;
	}
	snprintf(c->dir, sizeof(c->dir), "%s", c->vm.dir);
	guard_child(p, c, -1);
	while (p->watch_used[watch])
		watch++;
	p->watch_used[watch] = true;
	pool_job_run(p, (struct pool_job){.kind = POOL_JOB_START, .at = at, .watch = watch});
}

void pool_hand_out(struct pool *p, unsigned at, struct ffs_pool_waiter *w)
{
	struct pool_client *client = (struct pool_client *)w;

	p->child[at].client = client;
	client->at = (int)at;
	client->works = true;
	atomic_store(&client->order->state, POOL_OPEN);
	pool_job_run(
		p, (struct pool_job){
			   .kind = POOL_JOB_HAND, .at = at, .order = client->order, .asked_ns = w->asked_ns});
}

void pool_job_end(struct pool *p, unsigned at)
{
	pool_job_run(p, (struct pool_job){.kind = POOL_JOB_END, .at = at});
}

void pool_end_child(struct pool *p, unsigned at)
{
	ffs_pool_ending(&p->book, at, ffs_now_ns());
	pool_job_end(p, at);
}

/* ---- what is done ---- */

static void started(struct pool *p, struct pool_job *j)
{
	struct pool_child *c = &p->child[j->at];

	p->watch_used[j->watch] = false;
	if (j->result == 0) {
		guard_child(p, c, c->vm.pidfd);
		ffs_pool_started(&p->book, j->at, ffs_now_ns());
		return;
	}
	unguard(p, c);
	/* a failure without a reason is one too, or it would be tried again at once, for ever */
	if (!j->err.code)
		ffs_error_errno(&j->err, -j->result, "the VM was not started");
	if (p->closed)
		j->err.code = 0; /* we ended it */
	else
		ffs_print_failure(p->self, &j->err);
	ffs_pool_start_failed(&p->book, j->at, &j->err, ffs_now_ns());
}

/* Those of a branch that is gone are not handed out any more. */
static void mark_stale(struct pool *p, const struct pool_template *of)
{
	for (unsigned i = 0; i < p->book.max; i++)
		if (p->book.place[i].state == FFS_POOL_IDLE && p->child[i].of == of)
			p->book.place[i].stale = true;
}

static void offer(struct pool *p, struct pool_job *j, struct pool_client *client)
{
	struct json_object *o = json_tokener_parse(j->line);

	json_object_object_add(o, "id", json_object_new_uint64(p->book.place[j->at].id));
	json_object_object_add(
		o, "from", json_object_new_string(p->book.place[j->at].hit ? "pool" : "restored"));
	pool_client_offer(client, o);
}

static void handed(struct pool *p, struct pool_job *j)
{
	struct pool_child *c = &p->child[j->at];
	struct pool_client *client = c->client;
	bool wanted = !client->gone && !client->late;

	c->client = NULL;
	client->works = false;
	if (j->result == 0 && wanted) {
		c->client = client;
		offer(p, j, client);
		return;
	}
	client->at = -1;
	if (j->result == -ESTALE && !j->touched) {
		mark_stale(p, c->of);
		if (wanted)
			ffs_pool_was_stale(&p->book, j->at, ffs_now_ns());
		else
			ffs_pool_ending(&p->book, j->at, ffs_now_ns());
		pool_job_end(p, j->at);
		if (wanted)
			return;
	} else if (j->result < 0 && !j->touched) {
		ffs_pool_back(&p->book, j->at, ffs_now_ns());
	} else {
		pool_end_child(p, j->at);
	}
	if (client->gone)
		pool_client_free(client);
	else if (client->late)
		pool_client_refuse(client, ETIMEDOUT, "the child was not ready in time");
	else
		pool_client_refuse(client, j->err.code, "%s", j->err.text);
}

static void gone(struct pool *p, unsigned at)
{
	struct pool_child *c = &p->child[at];
	struct json_object *o;

	unguard(p, c);
	if (c->released_by) {
		o = json_object_new_object();
		json_object_object_add(o, "released", json_object_new_uint64(p->book.place[at].id));
		c->released_by->at = -1;
		pool_client_answer(c->released_by, o);
		p->book.released++;
	}
	*c = (struct pool_child){0};
	ffs_pool_gone(&p->book, at);
}

void pool_take_what_is_done(struct pool *p)
{
	struct pool_job *j, *next;
	eventfd_t n;

	/* nothing is there: it was taken the last time */
	if (eventfd_read(p->wake, &n) < 0 && errno != EAGAIN)
		return;
	pthread_mutex_lock(&p->lock);
	j = p->done;
	p->done = NULL;
	pthread_mutex_unlock(&p->lock);
	for (; j; j = next) {
		/* its place may be used for the next job at once */
		struct pool_job done = *j;

		next = j->next;
		if (done.threaded)
			pthread_join(done.thread, NULL);
		p->running--;
		if (done.kind == POOL_JOB_START)
			started(p, &done);
		else if (done.kind == POOL_JOB_HAND)
			handed(p, &done);
		else
			gone(p, done.at);
		free(done.line);
	}
}

/* ---- the ends of children ---- */

/* Its directory has what its user may want to read, until it is released, or so many others have ended. */
static void keep_ended(struct pool *p, unsigned at)
{
	struct pool_child *c = &p->child[at];

	if (p->n_ended == p->book.max) {
		ffs_child_destroy(&p->ended[0].vm);
		memmove(p->ended, p->ended + 1, --p->n_ended * sizeof(*p->ended));
	}
	p->ended[p->n_ended++] = (struct pool_ended){p->book.place[at].id, c->vm};
	ffs_close_fd(&p->ended[p->n_ended - 1].vm.pidfd);
	pool_template_put(c->of);
	*c = (struct pool_child){0};
	p->book.died++;
	ffs_pool_gone(&p->book, at);
}

void pool_child_ended(struct pool *p, unsigned at)
{
	struct pool_child *c = &p->child[at];
	struct ffs_error why = {0};
	int status;

	if (p->book.place[at].state == FFS_POOL_IDLE) {
		ffs_error_set(&why, ECHILD, "an idle child, process %d, has ended", (int)c->vm.pid);
		ffs_child_explain(&c->vm, -ECHILD, &why);
		ffs_print_failure(p->self, &why);
		ffs_pool_died(&p->book, at, &why, ffs_now_ns());
		pool_job_end(p, at);
		return;
	}
	if (c->vm.pid > 0 && waitpid(c->vm.pid, &status, WNOHANG) != c->vm.pid)
		return;
	c->vm.pid = 0;
	keep_ended(p, at);
}

bool pool_release(struct pool *p, uint64_t id, struct pool_client *c)
{
	int at = ffs_pool_find(&p->book, id);

	if (at >= 0 && p->book.place[at].state == FFS_POOL_OUT) {
		p->child[at].released_by = c;
		c->at = at;
		pool_end_child(p, (unsigned)at);
		return true;
	}
	for (unsigned i = 0; i < p->n_ended; i++)
		if (p->ended[i].id == id) {
			struct json_object *o = json_object_new_object();

			ffs_child_destroy(&p->ended[i].vm);
			memmove(p->ended + i, p->ended + i + 1, (--p->n_ended - i) * sizeof(*p->ended));
			json_object_object_add(o, "released", json_object_new_uint64(id));
			p->book.released++;
			pool_client_answer(c, o);
			return true;
		}
	return false;
}

void pool_taken(struct pool *p, unsigned at)
{
	unguard(p, &p->child[at]);
}

void pool_end_those_out(struct pool *p)
{
	for (unsigned i = 0; i < p->book.max; i++)
		if (p->book.place[i].state == FFS_POOL_OUT)
			pool_end_child(p, i);
}
