/* One VMM whose memory is served: owns its descriptors, what is known of its pages, and its thread.
 *
 * Threads: one for each VMM (ffs_child_main). It alone uses all fields but `touched`, which the pager reads.
 * It waits in poll(2), in reading memory.bin (a page that is being captured), and for the end of a VMM that
 * it has killed. Faults come first: what is put there without being asked for goes in pieces of a cluster,
 * and between two of them it looks for faults and events.
 *
 * No page is ever left to the kernel's zeros: c->uffd is closed after the VMM's end, or after all pages were
 * put there. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"
#include "guest/maps.h"
#include "pager/internal.h"
#include "uffd/uffd.h"
#include "vmm/api.h"

#define MESSAGE_NS (10 * FFS_NS_PER_S)
#define MAX_EVENTS 16

/* ---- the message ---- */

/* Its fields are those of the kernel's: with them the VMM's memory would move to where we do not look. */
static int check_features(int uffd, struct ffs_error *err)
{
	uint64_t features;
	int r = ffs_uffd_features(uffd, &features);

	if (r < 0)
		return ffs_error_errno(err, -r, "the VMM's userfaultfd was not set up (UFFDIO_API)");
	if (features & (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP))
		return ffs_error_set(err, ENOTSUP,
			"the VMM's userfaultfd reports forks or moved mappings (features 0x%" PRIx64
			"): its memory cannot be served then",
			features);
	return 0;
}

static int check_registered(struct ffs_child *c, struct ffs_error *err)
{
	for (unsigned i = 0; i < c->geo.n_regions; i++) {
		const struct ffs_region *r = &c->geo.regions[i];
		uint64_t page_size;
		char flags[128];
		int e = ffs_smaps_flags(c->pid, r->hva, flags, &page_size);

		if (e < 0)
			return ffs_error_errno(err, -e, "the mappings of process %d", (int)c->pid);
		if (!strstr(flags, "um"))
			return ffs_error_set(err, EPROTO,
				"the VMM has not registered its region %s for missing pages", r->name);
	}
	return 0;
}

/* Its message, for which it has some time. Afterwards nothing can be sent any more: a userfaultfd that nobody
 * receives would be closed. */
static int receive(struct ffs_child *c, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + MESSAGE_NS;
	int r;

	while ((r = ffs_coop_receive(c->peer, &c->geo, &c->uffd, err)) == 0) {
		struct pollfd p[] = {
			{.fd = c->peer, .events = POLLIN}, {.fd = c->pager->stop, .events = POLLIN}};
		int n = poll(p, 2, ffs_ms_until(deadline));

		if (n < 0 && errno != EINTR)
			return ffs_error_errno(err, errno, "wait for its message");
		if ((n == 0 || p[1].revents) && shutdown(c->peer, SHUT_RD) < 0)
			return ffs_error_errno(err, errno, "end its connection");
	}
	return r < 0 ? r : 0;
}

/* ---- the image ---- */

static int open_memory(struct ffs_child *c, struct ffs_error *err)
{
	const char *path = c->pager->opt.memory;
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		return ffs_error_errno(err, errno, "cannot open %.200s", path);
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < c->geo.memory_size)
		return ffs_error_set(err, EINVAL,
			"%.200s has %lld bytes, the VM wants %" PRIu64 ": it is not its memory", path,
			(long long)st.st_size, c->geo.memory_size);
	ffs_close_fd(&c->memory);
	c->memory = ffs_steal_fd(&fd);
	return 0;
}

/* While a branch is being captured its memory is served by the daemon, and `wait` beside it says when it is
 * complete: opened again then, it outlives the daemon. */
static void open_wait(struct ffs_child *c)
{
	const char *path = c->pager->opt.memory, *slash = strrchr(path, '/');
	_cleanup_free_ char *wait = NULL;

	if (asprintf(&wait, "%.*swait", slash ? (int)(slash + 1 - path) : 0, path) < 0)
		wait = NULL;
	else
		c->wait = open(wait, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
}

static void settled(struct ffs_child *c)
{
	struct ffs_error err = {0};

	ffs_close_fd(&c->wait);
	/* where that fails, the handle there is says what is wrong with the branch at the next page */
	if (open_memory(c, &err) < 0)
		return;
}

static int prepare(struct ffs_child *c, struct ffs_error *err)
{
	uint64_t page = 4096;

	int r = check_features(c->uffd, err);

	if (!r)
		r = ffs_coop_check(c->pid, &c->geo, err);
	if (!r)
		r = check_registered(c, err);
	open_wait(c);
	if (!r)
		r = open_memory(c, err);
	if (r)
		return r;
	for (unsigned i = 0; i < c->geo.n_regions; i++)
		if (c->geo.regions[i].page_size > page)
			page = c->geo.regions[i].page_size;
	c->buf_size = page > FFS_PAGER_CLUSTER ? page : FFS_PAGER_CLUSTER;
	c->buf = mmap(
		NULL, c->buf_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (c->buf == MAP_FAILED)
		c->buf = NULL;
	uint64_t words = c->geo.memory_size / 4096 / 64 + 1;

	c->done = calloc(words, 8);
	c->gone = calloc(words, 8);
	_Atomic uint64_t *touched = calloc(words, 8);

	if (!c->buf || !c->done || !c->gone || !touched) {
		free((void *)touched);
		return ffs_error_set(
			err, ENOMEM, "no memory for a VM of %" PRIu64 " bytes", c->geo.memory_size);
	}
	r = ffs_guard_add(&c->pager->guard, c->id, c->uffd, err);
	if (r) {
		free((void *)touched);
		return r;
	}
	c->fill = c->pager->opt.all;
	return ffs_pager_serves(c, touched, err);
}

/* ---- serving ---- */

static int on_event(struct ffs_child *c, const struct uffd_msg *m, struct ffs_error *err)
{
	uint64_t at;
	int r;

	switch (m->event) {
	case UFFD_EVENT_PAGEFAULT:
		at = m->arg.pagefault.address;
		r = ffs_child_fault(c, at, err);
		/* the VMM is changing its mappings, and the event about it is behind this one: the thread
		 * that waits is let go, and comes again behind it */
		if (r == -EAGAIN)
			r = ffs_uffd_wake(c->uffd, at & ~4095ull, 4096);
		return r;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		ffs_child_discard(c, m->arg.remove.start, m->arg.remove.end);
		return 0;
	default:
		return ffs_error_set(err, EPROTO, "the VMM's userfaultfd reports event %u", m->event);
	}
}

static int read_events(struct ffs_child *c, struct ffs_error *err)
{
	struct uffd_msg m[MAX_EVENTS];
	ssize_t n = read(c->uffd, m, sizeof(m));

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n <= 0)
		return ffs_error_errno(err, n < 0 ? errno : EPROTO, "the VMM's userfaultfd cannot be read");
	for (size_t i = 0; i < (size_t)n / sizeof(m[0]); i++) {
		int r = on_event(c, &m[i], err);

		if (r < 0)
			return r;
	}
	return 0;
}

/* Something is to be put there that nobody waits for. */
static bool has_more(const struct ffs_child *c)
{
	return c->set_at < c->set.n || c->fill;
}

/* A piece of it. */
static int put_more(struct ffs_child *c, struct ffs_error *err)
{
	uint64_t before = c->served, off, len = c->buf_size;
	bool prefetch = c->set_at < c->set.n;

	if (prefetch) {
		const struct ffs_range *s = &c->set.span[c->set_at];

		off = s->offset + c->next_off;
		if (len > s->len - c->next_off)
			len = s->len - c->next_off;
	} else {
		off = c->next_off;
	}
	int r = ffs_child_put(c, off, len, err);

	if (r == -EAGAIN)
		return 0; /* again, behind the event */
	if (r < 0)
		return r;
	c->next_off += len;
	if (prefetch) {
		c->prefetched += c->served - before;
		if (c->next_off >= c->set.span[c->set_at].len) {
			c->next_off = 0;
			c->set_at++;
		}
	}
	return 0;
}

/* All is there: the VMM needs us no more. A thread of it that is discarding memory waits until its event is
 * read, registered or not. */
static int release(struct ffs_child *c, struct ffs_error *err)
{
	int r = 0;

	for (unsigned i = 0; !r && i < c->geo.n_regions; i++)
		r = ffs_uffd_unregister(c->uffd, c->geo.regions[i].hva, c->geo.regions[i].size);
	if (r < 0)
		return r == -ESRCH ? r : ffs_error_errno(err, -r, "cannot let go of the VMM's memory");
	while (ffs_child_is_changing(c)) {
		struct pollfd p[2] = {{.fd = c->uffd, .events = POLLIN}, {.fd = c->pidfd, .events = POLLIN}};
		struct uffd_msg m[MAX_EVENTS];

		if (poll(p, 2, -1) < 0 && errno != EINTR)
			return ffs_error_errno(err, errno, "wait for the VMM");
		if (p[1].revents)
			return -ESRCH;
		if (read(c->uffd, m, sizeof(m)) < 0 && errno != EAGAIN && errno != EINTR)
			return ffs_error_errno(err, errno, "the VMM's userfaultfd cannot be read");
	}
	return ffs_guard_drop(&c->pager->guard, c->id, err);
}

/* 0: it has all its pages and was let go. -ESRCH: it has ended. */
static int serve(struct ffs_child *c, struct ffs_error *err)
{
	enum { UFFD, END, STOP, WAIT };

	for (;;) {
		struct pollfd p[] = {[UFFD] = {.fd = c->uffd, .events = POLLIN},
			[END] = {.fd = c->pidfd, .events = POLLIN},
			[STOP] = {.fd = c->fill ? -1 : c->pager->stop, .events = POLLIN},
			[WAIT] = {.fd = c->wait, .events = POLLIN}};
		int r = 0;

		if (poll(p, FFS_ARRAY_LEN(p), has_more(c) ? 0 : -1) < 0 && errno != EINTR)
			return ffs_error_errno(err, errno, "wait for the VMM");
		if (p[END].revents)
			return -ESRCH;
		if (p[STOP].revents) {
			c->set_at = c->set.n;
			c->next_off = 0;
			c->fill = true;
		}
		if (p[WAIT].revents)
			settled(c);
		if (p[UFFD].revents) {
			r = read_events(c, err);
		} else if (has_more(c)) {
			r = put_more(c, err);
			if (!r && c->set_at == c->set.n && c->next_off >= c->geo.memory_size)
				return release(c, err);
		}
		if (r < 0)
			return r;
	}
}

/* What has become of it, 0 or the reason. Its userfaultfd is closed afterwards: it has ended by then. */
static void finish(struct ffs_child *c, int r, struct ffs_error *err)
{
	if (r == 0) {
		ffs_pager_report(c, FFS_PAGER_RELEASED, "");
	} else if (c->uffd < 0) {
		/* it has handed over nothing that could become zeros */
		if (ffs_guard_drop(&c->pager->guard, c->id, NULL) < 0)
			ffs_guard_kill(c->pidfd);
		ffs_pager_report(c, FFS_PAGER_REFUSED, err->text);
	} else {
		ffs_guard_kill(c->pidfd);
		ffs_pager_report(c, err->code ? FFS_PAGER_KILLED : FFS_PAGER_EXITED, err->text);
	}
}

void *ffs_child_main(void *arg)
{
	struct ffs_child *c = arg;
	struct ffs_error err = {0};
	int r = receive(c, &err);

	pthread_setname_np(pthread_self(), "pager");
	if (!r)
		r = prepare(c, &err);
	ffs_close_fd(&c->peer);
	bool served = c->touched != NULL;

	if (!r)
		r = serve(c, &err);
	finish(c, r, &err);
	ffs_pager_over(c, served);
	return NULL;
}
