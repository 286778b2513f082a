/* Owns the way of a VM into the tree.
 *
 * Threads: admission with the tree lock held; the rest on pool threads without it (taken inside for short),
 * but for the start, which is the main thread's. Whoever has `attaching` of a sandbox set is the only one to
 * touch its record. */
#include "attach.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attached.h"
#include "base/cancel.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "ctl.h"
#include "events.h"
#include "guard.h"
#include "nodes.h"

int ffs_attach_admit(struct ffs_fs *fs, struct ffs_request *req, struct ffs_error *err)
{
	struct ffs_sbx *s = ffs_tree_find(fs, req->name);

	if (s && s->attaching)
		return ffs_error_set(err, EBUSY, "sandbox '%s' is just being attached", req->name);
	if (s && s->detaching)
		return ffs_error_set(err, EBUSY, "sandbox '%s' is just being detached", req->name);
	if (s && s->engine)
		return ffs_error_set(err, EEXIST,
			"sandbox '%s' is attached already (pid %d): detach it or take another "
			"name",
			req->name, (int)s->pid);
	if (fs->closing)
		return ffs_error_set(err, ESHUTDOWN, "the daemon is ending");
	if (s) {
		req->sbx = ffs_sbx_ref(s);
	} else {
		req->sbx = ffs_sbx_new(fs, req->name);
		if (!req->sbx)
			return ffs_error_set(err, ENOMEM, "no memory");
		ffs_tree_add(fs, req->sbx);
	}
	req->sbx->attaching = true;
	return 0;
}

static void undo(struct ffs_fs *fs, struct ffs_sbx *s)
{
	pthread_mutex_lock(&fs->lock);
	s->attaching = false;
	ffs_tree_drop_empty(fs, s);
	pthread_mutex_unlock(&fs->lock);
}

/* False: the client (t, NULL: none) is gone or the daemon is ending, nothing was done. */
static bool publish(
	struct ffs_fs *fs, struct ffs_txn *t, struct ffs_request *req, struct ffs_sandbox *engine, int pidfd)
{
	struct ffs_sbx *s = req->sbx;
	struct ffs_inval inval = {0};

	pthread_mutex_lock(&fs->lock);
	bool ok = !(t && ffs_txn_abandoned(t)) && !fs->closing;

	if (ok) {
		s->attaching = false;
		s->engine = engine;
		s->exited = false;
		s->pid = ffs_sandbox_pid(engine);
		s->pidfd = pidfd;
		s->memory_size = ffs_sandbox_memory_size(engine);
		s->uid = req->has_owner ? req->uid : fs->uid;
		s->gid = req->has_owner ? req->gid : fs->gid;
		s->writable = !req->has_owner || req->owner_writes;
		snprintf(s->origin, sizeof(s->origin), "%s", req->origin);
		s->attached_ns = ffs_wall_ns();
		ffs_event(fs, "attach", s->name, NULL, NULL, NULL);
		/* a directory that was there for its branches has another owner now */
		ffs_inval_collect(fs, s, &inval);
	}
	pthread_mutex_unlock(&fs->lock);
	ffs_inval_send(fs, &inval);
	return ok;
}

static void let_go(struct ffs_sandbox *engine)
{
	ffs_sandbox_detach(engine);
	ffs_sandbox_unref(engine);
}

static int attach(struct ffs_fs *fs, const struct ffs_request *req, struct ffs_cancel *cancel,
	struct ffs_sandbox **out, struct ffs_error *err)
{
	struct ffs_attach_options opt = {.name = req->name,
		.pid = req->pid,
		.qemu_socket = req->qemu,
		.coop_socket = req->coop,
		.firecracker_socket = req->firecracker,
		.track = req->track,
		.force = req->force,
		.disks = req->disks,
		.n_disks = req->n_disks,
		.own_mount = fs->mount_dev};
	int r = FFS_FAULT("fs-attach");

	if (!r)
		r = ffs_sandbox_attach(fs->engine, &opt, cancel, out, err);
	if (!r) {
		r = ffs_guard_check(fs, ffs_sandbox_pid(*out), err);
		if (r < 0)
			let_go(*out);
	}
	return r;
}

/* Before anybody is told that it is attached. Without a record it is no less attached. */
static void remember(struct ffs_fs *fs, const struct ffs_request *req, pid_t pid)
{
	struct ffs_proc_id vmm = {.pid = pid};
	struct ffs_error err = {0};
	int r;

	if (!fs->attached)
		return;
	r = ffs_proc_stat(pid, NULL, &vmm.start);
	if (r < 0)
		return; /* it has just exited */
	r = ffs_attached_remember(fs->attached, req->name, vmm, req->said, &err);
	if (r < 0)
		ffs_log(FFS_LOG_WARN, "%s will not be found again by a later daemon: %s", req->name,
			err.text);
}

static void forget(struct ffs_fs *fs, const char *name)
{
	if (fs->attached)
		ffs_attached_forget(fs->attached, name);
}

/* ---- by request ---- */

void ffs_attach_run(struct ffs_txn *t, struct ffs_request *req)
{
	struct ffs_fs *fs = ffs_txn_fs(t);
	struct ffs_sandbox *engine = NULL;
	struct ffs_error err = {0};
	int r = attach(fs, req, ffs_txn_cancel(t), &engine, &err);

	if (r < 0) {
		undo(fs, req->sbx);
		ffs_txn_failed(t, -r, &err);
		return;
	}
	int pidfd = (int)syscall(SYS_pidfd_open, ffs_sandbox_pid(engine), 0);

	remember(fs, req, ffs_sandbox_pid(engine));
	if (!publish(fs, t, req, engine, pidfd)) {
		forget(fs, req->name);
		let_go(engine);
		if (pidfd >= 0)
			close(pidfd);
		undo(fs, req->sbx);
		ffs_error_set(&err, EINTR, "attach of '%s' was given up by its client", req->name);
		ffs_txn_failed(t, EINTR, &err);
		return;
	}
	atomic_fetch_add(&fs->count.attaches, 1);
	ffs_reaper_push(fs->reaper, NULL);
	struct json_object *o = json_object_new_object(), *status = NULL;

	if (ffs_sandbox_status(engine, &status) < 0)
		status = json_object_new_object();
	json_object_object_add(o, "attach", status);
	ffs_txn_done(t, o);
}

/* ---- again, when a daemon starts ---- */

struct again {
	struct ffs_work work;
	struct ffs_fs *fs;
	struct ffs_request req;
	struct ffs_proc_id vmm;
};

/* What may be otherwise the next time a daemon starts: the record stays. */
static bool may_pass(int code)
{
	static const int codes[] = {
		EBUSY, EAGAIN, EINTR, ETIMEDOUT, ENOMEM, EMFILE, ENFILE, ENOSPC, ESHUTDOWN};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(codes); i++)
		if (code == codes[i])
			return true;
	return false;
}

static void lost(struct ffs_fs *fs, const char *name, const struct ffs_error *why, bool for_good)
{
	ffs_log(FFS_LOG_WARN, "%s was attached before and cannot be again%s: %s", name,
		for_good ? "" : " now (the next daemon tries once more)", why->text);
	if (for_good)
		forget(fs, name);
	atomic_fetch_add(&fs->count.lost, 1);
	pthread_mutex_lock(&fs->lock);
	ffs_event(fs, "gone", name, NULL, NULL, why->text);
	pthread_mutex_unlock(&fs->lock);
}

static void say_exited(struct ffs_error *err, struct ffs_proc_id vmm)
{
	ffs_error_set(err, ESRCH, "its VMM, process %d, has exited", (int)vmm.pid);
}

/* The driver has checked that the socket is that process's; whether the process is still the same one, only
 * its start time tells. */
static int attach_the_same(struct again *a, struct ffs_sandbox **engine, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + FFS_HELD_NS;
	int r;

	/* what was left of the daemon before, its watchdog say, may just be letting go of the VM */
	while ((r = attach(a->fs, &a->req, a->fs->give_up, engine, err)) == -EBUSY &&
		ffs_proc_alive(a->vmm) && !ffs_cancel_is_set(a->fs->give_up) && ffs_held_again(deadline))
		*err = (struct ffs_error){0};
	if (!ffs_proc_alive(a->vmm)) {
		if (!r)
			let_go(*engine);
		*err = (struct ffs_error){0};
		say_exited(err, a->vmm);
		return -ESRCH;
	}
	return r;
}

static void attach_again(struct ffs_work *w)
{
	struct again *a = ffs_container(w, struct again, work);
	struct ffs_fs *fs = a->fs;
	struct ffs_sandbox *engine = NULL;
	struct ffs_error err = {0};
	int r = attach_the_same(a, &engine, &err);

	if (!r) {
		int pidfd = (int)syscall(SYS_pidfd_open, a->vmm.pid, 0);

		if (publish(fs, NULL, &a->req, engine, pidfd)) {
			atomic_fetch_add(&fs->count.attaches, 1);
			atomic_fetch_add(&fs->count.reattached, 1);
			ffs_reaper_push(fs->reaper, NULL);
		} else {
			let_go(engine);
			if (pidfd >= 0)
				close(pidfd);
			r = ffs_error_set(&err, ESHUTDOWN, "the daemon is ending");
		}
	}
	if (r < 0) {
		lost(fs, a->req.name, &err, !may_pass(-r));
		undo(fs, a->req.sbx);
	}
	atomic_fetch_sub(&fs->count.reattaching, 1);
	pthread_mutex_lock(&fs->lock);
	ffs_request_clear(fs, &a->req);
	pthread_mutex_unlock(&fs->lock);
	free(a);
}

/* A record is a request that was admitted once; it is checked as one that comes from a client. */
static int admit_again(struct ffs_fs *fs, const char *name, struct json_object *request,
	struct ffs_request *req, struct ffs_error *err)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "attach", json_object_get(request));
	int r = ffs_request_parse(o, true, (struct ffs_span){0}, req, err);

	json_object_put(o);
	if (!r && strcmp(req->name, name) != 0)
		r = ffs_error_set(err, EINVAL, "its record is of '%s'", req->name);
	if (!r) {
		pthread_mutex_lock(&fs->lock);
		r = ffs_attach_admit(fs, req, err);
		pthread_mutex_unlock(&fs->lock);
	}
	return r;
}

static void begin_again(
	void *arg, const char *name, struct ffs_proc_id vmm, bool this_boot, struct json_object *request)
{
	struct ffs_fs *fs = arg;
	struct again *a = calloc(1, sizeof(*a));
	struct ffs_error err = {0};
	int r = a ? 0 : ffs_error_set(&err, ENOMEM, "no memory");

	if (!r && !(this_boot && ffs_proc_alive(vmm))) {
		r = -ESRCH;
		say_exited(&err, vmm);
	}
	if (!r)
		r = admit_again(fs, name, request, &a->req, &err);
	if (r < 0) {
		lost(fs, name, &err, !may_pass(-r));
		if (a)
			ffs_request_free_strings(&a->req);
		free(a);
		return;
	}
	a->fs = fs;
	a->vmm = vmm;
	a->req.pid = vmm.pid; /* so that the driver refuses a socket that is another's by now */
	a->work.fn = attach_again;
	atomic_fetch_add(&fs->count.reattaching, 1);
	ffs_pool_submit(fs->pool, &a->work);
}

void ffs_attach_again(struct ffs_fs *fs)
{
	if (fs->attached)
		ffs_attached_each(fs->attached, begin_again, fs);
}

void ffs_attach_give_up(struct ffs_fs *fs)
{
	ffs_cancel_set(fs->give_up);
}
