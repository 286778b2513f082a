/* Owns the maps of what was written since, and who is the parent.
 *
 * Threads: the one that takes a branch, but for ffs_lineage_end() (who ends the tracker). Locks: t->lock
 * for `parent` and `heir`; cluster locks, one at a time, while a branch inherits. */
#include "branch/lineage.h"

#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "branch/internal.h"

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
	t->parent = ffs_steal_ptr(&t->heir);
	for (unsigned i = 0; i < t->pages->n; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];
		ffs_mask *old = r->changed;

		r->changed = r->since;
		r->since = old;
	}
}

int ffs_lineage_begin(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_error *err)
{
	struct ffs_layer *base = NULL, *old_parent = NULL, *old_heir = NULL;

	if (!t->track)
		return 0;
	pthread_mutex_lock(&t->lock);
	bool ready = t->heir && ffs_layer_state(t->heir) == FFS_BRANCH_READY;

	if (ready || (t->parent && ffs_layer_state(t->parent) == FFS_BRANCH_FAILED))
		old_parent = ffs_steal_ptr(&t->parent);
	if (ready)
		promote(t);
	else if (t->heir && ffs_layer_state(t->heir) == FFS_BRANCH_FAILED)
		old_heir = ffs_steal_ptr(&t->heir);
	if (b->mode != FFS_BRANCH_FULL && t->parent && ffs_layer_depth(t->parent) + 1 < FFS_LINEAGE_DEPTH)
		base = ffs_layer_share(t->parent);
	b->has_parent = t->parent != NULL;
	b->heir = t->heir != NULL;
	pthread_mutex_unlock(&t->lock);
	ffs_layer_release(old_parent);
	ffs_layer_release(old_heir);
	b->layer = ffs_layer_new(t->pages, b->id, base);
	return b->layer ? 0 : ffs_error_set(err, ENOMEM, "out of memory for a branch of %s", b->sandbox);
}

void ffs_lineage_inherit(struct ffs_tracker *t, struct ffs_branch *b)
{
	uint64_t bytes = 0;

	if (!b->layer)
		return;
	bool has_parent = ffs_layer_parent(b->layer) != NULL;

	pthread_mutex_lock(&t->lock);
	b->heir = !t->heir && b->name[0];
	pthread_mutex_unlock(&t->lock);
	for (unsigned i = 0; i < t->pages->n; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];

		for (uint64_t c = 0; c < r->n_clusters; c++) {
			ffs_cluster_lock(r, c);
			ffs_mask need = atomic_load_explicit(&b->need[i][c], memory_order_relaxed);
			ffs_mask shared = has_parent ? (ffs_mask)(need & ~r->changed[c]) : 0;

			if (shared) {
				ffs_layer_set_shared(b->layer, i, c, shared);
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
	int e = ffs_layer_propose(b->layer, b->image.fd);

	if (e < 0) { /* out of descriptors: the old parent is as good as it was */
		ffs_log(FFS_LOG_WARN, "%s: branch %s will not be a parent: %s", b->sandbox, b->id,
			strerror(-e));
		return;
	}
	pthread_mutex_lock(&t->lock);
	t->heir = ffs_layer_ref(b->layer);
	pthread_mutex_unlock(&t->lock);
}

void ffs_lineage_end(struct ffs_tracker *t)
{
	pthread_mutex_lock(&t->lock);
	struct ffs_layer *parent = ffs_steal_ptr(&t->parent), *heir = ffs_steal_ptr(&t->heir);

	pthread_mutex_unlock(&t->lock);
	ffs_layer_release(parent);
	ffs_layer_release(heir);
}
