/* Owns struct ffs_cancel: a flag, an eventfd for poll loops, and the condition its one waiter sleeps on.
 *
 * Threads: any. Locks: the waiter's mutex is taken before c->lock (ffs_cancel_wait) and never the other way
 * round: ffs_cancel_set() copies what to wake under c->lock, lets it go, then takes the waiter's mutex. So
 * that the waiter's condition cannot be destroyed in between, a waiter that was copied waits (in
 * ffs_cancel_wait) until the waker is done. */
#include "base/cancel.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "forkfs-engine.h"
#include "base/util.h"

struct ffs_cancel {
	atomic_uint refs;
	atomic_bool set;
	int event;
	pthread_mutex_t lock;
	pthread_cond_t waker_done;
	pthread_cond_t *cond; /* of the waiter, while it waits */
	pthread_mutex_t *mutex;
	unsigned wakers; /* threads between copying cond/mutex and having signalled it */
};

void ffs_cond_init(pthread_cond_t *cond)
{
	pthread_condattr_t attr;

	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(cond, &attr);
	pthread_condattr_destroy(&attr);
}

struct ffs_cancel *ffs_cancel_new(void)
{
	struct ffs_cancel *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (c->event < 0) {
		free(c);
		return NULL;
	}
	atomic_init(&c->refs, 1);
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->waker_done, NULL);
	return c;
}

struct ffs_cancel *ffs_cancel_ref(struct ffs_cancel *c)
{
	if (c)
		atomic_fetch_add_explicit(&c->refs, 1, memory_order_relaxed);
	return c;
}

void ffs_cancel_unref(struct ffs_cancel *c)
{
	if (!c || atomic_fetch_sub_explicit(&c->refs, 1, memory_order_acq_rel) != 1)
		return;
	pthread_cond_destroy(&c->waker_done);
	pthread_mutex_destroy(&c->lock);
	close(c->event);
	free(c);
}

void ffs_cancel_set(struct ffs_cancel *c)
{
	if (!c || atomic_exchange(&c->set, true))
		return;
	/* cannot fail: the counter is 0 and only this call, made once, adds to it */
	if (eventfd_write(c->event, 1) < 0)
		abort();
	pthread_mutex_lock(&c->lock);
	pthread_cond_t *cond = c->cond;
	pthread_mutex_t *mutex = c->mutex;

	if (!cond) {
		pthread_mutex_unlock(&c->lock);
		return;
	}
	c->wakers++;
	pthread_mutex_unlock(&c->lock);

	pthread_mutex_lock(mutex);
	pthread_cond_broadcast(cond);
	pthread_mutex_unlock(mutex);

	pthread_mutex_lock(&c->lock);
	c->wakers--;
	pthread_cond_broadcast(&c->waker_done);
	pthread_mutex_unlock(&c->lock);
}

bool ffs_cancel_is_set(struct ffs_cancel *c)
{
	return c && atomic_load(&c->set);
}

int ffs_cancel_fd(struct ffs_cancel *c)
{
	return c ? c->event : -1;
}

int ffs_cancel_wait(struct ffs_cancel *c, pthread_cond_t *cond, pthread_mutex_t *mutex, uint64_t deadline_ns)
{
	if (c) {
		pthread_mutex_lock(&c->lock);
		c->cond = cond;
		c->mutex = mutex;
		pthread_mutex_unlock(&c->lock);
	}
	int r = 0;

	/* looked at after registering: a set before it found no waiter, one after it broadcasts */
	if (ffs_cancel_is_set(c)) {
		r = -EINTR;
	} else if (deadline_ns) {
		struct timespec ts = {.tv_sec = (time_t)(deadline_ns / FFS_NS_PER_S),
			.tv_nsec = (long)(deadline_ns % FFS_NS_PER_S)};

		r = -pthread_cond_timedwait(cond, mutex, &ts);
	} else {
		pthread_cond_wait(cond, mutex);
	}
	if (c) {
		pthread_mutex_lock(&c->lock);
		c->cond = NULL;
		c->mutex = NULL;
		if (c->wakers) {
			/* the waker may be waiting for the very mutex we hold */
			pthread_mutex_unlock(&c->lock);
			pthread_mutex_unlock(mutex);
			pthread_mutex_lock(&c->lock);
			while (c->wakers)
				pthread_cond_wait(&c->waker_done, &c->lock);
			pthread_mutex_unlock(&c->lock);
			pthread_mutex_lock(mutex);
		} else {
			pthread_mutex_unlock(&c->lock);
		}
		if (ffs_cancel_is_set(c))
			return -EINTR;
	}
	return r;
}
