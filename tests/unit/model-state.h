/* What the parts of the model share. model.c explores, model-threads.c has who does what, model-copy.c what
 * several of them do: the kernel's part, copying, sweeping. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "model.h"

enum page_state { CLEAN, COPYING, CAPTURED, DIRTY };
enum branch_state { NOT_YET, WRITING, READY, FAILED };

struct branch {
	uint8_t state, taken; /* taken: its taker has returned, others know it */
	uint8_t slot, failed, done;
	uint8_t need, have; /* bits per page */
	uint8_t left;       /* pages not counted as captured yet: `remaining` */
	uint8_t image[MODEL_PAGES], truth[MODEL_PAGES];
};

/* No padding, no pointers: states are compared by their bytes. */
struct state {
	uint8_t mem[MODEL_PAGES];
	uint8_t protect, event; /* bits per page: write-protected; a fault is queued */
	uint8_t lock;           /* of the cluster: 1 + the thread */
	uint8_t writable, dirty, changed, since;
	uint8_t taking, paused, hold, registered, releasing, in_flight, revoked;
	int8_t parent, heir, base; /* base: of the branch being taken */
	uint8_t pc[MODEL_THREADS];
	uint8_t writes, waits;        /* of the guest: done; 1 + the page it waits for */
	uint8_t device, device_waits; /* the VMM has written in this pause; waits to */
	uint8_t h_page, h_needed;     /* the handler's */
	uint8_t buf[MODEL_THREADS][MODEL_PAGES], took[MODEL_THREADS]; /* a copy; the pages in it */
	uint8_t want[MODEL_THREADS]; /* bits: the branches that wanted it: their slots have it as a user */
	uint8_t cleared[MODEL_THREADS]
		       [MODEL_BRANCHES];  /* pages whose need bits it cleared, not counted yet */
	uint8_t void_copy[MODEL_THREADS]; /* the copy saw `revoked` */
	uint8_t c_branch, r_branch, r_page, reads;
	struct branch b[MODEL_BRANCHES];
};

struct explorer {
	const struct model_config *c;
	struct model_result *out;
	uint64_t *seen, mask;
	struct frame {
		struct state s;
		uint8_t next;
		char step[40];
	} * stack;
	unsigned depth, room;
	const char *wrong; /* found in the step just made */
	char step[40];
};

static inline void say(struct explorer *x, const char *what)
{
	snprintf(x->step, sizeof(x->step), "%s", what);
}

static inline uint8_t all_pages(const struct explorer *x)
{
	return (uint8_t)((1u << x->c->pages) - 1);
}

/* A step may find that the model is wrong: x->wrong. It says what it did: say(). */

/* ---- model-copy.c ---- */

void unprotect(struct state *s, uint8_t pages);
void unregister(struct state *s);
bool take_lock(struct explorer *x, struct state *s, enum model_thread t);
void unlock(struct explorer *x, struct state *s);
/* One step of a copy with the lock held, of COPY_PCS; `at`: the first's pc. `again`: needs are looked at under
 * the lock. */
#define COPY_PCS 5
void copy_step(struct explorer *x, struct state *s, enum model_thread t, uint8_t at, bool again);
/* One step of a sweep, whose pcs are SWEEP_PCS from `at`; beyond them it is over. */
#define SWEEP_PCS 5
bool sweep_step(struct explorer *x, struct state *s, enum model_thread t, uint8_t at);

/* ---- model-threads.c ---- */

#define CHOICES (MODEL_BRANCHES * MODEL_PAGES)
/* Step `number` of MODEL_THREADS * CHOICES, if it is possible. */
bool step(struct explorer *x, struct state *s, unsigned number);
