/* Who else could write guest memory: other processes, as real ones, in each of the ways in which they are
 * looked at, and how long that takes. */
#include "foreign-kit.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/socket.h>

static void maps_shared(void *arg)
{
	map_at(second, writable, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	close(writable);
	rest();
}

static void maps_readonly(void *arg)
{
	map_at(second, readable, PROT_READ, MAP_SHARED, 0);
	close(readable);
	rest();
}

static void maps_privately(void *arg)
{
	map_at(second, readable, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
	second[0] = 2;
	rest();
}

static void holds(void *arg)
{
	rest();
}

static void *leave_leader(void *arg)
{
	rest();
	return NULL;
}

static void leaderless(void *arg)
{
	pthread_t t;

	map_at(second, writable, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	close(writable);
	if (pthread_create(&t, NULL, leave_leader, NULL))
		_exit(3);
	syscall(SYS_exit, 0); /* this thread only */
}

static void with_other(void (*fn)(void *), int fd, int kind, const char *word)
{
	struct ffs_proc_id v = start_vmm(NULL);

	nothing(v);
	assert_true(mode < &modes[2] || f.processes > 0);
	keep(fd);
	struct ffs_proc_id o = target_start(fn, NULL);
	char state = 0;

	if (fn == leaderless)
		assert_true(target_wait(ffs_proc_stat(o.pid, &state, NULL) == 0 && state == 'Z', 10000));
	if (kind < 0) {
		nothing(v);
	} else
		expect(v, (enum ffs_foreign_kind)kind, o.pid, word);
	target_end(o);
	nothing(v);
	target_end(v);
}

static void test_other_maps(void **s)
{
	with_other(maps_shared, writable, FFS_FOREIGN_MAPPING, "vhost-user");
}

static void test_other_maps_readonly(void **s)
{
	with_other(maps_readonly, readable, -1, NULL);
}

static void test_other_maps_privately(void **s)
{
	with_other(maps_privately, readable, -1, NULL);
}

static void test_other_holds(void **s)
{
	with_other(holds, writable, FFS_FOREIGN_DESCRIPTOR, "for writing");
}

static void test_other_holds_readonly(void **s)
{
	with_other(holds, readable, -1, NULL);
}

static void test_other_file(void **s)
{
	with_other(holds, other, -1, NULL);
}

/* A process whose first thread has ended shows no memory under its own number. */
static void test_leaderless(void **s)
{
#ifdef __SANITIZE_THREAD__
	skip(); /* it does not let the first thread go */
#endif
	with_other(leaderless, writable, FFS_FOREIGN_MAPPING, "ram0");
}

static int shares_vm(void *arg)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	target_ready(); /* its descriptors are its own */
	for (;;)
		pause();
	return 0;
}

static void clone_vm(void)
{
	static char stack[65536] __attribute__((aligned(16)));
	int pid = clone(shares_vm, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL);

	if (pid < 0)
		_exit(3);
	*(int *)(ram + 4096) = pid;
}

/* Another process with the very address space of the VMM is trapped as the VMM is. */
static void test_same_memory(void **s)
{
#ifdef __SANITIZE_THREAD__
	skip(); /* two processes in its one shadow */
#endif
	struct ffs_proc_id v = start_vmm(clone_vm);
	int twin = 0;

	assert_int_equal(pread(writable, &twin, sizeof(twin), 4096), sizeof(twin));
	assert_true(twin > 0);
	nothing(v);
	kill(twin, SIGKILL);
	target_end(v);
}

/* ---- those that get it later ---- */

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
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {.align = {.cmsg_len = CMSG_LEN(sizeof(int)),
			     .cmsg_level = SOL_SOCKET,
			     .cmsg_type = SCM_RIGHTS}};
	char byte = (char)what, c;
	struct iovec v = {&byte, 1};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};

	if ((what & 15) != LET_GO) {
		memcpy(CMSG_DATA(&control.align), &writable, sizeof(writable));
		m.msg_control = control.buf;
		m.msg_controllen = sizeof(control);
	}
	assert_int_equal(sendmsg(orders[0], &m, 0), 1);
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

/* ---- the rest of the machine ---- */

static struct ffs_proc_id looker_vmm;

/* A daemon without privileges: what it may not read is said, not passed over. */
static void look_unprivileged(void *arg)
{
	if (setresgid(65534, 65534, 65534) < 0 || setresuid(65534, 65534, 65534) < 0)
		_exit(3);
	prctl(PR_SET_DUMPABLE, 1);
	looker_vmm.pid = fork();
	if (looker_vmm.pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		map_at(ram, writable, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
		for (;;)
			pause();
	}
	if (ffs_proc_stat(looker_vmm.pid, NULL, &looker_vmm.start) < 0)
		_exit(3);
	struct ffs_geometry geo = geometry(writable);
	int e = ffs_foreign_scan(looker_vmm, &geo, NULL, &f, &took, &err);
	bool told = found(FFS_FOREIGN_UNREADABLE, 1) != NULL;

	printf("%d %s\n", e, f.n ? f.list[0].text : "");
	fflush(stdout);
	target_end(looker_vmm); /* the next test must not find its descriptor */
	_exit(e == 0 && told ? 0 : 4);
}

static void test_unreadable(void **s)
{
	int status = 0;

	if (getuid()) {
		print_message("SKIP: not root\n");
		skip();
	}
	keep(writable);
	pid_t pid = fork();

	if (pid == 0)
		look_unprivileged(NULL);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

static atomic_bool churning;

static void *churn(void *arg)
{
	unsigned *n = arg;

	while (atomic_load(&churning)) {
		pid_t pid = fork();

		if (pid == 0)
			_exit(0);
		if (pid > 0)
			waitpid(pid, NULL, 0);
		++*n;
	}
	return NULL;
}

/* Processes that come and go while they are looked at are no findings and no failures. */
static void test_churn(void **s)
{
	struct ffs_proc_id v = start_vmm(NULL);
	unsigned n[2] = {0};
	pthread_t t[2];

	atomic_store(&churning, true);
	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(pthread_create(&t[i], NULL, churn, &n[i]), 0);
	uint64_t end = ffs_now_ns() + 2 * FFS_NS_PER_S;
	unsigned looks = 0;

	/* the children are copies of us, with our writable descriptor, for the moment that they live */
	while (ffs_now_ns() < end) {
		int e = look(v);

		assert_true(e == 0 || e == -EBUSY);
		for (unsigned i = 0; i < f.n; i++)
			assert_int_equal(f.list[i].kind, FFS_FOREIGN_DESCRIPTOR);
		looks++;
	}
	atomic_store(&churning, false);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	print_message("%u looks while %u processes came and went\n", looks, n[0] + n[1]);
	assert_true(looks > 10);
	nothing(v);
	target_end(v);
}

/* More findings than there is room for: the refusal is kept. */
static void test_many(void **s)
{
	struct ffs_proc_id v = start_vmm(NULL), o[FFS_FOREIGN_MAX + 4];

	for (unsigned i = 0; i < FFS_ARRAY_LEN(o); i++) {
		keep(writable);
		o[i] = target_start(i % 2 ? maps_shared : holds, NULL);
	}
	assert_int_equal(look(v), -EBUSY);
	assert_int_equal(f.n, FFS_FOREIGN_MAX);
	assert_int_equal(f.refusing, FFS_FOREIGN_MAX);
	assert_true(f.dropped >= 4);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(o); i++)
		target_end(o[i]);
	nothing(v);
	target_end(v);
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void times(struct ffs_proc_id v, const char *what)
{
	uint64_t t[20], cpu;
	struct rusage a, b;

	getrusage(RUSAGE_SELF, &a);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(t); i++) {
		nothing(v);
		t[i] = took;
	}
	getrusage(RUSAGE_SELF, &b);
	uint64_t first = t[0];

	cpu = (uint64_t)(b.ru_utime.tv_sec - a.ru_utime.tv_sec + b.ru_stime.tv_sec - a.ru_stime.tv_sec) *
		      1000000 +
	      (uint64_t)(b.ru_utime.tv_usec - a.ru_utime.tv_usec + b.ru_stime.tv_usec - a.ru_stime.tv_usec);
	qsort(t, FFS_ARRAY_LEN(t), sizeof(t[0]), by_value);
	print_message("%s: %u processes, %u of them quiet: first %.1f ms, p50 %.1f, p90 %.1f, max %.1f ms; "
		      "CPU %.1f ms a look\n",
		what, f.processes, f.quiet, (double)first / 1e6, (double)t[10] / 1e6, (double)t[18] / 1e6,
		(double)t[19] / 1e6, (double)cpu / 1e3 / FFS_ARRAY_LEN(t));
}

#define CROWD 2000u

/* How long it takes; printed, because it is the machine's figure. */
static void test_crowd(void **s)
{
	static pid_t pid[CROWD];
	struct ffs_proc_id v = start_vmm(NULL);
	unsigned n = 0, running = 0;
	int p[2];
	char c;

	assert_int_equal(pipe2(p, O_CLOEXEC), 0);
	times(v, "before");
	for (; n < CROWD; n++) {
		pid[n] = fork();
		if (pid[n] < 0)
			break;
		if (pid[n] == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			/* another program, with mappings of its own and a dozen descriptors; the pipe's end
			 * goes when it runs */
			for (int fd = 3; fd < 256; fd++)
				if (fd != p[1])
					close(fd);
			for (int i = 0; i < 9; i++)
				if (dup(1) < 0)
					_exit(3);
			execl("/bin/sleep", "sleep", "1000", NULL);
			_exit(3);
		}
	}
	close(p[1]);
	assert_int_equal(read(p[0], &c, 1), 0); /* all of them do */
	close(p[0]);
#ifdef FFS_FAULTS
	unsigned n_modes = FFS_ARRAY_LEN(modes);
#else
	unsigned n_modes = 1;
#endif
	for (unsigned i = 0; i < n_modes; i++) {
		mode = &modes[i];
		set_faults(mode, "");
		times(v, mode->name);
	}
	mode = &modes[0];
	set_faults(mode, "");
	for (unsigned i = 0; i < n; i++) {
		int status;

		running += waitpid(pid[i], &status, WNOHANG) == 0;
		kill(pid[i], SIGKILL);
	}
	for (unsigned i = 0; i < n; i++)
		waitpid(pid[i], NULL, 0);
	print_message("%u of %u still ran\n", running, n);
	target_end(v);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_other_maps),
		cmocka_unit_test(test_other_maps_readonly),
		cmocka_unit_test(test_other_maps_privately),
		cmocka_unit_test(test_other_holds),
		cmocka_unit_test(test_other_holds_readonly),
		cmocka_unit_test(test_other_file),
		cmocka_unit_test(test_leaderless),
		cmocka_unit_test(test_same_memory),
		cmocka_unit_test(test_many),
		cmocka_unit_test(test_churn),
		cmocka_unit_test(test_later),
		cmocka_unit_test(test_quiet),
		cmocka_unit_test(test_restless),
	};
	const struct CMUnitTest once[] = {
		cmocka_unit_test(test_unreadable),
		cmocka_unit_test(test_crowd),
	};
	int failed = 0;

	for (unsigned i = 0; i < FFS_ARRAY_LEN(modes); i++) {
#ifndef FFS_FAULTS
		if (i)
			break; /* nothing makes it take the others */
#endif
		mode = &modes[i];
		failed += _cmocka_run_group_tests(mode->name, tests, FFS_ARRAY_LEN(tests), setup, teardown);
	}
	mode = &modes[0];
	return failed + cmocka_run_group_tests(once, setup, teardown);
}
