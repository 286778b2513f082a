/* Owns the files that a branch's disks are captured into.
 *
 * Threads: the take's, then whoever reads. No locks. Inside the pause there is no allocation of ours and no
 * name is looked up: the files are there, the file system's ability is known. They have no name (O_TMPFILE),
 * so that they are gone with the last descriptor, whatever happens to the daemon. */
#include "disk/disks.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"

/* Between two beats. */
#define CLONE_SLICE (4ull << 30)
#define COPY_SLICE (4ull << 20)
/* What a clone must leave free: its blocks are shared until the guest writes, and then need room of their
 * own. */
#define CLONE_ROOM (64ull << 20)

/* A file in that directory that nobody can name. */
static int nameless(const char *dir)
{
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	char path[4200];

	if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT))
		return fd >= 0 ? fd : -errno;
	snprintf(path, sizeof(path), "%s/.forkfs-XXXXXX", dir);
	fd = mkostemp(path, O_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (unlink(path) < 0) {
		int e = errno;

		close(fd);
		return -e;
	}
	return fd;
}

/* Whether the file system shares blocks between these two: by doing it with the first block. */
static int shares_blocks(const struct ffs_disk *k, int target, const struct stat *st, bool *yes)
{
	struct file_clone_range one = {
		.src_fd = k->fd, .src_length = st->st_size < st->st_blksize ? 0 : (uint64_t)st->st_blksize};

	int r = FFS_FAULT("disk-clone-try");

	if (r == 0 && ioctl(target, FICLONERANGE, &one) < 0)
		r = -errno;
	*yes = r == 0;
	/* what it cannot do is one thing, a failure of the device another */
	return r == -EIO || r == -ENOSPC ? r : 0;
}

static int check_room(
	const struct ffs_disk *k, int target, const struct stat *st, bool cloned, struct ffs_error *err)
{
	struct statvfs vfs;
	uint64_t data = (uint64_t)st->st_blocks * 512, need = data;

	if (fstatvfs(target, &vfs) < 0)
		return ffs_error_errno(err, errno, "disk %s: the file system of %s", k->id, k->path);
	uint64_t free_bytes = (uint64_t)vfs.f_bavail * vfs.f_frsize;

	if (!cloned && data > FFS_DISK_COPY_MAX)
		return ffs_error_set(err, EFBIG,
			"disk %s has %" PRIu64
			" MiB of data on a file system that shares no blocks, and at most %" PRIu64
			" MiB are copied inside a pause: put the image on XFS or btrfs, where it is cloned",
			k->id, data >> 20, (uint64_t)FFS_DISK_COPY_MAX >> 20);
	if (cloned && need > CLONE_ROOM)
		need = CLONE_ROOM;
	if (FFS_FAULT("disk-room") < 0)
		free_bytes = 0;
	if (free_bytes < need)
		return ffs_error_set(err, ENOSPC,
			"disk %s: a %s needs %" PRIu64 " MiB on the file system of %s, and %" PRIu64
			" MiB are free",
			k->id, cloned ? "clone (the guest's next writes go to new blocks)" : "copy",
			(need + (1 << 20) - 1) >> 20, k->path, free_bytes >> 20);
	return 0;
}

static int prepare_one(const struct ffs_disk *k, struct ffs_disk_image *img, struct ffs_error *err)
{
	struct stat st;
	bool cloned = false;
	int r = FFS_FAULT("disk-prepare");

	if (r < 0)
		return ffs_error_errno(err, -r, "disk %s", k->id);
	snprintf(img->id, sizeof(img->id), "%s", k->id);
	img->path = strdup(k->path);
	if (!img->path)
		return ffs_error_set(err, ENOMEM, "no memory");
	img->target = nameless(k->dir);
	if (img->target < 0)
		return ffs_error_errno(err, -img->target,
			"disk %s: no file can be made in %s, where it lies and its capture has to", k->id,
			k->dir);
	if (fstat(k->fd, &st) < 0)
		return ffs_error_errno(err, errno, "disk %s: %s", k->id, k->path);
	r = shares_blocks(k, img->target, &st, &cloned);
	if (r < 0)
		return ffs_error_errno(err, -r, "disk %s: %s can't be cloned", k->id, k->path);
	img->copied = !cloned;
	return check_room(k, img->target, &st, cloned, err);
}

int ffs_disk_images_prepare(const struct ffs_disks *d, struct ffs_disk_images *out, struct ffs_error *err)
{
	*out = (struct ffs_disk_images){0};
	for (unsigned i = 0; i < d->n; i++) {
		out->image[i].target = out->image[i].fd = -1;
		out->n = i + 1;
		int r = prepare_one(&d->disk[i], &out->image[i], err);

		if (r < 0)
			return r;
	}
	return 0;
}

/* ---- inside the pause ---- */

struct pause {
	void (*beat)(void *arg);
	void *arg;
	uint64_t deadline_ns;
};

static bool late(const struct pause *p)
{
	if (p->beat)
		p->beat(p->arg);
	return ffs_now_ns() >= p->deadline_ns;
}

static int clone(int from, int to, uint64_t size, const struct pause *p)
{
	for (uint64_t off = 0; off < size; off += CLONE_SLICE) {
		/* the last one to the end, which needs no whole block */
		struct file_clone_range part = {.src_fd = from,
			.src_offset = off,
			.src_length = size - off > CLONE_SLICE ? CLONE_SLICE : 0,
			.dest_offset = off};

		if (ioctl(to, FICLONERANGE, &part) < 0)
			return -errno;
		if (late(p))
			return -ETIMEDOUT;
	}
	return 0;
}

static int copy_range(int from, int to, uint64_t off, uint64_t end, const struct pause *p)
{
	while (off < end) {
		off_t in = (off_t)off, out = (off_t)off;
		ssize_t n = copy_file_range(
			from, &in, to, &out, end - off < COPY_SLICE ? (size_t)(end - off) : COPY_SLICE, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO; /* shorter than it was: somebody truncates it while the guest stands
					still */
		off += (uint64_t)n;
		if (late(p))
			return -ETIMEDOUT;
	}
	return 0;
}

/* Holes stay holes. */
static int copy(int from, int to, uint64_t size, const struct pause *p)
{
	uint64_t off = 0;

	while (off < size) {
		off_t data = lseek(from, (off_t)off, SEEK_DATA);

		if (data < 0 && errno == ENXIO)
			break;
		off_t hole = data < 0 ? -1 : lseek(from, data, SEEK_HOLE);

		if (hole < 0)
			return -errno;
		off = (uint64_t)hole < size ? (uint64_t)hole : size;
		int r = copy_range(from, to, (uint64_t)data, off, p);

		if (r < 0)
			return r;
	}
	return ftruncate(to, (off_t)size) < 0 ? -errno : 0;
}

static int capture_one(
	const struct ffs_disk *k, struct ffs_disk_image *img, const struct pause *p, struct ffs_error *err)
{
	uint64_t start = ffs_now_ns();
	struct stat st;
	int r = FFS_FAULT("disk-capture");

	if (r == 0 && fstat(k->fd, &st) < 0)
		r = -errno;
	if (r == 0) {
		img->size = (uint64_t)st.st_size;
		/* the block that was tried stays only if the file has one there now */
		r = img->copied ? copy(k->fd, img->target, img->size, p)
				: clone(k->fd, img->target, img->size, p);
	}
	if (r == 0 && ftruncate(img->target, (off_t)img->size) < 0)
		r = -errno;
	img->capture_ns = ffs_now_ns() - start;
	if (r == -ETIMEDOUT)
		return ffs_error_set(err, ETIMEDOUT,
			"disk %s took longer than the longest pause (2 s): put the image on XFS or btrfs, "
			"where it is cloned",
			k->id);
	return r < 0 ? ffs_error_errno(err, -r, "disk %s: %s", k->id, k->path) : 0;
}

int ffs_disk_images_capture(const struct ffs_disks *d, struct ffs_disk_images *images,
	void (*beat)(void *arg), void *arg, uint64_t deadline_ns, struct ffs_error *err)
{
	const struct pause p = {.beat = beat, .arg = arg, .deadline_ns = deadline_ns};
	int r = 0;

	for (unsigned i = 0; r == 0 && i < images->n; i++)
		r = capture_one(&d->disk[i], &images->image[i], &p, err);
	return r;
}

int ffs_disk_images_seal(struct ffs_disk_images *images, struct ffs_error *err)
{
	for (unsigned i = 0; i < images->n; i++) {
		struct ffs_disk_image *img = &images->image[i];
		char path[40];
		int r = FFS_FAULT("disk-seal");

		snprintf(path, sizeof(path), "/proc/self/fd/%d", img->target);
		if (r == 0) {
			img->fd = open(path, O_RDONLY | O_CLOEXEC);
			r = img->fd < 0 ? -errno : 0;
		}
		if (r == 0 && fchmod(img->fd, 0400) < 0)
			r = -errno;
		if (r < 0)
			return ffs_error_errno(
				err, -r, "disk %s: its capture can't be made read-only", img->id);
		ffs_close_fd(&img->target);
	}
	return 0;
}

void ffs_disk_images_close(struct ffs_disk_images *images)
{
	for (unsigned i = 0; i < images->n; i++) {
		ffs_close_fd(&images->image[i].target);
		ffs_close_fd(&images->image[i].fd);
		free(images->image[i].path);
	}
	images->n = 0;
}
