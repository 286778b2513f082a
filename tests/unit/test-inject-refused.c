/* Processes that the injection must not, or only with care, be done to: filtered by seccomp, traced by
 * another, gone, 32 bit, unprivileged. Each is refused with a sentence, or served, and goes on unharmed. */
#include "inject-kit.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/stat.h>

/* ---- refusals ---- */

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

/* ---- the unprivileged VMM ---- */

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

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(test_seccomp, setup),
		cmocka_unit_test_setup(test_other_tracer, setup),
		cmocka_unit_test_setup(test_gone, setup),
		cmocka_unit_test_setup(test_exit_in_the_middle, setup),
		cmocka_unit_test_setup(test_32_bit, setup),
		cmocka_unit_test_setup(test_unprivileged, setup),
	};

	return cmocka_run_group_tests(tests, start_spawner, stop_spawner);
}
