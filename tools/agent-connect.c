/* The connection to a guest's agent, and whose it is (agent-link.h): a port's or a service's own socket, or
 * the one socket that Firecracker has for all of its guest's vsock ports, where a port is asked for first:
 *
 *     CONNECT 5241\n  →   OK 1073741824\n        and from there on it is the guest's; closed: nobody listens
 * there (yet)
 *
 * The caller's thread, which waits here for nothing but the VM: for its answer, its end, or the deadline.
 * What is answered is believed in nothing else. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xxhash.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/dial.h"

#define AGAIN_NS 500000000ull /* after a refusal */
#define VSOCK "vsock:"

const char *ffs_agent_path(const char *socket)
{
	return !strncmp(socket, VSOCK, sizeof(VSOCK) - 1) ? socket + sizeof(VSOCK) - 1 : socket;
}

/* The same for the whole life of a VMM process and for no other: so every restored guest sees another one. */
static int make_epoch(struct ffs_agent_vm *vm)
{
	_cleanup_free_ char *boot = NULL;
	char text[128];
	size_t len = 0;
	XXH128_hash_t h;
	XXH128_canonical_t bytes;

	if (ffs_read_file("/proc/sys/kernel/random/boot_id", 64, &boot, &len) < 0)
		return -ENOENT;
	snprintf(
		text, sizeof(text), "%.40s %d %llu", boot, (int)vm->id.pid, (unsigned long long)vm->id.start);
	h = XXH3_128bits(text, strlen(text));
	XXH128_canonicalFromHash(&bytes, h);
	memcpy(vm->epoch, bytes.digest, 16);
	/* a UUID of version 8: one that means what its maker says */
	vm->epoch[6] = (uint8_t)((vm->epoch[6] & 0x0f) | 0x80);
	vm->epoch[8] = (uint8_t)((vm->epoch[8] & 0x3f) | 0x80);
	return 0;
}

/* Who listens there is the VM: its end ends the wait for it. */
static int dial(const struct ffs_agent_link *l, const char *path, uint64_t deadline_ns,
	struct ffs_agent_vm *vm, struct ffs_error *err)
{
	struct ucred peer = {0};
	socklen_t len = sizeof(peer);
	int r = ffs_dial_path(path, deadline_ns, &vm->fd);

	if (r == -ECONNREFUSED)
		return ffs_error_set(err, ECONNREFUSED,
			"nobody listens at %s, the socket of the guest's agent: its VM has ended", path);
	if (r < 0)
		return ffs_error_errno(err, -r, "%s, the socket of the guest's agent", path);
	if (getsockopt(vm->fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0 || peer.pid <= 0)
		return ffs_error_set(err, ESRCH, "%s: who listens there can't be seen", path);
	if (l->pid && peer.pid != l->pid)
		return ffs_error_set(err, EPERM, "%s belongs to process %d and not to the VM, which is %d",
			path, (int)peer.pid, (int)l->pid);
	if (vm->pidfd >= 0)
		return vm->id.pid == peer.pid ? 0 : ffs_error_set(err, ESRCH, "the VM has ended");
	vm->id.pid = peer.pid;
	vm->pidfd = (int)syscall(SYS_pidfd_open, peer.pid, 0);
	if (vm->pidfd < 0 || ffs_proc_stat(peer.pid, NULL, &vm->id.start) < 0 || make_epoch(vm) < 0)
		return ffs_error_set(err, ESRCH, "the VM has ended");
	return 0;
}

/* ---- Firecracker's vsock ---- */

/* Until something can be read (fd -1: nothing), or the time is over: 0; -ESRCH: the VM has ended. */
static int wait_for(int fd, const struct ffs_agent_vm *vm, uint64_t deadline_ns)
{
	struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = vm->pidfd, .events = POLLIN}};

	if (poll(p, 2, ffs_ms_until(deadline_ns)) < 0 && errno != EINTR)
		return -errno;
	return p[1].revents && !p[0].revents ? -ESRCH : 0;
}

/* One byte at a time: what follows the newline is the agent's. 0; -EAGAIN: the guest has nobody there;
 * -errno. */
static int read_answer(const struct ffs_agent_vm *vm, uint64_t deadline_ns, char answer[40])
{
	size_t len = 0;

	answer[0] = '\0';
	for (;;) {
		ssize_t n = recv(vm->fd, answer + len, 1, MSG_DONTWAIT);

		if (n == 1 && answer[len] == '\n') {
			answer[len] = '\0';
			return 0;
		}
		len += n == 1;
		answer[len] = '\0';
		if (len == 39)
			return -EPROTO;
		if (n == 0 || (n < 0 && errno == ECONNRESET))
			return len ? -EPROTO : -EAGAIN;
		if (n < 0 && errno == EAGAIN) {
			int r = ffs_now_ns() >= deadline_ns ? -ETIMEDOUT : wait_for(vm->fd, vm, deadline_ns);

			if (r < 0)
				return r;
		} else if (n < 0 && errno != EINTR) {
			return -errno;
		}
	}
}

static bool is_ok(const char *answer)
{
	return !strncmp(answer, "OK ", 3) && answer[3] && !answer[3 + strspn(answer + 3, "0123456789")];
}

/* What was answered instead, with nothing in it that a terminal would obey. */
static void printable(char *text)
{
	for (; *text; text++)
		if (*text < ' ' || *text > '~')
			*text = '?';
}

/* -EAGAIN: later, perhaps. */
static int ask_for_port(
	const struct ffs_agent_vm *vm, const char *path, uint64_t deadline_ns, struct ffs_error *err)
{
	char text[24], answer[40] = "";
	int n = snprintf(text, sizeof(text), "CONNECT %u\n", AGENT_VSOCK_PORT), r;

	if (send(vm->fd, text, (size_t)n, MSG_NOSIGNAL) != n)
		return -EAGAIN; /* closed at once */
	r = read_answer(vm, deadline_ns, answer);
	if (r == 0 && is_ok(answer))
		return 0;
	printable(answer);
	if (r == 0 || r == -EPROTO)
		return ffs_error_set(
			err, EPROTO, "%s is no vsock of a Firecracker, it answers '%s'", path, answer);
	if (r == -ETIMEDOUT && answer[0])
		return ffs_error_set(err, ETIMEDOUT, "%s has answered half of a line, '%s'", path, answer);
	return r;
}

static int ask_until(const struct ffs_agent_link *l, const char *path, uint64_t deadline_ns,
	struct ffs_agent_vm *vm, struct ffs_error *err)
{
	for (;;) {
		uint64_t again = ffs_now_ns() + AGAIN_NS;
		int r = ask_for_port(vm, path, deadline_ns, err);

		if (r == -EAGAIN) {
			ffs_close_fd(&vm->fd);
			r = again < deadline_ns ? wait_for(-1, vm, again) : -ETIMEDOUT;
			if (!r)
				r = dial(l, path, deadline_ns, vm, err);
			if (!r)
				continue;
		}
		if (r == -ESRCH)
			return ffs_error_set(err, ESRCH, "the VM ended before its agent was ready");
		if (r == -ETIMEDOUT && !err->code)
			return ffs_error_set(err, ETIMEDOUT,
				"no agent listens in the guest (vsock port %u, by %s)", AGENT_VSOCK_PORT,
				path);
		return r < 0 && !err->code ? ffs_error_errno(err, -r, "%s", path) : r;
	}
}

int ffs_agent_connect(
	const struct ffs_agent_link *l, uint64_t deadline_ns, struct ffs_agent_vm *vm, struct ffs_error *err)
{
	const char *path = ffs_agent_path(l->socket);
	int r;

	vm->fd = vm->pidfd = -1;
	r = dial(l, path, deadline_ns, vm, err);
	return r || path == l->socket ? r : ask_until(l, path, deadline_ns, vm, err);
}
