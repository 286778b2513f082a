/* Takes a branch: the protocol, in the order on which everything depends.
 *
 *     pre-arm    (running)  write-protect all guest memory in slices; a fault only marks the page dirty and lets
 *                           it go
 *     converge   (running)  re-protect what was dirtied, until little is left or it stops shrinking
 *     pause                 the VMM's own stop: vCPUs stopped, device I/O drained
 *     vmstate    (paused)   saving device state may itself write guest memory, so it comes before
 *     arm        (paused)   re-protect what was dirtied since: only now does the branch's instant exist
 *     disks      (paused)   clone the disks that were named at attach: the VMM's I/O is drained, its caches are
 *                           flushed
 *     resume                guest first: whatever failed above
 *     capture    (running)  the tracker's threads
 *
 * A branch of mode full or diff is copied (stopped.c) where a live one is armed.
 *
 * Runs in the caller's thread, which owns sb->busy, so nobody else uses the driver or replaces the tracker.
 * Holds no mutex while it waits for the VMM. */
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/fault.h"
#include "base/log.h"
#include "branch/internal.h"
#include "branch/sandbox.h"
#include "branch/stopped.h"
#include "branch/sweep.h"
#include "uffd/uffd.h"

#define RESUME_TRIES 5u

struct take {
	struct ffs_sandbox *sb;
	struct ffs_tracker *t;
	struct ffs_branch *b;
	struct ffs_cancel *cancel;
	uint64_t deadline_ns;
	uint32_t removes; /* seen when the sweep began */
	bool was_running, armed;
	bool with_disks;
	bool permit; /* to be given back; else it is the branch's */
};

static struct ffs_sweep sweep_of(const struct take *k)
{
	return (struct ffs_sweep){
		.t = k->t, .sandbox = k->sb->name, .cancel = k->cancel, .deadline_ns = k->deadline_ns};
}

static int stop_asked(const struct take *k, struct ffs_error *err)
{
	const struct ffs_sweep s = sweep_of(k);

	return ffs_sweep_stop_asked(&s, err);
}

static int sweep(const struct take *k, bool paused, uint64_t *swept, struct ffs_error *err)
{
	const struct ffs_sweep s = sweep_of(k);

	return ffs_sweep(&s, paused, swept, err);
}

static int prearm_and_converge(const struct take *k, struct ffs_error *err)
{
	const struct ffs_sweep s = sweep_of(k);

	return ffs_sweep_prearm(&s, k->was_running, &k->b->phases, err);
}

/* The instant. The slot is filled between two sweeps: the first leaves nothing writable; a write that comes
 * before the slot is filled marks its page dirty and the second protects it again, one that comes after is
 * captured. */
static int arm(struct take *k, struct ffs_error *err)
{
	uint64_t start = ffs_now_ns(), swept, late;
	int e = sweep(k, true, &swept, err);

	if (e < 0)
		return e;
	k->b->instant_wall_ns = ffs_wall_ns();
	k->b->armed_ns = ffs_now_ns();
	ffs_branch_get(k->b); /* the slot's reference */
	pthread_mutex_lock(&k->t->lock);
	k->t->in_flight++;
	pthread_mutex_unlock(&k->t->lock);
	atomic_store(&k->t->slots[k->b->slot].branch, k->b);
	k->armed = true;
	e = sweep(k, true, &late, err);
	if (e == 0)
		e = FFS_FAULT("pause-armed");
	if (e < 0)
		return ffs_error_errno(err, -e, "cannot arm the branch of %s", k->sb->name);
	k->b->phases.dirty_at_pause = swept + late;
	k->b->phases.arm_ns = ffs_now_ns() - start;
	return 0;
}

/* The instant of a branch for which the guest stays stopped, up to its last byte. Protected first where
 * tracking wants to know what is written from now on. */
static int copy_stopped(struct take *k, struct ffs_error *err)
{
	uint64_t start = ffs_now_ns(), swept = 0;
	int e = k->t->track ? sweep(k, true, &swept, err) : 0;

	if (e < 0)
		return e;
	ffs_priority_self(0); /* what comes takes long, and nobody waits for us with real-time priority */
	ffs_priority_return_vcpus(&k->t->wd->lent); /* somebody else may resume the guest meanwhile */
	k->b->instant_wall_ns = ffs_wall_ns();
	k->b->armed_ns = ffs_now_ns();
	k->b->phases.dirty_at_pause = swept;
	k->b->phases.arm_ns = k->b->armed_ns - start;
	ffs_lineage_inherit(k->t, k->b);
	return ffs_stopped_capture(k->t, k->b, k->cancel, k->deadline_ns, err);
}

/* After arm, guest stopped: QEMU's stop returns when its block layer is drained and flushed (do_vm_stop:
 * bdrv_drain_all, bdrv_flush_all), so the files hold every write that the guest was told is done, and no
 * other comes. */
static int capture_disks(struct take *k, struct ffs_error *err)
{
	uint64_t start = ffs_now_ns();
	int e = ffs_disk_images_capture(k->sb->disks, &k->b->disks, k->sb->vmm->beat, k->sb->vmm->beat_arg,
		start + FFS_PAUSE_LIMIT_NS, err);

	k->b->phases.disks_ns = ffs_now_ns() - start;
	return e;
}

static int resume_guest(struct take *k, struct ffs_error *err)
{
	struct ffs_vmm *vmm = k->sb->vmm;
	int e = 0;

	for (unsigned i = 0; i < RESUME_TRIES; i++) {
		struct ffs_error why = {0};

		e = vmm->ops->resume(vmm, ffs_now_ns() + FFS_PAUSE_LIMIT_NS, &why);
		if (e == 0) {
			atomic_store(&k->t->wd->pausing, 0);
			return 0;
		}
		ffs_log(FFS_LOG_ERROR, "%s: cannot resume the guest (try %u): %s", k->sb->name, i + 1,
			why.text);
		if (e == -ESRCH || ffs_sandbox_gone(k->sb)) {
			atomic_store(&k->t->wd->pausing, 0);
			return ffs_error_set(
				err, ESRCH, "the VMM of %s exited during the pause", k->sb->name);
		}
	}
	/* `pausing` stays set and its beat stands still: within 500 ms the watchdog revokes and resumes on
	 * its own */
	return ffs_error_set(err, EIO,
		"the guest of %s could not be resumed through its VMM: tell it to continue by hand",
		k->sb->name);
}

/* Between pause and resume. Whatever fails, the guest runs when this returns (if it ran before). */
static int pause_and_arm(struct take *k, struct ffs_error *err)
{
	struct ffs_vmm *vmm = k->sb->vmm;
	struct ffs_phases *ph = &k->b->phases;
	uint64_t start = ffs_now_ns(), t0 = start;
	int e = 0;

	ffs_priority_find(&k->t->wd->lent, k->t->proc.pid);
	ffs_copier_hold(k->t, true);
	if (FFS_MUTANT("arm-before-pause") && k->b->mode == FFS_BRANCH_LIVE)
		e = arm(k, err);
	if (e == 0 && k->was_running) {
		atomic_store(&k->t->wd->pausing, 1); /* before the stop: who finds it set asks the VMM */
		atomic_fetch_add(&k->t->wd->pause_beat, 1);
		ffs_watchdog_poke(k->t->watchdog);
		ph->priority_lent = ffs_priority_self(1) && ffs_priority_lend(&k->t->wd->lent);
		t0 = ffs_now_ns();
		e = vmm->ops->pause(vmm, t0 + FFS_PAUSE_LIMIT_NS, err);
		if (e < 0) /* they may run */
			ffs_priority_return_vcpus(&k->t->wd->lent);
		ph->stop_ns = ffs_now_ns() - t0;
	}
	if (e == 0) {
		uint64_t t1 = ffs_now_ns();

		e = vmm->ops->save(vmm, t1 + FFS_PAUSE_LIMIT_NS, err);
		ph->vmstate_ns = ffs_now_ns() - t1;
	}
	bool live = k->b->mode == FFS_BRANCH_LIVE;

	if (e == 0 && !live)
		e = copy_stopped(k, err);
	else if (e == 0 && !k->armed && !FFS_MUTANT("arm-after-resume"))
		e = arm(k, err);
	if (e == 0 && k->with_disks && !FFS_MUTANT("disks-after-resume"))
		e = capture_disks(k, err);
	/* on every path: undoes our own stop, and only looks where the VM was found stopped */
	uint64_t t2 = ffs_now_ns();
	struct ffs_error why = {0};

	ffs_priority_return_vcpus(&k->t->wd->lent);
	int r = resume_guest(k, &why);

	if (k->was_running) {
		ph->resume_ns = ffs_now_ns() - t2;
		ph->pause_ns = ffs_now_ns() - t0;
	}
	ffs_priority_return(&k->t->wd->lent);
	ffs_priority_self(0);
	if (r < 0 && e == 0)
		e = ffs_error_set(err, why.code, "%s", why.text);
	if (e == 0 && live && !k->armed)
		e = arm(k, err);
	if (e == 0 && k->with_disks && FFS_MUTANT("disks-after-resume"))
		e = capture_disks(k, err);
	/* A stopped daemon may have been overtaken: then the guest ran before it was armed, or since. Asked first,
	 * as the VMM takes the watchdog for somebody else. */
	if (e == 0 && ffs_tracker_revoked(k->t))
		e = ffs_error_set(err, ETIMEDOUT,
			"the watchdog resumed %s: the daemon did not move for 500 ms during the pause",
			k->sb->name);
	if (e == 0 && vmm->resumed_by_others)
		e = ffs_error_set(err, EAGAIN,
			"somebody else resumed %s while the branch was taken: its memory and vmstate are of "
			"different instants; try "
			"again",
			k->sb->name);
	if (e == 0 && atomic_load(&k->t->removes) != k->removes)
		e = ffs_error_set(err, EAGAIN,
			"the VMM of %s discarded or remapped guest memory while the branch was taken "
			"(balloon, hot-plug): try again",
			k->sb->name);
	return e;
}

static int collect_vmstate(struct take *k, struct ffs_error *err)
{
	struct stat st;

	if (fstat(k->b->vmstate_fd, &st) < 0)
		return ffs_error_errno(err, errno, "cannot size the vmstate of %s", k->sb->name);
	if (st.st_size == 0)
		return ffs_error_set(err, EIO, "the VMM of %s saved an empty vmstate", k->sb->name);
	k->b->vmstate_size = (uint64_t)st.st_size;
	if (fcntl(k->b->vmstate_fd, F_ADD_SEALS,
		    F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) < 0)
		return ffs_error_errno(err, errno, "cannot seal the vmstate of %s", k->sb->name);
	k->b->vmm = json_object_new_object();
	if (!k->b->vmm)
		return ffs_error_set(err, ENOMEM, "out of memory for the description of %s", k->sb->name);
	k->sb->vmm->ops->describe(k->sb->vmm, k->b->vmm);
	return 0;
}

static int reserve_slot(struct take *k, unsigned *slot, struct ffs_error *err)
{
	struct ffs_tracker *t = k->t;
	int r = 0;

	pthread_mutex_lock(&t->lock);
	for (;;) {
		for (unsigned i = 0; i < FFS_SLOTS; i++)
			if (!t->slots[i].reserved) {
				t->slots[i].reserved = true;
				*slot = i;
				pthread_mutex_unlock(&t->lock);
				return 0;
			}
		if (r < 0)
			break;
		r = ffs_cancel_wait(k->cancel, &t->changed, &t->lock, k->deadline_ns);
	}
	pthread_mutex_unlock(&t->lock);
	if (r == -EINTR)
		return ffs_error_set(err, EINTR, "interrupted while %u other branches of %s are captured",
			FFS_SLOTS, k->sb->name);
	return ffs_error_set(err, EAGAIN, "%u branches of %s are being captured: try again when one is ready",
		FFS_SLOTS, k->sb->name);
}

static void free_slot(struct ffs_tracker *t, unsigned slot)
{
	pthread_mutex_lock(&t->lock);
	t->slots[slot].reserved = false;
	pthread_cond_broadcast(&t->changed);
	pthread_mutex_unlock(&t->lock);
}

/* Guest running: everything that would make the disks impossible is refused here. */
static int prepare_disks(struct take *k, struct ffs_error *err)
{
	struct ffs_disks *d = k->sb->disks;
	int e = ffs_disks_check(d, k->sb->proc.pid, err);

	if (e == 0)
		e = ffs_disk_images_prepare(d, &k->b->disks, err);
	return e == 0 ? ffs_disks_flush(d, k->cancel, k->deadline_ns, &k->b->disks, err) : e;
}

/* The protocol on a tracker that is known to be good, with a slot reserved. */
static int run_protocol(struct take *k, struct ffs_error *err)
{
	struct ffs_vmm *vmm = k->sb->vmm;
	int e = vmm->ops->prepare(vmm, k->b->vmstate_fd, &k->was_running, err);

	if (e == 0)
		e = ffs_tracker_follow_socket(k->t, vmm, err);
	if (e < 0) {
		vmm->ops->finish(vmm);
		return e;
	}
	atomic_store(&k->t->taking, 1);
	k->removes = atomic_load(&k->t->removes);
	bool live = k->b->mode == FFS_BRANCH_LIVE;

	/* without tracking a stopped guest needs no protection: the branch owes nothing to it */
	if (live || k->t->track)
		e = ffs_tracker_register(k->t, err);
	if (e == 0 && (live || k->t->track) && !FFS_ALTERNATIVE("arm-in-pause"))
		e = prearm_and_converge(k, err);
	if (e == 0)
		e = stop_asked(k, err);
	if (e == 0)
		e = pause_and_arm(k, err);
	vmm->ops->finish(vmm);
	struct ffs_error lost = {0};

	/* resume may have connected anew; without the watchdog's duplicate this branch is still right */
	if (ffs_tracker_follow_socket(k->t, vmm, &lost) < 0)
		ffs_log(FFS_LOG_WARN, "%s: %s", k->sb->name, lost.text);
	/* also a live branch, which is whole so far: its copiers have not begun */
	if (e == 0 && live)
		ffs_lineage_inherit(k->t, k->b);
	if (e == 0)
		e = collect_vmstate(k, err);
	if (e == 0 && k->with_disks)
		e = ffs_disk_images_seal(&k->b->disks, err);
	if (e == 0 && !live)
		e = ffs_stopped_settle(k->t, k->b, err);
	if (e == 0)
		ffs_lineage_taken(k->t, k->b);
	if (e < 0 && k->armed)
		ffs_branch_fail(
			k->b, -e, "%s", err && err->text[0] ? err->text : "the branch could not be taken");
	atomic_store(&k->t->taking, 0);
	ffs_copier_hold(k->t, false); /* the copiers start, or settle the failed one */
	return e;
}

/* Before anything is done to the VM, and with nothing of it held. */
static int take_permit(struct take *k, const char *name, struct ffs_error *err)
{
	struct ffs_permits *p = k->sb->engine->permits;
	unsigned limit;
	int r = ffs_permits_take(p, &k->sb->permits, name, k->cancel, k->deadline_ns);

	k->permit = r == 0;
	ffs_permits_count(p, &limit, NULL, NULL);
	if (r == -EINTR)
		ffs_error_set(err, EINTR, "interrupted while waiting for a permit to capture");
	else if (r < 0)
		ffs_error_set(err, EAGAIN,
			"%u captures are under way, which is the most at once (mount option captures=), and "
			"the turn of %s has "
			"not come: try again",
			limit, k->sb->name);
	return r;
}

/* What the mode asks for beyond what every branch needs. */
static int prepare_mode(struct take *k, struct ffs_error *err)
{
	int e = ffs_lineage_begin(k->t, k->b, err);

	if (e < 0 || k->b->mode != FFS_BRANCH_DIFF || k->b->has_parent)
		return e;
	if (!k->t->track)
		return ffs_error_set(err, ENOTSUP,
			"%s is not tracked, so nobody knows what changed: attach it with track to take a "
			"diff",
			k->sb->name);
	if (k->b->heir)
		return ffs_error_set(err, EAGAIN,
			"the first branch of %s that a diff could build on is still being captured: wait "
			"until it is ready",
			k->sb->name);
	return ffs_error_set(err, ENOENT,
		"%s has no branch that a diff could build on (named, ready, not removed, taken since it was "
		"attached): take a live or full one first",
		k->sb->name);
}

int ffs_branch_take(struct ffs_sandbox *sb, const struct ffs_branch_options *opt, struct ffs_cancel *cancel,
	struct ffs_branch **out, struct ffs_error *err)
{
	struct ffs_error own = {0}; /* the text is needed inside, whether the caller wants it or not */
	struct take k = {.sb = sb, .cancel = cancel};
	unsigned slot = 0;

	if (!err)
		err = &own;
	k.deadline_ns = ffs_now_ns() + (opt->timeout_ns ? opt->timeout_ns : 30 * FFS_NS_PER_S);
	int e = take_permit(&k, opt->name, err);

	if (e < 0)
		return e;
	e = ffs_sandbox_begin(sb, cancel, k.deadline_ns, err);
	if (e < 0) {
		ffs_permits_give(sb->engine->permits);
		return e;
	}
	e = ffs_sandbox_ready_tracker(sb, &k.t, err);
	if (e < 0)
		goto out;
	bool live = opt->mode == FFS_BRANCH_LIVE;

	e = live ? reserve_slot(&k, &slot, err) : 0;
	if (e < 0)
		goto out;
	k.b = ffs_branch_new(sb, k.t, opt->name, err);
	if (!k.b) {
		if (live)
			free_slot(k.t, slot);
		e = -err->code;
		goto out;
	}
	k.b->slot = slot;
	k.b->permits = ffs_permits_ref(sb->engine->permits);
	k.permit = false;
	k.b->mode = opt->mode;
	k.b->max_rate = opt->max_rate;
	e = prepare_mode(&k, err);
	if (e == 0)
		e = ffs_sandbox_scan(sb, opt->force, &k.b->phases.scan_ns, &k.b->torn, err);
	k.with_disks = sb->disks && !opt->without_disks;
	if (e == 0 && k.with_disks)
		e = prepare_disks(&k, err);
	if (e == 0)
		e = run_protocol(&k, err);
	if (e < 0) {
		if (live && !k.armed)
			free_slot(k.t, slot); /* else the copier that settles it does */
		ffs_branch_unref(k.b);
		ffs_tracker_release_idle(k.t);
	} else {
		/* a live one's copier does that; what an earlier release could not let go must not wait for
		 * the next */
		if (!live)
			ffs_tracker_release_idle(k.t);
		ffs_sandbox_count(sb, k.b);
		*out = k.b;
	}
out:
	if (k.permit)
		ffs_permits_give(sb->engine->permits);
	ffs_sandbox_end(sb);
	ffs_tracker_unref(k.t);
	return e;
}
