/* Owns the guard process: who accepts, and the duplicates of what its VMMs have handed over.
 *
 * Threads: the guard has one, in a process and session of its own, with all signals blocked. It waits for its
 * descriptors, and for the pager to take notice of who has connected. No locks. The pager's side: any thread
 * but where it says so, each call has a deadline. */
#include "pager/guard.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"
#include "uffd/helper.h"

#define CALL_NS (10 * FFS_NS_PER_S)

enum { GUARD_LISTEN = 1, GUARD_ADD, GUARD_DROP, GUARD_CLOSE };

struct request {
	uint32_t op, uid;
	uint64_t id;
};

struct ward {
	uint64_t id;
	int held; /* its connection, later its userfaultfd */
};

static struct {
	int sock, listening;
	uid_t uid;
	uint64_t next_id;
	unsigned n;
	struct ward ward[FFS_GUARD_WARDS];
	struct pollfd poll[2 + FFS_GUARD_WARDS]; /* [2 + i]: the pidfd of ward i */
} guard = {.listening = -1};

void ffs_guard_kill(int pidfd)
{
	struct pollfd p = {.fd = pidfd, .events = POLLIN};

	/* ESRCH: it has ended already */
	if (syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0) < 0 && errno == ESRCH)
		return;
	while (poll(&p, 1, -1) < 0)
		; /* EINTR, ENOMEM: there is nothing else to do */
}

/* Of that very process, whatever becomes of its pid. */
static int peer_pidfd(int peer, pid_t pid)
{
	int fd = -1;
	socklen_t len = sizeof(fd);

	if (getsockopt(peer, SOL_SOCKET, FFS_SO_PEERPIDFD, &fd, &len) == 0)
		return fd;
	if (errno != ENOPROTOOPT)
		return -errno;
	fd = (int)syscall(SYS_pidfd_open, pid, 0);
	return fd < 0 ? -errno : fd;
}

int ffs_guard_accept(int listening, uid_t uid, struct ffs_guard_peer *out)
{
	struct ucred cred = {0};
	socklen_t len = sizeof(cred);
	_cleanup_close_ int peer = accept4(listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (peer < 0)
		return errno == EINTR || errno == ECONNABORTED || errno == EINVAL ? -EAGAIN : -errno;
	if (getsockopt(peer, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
		return -errno;
	*out = (struct ffs_guard_peer){
		.pid = cred.pid, .uid = cred.uid, .sock = ffs_steal_fd(&peer), .pidfd = -1};
	out->allowed = cred.pid > 0 && (cred.uid == 0 || cred.uid == geteuid() || cred.uid == uid);
	if (out->allowed) {
		out->pidfd = peer_pidfd(out->sock, cred.pid);
		out->allowed = out->pidfd >= 0;
	}
	return 0;
}

/* ---- the guard's side ---- */

static void forget(unsigned i)
{
	close(guard.poll[2 + i].fd);
	close(guard.ward[i].held);
	guard.n--;
	guard.ward[i] = guard.ward[guard.n];
	guard.poll[2 + i] = guard.poll[2 + guard.n];
}

static struct ward *find(uint64_t id)
{
	for (unsigned i = 0; i < guard.n; i++)
		if (guard.ward[i].id == id)
			return &guard.ward[i];
	return NULL;
}

/* Tell the pager of a peer, whose descriptors are kept where we look after it. -EPIPE: the pager has died. */
static int pass_on(struct ffs_guard_peer *p)
{
	int fds[2] = {p->sock, p->pidfd};

	p->id = ++guard.next_id;
	if (p->allowed) {
		guard.ward[guard.n] = (struct ward){.id = p->id, .held = p->sock};
		guard.poll[2 + guard.n++] = (struct pollfd){.fd = p->pidfd, .events = POLLIN};
	}
	int r = ffs_msg_send(guard.sock, p, sizeof(*p), fds, p->allowed ? 2 : 1);

	if (!p->allowed) {
		close(p->sock);
		if (p->pidfd >= 0)
			close(p->pidfd);
	}
	return r;
}

/* All that are waiting. */
static int accept_all(void)
{
	struct ffs_guard_peer p;
	int r = 0;

	while (r == 0 && guard.n < FFS_GUARD_WARDS && ffs_guard_accept(guard.listening, guard.uid, &p) == 0)
		r = pass_on(&p);
	return r;
}

/* Once: who has connected is told; there are no others. */
static int close_listening(void)
{
	struct ffs_guard_peer last = {.last = true, .sock = -1, .pidfd = -1};

	if (shutdown(guard.listening, SHUT_RD) < 0)
		return -errno;
	int r = accept_all();

	ffs_close_fd(&guard.listening);
	return r ? r : ffs_msg_send(guard.sock, &last, sizeof(last), NULL, 0);
}

static int carry_out(const struct request *req, int *fd)
{
	struct ward *w = find(req->id);

	switch (req->op) {
	case GUARD_LISTEN:
		guard.listening = ffs_steal_fd(fd);
		guard.uid = req->uid;
		return guard.listening < 0 ? -EPROTO : 0;
	case GUARD_ADD:
		if (!w || *fd < 0)
			return -ESRCH; /* it has ended */
		close(w->held);
		w->held = ffs_steal_fd(fd);
		return 0;
	case GUARD_DROP:
		if (w)
			forget((unsigned)(w - guard.ward));
		return 0;
	}
	return -EPROTO;
}

/* -EPIPE when the pager has died. */
static int serve(void)
{
	struct request req;
	int fds[FFS_MSG_FDS], r = ffs_msg_recv(guard.sock, &req, sizeof(req), fds), n = 0;

	if (r == -EPROTO)
		return 0;
	if (r < 0)
		return r;
	if (req.op == GUARD_CLOSE)
		return close_listening();
	/* the socket for the answer is the last */
	while (n < FFS_MSG_FDS && fds[n] >= 0)
		n++;
	int answer = n ? ffs_steal_fd(&fds[n - 1]) : -1, result = carry_out(&req, &fds[0]);

	for (unsigned i = 0; i < FFS_MSG_FDS; i++)
		ffs_close_fd(&fds[i]);
	/* who asked may be gone: the next receive says so */
	r = answer < 0 ? 0 : ffs_msg_send(answer, &result, sizeof(result), NULL, 0);
	ffs_close_fd(&answer);
	return r == -EPIPE ? 0 : r;
}

/* The pager has died. First all signals, then the waits: no VM runs on longer than another has to. */
static void kill_all(void)
{
	if (guard.listening >= 0 && shutdown(guard.listening, SHUT_RD) == 0)
		while (guard.n < FFS_GUARD_WARDS && accept_all() == -EPIPE)
			; /* one each: nobody is there to be told */
	for (unsigned i = 0; i < guard.n; i++)
		if (syscall(SYS_pidfd_send_signal, guard.poll[2 + i].fd, SIGKILL, NULL, 0) < 0)
			continue; /* it has ended */
	for (unsigned i = 0; i < guard.n; i++)
		ffs_guard_kill(guard.poll[2 + i].fd);
}

static void guard_body(int sock, void *unused)
{
	int r = 0;

	guard.sock = sock;
	/* without the privilege it may be swapped out, or be the one that is killed for memory: the pager
	 * sees that its guard has gone */
	ffs_helper_oom_protect();
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
	if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0)
		errno = 0;
#endif
	while (r == 0) {
		guard.poll[0] = (struct pollfd){.fd = sock, .events = POLLIN};
		guard.poll[1] = (struct pollfd){
			.fd = guard.n < FFS_GUARD_WARDS ? guard.listening : -1, .events = POLLIN};
		if (poll(guard.poll, 2 + guard.n, -1) < 0)
			continue;
		for (unsigned i = guard.n; i-- > 0;)
			if (guard.poll[2 + i].revents)
				forget(i);
		if (guard.poll[0].revents)
			r = serve();
		else if (guard.poll[1].revents)
			r = accept_all();
	}
	kill_all();
}

/* ---- the pager's side ---- */

int ffs_guard_start(struct ffs_guard *g, struct ffs_error *err)
{
	return ffs_helper_fork("forkfs-guard", guard_body, NULL, &g->pid, &g->sock, err);
}

static int call(struct ffs_guard *g, struct request req, const int *fds, unsigned n_fds)
{
	int result = 0;
	int r = ffs_helper_call(g->sock, &req, sizeof(req), fds, n_fds, ffs_now_ns() + CALL_NS, &result,
		sizeof(result), NULL);

	return r ? r : result;
}

static int failed(int r, struct ffs_error *err)
{
	return r ? ffs_error_errno(err, -r, "the process that guards the VMs does not answer") : 0;
}

int ffs_guard_listen(struct ffs_guard *g, int listening, uid_t uid, struct ffs_error *err)
{
	return failed(call(g, (struct request){.op = GUARD_LISTEN, .uid = uid}, &listening, 1), err);
}

int ffs_guard_next(struct ffs_guard *g, struct ffs_guard_peer *out)
{
	int fds[FFS_MSG_FDS], r = FFS_FAULT("pager-accept");

	if (r == 0)
		r = ffs_msg_recv(g->sock, out, sizeof(*out), fds);
	if (r < 0)
		return r;
	out->sock = fds[0];
	out->pidfd = fds[1];
	return 0;
}

int ffs_guard_add(struct ffs_guard *g, uint64_t id, int uffd, struct ffs_error *err)
{
	return failed(call(g, (struct request){.op = GUARD_ADD, .id = id}, &uffd, 1), err);
}

int ffs_guard_drop(struct ffs_guard *g, uint64_t id, struct ffs_error *err)
{
	int r = call(g, (struct request){.op = GUARD_DROP, .id = id}, NULL, 0);

	/* one that has ended guards nobody */
	return r == -EPIPE || r == -ECONNREFUSED ? 0 : failed(r, err);
}

int ffs_guard_close(struct ffs_guard *g)
{
	struct request req = {.op = GUARD_CLOSE};

	return ffs_msg_send(g->sock, &req, sizeof(req), NULL, 0);
}

void ffs_guard_end(struct ffs_guard *g)
{
	ffs_helper_end(g->pid, &g->sock);
}
