/* Real-time priority lent to the VMM's threads for the length of a pause.
 *
 * On loaded CPUs the pause is mostly the VMM's threads waiting for a CPU: stopping needs each vCPU to run
 * once, and so does saving where vCPU threads save their own state (Firecracker, QEMU with KVM); the rest is the
 * main thread's or an API thread's. So they get SCHED_RR from just before the stop until the guest runs, vCPUs
 * only until just before the resume: a vCPU that runs freely with it would starve the host. What was lent
 * stands in shared memory before it is lent, so that the watchdog gives it back when the daemon cannot. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define FFS_LENT_THREADS 96

struct ffs_lent {
	_Atomic uint32_t n; /* entries that may have been lent to; 0: nothing to give back */
	uint32_t found;     /* entries of `thread` */
	struct {
		int32_t tid, policy; /* as sched_getscheduler(2) says, reset-on-fork bit included */
		uint8_t vcpu;
	} thread[FFS_LENT_THREADS];
};

/* Note the threads of a VMM that run with an ordinary policy. Outside the pause; at most FFS_LENT_THREADS
 * (the rest stays as it is). */
void ffs_priority_find(struct ffs_lent *l, pid_t pid);
/* Lend to all that were found. False when the kernel forbids it (no CAP_SYS_NICE, RLIMIT_RTPRIO, RT groups):
 * nothing is lent then. */
bool ffs_priority_lend(struct ffs_lent *l);
/* Take it back from the vCPU threads; then from all. Idempotent, async-signal-safe, any process with the
 * right. */
void ffs_priority_return_vcpus(struct ffs_lent *l);
void ffs_priority_return(struct ffs_lent *l);

/* Give the calling thread SCHED_RR with this priority above what is lent (0: nothing special again); false
 * when that is forbidden. */
bool ffs_priority_self(int above);
