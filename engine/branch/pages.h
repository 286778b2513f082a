/* The state of every guest page while branches are taken: which are writable, which are still needed, who
 * works on them.
 *
 * Pages are handled in clusters (64 KiB, or one huge page) because copying 16 pages costs about what copying
 * one costs, and swept in slices of 2 MiB because an ioctl on more holds the VMM's mmap lock too long. Per
 * page:
 *
 *     clean      protected, and some branch in flight needs it   writable bit 0, need bit 1 in that branch
 *     copying    its cluster's lock is held
 *     captured   in the image                                    need bit 0 in that branch
 *     dirty      the guest may write it without a fault          writable bit 1; implies need bit 0 in every
 *                                                                branch
 *
 * The writable bits of a cluster change only under its lock, together with the ioctl that makes them true:
 * without that exclusion a sweep (bit := 0, protect) and the fault handler (bit := 1, unprotect) can leave a
 * page writable and not dirty, and the branch is wrong. A writable bit may be set although the page is still
 * protected (a fault then unprotects it); never the other way round.
 *
 * A sweep passes over a slice whose `dirty` is 0 without taking a lock. So whoever makes pages writable sets
 * dirty first, and only then looks whether a branch needs them or a take is under way (all of it sequentially
 * consistent): either he sees the branch, or the sweep of its take sees dirty and waits for his lock. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm/vmm.h"

#define FFS_CLUSTER_PAGES 16u
#define FFS_COPY_BYTES                                                                                       \
	(256u << 10) /* at once by copiers and readers: a large page of the image, some 50 µs */
#define FFS_SLICE_BYTES (2u << 20)

typedef uint16_t ffs_mask; /* a bit per page of a cluster */

struct ffs_pages_region {
	uint64_t hva, size, offset; /* as in struct ffs_region */
	uint64_t page_size, cluster_bytes, slice_bytes;
	uint64_t n_clusters, n_slices;
	unsigned clusters_per_slice, clusters_per_copy;
	_Atomic uint32_t *lock; /* per cluster: 0, or the holder's thread id (FUTEX_LOCK_PI) */
	ffs_mask *writable;     /* per cluster, under its lock */
	_Atomic uint8_t *dirty; /* per slice: has writable pages, or is about to; set under a cluster's lock,
				   cleared under all of the slice's */
	/* per cluster, pages that a sweep found writable: see lineage.h; NULL without tracking */
	ffs_mask *changed, *since;
};

struct ffs_pages {
	unsigned n;
	uint64_t n_slices; /* of all regions */
	uint64_t copy_max; /* the size of a copy buffer */
	struct ffs_pages_region r[];
};

/* All pages start writable. NULL when out of memory. */
struct ffs_pages *ffs_pages_new(const struct ffs_geometry *geo);
void ffs_pages_free(struct ffs_pages *p);

/* The region and cluster that hold an address of the VMM; false when none does. */
bool ffs_pages_find(const struct ffs_pages *p, uint64_t hva, unsigned *region, uint64_t *cluster);
/* Slice number of all (0 … n_slices-1) to region and slice within it. */
void ffs_pages_slice(const struct ffs_pages *p, uint64_t number, unsigned *region, uint64_t *slice);

/* Bits of the pages that exist in a cluster (the last one may be short), and its bytes. */
ffs_mask ffs_pages_mask(const struct ffs_pages_region *r, uint64_t cluster);
uint64_t ffs_pages_bytes(const struct ffs_pages_region *r, uint64_t cluster);

/* A cluster's lock. Its holder, a copier or a sweep, may be preempted just when the fault handler, and a vCPU
 * behind it, wants the lock: so it is a futex with priority inheritance, and the holder gets the handler's
 * real-time priority until it lets go. Ascending order where several are held. */
void ffs_cluster_lock(struct ffs_pages_region *r, uint64_t cluster);
void ffs_cluster_unlock(struct ffs_pages_region *r, uint64_t cluster);
void ffs_clusters_lock(struct ffs_pages_region *r, uint64_t first, unsigned n);
void ffs_clusters_unlock(struct ffs_pages_region *r, uint64_t first, unsigned n);
void ffs_slice_lock(struct ffs_pages_region *r, uint64_t slice);
void ffs_slice_unlock(struct ffs_pages_region *r, uint64_t slice);

/* Write-protect every writable page of a slice. *swept counts pages. 0, -EAGAIN (the VMM is changing its
 * mappings: let the event handler run and call again), or -errno; on failure the bits are what they were.
 * Takes and releases the slice's locks. */
int ffs_pages_sweep(struct ffs_pages_region *r, int uffd, uint64_t slice, uint64_t *swept);
/* Make a whole slice writable. Same results. The caller holds its locks, has set its dirty flag, and knew
 * after that that no branch needs a page of it (copier.c). */
int ffs_pages_release_locked(struct ffs_pages_region *r, int uffd, uint64_t slice);
/* The bits alone, for a range about to be unregistered or known to have lost its protection; takes the locks.
 */
void ffs_pages_mark_writable(struct ffs_pages_region *r, uint64_t slice);
/* Pages that are writable now, over all slices marked dirty: what a sweep would have to do. */
uint64_t ffs_pages_count_dirty(struct ffs_pages *p);
