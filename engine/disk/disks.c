/* Owns the disks that were named at attach: finding out that they are what the VMM has open, and writing back
 * their page cache before a pause.
 *
 * Threads: attach opens, takes use; nothing changes in between. No locks. /proc/PID/fd of the VMM is looked
 * at with statx(2) and AT_STATX_DONT_SYNC, which asks no file system: one of the files could be our own
 * mount's. */
#include "disk/disks.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/cancel.h"
#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"

#define FLUSH_SLICE (16ull << 20)
#define FLUSH_ROUNDS 8u
#define FLUSHED_PAGES                                                                                        \
	64u /* writing these back inside the pause costs less than another round does outside  \
			   */

/* ---- whose file it is ---- */

static int look(int dirfd, const char *path, struct statx *st)
{
	/* type and inode do not change, so what the kernel has is right */
	if (statx(dirfd, path, AT_STATX_DONT_SYNC | (*path ? 0 : AT_EMPTY_PATH),
		    STATX_TYPE | STATX_INO | STATX_MODE, st) < 0)
		return -errno;
	return 0;
}

/* The access mode that a descriptor of another process was opened with; -errno. */
static int access_mode(pid_t pid, const char *fd)
{
	_cleanup_free_ char *text = NULL;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/fdinfo/%.16s", (int)pid, fd);
	int r = ffs_read_file(path, 65536, &text, NULL);

	if (r < 0)
		return r;
	const char *flags = strstr(text, "flags:");

	return flags ? (int)(strtoul(flags + 6, NULL, 8) & O_ACCMODE) : -EPROTO;
}

/* Whether the process has that very file open: -ENOENT, or 0 and *written. */
static int find_open(pid_t pid, const struct statx *file, bool *written)
{
	char dir[40], path[64];
	int r = -ENOENT;

	snprintf(dir, sizeof(dir), "/proc/%d/fd", (int)pid);
	DIR *d = opendir(dir);

	if (!d)
		return -errno;
	*written = false;
	for (struct dirent *e; (e = readdir(d));) {
		struct statx st;

		snprintf(path, sizeof(path), "%s/%.16s", dir, e->d_name);
		if (e->d_name[0] == '.' || look(AT_FDCWD, path, &st) < 0 || st.stx_ino != file->stx_ino ||
			st.stx_dev_major != file->stx_dev_major || st.stx_dev_minor != file->stx_dev_minor)
			continue;
		int mode = access_mode(pid, e->d_name);

		if (mode < 0)
			continue; /* closed meanwhile */
		r = 0;
		*written |= mode != O_RDONLY;
	}
	closedir(d);
	return r;
}

static int not_open(const struct ffs_disk *k, pid_t vmm, int r, struct ffs_error *err)
{
	if (r != -ENOENT)
		return ffs_error_errno(err, -r, "the open files of the VMM %d", (int)vmm);
	return ffs_error_set(err, EBUSY,
		"disk %s: the VMM %d does not have %s open: name the file that it writes now (query-block in "
		"its monitor "
		"says which), by a path on this machine",
		k->id, (int)vmm, k->path);
}

int ffs_disks_check(const struct ffs_disks *d, pid_t vmm, struct ffs_error *err)
{
	for (unsigned i = 0; d && i < d->n; i++) {
		struct statx st;
		bool written;
		int r = look(d->disk[i].fd, "", &st);

		if (r == 0)
			r = find_open(vmm, &st, &written);
		if (r < 0)
			return not_open(&d->disk[i], vmm, r, err);
		if (d->disk[i].written && !written)
			return ffs_error_set(err, EBUSY,
				"disk %s: the VMM writes %s no longer, it has gone on to another file (an "
				"external snapshot?): "
				"detach, and attach with that one",
				d->disk[i].id, d->disk[i].path);
	}
	return 0;
}

/* ---- opening ---- */

static int open_one(struct ffs_disk *k, dev_t own_dev, struct statx *st, struct ffs_error *err)
{
	_cleanup_close_ int at = open(k->path, O_PATH | O_CLOEXEC);
	char self[40], real[PATH_MAX];

	if (at < 0)
		return ffs_error_errno(err, errno, "disk %s: %s", k->id, k->path);
	int r = look(at, "", st);

	if (r < 0)
		return ffs_error_errno(err, -r, "disk %s: %s", k->id, k->path);
	/* before anything that the file system would be asked for */
	if (own_dev && makedev(st->stx_dev_major, st->stx_dev_minor) == own_dev)
		return ffs_error_set(err, EDEADLK, "disk %s: %s is a file of this mount", k->id, k->path);
	if (!S_ISREG(st->stx_mode))
		return ffs_error_set(err, ENOTSUP,
			"disk %s: %s is no regular file: only image files can be captured", k->id, k->path);
	snprintf(self, sizeof(self), "/proc/self/fd/%d", at);
	k->fd = open(self, O_RDONLY | O_CLOEXEC);
	if (k->fd < 0)
		return ffs_error_errno(err, errno, "disk %s: %s", k->id, k->path);
	ssize_t n = readlink(self, real, sizeof(real) - 1);
	char *slash = n > 0 ? memrchr(real, '/', (size_t)n) : NULL;

	if (!slash)
		return ffs_error_set(err, EIO, "disk %s: the directory of %s is not known", k->id, k->path);
	real[slash == real ? 1 : slash - real] = '\0';
	k->dir = strdup(real);
	return k->dir ? 0 : ffs_error_set(err, ENOMEM, "no memory");
}

int ffs_disks_open(pid_t vmm, const struct ffs_disk_name *names, unsigned n, dev_t own_dev,
	struct ffs_disks **out, struct ffs_error *err)
{
	struct ffs_disks *d;
	int r = 0;

	*out = NULL;
	if (!n)
		return 0;
	if (n > FFS_MAX_DISKS)
		return ffs_error_set(err, EINVAL, "at most %d disks can be named", FFS_MAX_DISKS);
	d = calloc(1, sizeof(*d));
	if (!d)
		return ffs_error_set(err, ENOMEM, "no memory");
	for (unsigned i = 0; i < n; i++)
		d->disk[i].fd = -1;
	for (; !r && d->n < n; d->n++) {
		struct ffs_disk *k = &d->disk[d->n];
		struct statx st;

		r = ffs_check_name("disk", names[d->n].id, err);
		if (r < 0)
			break;
		snprintf(k->id, sizeof(k->id), "%s", names[d->n].id);
		for (unsigned i = 0; !r && i < d->n; i++)
			if (strcmp(d->disk[i].id, k->id) == 0)
				r = ffs_error_set(err, EINVAL, "disk %s is named twice", k->id);
		k->path = strdup(names[d->n].path);
		if (!r && !k->path)
			r = ffs_error_set(err, ENOMEM, "no memory");
		if (!r)
			r = open_one(k, own_dev, &st, err);
		if (!r) {
			r = find_open(vmm, &st, &k->written);
			if (r < 0)
				r = not_open(k, vmm, r, err);
		}
	}
	if (r < 0)
		ffs_disks_free(d);
	else
		*out = d;
	return r;
}

void ffs_disks_free(struct ffs_disks *d)
{
	for (unsigned i = 0; d && i < FFS_MAX_DISKS; i++) {
		if (d->disk[i].path)
			ffs_close_fd(&d->disk[i].fd);
		free(d->disk[i].path);
		free(d->disk[i].dir);
	}
	free(d);
}

/* ---- writing back ---- */

/* Pages that are dirty or on their way; UINT64_MAX where the kernel does not say (before 6.5). */
static uint64_t unwritten(const struct ffs_disks *d)
{
	struct ffs_cachestat_range all = {0};
	uint64_t sum = 0;

	for (unsigned i = 0; i < d->n; i++) {
		struct ffs_cachestat cs;

		if (syscall(FFS_SYS_CACHESTAT, d->disk[i].fd, &all, &cs, 0) < 0)
			return UINT64_MAX;
		sum += cs.nr_dirty + cs.nr_writeback;
	}
	return sum;
}

static int flush_one(
	const struct ffs_disk *k, struct ffs_cancel *cancel, uint64_t deadline_ns, struct ffs_error *err)
{
	struct stat st;
	int r = FFS_FAULT("disk-flush");

	if (r == 0 && fstat(k->fd, &st) < 0)
		r = -errno;
	/* in slices, so that a deadline is kept however much is dirty */
	for (uint64_t off = 0; r == 0 && off < (uint64_t)st.st_size; off += FLUSH_SLICE) {
		if (ffs_cancel_is_set(cancel))
			return ffs_error_set(
				err, EINTR, "interrupted before the pause; the guest was not stopped");
		if (ffs_now_ns() >= deadline_ns)
			return ffs_error_set(err, EAGAIN,
				"disk %s has more unwritten data in the page cache than could be written in "
				"time; the guest was not "
				"stopped: take the branch through ctl, which waits longer",
				k->id);
		if (sync_file_range(k->fd, (off_t)off, (off_t)FLUSH_SLICE,
			    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
				    SYNC_FILE_RANGE_WAIT_AFTER) < 0)
			r = -errno;
	}
	return r < 0 ? ffs_error_errno(err, -r, "writing back the page cache of disk %s", k->id) : 0;
}

int ffs_disks_flush(const struct ffs_disks *d, struct ffs_cancel *cancel, uint64_t deadline_ns,
	struct ffs_disk_images *images, struct ffs_error *err)
{
	uint64_t start = ffs_now_ns(), before = UINT64_MAX;
	int r = 0;

	for (unsigned round = 0; r == 0 && round < FLUSH_ROUNDS; round++) {
		uint64_t left = FFS_FAULT("disk-dirty") < 0 ? UINT64_MAX : unwritten(d);

		if (left <= FLUSHED_PAGES || (round > 0 && left > before / 4 * 3))
			break;
		before = left;
		for (unsigned i = 0; r == 0 && i < d->n; i++)
			r = flush_one(&d->disk[i], cancel, deadline_ns, err);
		images->flush_rounds++;
		if (left == UINT64_MAX && round == 1)
			break; /* not told how much: two rounds */
	}
	images->flush_ns += ffs_now_ns() - start;
	return r;
}
