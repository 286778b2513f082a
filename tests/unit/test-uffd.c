/* The userfaultfd wrappers on a real process: what must trap does, release wakes, errors name the reason. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <cmocka.h>

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>

#include "uffd/inject.h"
#include "uffd/uffd.h"
#include "target.h"

#define PAGE 4096ull
#define LEN (160ull << 20) /* more than two slices */

static struct ffs_spawner *spawner;
static char *memfd_map, *anon_map;

/* Orders to the target: write the byte at `addr`; done when `served` catches up. */
static struct shared {
	_Atomic uint64_t asked, served;
	_Atomic uint64_t addr;
	_Atomic int unmap;
} * sh;

static void writer(void *arg)
{
	target_ready();
	for (uint64_t n = 1;; n++) {
		while (atomic_load(&sh->asked) < n)
			poll(NULL, 0, 1);
		if (atomic_load(&sh->unmap))
			madvise((void *)(uintptr_t)atomic_load(&sh->addr), PAGE, MADV_DONTNEED);
		else
			*(volatile char *)(uintptr_t)atomic_load(&sh->addr) = 42;
		atomic_store(&sh->served, n);
	}
}

static uint64_t order(void *addr)
{
	atomic_store(&sh->addr, (uint64_t)(uintptr_t)addr);
	return atomic_fetch_add(&sh->asked, 1) + 1;
}

static bool served(uint64_t n, int ms)
{
	return target_wait(atomic_load(&sh->served) >= n, ms);
}

static struct ffs_proc_id start(int *uffd)
{
	struct ffs_error err = {0};

	memset(sh, 0, sizeof(*sh));
	int fd = memfd_create("ram", MFD_CLOEXEC);

	assert_int_equal(ftruncate(fd, LEN), 0);
	memfd_map = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	anon_map = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(memfd_map != MAP_FAILED && anon_map != MAP_FAILED);
	close(fd);
	memset(memfd_map, 1, 64 * PAGE);
	memset(anon_map, 1, 64 * PAGE);
	struct ffs_proc_id id = target_start(writer, NULL);

	assert_int_equal(ffs_inject_userfaultfd(spawner, id, 5 * FFS_NS_PER_S, uffd, &err), 0);
	assert_int_equal(ffs_uffd_api(*uffd, &err), 0);
	return id;
}

static void end(struct ffs_proc_id id, int uffd)
{
	target_end(id);
	close(uffd);
	munmap(memfd_map, LEN);
	munmap(anon_map, LEN);
}

static uint64_t hva(const void *p)
{
	return (uint64_t)(uintptr_t)p;
}

/* The next event, a write fault at that page. */
static void expect_fault(int uffd, const void *addr)
{
	struct uffd_msg m;
	struct pollfd p = {.fd = uffd, .events = POLLIN};

	assert_int_equal(poll(&p, 1, 2000), 1);
	assert_int_equal(read(uffd, &m, sizeof(m)), sizeof(m));
	assert_int_equal(m.event, UFFD_EVENT_PAGEFAULT);
	assert_true(m.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
	assert_int_equal(m.arg.pagefault.address & ~(PAGE - 1), hva(addr));
}

static void test_traps(void **state)
{
	struct ffs_error err = {0};
	int uffd;
	struct ffs_proc_id id = start(&uffd);
	char *maps[] = {memfd_map, anon_map};

	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(ffs_uffd_register(uffd, hva(maps[i]), LEN, &err), 0);
		assert_int_equal(ffs_uffd_protect(uffd, hva(maps[i]), LEN), 0);
		/* a present page; never-touched ones in the first and in the last slice */
		char *where[] = {maps[i] + 3 * PAGE, maps[i] + 100 * PAGE, maps[i] + LEN - PAGE};

		for (unsigned k = 0; k < 3; k++) {
			uint64_t n = order(where[k]);

			expect_fault(uffd, where[k]);
			assert_false(served(n, 30));
			/* waking without unprotecting: it faults again */
			assert_int_equal(ffs_uffd_wake(uffd, hva(where[k]), PAGE), 0);
			expect_fault(uffd, where[k]);
			assert_int_equal(ffs_uffd_unprotect(uffd, hva(where[k]), PAGE), 0);
			assert_true(served(n, 1000));
			assert_true(served(order(where[k]), 1000)); /* no second fault */
		}
	}
	end(id, uffd);
}

/* Unregistering releases a waiting thread and every slice, although the range has a hole in it. */
static void test_unregister(void **state)
{
	struct ffs_error err = {0};
	int uffd;
	struct ffs_proc_id id = start(&uffd);
	char *last = anon_map + LEN - PAGE;

	assert_int_equal(ffs_uffd_register(uffd, hva(anon_map), LEN, &err), 0);
	assert_int_equal(ffs_uffd_protect(uffd, hva(anon_map), LEN), 0);
	uint64_t n = order(last);

	expect_fault(uffd, last);
	assert_false(served(n, 30));
	assert_int_equal(ffs_uffd_unregister(uffd, hva(anon_map), LEN), 0);
	assert_true(served(n, 1000));
	assert_true(served(order(anon_map + 5 * PAGE), 1000));
	end(id, uffd);
}

/* The last close releases everything as well. */
static void test_close(void **state)
{
	struct ffs_error err = {0};
	int uffd;
	struct ffs_proc_id id = start(&uffd);

	assert_int_equal(ffs_uffd_register(uffd, hva(memfd_map), LEN, &err), 0);
	assert_int_equal(ffs_uffd_protect(uffd, hva(memfd_map), LEN), 0);
	uint64_t n = order(memfd_map);

	expect_fault(uffd, memfd_map);
	close(uffd);
	uffd = -1;
	assert_true(served(n, 1000));
	end(id, uffd);
}

/* While a change of the mappings waits for its event to be read, EAGAIN comes back at once; after the read
 * all is well. */
static void test_changing(void **state)
{
	struct ffs_error err = {0};
	struct uffd_msg m;
	int uffd;
	struct ffs_proc_id id = start(&uffd);

	assert_int_equal(ffs_uffd_register(uffd, hva(anon_map), LEN, &err), 0);
	atomic_store(&sh->unmap, 1);
	uint64_t n = order(anon_map);
	struct pollfd p = {.fd = uffd, .events = POLLIN};

	assert_int_equal(poll(&p, 1, 2000), 1);
	assert_int_equal(ffs_uffd_protect(uffd, hva(anon_map), LEN), -EAGAIN);
	assert_int_equal(read(uffd, &m, sizeof(m)), sizeof(m));
	assert_int_equal(m.event, UFFD_EVENT_REMOVE);
	assert_true(served(n, 1000));
	assert_int_equal(ffs_uffd_protect(uffd, hva(anon_map), LEN), 0);
	end(id, uffd);
}

static void *let_go(void *fd)
{
	poll(NULL, 0, 100);
	close(*(int *)fd);
	return NULL;
}

/* The userfaultfd of a process that has ended is held a moment longer by whoever looks at its descriptors just then. */
static void test_held_in_passing(void **state)
{
	struct ffs_error err = {0};
	int first, second = -1;
	pthread_t thread;
	struct ffs_proc_id id = start(&first);

	assert_int_equal(ffs_uffd_register(first, hva(memfd_map), LEN, &err), 0);
	assert_int_equal(ffs_inject_userfaultfd(spawner, id, 5 * FFS_NS_PER_S, &second, &err), 0);
	assert_int_equal(ffs_uffd_api(second, &err), 0);
	assert_int_equal(pthread_create(&thread, NULL, let_go, &first), 0);
	if (ffs_uffd_register(second, hva(memfd_map), LEN, &err) < 0)
		fail_msg("%s", err.text);
	pthread_join(thread, NULL);
	close(second);
	target_end(id);
	munmap(memfd_map, LEN);
	munmap(anon_map, LEN);
}

static void test_errors(void **state)
{
	struct ffs_error err = {0};
	int uffd, second = -1;
	struct ffs_proc_id id = start(&uffd);

	/* negotiated already */
	assert_int_equal(ffs_uffd_api(uffd, &err), -ENOTSUP);
	assert_non_null(strstr(err.text, "6.4"));
	assert_int_equal(ffs_uffd_register(uffd, hva(memfd_map), LEN, &err), 0);
	assert_int_equal(ffs_inject_userfaultfd(spawner, id, 5 * FFS_NS_PER_S, &second, &err), 0);
	assert_int_equal(ffs_uffd_api(second, &err), 0);
	assert_int_equal(ffs_uffd_register(second, hva(memfd_map), LEN, &err), -EBUSY);
	assert_non_null(strstr(err.text, "another userfaultfd"));
	close(second);
	assert_true(ffs_uffd_register(uffd, 0x10000, PAGE, &err) < 0);
	assert_true(ffs_uffd_register(uffd, hva(memfd_map) + 1, PAGE, &err) == -EINVAL);
	assert_true(ffs_uffd_protect(uffd, hva(anon_map), PAGE) < 0);
	/* the process is gone */
	target_end(id);
	assert_int_equal(ffs_uffd_register(uffd, hva(memfd_map), LEN, &err), -ESRCH);
	assert_int_equal(ffs_uffd_protect(uffd, hva(memfd_map), LEN), -ESRCH);
	assert_int_equal(ffs_uffd_unregister(uffd, hva(memfd_map), LEN), -ESRCH);
	close(uffd);
	munmap(memfd_map, LEN);
	munmap(anon_map, LEN);
}

static int start_spawner(void **state)
{
	sh = shared_page(4096);
	return ffs_spawner_start(&spawner, NULL);
}

static int stop_spawner(void **state)
{
	ffs_spawner_stop(spawner);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_traps),
		cmocka_unit_test(test_unregister),
		cmocka_unit_test(test_close),
		cmocka_unit_test(test_changing),
		cmocka_unit_test(test_held_in_passing),
		cmocka_unit_test(test_errors),
	};

	return cmocka_run_group_tests(tests, start_spawner, stop_spawner);
}
