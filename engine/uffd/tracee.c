/* Owns one traced thread: what was saved of it and how it is put back.
 *
 * Threads: the injector process's only one. No locks. Waits for ptrace stops (sigtimedwait on SIGCHLD, which
 * is blocked).
 *
 * System calls are made between a syscall-entry and a syscall-exit stop and not with a single step: the trap
 * of a step is a forced SIGTRAP, and the kernel resets the handler of a forced signal that the thread has
 * blocked (QEMU's workers block all), for good and for the whole process. Syscall stops are no signals.
 *
 * The thread's signals are blocked meanwhile, so whatever arrives stays in the kernel's queue, siginfo and
 * all, and is delivered to the restored context.
 *
 * How an interrupted system call goes on: the thread was stopped inside get_signal() with rax = -ERESTART*
 * and orig_rax = the call's number. With both put back exactly, the detach makes the kernel look for signals
 * once more on its way to user mode, and there it restarts the call as if nothing had been. The restart block
 * (remaining time of nanosleep, futex, poll) is the thread's own and the injected calls don't use it. */
#include "uffd/tracee.h"

#ifndef __x86_64__
#error "the injection is written for x86-64"
#endif

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"

#define CODE_SEGMENT_64 0x33 /* __USER_CS, arch/x86/include/asm/segment.h */
#define STOP_SYSCALL (SIGTRAP | 0x80)
#define SCAN_CHUNK 65536

static long trace(int request, pid_t tid, uint64_t addr, const void *data)
{
	return ptrace((enum __ptrace_request)request, tid, (void *)(uintptr_t)addr, (void *)(uintptr_t)data);
}

/* Seccomp state of a thread from its status file: 0 none, 1 strict, 2 filter; unknown counts as a filter. */
static int seccomp_mode(pid_t tid)
{
	char path[64];
	_cleanup_free_ char *text = NULL;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)tid);
	if (ffs_read_file(path, 65536, &text, NULL) < 0)
		return 2;
	const char *p = strstr(text, "\nSeccomp:");

	return p ? p[strspn(p + 9, " \t") + 9] - '0' : 0;
}

int ffs_tracee_seize(struct ffs_tracee *t, pid_t pid, pid_t tid, struct ffs_error *err)
{
	*t = (struct ffs_tracee){.pid = pid, .tid = tid};
	int r = FFS_FAULT("inject-seize");

	if (r)
		return ffs_error_errno(err, -r, "cannot attach to thread %d", (int)tid);
	if (trace(PTRACE_SEIZE, tid, 0,
		    (void *)(uintptr_t)(PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP)) == 0) {
		t->seized = true;
		return 0;
	}
	if (errno != EPERM && errno != EINVAL)
		return -errno;
	/* Not allowed to suspend seccomp, or not allowed at all? */
	if (trace(PTRACE_SEIZE, tid, 0, (void *)(uintptr_t)PTRACE_O_TRACESYSGOOD) < 0)
		return -errno;
	t->seized = true;
	if (seccomp_mode(tid) == 0)
		return 0;
	return ffs_error_set(err, ENOTSUP,
		"process %d runs under a seccomp filter that would kill it for userfaultfd(2), and "
		"suspending the filter is "
		"not allowed: run forkfs with CAP_SYS_ADMIN and without a seccomp filter of its own",
		(int)pid);
}

/* The next stop of the thread: 0 and *status, -ETIMEDOUT, -ESRCH. deadline 0: for ever. */
static int wait_stop(struct ffs_tracee *t, uint64_t deadline_ns, int *status)
{
	sigset_t child;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	for (;;) {
		pid_t r = waitpid(t->tid, status, __WALL | WNOHANG);

		if (r < 0 && errno != EINTR)
			goto gone;
		if (r == t->tid) {
			if (!WIFSTOPPED(*status))
				goto gone;
			t->stopped = true;
			return 0;
		}
		if (r < 0)
			continue;
		if (deadline_ns && ffs_now_ns() >= deadline_ns)
			return -ETIMEDOUT;
		/* One pending SIGCHLD may stand for several stops, hence the loop; the upper bound is only a
		 * belt to the braces. */
		uint64_t ms = deadline_ns ? (uint64_t)ffs_ms_until(deadline_ns) : 100;
		struct timespec ts = {.tv_nsec = (long)((ms > 100 ? 100 : ms) * FFS_NS_PER_MS)};

		if (sigtimedwait(&child, NULL, &ts) < 0 && errno != EAGAIN && errno != EINTR)
			return -errno;
	}
gone:
	t->gone = true;
	t->stopped = false;
	return -ESRCH;
}

static int resume(struct ffs_tracee *t, int request, int sig)
{
	if (trace(request, t->tid, 0, (void *)(intptr_t)sig) < 0) {
		/* a stopped thread is lost to us only by SIGKILL */
		t->gone = errno == ESRCH;
		return -errno;
	}
	t->stopped = false;
	return 0;
}

int ffs_tracee_stop(struct ffs_tracee *t, uint64_t deadline_ns)
{
	int r = FFS_FAULT("inject-interrupt"), status;

	if (r)
		return r;
	if (trace(PTRACE_INTERRUPT, t->tid, 0, NULL) < 0)
		return -errno;
	for (;;) {
		r = wait_stop(t, deadline_ns, &status);
		if (r)
			return r;
		bool done = status >> 16 ==
			    PTRACE_EVENT_STOP; /* our interrupt, or stopped by a signal: both will do */

		/* Caught while a signal was being delivered: that goes first, the interrupt follows it. */
		if (!done && WSTOPSIG(status) != STOP_SYSCALL)
			t->stop_signal = WSTOPSIG(status);
		r = FFS_FAULT("inject-wait");
		if (r || done)
			return r;
		r = resume(t, PTRACE_CONT, t->stop_signal);
		if (r)
			return r;
		t->stop_signal = 0;
	}
}

static bool is_syscall_at(pid_t tid, uint64_t addr)
{
	unsigned char insn[2];
	struct iovec mine = {insn, sizeof(insn)}, other = {(void *)(uintptr_t)addr, sizeof(insn)};

	return process_vm_readv(tid, &mine, 1, &other, 1, 0) == sizeof(insn) && insn[0] == 0x0f &&
	       insn[1] == 0x05;
}

static uint64_t scan_mapping(pid_t tid, uint64_t start, uint64_t end)
{
	static unsigned char buf[SCAN_CHUNK];

	for (uint64_t at = start; at + 1 < end;) {
		uint64_t len = end - at < sizeof(buf) ? end - at : sizeof(buf);
		struct iovec mine = {buf, len}, other = {(void *)(uintptr_t)at, len};
		ssize_t n = process_vm_readv(tid, &mine, 1, &other, 1, 0);

		if (n < 2)
			return 0;
		for (const unsigned char *p = buf; (p = memchr(p, 0x0f, (size_t)(buf + n - 1 - p))) != NULL;
			p++)
			if (p[1] == 0x05)
				return at + (uint64_t)(p - buf);
		at += (uint64_t)n - 1; /* the two bytes may straddle the chunks */
	}
	return 0;
}

/* Where `0f 05` stands in executable memory; the bytes need not be an instruction of the program. The vdso
 * has one and is small. */
static int find_insn(struct ffs_tracee *t, struct ffs_error *err)
{
	const struct user_regs_struct *r = &t->saved;
	char path[64], line[512];

	t->insn = r->rip - 2;
	/* orig_rax: it is in a system call, so what it executed last stands there. Not across a page: that
	 * may not be executable. */
	if ((int64_t)r->orig_rax >= 0 && (r->rip & 4095) >= 2 && is_syscall_at(t->tid, t->insn))
		return 0;
	for (int vdso = 1; vdso >= 0; vdso--) {
		snprintf(path, sizeof(path), "/proc/%d/maps", (int)t->tid);
		_cleanup_fclose_ FILE *f = fopen(path, "re");

		if (!f)
			return ffs_error_errno(err, errno, "cannot read %s", path);
		while (fgets(line, sizeof(line), f)) {
			unsigned long long start, end;
			char perms[5];

			if (sscanf(line, "%llx-%llx %4s", &start, &end, perms) != 3)
				continue;
			if (perms[0] != 'r' || perms[2] != 'x' || (strstr(line, "[vdso]") != NULL) != vdso)
				continue;
			t->insn = scan_mapping(t->tid, start, end);
			if (t->insn)
				return 0;
		}
	}
	return ffs_error_set(err, ENOTSUP,
		"process %d has no readable syscall instruction in its executable memory: it is no VMM that "
		"can be branched",
		(int)t->pid);
}

/* True inside a restartable sequence: moving the thread away from there would hide from the kernel that it
 * must be aborted (include/uapi/linux/rseq.h: rseq_cs is the third field, at 8; start_ip, post_commit_offset
 * at 8 and 16 of what it points to). */
static bool in_rseq(struct ffs_tracee *t)
{
	struct __ptrace_rseq_configuration conf;
	uint64_t cs = 0, span[2];
	struct iovec mine = {&cs, sizeof(cs)}, other;

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, t->tid, sizeof(conf), &conf) != sizeof(conf) ||
		!conf.rseq_abi_pointer)
		return false;
	other = (struct iovec){(void *)(uintptr_t)(conf.rseq_abi_pointer + 8), sizeof(cs)};
	if (process_vm_readv(t->tid, &mine, 1, &other, 1, 0) != sizeof(cs) || !cs)
		return false;
	mine = (struct iovec){span, sizeof(span)};
	other = (struct iovec){(void *)(uintptr_t)(cs + 8), sizeof(span)};
	if (process_vm_readv(t->tid, &mine, 1, &other, 1, 0) != sizeof(span))
		return false;
	return t->saved.rip - span[0] < span[1];
}

int ffs_tracee_prepare(struct ffs_tracee *t, struct ffs_error *err)
{
	int r = FFS_FAULT("inject-getregs");
	uint64_t all = ~0ull;

	if (!r && trace(PTRACE_GETREGS, t->tid, 0, &t->saved) < 0)
		r = -errno;
	if (!r)
		r = FFS_FAULT("inject-getmask");
	if (!r && trace(PTRACE_GETSIGMASK, t->tid, sizeof(t->mask), &t->mask) < 0)
		r = -errno;
	if (r)
		return ffs_error_errno(err, -r, "cannot read the registers of thread %d", (int)t->tid);
	if (t->saved.cs != CODE_SEGMENT_64)
		return ffs_error_set(err, ENOTSUP,
			"process %d is a 32-bit program: only 64-bit VMMs can be branched", (int)t->pid);
	if (in_rseq(t))
		return -EAGAIN;
	r = FFS_FAULT("inject-find");
	if (r)
		return ffs_error_errno(err, -r, "cannot search the memory of process %d", (int)t->pid);
	r = find_insn(t, err);
	if (r)
		return r;
	r = FFS_FAULT("inject-setmask");
	if (!r && trace(PTRACE_SETSIGMASK, t->tid, sizeof(all), &all) < 0)
		r = -errno;
	if (r)
		return ffs_error_errno(err, -r, "cannot hold the signals of thread %d", (int)t->tid);
	t->prepared = true;
	return 0;
}

/* From wherever it is stopped to the next syscall stop. */
static int run_to_syscall(struct ffs_tracee *t)
{
	int sig = 0, status;

	for (;;) {
		int r = resume(t, PTRACE_SYSCALL, sig);

		if (!r)
			r = wait_stop(t, 0, &status);
		if (r)
			return r;
		if (WSTOPSIG(status) == STOP_SYSCALL)
			return 0;
		sig = 0;
		if (status >> 16 == PTRACE_EVENT_STOP)
			continue; /* a group stop, or the interrupt once more; the detach puts a group stop
				     back */
		sig = WSTOPSIG(status);
		if (sig == SIGSTOP)
			continue; /* it cannot be blocked, has no handler and takes effect as it would have */
		/* Everything else is blocked, so the kernel forced it. It belongs to the program's own
		 * context. */
		t->stop_signal = sig;
		return -EINTR;
	}
}

static int set_call(struct ffs_tracee *t, long nr, const uint64_t a[6])
{
	struct user_regs_struct regs = t->saved;

	regs.rip = t->insn;
	regs.rax = (uint64_t)nr;
	regs.orig_rax = ~0ull; /* nothing to restart */
	regs.rdi = a[0];
	regs.rsi = a[1];
	regs.rdx = a[2];
	regs.r10 = a[3];
	regs.r8 = a[4];
	regs.r9 = a[5];
	return trace(PTRACE_SETREGS, t->tid, 0, &regs) < 0 ? -errno : 0;
}

/* Stopped at the entry of a call: pass it over (number -1) and stop behind it. Registers are set only there,
 * or the kernel would take the number in them for the call to make. */
static int cancel_call(struct ffs_tracee *t)
{
	struct user_regs_struct regs;

	if (trace(PTRACE_GETREGS, t->tid, 0, &regs) < 0)
		return -errno;
	regs.orig_rax = ~0ull;
	if (trace(PTRACE_SETREGS, t->tid, 0, &regs) < 0)
		return -errno;
	int r = run_to_syscall(t);

	t->in_call = false;
	return r;
}

int ffs_tracee_syscall(
	struct ffs_tracee *t, long nr, const uint64_t args[6], long *result, struct ffs_error *err)
{
	struct user_regs_struct regs;
	int r = FFS_FAULT("inject-setregs");

	if (!r && t->in_call) /* the one before failed there */
		r = cancel_call(t);
	if (!r)
		r = set_call(t, nr, args);
	if (!r)
		r = FFS_FAULT("inject-enter");
	if (!r)
		r = run_to_syscall(t);
	if (!r) {
		t->in_call = true;
		r = FFS_FAULT("inject-exit");
	}
	if (!r && trace(PTRACE_GETREGS, t->tid, 0, &regs) < 0)
		r = -errno;
	if (!r && (long)regs.orig_rax != nr)
		r = -EPROTO; /* not our call: release() keeps it from being made */
	if (!r) {
		r = run_to_syscall(t);
		t->in_call = false;
	}
	if (!r && trace(PTRACE_GETREGS, t->tid, 0, &regs) < 0)
		r = -errno;
	if (r)
		return ffs_error_errno(
			err, -r, "system call %ld could not be made in thread %d", nr, (int)t->tid);
	*result = (long)regs.rax;
	return 0;
}

int ffs_tracee_peek(struct ffs_tracee *t, uint64_t addr, void *buf, size_t len)
{
	for (size_t i = 0; i < len; i += sizeof(long)) {
		errno = 0;
		long word = trace(PTRACE_PEEKDATA, t->tid, addr + i, NULL);

		if (errno)
			return -errno;
		memcpy((char *)buf + i, &word, sizeof(word));
	}
	return 0;
}

int ffs_tracee_poke(struct ffs_tracee *t, uint64_t addr, const void *buf, size_t len)
{
	for (size_t i = 0; i < len; i += sizeof(long)) {
		long word;

		memcpy(&word, (const char *)buf + i, sizeof(word));
		if (trace(PTRACE_POKEDATA, t->tid, addr + i, (void *)word) < 0)
			return -errno;
	}
	return 0;
}

/* A fault point on the way back, where a test may hold, delay or count; an error would be one that no kernel
 * makes. */
static void way_back(const char *point)
{
	if (FFS_FAULT(point) < 0)
		errno = 0;
}

void ffs_tracee_release(struct ffs_tracee *t)
{
	if (!t->seized || t->gone || !t->stopped)
		return;
	if (t->prepared && t->in_call && cancel_call(t) < 0 && t->gone)
		return;
	way_back("inject-restore");
	if (t->prepared && !t->gone && trace(PTRACE_SETREGS, t->tid, 0, &t->saved) < 0)
		t->gone = errno == ESRCH;
	way_back("inject-restore-mask");
	if (t->prepared && !t->gone && trace(PTRACE_SETSIGMASK, t->tid, sizeof(t->mask), &t->mask) < 0)
		t->gone = errno == ESRCH;
	way_back("inject-detach");
	if (!t->gone && trace(PTRACE_DETACH, t->tid, 0, (void *)(intptr_t)t->stop_signal) < 0)
		t->gone = true;
	t->stopped = t->seized = t->prepared = false;
}
