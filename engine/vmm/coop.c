/* The driver "coop": VMMs that hand over a userfaultfd of their own, as forkd's patched Firecracker does and
 * as examples/coop/ shows. Owns the meeting: a socket in the directory of the VMM's API socket.
 *
 *     PUT /uffd/wp {"socket":PATH}     the VMM connects to PATH, sends its regions (coop-receive.c) and the
 *                                      userfaultfd (SCM_RIGHTS) in one message, closes its copy, answers 204
 *     PUT /snapshot/create {"snapshot_type":"VmstateOnly","snapshot_path":P,"mem_file_path":M}
 *                                      device state alone into P; M is never opened
 * and GET /, PATCH /vm (api.h). Threads: as api.c. No locks. Every wait has a deadline. */
#include "vmm/api.h"

#include <dirent.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"

/* ---- the meeting ---- */

struct meeting {
	struct ffs_http_wait wait; /* first; its fd: the listening socket, then the connection */
	struct ffs_api *d;
	int listening, peer;
	int uffd;
	bool done;
	struct ffs_geometry *geo;
};

static int greet(struct meeting *m, struct ffs_error *err)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);

	m->peer = accept4(m->listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (m->peer < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED))
		return 0;
	if (m->peer < 0 || getsockopt(m->peer, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
		return ffs_error_errno(err, errno, "accept the VMM's connection");
	if (cred.pid != m->d->vmm.proc.pid)
		return ffs_error_set(err, EPERM,
			"process %d connected in place of the VMM, process %d: its userfaultfd is not taken",
			(int)cred.pid, (int)m->d->vmm.proc.pid);
	m->wait.fd = m->peer;
	return 0;
}

static int take_message(struct meeting *m, struct ffs_error *err)
{
	int r = ffs_coop_receive(m->peer, m->geo, &m->uffd, err);

	if (r > 0) {
		m->done = true;
		m->wait.fd = -1;
	}
	return r < 0 ? r : 0;
}

static int meet(struct ffs_http_wait *w, struct ffs_error *err)
{
	struct meeting *m = (struct meeting *)w;

	return m->peer < 0 ? greet(m, err) : take_message(m, err);
}

/* The 204 may be there before the message. */
static int await_message(struct meeting *m, uint64_t deadline_ns, struct ffs_error *err)
{
	while (!m->done) {
		struct pollfd p = {.fd = m->wait.fd, .events = POLLIN};
		int ms = ffs_ms_until(deadline_ns), r;

		if (!ms)
			return ffs_error_set(err, ETIMEDOUT,
				"the VMM did not hand over a userfaultfd in time (it is asked to connect to "
				"the "
				"socket that PUT /uffd/wp names)");
		r = poll(&p, 1, ms);
		if (r < 0 && errno != EINTR)
			return ffs_error_errno(err, errno, "wait for the VMM's userfaultfd");
		if (r > 0 && (r = meet(&m->wait, err)) < 0)
			return r;
	}
	return 0;
}

static int hold_meeting(struct meeting *m, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + FFS_API_CALL_NS;
	struct ffs_api *d = m->d;
	struct ffs_http_answer a = {0};
	char body[320], seen[256], text[300];
	struct json_object *o = json_object_new_object();

	ffs_api_place_seen(&d->place, "uffd", seen);
	json_object_object_add(o, "socket", json_object_new_string(seen));
	snprintf(body, sizeof(body), "%s",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(o);
	int r = ffs_api_call(d, "PUT", "/uffd/wp", body, &m->wait, deadline, &a, err);

	if (r == -ETIMEDOUT)
		return ffs_error_set(err, ETIMEDOUT, "the VMM does not answer PUT /uffd/wp");
	if (!r && a.status == 404)
		r = ffs_error_set(err, ENOTSUP,
			"the VMM has no PUT /uffd/wp: it does not cooperate (a stock Firecracker is attached "
			"with "
			"--firecracker)");
	else if (!r && a.status != 204)
		r = ffs_error_set(err, ENOTSUP, "the VMM refuses to hand over a userfaultfd: %s",
			ffs_api_fault(&a, text));
	ffs_http_answer_free(&a);
	return r ? r : await_message(m, deadline, err);
}

/* ---- the copy that the VMM must not keep ---- */

static void closedirp(DIR **dir)
{
	if (*dir)
		closedir(*dir);
}

static bool keeps_copy(pid_t pid, int uffd)
{
	char path[320], link[64];

	snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
	_cleanup_(closedirp) DIR *dir = opendir(path);

	for (struct dirent *e; dir && (e = readdir(dir)) != NULL;) {
		snprintf(path, sizeof(path), "/proc/%d/fd/%s", (int)pid, e->d_name);
		ssize_t n = readlink(path, link, sizeof(link) - 1);

		if (n <= 0)
			continue;
		link[n] = '\0';
		if (strcmp(link, FFS_UFFD_LINK) == 0 &&
			syscall(SYS_kcmp, pid, getpid(), KCMP_FILE, atol(e->d_name), uffd) == 0)
			return true;
	}
	return false;
}

static int check_copy(struct ffs_api *d, int uffd, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + FFS_NS_PER_S;

	/* close(2) in another process is announced by nothing */
	while (keeps_copy(d->vmm.proc.pid, uffd)) {
		if (ffs_now_ns() >= deadline)
			return ffs_error_set(err, EPROTO,
				"the VMM keeps its own copy of the userfaultfd: its guest would hang if this "
				"process "
				"died; it has to close it after sending");
		if (poll(NULL, 0, 2) < 0 && errno != EINTR)
			return -errno;
	}
	return 0;
}

/* ---- operations ---- */

static int coop_connect(const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_vmm **out,
	struct ffs_error *err)
{
	struct ffs_api *d = calloc(1, sizeof(*d));

	if (!d)
		return ffs_error_set(err, ENOMEM, "no memory for a VMM");
	ffs_api_init(d, &ffs_coop_ops);
	int r = ffs_api_connect(d, opt->coop_socket, opt->pid, cancel, err);

	if (r)
		ffs_api_close(&d->vmm);
	else
		*out = &d->vmm;
	return r;
}

static int coop_geometry(struct ffs_vmm *vmm, struct ffs_geometry *out, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);
	_cleanup_free_ struct ffs_geometry *geo = calloc(1, sizeof(*geo));
	struct meeting m = {
		.wait = {.ready = meet}, .d = d, .listening = -1, .peer = -1, .uffd = -1, .geo = geo};
	int r = FFS_FAULT("vmm-geometry");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-geometry");
	if (!geo)
		return ffs_error_set(err, ENOMEM, "no memory for a geometry");
	ffs_close_fd(&d->uffd);
	r = ffs_api_ensure(d, ffs_now_ns() + FFS_API_CALL_NS, err);
	if (!r)
		r = ffs_api_place_listen(&d->place, "uffd", &m.listening, err);
	if (!r) {
		m.wait.fd = m.listening;
		r = hold_meeting(&m, err);
		ffs_api_place_remove(&d->place, "uffd");
	}
	ffs_close_fd(&m.listening);
	ffs_close_fd(&m.peer);
	if (!r)
		r = ffs_coop_check(vmm->proc.pid, geo, err);
	if (!r)
		r = check_copy(d, m.uffd, err);
	if (r) {
		ffs_close_fd(&m.uffd);
		return r;
	}
	d->uffd = m.uffd;
	*out = *geo;
	return 0;
}

static int coop_uffd(struct ffs_vmm *vmm, int *uffd, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);

	if (d->uffd < 0)
		return ffs_error_set(err, EPROTO, "the VMM has handed over no userfaultfd");
	*uffd = ffs_steal_fd(&d->uffd);
	return 0;
}

static void coop_finish(struct ffs_vmm *vmm)
{
	struct ffs_api *d = ffs_api_of(vmm);

	if (d->window)
		ffs_api_place_remove(&d->place, FFS_API_STATE_FILE);
	d->window = false;
	d->vmstate_fd = -1;
}

static int coop_prepare(struct ffs_vmm *vmm, int vmstate_fd, bool *was_running, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);

	coop_finish(vmm); /* of a branch that never got to its own */
	int r = ffs_api_prepare(d, vmstate_fd, was_running, err);

	if (!r)
		r = ffs_api_place_file(&d->place, FFS_API_STATE_FILE, err);
	if (r)
		coop_finish(vmm);
	return r;
}

static int coop_save(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);
	int r = FFS_FAULT("vmm-save");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-save");
	return ffs_api_save_file(d, "VmstateOnly", ".memory", 204, NULL, deadline_ns, err);
}

static void coop_describe(struct ffs_vmm *vmm, struct json_object *obj)
{
	ffs_api_describe(ffs_api_of(vmm), obj);
	json_object_object_add(obj, "vmstate_kind", json_object_new_string("coop"));
}

const struct ffs_vmm_ops ffs_coop_ops = {
	.kind = "coop",
	.connect = coop_connect,
	.geometry = coop_geometry,
	.uffd = coop_uffd,
	.prepare = coop_prepare,
	.pause = ffs_api_pause,
	.save = coop_save,
	.resume = ffs_api_resume,
	.finish = coop_finish,
	.run_state = ffs_api_run_state,
	.socket = ffs_api_socket,
	.rescue = ffs_api_rescue,
	.describe = coop_describe,
	.close = ffs_api_close,
};
