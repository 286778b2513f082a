/* Owns nothing. Any thread, no locks; the process runs on meanwhile, so it is what it had touched at some moment of the call.
 * Waits for nothing but the process's own changes to its mappings. */
#include "guest/touched.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"
#include "guest/maps.h"

#define PAGE 4096ull
#define RANGES 512u
/* proc_pid_pagemap(5): bits of an entry */
#define ENTRY_SWAPPED (1ull << 62)
#define ENTRY_PRESENT (1ull << 63)

struct target {
	int pagemap;
	const struct ffs_vma *vma;
	uint64_t size, unit, *map;
};

/* From `start` to `end`, addresses within the mapping. */
static void mark(const struct target *t, uint64_t start, uint64_t end)
{
	uint64_t from = t->vma->offset + (start - t->vma->start), to = t->vma->offset + (end - t->vma->start);

	if (to > t->size)
		to = t->size;
	for (uint64_t off = from / t->unit * t->unit; off < to; off += t->unit)
		ffs_bit_set(t->map, off / t->unit);
}

/* -ENOTTY: the kernel cannot. */
static int scan(const struct target *t)
{
	struct ffs_page_region range[RANGES];
	const uint64_t touched = FFS_PAGE_IS_PRESENT | FFS_PAGE_IS_SWAPPED;
	int r = FFS_FAULT("pagemap-scan");

	for (uint64_t at = t->vma->start; !r && at < t->vma->end;) {
		struct ffs_pm_scan_arg a = {.size = sizeof(a),
			.start = at,
			.end = t->vma->end,
			.vec = (uintptr_t)range,
			.vec_len = RANGES,
			.category_anyof_mask = touched,
			.return_mask = touched};
		int n = ioctl(t->pagemap, FFS_PAGEMAP_SCAN, &a);

		if (n < 0)
			return -errno;
		for (int i = 0; i < n; i++)
			mark(t, range[i].start, range[i].end);
		if (a.walk_end <= at)
			return -EPROTO;
		at = a.walk_end;
	}
	return r;
}

/* The same page by page, where the kernel is older than 6.7. */
static int read_entries(const struct target *t)
{
	uint64_t entry[RANGES];

	for (uint64_t at = t->vma->start; at < t->vma->end;) {
		uint64_t want = (t->vma->end - at) / PAGE;
		size_t n = want < RANGES ? (size_t)want : RANGES;
		ssize_t got =
			ffs_pread_full(t->pagemap, entry, n * sizeof(*entry), at / PAGE * sizeof(*entry));

		if (got <= 0)
			return got < 0 ? (int)got : -ESRCH;
		n = (size_t)got / sizeof(*entry);
		for (size_t i = 0; i < n; i++)
			if (entry[i] & (ENTRY_PRESENT | ENTRY_SWAPPED))
				mark(t, at + i * PAGE, at + (i + 1) * PAGE);
		at += n * PAGE;
	}
	return 0;
}

int ffs_touched_read(pid_t pid, uint64_t dev, uint64_t ino, uint64_t size, uint64_t unit, uint64_t *map,
	struct ffs_error *err)
{
	_cleanup_free_ struct ffs_vma *vma = NULL;
	struct target t = {.size = size, .unit = unit, .map = map};
	unsigned n = 0, found = 0;
	char path[40];
	int r = ffs_maps_read(pid, &vma, &n);

	if (r < 0)
		return ffs_error_errno(err, -r, "the mappings of process %d", (int)pid);
	snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)pid);
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return ffs_error_errno(err, errno == ENOENT ? ESRCH : errno, "%s", path);
	t.pagemap = fd;
	for (unsigned i = 0; !r && i < n; i++) {
		if (vma[i].dev != dev || vma[i].ino != ino)
			continue;
		t.vma = &vma[i];
		found++;
		r = scan(&t);
		if (r == -ENOTTY)
			r = read_entries(&t);
	}
	if (r < 0)
		return ffs_error_errno(err, -r, "%s", path);
	return found ? 0 : ffs_error_set(err, ENOENT, "process %d has not mapped the file", (int)pid);
}
