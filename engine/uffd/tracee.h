/* Private to engine/uffd: one thread of another process, borrowed with ptrace for a few system calls and
 * given back as it was.
 *
 * The order is seize, stop, prepare, syscall (any number), release; release may follow any of them and must.
 * One thread calls all of it (ptrace belongs to the thread that seized), with every signal blocked. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#include "base/error.h"

struct ffs_tracee {
	pid_t pid, tid;
	bool seized, stopped;
	bool gone;       /* exited or killed: nothing is left to put back */
	bool prepared;   /* saved and mask are valid, registers may differ from them */
	bool in_call;    /* stopped at the entry of a system call, which will run when it is let go */
	int stop_signal; /* of a signal-delivery stop in which the thread was caught; goes with the detach */
	struct user_regs_struct saved;
	uint64_t mask; /* blocked signals */
	uint64_t insn; /* address of a syscall instruction */
};

/* Attach without stopping. -EPERM without a sentence: not allowed (whose fault is the caller's business);
 * -ENOTSUP: the thread has a seccomp filter and suspending it is not allowed; -ESRCH. */
int ffs_tracee_seize(struct ffs_tracee *t, pid_t pid, pid_t tid, struct ffs_error *err);

/* Ask it to stop and wait until it does: 0, -ETIMEDOUT (call again, or release), -ESRCH. */
int ffs_tracee_stop(struct ffs_tracee *t, uint64_t deadline_ns);

/* Stopped: save its registers and signal mask, find a syscall instruction, block its signals. -ENOTSUP:
 * 32-bit code; -EAGAIN: not at this place (inside a restartable sequence). */
int ffs_tracee_prepare(struct ffs_tracee *t, struct ffs_error *err);

/* Let it make one system call. *result is what the kernel returned (-errno included). 0 or -errno when it
 * could not be made. Waits as long as the call takes: giving up in the middle would damage the target. */
int ffs_tracee_syscall(
	struct ffs_tracee *t, long nr, const uint64_t args[6], long *result, struct ffs_error *err);

/* Its memory, by words: len is a multiple of 8. Works on read-only mappings. 0 or -errno. */
int ffs_tracee_peek(struct ffs_tracee *t, uint64_t addr, void *buf, size_t len);
int ffs_tracee_poke(struct ffs_tracee *t, uint64_t addr, const void *buf, size_t len);

/* Put registers and signal mask back and let it run. A thread that never stopped is let go when this process
 * ends. */
void ffs_tracee_release(struct ffs_tracee *t);
