/* Owns the table of operations that change and read a store, and what is made of them alone.
 *
 * Threads: any; the table is only exchanged by tests, before threads exist. No locks. Everything here may wait for
 * the disk. */
#include "store/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int real_mkdir(int dir, const char *name)
{
	return mkdirat(dir, name, 0700) < 0 ? -errno : 0;
}

static int real_create(int dir, const char *name)
{
	int fd = openat(dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);

	return fd < 0 ? -errno : fd;
}

static int real_write(int fd, const void *buf, size_t len, uint64_t off)
{
	ssize_t n = ffs_pwrite_full(fd, buf, len, off);

	return n < 0 ? (int)n : 0;
}

static int real_allocate(int fd, uint64_t size)
{
	int r;

	if (!size)
		return 0;
	while ((r = fallocate(fd, 0, 0, (off_t)size)) < 0 && errno == EINTR)
		;
	if (r < 0)
		return errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL ? -ENOTSUP : -errno;
	return 0;
}

static int real_fsync(int fd)
{
	int r;

	while ((r = fsync(fd)) < 0 && errno == EINTR)
		;
	return r < 0 ? -errno : 0;
}

static int real_rename(int dir, const char *from, const char *to, enum ffs_rename how)
{
	static const unsigned flags[] = {[FFS_RENAME_NEW] = RENAME_NOREPLACE,
		[FFS_RENAME_OVER] = 0,
		[FFS_RENAME_EXCHANGE] = RENAME_EXCHANGE};

	return renameat2(dir, from, dir, to, flags[how]) < 0 ? -errno : 0;
}

static int real_link(int from_dir, const char *from, int dir, const char *to)
{
	return linkat(from_dir, from, dir, to, 0) < 0 ? -errno : 0;
}

static int real_unlink(int dir, const char *name, bool directory)
{
	return unlinkat(dir, name, directory ? AT_REMOVEDIR : 0) < 0 ? -errno : 0;
}

static ssize_t real_pread(int fd, void *buf, size_t len, uint64_t off)
{
	return ffs_pread_full(fd, buf, len, off);
}

static ssize_t real_read(int fd, void *buf, size_t len)
{
	ssize_t n = read(fd, buf, len);

	return n < 0 ? -errno : n;
}

const struct ffs_store_ops ffs_store_ops_real = {
	.mkdir = real_mkdir,
	.create = real_create,
	.write = real_write,
	.allocate = real_allocate,
	.fsync = real_fsync,
	.rename = real_rename,
	.link = real_link,
	.unlink = real_unlink,
	.pread = real_pread,
	.read = real_read,
};
const struct ffs_store_ops *ffs_store_ops = &ffs_store_ops_real;

int ffs_store_open_subdir(int dir, const char *name)
{
	int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);

	return fd < 0 ? -errno : fd;
}

int ffs_store_remove_tree(int dir, const char *name)
{
	int r = ffs_store_ops->unlink(dir, name, false), fd;
	DIR *d;

	if (r == -ENOENT || !r)
		return 0;
	if (r != -EISDIR && r != -EPERM)
		return r;
	fd = ffs_store_open_subdir(dir, name);
	if (fd < 0)
		return fd;
	d = fdopendir(fd);
	if (!d) {
		close(fd);
		return -ENOMEM;
	}
	r = 0;
	for (struct dirent *e; !r && (e = readdir(d));)
		if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
			r = ffs_store_remove_tree(dirfd(d), e->d_name);
	closedir(d);
	return r ? r : ffs_store_ops->unlink(dir, name, true);
}

int ffs_store_write_file(int dir, const char *name, const void *buf, size_t len)
{
	_cleanup_close_ int fd = ffs_store_ops->create(dir, name);
	int r;

	if (fd < 0)
		return fd;
	r = ffs_store_ops->write(fd, buf, len, 0);
	return r ? r : ffs_store_ops->fsync(fd);
}

bool ffs_has_suffix(const char *name, const char *suffix)
{
	size_t n = strlen(name), m = strlen(suffix);

	return n > m && strcmp(name + n - m, suffix) == 0;
}
