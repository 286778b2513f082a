/* What a process that has ended, or who looks at it, holds for a moment longer: waited for, and refused when it stays. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/udp.h"
#include "base/util.h"

static char name[] = "/tmp/forkfs-test-held-XXXXXX";

static void *let_go(void *fd)
{
	poll(NULL, 0, 200);
	close(*(int *)fd);
	return NULL;
}

static pthread_t let_go_soon(int *fd)
{
	pthread_t thread;

	assert_int_equal(pthread_create(&thread, NULL, let_go, fd), 0);
	return thread;
}

static void test_lock(void **s)
{
	int theirs = open(name, O_RDWR | O_CLOEXEC), ours = open(name, O_RDWR | O_CLOEXEC);

	assert_true(theirs >= 0 && ours >= 0);
	assert_int_equal(flock(theirs, LOCK_EX), 0);
	assert_int_equal(ffs_lock(ours), -EWOULDBLOCK);
	pthread_t thread = let_go_soon(&theirs);

	assert_int_equal(ffs_lock(ours), 0);
	pthread_join(thread, NULL);
	close(ours);
	assert_int_equal(ffs_lock(ours), -EBADF);
}

static void test_port(void **s)
{
	struct ffs_error err = {0};
	unsigned port = 0, again = 0;
	int theirs = ffs_udp_listen("127.0.0.1", 0, 0, &port, &err), ours;

	assert_true(theirs >= 0);
	assert_int_equal(ffs_udp_listen("127.0.0.1", port, 0, &again, &err), -EADDRINUSE);
	assert_non_null(strstr(err.text, "for acknowledgements"));
	pthread_t thread = let_go_soon(&theirs);

	ours = ffs_udp_listen("127.0.0.1", port, ffs_now_ns() + FFS_HELD_NS, &again, &err);
	assert_true(ours >= 0);
	assert_int_equal(again, port);
	pthread_join(thread, NULL);
	close(ours);
}

static int setup(void **s)
{
	int fd = mkstemp(name);

	return fd < 0 || close(fd);
}

static int teardown(void **s)
{
	return unlink(name);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_lock), cmocka_unit_test(test_port)};

	return cmocka_run_group_tests(tests, setup, teardown);
}
