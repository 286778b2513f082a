/* Owns the job pool and the reaper's thread.
 *
 * Threads: submit and push from any. Locks: the pool's and the reaper's own, innermost, never held while work
 * runs. Signals are blocked in every thread made here: the main thread alone takes them. */
#include "work.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"

/* An idle thread beyond these ends after a while. */
#define POOL_KEEP 4
#define POOL_IDLE_S 10
#define REAPER_FDS 1024

struct queue {
	struct ffs_work *head, **tail;
};

static void queue_init(struct queue *q)
{
	q->head = NULL;
	q->tail = &q->head;
}

static void queue_put(struct queue *q, struct ffs_work *w)
{
	w->next = NULL;
	*q->tail = w;
	q->tail = &w->next;
}

static struct ffs_work *queue_get(struct queue *q)
{
	struct ffs_work *w = q->head;

	if (w) {
		q->head = w->next;
		if (!q->head)
			q->tail = &q->head;
		w->next = NULL;
	}
	return w;
}

int ffs_thread_start(pthread_t *thread, void *(*fn)(void *), void *arg)
{
	sigset_t all, old;

	ffs_signals_to_block(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int r = pthread_create(thread, NULL, fn, arg);

	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -r;
}

/* ---- pool ---- */

struct ffs_pool {
	pthread_mutex_t lock;
	pthread_cond_t work, ended;
	struct queue queue;
	unsigned max, threads, idle, queued;
	bool stopping;
};

/* Lock held. True: there is work; false: this thread should end. */
static bool wait_for_work(struct ffs_pool *p)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += POOL_IDLE_S;
	while (!p->queue.head) {
		if (p->stopping)
			return false;
		p->idle++;
		int r = pthread_cond_timedwait(&p->work, &p->lock, &until);

		p->idle--;
		if (r == ETIMEDOUT && !p->queue.head) {
			if (p->threads > POOL_KEEP)
				return false;
			clock_gettime(CLOCK_REALTIME, &until);
			until.tv_sec += POOL_IDLE_S;
		}
	}
	return true;
}

static void *pool_thread(void *arg)
{
	struct ffs_pool *p = arg;

	pthread_mutex_lock(&p->lock);
	while (wait_for_work(p)) {
		struct ffs_work *w = queue_get(&p->queue);

		p->queued--;
		pthread_mutex_unlock(&p->lock);
		w->fn(w);
		pthread_mutex_lock(&p->lock);
	}
	p->threads--;
	pthread_cond_signal(&p->ended);
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* Lock held. */
static int add_thread(struct ffs_pool *p)
{
	pthread_t thread;
	int r = ffs_thread_start(&thread, pool_thread, p);

	if (r < 0)
		return r;
	pthread_detach(thread);
	p->threads++;
	return 0;
}

struct ffs_pool *ffs_pool_new(unsigned max)
{
	struct ffs_pool *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	pthread_mutex_init(&p->lock, NULL);
	pthread_cond_init(&p->work, NULL);
	pthread_cond_init(&p->ended, NULL);
	queue_init(&p->queue);
	p->max = max;
	pthread_mutex_lock(&p->lock);
	int r = add_thread(p);

	pthread_mutex_unlock(&p->lock);
	if (r < 0) {
		free(p);
		return NULL;
	}
	return p;
}

void ffs_pool_submit(struct ffs_pool *p, struct ffs_work *w)
{
	pthread_mutex_lock(&p->lock);
	if (p->stopping && !p->threads) {
		pthread_mutex_unlock(&p->lock);
		return;
	}
	queue_put(&p->queue, w);
	p->queued++;
	/* a thread that can't be made is no failure: there is one, and it gets to the work later */
	if (p->queued > p->idle && p->threads < p->max && add_thread(p) < 0)
		ffs_log(FFS_LOG_WARN, "no thread for a job: it waits for one of the %u there are",
			p->threads);
	pthread_cond_signal(&p->work);
	pthread_mutex_unlock(&p->lock);
}

void ffs_pool_stop(struct ffs_pool *p)
{
	if (!p)
		return;
	pthread_mutex_lock(&p->lock);
	p->stopping = true;
	pthread_cond_broadcast(&p->work);
	while (p->threads)
		pthread_cond_wait(&p->ended, &p->lock);
	pthread_mutex_unlock(&p->lock);
}

/* ---- reaper ---- */

struct ffs_reaper {
	pthread_t thread;
	pthread_mutex_t lock;
	struct queue queue;
	struct ffs_reaper_ops ops;
	int event;
	bool stopping;
	struct pollfd polled[REAPER_FDS + 1];
	int fds[REAPER_FDS];
};

static bool run_queue(struct ffs_reaper *r)
{
	pthread_mutex_lock(&r->lock);
	for (struct ffs_work *w; (w = queue_get(&r->queue));) {
		pthread_mutex_unlock(&r->lock);
		w->fn(w);
		pthread_mutex_lock(&r->lock);
	}
	bool go_on = !r->stopping;

	pthread_mutex_unlock(&r->lock);
	return go_on;
}

static void *reaper_thread(void *arg)
{
	struct ffs_reaper *r = arg;

	while (run_queue(r)) {
		uint64_t deadline = r->ops.tick(r->ops.arg);
		unsigned n = r->ops.fds(r->ops.arg, r->fds, REAPER_FDS);
		eventfd_t count;

		r->polled[0] = (struct pollfd){.fd = r->event, .events = POLLIN};
		for (unsigned i = 0; i < n; i++)
			r->polled[i + 1] = (struct pollfd){.fd = r->fds[i], .events = POLLIN};
		if (poll(r->polled, n + 1, deadline ? ffs_ms_until(deadline) : -1) < 0 && errno != EINTR)
			ffs_log(FFS_LOG_ERROR, "completion thread: poll: errno %d", errno);
		if (r->polled[0].revents && eventfd_read(r->event, &count) < 0)
			continue;
	}
	return NULL;
}

struct ffs_reaper *ffs_reaper_new(const struct ffs_reaper_ops *ops)
{
	struct ffs_reaper *r = calloc(1, sizeof(*r));

	if (!r)
		return NULL;
	r->ops = *ops;
	r->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_init(&r->lock, NULL);
	queue_init(&r->queue);
	if (r->event < 0 || ffs_thread_start(&r->thread, reaper_thread, r) < 0) {
		if (r->event >= 0)
			close(r->event);
		free(r);
		return NULL;
	}
	return r;
}

static void wake(struct ffs_reaper *r)
{
	/* EAGAIN would mean that 2^64 wakes are pending: it is awake */
	if (eventfd_write(r->event, 1) < 0 && errno != EAGAIN)
		ffs_log(FFS_LOG_ERROR, "completion thread: eventfd: errno %d", errno);
}

void ffs_reaper_push(struct ffs_reaper *r, struct ffs_work *w)
{
	pthread_mutex_lock(&r->lock);
	if (w)
		queue_put(&r->queue, w);
	pthread_mutex_unlock(&r->lock);
	wake(r);
}

void ffs_reaper_stop(struct ffs_reaper *r)
{
	if (!r)
		return;
	pthread_mutex_lock(&r->lock);
	r->stopping = true;
	pthread_mutex_unlock(&r->lock);
	wake(r);
	pthread_join(r->thread, NULL);
}
