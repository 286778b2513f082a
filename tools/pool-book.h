/* The bookkeeping of a warm pool: who has which child, who waits, and what is to be done next. Pure logic over events and a
 * clock that the caller gives; one thread.
 *
 * A child takes one of `max` places from the moment it is begun until its process is gone: so never more than `max` exist. Who
 * asks waits in one queue, first come, first served. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

#define FFS_POOL_MAX 1024u    /* children of one pool */
#define FFS_POOL_WAITING 224u /* in the queue */
#define FFS_POOL_FAILURES 3u  /* restores in a row that fail: then it is no accident */
#define FFS_POOL_BACKOFF_NS 500000000ull
#define FFS_POOL_BACKOFF_MOST_NS 30000000000ull
#define FFS_POOL_YOUNG_NS 10000000000ull /* an idle one that ends sooner has just been started */
#define FFS_POOL_TIMES 256u              /* waits of which the median is made */

enum ffs_pool_state {
	FFS_POOL_FREE, /* no child in this place */
	FFS_POOL_STARTING,
	FFS_POOL_IDLE,
	FFS_POOL_HANDING, /* configured for who asked, who has not taken it yet */
	FFS_POOL_OUT,
	FFS_POOL_ENDING,
	FFS_POOL_STATES
};

/* Who asks; the caller's, and part of what it knows of them. */
struct ffs_pool_waiter {
	struct ffs_pool_waiter *next;
	uint64_t asked_ns, deadline_ns;
	bool queued;
};

struct ffs_pool_place {
	enum ffs_pool_state state;
	uint64_t id;                    /* of the child: never used again */
	uint64_t since_ns;              /* in this state */
	bool stale;                     /* of a branch that is not there any more */
	bool hit;                       /* it was idle when it was asked for */
	struct ffs_pool_waiter *waiter; /* HANDING */
};

struct ffs_pool_times {
	uint64_t ns[FFS_POOL_TIMES]; /* the last ones, in a ring */
	uint64_t n, most;
};

struct ffs_pool_book {
	unsigned min, max, at_once; /* idle ones kept ready; all; starting side by side */
	uint64_t ttl_ns;            /* of an idle one; 0: none */
	bool draining;
	struct ffs_pool_place *place; /* max of them */
	unsigned count[FFS_POOL_STATES];
	uint64_t last_id;
	struct ffs_pool_waiter *first, *last;
	unsigned waiting;
	unsigned in_a_row;    /* failures */
	unsigned deaths;      /* of idle ones that had just been started, since one was taken */
	uint64_t retry_ns;    /* nothing is begun before, when they are FFS_POOL_FAILURES */
	struct ffs_error why; /* of the last failure */
	unsigned most;        /* children at the same time, so far */
	uint64_t hits, misses, expired, failures, timed_out, refused, died, returned, released;
	struct ffs_pool_times hit, miss;
};

/* -ENOMEM. The numbers have been checked: min ≤ max, 1 ≤ max ≤ FFS_POOL_MAX. */
int ffs_pool_book_init(
	struct ffs_pool_book *b, unsigned min, unsigned max, unsigned at_once, uint64_t ttl_ns);
void ffs_pool_book_free(struct ffs_pool_book *b);

/* Somebody asks. -EAGAIN: no more can wait. */
int ffs_pool_ask(struct ffs_pool_book *b, struct ffs_pool_waiter *w, uint64_t now_ns, uint64_t deadline_ns);
/* They have gone; nothing when they do not wait any more. */
void ffs_pool_forget(struct ffs_pool_book *b, struct ffs_pool_waiter *w);

enum ffs_pool_todo {
	FFS_POOL_NOTHING,
	FFS_POOL_START,   /* a child in this place: STARTING */
	FFS_POOL_HAND,    /* this one to this waiter: HANDING */
	FFS_POOL_END,     /* this one: ENDING */
	FFS_POOL_TIMEOUT, /* tell the waiter: it came too late */
	FFS_POOL_REFUSE,  /* tell the waiter: b->why, or that the pool is draining */
};
struct ffs_pool_action {
	enum ffs_pool_todo todo;
	unsigned at;                    /* of the place */
	struct ffs_pool_waiter *waiter; /* not in the queue any more */
};
/* What is to be done next; it counts as begun. Asked again until there is nothing. */
struct ffs_pool_action ffs_pool_next(struct ffs_pool_book *b, uint64_t now_ns);
/* When there may be something again although nothing happens; UINT64_MAX: never. */
uint64_t ffs_pool_due(const struct ffs_pool_book *b, uint64_t now_ns);

/* ---- what has happened ---- */

/* STARTING → IDLE. */
void ffs_pool_started(struct ffs_pool_book *b, unsigned at, uint64_t now_ns);
/* STARTING: nothing came of it, and nothing is left. why->code is 0: it was ended on purpose. */
void ffs_pool_start_failed(
	struct ffs_pool_book *b, unsigned at, const struct ffs_error *why, uint64_t now_ns);
/* HANDING → OUT. */
void ffs_pool_taken(struct ffs_pool_book *b, unsigned at, uint64_t now_ns);
/* HANDING → IDLE: who asked has gone before anything was done for them. */
void ffs_pool_back(struct ffs_pool_book *b, unsigned at, uint64_t now_ns);
/* IDLE → ENDING: it has ended by itself. One that had just been started has failed, though late. */
void ffs_pool_died(struct ffs_pool_book *b, unsigned at, const struct ffs_error *why, uint64_t now_ns);
/* HANDING: its branch is not there any more. The child is to be ended, and who asked is the first to be served again. */
void ffs_pool_was_stale(struct ffs_pool_book *b, unsigned at, uint64_t now_ns);
/* Any state in which there is a process → ENDING. */
void ffs_pool_ending(struct ffs_pool_book *b, unsigned at, uint64_t now_ns);
/* Its process is gone: the place is free. */
void ffs_pool_gone(struct ffs_pool_book *b, unsigned at);
/* The place of a child; -1: none has that id. */
int ffs_pool_find(const struct ffs_pool_book *b, uint64_t id);
/* The median of the last waits; 0: none. */
uint64_t ffs_pool_median(const struct ffs_pool_times *t);
/* Is it one that fails, and waits before it tries again? */
bool ffs_pool_backs_off(const struct ffs_pool_book *b, uint64_t now_ns);
