/* The structures of branch/, shared by its files only.
 *
 *     struct ffs_sandbox   one attached VM: driver, geometry, who may take a branch now
 *     struct ffs_tracker   one userfaultfd of that VM: pages, the fault handler thread, the copier threads, the
 *                          branches in flight. Replaced by a new one when the watchdog revoked it or the VM's
 *                          memory changed shape
 *     struct ffs_branch    one instant: image, vmstate, state, waiters
 *
 * Lock order (outer to inner): engine->lock, sandbox->lock, tracker->lock, branch->lock, cluster locks
 * (ascending). tracker->reading is held by readers of a branch in flight, with cluster locks below it and
 * nothing above. None of the mutexes is held while a cluster is copied, across I/O with the VMM, or by the
 * fault handler thread, which takes cluster locks only. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/cancel.h"
#include "base/permits.h"
#include "base/util.h"
#include "branch/budget.h"
#include "branch/image.h"
#include "branch/layer.h"
#include "branch/lineage.h"
#include "branch/pages.h"
#include "disk/disks.h"
#include "forkfs-engine.h"
#include "guest/memory.h"
#include "uffd/inject.h"
#include "uffd/watchdog.h"
#include "vmm/vmm.h"

#define FFS_SLOTS 8            /* branches of one sandbox in flight */
#define FFS_COPIERS 2          /* threads at most */
#define FFS_LATENCY_BUCKETS 20 /* powers of two of a microsecond: <1, <2, <4 … */
#define FFS_PAUSE_LIMIT_NS (2 * FFS_NS_PER_S)
/* Why a branch, or a take, ends with ETIMEDOUT whose guest the watchdog did not let wait; with the VM's name. */
#define FFS_LET_GO "the watchdog let the guest of %s go: the daemon did not serve its writes for 500 ms"

struct ffs_engine {
	struct ffs_spawner *spawner;
	struct ffs_watchdog *watchdog;
	struct ffs_budget *budget;   /* of images */
	struct ffs_permits *permits; /* to capture */
	pthread_mutex_t lock;        /* the list */
	struct ffs_sandbox *sandboxes;
};

/* Close a tracker's uffd from a fatal-signal handler: async-signal-safe table (engine.c). */
void ffs_engine_fatal_add(int uffd);
void ffs_engine_fatal_remove(int uffd);

/* A place for a branch in flight. `branch` is valid for whoever raised `users` before loading it (slot_get in
 * capture.c); clearing it waits until users is 0. So the fault path needs no lock to look at the branches. */
struct ffs_slot {
	_Atomic(struct ffs_branch *) branch;
	_Atomic uint32_t users;
	bool reserved; /* under tracker->lock: by a take under way or a branch in flight */
};

struct ffs_tracker {
	atomic_uint refs;
	int uffd, event, pidfd; /* event: wakes the handler thread to end */
	struct ffs_proc_id proc;
	struct ffs_geometry geo;
	struct ffs_pages *pages;
	struct ffs_memory *memory; /* NULL once the tracker has ended; readers of branches hold `reading` */
	pthread_rwlock_t reading;
	void *fault_buf; /* the handler's, mlocked */
	struct ffs_watchdog *watchdog;
	struct ffs_wd_slot *wd;
	unsigned socket_generation; /* of the control socket the watchdog has a duplicate of */
	bool track;

	struct ffs_slot slots[FFS_SLOTS];
	_Atomic uint32_t taking;  /* a take is between pre-arm and armed: copiers do not release pages */
	_Atomic uint32_t hold;    /* between pause and resume: copiers stand still; changes under lock */
	_Atomic uint32_t removes; /* UFFD_EVENT_REMOVE/UNMAP/REMAP seen: a take that spans one fails */
	_Atomic uint32_t gone;    /* the VMM exited */
	_Atomic uint64_t rounds;  /* of the handler: batches of events that are served */
	_Atomic uint64_t faults, fault_max_ns; /* of the tracker's life */

	pthread_mutex_t lock;   /* below */
	pthread_cond_t work;    /* copiers: something in `slots`, or ending */
	pthread_cond_t changed; /* a slot became free, or protection was released */
	bool ending;
	bool registered;    /* all ranges are registered with the uffd */
	bool touched;       /* some may be: after a registration or a release that was not completed */
	bool releasing;     /* a copier is unregistering */
	unsigned in_flight; /* armed branches */
	/* whose pages the next one shares, and who comes after it: references; NULL: none (lineage.h) */
	struct ffs_layer *parent, *heir;
	struct ffs_error end_reason;

	pthread_t handler, copiers[FFS_COPIERS];
	unsigned n_copiers;
	bool handler_started;
	_Atomic bool handler_rt; /* it has real-time priority */
};

enum ffs_branch_fail { FFS_FAIL_NONE, FFS_FAIL_SETTING, FFS_FAIL_SET };

struct ffs_phases {
	uint64_t scan_ns, prearm_ns, converge_ns, stop_ns, vmstate_ns, arm_ns, disks_ns, resume_ns, pause_ns,
		capture_ns;
	uint64_t converge_rounds, dirty_at_pause;
	bool priority_lent;
};

struct ffs_branch {
	atomic_uint refs;  /* of the memory: users as one, the slot, the copiers */
	atomic_uint users; /* ffs_branch_ref/_unref */
	char id[37], sandbox[65], name[65];
	uint64_t instant_wall_ns, armed_ns;
	struct ffs_geometry geo;
	struct ffs_image image;
	struct ffs_budget *budget;              /* a reference */
	uint64_t memory_reserved, memory_taken; /* of it; change under lock */
	struct ffs_permits *permits;            /* a reference and a permit, until it settles; NULL: none */
	int vmstate_fd;
	uint64_t vmstate_size;
	const char *vmm_kind;         /* static */
	struct json_object *vmm;      /* what the driver said: read-only */
	struct json_object *torn;     /* sentences of what was overruled by force; NULL: nothing; read-only */
	struct ffs_disk_images disks; /* fixed once the branch was taken */
	enum ffs_branch_mode mode;
	struct ffs_layer *layer; /* a use and a reference; NULL without tracking; fixed */
	uint64_t shared_bytes;   /* of memory that are the parent's */
	bool has_parent;         /* for the thread that takes it, both */
	bool heir;               /* before the instant: there is one; from it on: it is the one */
	struct ffs_phases phases;

	struct ffs_tracker *tracker; /* a reference, until the branch is freed */
	unsigned slot;
	_Atomic ffs_mask *need[FFS_MAX_REGIONS]; /* per cluster; cleared under its lock, after the image has
						    the bytes */
	_Atomic uint8_t *zeros[FFS_MAX_REGIONS]; /* per slice: zero pages were captured */
	_Atomic uint64_t remaining;              /* bytes not in the image yet */
	_Atomic uint64_t next_slice, slices_done;
	uint64_t max_rate;     /* of the copiers, bytes a second; 0: none */
	uint64_t next_copy_ns; /* not before; under tracker->lock */
	_Atomic uint64_t faults, fault_max_ns, latency[FFS_LATENCY_BUCKETS];

	_Atomic int failing; /* enum ffs_branch_fail: set by the first to fail it, from any thread, the fault
				handler too */
	struct ffs_error failure; /* valid once failing is FFS_FAIL_SET */
	_Atomic uint32_t finalising;
	_Atomic uint32_t late; /* pages that the mutant late-page left to the copier */

	_Atomic int state; /* enum ffs_branch_state; changes under lock */
	pthread_mutex_t lock;
	pthread_cond_t settled;
	struct ffs_branch_watch *watches;
	pthread_cond_t watch_done;
	struct ffs_branch_watch *running; /* whose fn is being called */
	pthread_t running_thread;
};

struct ffs_sandbox {
	atomic_uint refs;
	struct ffs_engine *engine;
	struct ffs_sandbox *next; /* engine's list, a weak one */
	char *name;
	bool track;
	bool force;                      /* every branch is taken although memory has other writers */
	struct ffs_proc_id proc;         /* of the VMM, also after detach */
	struct ffs_permit_owner permits; /* those of its takes that wait for one */
	struct ffs_disks *disks;         /* named at attach, fixed; NULL: none */
	struct ffs_vmm *vmm; /* used by whoever is `busy`; NULL once detached (changes under lock) */
	struct ffs_foreign_known *known; /* by the last scan; used by whoever is `busy` */

	pthread_mutex_t lock; /* below */
	pthread_cond_t idle;  /* busy became false */
	bool busy;            /* a take or a detach owns vmm and tracker */
	bool detached;
	struct ffs_tracker *tracker;
	struct ffs_geometry geo;
	uint64_t branches_taken;
	struct ffs_phases last;
	const char *vmm_kind; /* static */
	struct json_object *vmm_desc;
	struct json_object *findings; /* of the last scan */
};

/* ---- tracker.c ---- */
/* Inject, negotiate, open the memory, start the threads; nothing is registered yet. `vmm` gives process and
 * socket. */
int ffs_tracker_new(struct ffs_engine *engine, struct ffs_vmm *vmm, const struct ffs_geometry *geo,
	bool track, struct ffs_tracker **out, struct ffs_error *err);
/* Fail what is in flight with *reason, end the threads, release the guest, close the uffd and the watchdog's
 * duplicates and the VMM's memory. The struct lives on until its last reference. */
void ffs_tracker_end(struct ffs_tracker *t, const struct ffs_error *reason);
struct ffs_tracker *ffs_tracker_ref(struct ffs_tracker *t);
void ffs_tracker_unref(struct ffs_tracker *t);
/* The driver may have connected anew (prepare): the watchdog must hold the connection that works. */
int ffs_tracker_follow_socket(struct ffs_tracker *t, struct ffs_vmm *vmm, struct ffs_error *err);
/* Return when the handler has served every event that was queued before the call (or will never: revoked, VMM
 * gone). Not from the handler, and with no cluster lock held. */
void ffs_tracker_fence(struct ffs_tracker *t);
static inline bool ffs_tracker_revoked(const struct ffs_tracker *t)
{
	return atomic_load(&t->wd->revoked) != 0;
}

/* ---- capture.c ---- */
/* The branch in a slot, pinned until ffs_slot_put; NULL when there is none. */
struct ffs_branch *ffs_slot_get(struct ffs_slot *s);
void ffs_slot_put(struct ffs_slot *s);
/* Take a branch out of its slot and wait for those who work on it. Never from a thread that holds a slot. */
void ffs_slot_clear(struct ffs_slot *s);

/* With the locks of `n` clusters from `cluster` on held: copy what any branch in flight still needs of them
 * into every image that needs it. Branches whose image cannot be written fail, alone; of a branch that has
 * not failed nothing is missing afterwards. `buf`: pages->copy_max bytes; n at most the region's
 * clusters_per_copy. */
void ffs_tracker_capture_locked(
	struct ffs_tracker *t, unsigned region, uint64_t cluster, unsigned n, void *buf);
/* The same, and takes the locks. Whoever lost the race for a cluster waits for the winner and finds nothing
 * to do. */
void ffs_tracker_capture(struct ffs_tracker *t, unsigned region, uint64_t cluster, unsigned n, void *buf);
/* Move *cluster to the next one before `end` that the branch needs pages of: how many it is worth capturing
 * at once from there on, 0: none is left. */
unsigned ffs_tracker_needed(const struct ffs_tracker *t, const struct ffs_branch *b, unsigned region,
	uint64_t *cluster, uint64_t end);

/* ---- obtain.c ---- */
/* A userfaultfd of the VMM's address space with the features that branches need: injected, or what the VMM
 * handed over. */
int ffs_tracker_obtain(struct ffs_engine *engine, struct ffs_vmm *vmm, const struct ffs_geometry *geo,
	int *uffd, struct ffs_error *err);

/* ---- copier.c ---- */
void *ffs_copier_main(void *tracker);
/* Copiers stand still while on; off starts them on whatever is in flight. */
void ffs_copier_hold(struct ffs_tracker *t, bool on);
/* A branch failed, or was given up: who waits for its time to come settles it now. No locks held. */
void ffs_copier_poke(struct ffs_tracker *t);
/* Register every range (idempotent); waits for a release under way. From here on the watchdog watches. */
int ffs_tracker_register(struct ffs_tracker *t, struct ffs_error *err);
/* Unregister everything in slices, unless a branch is in flight or being taken, or tracking is on (and
 * whole).
 */
void ffs_tracker_release_idle(struct ffs_tracker *t);

/* ---- branch.c ---- */
/* Reserves the memory of its image: -ENOSPC. */
struct ffs_branch *ffs_branch_new(
	struct ffs_sandbox *sb, struct ffs_tracker *t, const char *name, struct ffs_error *err);
void ffs_branch_get(struct ffs_branch *b);
void ffs_branch_put(struct ffs_branch *b);
/* Mark it failed; the first reason stays. Any thread, the fault handler too: no lock, no allocation, no
 * waiting. */
void ffs_branch_fail(struct ffs_branch *b, int code, const char *fmt, ...) FFS_PRINTF(3, 4);
static inline bool ffs_branch_failed(struct ffs_branch *b)
{
	return atomic_load(&b->failing) != FFS_FAIL_NONE;
}
/* WRITING -> READY or FAILED, once: wakes waiters, calls watches. Not from the fault handler. */
void ffs_branch_settle(struct ffs_branch *b, enum ffs_branch_state state);
/* One served fault: for status and metrics. */
void ffs_branch_count_fault(struct ffs_branch *b, uint64_t ns);

/* ---- report.c ---- */
void ffs_report_phases(struct json_object *obj, const struct ffs_phases *p);
struct json_object *ffs_report_regions(const struct ffs_geometry *geo);
