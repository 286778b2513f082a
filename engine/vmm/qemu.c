/* The QEMU driver: owns struct ffs_qemu, its run state and the order of what happens to the VM around a
 * branch.
 *
 * Threads: one caller at a time (the sandbox's protocol lock) and the QMP client's reader, which runs the
 * event hook while nobody calls (see qmp.c: hook and caller exclude each other). `state` and `way` are atomic
 * for run_state and describe. No locks. Nothing here waits without a deadline. From prepare to finish the
 * connection stays claimed, so that stop, save and cont find no other reader. */
#include "vmm/qemu.h"

#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"

/* ---- small things ---- */

const char *ffs_json_str(struct json_object *obj, const char *key)
{
	struct json_object *v;

	if (!json_object_object_get_ex(obj, key, &v) || !json_object_is_type(v, json_type_string))
		return NULL;
	return json_object_get_string(v);
}

int64_t ffs_json_int(struct json_object *obj, const char *key, int64_t dflt)
{
	struct json_object *v;

	if (!json_object_object_get_ex(obj, key, &v) || !json_object_is_type(v, json_type_int))
		return dflt;
	return json_object_get_int64(v);
}

bool ffs_json_bool(struct json_object *obj, const char *key, bool dflt)
{
	struct json_object *v;

	if (!json_object_object_get_ex(obj, key, &v) || !json_object_is_type(v, json_type_boolean))
		return dflt;
	return json_object_get_boolean(v);
}

int ffs_qemu_call(struct ffs_qemu *d, const char *command, struct json_object *args, int fd,
	uint64_t deadline_ns, struct json_object **ret, struct ffs_error *err)
{
	if (!d->q)
		return ffs_error_set(
			err, ENOTCONN, "no connection to the monitor of QEMU %d", (int)d->vmm.proc.pid);
	int r = ffs_qmp_call(d->q, command, args, fd, deadline_ns, ret, err);

	if (r == -EREMOTEIO) {
		if (err)
			err->code = EIO;
		return -EIO;
	}
	if (r == -ECONNRESET && !ffs_proc_alive(d->vmm.proc))
		return ffs_error_set(err, ESRCH, "QEMU %d has exited", (int)d->vmm.proc.pid);
	return r;
}

int ffs_qemu_hmp(struct ffs_qemu *d, const char *line, char **text, struct ffs_error *err)
{
	struct json_object *args = json_object_new_object(), *ret = NULL;

	json_object_object_add(args, "command-line", json_object_new_string(line));
	int r = ffs_qemu_call(
		d, "human-monitor-command", args, -1, ffs_now_ns() + FFS_QEMU_CALL_NS, &ret, err);

	json_object_put(args);
	if (!r && !json_object_is_type(ret, json_type_string))
		r = ffs_error_set(err, EPROTO, "QEMU answered \"%s\" with something else than text", line);
	if (!r) {
		*text = strdup(json_object_get_string(ret));
		if (!*text)
			r = ffs_error_set(err, ENOMEM, "no memory for the answer to \"%s\"", line);
	}
	json_object_put(ret);
	return r;
}

/* ---- run state ---- */

static void set_state(struct ffs_qemu *d, enum ffs_run_state s)
{
	int now = atomic_load(&d->state);

	/* exited is final, whatever was still on its way */
	while (now != FFS_RUN_EXITED && !atomic_compare_exchange_weak(&d->state, &now, (int)s))
		;
}

static void on_event(void *arg, const char *name, struct json_object *data)
{
	struct ffs_qemu *d = arg;

	if (strcmp(name, "STOP") == 0) {
		d->stops++;
		set_state(d, FFS_RUN_PAUSED);
	} else if (strcmp(name, "RESUME") == 0) {
		d->resumes++;
		set_state(d, FFS_RUN_RUNNING);
	} else if (strcmp(name, "MIGRATION") == 0) {
		const char *status = ffs_json_str(data, "status");

		snprintf(d->migration, sizeof(d->migration), "%s", status ? status : "?");
	}
}

static void on_gone(void *arg)
{
	struct ffs_qemu *d = arg;

	set_state(d, FFS_RUN_EXITED);
	if (d->vmm.on_gone)
		d->vmm.on_gone(d->vmm.on_gone_arg);
}

static void on_beat(void *arg)
{
	struct ffs_qemu *d = arg;

	if (d->vmm.beat)
		d->vmm.beat(d->vmm.beat_arg);
}

struct ffs_qmp_hooks ffs_qemu_hooks(struct ffs_qemu *d)
{
	return (struct ffs_qmp_hooks){.event = on_event, .gone = on_gone, .beat = on_beat, .arg = d};
}

int ffs_qemu_query_status(struct ffs_qemu *d, uint64_t deadline_ns, char out[32], struct ffs_error *err)
{
	struct json_object *ret = NULL;
	int r = ffs_qemu_call(d, "query-status", NULL, -1, deadline_ns, &ret, err);

	if (r)
		return r;
	const char *status = ffs_json_str(ret, "status");

	if (!status)
		r = ffs_error_set(
			err, EPROTO, "QEMU %d answered query-status without a status", (int)d->vmm.proc.pid);
	else
		snprintf(out, 32, "%s", status);
	json_object_put(ret);
	if (!r)
		set_state(d, strcmp(out, "running") == 0 ? FFS_RUN_RUNNING : FFS_RUN_PAUSED);
	return r;
}

static enum ffs_run_state qemu_run_state(struct ffs_vmm *vmm)
{
	return (enum ffs_run_state)atomic_load(&ffs_qemu_of(vmm)->state);
}

/* ---- around a branch ---- */

static int check_state(const char *status, bool *was_running, struct ffs_error *err)
{
	static const char *const transient[] = {
		"inmigrate", "preconfig", "restore-vm", "save-vm", "finish-migrate", "colo"};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(transient); i++)
		if (strcmp(status, transient[i]) == 0)
			return ffs_error_set(err, EAGAIN,
				"the VM is in state \"%s\": branch it when that (an incoming or outgoing "
				"migration, a savevm) is over",
				status);
	/* QEMU's stop does nothing in that state while timers and devices go on */
	if (strcmp(status, "suspended") == 0)
		return ffs_error_set(
			err, EAGAIN, "the guest is suspended (S3), where QEMU cannot stop it: wake it first");
	*was_running = strcmp(status, "running") == 0;
	return 0;
}

static int check_blockers(struct ffs_qemu *d, struct ffs_error *err)
{
	struct json_object *ret = NULL, *reasons;
	int r = ffs_qemu_call(d, "query-migrate", NULL, -1, ffs_now_ns() + FFS_QEMU_CALL_NS, &ret, err);

	if (r)
		return r;
	const char *status = ffs_json_str(ret, "status");

	if (json_object_object_get_ex(ret, "blocked-reasons", &reasons) &&
		json_object_is_type(reasons, json_type_array) && json_object_array_length(reasons)) {
		struct json_object *first = json_object_array_get_idx(reasons, 0);

		r = ffs_error_set(err, ENOTSUP,
			"a device of the VM has state that cannot be saved (%.250s): start the VM without it",
			json_object_is_type(first, json_type_string) ? json_object_get_string(first)
								     : "no reason given");
	} else if (status &&
		   (strcmp(status, "active") == 0 || strcmp(status, "setup") == 0 ||
			   strcmp(status, "device") == 0 || strcmp(status, "cancelling") == 0 ||
			   strncmp(status, "postcopy", 8) == 0 || strcmp(status, "pre-switchover") == 0)) {
		r = ffs_error_set(
			err, EAGAIN, "the VM is being migrated (%s): branch it when that is over", status);
	}
	json_object_put(ret);
	return r;
}

int ffs_qemu_ensure(struct ffs_qemu *d, struct ffs_error *err)
{
	if (d->q) {
		/* under the claim, or the reader might be looking at the same flags */
		ffs_qmp_claim(d->q);
		ffs_qmp_drain(d->q);
		bool bad = ffs_qmp_is_dead(d->q) || ffs_qmp_is_suspect(d->q) || atomic_load(&d->vmm.suspect);

		ffs_qmp_release(d->q);
		if (!bad)
			return 0;
		ffs_log(FFS_LOG_INFO, "QEMU %d: the monitor connection is doubtful, making a new one",
			(int)d->vmm.proc.pid);
	}
	return ffs_qemu_reconnect(d, ffs_now_ns() + FFS_QEMU_GREETING_NS, err);
}

static void close_window(struct ffs_qemu *d)
{
	if (d->window && d->q)
		ffs_qmp_release(d->q);
	d->window = false;
}

static int prepare_claimed(struct ffs_qemu *d, int vmstate_fd, bool *was_running, struct ffs_error *err)
{
	char status[32];
	int r = ffs_qemu_query_status(d, ffs_now_ns() + FFS_QEMU_CALL_NS, status, err);

	if (!r)
		r = check_state(status, was_running, err);
	d->was_running = !r && *was_running;
	if (!r)
		r = check_blockers(d, err);
	if (!r)
		r = ffs_qemu_stage(d, vmstate_fd, *was_running, err);
	return r;
}

static void qemu_finish(struct ffs_vmm *vmm)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);

	ffs_qemu_unstage(d);
	close_window(d);
}

static int qemu_prepare(struct ffs_vmm *vmm, int vmstate_fd, bool *was_running, struct ffs_error *err)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);
	int r = FFS_FAULT("vmm-prepare");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-prepare");
	qemu_finish(vmm); /* of a branch that never got to its own */
	d->sent_stop = false;
	vmm->resumed_by_others = false;
	r = ffs_qemu_ensure(d, err);
	if (r)
		return r;
	ffs_qmp_claim(d->q);
	d->window = true;
	r = prepare_claimed(d, vmstate_fd, was_running, err);
	if (r)
		qemu_finish(vmm);
	return r;
}

struct stop_wait {
	struct ffs_qemu *d;
	unsigned stops;
};

static bool stop_seen(void *arg)
{
	struct stop_wait *w = arg;

	return w->d->stops != w->stops;
}

static int pause_claimed(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err)
{
	ffs_qmp_drain(d->q);
	if (atomic_load(&d->state) != FFS_RUN_RUNNING) {
		char status[32];
		int r = ffs_qemu_query_status(d, deadline_ns, status, err);

		if (r || strcmp(status, "running") != 0)
			return r;
	}
	struct stop_wait w = {.d = d, .stops = d->stops};

	/* before it is sent: from here on resume has something to undo */
	d->sent_stop = true;
	d->sent_cont = false;
	int r = ffs_qemu_call(d, "stop", NULL, -1, deadline_ns, NULL, err);

	if (r)
		return r;
	/* QEMU sends STOP before the reply. No STOP: it had stopped by itself (an I/O error, another client)
	 * since we looked */
	if (!stop_seen(&w)) {
		char status[32];

		r = ffs_qemu_query_status(d, deadline_ns, status, err);
		if (!r && !stop_seen(&w))
			r = ffs_error_set(
				err, EAGAIN, "the VM went to state \"%s\" while it was being paused", status);
		return r;
	}
	return 0;
}

static int qemu_pause(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);
	int r = FFS_FAULT("vmm-pause");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-pause");
	if (!d->q)
		return ffs_error_set(
			err, ENOTCONN, "no connection to the monitor of QEMU %d", (int)vmm->proc.pid);
	ffs_qmp_claim(d->q);
	r = pause_claimed(d, deadline_ns, err);
	ffs_qmp_release(d->q);
	if (r == -ETIMEDOUT)
		ffs_error_set(err, ETIMEDOUT,
			"QEMU %d did not stop in time (its devices may be waiting for slow storage): it was "
			"told to run on",
			(int)vmm->proc.pid);
	return r;
}

/* One attempt at cont: 0 when it runs; -EAGAIN: worth another. */
static int try_cont(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err)
{
	char status[32];
	unsigned resumes = d->resumes;
	struct ffs_error why = {0};
	int r = ffs_qemu_call(d, "cont", NULL, -1, deadline_ns, NULL, &why);

	if (!r && d->resumes != resumes)
		return 0;
	if (r && r != -EIO) {
		if (err)
			*err = why;
		/* a reply that was lost says nothing about the VM; what the fault points inject is retried
		 * like a refusal */
		return r == -ESRCH || r == -ETIMEDOUT || d->q == NULL || ffs_qmp_is_dead(d->q) ? r : -EAGAIN;
	}
	int q = ffs_qemu_query_status(d, deadline_ns, status, err);

	if (q)
		return q == -ESRCH || q == -ETIMEDOUT || ffs_qmp_is_dead(d->q) ? q : -EAGAIN;
	if (strcmp(status, "running") == 0 || strcmp(status, "suspended") == 0)
		return 0;
	/* "Migration is not finalized yet" and the like pass by themselves; these do not, and are not of our
	 * making */
	if (strcmp(status, "shutdown") == 0 || strcmp(status, "internal-error") == 0 ||
		strcmp(status, "guest-panicked") == 0)
		return ffs_error_set(err, ENOTRECOVERABLE,
			"the VM cannot run on: its state is \"%s\" (%.200s)", status,
			r ? why.text : "QEMU accepted cont");
	ffs_error_set(err, EIO, "the VM is still in state \"%s\": %.300s", status,
		r ? why.text : "cont had no effect");
	return -EAGAIN;
}

static bool resumed(void *arg)
{
	return atomic_load(&((struct ffs_qemu *)arg)->state) != FFS_RUN_PAUSED;
}

static int resume_claimed(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err)
{
	int r;

	ffs_qmp_drain(d->q);
	bool first = !d->sent_cont;
	unsigned resumes = d->resumes, stops = d->stops;

	/* by the watchdog, or by somebody's own cont */
	if (first && atomic_load(&d->state) == FFS_RUN_RUNNING)
		d->vmm.resumed_by_others = true;
	d->sent_cont = true;
	ffs_qemu_cancel_migration(d, deadline_ns);
	for (uint64_t pause_ns = FFS_NS_PER_MS / 2;; pause_ns *= 2) {
		r = try_cont(d, deadline_ns, err);
		/* cont of a VM that runs (the watchdog has read the events of its own rescue): no RESUME, or,
		 * as vm_prepare_start() has it, a STOP before it */
		if (r == 0 && first && (d->resumes == resumes || d->stops != stops))
			d->vmm.resumed_by_others = true;
		if (r != -EAGAIN)
			return r;
		uint64_t now = ffs_now_ns();

		if (now >= deadline_ns)
			return ffs_error_set(err, ETIMEDOUT,
				"QEMU %d does not run again: resume it by hand (cont in its monitor)",
				(int)d->vmm.proc.pid);
		/* what QEMU waits for is announced by no event: look again soon, then less often */
		if (pause_ns > 50 * FFS_NS_PER_MS)
			pause_ns = 50 * FFS_NS_PER_MS;
		r = ffs_qmp_wait(
			d->q, resumed, d, now + pause_ns < deadline_ns ? now + pause_ns : deadline_ns);
		if (r != 0 && r != -ETIMEDOUT)
			return r;
	}
}

static int resume_once(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err)
{
	if (!d->q || ffs_qmp_is_dead(d->q)) {
		int r = ffs_qemu_reconnect(d, deadline_ns, err);

		if (r)
			return r;
	}
	ffs_qmp_claim(d->q);
	int r = resume_claimed(d, deadline_ns, err);

	ffs_qmp_release(d->q);
	return r;
}

static int qemu_resume(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);
	int r;

	if (!d->sent_stop) {
		/* found stopped, and let run by its owner in the middle of the branch */
		if (d->window && d->q && !d->was_running) {
			ffs_qmp_drain(d->q);
			vmm->resumed_by_others |= atomic_load(&d->state) == FFS_RUN_RUNNING;
		}
		return 0;
	}
	for (unsigned attempt = 0;; attempt++) {
		/* a fault point that fails once must not leave the guest stopped: it is one more thing to
		 * retry */
		r = FFS_FAULT("vmm-resume");
		if (r)
			ffs_error_set(err, -r, "fault point vmm-resume");
		else
			r = resume_once(d, deadline_ns, err);
		if (!r) {
			d->sent_stop = false;
			return 0;
		}
		if (!ffs_proc_alive(vmm->proc)) {
			d->sent_stop = false;
			return ffs_error_set(err, ESRCH, "QEMU %d has exited", (int)vmm->proc.pid);
		}
		if (r == -ENOTRECOVERABLE) {
			d->sent_stop = false; /* a state that cont does not end */
			if (err)
				err->code = EIO;
			return -EIO;
		}
		if (ffs_now_ns() >= deadline_ns)
			return r;
		struct pollfd gone = {.fd = d->pidfd, .events = POLLIN};

		if (attempt && poll(&gone, 1, attempt < 10 ? (int)attempt : 10) < 0 && errno != EINTR)
			return -errno;
		on_beat(d);
	}
}

static int qemu_socket(struct ffs_vmm *vmm)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);

	return d->q ? ffs_qmp_fd(d->q) : -1;
}

static void qemu_describe(struct ffs_vmm *vmm, struct json_object *obj)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);
	struct json_object *copy = NULL, *v = NULL;
	char text[160] = "unknown";

	/* the version object is QEMU's own: only what has the right type gets out */
	if (d->version && json_object_object_get_ex(d->version, "qemu", &v)) {
		const char *package = ffs_json_str(d->version, "package");

		snprintf(text, sizeof(text), "%lld.%lld.%lld%s%.80s%s",
			(long long)ffs_json_int(v, "major", 0), (long long)ffs_json_int(v, "minor", 0),
			(long long)ffs_json_int(v, "micro", 0), package && *package ? " (" : "",
			package ? package : "", package && *package ? ")" : "");
	}
	json_object_object_add(obj, "version", json_object_new_string(text));
	if (d->command_line && json_object_deep_copy(d->command_line, &copy, NULL) == 0)
		json_object_object_add(obj, "command_line", copy);
	json_object_object_add(obj, "accelerator", json_object_new_string(d->accelerator));
	json_object_object_add(obj, "vmstate_kind",
		json_object_new_string(atomic_load(&d->way) == FFS_QEMU_MIGRATE ? "migration" : "xen-save"));
	/* only who loads such a state tells its guest that connections are over */
	json_object_object_add(obj, "resets_vsock", json_object_new_boolean(false));
}

const struct ffs_vmm_ops ffs_qemu_ops = {
	.kind = "qemu",
	.connect = ffs_qemu_connect,
	.geometry = ffs_qemu_geometry,
	.prepare = qemu_prepare,
	.pause = qemu_pause,
	.save = ffs_qemu_save,
	.resume = qemu_resume,
	.finish = qemu_finish,
	.run_state = qemu_run_state,
	.socket = qemu_socket,
	.rescue = ffs_qemu_rescue,
	.describe = qemu_describe,
	.close = ffs_qemu_close,
};
