/* Who could not write guest memory when it was looked at and can later: a look that passes over the processes
 * which have not run since finds it all the same. */
#include "foreign-kit.h"

#include <pthread.h>
#include <stdatomic.h>

/* A process that sleeps until it is told to get at the memory, or to let go of it, and sleeps again. What it
 * does, another thread of it does where that is asked for. */
enum task { RECEIVE = 1, REOPEN, MAP, LET_GO };
#define BY_THREAD 16     /* by one that was there before */
#define BY_NEW_THREAD 32 /* by one that ends at once */

static int orders[2], got = -1;
static pid_t vmm_pid;

static void obey(int fd, int what)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", vmm_pid, writable);
	switch (what) {
	case RECEIVE:
		got = fd;
		break;
	case REOPEN:
		close(fd);
		got = open(path, O_RDWR | O_CLOEXEC);
		if (got < 0)
			_exit(4);
		break;
	case MAP:
		map_at(second, fd, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
		close(fd);
		break;
	case LET_GO:
		close(got); /* or it has none */
		got = -1;
		map_at(second, -1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, 0);
		break;
	}
}

static int work_pipe[2], done_pipe[2];

static void *obey_here(void *arg)
{
	const int *order = arg;

	obey(order[0], order[1]);
	return NULL;
}

static void *obey_always(void *arg)
{
	int order[2];
	char c = 0;

	while (read(work_pipe[0], order, sizeof(order)) == sizeof(order)) {
		obey(order[0], order[1]);
		if (write(done_pipe[1], &c, 1) != 1)
			break;
	}
	return NULL;
}

static int receive(int *fd)
{
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	char what = 0;
	struct iovec v = {&what, 1};
	struct msghdr m = {.msg_iov = &v,
		.msg_iovlen = 1,
		.msg_control = control.buf,
		.msg_controllen = sizeof(control)};

	if (recvmsg(orders[1], &m, MSG_CMSG_CLOEXEC) != 1)
		_exit(0);
	*fd = -1;
	if (CMSG_FIRSTHDR(&m))
		memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(*fd));
	return what;
}

static void obedient(void *arg)
{
	pthread_t t;
	char c = 0;

	if (pipe(work_pipe) < 0 || pipe(done_pipe) < 0 ||
		(arg && pthread_create(&t, NULL, obey_always, NULL)))
		_exit(3);
	target_ready();
	for (;;) {
		int fd, what = receive(&fd), order[2] = {fd, what & 15};
		bool done = true;

		if (what & BY_THREAD)
			done = write(work_pipe[1], order, sizeof(order)) == sizeof(order) &&
			       read(done_pipe[0], &c, 1) == 1;
		else if (what & BY_NEW_THREAD)
			done = pthread_create(&t, NULL, obey_here, order) == 0 && pthread_join(t, NULL) == 0;
		else
			obey(order[0], order[1]);
		if (!done || write(orders[1], &c, 1) != 1)
			_exit(5);
	}
}

static void tell(int what)
{
	char c;

	assert_true(send_fd(orders[0], (char)what, (what & 15) == LET_GO ? -1 : writable));
	assert_int_equal(read(orders[0], &c, 1), 1);
}

static struct ffs_proc_id start_obedient(struct ffs_proc_id v, bool thread)
{
	vmm_pid = v.pid;
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, orders), 0);
	keep(orders[1]);
	struct ffs_proc_id o = target_start(obedient, thread ? orders : NULL);

	close(orders[1]);
	return o;
}

/* At any time, by any thread: the look after it finds it, and the one after it was let go does not. */
static void test_later(void **s)
{
	static const int ways[] = {RECEIVE, REOPEN, MAP}, who[] = {0, BY_NEW_THREAD, BY_THREAD};
	struct ffs_proc_id v = start_vmm(NULL);

	for (unsigned i = 0; i < 2 * FFS_ARRAY_LEN(who) * FFS_ARRAY_LEN(ways); i++) {
		int by = who[i % FFS_ARRAY_LEN(who)], way = ways[i / 2 % FFS_ARRAY_LEN(ways)];
		struct ffs_proc_id o = start_obedient(v, by == BY_THREAD);

		for (unsigned k = 0; k < 3; k++) {
			for (unsigned n = 0; n < k; n++)
				nothing(v); /* it is known, or not yet */
			tell(way | by);
			expect(v, way == MAP ? FFS_FOREIGN_MAPPING : FFS_FOREIGN_DESCRIPTOR, o.pid, "ram0");
			expect(v, way == MAP ? FFS_FOREIGN_MAPPING : FFS_FOREIGN_DESCRIPTOR, o.pid, "ram0");
			tell(LET_GO | by);
		}
		nothing(v);
		close(orders[0]);
		target_end(o);
	}
	target_end(v);
}

/* Those that sleep are passed over, and who takes others for sleeping too is found out by these tests. */
static void test_quiet(void **s)
{
	if (!mode->again || mode < &modes[2]) {
		struct ffs_proc_id v = start_vmm(NULL);

		nothing(v); /* the kernel looks, or everybody is gone through */
		nothing(v);
		assert_int_equal(f.quiet, 0);
		target_end(v);
		return;
	}
	struct ffs_proc_id v = start_vmm(NULL), o = start_obedient(v, true);

	assert_true(target_wait((nothing(v), f.quiet > 0 && f.quiet < f.processes), 10000));
	set_faults(mode, "mutant:stale-known on\n");
	tell(RECEIVE);
	nothing(v);
	set_faults(mode, "");
	expect(v, FFS_FOREIGN_DESCRIPTOR, o.pid, "ram0");
	/* of another VMM nothing is known */
	struct ffs_proc_id other_vmm = start_vmm(NULL);

	look(other_vmm);
	assert_int_equal(f.quiet, 0);
	target_end(other_vmm);
	close(orders[0]);
	target_end(o);
	target_end(v);
}

/* The state of a process that changes it all the time by itself, with sleep in between: odd while it changes.
 */
static _Atomic unsigned *changes;

static void restless(void *arg)
{
	unsigned seed = 1;

	close(writable);
	target_ready();
	for (bool has = false;; has = !has) {
		atomic_fetch_add(changes, 1);
		obey(-1, has ? LET_GO : REOPEN);
		atomic_fetch_add(changes, 1);
		seed = seed * 1103515245 + 12345;
		struct timespec t = {.tv_nsec = seed / 65536 % 8 * 1000000};

		if (seed & 256)
			nanosleep(&t, NULL);
	}
}

/* A look during which it kept what it had finds it, and one during which it had none does not. */
static void test_restless(void **s)
{
	changes = shared_page(4096);
	struct ffs_proc_id v = start_vmm(NULL);
	uint64_t end = ffs_now_ns() + FFS_NS_PER_S;
	unsigned had = 0, had_none = 0, looks = 0;

	vmm_pid = v.pid;
	struct ffs_proc_id o = target_start(restless, NULL);

	while (ffs_now_ns() < end) {
		unsigned before = atomic_load(changes);
		int e = look(v);

		looks++;
		if (before != atomic_load(changes) || before % 2)
			continue;
		had += before / 2 % 2;
		had_none += !(before / 2 % 2);
		assert_int_equal(e, before / 2 % 2 ? -EBUSY : 0);
	}
	print_message("%u looks: %u while it had it, %u while it had none\n", looks, had, had_none);
	target_end(o);
	target_end(v);
	munmap((void *)changes, 4096);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_later),
		cmocka_unit_test(test_quiet),
		cmocka_unit_test(test_restless),
	};

	return run_in_modes(tests, FFS_ARRAY_LEN(tests));
}
