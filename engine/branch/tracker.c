/* Owns a userfaultfd: its life and the fault handler thread. What is copied, and for which branches, is
 * capture.c.
 *
 * The handler thread takes cluster locks only, allocates nothing, logs nothing, touches no disk and no FUSE
 * file: a vCPU waits for it. Its buffer and the page arrays are mlocked. It must never wait for something
 * that itself waits for an event of the same uffd: the kernel answers EAGAIN to every UFFDIO_WRITEPROTECT
 * while a REMOVE/UNMAP event is unread, so nobody repeats on EAGAIN with a cluster lock held, and the handler
 * wakes such a fault unserved: it comes back as a new event, after the one that is in its way. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/log.h"
#include "branch/internal.h"
#include "uffd/uffd.h"

#define BATCH 64
#define DOUBT_BYTES (16ull << 20)

/* ---- the fault handler ---- */

struct handler {
	struct ffs_tracker *t;
	char *buf;
};

static void count_fault(struct ffs_tracker *t, uint64_t ns)
{
	atomic_fetch_add_explicit(&t->faults, 1, memory_order_relaxed);
	if (ns > atomic_load_explicit(&t->fault_max_ns, memory_order_relaxed))
		atomic_store_explicit(&t->fault_max_ns, ns, memory_order_relaxed);
	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		struct ffs_branch *b = ffs_slot_get(&t->slots[i]);

		if (b) {
			ffs_branch_count_fault(b, ns);
			ffs_slot_put(&t->slots[i]);
		}
	}
}

static bool in_flight(struct ffs_tracker *t, unsigned region, uint64_t cluster)
{
	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		struct ffs_branch *b = ffs_slot_get(&t->slots[i]);

		if (!b)
			continue;
		bool needs = atomic_load_explicit(&b->need[region][cluster], memory_order_relaxed) != 0;

		ffs_slot_put(&t->slots[i]);
		if (needs)
			return true;
	}
	return false;
}

/* For the mutant that copies a page late: true at the first faults that a branch in flight needs. Several,
 * because the very first is often one of the VMM's own, before the truth is read. */
#define LATE_PAGES 8
static bool first_fault(struct ffs_tracker *t, unsigned region, uint64_t cluster)
{
	bool first = false;

	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		struct ffs_branch *b = ffs_slot_get(&t->slots[i]);

		if (!b)
			continue;
		if (atomic_load(&b->need[region][cluster]))
			first |= atomic_fetch_add(&b->late, 1) < LATE_PAGES;
		ffs_slot_put(&t->slots[i]);
	}
	return first;
}

/* What it would be like if whoever copies held one lock for the whole copy: for the benchmarks. */
static void wait_for_the_copy(struct ffs_tracker *t)
{
	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		struct ffs_branch *b;

		while (!atomic_load(&t->hold) && (b = ffs_slot_get(&t->slots[i])) != NULL) {
			bool done = atomic_load(&b->remaining) == 0 || ffs_branch_failed(b);

			ffs_slot_put(&t->slots[i]);
			if (done)
				break;
			atomic_fetch_add(&t->wd->handler_seq, 2); /* the watchdog would end it */
			poll(NULL, 0, 1);
		}
	}
}

static void serve_fault(struct handler *h, uint64_t addr)
{
	struct ffs_tracker *t = h->t;
	uint64_t cluster, start = ffs_now_ns();
	unsigned region;

	if (!ffs_pages_find(t->pages, addr, &region, &cluster)) {
		ffs_uffd_wake(
			t->uffd, addr & ~4095ull, 4096); /* not ours: whoever waits must not wait for us */
		return;
	}
	struct ffs_pages_region *r = &t->pages->r[region];
	uint64_t base = r->hva + cluster * r->cluster_bytes;
	unsigned bit = (unsigned)((addr - base) / r->page_size);
	uint64_t page = base + bit * r->page_size;

	if (FFS_ALTERNATIVE("one-lock"))
		wait_for_the_copy(t);
	ffs_cluster_lock(r, cluster);
	/* Before the branches are looked at: a take that fills a slot after we did sees this in its last
	 * sweep, and waits for the lock (pages.h). */
	atomic_store(&r->dirty[cluster / r->clusters_per_slice], 1);
	/* A page that is writable already is served like any other: its bit says that it may be written, not
	 * that it can be (a sweep that failed half-way, a neighbour of a discarded page). */
	ffs_mask open = (ffs_mask)(1u << bit);
	bool early = FFS_MUTANT("unprotect-before-copy"), needed = in_flight(t, region, cluster);
	int e = 0;

	if (needed)
		open = (ffs_mask)(ffs_pages_mask(r, cluster) & ~r->writable[cluster]);
	if (early)
		e = ffs_uffd_unprotect(t->uffd, base, ffs_pages_bytes(r, cluster));
	if (needed && !(FFS_MUTANT("late-page") && first_fault(t, region, cluster)))
		ffs_tracker_capture_locked(t, region, cluster, 1, h->buf);
	/* Only now, with the bytes in the images (or their branches failed), may the guest write. */
	if (!early)
		e = needed ? ffs_uffd_unprotect(t->uffd, base, ffs_pages_bytes(r, cluster))
			   : ffs_uffd_unprotect(t->uffd, page, r->page_size);
	if (e != -EAGAIN) /* after another error some of them may be writable */
		r->writable[cluster] |= open;
	ffs_cluster_unlock(r, cluster);
	if (e < 0)
		ffs_uffd_wake(t->uffd, page, r->page_size);
	count_fault(t, ffs_now_ns() - start);
}

static void fail_discarded(struct ffs_branch *b, const char *what)
{
	ffs_branch_fail(b, EIO,
		"the VMM of %s discarded guest memory (%s) before it was captured: turn off balloon and free "
		"page "
		"reporting, or branch when they are idle",
		b->sandbox, what);
}

/* Captured pages that are zero in the image were so when they were copied: at the branch's instant, or
 * because they had left the mapping already, some time before we heard of it (QEMU punches a memfd before its
 * madvise; munmap reports what is over). Nobody can tell which. */
static void doubt_zero_pages(
	struct handler *h, const struct ffs_pages_region *r, uint64_t from, uint64_t to, const char *what)
{
	struct ffs_tracker *t = h->t;

	for (unsigned s = 0; s < FFS_SLOTS; s++) {
		struct ffs_branch *b = ffs_slot_get(&t->slots[s]);

		if (!b)
			continue;
		for (uint64_t at = from; at < to && !ffs_branch_failed(b); at += DOUBT_BYTES) {
			uint64_t len = to - at < DOUBT_BYTES ? to - at : DOUBT_BYTES;

			if (ffs_image_any_zero(&b->image, r->offset + at, len, h->buf, t->pages->copy_max))
				fail_discarded(b, what);
			atomic_fetch_add(&t->wd->handler_seq, 2); /* gigabytes at once are no standstill */
		}
		ffs_slot_put(&t->slots[s]);
	}
}

/* Pages left the mapping (balloon, MADV_DONTNEED, munmap, mremap): their old bytes are gone, the protection
 * of what comes back too. */
static void serve_removal(struct handler *h, uint64_t from, uint64_t to, const char *what)
{
	struct ffs_tracker *t = h->t;

	atomic_fetch_add(&t->removes, 1);
	for (unsigned i = 0; i < t->pages->n; i++) {
		struct ffs_pages_region *r = &t->pages->r[i];

		if (to <= r->hva || from >= r->hva + r->size)
			continue;
		uint64_t a = from > r->hva ? from - r->hva : 0,
			 z = to - r->hva < r->size ? to - r->hva : r->size;

		for (uint64_t c = a / r->cluster_bytes; c * r->cluster_bytes < z; c++) {
			ffs_cluster_lock(r, c);
			/* first, as in serve_fault(): a branch that is armed behind our back sweeps it again
			 */
			atomic_store(&r->dirty[c / r->clusters_per_slice], 1);
			for (unsigned s = 0; s < FFS_SLOTS; s++) {
				struct ffs_branch *b = ffs_slot_get(&t->slots[s]);

				if (!b)
					continue;
				if (atomic_load_explicit(&b->need[i][c], memory_order_relaxed))
					fail_discarded(b, what);
				ffs_slot_put(&t->slots[s]);
			}
			r->writable[c] = ffs_pages_mask(r, c);
			ffs_cluster_unlock(r, c);
			if (c % 1024 == 0) /* gigabytes at once are no standstill */
				atomic_fetch_add(&t->wd->handler_seq, 2);
		}
		doubt_zero_pages(h, r, a, z, what);
	}
}

static void serve_event(struct handler *h, const struct uffd_msg *msg)
{
	switch (msg->event) {
	case UFFD_EVENT_PAGEFAULT:
		serve_fault(h, msg->arg.pagefault.address);
		break;
	case UFFD_EVENT_REMOVE:
		serve_removal(h, msg->arg.remove.start, msg->arg.remove.end, "MADV_DONTNEED or hole punch");
		break;
	case UFFD_EVENT_UNMAP:
		serve_removal(h, msg->arg.remove.start, msg->arg.remove.end, "munmap or MAP_FIXED");
		break;
	case UFFD_EVENT_REMAP:
		serve_removal(h, msg->arg.remap.from, msg->arg.remap.from + msg->arg.remap.len, "mremap");
		break;
	case UFFD_EVENT_FORK: /* not asked for; a child's uffd must not stay open */
		close((int)msg->arg.fork.ufd);
		break;
	}
}

static void *handler_main(void *arg)
{
	struct ffs_tracker *t = arg;
	struct handler h = {.t = t};
	struct uffd_msg msgs[BATCH];

	prctl(PR_SET_NAME, "forkfs-fault");
	/* a vCPU waits for every fault: before copiers, readers and whatever else runs here; bounded work
	 * each time */
	t->handler_rt = ffs_priority_self(2);
	h.buf = t->fault_buf;
	struct pollfd p[3] = {{.fd = t->uffd, .events = POLLIN}, {.fd = t->event, .events = POLLIN},
		{.fd = t->pidfd, .events = POLLIN}};

	for (;;) {
		int n = poll(p, 3, -1);

		if (n < 0 && errno != EINTR)
			break;
		if (n > 0 && (p[1].revents & POLLIN))
			break;
		if (n > 0 && p[2].revents) {
			atomic_store(&t->gone, 1);
			p[2].fd = -1; /* said once */
		}
		atomic_fetch_add(&t->wd->handler_seq, 1); /* odd: at work, the watchdog counts */
		if (FFS_FAULT("handler-hang") == 0) {
			ssize_t got = read(t->uffd, msgs, sizeof(msgs));
			unsigned k = got > 0 ? (unsigned)got / sizeof(msgs[0]) : 0;

			/* removals first: until they are read the kernel refuses to unprotect anything */
			for (unsigned i = 0; i < k; i++)
				if (msgs[i].event != UFFD_EVENT_PAGEFAULT)
					serve_event(&h, &msgs[i]);
			for (unsigned i = 0; i < k; i++) {
				if (msgs[i].event == UFFD_EVENT_PAGEFAULT)
					serve_event(&h, &msgs[i]);
				atomic_fetch_add(&t->wd->handler_seq, 2); /* progress, still at work */
			}
		}
		atomic_fetch_add(&t->wd->handler_seq, 1); /* even: idle */
		atomic_fetch_add(&t->rounds, 1);
		if (p[0].revents & (POLLERR | POLLHUP | POLLNVAL))
			p[0].fd = -1;
	}
	return NULL;
}

/* ---- life ---- */

void ffs_tracker_fence(struct ffs_tracker *t)
{
	uint64_t seq = atomic_load(&t->wd->handler_seq), rounds = atomic_load(&t->rounds);
	struct pollfd p = {.fd = t->uffd, .events = POLLIN};

	/* nothing queued while the handler slept */
	if (!(seq & 1) && poll(&p, 1, 0) == 0 && atomic_load(&t->wd->handler_seq) == seq)
		return;
	/* the second round from now began after now, and reads what was queued */
	while (atomic_load(&t->rounds) - rounds < 2 && !ffs_tracker_revoked(t) && !atomic_load(&t->gone)) {
		if (!(atomic_load(&t->wd->handler_seq) & 1) && poll(&p, 1, 0) == 0 &&
			atomic_load(&t->rounds) != rounds)
			return;
		sched_yield();
	}
}

int ffs_tracker_follow_socket(struct ffs_tracker *t, struct ffs_vmm *vmm, struct ffs_error *err)
{
	if (vmm->socket_generation == t->socket_generation)
		return 0;
	/* A replacement begins a new life of the watchdog's slot. This one is over, and everybody who has a
	 * branch in flight must see so. */
	if (ffs_tracker_revoked(t))
		return ffs_error_set(
			err, ETIMEDOUT, "the watchdog let process %d go: try again", (int)t->proc.pid);
	int e = ffs_watchdog_replace(t->watchdog, t->wd, t->uffd, vmm->ops->socket(vmm), &t->geo, err);

	if (e == 0)
		t->socket_generation = vmm->socket_generation;
	return e;
}

int ffs_tracker_new(struct ffs_engine *engine, struct ffs_vmm *vmm, const struct ffs_geometry *geo,
	bool track, struct ffs_tracker **out, struct ffs_error *err)
{
	struct ffs_tracker *t = calloc(1, sizeof(*t));
	int e;

	if (!t)
		return ffs_error_set(err, ENOMEM, "out of memory for a tracker");
	atomic_init(&t->refs, 1);
	t->uffd = t->event = t->pidfd = -1;
	t->proc = vmm->proc;
	t->geo = *geo;
	t->track = track;
	t->watchdog = engine->watchdog;
	pthread_mutex_init(&t->lock, NULL);
	pthread_rwlock_init(&t->reading, NULL);
	ffs_cond_init(&t->work);
	ffs_cond_init(&t->changed);
	t->pages = ffs_pages_new(geo);
	if (!t->pages) {
		e = ffs_error_set(err, ENOMEM, "out of memory for the page table of %llu MiB of guest memory",
			(unsigned long long)geo->memory_size >> 20);
		goto fail;
	}
	/* populated and locked before the first fault */
	t->fault_buf = mmap(NULL, t->pages->copy_max, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (t->fault_buf == MAP_FAILED) {
		t->fault_buf = NULL;
		e = ffs_error_errno(err, errno, "cannot map the fault handler's buffer");
		goto fail;
	}
	if (mlock(t->fault_buf, t->pages->copy_max) < 0)
		ffs_log(FFS_LOG_INFO, "the fault handler's memory is not locked: raise RLIMIT_MEMLOCK");
	e = ffs_lineage_init(t, err);
	if (e == 0)
		e = ffs_memory_open(vmm->proc, geo, &t->memory, err);
	if (e < 0)
		goto fail;
	t->pidfd = (int)syscall(SYS_pidfd_open, vmm->proc.pid, 0);
	t->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (t->pidfd < 0 || t->event < 0) {
		e = ffs_error_errno(err, errno, "cannot watch process %d", (int)vmm->proc.pid);
		goto fail;
	}
	e = ffs_tracker_obtain(engine, vmm, geo, &t->uffd, err);
	if (e < 0)
		goto fail;
	ffs_engine_fatal_add(t->uffd);
	e = ffs_watchdog_add(engine->watchdog, t->uffd, vmm->ops->socket(vmm), vmm->ops, geo, &t->wd, err);
	if (e < 0)
		goto fail;
	t->socket_generation = vmm->socket_generation;
	e = FFS_FAULT("tracker-threads");
	if (e == 0)
		e = -pthread_create(&t->handler, NULL, handler_main, t);
	if (e < 0) {
		ffs_error_errno(err, -e, "cannot start the fault handler");
		goto fail;
	}
	t->handler_started = true;
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned want = cpus >= 4 ? FFS_COPIERS : 1;

	while (t->n_copiers < want) {
		e = -pthread_create(&t->copiers[t->n_copiers], NULL, ffs_copier_main, t);
		if (e < 0 && t->n_copiers == 0) {
			ffs_error_errno(err, -e, "cannot start a copier");
			goto fail;
		}
		if (e < 0)
			break; /* one is enough to be right */
		t->n_copiers++;
	}
	*out = t;
	return 0;
fail:;
	struct ffs_error why = {.code = ECANCELED, .text = "attach failed"};

	ffs_tracker_end(t, &why);
	ffs_tracker_unref(t);
	return e;
}

void ffs_tracker_end(struct ffs_tracker *t, const struct ffs_error *reason)
{
	pthread_mutex_lock(&t->lock);
	bool first = !t->ending;

	t->ending = true;
	t->end_reason = *reason;
	pthread_cond_broadcast(&t->work);
	pthread_mutex_unlock(&t->lock);
	if (!first)
		return;
	for (unsigned i = 0; i < t->n_copiers; i++)
		pthread_join(t->copiers[i], NULL); /* they fail and settle what is in flight first */
	if (t->wd)
		ffs_tracker_release_idle(
			t); /* piece by piece: the close below would hold the VMM's mmap lock for all of it */
	if (t->handler_started) {
		/* until here the guest's writes are served; the close below lets everything go at once */
		if (eventfd_write(t->event, 1) < 0)
			abort(); /* a fresh eventfd takes a 1 */
		pthread_join(t->handler, NULL);
	}
	if (t->wd)
		ffs_watchdog_remove(t->watchdog, t->wd);
	if (t->uffd >= 0) {
		ffs_engine_fatal_remove(t->uffd);
		ffs_close_fd(&t->uffd);
	}
	ffs_close_fd(&t->event);
	ffs_close_fd(&t->pidfd);
	ffs_lineage_end(t);
	/* Branches keep the tracker for its pages, for as long as they are read. Not the VMM's memory with it: its
	 * file may be one of our own mount, which nobody could unmount then. */
	pthread_rwlock_wrlock(&t->reading);
	if (t->memory)
		ffs_memory_close(t->memory);
	t->memory = NULL;
	pthread_rwlock_unlock(&t->reading);
}

struct ffs_tracker *ffs_tracker_ref(struct ffs_tracker *t)
{
	atomic_fetch_add_explicit(&t->refs, 1, memory_order_relaxed);
	return t;
}

void ffs_tracker_unref(struct ffs_tracker *t)
{
	if (!t || atomic_fetch_sub_explicit(&t->refs, 1, memory_order_acq_rel) != 1)
		return;
	if (t->fault_buf)
		munmap(t->fault_buf, t->pages->copy_max);
	ffs_pages_free(t->pages);
	pthread_cond_destroy(&t->work);
	pthread_cond_destroy(&t->changed);
	pthread_rwlock_destroy(&t->reading);
	pthread_mutex_destroy(&t->lock);
	free(t);
}
