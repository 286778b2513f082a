/* Sweeps over all guest memory, slice by slice. A slice is 2 MiB, and protecting it takes some 30 µs: so long
 * does a guest's write to it wait at most.
 *
 * Threads: the one that takes the branch, and helpers that it starts for a long sweep of a running guest and
 * waits for. Each slice is swept by one of them. No locks but those of ffs_pages_sweep(). */
#include "branch/sweep.h"

#include <errno.h>
#include <sched.h>
#include <unistd.h>

#include "base/fault.h"

#define CONVERGED_PAGES                                                                                      \
	64u /* re-protecting these inside the pause costs less than another round does outside */
#define CONVERGE_ROUNDS 8u
#define SWEEPERS 4u
#define SLICES_PER_SWEEPER 64u /* some 2 ms of work are worth starting a thread for */
#define SLICES_AT_ONCE 32u     /* most are clean in a pause: then finding them out is all the work there is */

/* One pass, shared by those who do it. */
struct pass {
	const struct ffs_sweep *s;
	bool paused;
	_Atomic uint64_t next;
	_Atomic bool failed; /* somebody: the others need not go on */
};

struct sweeper {
	struct pass *pass;
	pthread_t thread;
	uint64_t swept;
	int result;
	struct ffs_error err;
};

int ffs_sweep_stop_asked(const struct ffs_sweep *s, struct ffs_error *err)
{
	if (ffs_cancel_is_set(s->cancel))
		return ffs_error_set(err, EINTR, "interrupted before the pause; the guest was not stopped");
	if (ffs_now_ns() >= s->deadline_ns)
		return ffs_error_set(err, EAGAIN,
			"%s could not be write-protected in time; the guest was not stopped: take the branch "
			"through %s/ctl, "
			"which waits longer",
			s->sandbox, s->sandbox);
	return 0;
}

static int sweep_slice(const struct ffs_sweep *s, bool paused, struct ffs_pages_region *r, uint64_t slice,
	uint64_t *swept, struct ffs_error *err)
{
	int e;

	while ((e = ffs_pages_sweep(r, s->t->uffd, slice, swept)) == -EAGAIN) {
		/* the VMM is unmapping something; over when our handler has read the event */
		if (ffs_now_ns() >= s->deadline_ns)
			return ffs_error_set(
				err, EAGAIN, "the VMM of %s kept changing its mappings", s->sandbox);
		sched_yield();
	}
	if (e == 0)
		e = FFS_FAULT("protect");
	if (e < 0 && ffs_tracker_revoked(s->t)) /* it has unregistered what we were to protect */
		return ffs_error_set(err, ETIMEDOUT, FFS_LET_GO, s->sandbox);
	if (e == -ENOENT)
		return ffs_error_set(err, EAGAIN,
			"the VMM of %s replaced guest memory while it was being write-protected: try again",
			s->sandbox);
	if (e < 0)
		return ffs_error_errno(err, -e, "cannot write-protect guest memory of %s", s->sandbox);
	if (paused)
		atomic_fetch_add_explicit(&s->t->wd->pause_beat, 1, memory_order_relaxed);
	else
		e = ffs_sweep_stop_asked(s, err);
	return e;
}

/* Some slices of a region, those that are dirty. */
static void sweep_some(struct sweeper *w, struct ffs_pages_region *r, uint64_t slice, uint64_t end)
{
	const struct pass *p = w->pass;

	for (; slice < end && w->result == 0 && !atomic_load(&p->failed); slice++)
		/* read after `taking`, or the slot, was set: pages.h */
		if (atomic_load(&r->dirty[slice]))
			w->result = sweep_slice(p->s, p->paused, r, slice, &w->swept, &w->err);
}

static void *sweep_main(void *arg)
{
	struct sweeper *w = arg;
	struct pass *p = w->pass;
	struct ffs_pages *pages = p->s->t->pages;
	uint64_t number, end;

	while (w->result == 0 && !atomic_load(&p->failed) &&
		(number = atomic_fetch_add_explicit(&p->next, SLICES_AT_ONCE, memory_order_relaxed)) <
			pages->n_slices) {
		end = number + SLICES_AT_ONCE < pages->n_slices ? number + SLICES_AT_ONCE : pages->n_slices;
		while (number < end) {
			unsigned region;
			uint64_t slice;

			ffs_pages_slice(pages, number, &region, &slice);
			struct ffs_pages_region *r = &pages->r[region];
			uint64_t n = r->n_slices - slice < end - number ? r->n_slices - slice : end - number;

			sweep_some(w, r, slice, slice + n);
			number += n;
		}
	}
	if (w->result < 0)
		atomic_store(&p->failed, true);
	return NULL;
}

/* How many threads a pass is worth. Half of the CPUs: the guest has its own use for the others, and where it
 * keeps them busy a pass that waits for a preempted helper takes longer than one alone, and more is dirtied
 * meanwhile. For the same reason only the first pass, which is long, has helpers. */
static unsigned sweepers_for(const struct ffs_pages *pages)
{
	uint64_t dirty = 0;
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned most = cpus / 2 < 1 ? 1 : cpus / 2 < (long)SWEEPERS ? (unsigned)(cpus / 2) : SWEEPERS;

	for (unsigned i = 0; i < pages->n; i++)
		for (uint64_t s = 0; s < pages->r[i].n_slices; s++)
			dirty += atomic_load_explicit(&pages->r[i].dirty[s], memory_order_relaxed);
	uint64_t worth = dirty / SLICES_PER_SWEEPER;

	return worth < 1 ? 1 : worth < most ? (unsigned)worth : most;
}

static int sweep(
	const struct ffs_sweep *s, bool paused, unsigned want, uint64_t *swept, struct ffs_error *err)
{
	struct pass pass = {.s = s, .paused = paused};
	struct sweeper w[SWEEPERS] = {0};
	unsigned n = 1;
	int e = 0;

	for (unsigned i = 0; i < want; i++)
		w[i].pass = &pass;
	while (n < want && pthread_create(&w[n].thread, NULL, sweep_main, &w[n]) == 0)
		n++; /* fewer are slower, nothing else */
	sweep_main(&w[0]);
	*swept = 0;
	for (unsigned i = 0; i < n; i++) {
		if (i > 0)
			pthread_join(w[i].thread, NULL);
		*swept += w[i].swept;
		if (w[i].result < 0 && e == 0)
			e = ffs_error_set(err, w[i].err.code, "%s", w[i].err.text);
	}
	return e;
}

int ffs_sweep(const struct ffs_sweep *s, bool paused, uint64_t *swept, struct ffs_error *err)
{
	return sweep(s, paused, 1, swept, err);
}

int ffs_sweep_prearm(const struct ffs_sweep *s, bool running, struct ffs_phases *ph, struct ffs_error *err)
{
	uint64_t start = ffs_now_ns(), swept, before;
	int e = sweep(s, false, sweepers_for(s->t->pages), &swept, err);

	ph->prearm_ns = ffs_now_ns() - start;
	start = ffs_now_ns();
	before = swept;
	for (unsigned round = 0; e == 0 && running && round < CONVERGE_ROUNDS; round++) {
		e = ffs_sweep(s, false, &swept, err);
		ph->converge_rounds = round + 1;
		if (swept <= CONVERGED_PAGES || swept > before / 4 * 3)
			break;
		before = swept;
	}
	ph->converge_ns = ffs_now_ns() - start;
	return e;
}
