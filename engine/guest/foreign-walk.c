/* Looks at every other process of the machine for guest memory that it could write, as cheaply as can be: not
 * at all where the kernel's counts say that there is none (foreign-count.c); else with BPF iterators
 * (foreign-bpf.c) the kernel goes through all files, and if need be all mappings, itself. Without them it
 * takes /proc, process by process (foreign-proc.c), and passes over those that have not run since the look
 * before (foreign-known.c).
 *
 * A walk is owned by its caller and its worker threads together (refs); workers share the position in the
 * directory /proc, which the kernel locks, or have an iterator each. walk->lock protects the results. A
 * worker may hang in the kernel on another process's mmap lock, so nobody waits for one without end: the
 * caller leaves it behind, it ends when the kernel lets it. */
#include "guest/foreign-walk.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cancel.h"
#include "base/cleanup.h"
#include "base/fault.h"
#include "guest/foreign-bpf.h"
#include "guest/foreign-count.h"
#include "guest/maps.h"

#define STALL_NS FFS_NS_PER_S
#define STUCK_MAX 8u /* threads left behind by earlier walks */

struct worker {
	struct ffs_walk *w;
	unsigned number;
	int iter; /* -1: it walks /proc */
	bool mappings;
};

static atomic_uint stuck;

static void walk_unref(struct ffs_walk *w)
{
	if (atomic_fetch_sub(&w->refs, 1) != 1)
		return;
	ffs_close_fd(&w->proc);
	ffs_foreign_known_free(w->before);
	ffs_foreign_known_free(w->after);
	pthread_cond_destroy(&w->changed);
	pthread_mutex_destroy(&w->lock);
	free(w);
}

static void count_mappings(struct ffs_walk *w, const struct ffs_bpf_record *r)
{
	pthread_mutex_lock(&w->lock);
	for (unsigned i = 0; i < w->geo.n_regions; i++)
		if (w->geo.regions[i].ino == r->ino && w->geo.regions[i].dev == r->dev)
			w->shared[i] = (int32_t)r->shared;
	pthread_mutex_unlock(&w->lock);
}

static unsigned reports(struct ffs_walk *w)
{
	pthread_mutex_lock(&w->lock);
	unsigned n = w->reports;

	pthread_mutex_unlock(&w->lock);
	return n;
}

/* Nothing was found in that process. `before`: the reports when the look began; another thread's report in
 * between only costs a look at this one next time. */
static void remember(struct ffs_walk *w, const struct ffs_known_mark *mark, unsigned before)
{
	pthread_mutex_lock(&w->lock);
	if (w->reports == before)
		ffs_known_add(w->after, mark);
	pthread_mutex_unlock(&w->lock);
}

/* As ffs_walk_process(), unless the process has not run since it was looked at. */
static int look_again(struct ffs_walk *w, const char *number, pid_t pid)
{
	struct ffs_known_mark mark = {0};
	unsigned before = reports(w);

	if (w->before && (ffs_known_quiet(w->before, w->proc, pid, &mark) || (w->stale && mark.n))) {
		remember(w, &mark, before);
		atomic_fetch_add(&w->quiet, 1);
		return 0;
	}
	ffs_known_mark(w->proc, pid, &mark);
	int e = ffs_walk_process(w, number);

	if (e == 1 && mark.n)
		remember(w, &mark, before);
	return e;
}

static int look_at_process(void *arg, int dir, const char *number)
{
	const struct worker *me = arg;
	struct ffs_walk *w = me->w;
	pid_t pid = (pid_t)atoi(number);

	if (pid == w->self || pid == w->vmm.pid)
		return 0;
	atomic_store(&w->at[me->number], pid);
	int e = w->after ? look_again(w, number, pid) : ffs_walk_process(w, number);

	if (e == -EACCES || e == -EPERM) {
		pthread_mutex_lock(&w->lock);
		if (!w->unreadable++ || pid < w->first_unreadable)
			w->first_unreadable = pid;
		pthread_mutex_unlock(&w->lock);
		e = 0;
	}
	atomic_fetch_add(&w->progress, 1);
	return e < 0 ? e : 0;
}

/* What an iterator found: processes by the number of their group, threads with tables of their own too. */
static int read_iterator(const struct worker *me)
{
	struct ffs_walk *w = me->w;
	struct ffs_bpf_record rec[32];
	int n;

	while ((n = ffs_bpf_iter_read(me->iter, rec, FFS_ARRAY_LEN(rec))) > 0)
		for (int i = 0; i < n; i++) {
			const struct ffs_bpf_record *r = &rec[i];
			pid_t pid = (pid_t)r->tgid;

			if (!me->mappings)
				count_mappings(w, r);
			if (pid == w->self || pid == w->vmm.pid)
				continue;
			if (me->mappings)
				ffs_walk_mapping(w, pid, pid, r->dev, r->ino, r->start, r->end, r->offset);
			else if (r->mode & FFS_FMODE_WRITE)
				ffs_walk_descriptor(w, pid, pid, r->dev, r->ino);
		}
	return n;
}

static void *work(void *arg)
{
	struct worker me = *(struct worker *)arg;
	struct ffs_walk *w = me.w;

	free(arg);
	pthread_setname_np(pthread_self(), "ffs-foreign");
	int e = me.iter >= 0 ? read_iterator(&me) : ffs_foreign_each(w->proc, look_at_process, &me);

	ffs_close_fd(&me.iter);
	pthread_mutex_lock(&w->lock);
	atomic_store(&w->at[me.number], 0);
	if (e < 0 && !w->failure)
		w->failure = e;
	w->running--;
	if (w->abandoned)
		atomic_fetch_sub(&stuck, 1);
	pthread_cond_signal(&w->changed);
	pthread_mutex_unlock(&w->lock);
	walk_unref(w);
	return NULL;
}

static struct ffs_walk *walk_new(struct ffs_proc_id vmm, const struct ffs_geometry *geo)
{
	struct ffs_walk *w = calloc(1, sizeof(*w));

	if (!w)
		return NULL;
	atomic_init(&w->refs, 1);
	atomic_init(&w->query, FFS_FAULT("procmap-query") == 0);
	w->stale = FFS_MUTANT("stale-known");
	w->vmm = vmm;
	w->geo = *geo;
	w->self = getpid();
	for (unsigned i = 0; i < FFS_MAX_REGIONS; i++)
		w->shared[i] = -1;
	w->proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	for (unsigned i = 0; i < geo->n_regions; i++)
		w->fds |= geo->regions[i].kind == FFS_REGION_SHARED;
	pthread_mutex_init(&w->lock, NULL);
	ffs_cond_init(&w->changed);
	return w;
}

/* `iter`: of files, or of mappings; owned; -1: /proc. */
static int start_workers(struct ffs_walk *w, int iter, bool mappings)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned want = iter >= 0                       ? 1
			: cpus < 1                      ? 1
			: cpus > (long)FFS_WALK_WORKERS ? FFS_WALK_WORKERS
							: (unsigned)cpus;
	sigset_t all, old;
	int e = 0;

	ffs_signals_to_block(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	for (unsigned i = 0; i < want && e == 0; i++) {
		struct worker *me = malloc(sizeof(*me));
		pthread_t t;

		if (!me) {
			ffs_close_fd(&iter);
			e = ENOMEM;
			break;
		}
		*me = (struct worker){.w = w, .number = i, .iter = iter, .mappings = mappings};
		atomic_fetch_add(&w->refs, 1);
		pthread_mutex_lock(&w->lock);
		w->running++;
		pthread_mutex_unlock(&w->lock);
		e = pthread_create(&t, NULL, work, me);
		if (e == 0) {
			pthread_detach(t);
			continue;
		}
		pthread_mutex_lock(&w->lock);
		w->running--;
		pthread_mutex_unlock(&w->lock);
		walk_unref(w);
		ffs_close_fd(&me->iter);
		free(me);
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -e;
}

/* Until all have ended, or none of them got any further for a while. With walk->lock held. */
static void wait_for_workers(struct ffs_walk *w)
{
	uint64_t seen = atomic_load(&w->progress), deadline = ffs_now_ns() + STALL_NS;

	while (w->running) {
		if (ffs_cancel_wait(NULL, &w->changed, &w->lock, deadline) != -ETIMEDOUT)
			continue;
		if (atomic_load(&w->progress) == seen)
			break;
		seen = atomic_load(&w->progress);
		deadline = ffs_now_ns() + STALL_NS;
	}
	if (!w->running)
		return;
	w->abandoned = true;
	atomic_fetch_add(&stuck, w->running);
	for (unsigned i = 0; i < FFS_WALK_WORKERS; i++) {
		pid_t pid = atomic_load(&w->at[i]);

		if (pid)
			ffs_foreign_add(&w->found, FFS_FOREIGN_STUCK, pid,
				"could not be examined: the kernel kept its mappings locked for a second; "
				"end it, or "
				"try again");
	}
}

static void merge(struct ffs_walk *w, struct ffs_foreign *out)
{
	if (w->unreadable)
		ffs_foreign_add(&w->found, FFS_FOREIGN_UNREADABLE, w->first_unreadable,
			"may not be examined (%u such): whether it writes guest memory is not known; run the "
			"daemon "
			"with CAP_SYS_PTRACE, and outside of user namespaces",
			w->unreadable);
	out->processes = (unsigned)atomic_load(&w->progress);
	out->quiet = atomic_load(&w->quiet);
	out->dropped += w->found.dropped;
	for (unsigned i = 0; i < w->found.n; i++) {
		bool refuses = w->found.list[i].kind < FFS_FOREIGN_FIRST_HARMLESS;

		if (out->n == FFS_FOREIGN_MAX) {
			out->dropped++;
			if (!refuses || out->refusing)
				continue;
			out->n--;
		}
		out->list[out->n++] = w->found.list[i];
		out->refusing += refuses;
	}
}

/* The walk owns what is known for as long as it lasts: a thread that is left behind may still read it. */
static void take_known(struct ffs_walk *w, struct ffs_foreign_known **known)
{
	w->before = ffs_steal_ptr(known);
	w->after = ffs_known_new(w->vmm, &w->geo);
	if (!ffs_known_fits(w->before, w->vmm, &w->geo)) {
		ffs_foreign_known_free(w->before);
		w->before = NULL;
	}
}

/* With walk->lock held, after a whole pass that nobody was left behind in. */
static void give_known(struct ffs_walk *w, struct ffs_foreign_known **known)
{
	if (w->after)
		ffs_known_sort(w->after);
	*known = ffs_steal_ptr(&w->after);
}

/* One pass. `shared`: what it learned about the regions' inodes, or NULL. `known`: as for
 * ffs_foreign_scan(). */
static int walk_once(struct ffs_proc_id vmm, const struct ffs_geometry *geo, int iter, bool mappings,
	int64_t *shared, struct ffs_foreign_known **known, struct ffs_foreign *out, struct ffs_error *err)
{
	struct ffs_walk *w = walk_new(vmm, geo);

	if (!w) {
		ffs_close_fd(&iter);
		return ffs_error_set(
			err, ENOMEM, "out of memory for a look at the processes of this machine");
	}
	if (known)
		take_known(w, known);
	int e = w->proc < 0 ? -ENOENT : start_workers(w, iter, mappings);

	if (w->proc < 0)
		ffs_close_fd(&iter);
	pthread_mutex_lock(&w->lock);
	if (w->running)
		wait_for_workers(w);
	if (e == 0)
		e = w->failure;
	if (e == 0 && w->abandoned && iter >= 0)
		e = -ETIMEDOUT; /* an iterator does not say which process it hangs at; /proc does */
	if (e == 0)
		merge(w, out);
	if (e == 0 && known && !w->abandoned)
		give_known(w, known);
	if (shared)
		memcpy(shared, w->shared, sizeof(w->shared));
	pthread_mutex_unlock(&w->lock);
	walk_unref(w);
	return e == 0 ? 0 : ffs_error_errno(err, -e, "cannot look at the processes of this machine in /proc");
}

/* How many shared writable mappings of each region's inode the VMM has. */
static int own_mappings(struct ffs_proc_id vmm, const struct ffs_geometry *geo, int64_t own[FFS_MAX_REGIONS])
{
	_cleanup_free_ struct ffs_vma *list = NULL;
	unsigned n = 0;
	int e = ffs_maps_read(vmm.pid, &list, &n);

	memset(own, 0, sizeof(*own) * FFS_MAX_REGIONS);
	for (unsigned k = 0; e == 0 && k < n; k++)
		for (unsigned i = 0; list[k].shared && list[k].write && i < geo->n_regions; i++)
			own[i] += list[k].ino == geo->regions[i].ino && list[k].dev == geo->regions[i].dev;
	return e;
}

/* The kernel counts the shared mappings that may write an inode: when the VMM has as many, nobody else has
 * one, and the mappings of everybody, which are most of the work, need not be looked at. The VMM's are
 * counted before and after: it may split and join mappings meanwhile. */
static int walk_by_kernel(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign *out)
{
	int64_t before[FFS_MAX_REGIONS], after[FFS_MAX_REGIONS], shared[FFS_MAX_REGIONS];
	int iter = ffs_bpf_iter_open(geo, FFS_BPF_FILES, 0), e;
	bool all = true;

	if (iter < 0)
		return iter;
	e = own_mappings(vmm, geo, before);
	if (e < 0) {
		ffs_close_fd(&iter);
		return e;
	}
	e = walk_once(vmm, geo, iter, false, shared, NULL, out, NULL);
	if (e == 0)
		e = own_mappings(vmm, geo, after);
	if (e < 0)
		return e;
	for (unsigned i = 0; i < geo->n_regions; i++)
		all &= !geo->regions[i].ino || (shared[i] == before[i] && shared[i] == after[i]);
	if (all && !FFS_FAULT("bpf-count"))
		return 0;
	iter = ffs_bpf_iter_open(geo, FFS_BPF_WRITABLE, 0);
	return iter < 0 ? iter : walk_once(vmm, geo, iter, true, NULL, NULL, out, NULL);
}

int ffs_foreign_walk(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign_known **known,
	struct ffs_foreign *out, struct ffs_error *err)
{
	bool files = false;

	/* memory that has no file cannot be mapped by others, and writes through ptrace are trapped */
	for (unsigned i = 0; i < geo->n_regions; i++)
		files |= geo->regions[i].ino != 0;
	if (!files)
		return 0;
	if (atomic_load(&stuck) >= STUCK_MAX)
		return ffs_error_set(err, EAGAIN,
			"earlier looks at the processes of this machine still hang in the kernel: find the "
			"processes in uninterruptible sleep (ps -eo pid,stat,comm) and end what they wait "
			"for");
	if (ffs_foreign_alone(vmm, geo) == 1)
		return 0;
	int e = FFS_FAULT("look-at-all");

	if (e < 0)
		return ffs_error_errno(err, -e, "cannot look at the processes of this machine");
	return walk_by_kernel(vmm, geo, out) == 0 ? 0 : walk_once(vmm, geo, -1, false, NULL, known, out, err);
}
