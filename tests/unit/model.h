/* A model of the page state machine (engine/branch/pages.h) with everybody who works on it, small enough that
 * all interleavings can be tried: one cluster of one or two pages, a guest, the fault handler, a copier, a
 * reader, the thread that takes branches, who cancels one, the watchdog.
 *
 * It is the algorithm of pages.c, sweep.c, capture.c, copier.c, tracker.c, take.c and lineage.c, step by
 * step, with sequential consistency: a step is what no other thread can see the middle of. Pages have the
 * states of pages.h: clean, copying, captured, dirty. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define MODEL_PAGES 2
#define MODEL_BRANCHES 3

enum model_thread { GUEST, HANDLER, COPIER, READER, TAKER, CANCEL, WATCHDOG, MODEL_THREADS };

/* Ways to break it, each of which some interleaving must show. */
enum model_mutant {
	MUTANT_NONE,
	MUTANT_UNPROTECT_BEFORE_COPY, /* the handler lets the guest write, then copies */
	MUTANT_LATE_PAGE,             /* the handler lets the guest write and leaves the page to the copier */
	MUTANT_READER_NO_RECHECK,     /* a reader copies what it saw missing before it had the lock */
	MUTANT_CAPTURED_EARLY,        /* the need bit is cleared before the image has the bytes */
	MUTANT_SWEEP_RACE,            /* a sweep takes no lock */
	MUTANT_DIRTY_AFTER_LOOK,   /* who opens a page looks for branches first and marks its slice dirty then
				    */
	MUTANT_ONE_SWEEP,          /* the slot is filled with no sweep after it */
	MUTANT_SINCE_RESET_EARLY,  /* `since` begins anew with a branch that is not the heir */
	MUTANT_CANCEL_DROPS,       /* a branch that fails opens pages that another one needs */
	MUTANT_NO_REVOKED_CHECK,   /* what was copied counts although the watchdog let the guest go */
	MUTANT_RELEASE_KEEPS_BITS, /* memory is unregistered and its pages are not marked writable */
	MUTANT_OPEN_LOOK_FIRST, /* the copier looks for branches first and marks the slice it opens dirty then
				 */
	MUTANT_CLEAR_NO_WAIT,   /* a slot is emptied without waiting for those who work on its branch */
	MUTANT_COPIER_NOT_HELD, /* a copier begins with a branch that still inherits pages */
	MUTANTS
};
extern const char *const model_mutant_name[MUTANTS];

struct model_config {
	const char *name;
	unsigned pages, branches, writes; /* of the guest, in all */
	unsigned reads;                   /* of branches, by the reader */
	bool cancel, watchdog, track, vmstate_writes;
	enum model_mutant mutant;
};

struct model_result {
	uint64_t states, ends;
	const char *violation; /* NULL: none */
	char trace[8192];      /* of it: the steps that lead there */
};

/* Try everything. At most `limit` states: a violation "too many states" beyond. */
void model_explore(const struct model_config *config, uint64_t limit, struct model_result *out);
