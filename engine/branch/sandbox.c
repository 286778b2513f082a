/* Owns struct ffs_sandbox: an attached VM, who may use its driver now, and which tracker is current.
 *
 * Threads: any. Locks: sb->lock for the fields; never held while the VMM is asked something (the `busy` flag
 * is what excludes). engine->lock before sb->lock. */
#include <errno.h>
#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/log.h"
#include "branch/internal.h"
#include "branch/sandbox.h"
#include "guest/foreign.h"

const char *ffs_run_state_name(enum ffs_run_state s)
{
	return s == FFS_RUN_RUNNING ? "running" : s == FFS_RUN_PAUSED ? "paused" : "exited";
}

int ffs_sandbox_begin(
	struct ffs_sandbox *sb, struct ffs_cancel *cancel, uint64_t deadline_ns, struct ffs_error *err)
{
	int r = 0;

	pthread_mutex_lock(&sb->lock);
	while (sb->busy && !sb->detached && r == 0)
		r = ffs_cancel_wait(cancel, &sb->idle, &sb->lock, deadline_ns);
	bool mine = !sb->busy && !sb->detached;

	if (mine)
		sb->busy = true;
	bool detached = sb->detached;

	pthread_mutex_unlock(&sb->lock);
	if (mine)
		return 0;
	if (detached)
		return ffs_error_set(err, ESRCH, "sandbox %s is detached", sb->name);
	if (r == -EINTR)
		return ffs_error_set(err, EINTR, "interrupted while another branch of %s is taken", sb->name);
	return ffs_error_set(err, EAGAIN, "another branch of %s is being taken: try again", sb->name);
}

void ffs_sandbox_end(struct ffs_sandbox *sb)
{
	pthread_mutex_lock(&sb->lock);
	sb->busy = false;
	pthread_cond_broadcast(&sb->idle);
	pthread_mutex_unlock(&sb->lock);
}

bool ffs_sandbox_gone(struct ffs_sandbox *sb)
{
	return !ffs_proc_alive(sb->proc);
}

static void beat(void *arg)
{
	struct ffs_wd_slot *wd = arg;

	atomic_fetch_add_explicit(&wd->pause_beat, 1, memory_order_relaxed);
}

/* While busy. */
static int new_tracker(struct ffs_sandbox *sb, struct ffs_error *err)
{
	struct ffs_tracker *t = NULL;
	struct ffs_geometry *geo = malloc(sizeof(*geo));

	if (!geo)
		return ffs_error_set(err, ENOMEM, "out of memory for the geometry of %s", sb->name);
	int e = sb->vmm->ops->geometry(sb->vmm, geo, err);

	for (unsigned i = 0; e == 0 && i < geo->n_regions; i++) {
		const struct ffs_region *r = &geo->regions[i];

		if (r->page_size > 2u << 20)
			e = ffs_error_set(err, ENOTSUP,
				"region %s of %s uses %llu MiB pages, which a guest's write would have to "
				"wait for: use 2 MiB pages",
				r->name, sb->name, (unsigned long long)r->page_size >> 20);
		else if (r->mergeable && r->kind != FFS_REGION_SHARED)
			/* KSM drops the write protection without a word */
			e = ffs_inject_madvise(sb->engine->spawner, sb->vmm->proc, r->hva, r->size,
				13 /* MADV_UNMERGEABLE */, 5 * FFS_NS_PER_S, err);
	}
	if (e == 0)
		e = ffs_tracker_new(sb->engine, sb->vmm, geo, sb->track, &t, err);
	if (e == 0) {
		sb->vmm->beat_arg = t->wd;
		sb->vmm->beat = beat;
		pthread_mutex_lock(&sb->lock);
		sb->tracker = t;
		sb->geo = *geo;
		pthread_mutex_unlock(&sb->lock);
	}
	free(geo);
	return e;
}

/* While busy. A take that could not resume the guest has left `pausing` set, for the watchdog to act on. Who
 * comes before it did must not take the guest for one that its owner has paused, nor make the watchdog forget
 * it. */
static int settle_pause(struct ffs_sandbox *sb, struct ffs_error *err)
{
	struct ffs_tracker *t = sb->tracker;

	if (!t || !atomic_load(&t->wd->pausing) || ffs_tracker_revoked(t))
		return 0;
	int e = sb->vmm->ops->resume(sb->vmm, ffs_now_ns() + FFS_PAUSE_LIMIT_NS, err);

	if (e == 0 || ffs_sandbox_gone(sb)) {
		atomic_store(&t->wd->pausing, 0);
		return 0;
	}
	return e;
}

/* While busy. */
static void drop_tracker(struct ffs_sandbox *sb, const struct ffs_error *reason)
{
	struct ffs_error why = {0};

	if (settle_pause(sb, &why) < 0)
		ffs_log(FFS_LOG_ERROR, "%s: cannot resume the guest, tell it to continue by hand: %s",
			sb->name, why.text);
	pthread_mutex_lock(&sb->lock);
	struct ffs_tracker *t = ffs_steal_ptr(&sb->tracker);

	pthread_mutex_unlock(&sb->lock);
	if (!t)
		return;
	sb->vmm->beat = NULL; /* its argument goes with the slot */
	ffs_tracker_end(t, reason);
	ffs_tracker_unref(t);
}

int ffs_sandbox_ready_tracker(struct ffs_sandbox *sb, struct ffs_tracker **out, struct ffs_error *err)
{
	struct ffs_error why = {0};

	if (ffs_sandbox_gone(sb))
		return ffs_error_set(
			err, ESRCH, "the VMM of %s (pid %d) has exited", sb->name, (int)sb->proc.pid);
	int owed = settle_pause(sb, err);

	if (owed < 0)
		return owed;
	if (sb->tracker && ffs_tracker_revoked(sb->tracker)) {
		ffs_error_set(&why, ETIMEDOUT, "the watchdog let the guest of %s go", sb->name);
		atomic_store(&sb->vmm->suspect, true); /* the watchdog may have talked over its duplicate */
		drop_tracker(sb, &why);
	} else if (sb->tracker && ffs_memory_check(sb->tracker->memory, &why) < 0) {
		ffs_log(FFS_LOG_INFO, "%s: guest memory changed shape: %s", sb->name, why.text);
		drop_tracker(sb, &why);
	}
	if (!sb->tracker) {
		int e = new_tracker(sb, err);

		if (e < 0)
			return e;
	}
	*out = ffs_tracker_ref(sb->tracker);
	return 0;
}

void ffs_sandbox_count(struct ffs_sandbox *sb, struct ffs_branch *b)
{
	pthread_mutex_lock(&b->lock); /* the copier that settles it writes capture_ns */
	struct ffs_phases phases = b->phases;

	pthread_mutex_unlock(&b->lock);
	pthread_mutex_lock(&sb->lock);
	sb->branches_taken++;
	sb->last = phases;
	pthread_mutex_unlock(&sb->lock);
}

/* ---- attach and detach ---- */

static void sandbox_free(struct ffs_sandbox *sb)
{
	if (sb->vmm)
		sb->vmm->ops->close(sb->vmm);
	ffs_disks_free(sb->disks);
	json_object_put(sb->vmm_desc);
	json_object_put(sb->findings);
	ffs_foreign_known_free(sb->known);
	pthread_cond_destroy(&sb->idle);
	pthread_mutex_destroy(&sb->lock);
	free(sb->name);
	free(sb);
}

/* Put it on the engine's list unless its name or its VM is there already. */
static int enlist(struct ffs_engine *engine, struct ffs_sandbox *sb, struct ffs_error *err)
{
	int e = 0;

	pthread_mutex_lock(&engine->lock);
	for (struct ffs_sandbox *o = engine->sandboxes; o && e == 0; o = o->next) {
		if (strcmp(o->name, sb->name) == 0)
			e = ffs_error_set(err, EEXIST,
				"a sandbox named %s is attached already: detach it or use another name",
				sb->name);
		else if (o->proc.pid == sb->proc.pid && o->proc.start == sb->proc.start)
			e = ffs_error_set(err, EEXIST, "process %d is attached already, as %s",
				(int)sb->proc.pid, o->name);
	}
	if (e == 0) {
		sb->next = engine->sandboxes;
		engine->sandboxes = sb;
	}
	pthread_mutex_unlock(&engine->lock);
	return e;
}

static void delist(struct ffs_engine *engine, struct ffs_sandbox *sb)
{
	pthread_mutex_lock(&engine->lock);
	for (struct ffs_sandbox **p = &engine->sandboxes; *p; p = &(*p)->next)
		if (*p == sb) {
			*p = sb->next;
			break;
		}
	pthread_mutex_unlock(&engine->lock);
}

static int check_not_attached(
	struct ffs_engine *engine, const struct ffs_attach_options *opt, struct ffs_error *err)
{
	int e = 0;

	pthread_mutex_lock(&engine->lock);
	for (struct ffs_sandbox *o = engine->sandboxes; o && e == 0; o = o->next) {
		if (strcmp(o->name, opt->name) == 0)
			e = ffs_error_set(err, EEXIST,
				"a sandbox named %s is attached already: detach it or use another name",
				opt->name);
		else if (opt->pid && o->proc.pid == opt->pid && ffs_proc_alive(o->proc))
			e = ffs_error_set(
				err, EEXIST, "process %d is attached already, as %s", (int)opt->pid, o->name);
	}
	pthread_mutex_unlock(&engine->lock);
	return e;
}

int ffs_sandbox_attach(struct ffs_engine *engine, const struct ffs_attach_options *opt,
	struct ffs_cancel *cancel, struct ffs_sandbox **out, struct ffs_error *err)
{
	if (!!opt->coop_socket + !!opt->qemu_socket + !!opt->firecracker_socket > 1)
		return ffs_error_set(
			err, EINVAL, "attach %s: name one control socket of the VMM, not two", opt->name);
	if (opt->coop_socket)
		return ffs_sandbox_attach_driver(engine, &ffs_coop_ops, opt, cancel, out, err);
	if (opt->firecracker_socket)
		return ffs_sandbox_attach_driver(engine, &ffs_firecracker_ops, opt, cancel, out, err);
	if (opt->pid <= 0 && !opt->qemu_socket)
		return ffs_error_set(
			err, EINVAL, "attach %s: name the VMM by its pid or its control socket", opt->name);
	return ffs_sandbox_attach_driver(engine, &ffs_qemu_ops, opt, cancel, out, err);
}

int ffs_sandbox_attach_driver(struct ffs_engine *engine, const struct ffs_vmm_ops *ops,
	const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_sandbox **out,
	struct ffs_error *err)
{
	int e = ffs_check_name("sandbox", opt->name, err);

	/* before connecting: a second connection to a QMP socket that we hold ourselves would only say "busy"
	 */
	if (e == 0)
		e = check_not_attached(engine, opt, err);
	if (e < 0)
		return e;
	struct ffs_sandbox *sb = calloc(1, sizeof(*sb));

	if (!sb || !(sb->name = strdup(opt->name))) {
		free(sb);
		return ffs_error_set(err, ENOMEM, "out of memory for sandbox %s", opt->name);
	}
	atomic_init(&sb->refs, 1);
	sb->engine = engine;
	sb->vmm_kind = ops->kind;
	sb->track = opt->track;
	sb->force = opt->force;
	sb->busy = true;
	pthread_mutex_init(&sb->lock, NULL);
	ffs_cond_init(&sb->idle);
	e = ops->connect(opt, cancel, &sb->vmm, err);
	if (e == 0) {
		sb->proc = sb->vmm->proc;
		e = FFS_FAULT("attach");
		if (e < 0)
			ffs_error_errno(err, -e, "cannot attach %s", opt->name);
	}
	if (e == 0)
		e = ffs_disks_open(sb->proc.pid, opt->disks, opt->n_disks, opt->own_mount, &sb->disks, err);
	if (e == 0)
		e = enlist(engine, sb, err);
	if (e < 0) {
		sandbox_free(sb);
		return e;
	}
	e = new_tracker(sb, err);
	if (e == 0 && (e = ffs_sandbox_scan(sb, false, NULL, NULL, err)) < 0)
		drop_tracker(sb, &(struct ffs_error){.code = -e});
	if (e < 0) {
		delist(engine, sb);
		sandbox_free(sb);
		return e;
	}
	sb->vmm_desc = json_object_new_object();
	if (sb->vmm_desc)
		sb->vmm->ops->describe(sb->vmm, sb->vmm_desc);
	ffs_sandbox_end(sb);
	ffs_log(FFS_LOG_INFO, "attached %s: %s, pid %d, %llu MiB", sb->name, sb->vmm->ops->kind,
		(int)sb->vmm->proc.pid, (unsigned long long)sb->geo.memory_size >> 20);
	*out = sb;
	return 0;
}

void ffs_sandbox_detach(struct ffs_sandbox *sb)
{
	struct ffs_error why = {0};

	ffs_error_set(&why, ECANCELED, "sandbox %s was detached while the branch was captured", sb->name);
	pthread_mutex_lock(&sb->lock);
	bool first = !sb->detached;

	sb->detached = true; /* nobody begins any more; who is at it ends */
	pthread_cond_broadcast(&sb->idle);
	while (sb->busy)
		pthread_cond_wait(&sb->idle, &sb->lock);
	sb->busy = true;
	pthread_mutex_unlock(&sb->lock);
	if (first) {
		drop_tracker(sb, &why);
		delist(sb->engine, sb);
		pthread_mutex_lock(&sb->lock);
		struct ffs_vmm *vmm = ffs_steal_ptr(&sb->vmm);

		pthread_mutex_unlock(&sb->lock);
		if (vmm)
			vmm->ops->close(vmm); /* its control socket is free for others when this returns */
		ffs_log(FFS_LOG_INFO, "detached %s", sb->name);
	}
	ffs_sandbox_end(sb);
}

struct ffs_sandbox *ffs_sandbox_ref(struct ffs_sandbox *sb)
{
	atomic_fetch_add_explicit(&sb->refs, 1, memory_order_relaxed);
	return sb;
}

bool ffs_sandbox_tryref(struct ffs_sandbox *sb)
{
	unsigned n = atomic_load(&sb->refs);

	while (n)
		if (atomic_compare_exchange_weak(&sb->refs, &n, n + 1))
			return true;
	return false;
}

void ffs_sandbox_unref(struct ffs_sandbox *sb)
{
	if (!sb || atomic_fetch_sub_explicit(&sb->refs, 1, memory_order_acq_rel) != 1)
		return;
	ffs_sandbox_detach(sb);
	sandbox_free(sb);
}

const char *ffs_sandbox_name(const struct ffs_sandbox *sb)
{
	return sb->name;
}

pid_t ffs_sandbox_pid(const struct ffs_sandbox *sb)
{
	return sb->proc.pid;
}

uint64_t ffs_sandbox_memory_size(const struct ffs_sandbox *sb)
{
	return sb->geo.memory_size;
}

enum ffs_run_state ffs_sandbox_state(struct ffs_sandbox *sb)
{
	enum ffs_run_state state = FFS_RUN_RUNNING;

	if (ffs_sandbox_gone(sb))
		return FFS_RUN_EXITED;
	pthread_mutex_lock(&sb->lock); /* a detach takes the driver away */
	if (sb->vmm)
		state = sb->vmm->ops->run_state(sb->vmm);
	pthread_mutex_unlock(&sb->lock);
	return state;
}
