/* Owns the engine: the two helper processes, the list of sandboxes, what happens when this process gets a
 * fatal signal.
 *
 * Threads: ffs_engine_new() before any exists, the rest from any. Lock: engine->lock guards the list only. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "branch/internal.h"
#include "branch/sandbox.h"

/* Every uffd of this process, +1 (0: free). A guest whose memory is protected hangs as long as a uffd is
 * open, and a process that dumps core keeps its descriptors for seconds; a signal handler may only read these
 * and close. */
static atomic_int fatal_fds[FFS_WD_SLOTS * 2];

void ffs_engine_fatal_add(int uffd)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(fatal_fds); i++) {
		int none = 0;

		if (atomic_compare_exchange_strong(&fatal_fds[i], &none, uffd + 1))
			return;
	}
	ffs_log(FFS_LOG_WARN, "more than %zu userfaultfds: a crash will wait for the watchdog",
		FFS_ARRAY_LEN(fatal_fds));
}

void ffs_engine_fatal_remove(int uffd)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(fatal_fds); i++) {
		int mine = uffd + 1;

		if (atomic_compare_exchange_strong(&fatal_fds[i], &mine, 0))
			return;
	}
}

static void on_fatal(int sig)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(fatal_fds); i++) {
		int fd = atomic_load(&fatal_fds[i]) - 1;

		/* by the system call: other threads are using it, and shall be cut off */
		if (fd >= 0)
			syscall(SYS_close, fd);
	}
	/* SA_RESETHAND put the default back: the signal kills on return (faults) or now (abort, raise) */
	raise(sig);
}

static int catch_fatal_signals(struct ffs_error *err)
{
	static const int fatal[] = {
		SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGSYS, SIGTRAP, SIGQUIT, SIGXCPU, SIGXFSZ};
	struct sigaction sa = {.sa_handler = on_fatal, .sa_flags = SA_RESETHAND | SA_NODEFER | SA_ONSTACK};

	sigemptyset(&sa.sa_mask);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(fatal); i++)
		if (sigaction(fatal[i], &sa, NULL) < 0)
			return ffs_error_errno(err, errno, "cannot catch signal %d", fatal[i]);
	return 0;
}

int ffs_engine_new(struct ffs_engine **out, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_engine *engine = calloc(1, sizeof(*engine));

	if (!engine)
		return ffs_error_set(err, ENOMEM, "out of memory");
	/* guest memory passes through this process: no core files of it, no ptrace by its user's other
	 * processes */
	if (prctl(PR_SET_DUMPABLE, 0) < 0)
		return ffs_error_errno(err, errno, "cannot forbid core dumps");
	int e = ffs_spawner_start(&engine->spawner, err);

	if (e < 0)
		return e;
	engine->budget = ffs_budget_new();
	engine->permits = ffs_permits_new(0);
	if (!engine->budget || !engine->permits)
		e = ffs_error_set(err, ENOMEM, "out of memory");
	if (e == 0)
		e = ffs_watchdog_start(&engine->watchdog, err);
	if (e == 0)
		e = catch_fatal_signals(err);
	if (e < 0) {
		if (engine->watchdog)
			ffs_watchdog_stop(engine->watchdog);
		ffs_spawner_stop(engine->spawner);
		ffs_budget_unref(engine->budget);
		ffs_permits_unref(engine->permits);
		return e;
	}
	/* code and stacks of the fault path must not wait for a disk; with too low a limit they may, and
	 * doctor says so */
	if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) < 0)
		ffs_log(FFS_LOG_INFO, "memory is not locked (%s): raise RLIMIT_MEMLOCK", strerror(errno));
	pthread_mutex_init(&engine->lock, NULL);
	*out = ffs_steal_ptr(&engine);
	return 0;
}

void ffs_engine_limit(struct ffs_engine *engine, const struct ffs_engine_limits *limits)
{
	ffs_budget_set_limit(engine->budget, limits->memory);
	ffs_permits_set_limit(engine->permits, limits->captures);
}

void ffs_engine_usage(struct ffs_engine *engine, struct ffs_engine_usage *out)
{
	ffs_budget_usage(engine->budget, &out->limits.memory, &out->memory_taken, &out->memory_reserved);
	ffs_permits_count(engine->permits, &out->limits.captures, &out->captures, &out->waiting);
}

bool ffs_engine_has_room(struct ffs_engine *engine, uint64_t bytes)
{
	return ffs_budget_fits(engine->budget, bytes);
}

uint64_t ffs_engine_frees(struct ffs_engine *engine)
{
	return ffs_budget_frees(engine->budget);
}

void ffs_engine_await_free(struct ffs_engine *engine, uint64_t seen, uint64_t deadline_ns)
{
	ffs_budget_await_free(engine->budget, seen, deadline_ns);
}

void ffs_engine_unref(struct ffs_engine *engine)
{
	if (!engine)
		return;
	for (;;) {
		pthread_mutex_lock(&engine->lock);
		struct ffs_sandbox *sb = engine->sandboxes;
		bool empty = !sb;

		/* one whose last reference is just going takes itself off the list */
		if (sb && !ffs_sandbox_tryref(sb))
			sb = NULL;
		pthread_mutex_unlock(&engine->lock);
		if (empty)
			break;
		if (!sb) {
			sched_yield();
			continue;
		}
		ffs_sandbox_detach(sb);
		ffs_sandbox_unref(sb);
	}
	ffs_watchdog_stop(engine->watchdog);
	ffs_spawner_stop(engine->spawner);
	ffs_budget_unref(engine->budget);
	ffs_permits_unref(engine->permits);
	pthread_mutex_destroy(&engine->lock);
	free(engine);
}
