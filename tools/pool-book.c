/* The bookkeeping of a warm pool (pool-book.h). Pure; one thread, no locks. */
#include "pool-book.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int ffs_pool_book_init(struct ffs_pool_book *b, unsigned min, unsigned max, unsigned at_once, uint64_t ttl_ns)
{
	*b = (struct ffs_pool_book){.min = min, .max = max, .at_once = at_once, .ttl_ns = ttl_ns};
	b->place = calloc(max, sizeof(*b->place));
	b->count[FFS_POOL_FREE] = max;
	return b->place ? 0 : -ENOMEM;
}

void ffs_pool_book_free(struct ffs_pool_book *b)
{
	free(b->place);
	b->place = NULL;
}

static void move(struct ffs_pool_book *b, unsigned at, enum ffs_pool_state to, uint64_t now_ns)
{
	struct ffs_pool_place *p = &b->place[at];

	b->count[p->state]--;
	b->count[to]++;
	p->state = to;
	p->since_ns = now_ns;
	if (to != FFS_POOL_HANDING)
		p->waiter = NULL;
}

/* ---- the queue ---- */

int ffs_pool_ask(struct ffs_pool_book *b, struct ffs_pool_waiter *w, uint64_t now_ns, uint64_t deadline_ns)
{
	if (b->waiting >= FFS_POOL_WAITING)
		return -EAGAIN;
	*w = (struct ffs_pool_waiter){.asked_ns = now_ns, .deadline_ns = deadline_ns, .queued = true};
	if (b->last)
		b->last->next = w;
	else
		b->first = w;
	b->last = w;
	b->waiting++;
	return 0;
}

void ffs_pool_forget(struct ffs_pool_book *b, struct ffs_pool_waiter *w)
{
	struct ffs_pool_waiter **link = &b->first, *before = NULL;

	if (!w->queued)
		return;
	while (*link != w) {
		before = *link;
		link = &before->next;
	}
	*link = w->next;
	if (b->last == w)
		b->last = before;
	w->next = NULL;
	w->queued = false;
	b->waiting--;
}

static struct ffs_pool_waiter *pop(struct ffs_pool_book *b, struct ffs_pool_waiter *w)
{
	ffs_pool_forget(b, w);
	return w;
}

/* ---- what is to be done ---- */

static bool is_old(const struct ffs_pool_book *b, const struct ffs_pool_place *p, uint64_t now_ns)
{
	return b->ttl_ns && now_ns - p->since_ns >= b->ttl_ns;
}

/* The idle one that has waited longest; only: 1 those that are stale, 2 those that are old, 0 all that can be handed out. -1. */
static int oldest_idle(const struct ffs_pool_book *b, int only, uint64_t now_ns)
{
	int found = -1;

	for (unsigned i = 0; i < b->max && b->count[FFS_POOL_IDLE]; i++) {
		const struct ffs_pool_place *p = &b->place[i];

		if (p->state != FFS_POOL_IDLE || p->stale != (only == 1) ||
			(only == 2 && !is_old(b, p, now_ns)))
			continue;
		if (found < 0 || p->since_ns < b->place[found].since_ns)
			found = (int)i;
	}
	return found;
}

/* Idle ones that will do for a while. */
static unsigned fresh(const struct ffs_pool_book *b, uint64_t now_ns)
{
	unsigned n = 0;

	for (unsigned i = 0; i < b->max; i++)
		n += b->place[i].state == FFS_POOL_IDLE && !b->place[i].stale &&
		     !is_old(b, &b->place[i], now_ns);
	return n;
}

bool ffs_pool_backs_off(const struct ffs_pool_book *b, uint64_t now_ns)
{
	return b->in_a_row >= FFS_POOL_FAILURES && now_ns < b->retry_ns;
}

static bool may_start(const struct ffs_pool_book *b, uint64_t now_ns)
{
	/* while it fails, one at a time finds out whether it still does */
	unsigned most = b->in_a_row >= FFS_POOL_FAILURES ? 1 : b->at_once;

	return !b->draining && b->count[FFS_POOL_FREE] && b->count[FFS_POOL_STARTING] < most &&
	       !ffs_pool_backs_off(b, now_ns);
}

static struct ffs_pool_waiter *too_late(const struct ffs_pool_book *b, uint64_t now_ns)
{
	for (struct ffs_pool_waiter *w = b->first; w; w = w->next)
		if (now_ns >= w->deadline_ns)
			return w;
	return NULL;
}

static struct ffs_pool_action hand(struct ffs_pool_book *b, int at, uint64_t now_ns)
{
	struct ffs_pool_place *p = &b->place[at];
	struct ffs_pool_waiter *w = pop(b, b->first);

	p->hit = p->since_ns <= w->asked_ns;
	move(b, (unsigned)at, FFS_POOL_HANDING, now_ns);
	p->waiter = w;
	return (struct ffs_pool_action){FFS_POOL_HAND, (unsigned)at, w};
}

static struct ffs_pool_action end(struct ffs_pool_book *b, int at, uint64_t now_ns)
{
	move(b, (unsigned)at, FFS_POOL_ENDING, now_ns);
	return (struct ffs_pool_action){FFS_POOL_END, (unsigned)at, NULL};
}

static struct ffs_pool_action start(struct ffs_pool_book *b, uint64_t now_ns)
{
	unsigned at = 0;

	while (b->place[at].state != FFS_POOL_FREE)
		at++;
	b->place[at] = (struct ffs_pool_place){.id = ++b->last_id};
	move(b, at, FFS_POOL_STARTING, now_ns);
	if (b->max - b->count[FFS_POOL_FREE] > b->most)
		b->most = b->max - b->count[FFS_POOL_FREE];
	return (struct ffs_pool_action){FFS_POOL_START, at, NULL};
}

/* An old one goes when others are ready in its place, or when it keeps its replacement from being begun. */
static int to_expire(const struct ffs_pool_book *b, unsigned ready, uint64_t now_ns)
{
	int at = b->ttl_ns ? oldest_idle(b, 2, now_ns) : -1;
	bool in_the_way =
		!b->count[FFS_POOL_FREE] && !b->count[FFS_POOL_STARTING] && !b->count[FFS_POOL_ENDING];

	return at >= 0 && (ready >= b->min || in_the_way) ? at : -1;
}

struct ffs_pool_action ffs_pool_next(struct ffs_pool_book *b, uint64_t now_ns)
{
	struct ffs_pool_waiter *w = too_late(b, now_ns);
	unsigned ready;
	int at;

	at = oldest_idle(b, 1, now_ns);
	if (at >= 0)
		return end(b, at, now_ns);
	at = oldest_idle(b, 0, now_ns);
	if (b->draining && at >= 0)
		return end(b, at, now_ns);
	if (b->first && at >= 0)
		return hand(b, at, now_ns);
	if (w) {
		b->timed_out++;
		return (struct ffs_pool_action){FFS_POOL_TIMEOUT, 0, pop(b, w)};
	}
	if (b->first && (b->draining || ffs_pool_backs_off(b, now_ns))) {
		b->refused++;
		return (struct ffs_pool_action){FFS_POOL_REFUSE, 0, pop(b, b->first)};
	}
	ready = fresh(b, now_ns);
	at = to_expire(b, ready, now_ns);
	if (at >= 0) {
		b->expired++;
		return end(b, at, now_ns);
	}
	if (may_start(b, now_ns) && ready + b->count[FFS_POOL_STARTING] < b->min + b->waiting)
		return start(b, now_ns);
	return (struct ffs_pool_action){.todo = FFS_POOL_NOTHING};
}

uint64_t ffs_pool_due(const struct ffs_pool_book *b, uint64_t now_ns)
{
	uint64_t due = UINT64_MAX;

	for (const struct ffs_pool_waiter *w = b->first; w; w = w->next)
		if (w->deadline_ns < due)
			due = w->deadline_ns;
	if (ffs_pool_backs_off(b, now_ns) && b->retry_ns < due)
		due = b->retry_ns;
	for (unsigned i = 0; b->ttl_ns && i < b->max; i++) {
		uint64_t old = b->place[i].since_ns + b->ttl_ns;

		/* one that is old already waits for something that happens */
		if (b->place[i].state == FFS_POOL_IDLE && old > now_ns && old < due)
			due = old;
	}
	return due;
}

/* ---- what has happened ---- */

void ffs_pool_started(struct ffs_pool_book *b, unsigned at, uint64_t now_ns)
{
	/* one that is started, and ends, over and over is no success */
	b->in_a_row = b->deaths;
	move(b, at, FFS_POOL_IDLE, now_ns);
}

static void failed(struct ffs_pool_book *b, const struct ffs_error *why, uint64_t now_ns)
{
	uint64_t wait = FFS_POOL_BACKOFF_NS;

	b->why = *why;
	b->failures++;
	b->in_a_row++;
	for (unsigned i = FFS_POOL_FAILURES; i < b->in_a_row && wait < FFS_POOL_BACKOFF_MOST_NS; i++)
		wait *= 2;
	b->retry_ns = now_ns + (wait < FFS_POOL_BACKOFF_MOST_NS ? wait : FFS_POOL_BACKOFF_MOST_NS);
}

void ffs_pool_start_failed(struct ffs_pool_book *b, unsigned at, const struct ffs_error *why, uint64_t now_ns)
{
	ffs_pool_gone(b, at);
	if (why->code)
		failed(b, why, now_ns);
}

void ffs_pool_died(struct ffs_pool_book *b, unsigned at, const struct ffs_error *why, uint64_t now_ns)
{
	b->died++;
	if (now_ns - b->place[at].since_ns < FFS_POOL_YOUNG_NS) {
		b->deaths++;
		failed(b, why, now_ns);
	}
	move(b, at, FFS_POOL_ENDING, now_ns);
}

void ffs_pool_taken(struct ffs_pool_book *b, unsigned at, uint64_t now_ns)
{
	const struct ffs_pool_place *p = &b->place[at];
	struct ffs_pool_times *t = p->hit ? &b->hit : &b->miss;
	uint64_t took = now_ns - p->waiter->asked_ns;

	if (p->hit)
		b->hits++;
	else
		b->misses++;
	b->deaths = b->in_a_row = 0;
	t->ns[t->n++ % FFS_POOL_TIMES] = took;
	if (took > t->most)
		t->most = took;
	move(b, at, FFS_POOL_OUT, now_ns);
}

void ffs_pool_back(struct ffs_pool_book *b, unsigned at, uint64_t now_ns)
{
	b->returned++;
	move(b, at, FFS_POOL_IDLE, now_ns);
}

void ffs_pool_was_stale(struct ffs_pool_book *b, unsigned at, uint64_t now_ns)
{
	struct ffs_pool_waiter *w = b->place[at].waiter;

	move(b, at, FFS_POOL_ENDING, now_ns);
	w->next = b->first;
	w->queued = true;
	b->first = w;
	if (!b->last)
		b->last = w;
	b->waiting++;
}

void ffs_pool_ending(struct ffs_pool_book *b, unsigned at, uint64_t now_ns)
{
	move(b, at, FFS_POOL_ENDING, now_ns);
}

void ffs_pool_gone(struct ffs_pool_book *b, unsigned at)
{
	move(b, at, FFS_POOL_FREE, 0);
	b->place[at] = (struct ffs_pool_place){.state = FFS_POOL_FREE};
}

int ffs_pool_find(const struct ffs_pool_book *b, uint64_t id)
{
	for (unsigned i = 0; id && i < b->max; i++)
		if (b->place[i].id == id)
			return (int)i;
	return -1;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

uint64_t ffs_pool_median(const struct ffs_pool_times *t)
{
	uint64_t sorted[FFS_POOL_TIMES];
	size_t n = t->n < FFS_POOL_TIMES ? (size_t)t->n : FFS_POOL_TIMES;

	memcpy(sorted, t->ns, n * sizeof(*sorted));
	qsort(sorted, n, sizeof(*sorted), compare);
	return n ? sorted[n / 2] : 0;
}
