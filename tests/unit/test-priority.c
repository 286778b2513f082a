/* Real-time priority for the length of a pause: who gets it, when it is given back, and that nobody keeps it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <sched.h>

#include "target.h"
#include "uffd/priority.h"

/* A VMM's threads by their names; the first is the main thread. */
static const struct {
	const char *name; /* NULL: the process's own */
	bool vcpu;
} threads[] = {{"vmm", false}, {"CPU 0/KVM", true}, {"fc_vcpu 1", true}, {"vcpu2", true}, {NULL, true},
	{"fc_api", false}, {"api", false}, {"IO iothread0", false}};
#define N (sizeof(threads) / sizeof(threads[0]))

static struct shared {
	_Atomic unsigned n;
	pid_t tid[N];
} * shared;

static void *thread_main(void *arg)
{
	size_t i = (size_t)arg;

	if (threads[i].name)
		prctl(PR_SET_NAME, threads[i].name);
	shared->tid[i] = gettid();
	atomic_fetch_add(&shared->n, 1);
	for (;;)
		pause();
	return NULL;
}

static void vmm(void *arg)
{
	pthread_t t;

	prctl(PR_SET_NAME, threads[0].name);
	shared->tid[0] = getpid();
	atomic_store(&shared->n, 1);
	for (size_t i = 1; i < N; i++)
		if (pthread_create(&t, NULL, thread_main, (void *)i))
			_exit(3);
	while (atomic_load(&shared->n) < N)
		sched_yield();
	target_ready();
	for (;;)
		pause();
}

static int setup(void **s)
{
	shared = shared_page(sizeof(*shared));
	return 0;
}

static int policy(size_t i)
{
	return sched_getscheduler(shared->tid[i]) & ~SCHED_RESET_ON_FORK;
}

static int priority(size_t i)
{
	struct sched_param p = {0};

	assert_int_equal(sched_getparam(shared->tid[i], &p), 0);
	return p.sched_priority;
}

static void lend(struct ffs_lent *l, struct ffs_proc_id v)
{
	ffs_priority_find(l, v.pid);
	if (!ffs_priority_lend(l)) {
		print_message("SKIP: the kernel does not allow real-time priority here (CAP_SYS_NICE)\n");
		target_end(v);
		skip();
	}
}

static void check_found(const struct ffs_lent *l, unsigned n)
{
#ifdef __SANITIZE_THREAD__
	assert_true(l->found >= n); /* it has threads of its own in every process */
#else
	assert_int_equal(l->found, n);
#endif
}

/* All get it, vCPUs no more than others; they give it back first, so that none has it when the guest runs. */
static void test_lent(void **s)
{
	struct ffs_proc_id v = target_start(vmm, NULL);
	struct ffs_lent l = {0};

	lend(&l, v);
	check_found(&l, N);
	int vcpu = 0, other = 0, vcpus = 0;

	for (size_t i = 0; i < N; i++) {
		vcpus += threads[i].vcpu;
		assert_int_equal(policy(i), SCHED_RR);
		int *of = threads[i].vcpu ? &vcpu : &other;

		if (!*of)
			*of = priority(i);
		assert_int_equal(priority(i), *of);
	}
	/* so that they cannot keep it off all CPUs */
	if (vcpus < sysconf(_SC_NPROCESSORS_ONLN))
		assert_int_equal(vcpu, other);
	else
		assert_true(vcpu < other);
	ffs_priority_return_vcpus(&l);
	for (size_t i = 0; i < N; i++)
		assert_int_equal(policy(i), threads[i].vcpu ? SCHED_OTHER : SCHED_RR);
	ffs_priority_return(&l);
	ffs_priority_return(&l);
	for (size_t i = 0; i < N; i++)
		assert_int_equal(policy(i), SCHED_OTHER);
	target_end(v);
}

/* What its owner gave a thread it keeps; batch and idle threads come back as they were. */
static void test_own_policy(void **s)
{
	struct ffs_proc_id v = target_start(vmm, NULL);
	const struct sched_param none = {0}, own = {.sched_priority = 7};
	struct ffs_lent l = {0};

	assert_int_equal(sched_setscheduler(shared->tid[1], SCHED_BATCH, &none), 0);
	assert_int_equal(sched_setscheduler(shared->tid[5], SCHED_IDLE, &none), 0);
	if (sched_setscheduler(shared->tid[7], SCHED_FIFO, &own) < 0) {
		print_message("SKIP: the kernel does not allow real-time priority here (CAP_SYS_NICE)\n");
		target_end(v);
		skip();
	}
	lend(&l, v);
	check_found(&l, N - 1);
	assert_int_equal(policy(1), SCHED_RR);
	assert_int_equal(policy(7), SCHED_FIFO);
	assert_int_equal(priority(7), 7);
	ffs_priority_return(&l);
	assert_int_equal(policy(1), SCHED_BATCH);
	assert_int_equal(policy(5), SCHED_IDLE);
	assert_int_equal(policy(7), SCHED_FIFO);
	target_end(v);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_lent),
		cmocka_unit_test(test_own_policy),
	};
	return cmocka_run_group_tests(tests, setup, NULL);
}
