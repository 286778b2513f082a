/* Owns where the bytes of a branch are that shares pages: its image, its parent's layer, or the store.
 *
 * Threads and locks: layer.h. */
#include "branch/layer.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "branch/budget.h"

struct ffs_layer {
	atomic_uint refs, uses;
	char id[37], parent[37]; /* of the branch, and of whose pages it shares; empty: none */
	_Atomic bool candidate;  /* it may become a parent, or is the one: that is a use */
	_Atomic bool stored;     /* its bytes are in the store: who holds it says when it is none any more */
	atomic_int state;        /* enum ffs_branch_state */
	pthread_rwlock_t lock;   /* below, but for what a new layer is filled with */
	unsigned depth;
	int fd;                 /* a duplicate of the branch's image; else -1 */
	struct ffs_layer *base; /* of the parent: a use and a reference; NULL: none, or not needed any more */
	struct ffs_branch_copy copy; /* read: NULL when it is nowhere else */
	struct ffs_budget *budget;   /* of the image, once its branch is gone; NULL: nothing */
	uint64_t bytes;
	unsigned n;
	struct {
		uint64_t offset, size, page_size, cluster_bytes;
		ffs_mask *
			shared; /* per cluster: pages that are the parent's; NULL without one; fixed when read */
	} r[];
};

/* What a layer had for its bytes: taken out of it under its lock, given back outside. */
struct held {
	int fd;
	struct ffs_layer *base;
	struct ffs_branch_copy copy;
	struct ffs_budget *budget;
	uint64_t bytes;
};

static void unuse(struct ffs_layer *l);

static void give_back(struct held *h)
{
	ffs_close_fd(&h->fd);
	if (h->budget)
		ffs_budget_release(h->budget, 0, h->bytes);
	ffs_budget_unref(h->budget);
	if (h->base) {
		unuse(h->base);
		ffs_layer_unref(h->base);
	}
	if (h->copy.read)
		h->copy.release(h->copy.arg);
}

/* Its image and its parent; l->lock is held for writing. */
static struct held take_out(struct ffs_layer *l)
{
	struct held h = {.fd = l->fd, .base = l->base, .budget = l->budget, .bytes = l->bytes};

	l->fd = -1;
	l->base = NULL;
	l->budget = NULL;
	l->bytes = 0;
	return h;
}

static void unuse(struct ffs_layer *l)
{
	if (atomic_fetch_sub_explicit(&l->uses, 1, memory_order_acq_rel) != 1)
		return;
	pthread_rwlock_wrlock(&l->lock);
	struct held h = take_out(l);

	h.copy = l->copy;
	l->copy = (struct ffs_branch_copy){0};
	pthread_rwlock_unlock(&l->lock);
	give_back(&h);
}

struct ffs_layer *ffs_layer_ref(struct ffs_layer *l)
{
	atomic_fetch_add_explicit(&l->refs, 1, memory_order_relaxed);
	return l;
}

void ffs_layer_unref(struct ffs_layer *l)
{
	if (!l || atomic_fetch_sub_explicit(&l->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (unsigned i = 0; i < l->n; i++)
		free(l->r[i].shared);
	pthread_rwlock_destroy(&l->lock);
	free(l);
}

/* Readers come one after the other: whoever changes where the bytes are must not wait for all of them. */
static void init_lock(pthread_rwlock_t *lock)
{
	pthread_rwlockattr_t a;

	pthread_rwlockattr_init(&a);
	pthread_rwlockattr_setkind_np(&a, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(lock, &a);
	pthread_rwlockattr_destroy(&a);
}

struct ffs_layer *ffs_layer_new(const struct ffs_pages *p, const char *id, struct ffs_layer *base)
{
	struct ffs_layer *l = calloc(1, sizeof(*l) + p->n * sizeof(l->r[0]));
	bool ok = l != NULL;

	if (!l) {
		if (base) {
			unuse(base);
			ffs_layer_unref(base);
		}
		return NULL;
	}
	atomic_init(&l->refs, 1);
	atomic_init(&l->uses, 1);
	atomic_init(&l->state, FFS_BRANCH_WRITING);
	init_lock(&l->lock);
	snprintf(l->id, sizeof(l->id), "%s", id);
	l->fd = -1;
	l->base = base;
	if (base) {
		snprintf(l->parent, sizeof(l->parent), "%s", base->id);
		l->depth = ffs_layer_depth(base) + 1;
	}
	for (unsigned i = 0; ok && i < p->n; i++) {
		const struct ffs_pages_region *r = &p->r[i];

		l->n = i + 1;
		l->r[i].offset = r->offset;
		l->r[i].size = r->size;
		l->r[i].page_size = r->page_size;
		l->r[i].cluster_bytes = r->cluster_bytes;
		ok = !base || (l->r[i].shared = calloc(r->n_clusters, sizeof(ffs_mask)));
	}
	if (!ok) {
		unuse(l);
		ffs_layer_unref(l);
		return NULL;
	}
	return l;
}

const char *ffs_layer_parent(const struct ffs_layer *l)
{
	return l->parent[0] ? l->parent : NULL;
}

unsigned ffs_layer_depth(struct ffs_layer *l)
{
	pthread_rwlock_rdlock(&l->lock);
	unsigned depth = l->depth;

	pthread_rwlock_unlock(&l->lock);
	return depth;
}

void ffs_layer_set_shared(struct ffs_layer *l, unsigned region, uint64_t cluster, ffs_mask shared)
{
	l->r[region].shared[cluster] = shared;
}

/* ---- being a parent ---- */

int ffs_layer_propose(struct ffs_layer *l, int image)
{
	int fd = fcntl(image, F_DUPFD_CLOEXEC, 0);

	if (fd < 0)
		return -errno;
	pthread_rwlock_wrlock(&l->lock);
	l->fd = fd;
	pthread_rwlock_unlock(&l->lock);
	atomic_fetch_add(&l->uses, 1);
	atomic_store(&l->candidate, true);
	return 0;
}

void ffs_layer_settle(struct ffs_layer *l, enum ffs_branch_state state)
{
	atomic_store(&l->state, state);
}

enum ffs_branch_state ffs_layer_state(struct ffs_layer *l)
{
	return atomic_load(&l->candidate) ? (enum ffs_branch_state)atomic_load(&l->state) : FFS_BRANCH_FAILED;
}

void ffs_layer_retire(struct ffs_layer *l)
{
	if (atomic_exchange(&l->candidate, false))
		unuse(l);
}

void ffs_layer_release(struct ffs_layer *l)
{
	if (l)
		ffs_layer_retire(l);
	ffs_layer_unref(l);
}

void ffs_layer_forget(struct ffs_layer *l)
{
	if (!atomic_load(&l->stored))
		ffs_layer_retire(l);
}

struct ffs_layer *ffs_layer_share(struct ffs_layer *l)
{
	unsigned uses = atomic_load(&l->uses);

	if (!atomic_load(&l->candidate))
		return NULL;
	/* one that is given up just now has no bytes any more */
	do {
		if (!uses)
			return NULL;
	} while (!atomic_compare_exchange_weak(&l->uses, &uses, uses + 1));
	return ffs_layer_ref(l);
}

bool ffs_layer_leave(struct ffs_layer *l, struct ffs_budget *budget, uint64_t bytes)
{
	pthread_rwlock_wrlock(&l->lock);
	bool stays = budget && l->fd >= 0;

	if (stays) {
		l->budget = ffs_budget_ref(budget);
		l->bytes = bytes;
	}
	pthread_rwlock_unlock(&l->lock);
	unuse(l);
	ffs_layer_unref(l);
	return stays;
}

bool ffs_layer_moved(struct ffs_layer *l, const struct ffs_branch_copy *copy)
{
	/* a use of our own: what is handed over is given back by the last one, which may go meanwhile */
	struct ffs_layer *used = ffs_layer_share(l);

	if (!used)
		return false;
	pthread_rwlock_wrlock(&l->lock);
	struct held h = take_out(l);

	h.copy = l->copy;
	l->copy = *copy;
	l->depth = 0;
	atomic_store(&l->stored, true);
	pthread_rwlock_unlock(&l->lock);
	give_back(&h);
	unuse(used);
	ffs_layer_unref(used);
	return true;
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

/* Bytes that all come from one place; l->lock is held. */
static ssize_t read_run(struct ffs_layer *l, bool shared, int own, void *buf, size_t len, uint64_t off)
{
	if (!shared && own >= 0)
		return ffs_pread_full(own, buf, len, off);
	if (l->copy.read) {
		ssize_t n = l->copy.read(l->copy.arg, buf, len, off);

		/* what is damaged has no more children; who reads has a use, so nothing is given back here */
		if (n < 0)
			ffs_layer_retire(l);
		return n;
	}
	if (shared)
		return ffs_layer_read(l->base, -1, buf, len, off);
	return ffs_pread_full(l->fd, buf, len, off);
}

static ssize_t read_locked(struct ffs_layer *l, int own, char *buf, size_t len, uint64_t off)
{
	size_t done = 0;

	while (done < len) {
		bool shared = false;
		/* to the store, or without a parent, it is all one */
		size_t n = l->parent[0] && !(own < 0 && l->copy.read)
				   ? run_at(l, off + done, len - done, &shared)
				   : len - done;
		ssize_t got = read_run(l, shared, own, buf + done, n, off + done);

		if (got < 0)
			return got;
		if ((size_t)got != n)
			return -EIO;
		done += n;
	}
	return (ssize_t)done;
}

ssize_t ffs_layer_read(struct ffs_layer *l, int own, void *buf, size_t len, uint64_t off)
{
	if (own >= 0 && !l->parent[0])
		return ffs_pread_full(own, buf, len, off);
	pthread_rwlock_rdlock(&l->lock);
	ssize_t n = read_locked(l, own, buf, len, off);

	pthread_rwlock_unlock(&l->lock);
	return n;
}
