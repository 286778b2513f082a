/* Owns nothing: puts pages of a branch into the memory of a VMM, through its userfaultfd.
 *
 * Threads: the child's own. No locks, no allocation. What reading memory.bin waits for (a page that is being
 * captured) it waits for. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"
#include "pager/internal.h"
#include "uffd/uffd.h"

#define PAGE 4096u

static const struct ffs_region *region_at(const struct ffs_child *c, uint64_t off)
{
	for (unsigned i = 0; i < c->geo.n_regions; i++) {
		const struct ffs_region *r = &c->geo.regions[i];

		if (off >= r->offset && off - r->offset < r->size)
			return r;
	}
	return NULL;
}

/* `len` bytes from c->buf, or zeros. Pages that are there already stay. */
static int put(struct ffs_child *c, uint64_t hva, uint64_t len, uint64_t page, bool zero)
{
	uint64_t at = 0;

	while (at < len) {
		struct uffdio_copy copy = {
			.dst = hva + at, .src = (uint64_t)(uintptr_t)c->buf + at, .len = len - at};
		struct uffdio_zeropage zeros = {.range = {.start = hva + at, .len = len - at}};
		int r = zero ? ioctl(c->uffd, UFFDIO_ZEROPAGE, &zeros) : ioctl(c->uffd, UFFDIO_COPY, &copy);
		int64_t n = zero ? zeros.zeropage : copy.copy;
		int code = r < 0 ? errno : 0;

		if (r == 0)
			return 0;
		if (n > 0) {
			at += (uint64_t)n;
		} else if (code == EEXIST) {
			/* who has waited for it since before it was put there */
			r = ffs_uffd_wake(c->uffd, hva + at, page);
			if (r < 0)
				return r;
			at += page;
		} else if (code != EINTR) {
			return -code;
		}
	}
	return 0;
}

/* One run of pages, all in one region. */
static int put_run(
	struct ffs_child *c, const struct ffs_region *reg, uint64_t off, uint64_t len, struct ffs_error *err)
{
	uint64_t hva = reg->hva + (off - reg->offset);
	int r = FFS_FAULT("pager-read");
	ssize_t n = r ? r : ffs_pread_full(c->memory, c->buf, len, off);

	if (n != (ssize_t)len)
		return ffs_error_set(err, n < 0 ? (int)-n : EIO,
			"the branch cannot be read at offset %" PRIu64 ": %s", off,
			n < 0 ? strerror((int)-n) : "it ends there");
	bool zero = reg->page_size == PAGE && ffs_is_zero(c->buf, len);

	r = put(c, hva, len, reg->page_size, zero);
	if (r == -EAGAIN || r == -ESRCH)
		return r;
	/* unmapped meanwhile by a VMM that did not ask for events about it: nobody reads there */
	if (r == -ENOENT)
		r = 0;
	if (r < 0)
		return ffs_error_errno(
			err, -r, "cannot put %" PRIu64 " bytes at 0x%" PRIx64 " of the VMM", len, hva);
	for (uint64_t i = off / PAGE; i < (off + len) / PAGE; i++)
		ffs_bit_set(c->done, i);
	c->served += len;
	return 0;
}

int ffs_child_put(struct ffs_child *c, uint64_t off, uint64_t len, struct ffs_error *err)
{
	const struct ffs_region *reg = region_at(c, off);

	if (!reg)
		return 0;
	uint64_t end = off + len, last = reg->offset + reg->size;

	if (end > last)
		end = last;
	while (off < end) {
		uint64_t n = 0;

		while (off + n < end && n < c->buf_size && !ffs_bit(c->done, (off + n) / PAGE) &&
			!ffs_bit(c->gone, (off + n) / PAGE))
			n += reg->page_size;
		if (n) {
			int r = put_run(c, reg, off, n, err);

			if (r < 0)
				return r;
		}
		off += n ? n : reg->page_size;
	}
	return 0;
}

/* A page that was there, or was discarded: it has become a hole, which reads as zeros. */
static int put_zeros(struct ffs_child *c, const struct ffs_region *reg, uint64_t hva, struct ffs_error *err)
{
	bool huge = reg->page_size != PAGE;

	if (huge) /* the kernel has no zero page of that size */
		memset(c->buf, 0, reg->page_size);
	int r = put(c, hva, reg->page_size, reg->page_size, !huge);

	if (r == 0 || r == -EAGAIN || r == -ESRCH || r == -ENOENT)
		return r == -ENOENT ? 0 : r;
	return ffs_error_errno(err, -r, "cannot put zeros at 0x%" PRIx64 " of the VMM", hva);
}

int ffs_child_fault(struct ffs_child *c, uint64_t hva, struct ffs_error *err)
{
	const struct ffs_region *reg = NULL;

	for (unsigned i = 0; i < c->geo.n_regions && !reg; i++)
		if (hva >= c->geo.regions[i].hva && hva - c->geo.regions[i].hva < c->geo.regions[i].size)
			reg = &c->geo.regions[i];
	if (!reg)
		return ffs_error_set(
			err, EFAULT, "the VMM waits for memory at 0x%" PRIx64 ", which it did not name", hva);
	hva &= ~(reg->page_size - 1);
	uint64_t off = reg->offset + (hva - reg->hva), cluster = off & ~(uint64_t)(c->buf_size - 1),
		 len = c->buf_size;

	c->faults++;
	if (ffs_bit(c->done, off / PAGE) || ffs_bit(c->gone, off / PAGE))
		return put_zeros(c, reg, hva, err);
	if (cluster < reg->offset) {
		len -= reg->offset - cluster;
		cluster = reg->offset;
	}
	for (uint64_t i = off / FFS_PAGER_CLUSTER; i <= (off + reg->page_size - 1) / FFS_PAGER_CLUSTER; i++)
		atomic_fetch_or_explicit(&c->touched[i / 64], 1ull << (i % 64), memory_order_relaxed);
	return ffs_child_put(c, cluster, len, err);
}

void ffs_child_discard(struct ffs_child *c, uint64_t start, uint64_t end)
{
	for (unsigned i = 0; i < c->geo.n_regions; i++) {
		const struct ffs_region *r = &c->geo.regions[i];
		uint64_t from = start > r->hva ? start : r->hva,
			 to = end < r->hva + r->size ? end : r->hva + r->size;

		for (uint64_t a = from & ~(uint64_t)(PAGE - 1); a < to; a += PAGE)
			ffs_bit_set(c->gone, (r->offset + (a - r->hva)) / PAGE);
	}
}

bool ffs_child_is_changing(struct ffs_child *c)
{
	/* the kernel looks at that first; afterwards it finds nothing registered */
	struct uffdio_zeropage zeros = {
		.range = {.start = c->geo.regions[0].hva, .len = c->geo.regions[0].page_size}};

	return ioctl(c->uffd, UFFDIO_ZEROPAGE, &zeros) < 0 && errno == EAGAIN;
}
