/* Who else could write guest memory: other processes, as real ones, in each of the ways in which they are
 * looked at, and how long that takes. */
#include "foreign-kit.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/resource.h>

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
	for (unsigned i = 0; i < N_MODES; i++) {
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
	};
	const struct CMUnitTest once[] = {
		cmocka_unit_test(test_unreadable),
		cmocka_unit_test(test_crowd),
	};
	int failed = run_in_modes(tests, FFS_ARRAY_LEN(tests));

	return failed + cmocka_run_group_tests(once, setup, teardown);
}
