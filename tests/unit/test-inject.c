/* The injection into real processes: every kind of waiting, signals, seccomp, tracers, death of target and
 * daemon at any point; the target checks itself. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "uffd/inject.h"
#include "uffd/uffd.h"
#include "target.h"

#define SECOND FFS_NS_PER_S

static struct ffs_spawner *spawner;

/* Shared with the targets. */
static struct shared {
	_Atomic uint64_t rounds;
	_Atomic int bad;   /* line of a failed self-check, 0: none */
	_Atomic int eintr; /* of epoll_wait, which the kernel does not restart */
	_Atomic uint64_t signals;
	_Atomic int stop;
} * sh;

#define SELF_CHECK(cond)                                                                                     \
	do {                                                                                                 \
		if (!(cond))                                                                                 \
			atomic_store(&sh->bad, __LINE__);                                                    \
	} while (0)

static int setup(void **state)
{
	memset(sh, 0, sizeof(*sh));
	return 0;
}

/* Inject once, expect a working descriptor, nothing changed in the target. */
static void inject_ok(struct ffs_proc_id id)
{
	struct ffs_error err = {0};
	int uffd = -1;
	int r = ffs_inject_userfaultfd(spawner, id, 5 * SECOND, &uffd, &err);

	if (r)
		print_error("inject: %d %s\n", r, err.text);
	assert_int_equal(r, 0);
	assert_int_equal(fcntl(uffd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
	assert_int_equal(fcntl(uffd, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
	assert_int_equal(ffs_uffd_api(uffd, &err), 0);
	close(uffd);
}

static void inject_fails(struct ffs_proc_id id, int code, const char *word)
{
	struct ffs_error err = {0};
	int uffd = -1;
	int r = ffs_inject_userfaultfd(spawner, id, SECOND, &uffd, &err);

	if (r != -code || !strstr(err.text, word))
		print_error("inject: %d, wanted %d with \"%s\": %s\n", r, -code, word, err.text);
	assert_int_equal(r, -code);
	assert_int_equal(uffd, -1);
	assert_int_equal(err.code, code);
	assert_non_null(strstr(err.text, word));
}

/* ---- ways of waiting
 * ------------------------------------------------------------------------------------------- */

static void wait_nanosleep(void)
{
	struct timespec ts = {.tv_nsec = 3000000};
	uint64_t t0 = ffs_now_ns();

	SELF_CHECK(syscall(SYS_nanosleep, &ts, NULL) == 0);
	SELF_CHECK(ffs_now_ns() - t0 >= 3000000);
}

static void wait_clock_nanosleep(void)
{
	struct timespec ts = {.tv_nsec = 3000000};

	SELF_CHECK(clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL) == 0);
}

static void wait_futex(void)
{
	static uint32_t word;
	struct timespec ts = {.tv_nsec = 3000000};
	uint64_t t0 = ffs_now_ns();

	SELF_CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &ts) == -1 && errno == ETIMEDOUT);
	SELF_CHECK(ffs_now_ns() - t0 >= 3000000);
}

static void wait_poll(void)
{
	struct pollfd p = {.fd = -1};
	uint64_t t0 = ffs_now_ns();

	SELF_CHECK(poll(&p, 1, 3) == 0);
	SELF_CHECK(ffs_now_ns() - t0 >= 2900000);
}

static void wait_ppoll(void)
{
	struct pollfd p = {.fd = -1};
	struct timespec ts = {.tv_nsec = 3000000};
	sigset_t set;

	sigemptyset(&set);
	SELF_CHECK(ppoll(&p, 1, &ts, &set) == 0);
}

static int pipe_fd[2];
static void *feed_pipe(void *arg)
{
	char c = 0;

	for (;;) {
		poll(NULL, 0, 2);
		if (write(pipe_fd[1], &c, 1) != 1)
			return NULL;
		c++;
	}
}
static void wait_read(void)
{
	static char expect;
	char c;

	SELF_CHECK(read(pipe_fd[0], &c, 1) == 1 && c == expect);
	expect++;
}

static int epoll_fd;
static void wait_epoll(void)
{
	struct epoll_event ev;
	int r = epoll_wait(epoll_fd, &ev, 1, 3);

	if (r < 0 && errno == EINTR)
		atomic_fetch_add(&sh->eintr, 1);
	else
		SELF_CHECK(r == 0);
}

static void wait_sigtimedwait(void)
{
	struct timespec ts = {.tv_nsec = 3000000};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	int r = sigtimedwait(&set, NULL, &ts);

	SELF_CHECK(r < 0 && (errno == EAGAIN || errno == EINTR)); /* EINTR as documented in signal(7) */
}

/* Every general register (those that a system call clobbers too), the flags, the red zone and an SSE
 * register, held for a while. */
static void wait_busy(void)
{
	uint64_t ok = 0;

	__asm__ volatile(
		"mov %%rsp, %%rax\n\t"
		"movq %%rax, %%xmm7\n\t"
		"movq $0x7a7a, -64(%%rsp)\n\t"
		"mov $0x101, %%rbx\n\tmov $0x102, %%rcx\n\tmov $0x103, %%rdx\n\tmov $0x104, %%rsi\n\t"
		"mov $0x105, %%rdi\n\tmov $0x108, %%r8\n\tmov $0x109, %%r9\n\tmov $0x10a, %%r10\n\t"
		"mov $0x10b, %%r11\n\tmov $0x10c, %%r12\n\tmov $0x10d, %%r13\n\tmov $0x10e, %%r14\n\t"
		"mov $600000, %%r15\n"
		"1:\n\t"
		"cmp $0x101, %%rbx\n\tjne 2f\n\tcmp $0x102, %%rcx\n\tjne 2f\n\tcmp $0x103, %%rdx\n\tjne "
		"2f\n\t"
		"cmp $0x104, %%rsi\n\tjne 2f\n\tcmp $0x105, %%rdi\n\tjne 2f\n\tcmp $0x108, %%r8\n\tjne 2f\n\t"
		"cmp $0x109, %%r9\n\tjne 2f\n\tcmp $0x10a, %%r10\n\tjne 2f\n\tcmp $0x10b, %%r11\n\tjne 2f\n\t"
		"cmp $0x10c, %%r12\n\tjne 2f\n\tcmp $0x10d, %%r13\n\tjne 2f\n\tcmp $0x10e, %%r14\n\tjne "
		"2f\n\t"
		"cmpq $0x7a7a, -64(%%rsp)\n\tjne 2f\n\t"
		"movq %%xmm7, %%rax\n\tcmp %%rsp, %%rax\n\tjne 2f\n\t"
		"dec %%r15\n\tjnz 1b\n\t"
		"mov $1, %%rax\n\tjmp 3f\n"
		"2:\n\txor %%rax, %%rax\n"
		"3:\n"
		: "=a"(ok)
		:
		: "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
		"xmm7", "memory", "cc");
	SELF_CHECK(ok == 1);
}

static const struct way {
	const char *name;
	void (*fn)(void);
} ways[] = {{"nanosleep", wait_nanosleep}, {"clock_nanosleep", wait_clock_nanosleep}, {"futex", wait_futex},
	{"poll", wait_poll}, {"ppoll", wait_ppoll}, {"read", wait_read}, {"epoll_wait", wait_epoll},
	{"sigtimedwait", wait_sigtimedwait}, {"busy", wait_busy}};

static void loop_way(void *arg)
{
	const struct way *w = arg;
	pthread_t th;

	epoll_fd = epoll_create1(0);
	if (pipe(pipe_fd) < 0 || (w->fn == wait_read && pthread_create(&th, NULL, feed_pipe, NULL)))
		_exit(1);
	target_ready();
	for (;;) {
		w->fn();
		atomic_fetch_add(&sh->rounds, 1);
	}
}

static void *thread_way(void *arg)
{
	const struct way *w = arg;

	for (;;)
		w->fn();
	return NULL;
}

static void assert_intact(struct ffs_proc_id id, unsigned fds)
{
	uint64_t rounds = atomic_load(&sh->rounds);
	char line[128];

	assert_true(target_wait(
		(target_status(id.pid, "TracerPid:", line), strstr(line, "\t0\n") != NULL), 5000));
	assert_true(target_wait(atomic_load(&sh->rounds) > rounds + 1, 5000));
	if (atomic_load(&sh->bad))
		print_error("self-check of the target failed in line %d\n", atomic_load(&sh->bad));
	assert_int_equal(atomic_load(&sh->bad), 0);
	assert_int_equal(target_fds(id.pid), fds);
}

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

/* ---- which thread
 * ---------------------------------------------------------------------------------------------- */

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

/* ---- signals
 * --------------------------------------------------------------------------------------------------- */

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

/* ---- refusals
 * -------------------------------------------------------------------------------------------------- */

static void filtered(void *arg)
{
	struct sock_filter f[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	struct sock_fprog prog = {.len = FFS_ARRAY_LEN(f), .filter = f};

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog) < 0)
		_exit(1);
	target_ready();
	while (!atomic_load(&sh->stop)) {
		wait_nanosleep();
		atomic_fetch_add(&sh->rounds, 1);
	}
	syscall(SYS_userfaultfd, 0); /* the filter is in force again */
}

static void test_seccomp(void **state)
{
	struct ffs_proc_id id = target_start(filtered, NULL);
	unsigned fds = target_fds(id.pid);
	int status;

	for (unsigned i = 0; i < 100; i++)
		inject_ok(id);
	assert_intact(id, fds);
	atomic_store(&sh->stop, 1);
	assert_int_equal(waitpid(id.pid, &status, 0), id.pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
}

static void trace_it(void *arg)
{
	pid_t pid = *(pid_t *)arg;

	prctl(PR_SET_NAME, "my-debugger");
	if (ptrace(PTRACE_SEIZE, pid, 0, 0) < 0)
		_exit(1);
	target_ready();
	for (;;)
		pause();
}

static void test_other_tracer(void **state)
{
	struct ffs_proc_id id = target_start(loop_way, (void *)&ways[0]);
	unsigned fds = target_fds(id.pid);
	struct ffs_proc_id tracer = target_start(trace_it, &id.pid);
	char pid[32];

	inject_fails(id, EBUSY, "my-debugger");
	snprintf(pid, sizeof(pid), "process %d ", (int)tracer.pid);
	inject_fails(id, EBUSY, pid);
	target_end(tracer);
	inject_ok(id);
	assert_intact(id, fds);
	target_end(id);
}

static void exit_at_once(void *arg)
{
	target_ready();
}

static void test_gone(void **state)
{
	struct ffs_proc_id id = target_start(loop_way, (void *)&ways[0]), other = id;
	unsigned fds = target_fds(id.pid);
	char st;

	other.start++;
	inject_fails(other, ESRCH, "another process");
	assert_intact(id, fds);
	target_end(id);
	inject_fails(id, ESRCH, "");

	id = target_start(exit_at_once, NULL);
	assert_true(target_wait(ffs_proc_stat(id.pid, &st, NULL) == 0 && st == 'Z', 1000));
	inject_fails(id, ESRCH, "zombie");
	target_end(id);

	struct ffs_proc_id kernel = {.pid = 2};
	char name[128];

	target_status(2, "Name:", name);
	if (strstr(name, "kthreadd") && ffs_proc_stat(2, NULL, &kernel.start) == 0)
		inject_fails(kernel, ENOTSUP, "kernel thread");
}

static void test_exit_in_the_middle(void **state)
{
	unsigned done = 0, gone = 0;

	for (unsigned i = 0; i < 300; i++) {
		struct ffs_proc_id id = target_start(loop_way, (void *)&ways[8]);
		struct ffs_error err = {0};
		int uffd = -1;
		pid_t killer = fork();

		if (killer == 0) {
			uint64_t end = ffs_now_ns() + i * 5000;

			while (ffs_now_ns() < end)
				;
			kill(id.pid, SIGKILL);
			_exit(0);
		}
		int r = ffs_inject_userfaultfd(spawner, id, 5 * SECOND, &uffd, &err);

		if (r != 0 && r != -ESRCH)
			print_error("%d: %s\n", r, err.text);
		assert_true(r == 0 || r == -ESRCH);
		done += r == 0;
		gone += r != 0;
		if (r == 0)
			close(uffd);
		waitpid(killer, NULL, 0);
		target_end(id);
	}
	print_message("%u injected, %u gone\n", done, gone);
}

/* A 32-bit program that only waits: mov $29, %eax; int $0x80; jmp. */
static void test_32_bit(void **state)
{
	static const unsigned char elf[] = {0x7f, 'E', 'L', 'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3,
		0, 1, 0, 0, 0, 0x54, 0x80, 4, 8, 52, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 52, 0, 32, 0, 1, 0, 0,
		0, 0, 0, 0, 0,
		/* program header */ 1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 4, 8, 0, 0x80, 4, 8, 0x5d, 0, 0, 0,
		0x5d, 0, 0, 0, 5, 0, 0, 0, 0, 0x10, 0, 0, /* code */ 0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb,
		0xf7};
	int fd = memfd_create("elf32", MFD_CLOEXEC);

	assert_int_equal(write(fd, elf, sizeof(elf)), sizeof(elf));
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	struct ffs_proc_id id = {.pid = fork()};

	if (id.pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execl(path, path, NULL);
		_exit(errno);
	}
	char link[128], exe[64];
	int status = 0;

	snprintf(exe, sizeof(exe), "/proc/%d/exe", (int)id.pid);
	bool started =
		target_wait((memset(link, 0, sizeof(link)), readlink(exe, link, sizeof(link) - 1)) > 0 &&
				    (strstr(link, "elf32") || waitpid(id.pid, &status, WNOHANG) == id.pid),
			2000);

	close(fd);
	if (!started || !strstr(link, "elf32")) {
		print_message("no 32-bit programs on this kernel (%d)\n", WEXITSTATUS(status));
		skip();
	}
	assert_int_equal(ffs_proc_stat(id.pid, NULL, &id.start), 0);
	inject_fails(id, ENOTSUP, "32-bit");
	assert_true(ffs_proc_alive(id));
	target_end(id);
}

/* ---- the unprivileged VMM
 * -------------------------------------------------------------------------------------- */

static void unprivileged(void *arg)
{
	const char *dev = arg;

	/* a /dev of its own, with or without the device */
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
		mount("none", "/dev", "tmpfs", 0, NULL) < 0)
		_exit(1);
	umask(0);
	if (dev && mknod("/dev/userfaultfd", S_IFCHR | 0666, (dev_t)strtoull(dev, NULL, 10)) < 0)
		_exit(2);
	if (setgid(65534) < 0 || setuid(65534) < 0)
		_exit(3);
	if (syscall(SYS_userfaultfd, O_CLOEXEC) >= 0)
		_exit(4); /* vm.unprivileged_userfaultfd=1 here */
	target_ready();
	for (;;) {
		wait_busy();
		atomic_fetch_add(&sh->rounds, 1);
	}
}

static void test_unprivileged(void **state)
{
	struct stat st;
	char dev[32];

	if (geteuid() != 0 || stat("/dev/userfaultfd", &st) < 0)
		skip();
	snprintf(dev, sizeof(dev), "%llu", (unsigned long long)st.st_rdev);
	struct ffs_proc_id id = target_start(unprivileged, dev);
	unsigned fds = target_fds(id.pid);

	for (unsigned i = 0; i < 200; i++)
		inject_ok(id);
	assert_intact(id, fds);
	target_end(id);

	id = target_start(unprivileged, NULL);
	inject_fails(id, EPERM, "/dev/userfaultfd");
	assert_intact(id, target_fds(id.pid));
	target_end(id);
}

/* ---- madvise
 * --------------------------------------------------------------------------------------------------- */

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

/* ---- several at once, and the daemon's death
 * ------------------------------------------------------------------- */

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
static unsigned helpers_named(const char *name)
{
	DIR *d = opendir("/proc");
	unsigned n = 0;

	for (struct dirent *e; (e = readdir(d)) != NULL;) {
		char line[128], want[64], path[300], a[256] = "", b[256] = "";

		if (e->d_name[0] < '0' || e->d_name[0] > '9')
			continue;
		target_status((pid_t)atoi(e->d_name), "Name:", line);
		snprintf(want, sizeof(want), "Name:\t%s\n", name);
		if (strcmp(line, want) != 0)
			continue;
		snprintf(path, sizeof(path), "/proc/%.32s/exe", e->d_name);
		if (readlink(path, a, sizeof(a) - 1) > 0 &&
			readlink("/proc/self/exe", b, sizeof(b) - 1) > 0 && !strcmp(a, b))
			n++;
	}
	closedir(d);
	return n;
}

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

static char fault_dir[] = "/tmp/ffs-inject-XXXXXX", fault_file[64], hold_file[64], held_file[80];

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

static int start_spawner(void **state)
{
	sh = shared_page(4096);
#ifdef FFS_FAULTS
	if (!mkdtemp(fault_dir))
		return -1;
	snprintf(fault_file, sizeof(fault_file), "%s/rules", fault_dir);
	snprintf(hold_file, sizeof(hold_file), "%s/go", fault_dir);
	snprintf(held_file, sizeof(held_file), "%s.held", hold_file);
	setenv("FORKFS_FAULT_FILE", fault_file, 1);
#endif
	return ffs_spawner_start(&spawner, NULL);
}

static int stop_spawner(void **state)
{
	ffs_spawner_stop(spawner);
#ifdef FFS_FAULTS
	unlink(fault_file);
	unlink(hold_file);
	unlink(held_file);
	rmdir(fault_dir);
#endif
	return helpers_named("forkfs-spawn") == 0 ? 0 : -1;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(test_ways, setup),
		cmocka_unit_test_setup(test_thousand, setup),
		cmocka_unit_test_setup(test_d_state, setup),
		cmocka_unit_test_setup(test_signals, setup),
		cmocka_unit_test_setup(test_stopped, setup),
		cmocka_unit_test_setup(test_seccomp, setup),
		cmocka_unit_test_setup(test_other_tracer, setup),
		cmocka_unit_test_setup(test_gone, setup),
		cmocka_unit_test_setup(test_exit_in_the_middle, setup),
		cmocka_unit_test_setup(test_32_bit, setup),
		cmocka_unit_test_setup(test_unprivileged, setup),
		cmocka_unit_test_setup(test_madvise, setup),
		cmocka_unit_test_setup(test_parallel, setup),
		cmocka_unit_test_setup(test_daemon_killed, setup),
#ifdef FFS_FAULTS
		cmocka_unit_test_setup(test_fault_points, setup),
#endif
	};

	return cmocka_run_group_tests(tests, start_spawner, stop_spawner);
}
