/* Owns the watchdog's side: duplicates of every uffd and control socket, and the decision that the daemon is
 * dead or hangs.
 *
 * Threads: one, in a process of its own: mlocked, all signals blocked, never a core dump. No locks; it shares
 * with the daemon nothing but the page of counters (atomics) and must never wait for it: answers are sent
 * without blocking (the socket of a request is empty), and rescues, which wait for a VMM, are made by a child
 * each. Allocates nothing after its start. */
#include "uffd/watchdog-process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "uffd/helper.h"
#include "uffd/uffd.h"

#define TICK_NS (50 * FFS_NS_PER_MS)
#define RESCUE_NS (10 * FFS_NS_PER_S)
#define MAX_DRAIN 4096 /* reads; more than a machine has threads to fault, and an end in any case */
#define WATCHDOG_PRIORITY 30

/* One thing that must move while something is due. */
struct stall {
	uint64_t value, ns; /* last seen; how long it has not moved */
};

struct guarded {
	bool used, seen_pending;
	bool rescued; /* this pause was ended by us: not a second time, it may be somebody else's by now */
	uint64_t rescue_beat; /* pause_beat when it was */
	int uffd, sock;
	pid_t rescuer;    /* child, 0: none */
	int remove_reply; /* socket of a REMOVE that waits for the child, or -1 */
	int (*rescue)(int sock, uint64_t deadline_ns);
	unsigned n_spans;
	struct ffs_wd_span spans[FFS_MAX_REGIONS];
	struct stall pending, served, paused;
};

static struct {
	struct ffs_wd_shared *shared;
	int sock, event, children;
	uint64_t last_tick;
	struct guarded slots[FFS_WD_SLOTS];
} wd;

static bool lock_memory(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
	return false; /* shadow memory is terabytes */
#else
	return mlockall(MCL_CURRENT | MCL_FUTURE) == 0;
#endif
}

static void answer(int *sock, const struct ffs_wd_reply *reply)
{
	/* Whoever asked may have given up; that is its own business. */
	if (*sock >= 0 && ffs_msg_send(*sock, reply, sizeof(*reply), NULL, 0) < 0)
		ffs_close_fd(sock);
	ffs_close_fd(sock);
}

/* ---- letting go ---- */

/* In a child: ask the VMM on this socket, whatever that takes; the alarm is for a driver that overruns its
 * deadline. */
static void rescue_child(int sock, int (*rescue)(int, uint64_t))
{
	sigset_t alarm_set;
	struct sigaction dfl = {.sa_handler = SIG_DFL};
	struct sched_param normal = {0};

	/* First of all: a copy of a uffd in here would keep that guest's memory protected. */
	ffs_close_all_but(sock, -1);
	sched_setscheduler(0, SCHED_OTHER, &normal);
	sigaction(SIGALRM, &dfl, NULL);
	sigemptyset(&alarm_set);
	sigaddset(&alarm_set, SIGALRM);
	sigprocmask(SIG_UNBLOCK, &alarm_set, NULL);
	alarm(12);
	_exit(rescue(sock, ffs_now_ns() + RESCUE_NS) == 0 ? 0 : 1);
}

static void start_rescue(struct guarded *g)
{
	if (g->sock < 0 || !g->rescue || g->rescuer)
		return;
	pid_t pid = fork();

	if (pid == 0)
		rescue_child(g->sock, g->rescue);
	if (pid > 0) {
		g->rescuer = pid;
		return;
	}
	/* No process to be had: late is better than never, and the others' uffds are looked after again
	 * afterwards. */
	if (g->rescue(g->sock, ffs_now_ns() + RESCUE_NS) < 0)
		g->rescued = false; /* the next stall tries again */
}

/* Read what is queued. A VMM thread that changes its mappings waits until its event is read, protection or
 * not. */
static void drain(int uffd)
{
	char events[1024];

	for (unsigned i = 0; i < MAX_DRAIN; i++)
		if (read(uffd, events, sizeof(events)) <= 0)
			return;
}

static void release_ranges(struct guarded *g)
{
	drain(g->uffd);
	for (unsigned i = 0; i < g->n_spans; i++)
		if (ffs_uffd_unregister(g->uffd, g->spans[i].hva, g->spans[i].len) == -ESRCH)
			return; /* the VMM is gone */
	/* Faults and events that were queued meanwhile; a fault that the first drain took is woken here at
	 * the latest. */
	drain(g->uffd);
	for (unsigned i = 0; i < g->n_spans; i++)
		if (ffs_uffd_wake(g->uffd, g->spans[i].hva, g->spans[i].len) == -ESRCH)
			return;
}

static void revoke_slot(struct guarded *g, struct ffs_wd_slot *s)
{
	/* Before anything is let go: whoever copies a page now must see that it may have been too late. */
	atomic_store(&s->revoked, 1);
	release_ranges(g);
	ffs_priority_return(&s->lent);
	if (atomic_load(&s->pausing) && !g->rescued) {
		g->rescued = true;
		g->rescue_beat = atomic_load(&s->pause_beat);
		start_rescue(g);
	}
}

/* ---- watching ---- */

/* True when `due` was true and the value did not move for FFS_WD_STALL_NS. */
static bool stalled(struct stall *st, bool due, uint64_t value, uint64_t dt)
{
	if (!due || st->value != value) {
		st->value = value;
		st->ns = 0;
		return false;
	}
	st->ns += dt;
	if (st->ns < FFS_WD_STALL_NS)
		return false;
	st->ns = 0; /* once per stall time, should it go on */
	return true;
}

static void tick_slot(struct guarded *g, struct ffs_wd_slot *s, uint64_t dt)
{
	bool active = atomic_load(&s->active), pausing = atomic_load(&s->pausing);
	uint64_t seq = atomic_load(&s->handler_seq), beat = atomic_load(&s->pause_beat);
	struct pollfd p = {.fd = g->uffd, .events = POLLIN};
	bool pending = active && poll(&p, 1, 0) == 1 && (p.revents & POLLIN);

	if (!pausing || beat != g->rescue_beat)
		g->rescued = false;
	/* A fault counts from the tick that saw it first. */
	bool bad = stalled(&g->pending, pending && g->seen_pending, seq, dt);

	g->seen_pending = pending;
	bad |= stalled(&g->served, active && (seq & 1), seq, dt);
	bad |= stalled(&g->paused, pausing, beat, dt);
	if (bad)
		revoke_slot(g, s);
}

static bool anything_due(void)
{
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++)
		if (wd.slots[i].used && (atomic_load(&wd.shared->slots[i].active) ||
						atomic_load(&wd.shared->slots[i].pausing)))
			return true;
	return false;
}

/* What stalled before a sleep has nothing to do with what comes after it. */
static void start_ticking(void)
{
	wd.last_tick = ffs_now_ns();
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++) {
		struct guarded *g = &wd.slots[i];

		g->pending.ns = g->served.ns = g->paused.ns = 0;
		g->seen_pending = false;
	}
}

static void tick(void)
{
	uint64_t now = ffs_now_ns(), dt = now - wd.last_tick;

	wd.last_tick = now;
	/* When the whole machine stood still, the daemon could not run either: a long gap counts as two
	 * ticks. */
	if (dt > 2 * TICK_NS)
		dt = 2 * TICK_NS;
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++)
		if (wd.slots[i].used)
			tick_slot(&wd.slots[i], &wd.shared->slots[i], dt);
}

/* ---- requests ---- */

static int check_request(const struct ffs_wd_request *q)
{
	if (q->op == FFS_WD_HELLO)
		return 0;
	if (q->slot >= FFS_WD_SLOTS || q->n_spans > FFS_MAX_REGIONS)
		return -EINVAL;
	return wd.slots[q->slot].used == (q->op != FFS_WD_ADD) ? 0 : -EINVAL;
}

static void take_over(struct guarded *g, const struct ffs_wd_request *q, int fds[FFS_MSG_FDS])
{
	ffs_close_fd(&g->uffd);
	ffs_close_fd(&g->sock);
	g->uffd = ffs_steal_fd(&fds[0]);
	if (q->has_sock)
		g->sock = ffs_steal_fd(&fds[1]);
	g->rescue = q->rescue;
	g->n_spans = q->n_spans;
	memcpy(g->spans, q->spans, sizeof(g->spans));
	g->seen_pending = g->rescued = false;
	g->pending = g->served = g->paused = (struct stall){0};
}

static void end_slot(struct guarded *g)
{
	const struct ffs_wd_reply ok = {0};

	ffs_close_fd(&g->uffd);
	ffs_close_fd(&g->sock);
	g->used = false;
	answer(&g->remove_reply, &ok);
}

static void serve(const struct ffs_wd_request *q, int fds[FFS_MSG_FDS], int *reply_sock)
{
	struct ffs_wd_reply reply = {.code = check_request(q)};
	struct guarded *g = &wd.slots[q->slot < FFS_WD_SLOTS ? q->slot : 0];

	if (reply.code == 0 && q->op == FFS_WD_HELLO) {
		wd.event = ffs_steal_fd(&fds[0]);
		reply.locked = lock_memory();
		reply.oom_protected = ffs_helper_oom_protect();
	} else if (reply.code == 0 && q->op == FFS_WD_ADD) {
		*g = (struct guarded){.used = true, .uffd = -1, .sock = -1, .remove_reply = -1};
		take_over(g, q, fds);
	} else if (reply.code == 0 && q->op == FFS_WD_REPLACE) {
		take_over(g, q, fds); /* `revoked` stays: branches of before may still be copied */
	} else if (reply.code == 0 && q->op == FFS_WD_REMOVE) {
		ffs_close_fd(&g->uffd);
		g->remove_reply = ffs_steal_fd(reply_sock);
		/* a rescuer has the control socket too: the answer waits for its end */
		if (!g->rescuer)
			end_slot(g);
		return;
	} else if (reply.code == 0) {
		reply.code = -EINVAL;
	}
	answer(reply_sock, &reply);
}

/* False at the end of file: the daemon is dead. */
static bool take_request(void)
{
	static struct ffs_wd_request q;
	int fds[FFS_MSG_FDS], reply_sock = -1;
	int r = ffs_msg_recv(wd.sock, &q, sizeof(q), fds);

	if (r == -EPROTO)
		return true;
	if (r < 0)
		return false;
	for (unsigned i = 0; i < FFS_MSG_FDS; i++) /* the last one is the answer's */
		if (fds[i] >= 0 && (i + 1 == FFS_MSG_FDS || fds[i + 1] < 0))
			reply_sock = ffs_steal_fd(&fds[i]);
	serve(&q, fds, &reply_sock);
	ffs_close_fd(&reply_sock);
	for (unsigned i = 0; i < FFS_MSG_FDS; i++)
		ffs_close_fd(&fds[i]);
	return true;
}

static void reap(void)
{
	struct signalfd_siginfo info;
	pid_t pid;

	while (read(wd.children, &info, sizeof(info)) > 0)
		;
	while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
		for (unsigned i = 0; i < FFS_WD_SLOTS; i++) {
			struct guarded *g = &wd.slots[i];

			if (g->rescuer != pid)
				continue;
			g->rescuer = 0;
			if (g->used && g->remove_reply >= 0)
				end_slot(g);
		}
}

/* ---- the process ---- */

static void daemon_died(void)
{
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++)
		if (wd.slots[i].used)
			ffs_close_fd(&wd.slots[i].uffd);
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++)
		if (wd.slots[i].used)
			ffs_priority_return(&wd.shared->slots[i].lent);
	/* All memory is free; now those that are stopped, side by side: a VMM that does not answer delays
	 * nobody else. */
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++)
		if (wd.slots[i].used && atomic_load(&wd.shared->slots[i].pausing))
			start_rescue(&wd.slots[i]);
	while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
		;
}

static bool set_up(int sock, struct ffs_wd_shared *shared)
{
	sigset_t child;
	struct sched_param high = {.sched_priority = WATCHDOG_PRIORITY};
	const struct rlimit none = {0, 0};

	wd.shared = shared;
	wd.sock = sock;
	wd.event = -1; /* comes with HELLO */
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	wd.children = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	if (wd.children < 0 || prctl(PR_SET_DUMPABLE, 0) < 0 || setrlimit(RLIMIT_CORE, &none) < 0)
		return false;
	/* Best effort: a handler that spins with real-time priority is one of the things we are here for. */
	if (sched_setscheduler(0, SCHED_RR, &high) < 0)
		errno = 0;
	wd.last_tick = ffs_now_ns();
	return true;
}

void ffs_watchdog_body(int sock, void *arg)
{
	bool awake = false;

	if (!set_up(sock, arg))
		_exit(74);
	for (;;) {
		struct pollfd p[3] = {{.fd = wd.sock, .events = POLLIN}, {.fd = wd.event, .events = POLLIN},
			{.fd = wd.children, .events = POLLIN}};

		/* First say that we sleep, then look: a poke that we do not see here sees that we sleep, and
		 * writes the eventfd. */
		if (!awake || !anything_due()) {
			atomic_store(&wd.shared->sleeping, 1);
			awake = anything_due();
			if (awake) {
				atomic_store(&wd.shared->sleeping, 0);
				start_ticking();
			}
		}
		int wait = awake ? ffs_ms_until(wd.last_tick + TICK_NS) : -1;

		if (poll(p, 3, wait) < 0 && errno != EINTR)
			_exit(75);
		if (p[1].revents) {
			eventfd_t n;

			if (eventfd_read(wd.event, &n) < 0)
				errno = 0; /* somebody else's poke was counted into the one we have read */
		}
		if (p[2].revents)
			reap();
		if (p[0].revents && !take_request()) {
			daemon_died();
			return;
		}
		if (awake && ffs_now_ns() >= wd.last_tick + TICK_NS)
			tick();
	}
}
