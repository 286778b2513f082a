/* The disks of a sandbox (engine/disk), on files of the test's own: this process is the "VMM" that has them
 * open. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/error.h"
#include "disk/disks.h"

#define MIB (1ull << 20)

static char dir[] = "/var/tmp/forkfs-disks-XXXXXX";
static char path[80];

static int make_disk(uint64_t size)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)size), 0);
	return fd;
}

static int open_disk(const char *id, const char *name, struct ffs_disks **out, struct ffs_error *err)
{
	struct ffs_disk_name n = {.id = id, .path = name};

	*err = (struct ffs_error){0};
	return ffs_disks_open(getpid(), &n, 1, 0, out, err);
}

static void count_beat(void *arg)
{
	++*(unsigned *)arg;
}

/* The capture has the bytes of its instant, its holes, its size, and no name; writes that come later do not
 * show. */
static void test_capture(void **state)
{
	const uint64_t size = 32 * MIB + 777;
	struct ffs_disk_images images;
	struct ffs_error err = {0};
	struct ffs_disks *d;
	unsigned beats = 0;
	struct stat st;
	char buf[16] = {0};
	int fd = make_disk(size);

	assert_int_equal(pwrite(fd, "first", 5, 5 * MIB), 5);
	assert_int_equal(pwrite(fd, "last", 4, (off_t)size - 4), 4);
	assert_int_equal(open_disk("root", path, &d, &err), 0);
	assert_true(d->disk[0].written);
	assert_int_equal(ffs_disks_check(d, getpid(), &err), 0);
	assert_int_equal(ffs_disk_images_prepare(d, &images, &err), 0);
	assert_int_equal(ffs_disks_flush(d, NULL, ffs_now_ns() + 60 * FFS_NS_PER_S, &images, &err), 0);
	assert_int_equal(ffs_disk_images_capture(
				 d, &images, count_beat, &beats, ffs_now_ns() + 60 * FFS_NS_PER_S, &err),
		0);
	assert_int_equal(pwrite(fd, "later", 5, 5 * MIB), 5);
	assert_int_equal(ffs_disk_images_seal(&images, &err), 0);
	assert_true(beats > 0);
	assert_int_equal(images.image[0].size, size);
	assert_int_equal(ffs_pread_full(images.image[0].fd, buf, 5, 5 * MIB), 5);
	assert_string_equal(buf, "first");
	assert_int_equal(ffs_pread_full(images.image[0].fd, buf, sizeof(buf), size - 4), 4);
	assert_memory_equal(buf, "last", 4);
	assert_int_equal(fstat(images.image[0].fd, &st), 0);
	assert_int_equal(st.st_nlink, 0);
	assert_true((uint64_t)st.st_blocks * 512 < MIB);
	assert_int_equal(write(images.image[0].fd, "x", 1), -1);
	ffs_disk_images_close(&images);
	ffs_disks_free(d);
	close(fd);
}

/* A file that grew since, as qcow2 images do, is captured as it is now; one of no bytes too. */
static void test_sizes(void **state)
{
	struct ffs_disk_images images;
	struct ffs_error err = {0};
	struct ffs_disks *d;
	int fd = make_disk(0);

	assert_int_equal(open_disk("root", path, &d, &err), 0);
	for (uint64_t size = 0; size <= 9000; size += 4500) {
		assert_int_equal(ffs_disk_images_prepare(d, &images, &err), 0);
		assert_int_equal(ftruncate(fd, (off_t)size), 0);
		assert_int_equal(ffs_disk_images_capture(
					 d, &images, NULL, NULL, ffs_now_ns() + 60 * FFS_NS_PER_S, &err),
			0);
		assert_int_equal(ffs_disk_images_seal(&images, &err), 0);
		assert_int_equal(images.image[0].size, size);
		assert_int_equal(lseek(images.image[0].fd, 0, SEEK_END), size);
		ffs_disk_images_close(&images);
	}
	ffs_disks_free(d);
	close(fd);
}

/* What cannot be copied in a pause is refused before it; a deadline that has passed ends it. */
static void test_too_long(void **state)
{
	struct ffs_disk_images images;
	struct ffs_error err = {0};
	struct ffs_disks *d;
	int fd = make_disk(8 * MIB);

	assert_int_equal(pwrite(fd, "x", 1, 0), 1);
	assert_int_equal(open_disk("root", path, &d, &err), 0);
	assert_int_equal(ffs_disk_images_prepare(d, &images, &err), 0);
	bool copies = images.image[0].copied;

	assert_int_equal(ffs_disk_images_capture(d, &images, NULL, NULL, ffs_now_ns(), &err), -ETIMEDOUT);
	assert_non_null(strstr(err.text, "root"));
	ffs_disk_images_close(&images);
	if (copies && posix_fallocate(fd, 0, (off_t)(FFS_DISK_COPY_MAX + MIB)) == 0) {
		err = (struct ffs_error){0};
		assert_int_equal(ffs_disk_images_prepare(d, &images, &err), -EFBIG);
		assert_non_null(strstr(err.text, "XFS or btrfs"));
		ffs_disk_images_close(&images);
	}
	ffs_disks_free(d);
	close(fd);
}

/* A disk is a regular file that the VMM has open, now and when the branch is taken. */
static void test_refusals(void **state)
{
	struct ffs_disk_name two[] = {{"a", path}, {"a", path}};
	struct ffs_error err = {0};
	struct ffs_disks *d = NULL;
	int fd = make_disk(4096), other;

	assert_int_equal(open_disk("a b", path, &d, &err), -EINVAL);
	assert_int_equal(open_disk("root", dir, &d, &err), -ENOTSUP);
	assert_int_equal(open_disk("root", "/nonexistent/x", &d, &err), -ENOENT);
	assert_int_equal(open_disk("root", "/dev/null", &d, &err), -ENOTSUP);
	assert_int_equal(ffs_disks_open(getpid(), two, 2, 0, &d, &err), -EINVAL);
	assert_int_equal(ffs_disks_open(getpid(), two, FFS_MAX_DISKS + 1, 0, &d, &err), -EINVAL);
	assert_int_equal(ffs_disks_open(getpid(), NULL, 0, 0, &d, &err), 0);
	assert_null(d);
	assert_int_equal(open_disk("root", path, &d, &err), 0);
	ffs_disks_free(d);
	/* the parent of the test has it not; a file system of our own is not looked into */
	struct stat st;

	assert_int_equal(stat(path, &st), 0);
	err = (struct ffs_error){0};
	assert_int_equal(ffs_disks_open(getppid(), two, 1, 0, &d, &err), -EBUSY);
	assert_non_null(strstr(err.text, path));
	assert_int_equal(ffs_disks_open(getpid(), two, 1, st.st_dev, &d, &err), -EDEADLK);

	/* the VMM goes on to another file and keeps this one for reading only */
	assert_int_equal(open_disk("root", path, &d, &err), 0);
	other = open(path, O_RDONLY | O_CLOEXEC);
	close(fd);
	err = (struct ffs_error){0};
	assert_int_equal(ffs_disks_check(d, getpid(), &err), -EBUSY);
	assert_non_null(strstr(err.text, "another file"));
	close(other);
	ffs_disks_free(d);
}

static int setup(void **state)
{
	if (!mkdtemp(dir))
		return -1;
	snprintf(path, sizeof(path), "%s/disk", dir);
	return 0;
}

static int teardown(void **state)
{
	return unlink(path) < 0 || rmdir(dir) < 0 ? -1 : 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_capture),
		cmocka_unit_test(test_sizes),
		cmocka_unit_test(test_too_long),
		cmocka_unit_test(test_refusals),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
