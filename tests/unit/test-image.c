/* The image of a branch: nobody writes it once it is sealed, and who holds a descriptor of it in passing does not
 * fail the branch. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "branch/image.h"

#define PAGE 4096u

static void open_image(struct ffs_image *img)
{
	struct ffs_error err = {0};
	char page[PAGE];

	memset(page, 'x', sizeof(page));
	ffs_image_init(img);
	if (ffs_image_open(img, 4 * PAGE, &err) < 0)
		fail_msg("%s", err.text);
	assert_int_equal(ffs_image_write(img, page, sizeof(page), PAGE), 0);
}

static void assert_sealed(const struct ffs_image *img)
{
	char path[40], c = 0;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", img->fd);
	int again = open(path, O_RDWR | O_CLOEXEC);

	if (again >= 0) /* a memfd: its seals say it */
		assert_true(pwrite(again, "y", 1, PAGE) < 0 && ftruncate(again, 0) < 0);
	else
		assert_int_equal(errno, EROFS);
	assert_int_equal(pread(img->fd, &c, 1, PAGE), 1);
	assert_int_equal(c, 'x');
	if (again >= 0)
		close(again);
}

static void test_sealed(void **s)
{
	struct ffs_error err = {0};
	struct ffs_image img;

	open_image(&img);
	assert_int_equal(ffs_image_seal(&img, &err), 0);
	assert_int_equal(img.wfd, -1);
	assert_sealed(&img);
	ffs_image_close(&img);
}

static void *let_go(void *fd)
{
	poll(NULL, 0, 200);
	close(*(int *)fd);
	return NULL;
}

static void test_held_in_passing(void **s)
{
	struct ffs_error err = {0};
	struct ffs_image img;
	pthread_t thread;

	open_image(&img);
	int held = dup(img.wfd);

	assert_int_equal(pthread_create(&thread, NULL, let_go, &held), 0);
	if (ffs_image_seal(&img, &err) < 0)
		fail_msg("%s", err.text);
	pthread_join(thread, NULL);
	assert_sealed(&img);
	ffs_image_close(&img);
}

/* Nobody may have what somebody else can still write. */
static void test_held_for_good(void **s)
{
	struct ffs_error err = {0};
	struct ffs_image img;

	open_image(&img);
	if (img.mount < 0) {
		print_message("SKIP: this process cannot mount, so its images have seals\n");
		ffs_image_close(&img);
		skip();
	}
	int held = dup(img.wfd);

	assert_int_equal(ffs_image_seal(&img, &err), -EBUSY);
	assert_non_null(strstr(err.text, "another process"));
	ffs_image_close(&img);
	close(held);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_sealed),
		cmocka_unit_test(test_held_in_passing),
		cmocka_unit_test(test_held_for_good),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
