/* Owns nothing that lasts: forks helper processes and moves messages.
 *
 * Threads: ffs_helper_fork() before any thread exists; the rest any thread. No locks. ffs_helper_call()
 * blocks until its deadline. */
#include "uffd/helper.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

static void close_span(unsigned first, unsigned last)
{
	if (first <= last && syscall(SYS_close_range, first, last, 0) < 0)
		_exit(70); /* a helper that keeps descriptors of the daemon would keep guests stopped */
}

void ffs_close_all_but(int a, int b)
{
	unsigned lo = a < 0 ? 0 : (unsigned)a, hi = b < 0 ? 0 : (unsigned)b;

	if (lo > hi) {
		unsigned t = lo;

		lo = hi;
		hi = t;
	}
	unsigned next = 3;

	if (lo >= next) {
		close_span(next, lo - 1);
		next = lo + 1;
	}
	if (hi >= next) {
		close_span(next, hi - 1);
		next = hi + 1;
	}
	close_span(next, ~0U);
}

void ffs_helper_child(const char *name)
{
	sigset_t all;
	struct sigaction dfl = {.sa_handler = SIG_DFL};

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigaction(SIGCHLD, &dfl, NULL);
	prctl(PR_SET_NAME, name);
	setsid(); /* fails only for a session leader, which is as good */
}

bool ffs_helper_oom_protect(void)
{
	_cleanup_close_ int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	return fd >= 0 && write(fd, "-1000", 5) == 5;
}

static void detach_from_daemon(int *sock)
{
	/* out of the way of the standard streams, which are replaced below */
	if (*sock < 3) {
		int moved = fcntl(*sock, F_DUPFD_CLOEXEC, 3);

		if (moved < 0)
			_exit(71);
		*sock = moved;
	}
	/* Else whoever reads the daemon's standard error until its end would wait for us as well. */
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (null < 0)
		_exit(72);
	for (int fd = 0; fd < 3; fd++)
		if (dup2(null, fd) < 0)
			_exit(72);
	ffs_close_all_but(*sock, -1);
	if (chdir("/") < 0)
		_exit(73);
}

int ffs_helper_fork(const char *name, void (*body)(int sock, void *arg), void *arg, pid_t *pid, int *sock,
	struct ffs_error *err)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return ffs_error_errno(err, errno, "cannot make a socket for the process %s", name);
	_cleanup_close_ int ours = pair[0];
	_cleanup_close_ int theirs = pair[1];
	/* Blocked before the fork, so that no signal of the daemon reaches its handlers in the helper. */
	sigset_t all, old;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &old);
	pid_t child = fork();
	int code = errno;

	if (child == 0) {
		int mine = theirs;

		ffs_helper_child(name);
		detach_from_daemon(&mine);
		body(mine, arg);
		_exit(0);
	}
	sigprocmask(SIG_SETMASK, &old, NULL);
	if (child < 0)
		return ffs_error_errno(err, code, "cannot start the process %s", name);
	*pid = child;
	*sock = ffs_steal_fd(&ours);
	return 0;
}

void ffs_helper_end(pid_t pid, int *sock)
{
	ffs_close_fd(sock);
	while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

int ffs_msg_send(int sock, const void *buf, size_t len, const int *fds, unsigned n_fds)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * FFS_MSG_FDS)];
	} control;
	struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (n_fds > FFS_MSG_FDS)
		return -EINVAL;
	if (n_fds) {
		memset(&control, 0, sizeof(control));
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * n_fds);
		memcpy(CMSG_DATA(c), fds, sizeof(int) * n_fds);
	}
	ssize_t n;

	do
		n = sendmsg(sock, &msg, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == ECONNRESET ? -EPIPE : -errno;
	return 0;
}

int ffs_msg_recv(int sock, void *buf, size_t len, int fds[FFS_MSG_FDS])
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * FFS_MSG_FDS)];
	} control;
	struct iovec iov = {.iov_base = buf, .iov_len = len};
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	unsigned n_fds = 0;
	ssize_t n;

	for (unsigned i = 0; i < FFS_MSG_FDS; i++)
		fds[i] = -1;
	do
		n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == ECONNRESET ? -EPIPE : -errno;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		unsigned k = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		const unsigned char *data = CMSG_DATA(c);

		for (unsigned i = 0; i < k && n_fds < FFS_MSG_FDS; i++)
			memcpy(&fds[n_fds++], data + i * sizeof(int), sizeof(int));
	}
	if (n == (ssize_t)len && !(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		return 0;
	for (unsigned i = 0; i < FFS_MSG_FDS; i++)
		ffs_close_fd(&fds[i]);
	return n == 0 ? -EPIPE : -EPROTO;
}

/* Until readable: 0, -ETIMEDOUT, -errno. */
static int wait_readable(int sock, uint64_t deadline_ns)
{
	for (;;) {
		struct pollfd p = {.fd = sock, .events = POLLIN};
		int r = poll(&p, 1, ffs_ms_until(deadline_ns));

		if (r > 0)
			return 0;
		if (r == 0)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

int ffs_helper_call(int sock, const void *req, size_t len, const int *fds, unsigned n_fds,
	uint64_t deadline_ns, void *reply, size_t reply_len, int *reply_fd)
{
	int pair[2], all[FFS_MSG_FDS], got[FFS_MSG_FDS];
	char end;

	if (n_fds >= FFS_MSG_FDS)
		return -EINVAL;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	_cleanup_close_ int ours = pair[0];
	_cleanup_close_ int theirs = pair[1];

	if (n_fds)
		memcpy(all, fds, sizeof(int) * n_fds);
	all[n_fds] = theirs;
	int r = ffs_msg_send(sock, req, len, all, n_fds + 1);

	ffs_close_fd(&theirs);
	if (r < 0)
		return r;
	r = wait_readable(ours, deadline_ns);
	if (r == 0)
		r = ffs_msg_recv(ours, reply, reply_len, got);
	if (r < 0)
		return r;
	for (unsigned i = reply_fd ? 1 : 0; i < FFS_MSG_FDS; i++)
		ffs_close_fd(&got[i]);
	if (reply_fd)
		*reply_fd = got[0];
	/* The answer counts even if the other side is slow to go away. */
	if (wait_readable(ours, deadline_ns) == 0 && recv(ours, &end, 1, MSG_DONTWAIT) > 0) {
		if (reply_fd)
			ffs_close_fd(reply_fd);
		return -EPROTO;
	}
	return 0;
}
