/* The inside of struct ffs_cancel (forkfs-engine.h): how a waiter of the engine sleeps so that a cancel wakes
 * it.
 *
 * Lock order: the waiter's mutex, then the cancel's own. ffs_cancel_set() takes the cancel's own mutex alone
 * to look up what to wake, and the waiter's mutex alone to wake it. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct ffs_cancel;

/* True once ffs_cancel_set() was called; false for NULL. */
bool ffs_cancel_is_set(struct ffs_cancel *c);

/* pthread_cond_timedwait on a condition with CLOCK_MONOTONIC (ffs_cond_init), mutex held, until signalled,
 * deadline_ns (0: none) or cancelled (c may be NULL): 0 (woken, maybe spuriously), -ETIMEDOUT, -EINTR. One
 * waiter per cancel object at a time. */
int ffs_cancel_wait(struct ffs_cancel *c, pthread_cond_t *cond, pthread_mutex_t *mutex, uint64_t deadline_ns);

/* A condition variable whose deadlines are ffs_now_ns() values. */
void ffs_cond_init(pthread_cond_t *cond);

/* An eventfd that is readable once the cancel is set, for poll(2) loops; owned by the cancel; -1 for NULL. */
int ffs_cancel_fd(struct ffs_cancel *c);
