/* Copies a branch while its guest stands still. The reference that live branches are compared with: the bytes
 * do not depend on write protection, faults or copiers.
 *
 * Threads: the one that takes the branch; other branches in flight go on meanwhile. No locks: nobody else
 * knows the branch yet. Moves the watchdog's beat, since this takes as long as the copy does. */
#include "branch/stopped.h"

#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/fault.h"

static int go_on(struct ffs_branch *b, struct ffs_cancel *cancel, uint64_t deadline_ns, struct ffs_error *err)
{
	if (ffs_cancel_is_set(cancel))
		return ffs_error_set(err, EINTR, "interrupted while the guest was stopped; it runs again");
	if (ffs_now_ns() >= deadline_ns)
		return ffs_error_set(err, EAGAIN,
			"the memory of %s could not be copied in time while the guest was stopped: take a "
			"live branch",
			b->sandbox);
	return 0;
}

/* Write the pages of `mask` that are not zero, in runs; the image has holes for the others. */
static int store_pages(
	struct ffs_branch *b, const struct ffs_pages_region *r, uint64_t off, const char *buf, ffs_mask mask)
{
	unsigned n = (unsigned)(r->cluster_bytes / r->page_size);

	for (unsigned i = 0; i < n;) {
		unsigned j = i;

		while (j < n && (mask & (1u << j)) && !ffs_is_zero(buf + j * r->page_size, r->page_size))
			j++;
		if (j > i) {
			int e = ffs_image_write(&b->image, buf + i * r->page_size, (j - i) * r->page_size,
				r->offset + off + i * r->page_size);

			if (e < 0)
				return e;
		}
		i = j > i ? j : i + 1;
	}
	return 0;
}

static int copy_cluster(struct ffs_tracker *t, struct ffs_branch *b, unsigned region, uint64_t cluster,
	void *buf, struct ffs_error *err)
{
	const struct ffs_pages_region *r = &t->pages->r[region];
	ffs_mask mask = atomic_load_explicit(&b->need[region][cluster], memory_order_relaxed);

	if (!mask)
		return 0;
	unsigned first = (unsigned)__builtin_ctz(mask), last = 31 - (unsigned)__builtin_clz(mask);
	uint64_t off = cluster * r->cluster_bytes;
	bool zero = false;
	int e = FFS_FAULT("stopped-read");

	if (e == 0)
		e = ffs_memory_read(t->memory, region, off + first * r->page_size,
			(char *)buf + first * r->page_size, (last - first + 1) * r->page_size, &zero);
	if (e < 0)
		return ffs_error_errno(err, -e, "cannot read the guest memory of %s", b->sandbox);
	if (!zero)
		e = store_pages(b, r, off, buf, mask);
	if (e < 0)
		return ffs_error_errno(err, -e, "cannot write the image of a branch of %s", b->sandbox);
	atomic_store_explicit(&b->need[region][cluster], 0, memory_order_relaxed);
	atomic_fetch_sub_explicit(
		&b->remaining, (uint64_t)__builtin_popcount(mask) * r->page_size, memory_order_relaxed);
	return 0;
}

int ffs_stopped_capture(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_cancel *cancel,
	uint64_t deadline_ns, struct ffs_error *err)
{
	_cleanup_free_ void *buf = malloc(t->pages->copy_max);
	int e = buf ? 0 : ffs_error_set(err, ENOMEM, "out of memory for the copy buffer of %s", b->sandbox);

	for (unsigned i = 0; i < t->pages->n; i++) {
		const struct ffs_pages_region *r = &t->pages->r[i];

		for (uint64_t c = 0; e == 0 && c < r->n_clusters; c++) {
			if (c % r->clusters_per_slice == 0) {
				atomic_fetch_add_explicit(&t->wd->pause_beat, 1, memory_order_relaxed);
				e = go_on(b, cancel, deadline_ns, err);
			}
			if (e == 0)
				e = copy_cluster(t, b, i, c, buf, err);
		}
	}
	return e;
}

int ffs_stopped_settle(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_error *err)
{
	int e = FFS_FAULT("settle");

	if (e < 0)
		ffs_error_errno(err, -e, "cannot settle");
	if (e == 0)
		e = ffs_memory_check(t->memory, err);
	if (e == -ESRCH)
		e = 0; /* it exited after it was copied */
	if (e == 0)
		e = ffs_image_seal(&b->image, err);
	if (e == 0)
		ffs_branch_settle(b, FFS_BRANCH_READY);
	return e;
}
