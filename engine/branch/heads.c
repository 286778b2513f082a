/* Reads the beginnings of a branch's pages without capturing them: a search of a branch in flight need not wait for
 * its capture, nor be it.
 *
 * Threads: any. Locks: tracker->reading, as readers of branches hold it; no cluster lock. A page that the branch
 * still needs is protected and as it was at the instant: what was read of it is good when it is still needed
 * *after* the read, since it is captured before the guest may write it (capture.c), and when the watchdog, which
 * lets the guest write without that, has not revoked by then. Everything else is in the image. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "branch/internal.h"

#define PAGE 4096ull
#define BATCH 256u /* pages */

/* What is looked at after it is looked at later than what was read before it. On x86-64 no instruction; ThreadSanitizer knows no
 * fences, and needs none: the bytes are another process's. */
static void then_look(void)
{
#ifdef __SANITIZE_THREAD__
	atomic_signal_fence(memory_order_acquire);
#else
	atomic_thread_fence(memory_order_acquire);
#endif
}

static bool needed(const struct ffs_branch *b, unsigned region, uint64_t off)
{
	const struct ffs_pages_region *r = &b->tracker->pages->r[region];
	ffs_mask m = atomic_load_explicit(&b->need[region][off / r->cluster_bytes], memory_order_acquire);

	return m >> (off % r->cluster_bytes / r->page_size) & 1;
}

/* Of up to BATCH pages, by whole pages: what is the parent's is not in the image. */
static int from_image(struct ffs_branch *b, uint64_t off, uint64_t *head, unsigned n, char *buf)
{
	ssize_t got = ffs_branch_read_memory(b, buf, n * PAGE, off);

	if (got != (ssize_t)(n * PAGE))
		return got < 0 ? (int)got : -EIO;
	for (unsigned i = 0; i < n; i++)
		memcpy(&head[i], buf + i * PAGE, sizeof(*head));
	return 0;
}

/* Up to BATCH pages of a region of the guest; those that were not good are told by bits of *bad. */
static int from_guest(
	struct ffs_branch *b, unsigned region, uint64_t off, uint64_t *head, unsigned n, bool *bad)
{
	struct ffs_tracker *t = b->tracker;
	bool any = false;
	int e = 0;

	for (unsigned i = 0; i < n; i++)
		any |= !(bad[i] = !needed(b, region, off + i * PAGE));
	if (!any)
		return 0;
	e = ffs_memory_read_heads(t->memory, region, off, head, n);
	then_look();
	if (e == 0 && ffs_tracker_revoked(t))
		e = -ETIMEDOUT;
	for (unsigned i = 0; i < n; i++)
		bad[i] = e < 0 || !needed(b, region, off + i * PAGE);
	return 0;
}

static int of_region(
	struct ffs_branch *b, unsigned region, uint64_t off, uint64_t *head, size_t pages, char *buf)
{
	uint64_t begin = b->tracker->pages->r[region].offset;
	bool bad[BATCH];
	int e = 0;

	for (size_t done = 0; e == 0 && done < pages; done += BATCH) {
		unsigned n = pages - done < BATCH ? (unsigned)(pages - done) : BATCH;
		uint64_t at = off + done * PAGE;

		pthread_rwlock_rdlock(&b->tracker->reading);
		if (b->tracker->memory)
			e = from_guest(b, region, at, head + done, n, bad);
		else
			e = -EIO; /* the VM was let go: what was in flight has failed */
		pthread_rwlock_unlock(&b->tracker->reading);
		for (unsigned i = 0; e == 0 && i < n;) {
			unsigned from = i;

			while (i < n && bad[i])
				i++;
			if (i > from)
				e = from_image(
					b, begin + at + from * PAGE, head + done + from, i - from, buf);
			i += i == from;
		}
	}
	return e;
}

int ffs_branch_read_heads(struct ffs_branch *b, uint64_t *head, size_t pages, uint64_t off)
{
	_cleanup_free_ char *buf = malloc(BATCH * PAGE);
	bool writing = ffs_branch_state(b) == FFS_BRANCH_WRITING;
	uint64_t end = off + pages * PAGE;
	int e = 0;

	if (off % PAGE || off > b->image.size || pages > (b->image.size - off) / PAGE)
		return -EINVAL;
	if (!buf)
		return -ENOMEM;
	for (unsigned i = 0; writing && e == 0 && i < b->tracker->pages->n; i++) {
		const struct ffs_pages_region *r = &b->tracker->pages->r[i];
		uint64_t from = off > r->offset ? off : r->offset,
			 to = end < r->offset + r->size ? end : r->offset + r->size;

		if (from < to)
			e = of_region(b, i, from - r->offset, head + (from - off) / PAGE,
				(size_t)((to - from) / PAGE), buf);
	}
	for (size_t done = 0; !writing && e == 0 && done < pages; done += BATCH)
		e = from_image(b, off + done * PAGE, head + done,
			pages - done < BATCH ? (unsigned)(pages - done) : BATCH, buf);
	return ffs_branch_failed(b) ? -EIO : e;
}
