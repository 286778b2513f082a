/* The injection into real processes that wait in every way there is, with signals, several at once, and the
 * daemon's death at any point; the target checks itself. What refuses it is in test-inject-refused.c. */
#include "inject-kit.h"

#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

static void test_ways(void **state)
{
	for (unsigned w = 0; w < FFS_ARRAY_LEN(ways); w++) {
		setup(NULL);
		struct ffs_proc_id id = target_start(loop_way, (void *)&ways[w]);

		/* its own first mappings (a thread's stack) are not ours to judge */
		assert_true(target_wait(atomic_load(&sh->rounds) > 20, 5000));
		unsigned fds = target_fds(id.pid);
		char *maps = target_maps(id.pid), blocked[128], caught[128], now[128];

		target_status(id.pid, "SigBlk:", blocked);
		target_status(id.pid, "SigCgt:", caught);
		uint64_t t0 = ffs_now_ns();

		for (unsigned i = 0; i < 120; i++)
			inject_ok(id);
		print_message("%-16s %3.0f us each, %d EINTR\n", ways[w].name,
			(double)(ffs_now_ns() - t0) / 120e3, atomic_load(&sh->eintr));
		assert_intact(id, fds);
		char *after = target_maps(id.pid);

		assert_string_equal(maps, after);
		free(maps);
		free(after);
		target_status(id.pid, "SigBlk:", now);
		assert_string_equal(blocked, now);
		target_status(id.pid, "SigCgt:", now);
		assert_string_equal(caught, now);
		target_end(id);
	}
}

/* Many threads, each in its own kind of wait; the main thread among them. */
static void many_threads(void *arg)
{
	pthread_t th;

	epoll_fd = epoll_create1(0);
	if (pipe(pipe_fd) < 0 || pthread_create(&th, NULL, feed_pipe, NULL))
		_exit(1);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(ways); i++)
		if (ways[i].fn != wait_busy && pthread_create(&th, NULL, thread_way, (void *)&ways[i]))
			_exit(1);
	target_ready();
	for (;;) {
		ways[atomic_load(&sh->rounds) % 5].fn();
		atomic_fetch_add(&sh->rounds, 1);
	}
}

static void test_thousand(void **state)
{
	struct ffs_proc_id id = target_start(many_threads, NULL);
	unsigned fds = target_fds(id.pid);

	for (unsigned i = 0; i < 1000; i++)
		inject_ok(id);
	assert_intact(id, fds);
	target_end(id);
}

/* ---- which thread ---- */

static _Atomic int vcpu_ready;
static void *vcpu_thread(void *arg)
{
	struct epoll_event ev;

	pthread_setname_np(pthread_self(), "CPU 0/KVM");
	atomic_store(&vcpu_ready, 1);
	for (;;)
		if (epoll_wait(epoll_fd, &ev, 1, -1) < 0 && errno == EINTR)
			atomic_fetch_add(&sh->eintr, 1);
	return NULL;
}

static void *worker_thread(void *arg)
{
	for (;;) {
		wait_nanosleep();
		atomic_fetch_add(&sh->rounds, 1);
	}
	return NULL;
}

/* The main thread in D state: the parent of a vfork(). arg: 0 no other thread, 1 a vCPU only, 2 a vCPU and a
 * worker. */
static void main_in_d(void *arg)
{
	pthread_t th;
	long kind = (long)arg;

	epoll_fd = epoll_create1(0);
	if (kind >= 1) {
		pthread_create(&th, NULL, vcpu_thread, NULL);
		while (!atomic_load(&vcpu_ready))
			sched_yield();
	}
	if (kind >= 2)
		pthread_create(&th, NULL, worker_thread, NULL);
	target_ready();
	/* a vfork() that sanitizers do not replace and that needs no stack of its own */
	long pid = syscall(SYS_clone, CLONE_VFORK | SIGCHLD, 0, 0, 0, 0);

	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			syscall(SYS_pause);
	}
}

static void end_vfork(struct ffs_proc_id id)
{
	char path[64], text[64] = "";

	snprintf(path, sizeof(path), "/proc/%d/task/%d/children", (int)id.pid, (int)id.pid);
	FILE *f = fopen(path, "re");
	int child = f && fgets(text, sizeof(text), f) ? atoi(text) : 0;

	if (f)
		fclose(f);
	target_end(id);
	if (child)
		kill(child, SIGKILL);
}

static bool in_d(pid_t pid)
{
	char st;

	return ffs_proc_stat(pid, &st, NULL) == 0 && st == 'D';
}

static void test_d_state(void **state)
{
#ifdef __SANITIZE_THREAD__
	long kind = 2; /* its runtime has a thread of its own in every process, which would be taken */
#else
	long kind = 0;
#endif
	for (; kind <= 2; kind++) {
		setup(NULL);
		atomic_store(&vcpu_ready, 0);
		struct ffs_proc_id id = target_start(main_in_d, (void *)kind);

		assert_true(target_wait(in_d(id.pid), 2000));
		unsigned fds = target_fds(id.pid);
		uint64_t t0 = ffs_now_ns();

		if (kind < 2) {
			inject_fails(id, ETIMEDOUT, "uninterruptible");
			assert_in_range(ffs_now_ns() - t0, 900 * FFS_NS_PER_MS, 1500 * FFS_NS_PER_MS);
		} else {
			for (unsigned i = 0; i < 50; i++)
				inject_ok(id);
			assert_intact(id, fds);
		}
		assert_int_equal(atomic_load(&sh->eintr), 0); /* the vCPU was left alone */
		assert_int_equal(target_fds(id.pid), fds);
		end_vfork(id);
	}
}

/* ---- signals ---- */

static void on_signal(int sig, siginfo_t *info, void *ctx)
{
	SELF_CHECK(info->si_code == SI_QUEUE);
	SELF_CHECK(info->si_pid == getppid());
	SELF_CHECK((uint64_t)info->si_value.sival_int ==
		   atomic_fetch_add(&sh->signals, 1)); /* none lost, none swapped */
}

static void signalled(void *arg)
{
	struct sigaction sa = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};

	sigaction(SIGRTMIN, &sa, NULL);
	if (arg) {
		sigset_t all;

		sigfillset(&all);
		sigdelset(&all, SIGRTMIN);
		sigprocmask(SIG_SETMASK, &all, NULL);
	}
	target_ready();
	for (;;) {
		struct timespec ts = {.tv_nsec = 300000};

		SELF_CHECK(nanosleep(&ts, NULL) == 0 || errno == EINTR);
		atomic_fetch_add(&sh->rounds, 1);
	}
}

static void *queue_signals(void *arg)
{
	pid_t pid = *(pid_t *)arg;

	for (int i = 0; i < 4000; i++) {
		union sigval v = {.sival_int = i};

		while (sigqueue(pid, SIGRTMIN, v) < 0)
			poll(NULL, 0, 1);
		if (i % 16 == 0)
			poll(NULL, 0, 1);
	}
	return NULL;
}

static void test_signals(void **state)
{
	/* with every other signal (SIGTRAP too) unblocked and blocked */
	for (long masked = 0; masked < 2; masked++) {
		setup(NULL);
		struct ffs_proc_id id = target_start(signalled, (void *)masked);
		unsigned fds = target_fds(id.pid);
		char before[128], after[128];
		pthread_t th;

		target_status(id.pid, "SigBlk:", before);
		assert_int_equal(pthread_create(&th, NULL, queue_signals, &id.pid), 0);
		for (unsigned i = 0; i < 400; i++)
			inject_ok(id);
		pthread_join(th, NULL);
		assert_true(target_wait(atomic_load(&sh->signals) == 4000, 5000));
		assert_intact(id, fds);
		target_status(id.pid, "SigBlk:", after);
		assert_string_equal(before, after);
		target_end(id);
	}
}

static void test_stopped(void **state)
{
	struct ffs_proc_id id = target_start(loop_way, (void *)&ways[0]);
	unsigned fds = target_fds(id.pid);
	int status;
	char st;

	kill(id.pid, SIGSTOP);
	assert_int_equal(waitpid(id.pid, &status, WUNTRACED), id.pid);
	uint64_t rounds = atomic_load(&sh->rounds);

	for (unsigned i = 0; i < 50; i++)
		inject_ok(id);
	assert_true(target_wait(ffs_proc_stat(id.pid, &st, NULL) == 0 && st == 'T', 1000));
	assert_int_equal(atomic_load(&sh->rounds), rounds); /* it did not run meanwhile */
	kill(id.pid, SIGCONT);
	assert_intact(id, fds);
	/* stopped and continued while it happens */
	for (unsigned i = 0; i < 200; i++) {
		kill(id.pid, i & 1 ? SIGCONT : SIGSTOP);
		inject_ok(id);
	}
	kill(id.pid, SIGCONT);
	assert_intact(id, fds);
	target_end(id);
}

/* ---- madvise ---- */

static char *mapped;

static void map_and_wait(void *arg)
{
	memset(mapped, 7, 8192);
	target_ready();
	for (;;) {
		wait_nanosleep();
		if (mapped[0] == 0 && mapped[4096] == 7)
			atomic_store(&sh->stop, 1);
		atomic_fetch_add(&sh->rounds, 1);
	}
}

static void test_madvise(void **state)
{
	struct ffs_error err = {0};

	mapped = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ffs_proc_id id = target_start(map_and_wait, NULL);
	unsigned fds = target_fds(id.pid);

	assert_int_equal(ffs_inject_madvise(
				 spawner, id, (uint64_t)(uintptr_t)mapped, 4096, MADV_DONTNEED, SECOND, &err),
		0);
	assert_true(target_wait(atomic_load(&sh->stop), 1000));
	assert_int_equal(
		ffs_inject_madvise(spawner, id, (uint64_t)(uintptr_t)mapped, 4096, 9999, SECOND, &err),
		-EINVAL);
	assert_non_null(strstr(err.text, "madvise"));
	assert_intact(id, fds);
	target_end(id);
	munmap(mapped, 8192);
}

/* ---- several at once, and the daemon's death ---- */

static _Atomic int parallel_failed;
static void *inject_loop(void *arg)
{
	struct ffs_proc_id *id = arg;

	for (unsigned i = 0; i < 100; i++) {
		int uffd = -1;

		struct ffs_error err = {0};

		if (ffs_inject_userfaultfd(spawner, *id, 10 * SECOND, &uffd, &err) < 0) {
			atomic_fetch_add(&parallel_failed, 1);
			print_error("parallel: %s\n", err.text);
		} else {
			close(uffd);
		}
	}
	return NULL;
}

static void test_parallel(void **state)
{
	struct ffs_proc_id id[2] = {
		target_start(loop_way, (void *)&ways[0]), target_start(loop_way, (void *)&ways[2])};
	unsigned fds[2] = {target_fds(id[0].pid), target_fds(id[1].pid)};
	pthread_t th[6];

	for (unsigned i = 0; i < 6; i++)
		assert_int_equal(pthread_create(&th[i], NULL, inject_loop, &id[i % 2]), 0);
	for (unsigned i = 0; i < 6; i++)
		pthread_join(th[i], NULL);
	assert_int_equal(atomic_load(&parallel_failed), 0);
	for (unsigned i = 0; i < 2; i++) {
		assert_intact(id[i], fds[i]);
		target_end(id[i]);
	}
}

/* A daemon: starts a spawner of its own, injects for ever. */
static struct ffs_proc_id victim;
static void fake_daemon(void *arg)
{
	struct ffs_spawner *sp;
	int uffd;

	if (ffs_spawner_start(&sp, NULL) < 0)
		_exit(1);
	target_ready();
	for (;;)
		if (ffs_inject_userfaultfd(sp, victim, 10 * SECOND, &uffd, NULL) == 0)
			close(uffd);
}

/* A running process of that name whose command line is ours. */
static void test_daemon_killed(void **state)
{
	const struct way *kinds[] = {&ways[0], &ways[5], &ways[8]};

	for (unsigned k = 0; k < FFS_ARRAY_LEN(kinds); k++) {
		setup(NULL);
		victim = target_start(loop_way, (void *)kinds[k]);
		unsigned fds = target_fds(victim.pid);

		for (unsigned i = 0; i < 100; i++) {
			struct ffs_proc_id d = target_start(fake_daemon, NULL);
			uint64_t end = ffs_now_ns() + i * 31000;

			while (ffs_now_ns() < end)
				;
			target_end(d);
		}
		assert_true(target_wait(helpers_named("forkfs-inject") == 0, 5000));
		assert_intact(victim, fds);
		target_end(victim);
	}
	assert_true(target_wait(helpers_named("forkfs-spawn") == 1, 5000)); /* ours */
}

#ifdef FFS_FAULTS
static const char *points[] = {"inject-target", "inject-seize", "inject-interrupt", "inject-wait",
	"inject-getregs", "inject-getmask", "inject-find", "inject-setmask", "inject-setregs", "inject-enter",
	"inject-exit", "inject-getfd", "inject-verify", "inject-close", "inject-restore",
	"inject-restore-mask", "inject-detach"};

static void write_rule(const char *text)
{
	FILE *f = fopen(fault_file, "we");

	assert_non_null(f);
	fputs(text, f);
	fclose(f);
}

/* Each step fails once, and the daemon is killed while the injector stands at each step, first and second
 * pass (the close). */
static void test_fault_points(void **state)
{
	char rule[256];

	for (unsigned p = 0; p < FFS_ARRAY_LEN(points); p++)
		for (unsigned pass = 1; pass <= 2; pass++)
			for (unsigned k = 0; k < 2; k++) {
				bool once = !(pass == 2 && (strcmp(points[p], "inject-setregs") == 0 ||
								   strcmp(points[p], "inject-enter") == 0 ||
								   strcmp(points[p], "inject-exit") == 0));

				if (pass == 2 && once)
					continue;
				setup(NULL);
				victim = target_start(loop_way, (void *)&ways[k ? 8 : 0]);
				unsigned fds = target_fds(victim.pid);
				int uffd = -1;

				snprintf(rule, sizeof(rule), "%s@%u error:EIO\n", points[p], pass);
				write_rule(rule);
				int r = ffs_inject_userfaultfd(spawner, victim, 5 * SECOND, &uffd, NULL);

				if (r == 0)
					close(uffd);
				write_rule("");
				assert_intact(victim, fds);

				snprintf(rule, sizeof(rule), "%s@%u hold:%s\n", points[p], pass, hold_file);
				write_rule(rule);
				struct ffs_proc_id d = target_start(fake_daemon, NULL);

				if (!target_wait(access(held_file, F_OK) == 0, 3000))
					print_error("%s@%u was not reached\n", points[p], pass);
				assert_int_equal(access(held_file, F_OK), 0);
				target_end(d);
				assert_int_equal(
					close(open(hold_file, O_CREAT | O_WRONLY | O_CLOEXEC, 0600)), 0);
				assert_true(target_wait(helpers_named("forkfs-inject") == 0, 5000));
				assert_intact(victim, fds);
				unlink(hold_file);
				unlink(held_file);
				write_rule("");
				inject_ok(victim);
				target_end(victim);
			}
}
#endif

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(test_ways, setup),
		cmocka_unit_test_setup(test_thousand, setup),
		cmocka_unit_test_setup(test_d_state, setup),
		cmocka_unit_test_setup(test_signals, setup),
		cmocka_unit_test_setup(test_stopped, setup),
		cmocka_unit_test_setup(test_madvise, setup),
		cmocka_unit_test_setup(test_parallel, setup),
		cmocka_unit_test_setup(test_daemon_killed, setup),
#ifdef FFS_FAULTS
		cmocka_unit_test_setup(test_fault_points, setup),
#endif
	};

	return cmocka_run_group_tests(tests, start_spawner, stop_spawner);
}
