/* Owns the daemon's side of the watchdog: its process, the shared page of counters, and who has which slot.
 *
 * Threads: any. Locks: wd->lock guards the table of slots only and is never held across a call of the
 * watchdog, so a slow answer for one sandbox delays no other. add, replace and remove wait for the watchdog;
 * poke never does. */
#include "uffd/watchdog.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "uffd/helper.h"
#include "uffd/watchdog-process.h"

#define ANSWER_NS (5 * FFS_NS_PER_S)
/* A removal may have to wait for a rescue, which has 10 s and an alarm at 12. */
#define REMOVE_NS (15 * FFS_NS_PER_S)

struct ffs_watchdog {
	pid_t pid;
	int sock, event;
	struct ffs_wd_shared *shared;
	pthread_mutex_t lock;
	bool used[FFS_WD_SLOTS];
	int (*rescue[FFS_WD_SLOTS])(int sock, uint64_t deadline_ns);
};

static int ask(struct ffs_watchdog *wd, const struct ffs_wd_request *q, const int *fds, unsigned n_fds,
	uint64_t timeout_ns, struct ffs_wd_reply *reply)
{
	int r = ffs_helper_call(
		wd->sock, q, sizeof(*q), fds, n_fds, ffs_now_ns() + timeout_ns, reply, sizeof(*reply), NULL);

	return r ? r : reply->code;
}

int ffs_watchdog_start(struct ffs_watchdog **out, struct ffs_error *err)
{
	static const char what[] = "cannot start the watchdog";
	int r = FFS_FAULT("watchdog-start");
	_cleanup_free_ struct ffs_watchdog *wd = calloc(1, sizeof(*wd));
	_cleanup_free_ struct ffs_wd_request *hello = calloc(1, sizeof(*hello));
	struct ffs_wd_reply reply;

	if (r || !wd || !hello)
		return ffs_error_errno(err, r ? -r : ENOMEM, what);
	_cleanup_close_ int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	if (event < 0)
		return ffs_error_errno(err, errno, what);
	wd->shared =
		mmap(NULL, sizeof(*wd->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (wd->shared == MAP_FAILED)
		return ffs_error_errno(err, errno, what);

	hello->op = FFS_WD_HELLO;
	r = ffs_helper_fork("forkfs-wd", ffs_watchdog_body, wd->shared, &wd->pid, &wd->sock, err);
	if (!r) {
		r = ask(wd, hello, &event, 1, ANSWER_NS, &reply);
		if (r) {
			r = ffs_error_errno(err, -r, what);
			ffs_helper_end(wd->pid, &wd->sock);
		}
	}
	if (r) {
		munmap(wd->shared, sizeof(*wd->shared));
		return r;
	}
	if (!reply.locked || !reply.oom_protected)
		ffs_log(FFS_LOG_INFO, "the watchdog runs without %s%s%s",
			reply.locked ? "" : "locked memory (CAP_IPC_LOCK)",
			reply.locked || reply.oom_protected ? "" : " and without ",
			reply.oom_protected ? "" : "protection from the OOM killer (CAP_SYS_RESOURCE)");
	pthread_mutex_init(&wd->lock, NULL);
	wd->event = ffs_steal_fd(&event);
	*out = ffs_steal_ptr(&wd);
	return 0;
}

void ffs_watchdog_stop(struct ffs_watchdog *wd)
{
	if (!wd)
		return;
	ffs_helper_end(wd->pid, &wd->sock);
	ffs_close_fd(&wd->event);
	munmap(wd->shared, sizeof(*wd->shared));
	pthread_mutex_destroy(&wd->lock);
	free(wd);
}

/* The VMM's ranges and duplicates, given to slot `index` by ADD or REPLACE. */
static int hand_over(struct ffs_watchdog *wd, uint32_t op, unsigned index, int uffd, int sock,
	const struct ffs_geometry *geo, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_wd_request *q = calloc(1, sizeof(*q));
	struct ffs_wd_reply reply;
	const int fds[2] = {uffd, sock};
	int flags = fcntl(uffd, F_GETFL);

	if (!q)
		return ffs_error_errno(err, ENOMEM, "cannot put the VM under the watchdog's guard");
	/* a blocking one would make the watchdog hang where it reads pending events */
	if (flags < 0 || !(flags & O_NONBLOCK) || geo->n_regions > FFS_MAX_REGIONS)
		return ffs_error_set(err, EINVAL,
			"the watchdog needs a non-blocking userfaultfd and at most %d regions",
			FFS_MAX_REGIONS);
	q->op = op;
	q->slot = index;
	q->has_sock = sock >= 0;
	q->rescue = wd->rescue[index];
	q->n_spans = geo->n_regions;
	for (unsigned i = 0; i < geo->n_regions; i++)
		q->spans[i] = (struct ffs_wd_span){.hva = geo->regions[i].hva, .len = geo->regions[i].size};
	int r = ask(wd, q, fds, sock >= 0 ? 2 : 1, ANSWER_NS, &reply);

	if (r == -EPIPE)
		return ffs_error_set(err, EIO,
			"the watchdog process is gone (killed?): no branch is taken without it, restart "
			"forkfs");
	return r ? ffs_error_errno(err, -r, "the watchdog did not take the VM") : 0;
}

int ffs_watchdog_add(struct ffs_watchdog *wd, int uffd, int sock, const struct ffs_vmm_ops *ops,
	const struct ffs_geometry *geo, struct ffs_wd_slot **out, struct ffs_error *err)
{
	unsigned i = 0;
	int r = FFS_FAULT("watchdog-add");

	if (r)
		return ffs_error_errno(err, -r, "the watchdog did not take the VM");
	pthread_mutex_lock(&wd->lock);
	while (i < FFS_WD_SLOTS && wd->used[i])
		i++;
	if (i < FFS_WD_SLOTS) {
		wd->used[i] = true;
		wd->rescue[i] = ops ? ops->rescue : NULL;
	}
	pthread_mutex_unlock(&wd->lock);
	if (i == FFS_WD_SLOTS)
		return ffs_error_set(err, ENOSPC,
			"%d VMs are attached already, which is all that one forkfs can guard: mount another "
			"one",
			FFS_WD_SLOTS);
	struct ffs_wd_slot *slot = &wd->shared->slots[i];

	atomic_store(&slot->active, 0);
	atomic_store(&slot->pausing, 0);
	atomic_store(&slot->revoked, 0);
	atomic_store(&slot->handler_seq, 0);
	atomic_store(&slot->pause_beat, 0);
	r = hand_over(wd, FFS_WD_ADD, i, uffd, sock, geo, err);
	if (r) {
		/* It may have taken the duplicates and been too slow to say so. */
		ffs_watchdog_remove(wd, slot);
		return r;
	}
	*out = slot;
	return 0;
}

int ffs_watchdog_replace(struct ffs_watchdog *wd, struct ffs_wd_slot *slot, int uffd, int sock,
	const struct ffs_geometry *geo, struct ffs_error *err)
{
	int r = FFS_FAULT("watchdog-replace");

	if (r)
		return ffs_error_errno(err, -r, "the watchdog did not take the VM");
	return hand_over(wd, FFS_WD_REPLACE, (unsigned)(slot - wd->shared->slots), uffd, sock, geo, err);
}

void ffs_watchdog_remove(struct ffs_watchdog *wd, struct ffs_wd_slot *slot)
{
	if (!slot)
		return;
	unsigned i = (unsigned)(slot - wd->shared->slots);
	_cleanup_free_ struct ffs_wd_request *q = calloc(1, sizeof(*q));
	struct ffs_wd_reply reply;
	int r = -ENOMEM;

	atomic_store(&slot->active, 0);
	atomic_store(&slot->pausing, 0);
	if (q) {
		q->op = FFS_WD_REMOVE;
		q->slot = i;
		r = ask(wd, q, NULL, 0, REMOVE_NS, &reply);
	}
	/* EINVAL: it never had the slot. EPIPE: it is gone, and its duplicates with it. */
	if (r && r != -EINVAL && r != -EPIPE) {
		ffs_log(FFS_LOG_WARN,
			"the watchdog did not give slot %u back (%d): the slot stays out of use", i, r);
		return;
	}
	pthread_mutex_lock(&wd->lock);
	wd->used[i] = false;
	pthread_mutex_unlock(&wd->lock);
}

void ffs_watchdog_poke(struct ffs_watchdog *wd)
{
	/* The caller's store to the slot before our load of `sleeping`, whatever order it used: see
	 * ffs_watchdog_body(). */
	atomic_thread_fence(memory_order_seq_cst);
	if (!atomic_load(&wd->shared->sleeping) || !atomic_exchange(&wd->shared->sleeping, 0))
		return;
	if (eventfd_write(wd->event, 1) < 0)
		errno = 0; /* full: it is readable, which is all it is for */
}
