/* Owns one injection: the choice of the thread, the calls it makes for us, and the descriptor on its way to
 * the daemon.
 *
 * Threads: runs alone in a process of its own, with all signals blocked and in its own session, so that
 * neither the daemon's death nor a terminal's signals end it between changing registers and putting them
 * back. No locks. It may wait for the target as long as that takes; the daemon's side has the time-out. */
#include "uffd/injector.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"
#include "uffd/helper.h"
#include "uffd/tracee.h"

#define INJECTOR_NAME "forkfs-inject"
#define MAX_SEIZED 32                  /* threads that we asked to stop and that did not (yet) */
#define THREAD_NS (50 * FFS_NS_PER_MS) /* for one thread to stop, before the next one is tried */
#define ROUND_NS (5 * FFS_NS_PER_MS)   /* between two rounds through the threads */
#define RED_ZONE 128                   /* System V ABI, x86-64: below the stack pointer, still in use */
#define MAX_DENIED 8                   /* unexplained EPERMs */
#define UFFD_LINK "anon_inode:[userfaultfd]"
#define UFFD_FLAGS ((uint64_t)(O_CLOEXEC | O_NONBLOCK))

struct injection {
	const struct ffs_inject_request *req;
	struct ffs_proc_id id;
	int pidfd, uffd;
	struct ffs_tracee seized[MAX_SEIZED];
	unsigned n_seized, denied;
};

static int check_identity(const struct injection *in, struct ffs_error *err)
{
	char state;
	uint64_t start;
	int r = ffs_proc_stat(in->id.pid, &state, &start);

	if (r < 0)
		return ffs_error_set(err, -r, "process %d is gone", (int)in->id.pid);
	if (start != in->id.start)
		return ffs_error_set(err, ESRCH, "process %d is gone (another process has its number now)",
			(int)in->id.pid);
	if (state == 'Z' || state == 'X')
		return ffs_error_set(err, ESRCH, "process %d has exited (it is a zombie)", (int)in->id.pid);
	return 0;
}

/* include/linux/sched.h, in field 9 of /proc/TID/stat (which an exiting process does not have) */
#define PF_KTHREAD 0x00200000u
#define PF_IO_WORKER 0x00000010u
#define PF_USER_WORKER 0x00004000u

/* A thread that never runs user code. Also some of a VMM's own: vhost's and io_uring's workers, KVM's huge
 * page recovery are threads of the process that stop for a tracer and then never come back from the kernel to
 * make a call. */
static bool runs_in_kernel(pid_t tid, unsigned which)
{
	char path[64];
	_cleanup_free_ char *text = NULL;
	unsigned flags = 0;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)tid);
	if (ffs_read_file(path, 65536, &text, NULL) < 0)
		return false;
	const char *p = strrchr(text, ')');

	return p && sscanf(p + 1, " %*c %*s %*s %*s %*s %*s %u", &flags) == 1 && (flags & which);
}

static int open_target(struct injection *in, struct ffs_error *err)
{
	int r = FFS_FAULT("inject-target");

	if (r)
		return ffs_error_errno(err, -r, "cannot look at process %d", (int)in->id.pid);
	in->pidfd = (int)syscall(SYS_pidfd_open, in->id.pid, 0);
	if (in->pidfd < 0)
		return ffs_error_errno(err, errno, "cannot open process %d", (int)in->id.pid);
	/* in this order: the pidfd holds on to a process, and the check says that it is the right one */
	r = check_identity(in, err);
	if (r)
		return r;
	if (!runs_in_kernel(in->id.pid, PF_KTHREAD))
		return 0;
	return ffs_error_set(err, ENOTSUP, "process %d is a kernel thread, not a VMM", (int)in->id.pid);
}

static void read_comm(pid_t tid, char comm[32])
{
	char path[64];
	_cleanup_free_ char *text = NULL;

	snprintf(path, sizeof(path), "/proc/%d/comm", (int)tid);
	snprintf(comm, 32, "?");
	if (ffs_read_file(path, 256, &text, NULL) == 0) {
		text[strcspn(text, "\n")] = '\0';
		snprintf(comm, 32, "%.31s", text);
	}
}

/* QEMU names its vCPU threads "CPU n/KVM" or "CPU n/TCG" (with debug-threads), Firecracker "fc_vcpu n". */
static bool is_vcpu(pid_t tid)
{
	char comm[32];
	unsigned n;

	read_comm(tid, comm);
	return sscanf(comm, "CPU %u/", &n) == 1 || sscanf(comm, "fc_vcpu %u", &n) == 1;
}

/* 0: nobody traces the thread; -EBUSY naming who does; -EAGAIN: another injection, which is short. */
static int check_tracer(pid_t tid, struct ffs_error *err)
{
	char path[64], comm[32];
	_cleanup_free_ char *text = NULL;
	int tracer;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)tid);
	if (ffs_read_file(path, 65536, &text, NULL) < 0)
		return 0;
	const char *p = strstr(text, "\nTracerPid:");

	if (!p || sscanf(p, "\nTracerPid: %d", &tracer) != 1 || tracer == 0)
		return 0;
	read_comm(tracer, comm);
	if (strcmp(comm, INJECTOR_NAME) == 0 || strcmp(comm, "?") == 0)
		return -EAGAIN; /* or it ended just now */
	return ffs_error_set(err, EBUSY,
		"thread %d of the VMM is traced by process %d (%s): a process can have one tracer, end that "
		"one first",
		(int)tid, tracer, comm);
}

static int call(struct ffs_tracee *t, long nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d, long *result,
	struct ffs_error *err)
{
	const uint64_t args[6] = {a, b, c, d, 0, 0};

	return ffs_tracee_syscall(t, nr, args, result, err);
}

/* Close a descriptor in the target. Tried once more when it fails: a copy that stays behind would outlive the
 * daemon. */
static int close_remote(struct ffs_tracee *t, long fd, struct ffs_error *err)
{
	long result = -1;
	int r = FFS_FAULT("inject-close");

	if (!r)
		r = call(t, SYS_close, (uint64_t)fd, 0, 0, 0, &result, err);
	if (r && !t->gone)
		r = call(t, SYS_close, (uint64_t)fd, 0, 0, 0, &result, err);
	if (r || result == 0)
		return r;
	return ffs_error_errno(
		err, (int)-result, "descriptor %ld of process %d could not be closed again", fd, (int)t->pid);
}

/* /dev/userfaultfd gives what the system call refuses to an unprivileged process. *result as of the call,
 * -EPERM where the device is not there or not permitted. */
static int make_by_device(struct ffs_tracee *t, long *result, struct ffs_error *err)
{
	static const char name[24] = "/dev/userfaultfd";
	char kept[sizeof(name)];
	uint64_t at = (t->saved.rsp - RED_ZONE - sizeof(name)) & ~7ull;
	long dev = -1;

	*result = -EPERM;
	int r = ffs_tracee_peek(t, at, kept, sizeof(kept));

	if (!r)
		r = FFS_FAULT("inject-poke");
	if (!r) {
		r = ffs_tracee_poke(t, at, name, sizeof(name));
		if (!r)
			r = call(t, SYS_openat, (uint64_t)AT_FDCWD, at, O_RDWR | O_CLOEXEC, 0, &dev, err);
		int back = ffs_tracee_poke(t, at, kept, sizeof(kept));

		r = r ? r : back;
	}
	if (r)
		return ffs_error_errno(err, -r, "cannot open /dev/userfaultfd in process %d", (int)t->pid);
	if (dev < 0)
		return 0;
	r = call(t, SYS_ioctl, (uint64_t)dev, USERFAULTFD_IOC_NEW, UFFD_FLAGS, 0, result, err);
	int closed = close_remote(t, dev, err);

	return r ? r : closed;
}

static int say_refused(const struct injection *in, int code, struct ffs_error *err)
{
	char path[64];
	struct stat st = {0};

	snprintf(path, sizeof(path), "/proc/%d", (int)in->id.pid);
	switch (code) {
	case EPERM:
		if (stat(path, &st) < 0)
			return ffs_error_set(err, ESRCH, "process %d is gone", (int)in->id.pid);
		return ffs_error_set(err, EPERM,
			"process %d may not make a userfaultfd: give it /dev/userfaultfd (setfacl -m u:%u:rw "
			"/dev/userfaultfd) or set the sysctl vm.unprivileged_userfaultfd=1",
			(int)in->id.pid, (unsigned)st.st_uid);
	case ENOSYS:
		return ffs_error_set(
			err, ENOSYS, "the kernel is built without userfaultfd (CONFIG_USERFAULTFD)");
	case EMFILE:
		return ffs_error_set(err, EMFILE,
			"process %d has no free file descriptor for a moment's userfaultfd: raise its "
			"RLIMIT_NOFILE (prlimit)",
			(int)in->id.pid);
	default:
		return ffs_error_errno(err, code, "process %d cannot make a userfaultfd", (int)in->id.pid);
	}
}

/* Copy the target's descriptor into this process and see that it is what we asked for. */
static int fetch(struct injection *in, long fd, struct ffs_error *err)
{
	char path[64], link[64];
	int r = FFS_FAULT("inject-getfd");

	if (!r) {
		in->uffd = (int)syscall(SYS_pidfd_getfd, in->pidfd, (int)fd, 0);
		if (in->uffd < 0)
			r = -errno;
	}
	if (r)
		return ffs_error_errno(
			err, -r, "cannot take the userfaultfd over from process %d", (int)in->id.pid);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", in->uffd);
	ssize_t n = readlink(path, link, sizeof(link) - 1);

	link[n < 0 ? 0 : n] = '\0';
	if (FFS_FAULT("inject-verify") == 0 && strcmp(link, UFFD_LINK) == 0)
		return 0;
	ffs_close_fd(&in->uffd);
	return ffs_error_set(
		err, EPROTO, "what came from process %d is no userfaultfd (%s)", (int)in->id.pid, link);
}

static int do_userfaultfd(struct injection *in, struct ffs_tracee *t, struct ffs_error *err)
{
	long fd = -1;
	int r = call(t, SYS_userfaultfd, UFFD_FLAGS, 0, 0, 0, &fd, err);

	if (!r && fd == -EPERM)
		r = make_by_device(t, &fd, err);
	if (r && fd < 0)
		return r;
	if (fd < 0)
		return say_refused(in, (int)-fd, err);
	if (!r)
		r = fetch(in, fd, err);
	int closed = close_remote(t, fd, err);

	if (closed)
		ffs_close_fd(&in->uffd);
	return r ? r : closed;
}

static int do_madvise(const struct injection *in, struct ffs_tracee *t, struct ffs_error *err)
{
	const struct ffs_inject_request *q = in->req;
	long result = -1;
	int r = call(t, SYS_madvise, q->addr, q->len, (uint64_t)q->advice, 0, &result, err);

	if (r || result == 0)
		return r;
	return ffs_error_errno(err, (int)-result, "madvise(%#llx, %llu, %d) in process %d",
		(unsigned long long)q->addr, (unsigned long long)q->len, (int)q->advice, (int)in->id.pid);
}

/* Seizing failed with EPERM: a tracer, or no permission. A tracer that is gone when we look, another
 * injection mostly, cannot be told from a lack of permission but by trying again. */
static int say_not_allowed(struct injection *in, pid_t tid, struct ffs_error *err)
{
	int r = check_tracer(tid, err);

	if (r)
		return r;
	if (++in->denied < MAX_DENIED)
		return -EAGAIN;
	return ffs_error_set(err, EPERM,
		"attaching to process %d with ptrace is not allowed: run forkfs as root or with "
		"CAP_SYS_PTRACE (and see the sysctl "
		"kernel.yama.ptrace_scope)",
		(int)in->id.pid);
}

static struct ffs_tracee *tracee_of(struct injection *in, pid_t tid)
{
	for (unsigned i = 0; i < in->n_seized; i++)
		if (in->seized[i].tid == tid)
			return &in->seized[i];
	return in->n_seized < MAX_SEIZED ? &in->seized[in->n_seized] : NULL;
}

static void forget(struct injection *in, struct ffs_tracee *t)
{
	*t = in->seized[--in->n_seized];
}

/* 0 and final errors end the search; -EAGAIN: not with this thread, not now. */
static int try_thread(struct injection *in, pid_t tid, struct ffs_error *err)
{
	struct ffs_tracee *t = tracee_of(in, tid);
	char state;
	int r;

	if (!t || ffs_proc_stat(tid, &state, NULL) < 0 || strchr("DZX", state))
		return -EAGAIN;
	if (t == &in->seized[in->n_seized]) {
		r = check_tracer(tid, err);
		if (r)
			return r;
		r = ffs_tracee_seize(t, in->id.pid, tid, err);
		if (t->seized)
			in->n_seized++;
		if (r == -EPERM && !t->seized && !(err && err->code))
			return say_not_allowed(in, tid, err);
		if (r)
			return r == -ESRCH ? -EAGAIN : r;
		/* between the first check and the seize the number may have changed hands */
		r = check_identity(in, err);
		if (r)
			return r;
	}
	uint64_t until = ffs_now_ns() + THREAD_NS;

	r = ffs_tracee_stop(t, until < in->req->deadline_ns ? until : in->req->deadline_ns);
	if (r == -ETIMEDOUT && !t->stopped)
		return -EAGAIN; /* stays seized: it may stop by the next round, and is let go when we end */
	if (r && r != -ESRCH)
		r = ffs_error_errno(err, -r, "cannot stop thread %d", (int)tid);
	if (!r)
		r = ffs_tracee_prepare(t, err);
	if (!r)
		r = in->req->op == FFS_INJECT_MADVISE ? do_madvise(in, t, err) : do_userfaultfd(in, t, err);
	bool gone = t->gone;

	ffs_tracee_release(t);
	gone |= t->gone;
	forget(in, t);
	/* A call that succeeded counts even if the target was killed right after it; the daemon will see that
	 * soon. */
	if (r && gone)
		return check_identity(in, NULL)
			       ? ffs_error_set(err, ESRCH, "process %d exited", (int)in->id.pid)
			       : -EAGAIN;
	return r;
}

/* One round: the main thread, then every other one that is no vCPU. */
static int try_threads(struct injection *in, struct ffs_error *err)
{
	int r = try_thread(in, in->id.pid, err);

	if (r != -EAGAIN)
		return r;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/task", (int)in->id.pid);
	DIR *dir = opendir(path);

	if (!dir)
		return check_identity(in, err)
			       ? -ESRCH
			       : ffs_error_errno(err, errno, "cannot list the threads in %s", path);
	for (struct dirent *e; r == -EAGAIN && (e = readdir(dir)) != NULL;) {
		long tid = strtol(e->d_name, NULL, 10);

		if (tid <= 0 || tid > INT_MAX || tid == in->id.pid || is_vcpu((pid_t)tid) ||
			runs_in_kernel((pid_t)tid, PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER))
			continue;
		if (ffs_now_ns() >= in->req->deadline_ns)
			break;
		r = try_thread(in, (pid_t)tid, err);
	}
	closedir(dir);
	return r;
}

static int perform(struct injection *in, struct ffs_error *err)
{
	sigset_t child;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	int r = open_target(in, err);

	while (!r) {
		struct ffs_error why = {0};

		r = try_threads(in, &why);
		if (r != -EAGAIN) {
			if (r && err)
				*err = why;
			return r;
		}
		r = check_identity(in, err);
		if (r)
			return r;
		if (ffs_now_ns() >= in->req->deadline_ns)
			return ffs_error_set(err, ETIMEDOUT,
				"no thread of process %d could be stopped in time: all that are no vCPUs are "
				"in uninterruptible "
				"sleep, frozen, or held by another injection",
				(int)in->id.pid);
		/* until one of the seized threads stops, or for a moment */
		const struct timespec ts = {.tv_nsec = ROUND_NS};

		if (sigtimedwait(&child, NULL, &ts) < 0 && errno != EAGAIN && errno != EINTR)
			return ffs_error_errno(
				err, errno, "cannot wait for a thread of process %d", (int)in->id.pid);
	}
	return r;
}

void ffs_injector_run(const struct ffs_inject_request *req, int sock)
{
	static struct injection in;
	struct ffs_inject_reply reply = {0};

	ffs_helper_child(INJECTOR_NAME);
	/* best effort: dying in the middle would damage the target */
	bool safe = ffs_helper_oom_protect();

	in = (struct injection){
		.req = req, .id = {.pid = req->pid, .start = req->start}, .pidfd = -1, .uffd = -1};
	reply.code = perform(&in, &reply.err);
	if (reply.code && in.uffd >= 0)
		ffs_close_fd(&in.uffd);
	if (reply.code && !reply.err.code)
		reply.code = ffs_error_errno(&reply.err, -reply.code,
			"the injection into process %d failed%s", (int)req->pid,
			safe ? "" : " (the injector is not protected from the OOM killer)");
	/* The daemon takes the end of this socket as the sign that no copy of the userfaultfd is left here.
	 */
	if (ffs_msg_send(sock, &reply, sizeof(reply), &in.uffd, in.uffd >= 0) < 0)
		_exit(1);
	ffs_close_fd(&in.uffd);
}
