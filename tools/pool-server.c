/* The loop of a pool: it does what the bookkeeping says, until everything has come to its end.
 *
 * The main thread; the only one that looks at the bookkeeping. It waits in poll(2) and nowhere else. It takes pool->lock to
 * close the gate. */
#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"
#include "pool.h"

#define GOODBYE_NS 5000000000ull /* for the answers that are left at the end */

/* ---- what is to be done ---- */

static void refuse(struct pool *p, struct pool_client *c, uint64_t now)
{
	const struct ffs_pool_book *b = &p->book;

	if (b->draining)
		pool_client_refuse(c, ESHUTDOWN, "the pool is draining: it hands out nothing more");
	else
		pool_client_refuse(c, b->why.code,
			"the last %u restores failed, the next attempt is in %.1f s: %.380s", b->in_a_row,
			b->retry_ns > now ? (double)(b->retry_ns - now) / 1e9 : 0.0, b->why.text);
}

static void do_what_is_due(struct pool *p)
{
	for (;;) {
		uint64_t now = ffs_now_ns();
		struct ffs_pool_action a = ffs_pool_next(&p->book, now);
		struct pool_client *client = (struct pool_client *)a.waiter;

		switch (a.todo) {
		case FFS_POOL_NOTHING:
			return;
		case FFS_POOL_START:
			pool_begin_child(p, a.at);
			break;
		case FFS_POOL_HAND:
			pool_hand_out(p, a.at, a.waiter);
			break;
		case FFS_POOL_END:
			pool_job_end(p, a.at);
			break;
		case FFS_POOL_TIMEOUT:
			pool_client_refuse(client, ETIMEDOUT,
				"no child came free in time: %u of at most %u are out, %u wait",
				p->book.count[FFS_POOL_OUT] + p->book.count[FFS_POOL_HANDING], p->book.max,
				p->book.waiting);
			break;
		case FFS_POOL_REFUSE:
			refuse(p, client, now);
			break;
		}
	}
}

/* ---- the end ---- */

void pool_drain(struct pool *p, bool end_all)
{
	p->end_all |= end_all;
	p->book.draining = true;
	pthread_mutex_lock(&p->lock);
	p->closed = true;
	for (unsigned i = 0; i < p->book.max; i++)
		if (p->book.place[i].state == FFS_POOL_STARTING && !p->child[i].failed)
			ffs_child_kill(&p->child[i].vm);
	pthread_mutex_unlock(&p->lock);
}

bool pool_is_over(const struct pool *p)
{
	const struct ffs_pool_book *b = &p->book;

	return b->draining && !p->running && b->count[FFS_POOL_FREE] + b->count[FFS_POOL_OUT] == b->max &&
	       (!p->end_all || !b->count[FFS_POOL_OUT]);
}

static struct json_object *what_is_left(const struct pool *p)
{
	struct json_object *o = json_object_new_object(), *left = json_object_new_array();

	for (unsigned i = 0; i < p->book.max; i++) {
		struct json_object *c;

		if (p->book.place[i].state != FFS_POOL_OUT)
			continue;
		c = json_object_new_object();
		json_object_object_add(c, "id", json_object_new_uint64(p->book.place[i].id));
		json_object_object_add(c, "pid", json_object_new_int(p->child[i].vm.pid));
		json_object_object_add(c, "dir", json_object_new_string(p->child[i].vm.dir));
		json_object_array_add(left, c);
	}
	json_object_object_add(o, "drained", json_object_new_boolean(true));
	json_object_object_add(o, "left", left);
	return o;
}

/* Everything is gone but what is out; whoever asked for that is told now, and not waited for long. */
static void finish(struct pool *p)
{
	uint64_t deadline = ffs_now_ns() + GOODBYE_NS;
	struct json_object *left = what_is_left(p);

	for (unsigned i = 0; i < p->n_ended; i++)
		ffs_child_destroy(&p->ended[i].vm);
	p->n_ended = 0;
	for (unsigned i = 0; i < p->book.max; i++)
		if (p->book.place[i].state == FFS_POOL_OUT) {
			ffs_child_release(&p->child[i].vm);
			pool_template_put(p->child[i].of);
		}
	pool_unlisten(&p->name);
	if (!pool_guard_forget(&p->guard, p->name.path))
		ffs_print_failure(
			p->self, &(struct ffs_error){EPIPE, "the guard of the pool has ended before it"});
	pool_guard_end(&p->guard);
	for (unsigned i = p->n_clients; i-- > 0;) {
		if (p->client[i]->state == POOL_DRAINS)
			pool_client_answer(p->client[i], json_object_get(left));
		else if (p->client[i]->state != POOL_GOES)
			pool_client_free(p->client[i]);
	}
	json_object_put(left);
	while (p->n_clients && ffs_now_ns() < deadline) {
		struct pollfd fd = {.fd = p->client[0]->fd, .events = POLLOUT};

		if (poll(&fd, 1, ffs_ms_until(deadline)) >= 0)
			pool_client_ready(p->client[0], fd.revents);
	}
	while (p->n_clients)
		pool_client_free(p->client[0]);
}

/* ---- the loop ---- */

static uint64_t next_due(const struct pool *p)
{
	uint64_t now = ffs_now_ns(), due = ffs_pool_due(&p->book, now);

	if (p->accept_ns > now && p->accept_ns < due)
		due = p->accept_ns;
	for (unsigned i = 0; i < p->n_clients; i++)
		if (pool_client_due(p->client[i]) < due)
			due = pool_client_due(p->client[i]);
	return due;
}

static void take_signals(struct pool *p)
{
	struct signalfd_siginfo si;

	while (read(p->signals, &si, sizeof(si)) == sizeof(si))
		pool_drain(p, false);
}

static bool is_watched(const struct pool *p, unsigned at)
{
	enum ffs_pool_state s = p->book.place[at].state;

	return s == FFS_POOL_IDLE || s == FFS_POOL_OUT;
}

/* fd: room for all of them. */
static void wait_and_look(struct pool *p, struct pollfd *fd)
{
	struct pool_client *client[POOL_CLIENTS];
	unsigned n = p->n_clients, first = 4 + p->book.max;
	uint64_t due = next_due(p);

	fd[0] = (struct pollfd){.fd = p->signals, .events = POLLIN};
	fd[1] = (struct pollfd){.fd = p->wake, .events = POLLIN};
	fd[2] = (struct pollfd){.fd = p->guard.pidfd, .events = POLLIN};
	fd[3] = (struct pollfd){
		.fd = n < POOL_CLIENTS && ffs_now_ns() >= p->accept_ns ? p->name.listener : -1,
		.events = POLLIN};
	for (unsigned i = 0; i < p->book.max; i++)
		fd[4 + i] =
			(struct pollfd){.fd = is_watched(p, i) ? p->child[i].vm.pidfd : -1, .events = POLLIN};
	for (unsigned i = 0; i < n; i++) {
		client[i] = p->client[i];
		fd[first + i] = (struct pollfd){.fd = client[i]->fd, .events = pool_client_events(client[i])};
	}
	if (poll(fd, first + n, due == UINT64_MAX ? -1 : ffs_ms_until(due)) < 0)
		return;
	/* clients first: what else is done here may let one go */
	for (unsigned i = 0; i < n; i++)
		if (fd[first + i].revents)
			pool_client_ready(client[i], fd[first + i].revents);
	for (unsigned i = 0; i < p->book.max; i++)
		if (fd[4 + i].revents && is_watched(p, i))
			pool_child_ended(p, i);
	if (fd[0].revents)
		take_signals(p);
	if (fd[2].revents)
		pool_renew_guard(p);
	if (fd[1].revents)
		pool_take_what_is_done(p);
	if (fd[3].revents)
		pool_client_accept(p);
}

static void check_clients(struct pool *p)
{
	uint64_t now = ffs_now_ns();

	for (unsigned i = p->n_clients; i-- > 0;)
		pool_client_check(p->client[i], now);
}

int pool_serve(struct pool *p, struct ffs_error *err)
{
	_cleanup_free_ struct pollfd *fd = calloc(4 + p->book.max + POOL_CLIENTS, sizeof(*fd));

	if (!fd)
		return ffs_error_set(err, ENOMEM, "no memory for a pool");
	for (;;) {
		do_what_is_due(p);
		if (p->book.draining && p->end_all)
			pool_end_those_out(p);
		if (pool_is_over(p))
			break;
		wait_and_look(p, fd);
		check_clients(p);
	}
	finish(p);
	return 0;
}
