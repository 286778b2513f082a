/* Owns struct ffs_api's connection and run state, and the order of what happens to such a VM around a branch.
 *
 * Threads: one caller at a time (the sandbox's protocol lock); run_state by any (`state` is atomic). No
 * reader thread: the API has no events, so `state` is what the last request said. No locks; nothing waits
 * without a deadline. Other clients of the API may pause and resume at any time: so pause and resume look at
 * the state in the same breath, and a VM that somebody else has paused is left so. */
#include "vmm/api.h"

#include <ctype.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cancel.h"
#include "base/cleanup.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "vmm/dial.h"

#define JSON_DEPTH 32

/* ---- requests ---- */

static void beat(void *arg)
{
	struct ffs_api *d = arg;

	if (d->vmm.beat)
		d->vmm.beat(d->vmm.beat_arg);
}

static int say_gone(struct ffs_api *d, struct ffs_error *err)
{
	atomic_store(&d->state, FFS_RUN_EXITED);
	return ffs_error_set(err, ESRCH, "the VMM, process %d, has exited", (int)d->vmm.proc.pid);
}

static int receive(struct ffs_api *d, struct ffs_http_wait *wait, uint64_t deadline_ns,
	struct ffs_http_answer *out, struct ffs_error *err)
{
	struct ffs_http_wait own = {.fd = -1};
	struct ffs_http_wait *w = wait ? wait : &own;

	w->beat = beat;
	w->beat_arg = d;
	int r = ffs_http_recv(&d->http, w, deadline_ns, out, err);

	return r == -ECONNRESET && !ffs_proc_alive(d->vmm.proc) ? say_gone(d, err) : r;
}

int ffs_api_call(struct ffs_api *d, const char *method, const char *path, const char *body,
	struct ffs_http_wait *wait, uint64_t deadline_ns, struct ffs_http_answer *out, struct ffs_error *err)
{
	int r = ffs_http_send(&d->http, method, path, body, deadline_ns, err);

	if (r == -ECONNRESET && !ffs_proc_alive(d->vmm.proc))
		return say_gone(d, err);
	return r ? r : receive(d, wait, deadline_ns, out, err);
}

static struct json_object *parse(const char *text, size_t len)
{
	struct json_tokener *tok = json_tokener_new_ex(JSON_DEPTH);
	struct json_object *o = tok ? json_tokener_parse_ex(tok, text, (int)len) : NULL;

	if (tok && json_tokener_get_error(tok) != json_tokener_success) {
		json_object_put(o);
		o = NULL;
	}
	if (tok)
		json_tokener_free(tok);
	return o;
}

int ffs_api_get(struct ffs_api *d, const char *path, uint64_t deadline_ns, struct json_object **out,
	struct ffs_error *err)
{
	struct ffs_http_answer a = {0};
	int r = ffs_api_call(d, "GET", path, NULL, NULL, deadline_ns, &a, err);

	*out = NULL;
	if (r)
		return r;
	if (a.status == 200)
		*out = parse(a.body, a.len);
	if ((a.status == 200 && !json_object_is_type(*out, json_type_object)) || a.status >= 500 ||
		(a.status != 200 && a.status < 400)) {
		json_object_put(*out);
		*out = NULL;
		r = ffs_error_set(err, EPROTO,
			"the VMM's API answers GET %s with status %d and no JSON object", path, a.status);
	}
	ffs_http_answer_free(&a);
	return r;
}

const char *ffs_api_fault(const struct ffs_http_answer *a, char text[300])
{
	struct json_object *o = a->len ? parse(a->body, a->len) : NULL, *v;

	if (o && json_object_is_type(o, json_type_object) &&
		json_object_object_get_ex(o, "fault_message", &v) && json_object_is_type(v, json_type_string))
		snprintf(text, 300, "%s", json_object_get_string(v));
	else
		snprintf(text, 300, "status %d", a->status);
	json_object_put(o);
	for (char *c = text; *c; c++)
		if (iscntrl((unsigned char)*c))
			*c = ' ';
	return text;
}

/* ---- run state ---- */

int ffs_api_state_of(const char *body)
{
	struct json_object *o = parse(body, strlen(body)), *v;
	const char *s = o && json_object_is_type(o, json_type_object) &&
					json_object_object_get_ex(o, "state", &v) &&
					json_object_is_type(v, json_type_string)
				? json_object_get_string(v)
				: "";
	int state = strcmp(s, "Running") == 0       ? FFS_RUN_RUNNING
		    : strcmp(s, "Paused") == 0      ? FFS_RUN_PAUSED
		    : strcmp(s, "Not started") == 0 ? -EAGAIN
						    : -EPROTO;

	json_object_put(o);
	return state;
}

static int take_state(struct ffs_api *d, struct ffs_http_answer *a, struct ffs_error *err)
{
	int state = a->status == 200 ? ffs_api_state_of(a->body) : -EPROTO;

	ffs_http_answer_free(a);
	if (state == -EAGAIN)
		return ffs_error_set(
			err, EAGAIN, "the VM of process %d is not started yet", (int)d->vmm.proc.pid);
	if (state < 0)
		return ffs_error_set(err, EPROTO,
			"the API of process %d does not say what state its VM is in", (int)d->vmm.proc.pid);
	atomic_store(&d->state, state);
	return state;
}

int ffs_api_query_state(struct ffs_api *d, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_http_answer a = {0};
	int r = ffs_api_call(d, "GET", "/", NULL, NULL, deadline_ns, &a, err);

	return r ? r : take_state(d, &a, err);
}

enum ffs_run_state ffs_api_run_state(struct ffs_vmm *vmm)
{
	return (enum ffs_run_state)atomic_load(&ffs_api_of(vmm)->state);
}

int ffs_api_socket(struct ffs_vmm *vmm)
{
	return ffs_api_of(vmm)->http.sock;
}

/* ---- around a branch ---- */

/* What the state is, then another one: *before is of the moment just before the change. */
static int change_state(
	struct ffs_api *d, const char *to, int *before, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_http_answer a = {0};
	char body[32], text[300];
	int state, r;

	snprintf(body, sizeof(body), "{\"state\":\"%s\"}", to);
	*before = -EAGAIN;
	if (d->pipelines) {
		/* both are in the VMM's hands at once: it carries them out one after the other */
		r = ffs_http_send(&d->http, "GET", "/", NULL, deadline_ns, err);
		if (!r)
			r = ffs_http_send(&d->http, "PATCH", "/vm", body, deadline_ns, err);
		if (!r)
			r = receive(d, NULL, deadline_ns, &a, err);
		state = r ? r : take_state(d, &a, err);
		if (r)
			return r;
		if (state >= 0)
			*before = state;
		r = receive(d, NULL, deadline_ns, &a, err);
	} else {
		state = ffs_api_query_state(d, deadline_ns, err);
		if (state < 0)
			return state;
		*before = state;
		r = ffs_api_call(d, "PATCH", "/vm", body, NULL, deadline_ns, &a, err);
	}
	if (r)
		return r;
	if (a.status == 204)
		atomic_store(&d->state, to[0] == 'P' ? FFS_RUN_PAUSED : FFS_RUN_RUNNING);
	else
		r = ffs_error_set(err, EIO, "the VMM refuses to be %s: %s",
			to[0] == 'P' ? "paused" : "resumed", ffs_api_fault(&a, text));
	ffs_http_answer_free(&a);
	return r ? r : state < 0 ? state : 0;
}

int ffs_api_pause(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);
	int before, r = FFS_FAULT("vmm-pause");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-pause");
	/* before it is sent: from here on resume may have something to undo */
	d->sent_pause = true;
	r = change_state(d, "Paused", &before, deadline_ns, err);
	if (before == FFS_RUN_PAUSED) {
		/* by somebody else since prepare looked: theirs, also the resume */
		d->sent_pause = d->was_running = false;
		return 0;
	}
	if (r == -ETIMEDOUT)
		ffs_error_set(err, ETIMEDOUT,
			"process %d did not pause its VM in time: it was told to run on", (int)vmm->proc.pid);
	return r;
}

static int resume_once(struct ffs_api *d, uint64_t deadline_ns, struct ffs_error *err)
{
	int before, r = ffs_api_ensure(d, deadline_ns, err);

	if (!r)
		r = change_state(d, "Resumed", &before, deadline_ns, err);
	/* by the watchdog, by another client, or by a request of ours whose answer was lost: which, nobody
	 * can tell */
	if (!r && before == FFS_RUN_RUNNING)
		d->vmm.resumed_by_others = true;
	return r;
}

int ffs_api_resume(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);

	if (!d->sent_pause) {
		int r = FFS_FAULT("vmm-resume");

		if (r)
			return ffs_error_set(err, -r, "fault point vmm-resume");
		/* found paused, and let run by its owner in the middle of the branch? */
		if (d->window && !d->was_running) {
			int state = ffs_api_query_state(d, deadline_ns, NULL);

			vmm->resumed_by_others |= state != FFS_RUN_PAUSED;
		}
		return 0;
	}
	for (unsigned attempt = 0;; attempt++) {
		/* a fault point that fails once must not leave the guest stopped */
		int r = FFS_FAULT("vmm-resume");

		if (r)
			ffs_error_set(err, -r, "fault point vmm-resume");
		else
			r = resume_once(d, deadline_ns, err);
		if (!r) {
			d->sent_pause = false;
			return 0;
		}
		if (!ffs_proc_alive(vmm->proc)) {
			d->sent_pause = false;
			return say_gone(d, err);
		}
		if (ffs_now_ns() >= deadline_ns)
			return r;
		struct pollfd gone = {.fd = d->pidfd, .events = POLLIN};

		/* what it waits for is announced by nothing */
		if (attempt && poll(&gone, 1, attempt < 10 ? (int)attempt : 10) < 0 && errno != EINTR)
			return -errno;
		beat(d);
	}
}

int ffs_api_prepare(struct ffs_api *d, int vmstate_fd, bool *was_running, struct ffs_error *err)
{
	int r = FFS_FAULT("vmm-prepare");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-prepare");
	d->sent_pause = false;
	d->vmm.resumed_by_others = false;
	r = ffs_api_ensure(d, ffs_now_ns() + FFS_API_CALL_NS, err);
	if (!r)
		r = ffs_api_query_state(d, ffs_now_ns() + FFS_API_CALL_NS, err);
	if (r < 0)
		return r;
	*was_running = d->was_running = r == FFS_RUN_RUNNING;
	d->vmstate_fd = vmstate_fd;
	d->window = true;
	return 0;
}

/* ---- the connection ---- */

static int peer_of(int sock, pid_t *pid, struct ffs_error *err)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);
	int r = FFS_FAULT("vmm-identify");

	if (!r && getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
		r = -errno;
	if (r)
		return ffs_error_errno(err, -r, "find out whose API socket it is");
	if (!cred.pid)
		return ffs_error_set(err, ENOTSUP,
			"the VMM behind the API socket is in another pid namespace: run forkfs where it can "
			"be "
			"seen");
	*pid = cred.pid;
	return 0;
}

static int dial(struct ffs_api *d, uint64_t deadline_ns, int *sock, struct ffs_error *err)
{
	int r = FFS_FAULT("vmm-connect");

	if (!r)
		r = ffs_dial_path(d->path, deadline_ns, sock);
	/* a name of before, which is gone or leads elsewhere: as the VMM knows it */
	if ((r == -ENOENT || r == -ECONNREFUSED) && d->place.dir >= 0)
		r = ffs_api_place_dial(&d->place, deadline_ns, sock);
	if (r == -ENOENT)
		return ffs_error_set(err, ENOENT,
			"there is no socket %.300s: is the VMM running, and is that its API socket?",
			d->path);
	if (r == -ECONNREFUSED)
		return ffs_error_set(err, ECONNREFUSED,
			"nobody serves the socket %.300s: the VMM that made it has exited", d->path);
	return r ? ffs_error_errno(err, -r, "connect to the API socket %.300s", d->path) : 0;
}

static void adopt(struct ffs_api *d, int sock)
{
	ffs_http_close(&d->http);
	ffs_http_init(&d->http, sock);
	d->vmm.socket_generation++;
	atomic_store(&d->vmm.suspect, false);
}

int ffs_api_ensure(struct ffs_api *d, uint64_t deadline_ns, struct ffs_error *err)
{
	struct pollfd p = {.fd = d->http.sock, .events = POLLIN};
	pid_t pid = 0;
	int sock = -1;

	/* input that nobody asked for: the end of the connection, or an answer to somebody else's request */
	if (!d->http.dead && !d->http.owed && !atomic_load(&d->vmm.suspect) && poll(&p, 1, 0) == 0)
		return 0;
	if (!ffs_proc_alive(d->vmm.proc))
		return say_gone(d, err);
	int r = FFS_FAULT("vmm-reconnect");

	r = r ? ffs_error_set(err, -r, "fault point vmm-reconnect") : dial(d, deadline_ns, &sock, err);
	if (!r)
		r = peer_of(sock, &pid, err);
	if (!r && pid != d->vmm.proc.pid)
		r = ffs_error_set(err, ESTALE,
			"the socket %.200s belongs to process %d now, not to the VMM (%d)", d->path, (int)pid,
			(int)d->vmm.proc.pid);
	if (r)
		ffs_close_fd(&sock);
	else
		adopt(d, sock);
	return r;
}

void ffs_api_copy_string(struct json_object *o, const char *key, char *out, size_t size)
{
	struct json_object *v;

	if (json_object_object_get_ex(o, key, &v) && json_object_is_type(v, json_type_string))
		snprintf(out, size, "%s", json_object_get_string(v));
	for (char *c = out; *c; c++)
		if (!isprint((unsigned char)*c))
			*c = '?';
}

static bool has_device(struct json_object *config, const char *key)
{
	struct json_object *v;

	return json_object_object_get_ex(config, key, &v) && json_object_is_type(v, json_type_object);
}

/* Who answers, and what the VM is made of. A VMM that has only the requests that are needed is served too. */
static int learn(struct ffs_api *d, uint64_t deadline_ns, struct ffs_error *err)
{
	struct json_object *info = NULL, *config = NULL;
	int r = ffs_api_get(d, "/", deadline_ns, &info, err);

	if (!r && !info)
		r = ffs_error_set(
			err, ENOTSUP, "what is behind %.200s has no GET /: it is no such VMM", d->path);
	if (!r) {
		ffs_api_copy_string(info, "app_name", d->app, sizeof(d->app));
		ffs_api_copy_string(info, "vmm_version", d->version, sizeof(d->version));
		json_object_put(info);
		r = ffs_api_query_state(d, deadline_ns, err);
	}
	if (r < 0)
		return r;
	r = ffs_api_get(d, "/machine-config", deadline_ns, &d->machine, err);
	if (!r)
		r = ffs_api_get(d, "/vm/config", deadline_ns, &config, err);
	if (!r && config) {
		d->vsock = has_device(config, "vsock");
		d->balloon = has_device(config, "balloon");
		d->drives = ffs_api_list_drives(config, &d->writable_drives);
		json_object_put(config);
	}
	return r;
}

void ffs_api_init(struct ffs_api *d, const struct ffs_vmm_ops *ops)
{
	d->vmm.ops = ops;
	ffs_http_init(&d->http, -1);
	d->pidfd = d->place.dir = d->uffd = d->fifo = d->vmstate_fd = -1;
	atomic_store(&d->state, FFS_RUN_PAUSED);
}

int ffs_api_connect(
	struct ffs_api *d, const char *path, pid_t asked, struct ffs_cancel *cancel, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + FFS_API_CALL_NS;
	pid_t pid = 0;
	int sock = -1;

	if (strlen(path) >= sizeof(d->path))
		return ffs_error_set(
			err, ENAMETOOLONG, "the socket's name is longer than %zu bytes", sizeof(d->path) - 1);
	snprintf(d->path, sizeof(d->path), "%s", path);
	int r = dial(d, deadline, &sock, err);

	if (r)
		return r;
	adopt(d, sock);
	r = peer_of(sock, &pid, err);
	if (!r && asked && asked != pid)
		r = ffs_error_set(err, EINVAL,
			"the API socket %.200s belongs to process %d, not to process %d", path, (int)pid,
			(int)asked);
	d->vmm.proc.pid = pid;
	if (!r && ffs_proc_stat(pid, NULL, &d->vmm.proc.start) < 0)
		r = ffs_error_set(
			err, ESRCH, "the VMM behind %.200s, process %d, has exited", path, (int)pid);
	if (!r && (d->pidfd = (int)syscall(SYS_pidfd_open, pid, 0)) < 0)
		r = ffs_error_errno(err, errno, "watch process %d", (int)pid);
	if (!r)
		r = ffs_api_place_open(sock, pid, &d->place, err);
	if (!r)
		r = learn(d, deadline, err);
	/* the pid may have been given to another process between its identification and its pidfd */
	if (!r && !ffs_proc_alive(d->vmm.proc))
		r = say_gone(d, err);
	if (!r && ffs_cancel_is_set(cancel))
		r = ffs_error_set(err, EINTR, "interrupted while attaching");
	return r;
}

void ffs_api_describe(struct ffs_api *d, struct json_object *obj)
{
	struct json_object *copy = NULL, *drives = NULL;

	json_object_object_add(
		obj, "version", json_object_new_string(d->version[0] ? d->version : "unknown"));
	if (d->app[0])
		json_object_object_add(obj, "app", json_object_new_string(d->app));
	json_object_object_add(obj, "accelerator", json_object_new_string("kvm"));
	if (d->machine && json_object_deep_copy(d->machine, &copy, NULL) == 0)
		json_object_object_add(obj, "machine_config", copy);
	/* a save tells the guest's vsock driver that its connections are over */
	json_object_object_add(obj, "resets_vsock", json_object_new_boolean(d->vsock));
	json_object_object_add(obj, "writable_drives", json_object_new_int((int)d->writable_drives));
	if (d->drives && json_object_deep_copy(d->drives, &drives, NULL) == 0)
		json_object_object_add(obj, "drives", drives);
}

void ffs_api_close(struct ffs_vmm *vmm)
{
	struct ffs_api *d = ffs_api_of(vmm);
	struct ffs_error why = {0};

	/* nobody else will */
	if (d->sent_pause && ffs_api_resume(vmm, ffs_now_ns() + FFS_API_CALL_NS, &why) < 0)
		ffs_log(FFS_LOG_ERROR, "process %d: cannot resume its VM, do it by hand: %s",
			(int)vmm->proc.pid, why.text);
	ffs_http_close(&d->http);
	ffs_close_fd(&d->pidfd);
	ffs_close_fd(&d->uffd);
	ffs_close_fd(&d->fifo);
	ffs_api_place_close(&d->place);
	json_object_put(d->machine);
	json_object_put(d->drives);
	free(d);
}
