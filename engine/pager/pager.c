/* The pager: owns its socket, the list of VMMs that it serves, and the file of their working set.
 *
 * Threads: the caller's, in ffs_pager_run(), hears of VMMs from the guard (guard.h), which accepts; each VMM
 * has its own (child.c). One lock (`lock`) for
 * the list, what VMMs that have ended had touched, and the reports; nobody holds it while waiting for a VMM,
 * a branch or the disk.
 *
 * Who connects is the untrusted party: it must be of a user who is expected, a thread of its own looks at its
 * message, and the guard bounds how many are there at once. */
#include "pager/pager.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "pager/internal.h"

const char *ffs_pager_event_name(enum ffs_pager_event_kind kind)
{
	static const char *const names[] = {[FFS_PAGER_SERVES] = "serves",
		[FFS_PAGER_RELEASED] = "released",
		[FFS_PAGER_EXITED] = "exited",
		[FFS_PAGER_KILLED] = "killed",
		[FFS_PAGER_REFUSED] = "refused"};

	return names[kind];
}

void ffs_pager_report(struct ffs_child *c, enum ffs_pager_event_kind kind, const char *why)
{
	struct ffs_pager *p = c->pager;
	struct ffs_pager_event e = {.kind = kind,
		.pid = c->pid,
		.why = why,
		.memory_bytes = c->geo.memory_size,
		.served_bytes = c->served,
		.prefetched_bytes = c->prefetched,
		.faults = c->faults};

	if (kind == FFS_PAGER_KILLED)
		ffs_log(FFS_LOG_ERROR, "pager: the VM of process %d was ended: %s", (int)c->pid, why);
	if (kind == FFS_PAGER_REFUSED)
		ffs_log(FFS_LOG_WARN, "pager: process %d is not served: %s", (int)c->pid, why);
	pthread_mutex_lock(&p->lock);
	if (p->opt.report)
		p->opt.report(p->opt.report_arg, &e);
	pthread_mutex_unlock(&p->lock);
}

/* ---- the working set ---- */

/* What the VMMs touched, those that are there and those that were: a copy. NULL: no VMM came yet, or no
 * memory. */
static uint64_t *touched_map(struct ffs_pager *p, uint64_t *memory_size)
{
	pthread_mutex_lock(&p->lock);
	uint64_t words = p->memory_size / FFS_PAGER_CLUSTER / 64 + 1;
	uint64_t *map = p->recorded ? calloc(words, 8) : NULL;

	*memory_size = p->memory_size;
	for (uint64_t i = 0; map && i < words; i++)
		map[i] = p->recorded[i];
	for (struct ffs_child *c = p->children; map && c; c = c->next)
		for (uint64_t i = 0; c->touched && c->geo.memory_size == p->memory_size && i < words; i++)
			map[i] |= atomic_load_explicit(&c->touched[i], memory_order_relaxed);
	if (map)
		ffs_working_set_mark(&p->set, FFS_PAGER_CLUSTER, map);
	pthread_mutex_unlock(&p->lock);
	return map;
}

static void save_working_set(struct ffs_pager *p)
{
	struct ffs_working_set set = {0};
	struct ffs_error err = {0};
	uint64_t memory_size;

	if (!p->opt.working_set || p->saved)
		return;
	_cleanup_free_ uint64_t *map = touched_map(p, &memory_size);

	if (!map || ffs_working_set_of(map, FFS_PAGER_CLUSTER, memory_size, p->opt.limit, &set) < 0)
		return;
	/* a set that has not grown is not written again, and one that nobody touched anything of is none */
	if (set.n && ffs_working_set_bytes(&set) != ffs_working_set_bytes(&p->set)) {
		if (ffs_working_set_write(p->opt.working_set, memory_size, &set, &err) < 0)
			ffs_log(FFS_LOG_WARN, "pager: %s", err.text);
		else
			ffs_log(FFS_LOG_INFO, "pager: the working set is %llu KiB",
				(unsigned long long)ffs_working_set_bytes(&set) / 1024);
	}
	p->saved = true;
	ffs_working_set_free(&set);
}

/* With the lock. */
static void load_working_set(struct ffs_pager *p)
{
	struct ffs_error err = {0};

	if (!p->opt.working_set || p->opt.no_prefetch)
		return;
	if (ffs_working_set_read(p->opt.working_set, p->memory_size, &p->set, &err) < 0 && err.code != ENOENT)
		ffs_log(FFS_LOG_WARN, "pager: %s: it is ignored", err.text);
}

/* No more than the limit is put there, however large the file says it is. */
static void cut(struct ffs_working_set *set, uint64_t limit)
{
	for (unsigned i = 0; i < set->n; i++) {
		if (set->span[i].len > limit)
			set->span[i].len = limit;
		limit -= set->span[i].len;
	}
}

/* It waits for no page. Else the rest is read when it is put there. */
static bool is_content(void *arg)
{
	const struct ffs_child *c = arg;
	struct pollfd p = {.fd = c->uffd, .events = POLLIN};

	return poll(&p, 1, 0) == 0;
}

int ffs_pager_serves(struct ffs_child *c, _Atomic uint64_t *touched, struct ffs_error *err)
{
	struct ffs_pager *p = c->pager;
	int r = 0;

	pthread_mutex_lock(&p->lock);
	if (!p->memory_size) {
		p->memory_size = c->geo.memory_size;
		p->recorded = calloc(p->memory_size / FFS_PAGER_CLUSTER / 64 + 1, 8);
		load_working_set(p);
	}
	c->touched = touched;
	if (p->set.n && p->memory_size == c->geo.memory_size) {
		c->set.span = malloc(p->set.n * sizeof(*c->set.span));
		if (c->set.span)
			memcpy(c->set.span, p->set.span, p->set.n * sizeof(*c->set.span));
		c->set.n = c->set.span ? p->set.n : 0;
	}
	if (!p->recorded)
		r = ffs_error_set(err, ENOMEM, "no memory for a VM of this size");
	pthread_mutex_unlock(&p->lock);
	cut(&c->set, p->opt.limit);
	ffs_working_set_read_ahead(&c->set, c->memory, c->geo.memory_size, p->opt.limit, is_content, c);
	if (!r)
		ffs_pager_report(c, FFS_PAGER_SERVES, "");
	return r;
}

void ffs_pager_over(struct ffs_child *c, bool was_served)
{
	struct ffs_pager *p = c->pager;

	pthread_mutex_lock(&p->lock);
	if (c->touched && p->recorded && c->geo.memory_size == p->memory_size)
		for (uint64_t i = 0; i < p->memory_size / FFS_PAGER_CLUSTER / 64 + 1; i++)
			p->recorded[i] |= atomic_load_explicit(&c->touched[i], memory_order_relaxed);
	c->over = true;
	p->n_over += was_served;
	pthread_mutex_unlock(&p->lock);
	/* the thread that accepts joins us */
	uint64_t one = 1;

	if (write(p->changed, &one, sizeof(one)) < 0)
		ffs_log(FFS_LOG_ERROR, "pager: %s", strerror(errno));
}

/* ---- who connects ---- */

static void free_child(struct ffs_child *c)
{
	ffs_close_fd(&c->peer);
	ffs_close_fd(&c->memory);
	ffs_close_fd(&c->wait);
	ffs_close_fd(&c->uffd); /* the VMM has ended, or has all its pages */
	ffs_close_fd(&c->pidfd);
	if (c->buf && munmap(c->buf, c->buf_size) < 0)
		ffs_log(FFS_LOG_ERROR, "pager: %s", strerror(errno));
	ffs_working_set_free(&c->set);
	free(c->done);
	free(c->gone);
	free((void *)c->touched);
	free(c);
}

/* Threads that have come to their end. */
static void reap(struct ffs_pager *p)
{
	struct ffs_child **at = &p->children, *over = NULL;

	pthread_mutex_lock(&p->lock);
	while (*at) {
		struct ffs_child *c = *at;

		if (c->over) {
			*at = c->next;
			c->next = over;
			over = c;
			p->n_alive--;
		} else {
			at = &c->next;
		}
	}
	pthread_mutex_unlock(&p->lock);
	while (over) {
		struct ffs_child *c = over;

		over = c->next;
		pthread_join(c->thread, NULL);
		free_child(c);
	}
}

static int start_child(struct ffs_pager *p, struct ffs_child *c, struct ffs_error *err)
{
	pthread_mutex_lock(&p->lock);
	c->next = p->children;
	p->children = c;
	p->n_alive++;
	int r = pthread_create(&c->thread, NULL, ffs_child_main, c);

	if (r) {
		p->children = c->next;
		p->n_alive--;
	}
	pthread_mutex_unlock(&p->lock);
	return r ? ffs_error_errno(err, r, "cannot start a thread for it") : 0;
}

/* One that has connected. Its message, with the userfaultfd, may be in the socket: whoever is not served is
 * ended before that is closed, but for strangers. */
static void take_peer(struct ffs_pager *p, struct ffs_guard_peer *peer)
{
	struct ffs_child none = {.pager = p, .pid = peer->pid}, *c = calloc(1, sizeof(*c));
	struct ffs_error why = {0};

	if (!peer->allowed || !c) {
		ffs_error_set(&why, EPERM,
			c ? "it is of user %u, or in a pid namespace that is not to be seen from here: "
			    "neither is expected (--owner)"
			  : "no memory for user %u's VM",
			peer->uid);
		free(c);
		c = NULL;
	} else {
		*c = (struct ffs_child){.pager = p,
			.id = peer->id,
			.pid = peer->pid,
			.peer = peer->sock,
			.pidfd = peer->pidfd,
			.uffd = -1,
			.memory = -1,
			.wait = -1};
		if (start_child(p, c, &why) == 0)
			return;
		free(c);
	}
	if (peer->allowed)
		ffs_guard_kill(peer->pidfd);
	ffs_pager_report(&none, peer->allowed ? FFS_PAGER_KILLED : FFS_PAGER_REFUSED, why.text);
	ffs_close_fd(&peer->sock);
	ffs_close_fd(&peer->pidfd);
}

static int drain(int fd)
{
	uint64_t n;

	return read(fd, &n, sizeof(n)) < 0 && errno != EAGAIN && errno != EINTR ? -errno : 0;
}

static bool is_done(struct ffs_pager *p)
{
	pthread_mutex_lock(&p->lock);
	bool done = (p->opt.children && p->n_over >= p->opt.children) || (p->no_more && !p->n_alive);

	pthread_mutex_unlock(&p->lock);
	return done;
}

static int on_guard(struct ffs_pager *p, bool *last, struct ffs_error *err)
{
	struct ffs_guard_peer peer;
	int r = ffs_guard_next(&p->guard, &peer);

	if (r == -EPROTO)
		return 0;
	if (r < 0)
		return ffs_error_set(err, -r,
			"the process that guards the VMs has ended: they get all their pages now, and no "
			"others are "
			"served");
	if (peer.last)
		*last = true;
	else
		take_peer(p, &peer);
	return 0;
}

/* Until told to stop, and then until the last VM is over: `closing`. */
static int serve(struct ffs_pager *p, bool closing, struct ffs_error *err)
{
	enum { GUARD, STOP, READY, CHANGED, LAST };
	bool last = false;

	while (closing ? p->n_alive || !last : !is_done(p)) {
		struct pollfd f[] = {[GUARD] = {.fd = p->guard.sock, .events = POLLIN},
			[STOP] = {.fd = closing ? -1 : p->stop, .events = POLLIN},
			[READY] = {.fd = p->ready, .events = POLLIN},
			[CHANGED] = {.fd = p->changed, .events = POLLIN},
			[LAST] = {.fd = p->no_more ? -1 : p->last, .events = POLLIN}};
		int r = 0;

		if (poll(f, FFS_ARRAY_LEN(f), -1) < 0 && errno != EINTR)
			return ffs_error_errno(err, errno, "wait for VMMs");
		if (f[STOP].revents)
			return 0;
		if (f[READY].revents && !(r = drain(p->ready)))
			save_working_set(p);
		if (f[LAST].revents && !f[GUARD].revents)
			p->no_more = true; /* whoever connects after all gets all its pages at the end */
		if (f[CHANGED].revents && !r && !(r = drain(p->changed)))
			reap(p);
		if (r < 0)
			return ffs_error_errno(err, -r, "wait for VMMs");
		if (f[GUARD].revents && (r = on_guard(p, &last, err)) < 0)
			return r;
	}
	return 0;
}

/* Without a guard: those that are served get all their pages, those that have just connected are ended. */
static void close_alone(struct ffs_pager *p)
{
	struct ffs_guard_peer peer;

	if (shutdown(p->listening, SHUT_RD) == 0)
		while (ffs_guard_accept(p->listening, p->opt.uid, &peer) == 0) {
			if (peer.allowed)
				ffs_guard_kill(peer.pidfd);
			ffs_close_fd(&peer.sock);
			ffs_close_fd(&peer.pidfd);
		}
	while (p->n_alive) {
		struct pollfd f = {.fd = p->changed, .events = POLLIN};

		if (poll(&f, 1, -1) > 0 && drain(p->changed) == 0)
			reap(p);
	}
}

int ffs_pager_run(struct ffs_pager *p, struct ffs_error *err)
{
	int r = serve(p, false, err);

	ffs_pager_stop(p);
	if (r == 0)
		r = ffs_guard_close(&p->guard);
	if (r == 0)
		r = serve(p, true, err);
	if (r)
		close_alone(p);
	save_working_set(p);
	return r;
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	/* it can only fail when it is readable already */
	if (write(fd, &one, sizeof(one)) < 0)
		return;
}

void ffs_pager_stop(struct ffs_pager *p)
{
	signal_fd(p->stop);
}

void ffs_pager_ready(struct ffs_pager *p)
{
	signal_fd(p->ready);
}

void ffs_pager_last(struct ffs_pager *p)
{
	signal_fd(p->last);
}

/* ---- beginning and end ---- */

static int listen_at(struct ffs_pager *p, struct ffs_error *err)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	const char *path = p->opt.socket;

	if (strlen(path) >= sizeof(a.sun_path))
		return ffs_error_set(err, ENAMETOOLONG,
			"the path of the socket is longer than %zu bytes: %.300s", sizeof(a.sun_path) - 1,
			path);
	strcpy(a.sun_path, path);
	p->listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (p->listening < 0)
		return ffs_error_errno(err, errno, "make a socket");
	/* nobody else gets in between bind and chmod */
	mode_t old = umask(0177);
	int r = bind(p->listening, (struct sockaddr *)&a, sizeof(a)) < 0 ? errno : 0;

	umask(old);
	if (r)
		return ffs_error_errno(err, r, "listen at %.300s%s", path,
			r == EADDRINUSE ? " (remove what a pager that was killed has left)" : "");
	p->bound = true;
	if (p->opt.uid != geteuid() && lchown(path, p->opt.uid, p->opt.gid) < 0)
		return ffs_error_errno(err, errno, "give %.300s to user %u", path, p->opt.uid);
	return listen(p->listening, 64) < 0 ? ffs_error_errno(err, errno, "listen at %.300s", path) : 0;
}

static int check_memory(const char *path, struct ffs_error *err)
{
	struct stat st;

	if (stat(path, &st) < 0)
		return ffs_error_errno(err, errno, "%.300s", path);
	return S_ISREG(st.st_mode) ? 0 : ffs_error_set(err, EINVAL, "%.300s is no file", path);
}

int ffs_pager_new(const struct ffs_pager_options *opt, struct ffs_pager **out, struct ffs_error *err)
{
	struct ffs_pager *p = calloc(1, sizeof(*p));

	if (!p)
		return ffs_error_set(err, ENOMEM, "no memory for a pager");
	p->opt = *opt;
	p->listening = p->stop = p->ready = p->changed = p->last = p->guard.sock = -1;
	pthread_mutex_init(&p->lock, NULL);
	/* no core file of a guest's memory, and none that keeps its VMM waiting while it is written */
	int r = prctl(PR_SET_DUMPABLE, 0) < 0 ? ffs_error_errno(err, errno, "PR_SET_DUMPABLE") : 0;

	if (!r)
		r = check_memory(opt->memory, err);
	if (!r)
		r = ffs_guard_start(&p->guard, err);
	if (!r) {
		p->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		p->ready = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		p->changed = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		p->last = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (p->stop < 0 || p->ready < 0 || p->changed < 0 || p->last < 0)
			r = ffs_error_errno(err, errno, "make an eventfd");
	}
	if (!r)
		r = listen_at(p, err);
	if (!r)
		r = ffs_guard_listen(&p->guard, p->listening, opt->uid, err);
	if (r)
		ffs_pager_free(p);
	else
		*out = p;
	return r;
}

void ffs_pager_free(struct ffs_pager *p)
{
	if (!p)
		return;
	ffs_close_fd(&p->listening);
	if (p->bound && unlink(p->opt.socket) < 0 && errno != ENOENT)
		ffs_log(FFS_LOG_WARN, "pager: %s: %s", p->opt.socket, strerror(errno));
	if (p->guard.pid)
		ffs_guard_end(&p->guard);
	ffs_close_fd(&p->stop);
	ffs_close_fd(&p->ready);
	ffs_close_fd(&p->changed);
	ffs_close_fd(&p->last);
	ffs_working_set_free(&p->set);
	free(p->recorded);
	pthread_mutex_destroy(&p->lock);
	free(p);
}
