/* Threads of the daemon besides the FUSE workers: a pool for what may take up to seconds (taking branches,
 * attaching, freeing images), and one completion thread, the reaper, for what must happen soon and outside of
 * every handler (answers to interrupted requests, poll notifications, ends of leases). */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* Embedded in what it is about, so that queueing never fails. Queued at most once at a time. */
struct ffs_work {
	void (*fn)(struct ffs_work *w);
	struct ffs_work *next;
};

struct ffs_pool;

/* Threads are made when all are busy, up to `max`; further work waits its turn. NULL: no memory or no thread.
 */
struct ffs_pool *ffs_pool_new(unsigned max);
void ffs_pool_submit(struct ffs_pool *pool, struct ffs_work *w);
/* Run what is queued and wait for all threads. What is submitted later is never run (the process is ending).
 */
void ffs_pool_stop(struct ffs_pool *pool);

/* A thread that takes no signals but those that a fault in it raises. 0 or -errno. */
int ffs_thread_start(pthread_t *thread, void *(*fn)(void *), void *arg);

struct ffs_reaper;

/* What the reaper asks after each wake: which more fds to poll (at most `max`, POLLIN), and when to come back
 * (ffs_now_ns deadline, 0: never) after dealing with what is due. Called on the reaper's thread. */
struct ffs_reaper_ops {
	unsigned (*fds)(void *arg, int *fds, unsigned max);
	uint64_t (*tick)(void *arg);
	void *arg;
};

struct ffs_reaper *ffs_reaper_new(const struct ffs_reaper_ops *ops);
/* Any thread, any lock held; allocates nothing. NULL work: wake it to look at its deadlines again. */
void ffs_reaper_push(struct ffs_reaper *r, struct ffs_work *w);
/* Run what is queued and end the thread. */
void ffs_reaper_stop(struct ffs_reaper *r);
