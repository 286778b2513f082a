/* Reads a VM's memory as it is now: no branch, no pause, no protection.
 *
 * Threads: any. Locks: sb->lock for the moment in which the tracker is looked up; tracker->reading, as readers of
 * branches hold it, so that the memory is not closed meanwhile. */
#include <errno.h>
#include <string.h>

#include "branch/internal.h"

#define PAGE 4096ull

static int read_region(struct ffs_tracker *t, unsigned i, void *buf, size_t len, uint64_t off)
{
	bool zero = false;
	int r = ffs_memory_read(t->memory, i, off, buf, len, &zero);

	if (!r && zero)
		memset(buf, 0, len);
	return r;
}

static int read_all(struct ffs_tracker *t, char *buf, size_t len, uint64_t off)
{
	int r = t->memory ? 0 : -ESRCH;

	for (unsigned i = 0; !r && i < t->geo.n_regions; i++) {
		const struct ffs_region *g = &t->geo.regions[i];
		uint64_t from = off > g->offset ? off : g->offset;
		uint64_t to = off + len < g->offset + g->size ? off + len : g->offset + g->size;

		if (from < to)
			r = read_region(t, i, buf + (from - off), (size_t)(to - from), from - g->offset);
	}
	return r;
}

static struct ffs_tracker *tracker_of(struct ffs_sandbox *sb)
{
	pthread_mutex_lock(&sb->lock);
	struct ffs_tracker *t = sb->detached || !sb->tracker ? NULL : ffs_tracker_ref(sb->tracker);

	pthread_mutex_unlock(&sb->lock);
	return t;
}

ssize_t ffs_sandbox_read_memory(struct ffs_sandbox *sb, void *buf, size_t len, uint64_t off)
{
	struct ffs_tracker *t = tracker_of(sb);

	if (!t)
		return -ESRCH;
	if (off >= t->geo.memory_size)
		len = 0;
	else if (len > t->geo.memory_size - off)
		len = (size_t)(t->geo.memory_size - off);
	pthread_rwlock_rdlock(&t->reading);
	int r = read_all(t, buf, len, off);

	pthread_rwlock_unlock(&t->reading);
	ffs_tracker_unref(t);
	return r < 0 ? r : (ssize_t)len;
}

static int heads_of_all(struct ffs_tracker *t, uint64_t *head, size_t pages, uint64_t off)
{
	uint64_t end = off + pages * PAGE;
	int r = t->memory ? 0 : -ESRCH;

	for (unsigned i = 0; !r && i < t->geo.n_regions; i++) {
		const struct ffs_region *g = &t->geo.regions[i];
		uint64_t from = off > g->offset ? off : g->offset;
		uint64_t to = end < g->offset + g->size ? end : g->offset + g->size;

		if (from < to)
			r = ffs_memory_read_heads(t->memory, i, from - g->offset, head + (from - off) / PAGE,
				(size_t)((to - from) / PAGE));
	}
	return r;
}

int ffs_sandbox_read_heads(struct ffs_sandbox *sb, uint64_t *head, size_t pages, uint64_t off)
{
	struct ffs_tracker *t = tracker_of(sb);
	int r = -EINVAL;

	if (!t)
		return -ESRCH;
	if (off % PAGE == 0 && off <= t->geo.memory_size && pages <= (t->geo.memory_size - off) / PAGE) {
		pthread_rwlock_rdlock(&t->reading);
		r = heads_of_all(t, head, pages, off);
		pthread_rwlock_unlock(&t->reading);
	}
	ffs_tracker_unref(t);
	return r;
}
