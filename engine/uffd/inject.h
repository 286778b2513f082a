/* One system call made by another process: userfaultfd(2) (or madvise(2)) injected into a VMM with ptrace.
 *
 * Runs in a process of its own that outlives a killed daemon: ffs_spawner_start() forks a small helper before
 * any uffd exists, which forks one short-lived injector per request. */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "base/util.h"

struct ffs_spawner;

/* Fork the helper. Call before threads and before any uffd exists. It ends when the last copy of the daemon's
 * end of its socket is closed; an injection under way is finished first. */
int ffs_spawner_start(struct ffs_spawner **out, struct ffs_error *err);
void ffs_spawner_stop(struct ffs_spawner *sp);

/* Create a userfaultfd in the VMM's address space and receive it; the VMM's own copy is closed again. Nothing
 * of the target's memory, registers, signals or descriptors is different afterwards, whatever happened (a
 * thread that was blocked in a call which the kernel does not restart, such as epoll_wait, sees one EINTR, as
 * after SIGSTOP and SIGCONT). Injections into different processes run side by side, those into one wait for
 * each other; typically under 1 ms, at most timeout_ns. *uffd is owned by the caller (close-on-exec,
 * non-blocking), UFFDIO_API not yet done. Errors: ESRCH (gone, or another process has the pid now), EBUSY
 * (another tracer is attached: named), EPERM (which privilege is missing, remedy), ETIMEDOUT (every usable
 * thread is in uninterruptible sleep), ENOSYS… with the sentence. Any thread. */
int ffs_inject_userfaultfd(struct ffs_spawner *sp, struct ffs_proc_id target, uint64_t timeout_ns, int *uffd,
	struct ffs_error *err);

/* Inject madvise(addr, len, advice) (MADV_UNMERGEABLE against KSM). Same rules. */
int ffs_inject_madvise(struct ffs_spawner *sp, struct ffs_proc_id target, uint64_t addr, uint64_t len,
	int advice, uint64_t timeout_ns, struct ffs_error *err);
