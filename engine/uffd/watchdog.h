/* The watchdog: a tiny process that lets guests go when the daemon died, was stopped, or hangs.
 *
 * One thread, mlocked, oom_score_adj -1000, no FUSE, never a core dump. For each sandbox (a slot) it holds
 * duplicates of the uffd and of the VMM's control socket, and shares a page of counters with the daemon:
 *   - daemon dead (end of file on the socket): for every slot, close the uffd; where `pausing` is set ask the
 *     VMM for its run state and resume it (driver's rescue); end.
 *   - a fault pending or being served for more than FFS_WD_STALL_NS without `handler_seq` moving, or a pause
 *     whose `pause_beat` did not move for that long: set `revoked`, unregister every range, resume if pausing.
 *     The daemon sees `revoked` after every copy and fails the branches of that slot.
 *
 * It sleeps without a timer while no slot is `active`. */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#include "base/error.h"
#include "uffd/priority.h"
#include "vmm/vmm.h"

#define FFS_WD_SLOTS 256
#define FFS_WD_STALL_NS (500 * FFS_NS_PER_MS)

/* Shared memory, one per sandbox, its own cache lines. Written by the daemon except `revoked`. */
struct ffs_wd_slot {
	_Alignas(128) _Atomic uint32_t active; /* protection may be on: faults must be served */
	_Atomic uint32_t pausing; /* we stopped the VM, or are about to: set before the stop, cleared once it
				     runs again */
	_Atomic uint32_t revoked; /* watchdog: protection is gone, every capture of this slot is void */
	_Atomic uint64_t handler_seq; /* odd while the fault handler works on events, even while it waits */
	_Atomic uint64_t pause_beat; /* moved at the begin of a pause and, by whoever holds it, at least every
					100 ms */
	struct ffs_lent lent; /* given back by the watchdog when it revokes, and when the daemon died */
};

struct ffs_watchdog;

/* Fork the watchdog. Before threads, before any uffd. */
int ffs_watchdog_start(struct ffs_watchdog **out, struct ffs_error *err);
/* Orderly end: every slot must have been removed. */
void ffs_watchdog_stop(struct ffs_watchdog *wd);

/* Give it a sandbox: duplicates of uffd and sock (sock may be -1), the ranges to release, the driver's
 * rescue. Returns a slot in *out owned by the caller until ffs_watchdog_remove(). Returns when the watchdog
 * has them. Any thread. */
int ffs_watchdog_add(struct ffs_watchdog *wd, int uffd, int sock, const struct ffs_vmm_ops *ops,
	const struct ffs_geometry *geo, struct ffs_wd_slot **out, struct ffs_error *err);
/* Replace the duplicates of a slot (a new connection). A revoked slot stays revoked: remove it and add
 * another. */
int ffs_watchdog_replace(struct ffs_watchdog *wd, struct ffs_wd_slot *slot, int uffd, int sock,
	const struct ffs_geometry *geo, struct ffs_error *err);
/* Take it back: returns when the watchdog has closed its duplicates. */
void ffs_watchdog_remove(struct ffs_watchdog *wd, struct ffs_wd_slot *slot);
/* After setting active or pausing: make it look at the slots now (it sleeps otherwise). Cheap; no system call
 * when it is awake. */
void ffs_watchdog_poke(struct ffs_watchdog *wd);
