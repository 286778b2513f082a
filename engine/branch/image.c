/* Owns the memory of a branch. Threads: any, each writing its own pages. One lock, around each
 * write; never blocks on a disk (it is all shmem).
 *
 * Making the pages of a file in memory, one by one, is most of what a capture costs: 2.3 GB/s a thread, where
 * pages of 2 MiB give 5.4. A memfd has them only if the host says so (shmem_enabled, which is its owner's
 * business); a tmpfs says it for itself. So an image is a file in a tmpfs of its own, in no mount namespace.
 * Such a file cannot have seals. Instead its mount becomes read-only, which also stops who opens it anew
 * (/proc/PID/fd, map_files, FUSE passthrough): there is no other way to that file system. Without the
 * privilege to mount, the image is a sealed memfd. */
#include "branch/image.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/tmpfs.h"
#include "base/util.h"

#define NAME "forkfs-image"
#define PAGE 4096u
#define WRITE_BYTES 65536u
/* How long somebody may hold a descriptor of an image that is to be sealed. */
#define HELD_NS (5 * FFS_NS_PER_S)

static pthread_once_t probed = PTHREAD_ONCE_INIT;
static bool own_tmpfs; /* set once, by the probe */

void ffs_image_init(struct ffs_image *img)
{
	pthread_mutexattr_t attr;

	*img = (struct ffs_image){.fd = -1, .wfd = -1, .mount = -1};
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(&img->writing, &attr);
	pthread_mutexattr_destroy(&attr);
}

/* ---- a tmpfs of its own ---- */

static int open_in_tmpfs(struct ffs_image *img)
{
	img->mount = ffs_tmpfs_mount("advise");
	if (img->mount < 0)
		return img->mount;
	img->wfd = openat(img->mount, NAME, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (img->wfd < 0)
		return -errno;
	img->fd = openat(img->mount, NAME, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	/* it lives as long as its descriptors and mappings, and says so in /proc */
	if (img->fd < 0 || unlinkat(img->mount, NAME, 0) < 0)
		return -errno;
	return 0;
}

static int make_read_only(int mount)
{
	struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};

	return mount_setattr(mount, "", AT_EMPTY_PATH, &attr, sizeof(attr)) < 0 ? -errno : 0;
}

/* The mount must have no writer. Whoever looks at the descriptors of all processes (lsof, a BPF iterator, our own
 * look for another VM's foreign writers) holds each for a moment, a long one when it is preempted there. */
static int seal_mount(struct ffs_image *img)
{
	uint64_t end = ffs_now_ns() + HELD_NS;
	int e;

	ffs_close_fd(&img->wfd);
	while ((e = make_read_only(img->mount)) == -EBUSY && ffs_held_again(end))
		;
	ffs_close_fd(&img->mount); /* the descriptors keep it, and nobody can come to it any more */
	return e;
}

/* Do it once with a page: does it work, and does nobody get a descriptor to write with afterwards? */
static int try_tmpfs(void)
{
	static const char page[4096] = {1};
	struct ffs_image img;
	char again[40];

	ffs_image_init(&img);
	int e = open_in_tmpfs(&img);

	if (e == 0 && ftruncate(img.wfd, 4 << 20) < 0)
		e = -errno;
	if (e == 0 && (e = (int)ffs_pwrite_full(img.wfd, page, sizeof(page), 0)) > 0)
		e = 0;
	if (e == 0)
		e = seal_mount(&img);
	if (e == 0) {
		snprintf(again, sizeof(again), "/proc/self/fd/%d", img.fd);
		img.wfd = open(again, O_RDWR | O_CLOEXEC);
		if (img.wfd >= 0 || errno != EROFS)
			e = -EPERM;
	}
	ffs_image_close(&img);
	return e;
}

static void probe(void)
{
	int e = try_tmpfs();

	own_tmpfs = e == 0;
	if (e < 0)
		ffs_log(FFS_LOG_INFO,
			"branches are captured in pages of 4 KiB: cannot mount a tmpfs for large ones (%s)",
			strerror(-e));
}

/* ---- a memfd ---- */

static int open_memfd(struct ffs_image *img)
{
	char again[40];

	img->wfd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
	if (img->wfd < 0 && errno == EINVAL) /* before 6.3 */
		img->wfd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (img->wfd < 0)
		return -errno;
	snprintf(again, sizeof(again), "/proc/self/fd/%d", img->wfd);
	img->fd = open(again, O_RDONLY | O_CLOEXEC);
	return img->fd < 0 ? -errno : 0;
}

/* FUTURE_WRITE and not WRITE: they differ in what they allow to writable mappings made before, of which there
 * never was one. WRITE walks all pages and waits, at last in vain (EBUSY), for whoever reads one just now. */
static int seal_memfd(int fd)
{
	return fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) < 0
		       ? -errno
		       : 0;
}

/* ---- either ---- */

static void close_all(struct ffs_image *img)
{
	ffs_close_fd(&img->wfd);
	ffs_close_fd(&img->mount);
	ffs_close_fd(&img->fd);
}

int ffs_image_open(struct ffs_image *img, uint64_t size, struct ffs_error *err)
{
	int e = FFS_FAULT("image-create");

	img->size = size;
	pthread_once(&probed, probe);
	if (e == 0)
		e = own_tmpfs ? open_in_tmpfs(img) : open_memfd(img);
	if (e == 0 && ftruncate(img->wfd, (off_t)size) < 0)
		e = -errno;
	if (e < 0) {
		close_all(img);
		return ffs_error_errno(
			err, -e, "cannot make a memory image of %llu MiB", (unsigned long long)size >> 20);
	}
	return 0;
}

/* The kernel lets one thread at a time write a file, with a lock that knows no priority: a copier preempted
 * inside would keep the fault handler, and a vCPU, waiting for its next turn on a CPU. So they queue for a
 * lock of ours that lends the waiter's priority, and in small pieces. */
int ffs_image_write(struct ffs_image *img, const void *buf, size_t len, uint64_t off)
{
	int e = FFS_FAULT("image-write");

	for (size_t done = 0; e == 0 && done < len;) {
		size_t n = len - done < WRITE_BYTES ? len - done : WRITE_BYTES;

		pthread_mutex_lock(&img->writing);
		ssize_t w = ffs_pwrite_full(img->wfd, (const char *)buf + done, n, off + done);
		pthread_mutex_unlock(&img->writing);
		if (w < 0)
			e = (int)w;
		done += n;
	}
	return e;
}

/* Through a mapping that exists for the moment: what its descriptors say of a file (its mount's advice) only
 * holds for pages that a mapping makes. Populating it is a system call and fails like one, where an access
 * would be a SIGBUS. */
bool ffs_image_populate(struct ffs_image *img, uint64_t off)
{
	if (img->mount < 0 || off % FFS_IMAGE_LARGE || off + FFS_IMAGE_LARGE > img->size)
		return false;
	void *p = mmap(NULL, FFS_IMAGE_LARGE, PROT_READ | PROT_WRITE, MAP_SHARED, img->wfd, (off_t)off);

	if (p == MAP_FAILED)
		return false;
	bool done = madvise(p, FFS_IMAGE_LARGE, MADV_HUGEPAGE) == 0 &&
		    madvise(p, FFS_IMAGE_LARGE, MADV_POPULATE_WRITE) == 0;

	munmap(p, FFS_IMAGE_LARGE);
	return done;
}

static int punch(struct ffs_image *img, uint64_t off, uint64_t len)
{
	pthread_mutex_lock(&img->writing);
	int r = fallocate(img->wfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len);

	pthread_mutex_unlock(&img->writing);
	return r;
}

int ffs_image_trim(struct ffs_image *img, uint64_t off, char *buf)
{
	ssize_t n = ffs_pread_full(img->fd, buf, FFS_IMAGE_LARGE, off);

	if (n < 0)
		return (int)n;
	for (size_t i = 0; i < (size_t)n;) {
		size_t j = i;

		while (j < (size_t)n && ffs_is_zero(buf + j, PAGE))
			j += PAGE;
		if (j > i && punch(img, off + i, j - i) < 0)
			return -errno;
		i = j + PAGE;
	}
	return 0;
}

int ffs_image_any_zero(struct ffs_image *img, uint64_t off, uint64_t len, char *buf, size_t size)
{
	for (uint64_t at = off; at < off + len; at += size) {
		size_t want = off + len - at < size ? off + len - at : size;
		ssize_t n = ffs_pread_full(img->fd, buf, want, at);

		if (n < 0)
			return (int)n;
		for (size_t i = 0; i + PAGE <= (size_t)n; i += PAGE)
			if (ffs_is_zero(buf + i, PAGE))
				return 1;
	}
	return 0;
}

int ffs_image_seal(struct ffs_image *img, struct ffs_error *err)
{
	int e = FFS_FAULT("image-seal");

	if (e == 0 && img->mount >= 0)
		e = seal_mount(img);
	else if (e == 0)
		e = seal_memfd(img->wfd);
	if (e == -EBUSY)
		return ffs_error_set(err, EBUSY,
			"cannot seal the memory image: another process has held its descriptor for writing "
			"for 5 s");
	if (e)
		return ffs_error_errno(err, -e, "cannot seal the memory image");
	ffs_close_fd(&img->wfd);
	return 0;
}

uint64_t ffs_image_settle(struct ffs_image *img, bool drop)
{
	struct stat st;

	/* what cannot be given back counts as it is */
	if (drop && img->wfd >= 0 && ftruncate(img->wfd, 0) == 0)
		return 0;
	return fstat(img->fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : img->size;
}

void ffs_image_close(struct ffs_image *img)
{
	close_all(img);
	pthread_mutex_destroy(&img->writing);
}
