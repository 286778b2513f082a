/* Owns struct ffs_branch: its life, its state, its waiters, reading it.
 *
 * Threads: any. Locks: b->lock for state, watches and the failure's publication; held for moments only, never
 * while a page is copied. Two counts: `users` are the holders outside (the tree's nodes, clients); when the
 * last one goes while the capture is in flight it is cancelled. `refs` keep the memory: the users together
 * hold one, the slot one, a copier at work one. */
#include <errno.h>
#include <json-c/json.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "branch/internal.h"

const char *ffs_branch_mode_name(enum ffs_branch_mode m)
{
	return m == FFS_BRANCH_LIVE ? "live" : m == FFS_BRANCH_DIFF ? "diff" : "full";
}

const char *ffs_branch_state_name(enum ffs_branch_state s)
{
	return s == FFS_BRANCH_WRITING ? "writing" : s == FFS_BRANCH_READY ? "ready" : "failed";
}

struct ffs_branch *ffs_branch_new(
	struct ffs_sandbox *sb, struct ffs_tracker *t, const char *name, struct ffs_error *err)
{
	struct ffs_branch *b = calloc(1, sizeof(*b));

	if (!b) {
		ffs_error_set(err, ENOMEM, "out of memory for a branch of %s", sb->name);
		return NULL;
	}
	atomic_init(&b->refs, 1);
	atomic_init(&b->users, 1);
	pthread_mutex_init(&b->lock, NULL);
	ffs_cond_init(&b->settled);
	ffs_cond_init(&b->watch_done);
	atomic_init(&b->state, FFS_BRANCH_WRITING);
	ffs_image_init(&b->image);
	b->vmstate_fd = -1;
	ffs_uuid(b->id);
	snprintf(b->sandbox, sizeof(b->sandbox), "%s", sb->name);
	snprintf(b->name, sizeof(b->name), "%s", name ? name : "");
	b->geo = t->geo;
	b->vmm_kind = sb->vmm_kind;
	b->tracker = ffs_tracker_ref(t);
	atomic_init(&b->remaining, t->geo.memory_size);
	for (unsigned i = 0; i < t->pages->n; i++) {
		const struct ffs_pages_region *r = &t->pages->r[i];

		b->need[i] = calloc(r->n_clusters, sizeof(*b->need[i]));
		b->zeros[i] = calloc(r->n_slices, sizeof(*b->zeros[i]));
		if (!b->need[i] || !b->zeros[i]) {
			ffs_error_set(err, ENOMEM, "out of memory for a branch of %s", sb->name);
			ffs_branch_put(b);
			return NULL;
		}
		if (mlock((void *)b->need[i], r->n_clusters * sizeof(*b->need[i])) < 0 && errno == ENOMEM)
			errno = 0; /* over RLIMIT_MEMLOCK: ordinary pages then, doctor names the limit */
		for (uint64_t c = 0; c < r->n_clusters; c++)
			atomic_init(&b->need[i][c], ffs_pages_mask(r, c));
	}
	b->vmstate_fd = memfd_create("forkfs-vmstate", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (b->vmstate_fd < 0) {
		ffs_error_errno(err, errno, "cannot make a memfd for the vmstate of %s", sb->name);
		ffs_branch_put(b);
		return NULL;
	}
	b->budget = ffs_budget_ref(sb->engine->budget);
	if (ffs_budget_reserve(b->budget, sb->name, t->geo.memory_size, err) < 0) {
		ffs_branch_put(b);
		return NULL;
	}
	b->memory_reserved = t->geo.memory_size;
	if (ffs_image_open(&b->image, t->geo.memory_size, err) < 0) {
		ffs_branch_put(b);
		return NULL;
	}
	return b;
}

void ffs_branch_get(struct ffs_branch *b)
{
	atomic_fetch_add_explicit(&b->refs, 1, memory_order_relaxed);
}

static void give_permit(struct ffs_branch *b)
{
	if (!b->permits)
		return;
	ffs_permits_give(b->permits);
	ffs_permits_unref(ffs_steal_ptr(&b->permits));
}

void ffs_branch_put(struct ffs_branch *b)
{
	if (atomic_fetch_sub_explicit(&b->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (unsigned i = 0; i < FFS_MAX_REGIONS; i++) {
		free((void *)b->need[i]);
		free((void *)b->zeros[i]);
	}
	/* children may need its pages for longer: then it counts for as long */
	if (b->layer && ffs_layer_leave(b->layer, b->budget, b->memory_taken))
		b->memory_taken = 0;
	ffs_image_close(&b->image);
	if (b->budget)
		ffs_budget_release(b->budget, b->memory_reserved, b->memory_taken);
	ffs_budget_unref(b->budget);
	give_permit(b);
	ffs_close_fd(&b->vmstate_fd);
	ffs_disk_images_close(&b->disks);
	json_object_put(b->vmm);
	json_object_put(b->torn);
	ffs_tracker_unref(b->tracker);
	pthread_cond_destroy(&b->settled);
	pthread_cond_destroy(&b->watch_done);
	pthread_mutex_destroy(&b->lock);
	free(b);
}

struct ffs_branch *ffs_branch_ref(struct ffs_branch *b)
{
	atomic_fetch_add_explicit(&b->users, 1, memory_order_relaxed);
	return b;
}

void ffs_branch_unref(struct ffs_branch *b)
{
	if (!b || atomic_fetch_sub_explicit(&b->users, 1, memory_order_acq_rel) != 1)
		return;
	if (atomic_load(&b->state) == FFS_BRANCH_WRITING) {
		ffs_branch_fail(b, ECANCELED, "branch of %s cancelled: nobody holds it any more", b->sandbox);
		ffs_copier_poke(b->tracker);
	}
	if (b->layer)
		ffs_layer_forget(b->layer);
	ffs_branch_put(b);
}

void ffs_branch_fail(struct ffs_branch *b, int code, const char *fmt, ...)
{
	int none = FFS_FAIL_NONE;

	if (!atomic_compare_exchange_strong(&b->failing, &none, FFS_FAIL_SETTING))
		return;
	va_list ap;

	b->failure.code = code;
	va_start(ap, fmt);
	vsnprintf(b->failure.text, sizeof(b->failure.text), fmt, ap);
	va_end(ap);
	atomic_store(&b->failing, FFS_FAIL_SET);
	if (b->layer)
		ffs_layer_settle(b->layer, FFS_BRANCH_FAILED);
}

void ffs_branch_count_fault(struct ffs_branch *b, uint64_t ns)
{
	uint64_t us = ns / 1000, max = atomic_load_explicit(&b->fault_max_ns, memory_order_relaxed);
	unsigned bucket = us ? 64 - (unsigned)__builtin_clzll(us) : 0;

	if (bucket >= FFS_LATENCY_BUCKETS)
		bucket = FFS_LATENCY_BUCKETS - 1;
	atomic_fetch_add_explicit(&b->latency[bucket], 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&b->faults, 1, memory_order_relaxed);
	if (ns > max) /* one writer: the handler thread */
		atomic_store_explicit(&b->fault_max_ns, ns, memory_order_relaxed);
}

/* Nobody writes the image any more: what it takes is known. One that failed, which nobody may read, gives its
 * memory back now and not with its last opener. */
static void settle_memory(struct ffs_branch *b, enum ffs_branch_state state)
{
	uint64_t taken = ffs_image_settle(&b->image, state == FFS_BRANCH_FAILED);

	ffs_budget_settle(b->budget, b->memory_reserved, taken);
	pthread_mutex_lock(&b->lock);
	b->memory_reserved = 0;
	b->memory_taken = taken;
	pthread_mutex_unlock(&b->lock);
}

void ffs_branch_settle(struct ffs_branch *b, enum ffs_branch_state state)
{
	settle_memory(b, state);
	give_permit(b);
	if (b->layer)
		ffs_layer_settle(b->layer, state);
	pthread_mutex_lock(&b->lock);
	b->phases.capture_ns = ffs_now_ns() - b->armed_ns;
	atomic_store(&b->state, state);
	pthread_cond_broadcast(&b->settled);
	b->running_thread = pthread_self();
	while (b->watches) {
		struct ffs_branch_watch *w = b->watches;

		b->watches = w->next;
		w->state = 2;
		b->running = w;
		pthread_mutex_unlock(&b->lock);
		w->fn(w->arg); /* may free w */
		pthread_mutex_lock(&b->lock);
		b->running = NULL;
		pthread_cond_broadcast(&b->watch_done);
	}
	pthread_mutex_unlock(&b->lock);
}

void ffs_branch_watch(struct ffs_branch *b, struct ffs_branch_watch *w)
{
	pthread_mutex_lock(&b->lock);
	if (atomic_load(&b->state) == FFS_BRANCH_WRITING) {
		w->state = 1;
		w->next = b->watches;
		b->watches = w;
		pthread_mutex_unlock(&b->lock);
		return;
	}
	w->state = 2;
	pthread_mutex_unlock(&b->lock);
	w->fn(w->arg);
}

bool ffs_branch_unwatch(struct ffs_branch *b, struct ffs_branch_watch *w)
{
	bool removed = false;

	pthread_mutex_lock(&b->lock);
	for (struct ffs_branch_watch **p = &b->watches; *p; p = &(*p)->next)
		if (*p == w) {
			*p = w->next;
			removed = true;
			break;
		}
	while (b->running == w && !pthread_equal(b->running_thread, pthread_self()))
		pthread_cond_wait(&b->watch_done, &b->lock);
	pthread_mutex_unlock(&b->lock);
	return removed;
}

enum ffs_branch_state ffs_branch_state(struct ffs_branch *b)
{
	return (enum ffs_branch_state)atomic_load(&b->state);
}

void ffs_branch_failure(struct ffs_branch *b, struct ffs_error *err)
{
	int now;

	while ((now = atomic_load(&b->failing)) == FFS_FAIL_SETTING)
		sched_yield(); /* somebody is writing the sentence */
	if (now == FFS_FAIL_SET)
		*err = b->failure;
}

int ffs_branch_wait(struct ffs_branch *b, struct ffs_cancel *cancel, struct ffs_error *err)
{
	int r = 0;

	pthread_mutex_lock(&b->lock);
	while (atomic_load(&b->state) == FFS_BRANCH_WRITING && r != -EINTR)
		r = ffs_cancel_wait(cancel, &b->settled, &b->lock, 0);
	pthread_mutex_unlock(&b->lock);
	enum ffs_branch_state state = ffs_branch_state(b);

	if (state == FFS_BRANCH_WRITING)
		return ffs_error_set(
			err, EINTR, "interrupted while waiting for branch %s", b->name[0] ? b->name : b->id);
	if (state == FFS_BRANCH_READY)
		return 0;
	struct ffs_error why = {0};

	ffs_branch_failure(b, &why);
	return ffs_error_set(err, EIO, "%.500s", why.text);
}

const char *ffs_branch_id(const struct ffs_branch *b)
{
	return b->id;
}

uint64_t ffs_branch_time_ns(const struct ffs_branch *b)
{
	return b->instant_wall_ns;
}

uint64_t ffs_branch_memory_size(const struct ffs_branch *b)
{
	return b->geo.memory_size;
}

uint64_t ffs_branch_image_bytes(struct ffs_branch *b)
{
	pthread_mutex_lock(&b->lock);
	uint64_t bytes = b->memory_reserved + b->memory_taken;

	pthread_mutex_unlock(&b->lock);
	return bytes;
}

uint64_t ffs_branch_vmstate_size(const struct ffs_branch *b)
{
	return b->vmstate_size;
}

int ffs_branch_vmstate_fd(struct ffs_branch *b)
{
	return b->vmstate_fd;
}

ssize_t ffs_branch_read_vmstate(struct ffs_branch *b, void *buf, size_t len, uint64_t off)
{
	if (ffs_branch_failed(b))
		return -EIO;
	return ffs_pread_full(b->vmstate_fd, buf, len, off);
}

unsigned ffs_branch_disks(const struct ffs_branch *b)
{
	return b->disks.n;
}

const char *ffs_branch_disk_id(const struct ffs_branch *b, unsigned i)
{
	return b->disks.image[i].id;
}

uint64_t ffs_branch_disk_size(const struct ffs_branch *b, unsigned i)
{
	return b->disks.image[i].size;
}

int ffs_branch_disk_fd(struct ffs_branch *b, unsigned i)
{
	return b->disks.image[i].fd;
}

ssize_t ffs_branch_read_disk(struct ffs_branch *b, unsigned i, void *buf, size_t len, uint64_t off)
{
	if (ffs_branch_failed(b))
		return -EIO;
	return ffs_pread_full(b->disks.image[i].fd, buf, len, off);
}

int ffs_branch_memory_fd(struct ffs_branch *b)
{
	switch (ffs_branch_state(b)) {
	case FFS_BRANCH_READY:
		/* what is the parent's is not in it */
		return b->layer && ffs_layer_parent(b->layer) ? -ENODATA : b->image.fd;
	case FFS_BRANCH_WRITING:
		return -EAGAIN;
	default:
		return -EIO;
	}
}

/* Make sure the image has [off, off+len): capture what is missing, on the reader's own time. */
static int capture_range(struct ffs_branch *b, uint64_t off, uint64_t len)
{
	struct ffs_tracker *t = b->tracker;
	_cleanup_free_ void *buf = NULL;
	int e = 0;

	pthread_rwlock_rdlock(&t->reading);
	if (!t->memory)
		e = -EIO; /* the VM was let go: what was in flight has failed */
	for (unsigned i = 0; i < t->pages->n && e == 0; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];

		if (off >= r->offset + r->size || off + len <= r->offset)
			continue;
		uint64_t from = off > r->offset ? off - r->offset : 0;
		uint64_t to = off + len - r->offset < r->size ? off + len - r->offset : r->size;

		uint64_t c = from / r->cluster_bytes, end = (to + r->cluster_bytes - 1) / r->cluster_bytes;
		unsigned n;

		for (; e == 0 && (n = ffs_tracker_needed(t, b, i, &c, end)) > 0; c += n) {
			if (!buf && !(buf = malloc(t->pages->copy_max))) {
				e = -ENOMEM;
				break;
			}
			ffs_tracker_capture(t, i, c, n, buf);
			if (ffs_branch_failed(b))
				e = -EIO; /* nothing of it may be read any more */
		}
	}
	pthread_rwlock_unlock(&t->reading);
	return e;
}

bool ffs_branch_is_parent(struct ffs_branch *b)
{
	return b->layer && ffs_layer_state(b->layer) != FFS_BRANCH_FAILED;
}

struct ffs_layer *ffs_branch_copied(struct ffs_branch *b, const struct ffs_branch_copy *copy)
{
	if (!b->layer || ffs_branch_state(b) != FFS_BRANCH_READY || !ffs_layer_moved(b->layer, copy))
		return NULL;
	return ffs_layer_ref(b->layer);
}

ssize_t ffs_branch_read_memory(struct ffs_branch *b, void *buf, size_t len, uint64_t off)
{
	if (off >= b->image.size)
		return 0;
	if (len > b->image.size - off)
		len = b->image.size - off;
	if (ffs_branch_state(b) == FFS_BRANCH_WRITING && !ffs_branch_failed(b)) {
		int e = capture_range(b, off, len);

		if (e < 0)
			return e;
	}
	if (ffs_branch_failed(b))
		return -EIO;
	ssize_t n = b->layer ? ffs_layer_read(b->layer, b->image.fd, buf, len, off)
			     : ffs_pread_full(b->image.fd, buf, len, off);

	/* the image of one that fails just now is emptied */
	return ffs_branch_failed(b) ? -EIO : n;
}
