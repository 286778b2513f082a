/* Owns the descriptors that guest memory is read through: the files of its regions, pagemap.
 *
 * Threads: any, all at once; nothing changes after ffs_memory_open(). ffs_memory_read() is on the fault path:
 * no lock, no allocation, two system calls for up to 2 MiB, about 12 KiB of stack. It can wait for the VMM's
 * mmap lock (process_vm_readv) and for swap, never for a fault of the region itself: what pagemap does not
 * show is not touched.
 *
 * Entries of pagemap: Documentation/admin-guide/mm/pagemap.rst. A never-touched page that is write-protected
 * has a marker in its place (include/linux/swapops.h, PTE_MARKER_UFFD_WP: swap type 31, offset 1), which
 * pagemap shows as swapped. */
#include "guest/memory.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "guest/maps.h"

#define PAGE 4096ull
#define BATCH 512 /* pages looked up at once */
#define PM_PRESENT (1ull << 63)
#define PM_SWAP (1ull << 62)
#define PM_FRAME ((1ull << 55) - 1)
#define MARKER_WP (31ull | 1ull << 5)

struct ffs_memory {
	struct ffs_proc_id proc;
	struct ffs_geometry geo;
	int pagemap;
	int fd[FFS_MAX_REGIONS]; /* -1 for anonymous ones */
};

/* ---- opening ---- */

static bool is_file(int fd, const struct ffs_region *r)
{
	struct stat st;

	return fd >= 0 && fstat(fd, &st) == 0 && st.st_dev == r->dev && st.st_ino == r->ino;
}

/* By the mapping itself; that needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE. */
static int open_by_mapping(pid_t pid, const struct ffs_region *r)
{
	_cleanup_free_ struct ffs_vma *vma = NULL;
	unsigned n;
	char path[96];

	if (ffs_maps_read(pid, &vma, &n) < 0)
		return -1;
	for (unsigned i = 0; i < n; i++) {
		if (r->hva < vma[i].start || r->hva >= vma[i].end)
			continue;
		snprintf(path, sizeof(path), "/proc/%d/map_files/%" PRIx64 "-%" PRIx64, (int)pid,
			vma[i].start, vma[i].end);
		_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);

		return is_file(fd, r) ? ffs_steal_fd(&fd) : -1;
	}
	return -1;
}

static void closedirp(DIR **d)
{
	if (*d)
		closedir(*d);
}

/* By a descriptor of the VMM: QEMU keeps those of its backends. Only a file that stat says is the one is
 * opened at all. */
static int open_by_fd(pid_t pid, const struct ffs_region *r)
{
	char path[320];

	snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
	_cleanup_(closedirp) DIR *dir = opendir(path);

	for (struct dirent *e; dir && (e = readdir(dir)) != NULL;) {
		struct stat st;

		snprintf(path, sizeof(path), "/proc/%d/fd/%s", (int)pid, e->d_name);
		if (stat(path, &st) < 0 || st.st_dev != r->dev || st.st_ino != r->ino)
			continue;
		_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);

		if (is_file(fd, r))
			return ffs_steal_fd(&fd);
	}
	return -1;
}

static int open_region(struct ffs_memory *m, unsigned i, struct ffs_error *err)
{
	const struct ffs_region *r = &m->geo.regions[i];
	int e = FFS_FAULT("memory-open");

	if (e)
		return ffs_error_set(err, -e, "fault point memory-open");
	if (r->kind == FFS_REGION_ANONYMOUS)
		return 0;
	m->fd[i] = open_by_mapping(m->proc.pid, r);
	if (m->fd[i] < 0)
		m->fd[i] = open_by_fd(m->proc.pid, r);
	if (m->fd[i] >= 0)
		return 0;
	if (!ffs_proc_alive(m->proc))
		return ffs_error_set(err, ESRCH, "process %d has exited", (int)m->proc.pid);
	return ffs_error_set(err, EACCES,
		"the file behind RAM block %s of process %d can be opened neither through its mapping nor "
		"through its descriptors: run "
		"forkfs with CAP_SYS_ADMIN and CAP_SYS_PTRACE",
		r->name, (int)m->proc.pid);
}

int ffs_memory_open(struct ffs_proc_id proc, const struct ffs_geometry *geo, struct ffs_memory **out,
	struct ffs_error *err)
{
	char path[64];

	if (geo->n_regions > FFS_MAX_REGIONS)
		return ffs_error_set(err, EINVAL, "a geometry of %u regions", geo->n_regions);
	struct ffs_memory *m = calloc(1, sizeof(*m));

	if (!m)
		return ffs_error_set(err, ENOMEM, "no memory to describe guest memory");
	m->proc = proc;
	m->geo = *geo;
	for (unsigned i = 0; i < FFS_MAX_REGIONS; i++)
		m->fd[i] = -1;
	snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)proc.pid);
	m->pagemap = open(path, O_RDONLY | O_CLOEXEC);
	int r = m->pagemap < 0 ? ffs_error_errno(err, errno == ENOENT ? ESRCH : errno, "open %s", path) : 0;

	/* pagemap now belongs to that address space: if the process is still the right one, it is the right
	 * space */
	if (!r && !ffs_proc_alive(proc))
		r = ffs_error_set(err, ESRCH, "process %d has exited", (int)proc.pid);
	for (unsigned i = 0; !r && i < geo->n_regions; i++)
		r = open_region(m, i, err);
	if (r) {
		ffs_memory_close(m);
		return r;
	}
	*out = m;
	return 0;
}

void ffs_memory_close(struct ffs_memory *m)
{
	if (!m)
		return;
	for (unsigned i = 0; i < FFS_MAX_REGIONS; i++)
		ffs_close_fd(&m->fd[i]);
	ffs_close_fd(&m->pagemap);
	free(m);
}

/* ---- reading ---- */

static int read_file(int fd, void *buf, size_t len, uint64_t off, bool *zero)
{
	off_t data = lseek(fd, (off_t)off, SEEK_DATA);

	/* ENXIO: no data from here to the end of the file. Other errors (a file system without it) mean that
	 * reading decides. */
	*zero = (data < 0 && errno == ENXIO) || (data >= 0 && (uint64_t)data >= off + len);
	if (*zero) {
		/* also what lies behind the end of a truncated file, which is no zero page of the guest */
		struct stat st;

		if (data >= 0 || (fstat(fd, &st) == 0 && (uint64_t)st.st_size >= off + len))
			return 0;
		return -EFAULT;
	}
	ssize_t n = ffs_pread_full(fd, buf, len, off);

	if (n < 0)
		return (int)n;
	return (size_t)n == len ? 0 : -EFAULT;
}

static bool is_there(uint64_t entry)
{
	if (entry & PM_PRESENT)
		return true;
	return (entry & PM_SWAP) && (entry & PM_FRAME) != MARKER_WP;
}

/* pagemap entries of the pages first…first+n: -ESRCH when the address space is gone. */
static int look_up(struct ffs_memory *m, uint64_t first, unsigned n, uint64_t *entry)
{
	ssize_t got = ffs_pread_full(m->pagemap, entry, n * sizeof(*entry), first * sizeof(*entry));

	if (got < 0)
		return (int)got;
	return (size_t)got == n * sizeof(*entry) ? 0 : got == 0 ? -ESRCH : -EFAULT;
}

/* Up to BATCH pages of private memory. `buf` is filled only if something is there, unless `fill`. */
static int read_private(
	struct ffs_memory *m, unsigned i, uint64_t off, char *buf, size_t len, bool *zero, bool fill)
{
	const struct ffs_region *r = &m->geo.regions[i];
	uint64_t hva = r->hva + off, first = hva / PAGE;
	unsigned n = (unsigned)((hva + len - 1) / PAGE - first + 1);
	uint64_t entry[BATCH + 1];
	struct iovec local[BATCH / 2 + 1], remote[BATCH / 2 + 1];
	unsigned runs = 0;
	size_t want = 0;
	int e = look_up(m, first, n, entry);

	if (e)
		return e;
	*zero = true;
	for (unsigned p = 0; p < n && *zero; p++)
		*zero = !is_there(entry[p]);
	if (*zero && m->fd[i] >= 0) {
		e = read_file(m->fd[i], buf, len, r->file_offset + off, zero);
		if (!e && *zero && fill)
			memset(buf, 0, len);
		return e;
	}
	if (*zero) {
		if (fill)
			memset(buf, 0, len);
		return 0;
	}
	for (unsigned p = 0; p < n;) {
		bool there = is_there(entry[p]);
		uint64_t from = (first + p) * PAGE, to;

		while (p < n && is_there(entry[p]) == there)
			p++;
		to = (first + p) * PAGE;
		from = from < hva ? hva : from;
		to = to > hva + len ? hva + len : to;
		char *at = buf + (from - hva);

		if (there) {
			local[runs] = (struct iovec){.iov_base = at, .iov_len = to - from};
			remote[runs++] =
				(struct iovec){.iov_base = (void *)(uintptr_t)from, .iov_len = to - from};
			want += to - from;
		} else if (m->fd[i] < 0) {
			memset(at, 0, to - from);
		} else {
			ssize_t got =
				ffs_pread_full(m->fd[i], at, to - from, r->file_offset + (from - r->hva));

			if (got != (ssize_t)(to - from))
				return got < 0 ? (int)got : -EFAULT;
		}
	}
	ssize_t got = process_vm_readv(m->proc.pid, local, runs, remote, runs, 0);

	if (got == (ssize_t)want)
		return 0;
	if (got < 0 && errno != EFAULT)
		return -errno;
	/* unmapped, or gone in the middle of it */
	return look_up(m, first, 1, entry) == -ESRCH ? -ESRCH : -EFAULT;
}

int ffs_memory_read(struct ffs_memory *m, unsigned i, uint64_t off, void *buf, size_t len, bool *zero)
{
	uint64_t end;

	if (i >= m->geo.n_regions || ffs_add_overflow(off, len, &end) || end > m->geo.regions[i].size)
		return -EINVAL;
	int r = FFS_FAULT("memory-read");

	if (r)
		return r;
	*zero = true;
	if (m->geo.regions[i].kind == FFS_REGION_SHARED)
		return read_file(m->fd[i], buf, len, m->geo.regions[i].file_offset + off, zero);
	for (size_t done = 0; done < len;) {
		/* an unaligned start spans one page more than its length */
		size_t n = len - done < (BATCH * PAGE) ? len - done : BATCH * PAGE - (off + done) % PAGE;
		bool none;

		r = read_private(m, i, off + done, (char *)buf + done, n, &none, !*zero);
		if (r)
			return r;
		if (*zero && !none && done)
			memset(buf, 0, done);
		*zero &= none;
		done += n;
	}
	return 0;
}

/* ---- the beginnings of pages ---- */

/* Of pages that the VMM has not mapped, or not as its own: what its file has there, zeros in holes. */
static int heads_of_file(int fd, uint64_t off, uint64_t *head, size_t n)
{
	uint64_t end = off + n * PAGE, at = off;

	memset(head, 0, n * sizeof(*head));
	while (at < end) {
		off_t data = lseek(fd, (off_t)at, SEEK_DATA), hole;

		if (data < 0 && errno == ENXIO)
			break;
		if (data > (off_t)at)
			at = (uint64_t)data / PAGE * PAGE;
		hole = data < 0 ? -1 : lseek(fd, (off_t)at, SEEK_HOLE);
		for (uint64_t stop = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole; at < stop;
			at += PAGE) {
			ssize_t got = ffs_pread_full(fd, head + (at - off) / PAGE, sizeof(*head), at);

			if (got != (ssize_t)sizeof(*head))
				return got < 0 ? (int)got : -EFAULT;
		}
	}
	return 0;
}

/* Up to BATCH pages: those that are mapped by one system call, however few bytes it reads of each. */
static int read_heads(struct ffs_memory *m, unsigned i, uint64_t off, uint64_t *head, unsigned n)
{
	const struct ffs_region *r = &m->geo.regions[i];
	uint64_t first = (r->hva + off) / PAGE, entry[BATCH];
	struct iovec local[BATCH / 2 + 1], remote[BATCH];
	unsigned runs = 0, there = 0;
	int e = look_up(m, first, n, entry);

	for (unsigned p = 0; !e && p < n;) {
		unsigned from = p;

		while (p < n && is_there(entry[p])) {
			remote[there++] = (struct iovec){.iov_base = (void *)(uintptr_t)((first + p) * PAGE),
				.iov_len = sizeof(*head)};
			p++;
		}
		if (p > from)
			local[runs++] = (struct iovec){
				.iov_base = head + from, .iov_len = (p - from) * sizeof(*head)};
		from = p;
		while (p < n && !is_there(entry[p]))
			p++;
		if (p > from && m->fd[i] < 0)
			memset(head + from, 0, (p - from) * sizeof(*head));
		else if (p > from)
			e = heads_of_file(
				m->fd[i], r->file_offset + off + from * PAGE, head + from, p - from);
	}
	if (e || !there)
		return e;
	ssize_t got = process_vm_readv(m->proc.pid, local, runs, remote, there, 0);

	if (got == (ssize_t)(there * sizeof(*head)))
		return 0;
	if (got < 0 && errno != EFAULT)
		return -errno;
	return look_up(m, first, 1, entry) == -ESRCH ? -ESRCH : -EFAULT;
}

int ffs_memory_read_heads(struct ffs_memory *m, unsigned i, uint64_t off, uint64_t *head, size_t n)
{
	uint64_t len, end;
	int e = FFS_FAULT("memory-read");

	if (i >= m->geo.n_regions || off % PAGE || ffs_mul_overflow(n, PAGE, &len) ||
		ffs_add_overflow(off, len, &end) || end > m->geo.regions[i].size)
		return -EINVAL;
	for (size_t done = 0; !e && done < n; done += BATCH)
		e = read_heads(m, i, off + done * PAGE, head + done,
			n - done < BATCH ? (unsigned)(n - done) : BATCH);
	return e;
}

/* ---- checking ---- */

static const char *difference(const struct ffs_memory *m, unsigned i, const struct ffs_vma *vma, unsigned n)
{
	const struct ffs_region *r = &m->geo.regions[i];
	uint64_t at = r->hva, end = r->hva + r->size;
	struct stat st;

	for (unsigned v = 0; v < n && at < end; v++) {
		if (vma[v].end <= at)
			continue;
		if (vma[v].start > at)
			return "part of it is not mapped any more";
		if (vma[v].dev != r->dev || vma[v].ino != r->ino ||
			vma[v].shared != (r->kind == FFS_REGION_SHARED))
			return "something else is mapped there now";
		if (r->ino && vma[v].offset + (at - vma[v].start) != r->file_offset + (at - r->hva))
			return "another part of its file is mapped there now";
		if (!vma[v].write)
			return "it is no longer writable";
		at = vma[v].end;
	}
	if (at < end)
		return "part of it is not mapped any more";
	if (m->fd[i] >= 0 && (fstat(m->fd[i], &st) < 0 || (uint64_t)st.st_size < r->file_offset + r->size))
		return "its file was truncated";
	return NULL;
}

int ffs_memory_check(struct ffs_memory *m, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_vma *vma = NULL;
	unsigned n = 0;
	int r = FFS_FAULT("memory-check");

	if (r)
		return ffs_error_set(err, -r, "fault point memory-check");
	r = ffs_maps_read(m->proc.pid, &vma, &n);
	if (r == -ESRCH || (!r && !ffs_proc_alive(m->proc)))
		return ffs_error_set(err, ESRCH, "process %d has exited", (int)m->proc.pid);
	if (r)
		return ffs_error_errno(err, -r, "the mappings of process %d", (int)m->proc.pid);
	for (unsigned i = 0; i < m->geo.n_regions; i++) {
		const char *what = difference(m, i, vma, n);

		if (what)
			return ffs_error_set(err, ESTALE,
				"RAM block %s (at 0x%" PRIx64
				" of process %d) is not what it was when the VM was attached: %s",
				m->geo.regions[i].name, m->geo.regions[i].hva, (int)m->proc.pid, what);
	}
	return 0;
}
