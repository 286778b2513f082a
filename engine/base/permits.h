/* How many may do something at once, fair between owners: who waits is served round robin, one of each owner
 * in turn, and within an owner in the order of arrival. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct ffs_cancel;
struct ffs_permits;
struct ffs_permit_waiter;

/* One of those between whom it is fair. Embedded in what it stands for; zeroes to begin with. Under the
 * permits' lock.
 */
struct ffs_permit_owner {
	struct ffs_permit_waiter *first, *last;
	struct ffs_permit_owner *next; /* in the ring, while it has waiters */
};

/* One reference. NULL: no memory. limit 0: any number. */
struct ffs_permits *ffs_permits_new(unsigned limit);
struct ffs_permits *ffs_permits_ref(struct ffs_permits *p);
void ffs_permits_unref(struct ffs_permits *p);
/* For who asks from now on, and who waits. */
void ffs_permits_set_limit(struct ffs_permits *p, unsigned limit);

/* Wait for a permit until the deadline (ffs_now_ns). `name` is what ffs_permits_queue() shows, borrowed while
 * it waits; may be NULL. 0, -EAGAIN (deadline) or -EINTR (cancel, may be NULL): without a sentence, which the
 * caller knows better. */
int ffs_permits_take(struct ffs_permits *p, struct ffs_permit_owner *owner, const char *name,
	struct ffs_cancel *cancel, uint64_t deadline_ns);
void ffs_permits_give(struct ffs_permits *p);

/* Permits given out, and how many wait; either may be NULL. */
void ffs_permits_count(struct ffs_permits *p, unsigned *limit, unsigned *taken, unsigned *waiting);
/* For each that waits of one owner: its name (may be NULL) and its place in the whole queue, from 1. With the
 * lock held: fn must not come back. */
void ffs_permits_queue(struct ffs_permits *p, const struct ffs_permit_owner *owner,
	void (*fn)(void *arg, const char *name, unsigned place), void *arg);
