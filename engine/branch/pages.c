/* Owns the page arrays of one tracker. Called by the fault handler, the copiers, readers and the thread that
 * takes a branch. Locks: cluster locks, leaf locks, ascending when several. Nothing here blocks but on those
 * and in UFFDIO_WRITEPROTECT. */
#include "branch/pages.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/fault.h"
#include "base/util.h"
#include "uffd/uffd.h"

static void *array(uint64_t n, size_t size)
{
	void *p = calloc(n, size);

	/* the handler must never wait for swap; without the privilege it is an ordinary page (doctor says so)
	 */
	if (p && mlock(p, n * size) < 0)
		return p;
	return p;
}

struct ffs_pages *ffs_pages_new(const struct ffs_geometry *geo)
{
	struct ffs_pages *p = calloc(1, sizeof(*p) + geo->n_regions * sizeof(p->r[0]));

	if (!p)
		return NULL;
	for (unsigned i = 0; i < geo->n_regions; i++) {
		const struct ffs_region *g = &geo->regions[i];
		struct ffs_pages_region *r = &p->r[i];

		p->n = i + 1;
		r->hva = g->hva;
		r->size = g->size;
		r->offset = g->offset;
		r->page_size = g->page_size;
		r->cluster_bytes =
			g->page_size > 65536 ? g->page_size : (uint64_t)FFS_CLUSTER_PAGES * g->page_size;
		r->slice_bytes = r->cluster_bytes > FFS_SLICE_BYTES ? r->cluster_bytes : FFS_SLICE_BYTES;
		r->clusters_per_slice = (unsigned)(r->slice_bytes / r->cluster_bytes);
		r->clusters_per_copy =
			r->cluster_bytes < FFS_COPY_BYTES ? (unsigned)(FFS_COPY_BYTES / r->cluster_bytes) : 1;
		r->n_clusters = (r->size + r->cluster_bytes - 1) / r->cluster_bytes;
		r->n_slices = (r->size + r->slice_bytes - 1) / r->slice_bytes;
		r->lock = array(r->n_clusters, sizeof(*r->lock));
		r->writable = array(r->n_clusters, sizeof(*r->writable));
		r->dirty = array(r->n_slices, sizeof(*r->dirty));
		if (!r->lock || !r->writable || !r->dirty) {
			ffs_pages_free(p);
			return NULL;
		}
		for (uint64_t s = 0; s < r->n_slices; s++)
			ffs_pages_mark_writable(r, s);
		p->n_slices += r->n_slices;
		if (r->cluster_bytes * r->clusters_per_copy > p->copy_max)
			p->copy_max = r->cluster_bytes * r->clusters_per_copy;
	}
	return p;
}

void ffs_pages_free(struct ffs_pages *p)
{
	if (!p)
		return;
	for (unsigned i = 0; i < p->n; i++) {
		free((void *)p->r[i].lock);
		free(p->r[i].writable);
		free((void *)p->r[i].dirty);
		free(p->r[i].changed);
		free(p->r[i].since);
	}
	free(p);
}

bool ffs_pages_find(const struct ffs_pages *p, uint64_t hva, unsigned *region, uint64_t *cluster)
{
	for (unsigned i = 0; i < p->n; i++) {
		const struct ffs_pages_region *r = &p->r[i];

		if (hva >= r->hva && hva - r->hva < r->size) {
			*region = i;
			*cluster = (hva - r->hva) / r->cluster_bytes;
			return true;
		}
	}
	return false;
}

void ffs_pages_slice(const struct ffs_pages *p, uint64_t number, unsigned *region, uint64_t *slice)
{
	unsigned i = 0;

	while (number >= p->r[i].n_slices)
		number -= p->r[i++].n_slices;
	*region = i;
	*slice = number;
}

uint64_t ffs_pages_bytes(const struct ffs_pages_region *r, uint64_t cluster)
{
	uint64_t left = r->size - cluster * r->cluster_bytes;

	return left < r->cluster_bytes ? left : r->cluster_bytes;
}

ffs_mask ffs_pages_mask(const struct ffs_pages_region *r, uint64_t cluster)
{
	uint64_t pages = ffs_pages_bytes(r, cluster) / r->page_size;

	return (ffs_mask)((1u << pages) - 1);
}

/* A lock's word is what FUTEX_LOCK_PI wants: 0 or the holder's thread id, and a bit when somebody waits. */
static uint32_t own_tid(void)
{
	static _Thread_local uint32_t tid;

	if (!tid)
		tid = (uint32_t)syscall(SYS_gettid);
	return tid;
}

static long futex(_Atomic uint32_t *word, int op)
{
	return syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, 0, NULL, NULL, 0);
}

void ffs_cluster_lock(struct ffs_pages_region *r, uint64_t cluster)
{
	_Atomic uint32_t *word = &r->lock[cluster];
	uint32_t self = own_tid();

	for (;;) {
		uint32_t seen = 0;

		if (atomic_compare_exchange_strong_explicit(
			    word, &seen, self, memory_order_acquire, memory_order_relaxed))
			return;
		if (futex(word, FUTEX_LOCK_PI) == 0) {
			/* the kernel wrote it: take over what the holder before released */
			(void)atomic_load_explicit(word, memory_order_acquire);
			return;
		}
		if (errno == ENOSYS) /* a kernel without: nobody ever waits in it then */
			sched_yield();
	}
}

void ffs_cluster_unlock(struct ffs_pages_region *r, uint64_t cluster)
{
	_Atomic uint32_t *word = &r->lock[cluster];
	uint32_t seen = own_tid();

	if (atomic_compare_exchange_strong_explicit(
		    word, &seen, 0, memory_order_release, memory_order_relaxed))
		return;
	/* somebody waits: the kernel hands it to the most urgent of them */
	atomic_fetch_or_explicit(word, FUTEX_WAITERS, memory_order_release);
	while (futex(word, FUTEX_UNLOCK_PI) < 0 && errno == EAGAIN)
		continue; /* a waiter is on its way in or out */
}

static uint64_t slice_end(const struct ffs_pages_region *r, uint64_t slice)
{
	uint64_t end = (slice + 1) * r->clusters_per_slice;

	return end < r->n_clusters ? end : r->n_clusters;
}

void ffs_clusters_lock(struct ffs_pages_region *r, uint64_t first, unsigned n)
{
	for (uint64_t c = first; c < first + n; c++)
		ffs_cluster_lock(r, c);
}

void ffs_clusters_unlock(struct ffs_pages_region *r, uint64_t first, unsigned n)
{
	for (uint64_t c = first; c < first + n; c++)
		ffs_cluster_unlock(r, c);
}

void ffs_slice_lock(struct ffs_pages_region *r, uint64_t slice)
{
	for (uint64_t c = slice * r->clusters_per_slice; c < slice_end(r, slice); c++)
		ffs_cluster_lock(r, c);
}

void ffs_slice_unlock(struct ffs_pages_region *r, uint64_t slice)
{
	for (uint64_t c = slice * r->clusters_per_slice; c < slice_end(r, slice); c++)
		ffs_cluster_unlock(r, c);
}

void ffs_pages_mark_writable(struct ffs_pages_region *r, uint64_t slice)
{
	ffs_slice_lock(r, slice);
	for (uint64_t c = slice * r->clusters_per_slice; c < slice_end(r, slice); c++)
		r->writable[c] = ffs_pages_mask(r, c);
	atomic_store(&r->dirty[slice], 1);
	ffs_slice_unlock(r, slice);
}

int ffs_pages_release_locked(struct ffs_pages_region *r, int uffd, uint64_t slice)
{
	uint64_t first = slice * r->clusters_per_slice, end = slice_end(r, slice);
	uint64_t from = first * r->cluster_bytes;
	uint64_t to = end * r->cluster_bytes < r->size ? end * r->cluster_bytes : r->size;
	int e = ffs_uffd_unprotect(uffd, r->hva + from, to - from);

	/* EAGAIN: nothing was done. After another error some may be writable; those that are not are served
	 * by the handler all the same. */
	if (e != -EAGAIN)
		for (uint64_t c = first; c < end; c++)
			r->writable[c] = ffs_pages_mask(r, c);
	return e;
}

/* Runs of writable pages as (start, length) in pages of the slice; true when there are more than `max`. */
struct run {
	uint32_t start, len;
};
#define MAX_RUNS 24

static unsigned find_runs(
	const struct ffs_pages_region *r, uint64_t first, uint64_t end, struct run *runs, uint64_t *pages)
{
	unsigned n = 0;
	unsigned per = (unsigned)(r->cluster_bytes / r->page_size);

	*pages = 0;
	for (uint64_t c = first; c < end; c++) {
		ffs_mask w = r->writable[c];

		*pages += (unsigned)__builtin_popcount(w);
		while (w) {
			unsigned bit = (unsigned)__builtin_ctz(w);
			unsigned len = (unsigned)__builtin_ctz(~((unsigned)w >> bit));
			uint32_t start = (uint32_t)(c - first) * per + bit;

			if (n && runs[n - 1].start + runs[n - 1].len == start) {
				runs[n - 1].len += len;
			} else if (n == MAX_RUNS) {
				/* too scattered: one ioctl over the gap is cheaper than many */
				runs[n - 1].len = start + len - runs[n - 1].start;
			} else {
				runs[n++] = (struct run){start, len};
			}
			w = (ffs_mask)(w & ~(((1u << len) - 1) << bit));
		}
	}
	return n;
}

int ffs_pages_sweep(struct ffs_pages_region *r, int uffd, uint64_t slice, uint64_t *swept)
{
	uint64_t first = slice * r->clusters_per_slice, end = slice_end(r, slice), pages;
	struct run runs[MAX_RUNS];
	int e = 0;
	bool racing = FFS_MUTANT("sweep-race");

	if (!racing)
		ffs_slice_lock(r, slice);
	unsigned n = find_runs(r, first, end, runs, &pages);

	/* no exclusion with the handler; the point widens the window between the two where a fault can fall into
	 * it, in slices that the guest is writing just now */
	bool faults = racing && pages < (end - first) * (r->cluster_bytes / r->page_size);

	for (unsigned i = 0; i < n && e == 0; i++)
		e = ffs_uffd_protect(uffd, r->hva + first * r->cluster_bytes + runs[i].start * r->page_size,
			runs[i].len * r->page_size);
	if (e == 0 && faults)
		e = FFS_FAULT("sweep-window");
	if (e == 0) {
		for (uint64_t c = first; c < end && r->changed; c++) {
			r->changed[c] |= r->writable[c];
			r->since[c] |= r->writable[c];
		}
		for (uint64_t c = first; c < end; c++)
			r->writable[c] = 0;
		atomic_store(&r->dirty[slice], 0);
		*swept += pages;
	}
	if (!racing)
		ffs_slice_unlock(r, slice);
	return e;
}

uint64_t ffs_pages_count_dirty(struct ffs_pages *p)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < p->n; i++) {
		struct ffs_pages_region *r = &p->r[i];

		for (uint64_t s = 0; s < r->n_slices; s++) {
			if (!atomic_load_explicit(&r->dirty[s], memory_order_relaxed))
				continue;
			for (uint64_t c = s * r->clusters_per_slice; c < slice_end(r, s); c++) {
				ffs_cluster_lock(r, c);
				n += (unsigned)__builtin_popcount(r->writable[c]);
				ffs_cluster_unlock(r, c);
			}
		}
	}
	return n;
}
