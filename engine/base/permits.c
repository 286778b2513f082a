/* Owns the queue for permits.
 *
 * Threads: any. One lock, held for moments; who waits sleeps on a condition of its own, so that a permit
 * wakes the one whose turn it is and nobody else. */
#include "base/permits.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "base/cancel.h"
#include "base/util.h"

struct ffs_permit_waiter {
	const char *name;
	pthread_cond_t granted_now;
	bool granted;
	struct ffs_permit_waiter *next;
};

struct ffs_permits {
	atomic_uint refs;
	pthread_mutex_t lock; /* all below, and every owner */
	unsigned limit, taken, waiting;
	struct ffs_permit_owner *ring, *ring_last; /* owners with waiters, the next to be served first */
};

struct ffs_permits *ffs_permits_new(unsigned limit)
{
	struct ffs_permits *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	atomic_init(&p->refs, 1);
	pthread_mutex_init(&p->lock, NULL);
	p->limit = limit;
	return p;
}

struct ffs_permits *ffs_permits_ref(struct ffs_permits *p)
{
	atomic_fetch_add_explicit(&p->refs, 1, memory_order_relaxed);
	return p;
}

void ffs_permits_unref(struct ffs_permits *p)
{
	if (!p || atomic_fetch_sub_explicit(&p->refs, 1, memory_order_acq_rel) != 1)
		return;
	pthread_mutex_destroy(&p->lock);
	free(p);
}

/* ---- the ring; lock held ---- */

static void ring_append(struct ffs_permits *p, struct ffs_permit_owner *o)
{
	o->next = NULL;
	if (p->ring)
		p->ring_last->next = o;
	else
		p->ring = o;
	p->ring_last = o;
}

static void ring_remove(struct ffs_permits *p, struct ffs_permit_owner *o)
{
	struct ffs_permit_owner *before = NULL;

	for (struct ffs_permit_owner *i = p->ring; i != o; i = i->next)
		before = i;
	if (before)
		before->next = o->next;
	else
		p->ring = o->next;
	if (p->ring_last == o)
		p->ring_last = before;
	o->next = NULL;
}

static void enqueue(struct ffs_permits *p, struct ffs_permit_owner *o, struct ffs_permit_waiter *w)
{
	if (o->first)
		o->last->next = w;
	else
		o->first = w;
	o->last = w;
	if (o->first == w)
		ring_append(p, o);
	p->waiting++;
}

static void dequeue(struct ffs_permits *p, struct ffs_permit_owner *o, struct ffs_permit_waiter *w)
{
	struct ffs_permit_waiter *before = NULL;

	for (struct ffs_permit_waiter *i = o->first; i != w; i = i->next)
		before = i;
	if (before)
		before->next = w->next;
	else
		o->first = w->next;
	if (o->last == w)
		o->last = before;
	if (!o->first)
		ring_remove(p, o);
	p->waiting--;
}

static void grant(struct ffs_permits *p)
{
	while (p->ring && (!p->limit || p->taken < p->limit)) {
		struct ffs_permit_owner *o = p->ring;
		struct ffs_permit_waiter *w = o->first;

		dequeue(p, o, w);
		if (o->first) { /* its turn is over */
			ring_remove(p, o);
			ring_append(p, o);
		}
		p->taken++;
		w->granted = true;
		pthread_cond_signal(&w->granted_now);
	}
}

/* ---- taking and giving ---- */

void ffs_permits_set_limit(struct ffs_permits *p, unsigned limit)
{
	pthread_mutex_lock(&p->lock);
	p->limit = limit;
	grant(p);
	pthread_mutex_unlock(&p->lock);
}

int ffs_permits_take(struct ffs_permits *p, struct ffs_permit_owner *owner, const char *name,
	struct ffs_cancel *cancel, uint64_t deadline_ns)
{
	struct ffs_permit_waiter w = {.name = name};
	int r = 0;

	ffs_cond_init(&w.granted_now);
	pthread_mutex_lock(&p->lock);
	enqueue(p, owner, &w);
	grant(p);
	while (!w.granted && r == 0)
		r = ffs_cancel_wait(cancel, &w.granted_now, &p->lock, deadline_ns);
	if (!w.granted)
		dequeue(p, owner, &w);
	pthread_mutex_unlock(&p->lock);
	pthread_cond_destroy(&w.granted_now);
	return w.granted ? 0 : r == -EINTR ? -EINTR : -EAGAIN;
}

void ffs_permits_give(struct ffs_permits *p)
{
	pthread_mutex_lock(&p->lock);
	p->taken--;
	grant(p);
	pthread_mutex_unlock(&p->lock);
}

void ffs_permits_count(struct ffs_permits *p, unsigned *limit, unsigned *taken, unsigned *waiting)
{
	pthread_mutex_lock(&p->lock);
	if (limit)
		*limit = p->limit;
	if (taken)
		*taken = p->taken;
	if (waiting)
		*waiting = p->waiting;
	pthread_mutex_unlock(&p->lock);
}

static unsigned waiters(const struct ffs_permit_owner *o, unsigned at_most)
{
	unsigned n = 0;

	for (const struct ffs_permit_waiter *w = o->first; w && n < at_most; w = w->next)
		n++;
	return n;
}

/* How many are served before the number-th (from 0) of an owner, itself included: of those before it in the
 * ring one more than of those behind. */
static unsigned place_of(const struct ffs_permits *p, const struct ffs_permit_owner *owner, unsigned number)
{
	unsigned place = number + 1;
	bool before = true;

	for (const struct ffs_permit_owner *o = p->ring; o; o = o->next) {
		if (o == owner)
			before = false;
		else
			place += waiters(o, number + before);
	}
	return place;
}

void ffs_permits_queue(struct ffs_permits *p, const struct ffs_permit_owner *owner,
	void (*fn)(void *arg, const char *name, unsigned place), void *arg)
{
	unsigned number = 0;

	pthread_mutex_lock(&p->lock);
	for (const struct ffs_permit_waiter *w = owner->first; w; w = w->next)
		fn(arg, w->name, place_of(p, owner, number++));
	pthread_mutex_unlock(&p->lock);
}
