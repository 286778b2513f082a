/* Owns the daemon's side of injections: the spawner's pid and socket.
 *
 * Threads: any, side by side: a request has a socket of its own for the answer. No locks. Blocks until the
 * answer or the deadline; never called inside a pause. */
#include "uffd/inject.h"

#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "uffd/helper.h"
#include "uffd/injector.h"

/* The injector gives up at the deadline and says why; only when it cannot, the daemon does. */
#define GRACE_NS (250 * FFS_NS_PER_MS)

struct ffs_spawner {
	pid_t pid;
	int sock;
};

int ffs_spawner_start(struct ffs_spawner **out, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_spawner *sp = calloc(1, sizeof(*sp));

	if (!sp)
		return ffs_error_errno(err, ENOMEM, "cannot start the spawner");
	int r = FFS_FAULT("spawner-start");

	if (r)
		return ffs_error_errno(err, -r, "cannot start the spawner");
	r = ffs_helper_fork("forkfs-spawn", ffs_spawner_body, NULL, &sp->pid, &sp->sock, err);
	if (r)
		return r;
	*out = ffs_steal_ptr(&sp);
	return 0;
}

void ffs_spawner_stop(struct ffs_spawner *sp)
{
	if (!sp)
		return;
	ffs_helper_end(sp->pid, &sp->sock);
	free(sp);
}

static int ask(struct ffs_spawner *sp, struct ffs_inject_request *req, uint64_t timeout_ns, int *fd,
	struct ffs_error *err)
{
	struct ffs_inject_reply reply;
	uint64_t now = ffs_now_ns(), give_up;
	int r = FFS_FAULT("inject-request");

	if (ffs_add_overflow(now, timeout_ns, &req->deadline_ns) ||
		ffs_add_overflow(req->deadline_ns, GRACE_NS, &give_up))
		req->deadline_ns = give_up = ~0ull;
	if (!r)
		r = ffs_helper_call(sp->sock, req, sizeof(*req), NULL, 0, give_up, &reply, sizeof(reply), fd);
	if (!r) {
		r = FFS_FAULT("inject-reply");
		if (r)
			ffs_close_fd(fd);
	}
	if (r == -ETIMEDOUT)
		return ffs_error_set(err, ETIMEDOUT,
			"the injection into process %d did not end in time (it is finished or undone without "
			"us)",
			(int)req->pid);
	if (r == -EPIPE)
		return ffs_error_set(err, EIO, "the process that injects is gone (killed?): restart forkfs");
	if (r)
		return ffs_error_errno(err, -r, "the injection into process %d failed", (int)req->pid);
	if (reply.code) {
		ffs_close_fd(fd);
		if (err)
			*err = reply.err;
		return reply.code;
	}
	return 0;
}

int ffs_inject_userfaultfd(struct ffs_spawner *sp, struct ffs_proc_id target, uint64_t timeout_ns, int *uffd,
	struct ffs_error *err)
{
	struct ffs_inject_request req = {
		.op = FFS_INJECT_USERFAULTFD, .pid = target.pid, .start = target.start};
	int fd = -1;
	int r = ask(sp, &req, timeout_ns, &fd, err);

	if (r)
		return r;
	if (fd < 0)
		return ffs_error_set(err, EPROTO, "the injector's answer had no userfaultfd");
	*uffd = fd;
	return 0;
}

int ffs_inject_madvise(struct ffs_spawner *sp, struct ffs_proc_id target, uint64_t addr, uint64_t len,
	int advice, uint64_t timeout_ns, struct ffs_error *err)
{
	struct ffs_inject_request req = {.op = FFS_INJECT_MADVISE,
		.pid = target.pid,
		.start = target.start,
		.addr = addr,
		.len = len,
		.advice = advice};
	int fd = -1;
	int r = ask(sp, &req, timeout_ns, &fd, err);

	ffs_close_fd(&fd);
	return r;
}
