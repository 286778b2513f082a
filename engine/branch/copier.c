/* Owns the copier threads of a tracker: they fill the images of the branches in flight, settle them, and let
 * the guest's memory go when no branch needs it any more.
 *
 * Locks: t->lock for the queue; never held while copying or in an ioctl. The locks of a few clusters while
 * they are copied, a slice's locks while it is made writable again. A copier never waits for the fault
 * handler. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "base/fault.h"
#include "base/log.h"
#include "branch/internal.h"
#include "uffd/uffd.h"

/* A branch with a rate that fails while it waits for its time is settled after this long at the latest. */
#define THROTTLE_NS (100 * FFS_NS_PER_MS)

/* Unregistering holds the VMM's mmap lock for writing; in pieces of this size a guest fault never waits long
 * for it. */
#define RELEASE_BYTES (16ull << 20)

/* ---- registration ---- */

int ffs_tracker_register(struct ffs_tracker *t, struct ffs_error *err)
{
	int e = 0;

	pthread_mutex_lock(&t->lock);
	while (t->releasing) /* sees `taking` and stops within one piece */
		pthread_cond_wait(&t->changed, &t->lock);
	bool done = t->registered;

	t->touched = true;
	/* under the lock, and after a release that cleared it: the watchdog must not sleep through a branch
	 */
	atomic_store(&t->wd->active, 1);
	pthread_mutex_unlock(&t->lock);
	ffs_watchdog_poke(t->watchdog);
	if (done)
		return 0;
	e = FFS_FAULT("register");
	if (e < 0)
		return ffs_error_errno(err, -e, "cannot register guest memory");
	for (unsigned i = 0; i < t->geo.n_regions && e == 0; i++) {
		e = ffs_uffd_register(t->uffd, t->geo.regions[i].hva, t->geo.regions[i].size, err);
		if (e < 0)
			ffs_error_prefix(err, "guest memory region %s", t->geo.regions[i].name);
	}
	if (e == 0) {
		pthread_mutex_lock(&t->lock);
		t->registered = true;
		pthread_mutex_unlock(&t->lock);
	}
	return e;
}

/* Under t->lock. Tracking keeps what is whole; what the watchdog let go, or a failed registration left
 * behind, is of no use to it. */
static bool release_wanted(struct ffs_tracker *t)
{
	if (t->in_flight != 0)
		return false;
	return t->ending ||
	       (!atomic_load(&t->taking) && (!t->track || !t->registered || ffs_tracker_revoked(t)));
}

void ffs_tracker_release_idle(struct ffs_tracker *t)
{
	pthread_mutex_lock(&t->lock);
	if (!t->touched || t->releasing || !release_wanted(t)) {
		pthread_mutex_unlock(&t->lock);
		return;
	}
	t->releasing = true;
	t->registered = false;
	bool go = true;
	int failure = 0;

	for (unsigned i = 0; i < t->pages->n && go; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];
		uint64_t piece = r->slice_bytes > RELEASE_BYTES ? r->slice_bytes : RELEASE_BYTES;

		for (uint64_t off = 0; off < r->size && go; off += piece) {
			uint64_t len = r->size - off < piece ? r->size - off : piece;

			pthread_mutex_unlock(&t->lock);
			/* no branch in flight and none being taken: writable is what they are about to be,
			 * and a fault that is served in between finds it so and wakes */
			for (uint64_t s = off / r->slice_bytes; s * r->slice_bytes < off + len; s++)
				ffs_pages_mark_writable(r, s);
			int e = ffs_uffd_unregister(t->uffd, r->hva + off, len);

			pthread_mutex_lock(&t->lock);
			if (e < 0)
				failure = e;
			go = release_wanted(t);
		}
	}
	t->releasing = false;
	/* of a VMM that exits the kernel says ESRCH or ENOMEM, and nothing is left to release */
	if (failure && ffs_proc_alive(t->proc))
		ffs_log(FFS_LOG_WARN, "cannot unregister guest memory of process %d: %s", (int)t->proc.pid,
			strerror(-failure));
	/* what could not be released may still be protected: faults, and the watchdog, for as long */
	if (go && !(failure && ffs_proc_alive(t->proc))) {
		t->touched = false;
		atomic_store(&t->wd->active, 0);
	}
	pthread_cond_broadcast(&t->changed);
	pthread_mutex_unlock(&t->lock);
}

/* ---- copying ---- */

/* Give a slice back to the guest once nobody needs a page of it: one ioctl instead of up to 32 faults. Not
 * while a take is sweeping (it would have to protect the pages again), and not with tracking, which wants
 * them protected. */
static void open_slice(struct ffs_tracker *t, unsigned region, uint64_t slice)
{
	struct ffs_pages_region *r = &t->pages->r[region];
	uint64_t first = slice * r->clusters_per_slice, end = first + r->clusters_per_slice;
	bool needed = false;

	if (t->track || atomic_load(&t->taking) || ffs_tracker_revoked(t))
		return;
	if (end > r->n_clusters)
		end = r->n_clusters;
	ffs_slice_lock(r, slice);
	/* Before the branches are looked at (pages.h): a whole take may go by while this thread is preempted.
	 * It either finds the slice dirty, and its sweep waits for these locks, or has filled its slot before
	 * we look. */
	atomic_store(&r->dirty[slice], 1);
	for (unsigned i = 0; i < FFS_SLOTS && !needed; i++) {
		struct ffs_branch *b = ffs_slot_get(&t->slots[i]);

		if (!b)
			continue;
		for (uint64_t c = first; c < end && !needed; c++)
			needed = atomic_load_explicit(&b->need[region][c], memory_order_relaxed) != 0;
		ffs_slot_put(&t->slots[i]);
	}
	if (FFS_FAULT("open-slice") < 0)
		needed = true;
	if (!needed && !atomic_load(&t->taking)) {
		int e = ffs_pages_release_locked(r, t->uffd, slice);

		if (e < 0 && e != -EAGAIN && e != -ESRCH && e != -ENOENT)
			ffs_log(FFS_LOG_WARN, "cannot release a slice of guest memory of process %d: %s",
				(int)t->proc.pid, strerror(-e));
	}
	ffs_slice_unlock(r, slice);
}

/* While a branch of this VM is being taken between pause and resume the VMM's threads want the CPUs. */
static void wait_out_pause(struct ffs_tracker *t)
{
	pthread_mutex_lock(&t->lock);
	while (atomic_load(&t->hold) && !t->ending)
		pthread_cond_wait(&t->work, &t->lock);
	pthread_mutex_unlock(&t->lock);
}

void ffs_copier_hold(struct ffs_tracker *t, bool on)
{
	pthread_mutex_lock(&t->lock);
	atomic_store(&t->hold, on);
	if (!on)
		pthread_cond_broadcast(&t->work);
	pthread_mutex_unlock(&t->lock);
}

void ffs_copier_poke(struct ffs_tracker *t)
{
	pthread_mutex_lock(&t->lock);
	pthread_cond_broadcast(&t->work);
	pthread_mutex_unlock(&t->lock);
}

/* Is a large page of the image worth making for a slice? Not when faults have captured part of it in small
 * ones, and not where guest memory is empty, of which samples tell: zero pages become holes again, but that
 * costs more than it gained. */
static bool wants_large(
	struct ffs_tracker *t, struct ffs_branch *b, unsigned region, uint64_t slice, char *buf)
{
	const struct ffs_pages_region *r = &t->pages->r[region];
	uint64_t first = slice * r->clusters_per_slice;
	unsigned empty = 0;

	if (r->slice_bytes != FFS_IMAGE_LARGE || r->clusters_per_slice == 1 ||
		first + r->clusters_per_slice > r->n_clusters)
		return false;
	for (uint64_t c = first; c < first + r->clusters_per_slice; c++) {
		bool zero = false;

		if (atomic_load_explicit(&b->need[region][c], memory_order_relaxed) != ffs_pages_mask(r, c))
			return false;
		if ((c - first) % r->clusters_per_copy)
			continue;
		if (ffs_memory_read(t->memory, region, c * r->cluster_bytes, buf, r->page_size, &zero) < 0)
			return false; /* capturing it will say why */
		empty += zero || ffs_is_zero(buf, r->page_size);
	}
	return empty <= r->clusters_per_slice / r->clusters_per_copy / 4;
}

/* With the locks of the slice, so that nobody writes into it meanwhile: where a fault captures into its
 * middle between the look and the making, the kernel fills the gaps with folios of all sizes. A fault that
 * comes just then waits for it, and lends its priority. */
static bool make_large(
	struct ffs_tracker *t, struct ffs_branch *b, unsigned region, uint64_t slice, char *buf)
{
	struct ffs_pages_region *r = &t->pages->r[region];

	ffs_slice_lock(r, slice);
	bool large = wants_large(t, b, region, slice, buf) &&
		     ffs_image_populate(&b->image, r->offset + slice * r->slice_bytes);

	ffs_slice_unlock(r, slice);
	return large;
}

static void copy_slice(struct ffs_tracker *t, struct ffs_branch *b, uint64_t number, void *buf)
{
	unsigned region;
	uint64_t slice;

	ffs_pages_slice(t->pages, number, &region, &slice);
	struct ffs_pages_region *r = &t->pages->r[region];
	uint64_t end = (slice + 1) * r->clusters_per_slice;

	if (end > r->n_clusters)
		end = r->n_clusters;
	uint64_t c = slice * r->clusters_per_slice;
	unsigned n;
	uint64_t at = r->offset + slice * r->slice_bytes;
	bool large = make_large(t, b, region, slice, buf);

	for (; !ffs_branch_failed(b) && (n = ffs_tracker_needed(t, b, region, &c, end)) > 0; c += n) {
		if (atomic_load_explicit(&t->hold, memory_order_relaxed))
			wait_out_pause(t);
		/* in large pages many clusters take little longer than one; else the handler would wait */
		if (!large)
			n = 1;
		ffs_tracker_capture(t, region, c, n, buf);
	}
	if (large && !ffs_branch_failed(b) &&
		atomic_load_explicit(&b->zeros[region][slice], memory_order_relaxed)) {
		int e = ffs_image_trim(&b->image, at, buf);

		if (e < 0)
			ffs_branch_fail(b, -e, "cannot trim the image of a branch of %s", b->sandbox);
	}
	if (!ffs_branch_failed(b))
		open_slice(t, region, slice);
}

/* ---- settling ---- */

/* What must not happen, with what it takes to find out why: whether pages were passed over, and where, or only
 * counted wrongly. */
static int not_captured(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_error *err)
{
	uint64_t needed = 0, first = 0, last = 0, remaining = atomic_load(&b->remaining);

	for (unsigned i = 0; i < t->pages->n; i++) {
		const struct ffs_pages_region *r = &t->pages->r[i];

		for (uint64_t c = 0; c < r->n_clusters; c++) {
			ffs_mask m = atomic_load(&b->need[i][c]);

			if (!m)
				continue;
			last = r->offset + c * r->cluster_bytes;
			first = needed ? first : last;
			needed += (unsigned)__builtin_popcount(m) * r->page_size;
		}
	}
	return ffs_error_set(err, EIO,
		"%llu bytes were not captured (%llu are still needed, in clusters from %#llx to %#llx; %llu "
		"of "
		"%llu slices are done)",
		(unsigned long long)remaining, (unsigned long long)needed, (unsigned long long)first,
		(unsigned long long)last, (unsigned long long)atomic_load(&b->slices_done),
		(unsigned long long)t->pages->n_slices);
}

/* Everything is in the image, or the branch failed: once per branch, by the copier that got there first. */
static void finish(struct ffs_tracker *t, struct ffs_branch *b)
{
	struct ffs_error err = {0};
	int e;

	/* what is discarded must be known before we call anything captured */
	if (!ffs_branch_failed(b))
		ffs_tracker_fence(t);
	ffs_slot_clear(&t->slots[b->slot]);
	if (!ffs_branch_failed(b)) {
		e = FFS_FAULT("settle");
		if (e < 0)
			ffs_error_errno(&err, -e, "cannot settle");
		/* a mapping that was replaced while we copied lost its protection without an event */
		if (e == 0 && !atomic_load(&t->gone))
			e = ffs_memory_check(t->memory, &err);
		if (e == -ESRCH)
			e = 0; /* it exited: every page was captured before or came from memory that nobody
				  writes any more */
		/* also with everything captured: what the watchdog read off the queue we do not know */
		if (e == 0 && ffs_tracker_revoked(t))
			e = ffs_error_set(&err, ETIMEDOUT, "revoked by the watchdog");
		if (e == 0 && atomic_load(&b->remaining) != 0)
			e = not_captured(t, b, &err);
		if (e == 0)
			e = ffs_image_seal(&b->image, &err);
		if (e < 0)
			ffs_branch_fail(b, -e, "branch of %s: %s", b->sandbox, err.text);
	}
	pthread_mutex_lock(&t->lock);
	t->slots[b->slot].reserved = false;
	t->in_flight--;
	pthread_cond_broadcast(&t->changed);
	pthread_mutex_unlock(&t->lock);

	bool failed = ffs_branch_failed(b);

	if (failed) {
		struct ffs_error why = {0};

		ffs_branch_failure(b, &why);
		ffs_log(why.code == ECANCELED ? FFS_LOG_INFO : FFS_LOG_WARN, "branch %s of %s failed: %s",
			b->name[0] ? b->name : b->id, b->sandbox, why.text);
	}
	ffs_branch_settle(b, failed ? FFS_BRANCH_FAILED : FFS_BRANCH_READY);
	ffs_branch_put(b); /* the slot's reference */
	ffs_tracker_release_idle(t);
}

/* So many bytes went from the guest to the images: the branch with a rate pauses for as long as they should
 * have taken. */
static void pay(struct ffs_tracker *t, struct ffs_branch *b, uint64_t bytes)
{
	uint64_t now = ffs_now_ns();

	if (!b->max_rate || !bytes)
		return;
	pthread_mutex_lock(&t->lock);
	if (b->next_copy_ns < now)
		b->next_copy_ns = now;
	b->next_copy_ns += (uint64_t)((double)bytes / (double)b->max_rate * (double)FFS_NS_PER_S);
	pthread_mutex_unlock(&t->lock);
}

/* The next branch that has something to do for a copier, pinned with a reference; under t->lock. Without one
 * *later_ns is when to look again: 0 when somebody says so. */
static struct ffs_branch *next_work(struct ffs_tracker *t, uint64_t *later_ns)
{
	struct ffs_branch *oldest = NULL;
	uint64_t now = ffs_now_ns();

	*later_ns = 0;

	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		struct ffs_branch *b = ffs_slot_get(&t->slots[i]);

		if (!b)
			continue;
		bool failed = ffs_branch_failed(b);
		bool work = failed || atomic_load(&b->next_slice) < t->pages->n_slices;

		if (work && !failed && b->next_copy_ns > now) {
			uint64_t at =
				b->next_copy_ns < now + THROTTLE_NS ? b->next_copy_ns : now + THROTTLE_NS;

			if (!*later_ns || at < *later_ns)
				*later_ns = at;
			work = false;
		}
		if (work && !atomic_load(&b->finalising) && (!oldest || b->armed_ns < oldest->armed_ns)) {
			ffs_branch_get(b);
			if (oldest)
				ffs_branch_put(oldest); /* its slot holds another reference */
			oldest = b;
		}
		ffs_slot_put(&t->slots[i]);
	}
	return oldest;
}

/* The tracker is being ended: nothing may stay in flight, since the protection goes next. */
static void fail_all(struct ffs_tracker *t)
{
	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		struct ffs_branch *b = ffs_slot_get(&t->slots[i]);

		if (!b)
			continue;
		ffs_branch_fail(b, t->end_reason.code, "%s", t->end_reason.text);
		ffs_slot_put(&t->slots[i]);
	}
}

void *ffs_copier_main(void *arg)
{
	struct ffs_tracker *t = arg;
	void *buf = malloc(t->pages->copy_max > FFS_IMAGE_LARGE ? t->pages->copy_max : FFS_IMAGE_LARGE);

	prctl(PR_SET_NAME, "forkfs-copier");
	pthread_mutex_lock(&t->lock);
	for (;;) {
		if (t->ending)
			fail_all(t);
		uint64_t later_ns;
		struct ffs_branch *b = next_work(t, &later_ns);

		if (b && !t->ending && atomic_load(&t->hold)) {
			ffs_branch_put(b);
			b = NULL;
		}
		if (!b) {
			if (t->ending && t->in_flight == 0)
				break;
			/* whatever ended the wait: look again */
			(void)ffs_cancel_wait(NULL, &t->work, &t->lock, later_ns);
			continue;
		}
		pthread_mutex_unlock(&t->lock);
		if (!buf)
			ffs_branch_fail(b, ENOMEM, "out of memory for the copy buffer of %s", b->sandbox);
		if (ffs_tracker_revoked(t))
			ffs_branch_fail(b, ETIMEDOUT, FFS_LET_GO, b->sandbox);
		bool last = false;

		if (!ffs_branch_failed(b)) {
			uint64_t n = atomic_fetch_add(&b->next_slice, 1);

			if (n < t->pages->n_slices) {
				uint64_t left = atomic_load(&b->remaining);

				copy_slice(t, b, n, buf);
				/* with what faults and readers captured meanwhile: they come first */
				pay(t, b, left - atomic_load(&b->remaining));
				last = atomic_fetch_add(&b->slices_done, 1) + 1 == t->pages->n_slices;
			}
		}
		if ((last || ffs_branch_failed(b)) && atomic_exchange(&b->finalising, 1) == 0)
			finish(t, b);
		ffs_branch_put(b);
		pthread_mutex_lock(&t->lock);
		if (t->ending)
			pthread_cond_broadcast(&t->work); /* a fellow may wait for in_flight to reach 0 */
	}
	pthread_mutex_unlock(&t->lock);
	free(buf);
	return NULL;
}
