/* Owns the memfd of a branch. Threads: any, each writing its own pages. No locks of ours; never blocks on a
 * disk (a memfd is shmem). */
#include "branch/image.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"

int ffs_image_open(struct ffs_image *img, uint64_t size, struct ffs_error *err)
{
	int e = FFS_FAULT("image-create");

	img->fd = -1;
	img->size = size;
	if (e == 0) {
		img->fd = memfd_create("forkfs-image", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
		if (img->fd < 0 && errno == EINVAL) /* before 6.3 */
			img->fd = memfd_create("forkfs-image", MFD_CLOEXEC | MFD_ALLOW_SEALING);
		e = img->fd < 0 ? -errno : 0;
	}
	if (e == 0 && ftruncate(img->fd, (off_t)size) < 0)
		e = -errno;
	if (e < 0) {
		ffs_image_close(img);
		return ffs_error_errno(
			err, -e, "cannot make a memory image of %llu MiB", (unsigned long long)size >> 20);
	}
	return 0;
}

int ffs_image_write(struct ffs_image *img, const void *buf, size_t len, uint64_t off)
{
	int e = FFS_FAULT("image-write");

	if (e)
		return e;
	ssize_t n = ffs_pwrite_full(img->fd, buf, len, off);

	return n < 0 ? (int)n : 0;
}

int ffs_image_seal(struct ffs_image *img, struct ffs_error *err)
{
	int e = FFS_FAULT("image-seal");

	/* FUTURE_WRITE and not WRITE: they differ in what they allow to writable mappings made before, of
	 * which there never was one. WRITE walks all pages and waits, at last in vain (EBUSY), for whoever
	 * reads one just now. */
	if (e == 0 && fcntl(img->fd, F_ADD_SEALS,
			      F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) < 0)
		e = -errno;
	if (e)
		return ffs_error_errno(err, -e, "cannot seal the memory image");
	return 0;
}

uint64_t ffs_image_settle(struct ffs_image *img, bool drop)
{
	struct stat st;

	/* what cannot be given back counts as it is */
	if (drop && ftruncate(img->fd, 0) == 0)
		return 0;
	return fstat(img->fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : img->size;
}

void ffs_image_close(struct ffs_image *img)
{
	if (img->fd >= 0)
		close(img->fd);
	img->fd = -1;
}
