/* Owns the slots of the branches in flight and the copying of guest memory into their images.
 *
 * Called by the fault handler, the copiers and readers of branches, with the cluster locks of what is copied
 * held. Takes no other lock, allocates nothing, logs nothing: a vCPU may be waiting. The handler's part is in
 * tracker.c. */
#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/fault.h"
#include "branch/internal.h"

/* ---- slots ---- */

struct ffs_branch *ffs_slot_get(struct ffs_slot *s)
{
	/* most are empty: no count, and no wake-up that nobody waits for */
	if (!atomic_load(&s->branch))
		return NULL;
	atomic_fetch_add(&s->users, 1);
	struct ffs_branch *b = atomic_load(&s->branch);

	if (!b)
		ffs_slot_put(s);
	return b;
}

void ffs_slot_put(struct ffs_slot *s)
{
	/* who clears the slot sleeps on `users` only after it emptied `branch` */
	if (atomic_fetch_sub(&s->users, 1) == 1 && !atomic_load(&s->branch))
		syscall(SYS_futex, &s->users, FUTEX_WAKE_PRIVATE, 0x7fffffff, NULL, NULL, 0);
}

void ffs_slot_clear(struct ffs_slot *s)
{
	uint32_t users;

	atomic_store(&s->branch, NULL);
	while ((users = atomic_load(&s->users)) != 0)
		syscall(SYS_futex, &s->users, FUTEX_WAIT_PRIVATE, users, NULL, NULL, 0);
}

/* ---- copying a cluster ---- */

/* Some clusters in a row, all locked by the caller. */
struct span {
	struct ffs_pages_region *r;
	unsigned region, n;
	uint64_t first;
};

/* The pages of a cluster of the span that a branch needs. Constant while its lock is held, but for our own
 * clearing. */
static ffs_mask needs(const struct span *s, const struct ffs_branch *b, unsigned i)
{
	return atomic_load_explicit(&b->need[s->region][s->first + i], memory_order_relaxed);
}

/* In a large page of the image they are no holes yet (copier.c). */
static void note_zero(struct ffs_branch *b, const struct span *s)
{
	atomic_store_explicit(
		&b->zeros[s->region][s->first / s->r->clusters_per_slice], 1, memory_order_relaxed);
}

/* Write the pages that the branch needs and that are not zero, in runs as long as possible: the image gets
 * large pages then. It has holes for the others. */
static int store_pages(struct ffs_branch *b, const struct span *s, const char *buf)
{
	const struct ffs_pages_region *r = s->r;
	uint64_t off = r->offset + s->first * r->cluster_bytes;
	unsigned per = (unsigned)(r->cluster_bytes / r->page_size), n = s->n * per;
	bool any_zero = false;

	for (unsigned i = 0; i < n;) {
		unsigned j = i;
		bool zero = false;

		while (j < n && (needs(s, b, j / per) & (1u << j % per)) &&
			!(zero = ffs_is_zero(buf + j * r->page_size, r->page_size)))
			j++;
		any_zero |= zero;
		if (j > i) {
			int e = ffs_image_write(&b->image, buf + i * r->page_size, (j - i) * r->page_size,
				off + i * r->page_size);

			if (e < 0)
				return e;
		}
		i = j > i ? j : i + 1;
	}
	if (any_zero)
		note_zero(b, s);
	return 0;
}

static void set_captured(struct ffs_branch *b, const struct span *s)
{
	uint64_t pages = 0;

	for (unsigned i = 0; i < s->n; i++) {
		pages += (unsigned)__builtin_popcount(needs(s, b, i));
		atomic_store_explicit(&b->need[s->region][s->first + i], 0, memory_order_release);
	}
	atomic_fetch_sub_explicit(&b->remaining, pages * s->r->page_size, memory_order_relaxed);
}

/* What was read, or failed to be, for one of the branches that wait for it. */
static void deliver(struct ffs_tracker *t, struct ffs_branch *b, const struct span *s, const char *buf,
	int error, bool zero, bool revoked)
{
	int w = 0;

	if (revoked)
		ffs_branch_fail(b, ETIMEDOUT, FFS_LET_GO, b->sandbox);
	else if (error < 0)
		ffs_branch_fail(b, -error,
			error == -ESRCH ? "the VMM of %s exited before its memory was captured"
					: "cannot read the guest memory of %s",
			b->sandbox);
	else if (!zero && (w = store_pages(b, s, buf)) < 0)
		ffs_branch_fail(b, -w, "cannot write the image of a branch of %s: %s", b->sandbox,
			w == -ENOSPC || w == -ENOMEM ? "no memory left for it" : "error of its file system");
	else {
		if (zero)
			note_zero(b, s);
		set_captured(b, s);
	}
}

void ffs_tracker_capture_locked(
	struct ffs_tracker *t, unsigned region, uint64_t cluster, unsigned n, void *buf)
{
	const struct span s = {.r = &t->pages->r[region], .region = region, .n = n, .first = cluster};
	struct ffs_branch *want[FFS_SLOTS];
	unsigned per = (unsigned)(s.r->cluster_bytes / s.r->page_size);
	unsigned first = n * per, end = 0; /* the pages from the first to the last that somebody needs */
	bool zero = false;

	for (unsigned k = 0; k < FFS_SLOTS; k++) {
		want[k] = ffs_slot_get(&t->slots[k]);
		if (!want[k])
			continue;
		bool wants = false;

		for (unsigned i = 0; i < n && !ffs_branch_failed(want[k]); i++) {
			ffs_mask m = needs(&s, want[k], i);

			if (!m)
				continue;
			unsigned low = i * per + (unsigned)__builtin_ctz(m),
				 high = i * per + 32 - (unsigned)__builtin_clz(m);

			first = low < first ? low : first;
			end = high > end ? high : end;
			wants = true;
		}
		if (!wants) {
			ffs_slot_put(&t->slots[k]);
			want[k] = NULL;
		}
	}
	if (!end)
		return;
	/* A page that somebody needs has not been written since that branch's instant, nor since any later
	 * one: one copy is right for every branch that needs it. */
	int e = 0;

	for (unsigned i = 0; i < n && e == 0; i++)
		e = FFS_FAULT("guest-read"); /* tests reckon in clusters */
	if (e == 0)
		e = ffs_memory_read(t->memory, region, cluster * s.r->cluster_bytes + first * s.r->page_size,
			(char *)buf + first * s.r->page_size, (end - first) * s.r->page_size, &zero);
	/* The watchdog sets `revoked` before it lets the guest write: unset after the copy means that the
	 * copy is good. */
	bool revoked = ffs_tracker_revoked(t);

	for (unsigned k = 0; k < FFS_SLOTS; k++) {
		if (!want[k])
			continue;
		deliver(t, want[k], &s, buf, e, zero, revoked);
		ffs_slot_put(&t->slots[k]);
	}
}

void ffs_tracker_capture(struct ffs_tracker *t, unsigned region, uint64_t cluster, unsigned n, void *buf)
{
	struct ffs_pages_region *r = &t->pages->r[region];

	ffs_clusters_lock(r, cluster, n);
	ffs_tracker_capture_locked(t, region, cluster, n, buf);
	ffs_clusters_unlock(r, cluster, n);
}

unsigned ffs_tracker_needed(const struct ffs_tracker *t, const struct ffs_branch *b, unsigned region,
	uint64_t *cluster, uint64_t end)
{
	const struct ffs_pages_region *r = &t->pages->r[region];
	uint64_t c = *cluster;
	unsigned n = 1;

	while (c < end && !atomic_load_explicit(&b->need[region][c], memory_order_acquire))
		c++;
	*cluster = c;
	if (c >= end)
		return 0;
	FFS_PLACE("needed");
	/* The first one counts whether or not somebody has captured it since: 0 would say that nothing is left.
	 * Not beyond a multiple of the unit: the image's large pages are aligned. */
	while (c + n < end && (c + n) % r->clusters_per_copy &&
		atomic_load_explicit(&b->need[region][c + n], memory_order_acquire))
		n++;
	return n;
}
