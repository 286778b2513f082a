/* The connection to a QEMU: which socket, which process, one client at a time; and a new one when the old is
 * no good.
 *
 * Called by the driver's caller; ffs_qemu_dial() also by the watchdog (no json, no threads in it). Everything
 * waits with a deadline. A QMP monitor serves one client: connect(2) to a busy one succeeds and no greeting
 * comes. */
#include "vmm/qemu.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cancel.h"
#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "vmm/dial.h"

/* ---- dialling ---- */

int ffs_qemu_dial(const struct ffs_qemu_monitor *m, pid_t pid, uint64_t deadline_ns, int *sock)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	size_t n = strlen(m->path);
	char path[sizeof(m->path) + 64];

	if (m->abstract) {
		if (n + 1 > sizeof(addr.sun_path))
			return -ENAMETOOLONG;
		memcpy(addr.sun_path + 1, m->path, n);
		n = m->padded ? sizeof(addr.sun_path) : n + 1;
		return ffs_dial_addr(
			&addr, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n), deadline_ns, sock);
	}
	if (!pid)
		return ffs_dial_path(m->path, deadline_ns, sock);
	/* as the VMM sees it: its working directory, its mount namespace */
	snprintf(path, sizeof(path), "/proc/%d/%s%s%s", (int)pid, m->path[0] == '/' ? "root" : "cwd",
		m->path[0] == '/' ? "" : "/", m->path);
	int r = ffs_dial_path(path, deadline_ns, sock);

	if (r && r != -EAGAIN && m->path[0] == '/')
		r = ffs_dial_path(m->path, deadline_ns, sock);
	return r;
}

/* ---- who is it ---- */

static int say_dial(const struct ffs_qemu_monitor *m, int r, struct ffs_error *err)
{
	if (r == -ENOENT)
		return ffs_error_set(err, ENOENT,
			"there is no socket %.300s: is the VM running, and is that its QMP socket?", m->path);
	if (r == -ECONNREFUSED)
		return ffs_error_set(err, ECONNREFUSED,
			"nobody serves the socket %.300s: the VM that made it has exited, or it is no stream "
			"socket",
			m->path);
	if (r == -EAGAIN)
		return -EBUSY; /* said by say_busy */
	return ffs_error_errno(err, -r, "connect to the monitor %.300s", m->path);
}

static int say_busy(const struct ffs_qemu_monitor *m, int sock, struct ffs_error *err)
{
	char comm[32], who[80] = "another client";
	pid_t holder = sock >= 0 ? ffs_qemu_holder(sock) : 0;

	if (holder) {
		ffs_proc_comm(holder, comm);
		snprintf(who, sizeof(who), "process %d (%s)", (int)holder, comm);
	}
	return ffs_error_set(err, EBUSY,
		"the monitor %.160s is in use by %s, and QMP serves one client: end that client, or start "
		"the VM with a "
		"second monitor for forkfs (-qmp unix:/PATH2,server=on,wait=off; QEMU cannot add one while "
		"it runs)",
		m->path, who);
}

static int peer_pid(int sock, pid_t *pid)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);

	if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
		return -errno;
	*pid = cred.pid;
	return 0;
}

/* The VMM's pid: the one asked for, if the socket is its own; else the peer's. */
static int identify(
	const struct ffs_qemu_monitor *m, int sock, pid_t asked, pid_t *out, struct ffs_error *err)
{
	char a[32], b[32];
	pid_t peer = 0;
	int r = FFS_FAULT("vmm-identify");

	if (!r)
		r = peer_pid(sock, &peer);
	if (r)
		return ffs_error_errno(err, -r, "find out whose socket %.300s is", m->path);
	*out = asked ? asked : peer;
	if (asked == peer && peer)
		return 0;
	/* the credentials are those of who called listen(2): a manager may have passed the socket on */
	if (asked && ffs_qemu_listens(asked, sock))
		return 0;
	if (asked) {
		ffs_proc_comm(peer, a);
		ffs_proc_comm(asked, b);
		return ffs_error_set(err, EINVAL,
			"the monitor %.200s belongs to process %d (%s), not to process %d (%s)", m->path,
			(int)peer, a, (int)asked, b);
	}
	if (!peer)
		return ffs_error_set(err, ENOTSUP,
			"the VMM behind %.300s is in another pid namespace: run forkfs where it can be seen",
			m->path);
	if (!ffs_qemu_listens(peer, sock)) {
		ffs_proc_comm(peer, a);
		return ffs_error_set(err, ENOTSUP,
			"the socket %.200s was made by process %d (%s) for somebody else: name the VMM's pid "
			"too",
			m->path, (int)peer, a);
	}
	return 0;
}

/* ---- connecting ---- */

static int greet(struct ffs_qemu *d, int sock, struct ffs_cancel *cancel, uint64_t deadline_ns,
	struct json_object **version, struct ffs_error *err)
{
	struct ffs_qmp_hooks hooks = ffs_qemu_hooks(d);
	/* kept to look for the holder when there is no greeting; the client owns and closes its own */
	_cleanup_close_ int probe = fcntl(sock, F_DUPFD_CLOEXEC, 3);
	int r = ffs_qmp_open(sock, d->pidfd, &hooks, deadline_ns, cancel, &d->q, version, err);

	if (r == -EBUSY)
		return say_busy(&d->monitor, probe, err);
	if (r)
		ffs_error_prefix(err, "the monitor %.200s", d->monitor.path);
	else
		d->vmm.socket_generation++;
	return r;
}

static int connect_monitor(struct ffs_qemu *d, const struct ffs_qemu_monitor *m, pid_t by_pid, pid_t asked,
	struct ffs_cancel *cancel, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + FFS_QEMU_GREETING_NS;
	int sock = -1;
	int r = FFS_FAULT("vmm-connect");

	d->monitor = *m;
	if (!r)
		r = ffs_qemu_dial(m, by_pid, deadline, &sock);
	if (r) {
		r = say_dial(m, r, err);
		return r == -EBUSY ? say_busy(m, -1, err) : r;
	}
	r = identify(m, sock, asked, &d->vmm.proc.pid, err);
	if (!r && ffs_proc_stat(d->vmm.proc.pid, NULL, &d->vmm.proc.start) < 0)
		r = ffs_error_set(err, ESRCH, "the VMM behind %.200s, process %d, has exited", m->path,
			(int)d->vmm.proc.pid);
	if (!r) {
		d->pidfd = (int)syscall(SYS_pidfd_open, d->vmm.proc.pid, 0);
		if (d->pidfd < 0)
			r = ffs_error_errno(err, errno, "watch process %d", (int)d->vmm.proc.pid);
	}
	if (r) {
		close(sock);
		return r;
	}
	r = greet(d, sock, cancel, deadline, &d->version, err);
	if (r)
		ffs_close_fd(&d->pidfd);
	return r;
}

static int connect_by_pid(struct ffs_qemu *d, pid_t pid, struct ffs_cancel *cancel, struct ffs_error *err)
{
	struct ffs_qemu_monitor found[FFS_QEMU_MAX_MONITORS];
	char state;

	if (ffs_proc_stat(pid, &state, NULL) < 0 || state == 'Z' || state == 'X')
		return ffs_error_set(err, ESRCH, "there is no process %d", (int)pid);
	int n = ffs_qemu_find_monitors(pid, found, err);

	if (n < 0)
		return n;
	/* a busy one is no reason not to try the next */
	int r = 0;

	for (int i = 0; i < n; i++) {
		r = connect_monitor(d, &found[i], pid, pid, cancel, err);
		if (!r || r == -EINTR)
			return r;
	}
	return r;
}

static int learn(struct ffs_qemu *d, struct ffs_error *err)
{
	struct json_object *ret = NULL, *v;
	char status[32];
	int r = ffs_qemu_call(d, "query-kvm", NULL, -1, ffs_now_ns() + FFS_QEMU_CALL_NS, &ret, err);

	snprintf(d->accelerator, sizeof(d->accelerator), "%s",
		!r && ffs_json_bool(ret, "enabled", false) ? "kvm" : "tcg");
	json_object_put(ret);
	if (!r)
		r = ffs_qemu_query_status(d, ffs_now_ns() + FFS_QEMU_CALL_NS, status, err);
	if (r)
		return r;
	if (d->version && json_object_object_get_ex(d->version, "qemu", &v)) {
		int64_t major = ffs_json_int(v, "major", 0), minor = ffs_json_int(v, "minor", 0);

		if (major >= 0 && major < 1000 && minor >= 0 && minor < 100)
			d->version_number = (unsigned)(major * 100 + minor);
	}
	d->command_line = ffs_qemu_command_line(d->vmm.proc.pid);
	return 0;
}

int ffs_qemu_connect(const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_vmm **out,
	struct ffs_error *err)
{
	struct ffs_qemu *d = calloc(1, sizeof(*d));
	int r;

	if (!d)
		return ffs_error_set(err, ENOMEM, "no memory for a VMM");
	d->vmm.ops = &ffs_qemu_ops;
	d->pidfd = -1;
	d->stage.fdset = -1;
	atomic_store(&d->state, FFS_RUN_PAUSED);
	if (opt->qemu_socket) {
		struct ffs_qemu_monitor m = {0};
		char state;

		if (strlen(opt->qemu_socket) >= sizeof(m.path))
			r = ffs_error_set(err, ENAMETOOLONG, "the socket's name is longer than %zu bytes",
				sizeof(m.path) - 1);
		else if (opt->pid &&
			 (ffs_proc_stat(opt->pid, &state, NULL) < 0 || state == 'Z' || state == 'X'))
			r = ffs_error_set(err, ESRCH, "there is no process %d", (int)opt->pid);
		else {
			m.abstract = opt->qemu_socket[0] == '@';
			snprintf(m.path, sizeof(m.path), "%s", opt->qemu_socket + m.abstract);
			r = connect_monitor(d, &m, 0, opt->pid, cancel, err);
		}
	} else if (opt->pid > 0) {
		r = connect_by_pid(d, opt->pid, cancel, err);
	} else {
		r = ffs_error_set(err, EINVAL, "name the VMM by its pid or its QMP socket");
	}
	if (!r)
		r = learn(d, err);
	/* the pid may have been given to another process between its identification and its pidfd */
	if (!r && !ffs_proc_alive(d->vmm.proc))
		r = ffs_error_set(err, ESRCH, "QEMU %d has exited", (int)d->vmm.proc.pid);
	if (r) {
		ffs_qemu_close(&d->vmm);
		return r;
	}
	*out = &d->vmm;
	return 0;
}

int ffs_qemu_reconnect(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err)
{
	struct json_object *version = NULL;
	char status[32];
	pid_t pid;
	int sock = -1;

	if (!ffs_proc_alive(d->vmm.proc))
		return ffs_error_set(err, ESRCH, "QEMU %d has exited", (int)d->vmm.proc.pid);
	ffs_qmp_close(d->q);
	d->q = NULL;
	int r = FFS_FAULT("vmm-reconnect");

	/* through the daemon's own view first: that is how it was named; else as the VMM sees it */
	if (!r)
		r = ffs_qemu_dial(
			&d->monitor, d->monitor.path[0] == '/' ? 0 : d->vmm.proc.pid, deadline_ns, &sock);
	if (r == -ENOENT || r == -ECONNREFUSED)
		r = ffs_qemu_dial(
			&d->monitor, d->monitor.path[0] == '/' ? d->vmm.proc.pid : 0, deadline_ns, &sock);
	if (r) {
		r = say_dial(&d->monitor, r, err);
		return r == -EBUSY ? say_busy(&d->monitor, -1, err) : r;
	}
	/* the name may lead somewhere else by now */
	r = identify(&d->monitor, sock, d->vmm.proc.pid, &pid, err);
	if (r) {
		close(sock);
		return r;
	}
	r = greet(d, sock, NULL, deadline_ns, &version, err);
	json_object_put(version);
	if (r)
		return r;
	atomic_store(&d->vmm.suspect, false);
	if (d->window)
		ffs_qmp_claim(d->q);
	/* events were missed: whether it was our own cont that made it run can't be told any more */
	r = ffs_qemu_query_status(d, deadline_ns, status, err);
	if (!r && d->sent_stop && strcmp(status, "running") == 0)
		d->vmm.resumed_by_others = true;
	return r;
}

void ffs_qemu_close(struct ffs_vmm *vmm)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);

	ffs_qmp_close(d->q);
	ffs_close_fd(&d->pidfd);
	json_object_put(d->version);
	json_object_put(d->command_line);
	free(d);
}
