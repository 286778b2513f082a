/* Owns overlays: a few pages, sorted by offset, that lie over a branch's memory.
 *
 * Threads: the references are atomic; whoever changes an overlay is its only user then. No locks, no I/O. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "mailbox/mailbox.h"

struct page {
	uint64_t offset;
	uint8_t bytes[FFS_MAILBOX_PAGE];
};

struct ffs_overlay {
	atomic_uint refs;
	unsigned n;
	struct page **page;
};

struct ffs_overlay *ffs_overlay_new(void)
{
	struct ffs_overlay *o = calloc(1, sizeof(*o));

	if (o)
		atomic_init(&o->refs, 1);
	return o;
}

struct ffs_overlay *ffs_overlay_ref(struct ffs_overlay *o)
{
	atomic_fetch_add_explicit(&o->refs, 1, memory_order_relaxed);
	return o;
}

void ffs_overlay_unref(struct ffs_overlay *o)
{
	if (!o || atomic_fetch_sub_explicit(&o->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (unsigned i = 0; i < o->n; i++)
		free(o->page[i]);
	free(o->page);
	free(o);
}

struct ffs_overlay *ffs_overlay_copy(const struct ffs_overlay *o)
{
	struct ffs_overlay *copy = ffs_overlay_new();

	for (unsigned i = 0; copy && i < o->n; i++)
		if (ffs_overlay_set(copy, o->page[i]->offset, o->page[i]->bytes) < 0) {
			ffs_overlay_unref(copy);
			copy = NULL;
		}
	return copy;
}

/* The first page at or behind an offset. */
static unsigned place_of(const struct ffs_overlay *o, uint64_t offset)
{
	unsigned low = 0, high = o->n;

	while (low < high) {
		unsigned mid = (low + high) / 2;

		if (o->page[mid]->offset < offset)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

int ffs_overlay_set(struct ffs_overlay *o, uint64_t offset, const void *bytes)
{
	unsigned at = place_of(o, offset);

	if (offset % FFS_MAILBOX_PAGE)
		return -EINVAL;
	if (at < o->n && o->page[at]->offset == offset) {
		memcpy(o->page[at]->bytes, bytes, FFS_MAILBOX_PAGE);
		return 0;
	}
	struct page *page = malloc(sizeof(*page)), **more = realloc(o->page, (o->n + 1) * sizeof(*more));

	if (more)
		o->page = more;
	if (!page || !more) {
		free(page);
		return -ENOMEM;
	}
	page->offset = offset;
	memcpy(page->bytes, bytes, FFS_MAILBOX_PAGE);
	memmove(o->page + at + 1, o->page + at, (o->n - at) * sizeof(*o->page));
	o->page[at] = page;
	o->n++;
	return 0;
}

void ffs_overlay_remove(struct ffs_overlay *o, uint64_t offset)
{
	unsigned at = place_of(o, offset);

	if (at == o->n || o->page[at]->offset != offset)
		return;
	free(o->page[at]);
	o->n--;
	memmove(o->page + at, o->page + at + 1, (o->n - at) * sizeof(*o->page));
}

unsigned ffs_overlay_pages(const struct ffs_overlay *o)
{
	return o ? o->n : 0;
}

const void *ffs_overlay_page(const struct ffs_overlay *o, unsigned i, uint64_t *offset)
{
	*offset = o->page[i]->offset;
	return o->page[i]->bytes;
}

void ffs_overlay_apply(const struct ffs_overlay *o, void *buf, size_t len, uint64_t off)
{
	if (!o || !o->n)
		return;
	uint64_t first = off - off % FFS_MAILBOX_PAGE;

	for (unsigned i = place_of(o, first); i < o->n && o->page[i]->offset < off + len; i++) {
		uint64_t page = o->page[i]->offset, from = page > off ? page : off;
		uint64_t to = page + FFS_MAILBOX_PAGE < off + len ? page + FFS_MAILBOX_PAGE : off + len;

		memcpy((char *)buf + (from - off), o->page[i]->bytes + (from - page), (size_t)(to - from));
	}
}
