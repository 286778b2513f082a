/* What the tests of the injection share: a spawner for the whole program, targets that wait in every way
 * there is and check themselves, injections that must work or be refused. Included by one .c per program. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/syscall.h>

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

/* ---- ways of waiting ---- */

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
static inline void *feed_pipe(void *arg)
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

static inline void *thread_way(void *arg)
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

static inline unsigned helpers_named(const char *name)
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

/* ---- the spawner ---- */

#ifdef FFS_FAULTS
static char fault_dir[] = "/tmp/ffs-inject-XXXXXX", fault_file[64], hold_file[64], held_file[80];
#endif

static inline int start_spawner(void **state)
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

static inline int stop_spawner(void **state)
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
