/* Owns the layers: which pages of a branch are its parent's, and the maps of what was written since.
 *
 * Threads: the one that takes a branch, but for reading (any) and ffs_lineage_forget() (any). Locks: t->lock
 * for `parent` and `heir`; cluster locks, one at a time, while a branch inherits. */
#include "branch/lineage.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "branch/internal.h"

struct ffs_layer {
	atomic_uint refs;
	char id[37]; /* of the branch */
	unsigned depth;
	int fd;                 /* a duplicate of the branch's image, once it has children; else -1 */
	struct ffs_layer *base; /* of the parent; NULL: all pages are its own */
	struct ffs_budget *budget; /* of what it holds, once its branch is gone; NULL: nothing */
	uint64_t bytes;
	unsigned n;
	struct {
		uint64_t offset, size, page_size, cluster_bytes;
		ffs_mask *shared; /* per cluster: pages that are the parent's; NULL without one */
	} r[];
};

struct ffs_layer *ffs_layer_ref(struct ffs_layer *l)
{
	atomic_fetch_add_explicit(&l->refs, 1, memory_order_relaxed);
	return l;
}

void ffs_layer_unref(struct ffs_layer *l)
{
	while (l && atomic_fetch_sub_explicit(&l->refs, 1, memory_order_acq_rel) == 1) {
		struct ffs_layer *base = l->base;

		for (unsigned i = 0; i < l->n; i++)
			free(l->r[i].shared);
		ffs_close_fd(&l->fd);
		if (l->budget)
			ffs_budget_release(l->budget, 0, l->bytes);
		ffs_budget_unref(l->budget);
		free(l);
		l = base;
	}
}

bool ffs_layer_charge(struct ffs_layer *l, struct ffs_budget *budget, uint64_t bytes)
{
	if (l->fd < 0)
		return false;
	l->budget = ffs_budget_ref(budget);
	l->bytes = bytes;
	return true;
}

const char *ffs_layer_parent(const struct ffs_layer *l)
{
	return l->base ? l->base->id : NULL;
}

/* Takes over the reference on base, also on failure. */
static struct ffs_layer *layer_new(const struct ffs_pages *p, const char *id, struct ffs_layer *base)
{
	struct ffs_layer *l = calloc(1, sizeof(*l) + p->n * sizeof(l->r[0]));

	if (!l) {
		ffs_layer_unref(base);
		return NULL;
	}
	atomic_init(&l->refs, 1);
	snprintf(l->id, sizeof(l->id), "%s", id);
	l->fd = -1;
	l->base = base;
	l->depth = base ? base->depth + 1 : 0;
	for (unsigned i = 0; i < p->n; i++) {
		const struct ffs_pages_region *r = &p->r[i];

		l->n = i + 1;
		l->r[i].offset = r->offset;
		l->r[i].size = r->size;
		l->r[i].page_size = r->page_size;
		l->r[i].cluster_bytes = r->cluster_bytes;
		if (base && !(l->r[i].shared = calloc(r->n_clusters, sizeof(ffs_mask)))) {
			ffs_layer_unref(l);
			return NULL;
		}
	}
	return l;
}

/* ---- reading ---- */

static bool is_shared(const struct ffs_layer *l, unsigned i, uint64_t at)
{
	return l->r[i].shared[at / l->r[i].cluster_bytes] >>
		       (at % l->r[i].cluster_bytes / l->r[i].page_size) &
	       1;
}

/* How far from `off` the bytes come from the same place, at most len; *shared says from which. */
static size_t run_at(const struct ffs_layer *l, uint64_t off, size_t len, bool *shared)
{
	unsigned i = 0;

	while (off < l->r[i].offset || off - l->r[i].offset >= l->r[i].size)
		i++; /* the regions cover all of memory.bin */
	uint64_t at = off - l->r[i].offset, page = l->r[i].page_size, end = at;

	*shared = is_shared(l, i, at);
	do {
		end = (end / page + 1) * page;
	} while (end < l->r[i].size && end - at < len && is_shared(l, i, end) == *shared);
	return end - at < len ? end - at : len;
}

ssize_t ffs_layer_read(const struct ffs_layer *l, int own, void *buf, size_t len, uint64_t off)
{
	size_t done = 0;

	if (!l->base)
		return ffs_pread_full(own, buf, len, off);
	while (done < len) {
		bool shared;
		size_t n = run_at(l, off + done, len - done, &shared);
		char *at = (char *)buf + done;
		ssize_t got = shared ? ffs_layer_read(l->base, l->base->fd, at, n, off + done)
				     : ffs_pread_full(own, at, n, off + done);

		if (got < 0)
			return got;
		if ((size_t)got != n)
			return -EIO;
		done += n;
	}
	return (ssize_t)done;
}

/* ---- the maps ---- */

int ffs_lineage_init(struct ffs_tracker *t, struct ffs_error *err)
{
	for (unsigned i = 0; t->track && i < t->pages->n; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];

		r->changed = calloc(r->n_clusters, sizeof(*r->changed));
		r->since = calloc(r->n_clusters, sizeof(*r->since));
		if (!r->changed || !r->since)
			return ffs_error_set(
				err, ENOMEM, "out of memory for the map of what the guest has written");
	}
	return 0;
}

/* Under t->lock: the heir is ready, and what was written since its instant is what matters now. */
static void promote(struct ffs_tracker *t)
{
	struct ffs_branch *b = t->heir;

	t->heir = NULL;
	b->layer->fd = fcntl(b->image.fd, F_DUPFD_CLOEXEC, 0);
	if (b->layer->fd < 0)
		return; /* out of descriptors: the old parent is as good as it was */
	t->parent = b;
	for (unsigned i = 0; i < t->pages->n; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];
		ffs_mask *old = r->changed;

		r->changed = r->since;
		r->since = old;
	}
}

int ffs_lineage_begin(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_error *err)
{
	struct ffs_layer *base = NULL;

	if (!t->track)
		return 0;
	pthread_mutex_lock(&t->lock);
	if (t->heir && ffs_branch_state(t->heir) == FFS_BRANCH_READY)
		promote(t);
	else if (t->heir && ffs_branch_failed(t->heir))
		t->heir = NULL;
	if (b->mode != FFS_BRANCH_FULL && t->parent && t->parent->layer->depth + 1 < FFS_LINEAGE_DEPTH)
		base = ffs_layer_ref(t->parent->layer);
	b->has_parent = t->parent != NULL;
	b->heir = t->heir != NULL;
	pthread_mutex_unlock(&t->lock);
	b->layer = layer_new(t->pages, b->id, base);
	return b->layer ? 0 : ffs_error_set(err, ENOMEM, "out of memory for a branch of %s", b->sandbox);
}

void ffs_lineage_inherit(struct ffs_tracker *t, struct ffs_branch *b)
{
	struct ffs_layer *l = b->layer;
	uint64_t bytes = 0;

	if (!l)
		return;
	pthread_mutex_lock(&t->lock);
	b->heir = !t->heir && b->name[0];
	pthread_mutex_unlock(&t->lock);
	for (unsigned i = 0; i < t->pages->n; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];

		for (uint64_t c = 0; c < r->n_clusters; c++) {
			ffs_cluster_lock(r, c);
			ffs_mask need = atomic_load_explicit(&b->need[i][c], memory_order_relaxed);
			ffs_mask shared = l->base ? (ffs_mask)(need & ~r->changed[c]) : 0;

			if (shared) {
				l->r[i].shared[c] = shared;
				atomic_store_explicit(
					&b->need[i][c], (ffs_mask)(need & ~shared), memory_order_release);
				bytes += (unsigned)__builtin_popcount(shared) * r->page_size;
			}
			/* what the branch no longer needed was captured for a write after its instant, and
			 * may have been protected by its last sweep already */
			if (b->heir)
				r->since[c] = (ffs_mask)(ffs_pages_mask(r, c) & ~need);
			ffs_cluster_unlock(r, c);
		}
	}
	b->shared_bytes = bytes;
	atomic_fetch_sub(&b->remaining, bytes);
}

void ffs_lineage_taken(struct ffs_tracker *t, struct ffs_branch *b)
{
	if (!b->layer || !b->heir)
		return;
	pthread_mutex_lock(&t->lock);
	t->heir = b;
	pthread_mutex_unlock(&t->lock);
}

void ffs_lineage_forget(struct ffs_tracker *t, struct ffs_branch *b)
{
	if (!b->layer)
		return;
	pthread_mutex_lock(&t->lock);
	if (t->parent == b)
		t->parent = NULL;
	if (t->heir == b)
		t->heir = NULL;
	pthread_mutex_unlock(&t->lock);
}
