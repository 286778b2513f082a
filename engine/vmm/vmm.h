/* What the engine asks of a VMM: one table of operations per driver (qemu, firecracker, coop).
 *
 * One struct ffs_vmm is one connection to one VMM process, owned by its sandbox. All operations but
 * `run_state` and `rescue` are called by one thread at a time (the sandbox's protocol lock); a driver may run
 * its own reader thread. Deadlines are ffs_now_ns() values. While an operation waits it calls
 * vmm->beat(vmm->beat_arg) at least every 100 ms (see uffd/watchdog.h), so that the watchdog can tell a slow
 * VMM from a stopped daemon. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "base/util.h"
#include "forkfs-engine.h"

#define FFS_MAX_REGIONS 64
#define FFS_MAX_GPA_RANGES 64

enum ffs_region_kind {
	FFS_REGION_SHARED,    /* MAP_SHARED of a memfd / shmem file: read through its file */
	FFS_REGION_ANONYMOUS, /* private anonymous: read with process_vm_readv */
	FFS_REGION_PRIVATE,   /* MAP_PRIVATE of a file: read with process_vm_readv */
};

/* A piece of guest memory that is contiguous in the VMM's address space and in memory.bin. */
struct ffs_region {
	char name[64];      /* of the RAM block */
	uint64_t hva;       /* in the VMM's address space, page_size aligned */
	uint64_t size;      /* bytes, multiple of page_size */
	uint64_t offset;    /* in memory.bin */
	uint64_t page_size; /* 4096, or the huge page size of a hugetlb mapping */
	enum ffs_region_kind kind;
	/* identity of the mapping in /proc/PID/maps, compared again before each branch and after settle */
	uint64_t dev, ino;
	uint64_t file_offset; /* of hva in the mapped file */
	bool mergeable;       /* smaps VmFlags has "mg": KSM may drop the protection */
};

/* Where a piece of memory.bin lies in the guest's physical address space. One region may appear in several.
 */
struct ffs_gpa_range {
	uint64_t gpa, size, offset; /* offset in memory.bin */
};

struct ffs_geometry {
	unsigned n_regions, n_ranges;
	uint64_t memory_size; /* of memory.bin: the sum of the regions */
	struct ffs_region regions[FFS_MAX_REGIONS];
	struct ffs_gpa_range ranges[FFS_MAX_GPA_RANGES];
};

struct ffs_vmm;

struct ffs_vmm_ops {
	const char *kind; /* "qemu" */

	/* Connect and identify. Fills vmm->proc. May take seconds; outside any pause. */
	int (*connect)(const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_vmm **out,
		struct ffs_error *err);
	/* Read the geometry from the VMM and from /proc/PID/maps and check one against the other. Running
	 * guest. */
	int (*geometry)(struct ffs_vmm *vmm, struct ffs_geometry *out, struct ffs_error *err);
	/* The userfaultfd of its address space that the VMM handed over with the geometry: the caller's, with
	 * or without UFFDIO_API done. NULL: such a VMM does not, one is injected. */
	int (*uffd)(struct ffs_vmm *vmm, int *uffd, struct ffs_error *err);
	/* Before each branch, guest running or paused by others: everything that would make the branch
	 * impossible (migration blockers, device state that vmstate does not carry), refused here; stages
	 * what the save needs (vmstate_fd: an empty memfd opened read-write, owned by the caller, that save
	 * will fill). Tells in *was_running whether it runs now. */
	int (*prepare)(struct ffs_vmm *vmm, int vmstate_fd, bool *was_running, struct ffs_error *err);
	/* Stop vCPUs and drain device I/O: returns when it has happened. A deadline that passes: -ETIMEDOUT.
	 * A VM that is already stopped is left as it is, and resume will leave it so. */
	int (*pause)(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err);
	/* Device state into the staged vmstate_fd. After it nothing of the VMM touches guest memory until
	 * resume. */
	int (*save)(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err);
	/* Undo pause: run again, return when it runs. Nothing when pause did not stop it (not called, found
	 * stopped), so it may be called on every path, also after an operation that failed. Retries what is
	 * worth retrying until the deadline, over a new connection if need be. Idempotent. */
	int (*resume)(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err);
	/* After resume, whatever happened: release what prepare staged. */
	void (*finish)(struct ffs_vmm *vmm);
	/* Last known state, kept fresh by events; any thread; never waits. */
	enum ffs_run_state (*run_state)(struct ffs_vmm *vmm);
	/* The control socket the watchdog gets a duplicate of; -1: none now. Another one each time
	 * vmm->socket_generation has moved (prepare and resume may reconnect): ffs_watchdog_replace() then.
	 */
	int (*socket)(struct ffs_vmm *vmm);
	/* In the watchdog process, on its duplicate: ask the run state and, if the VM is in a state that our
	 * pause leaves behind, make it run; 0 when it runs. No threads, no reliance on daemon state; must end
	 * by the deadline. */
	int (*rescue)(int sock, uint64_t deadline_ns);
	/* Extra keys for status and manifest: version, command_line, accelerator, vmstate kind. `obj` is a
	 * json_object. */
	void (*describe)(struct ffs_vmm *vmm, struct json_object *obj);
	void (*close)(struct ffs_vmm *vmm);
};

/* The head of every driver's own struct. */
struct ffs_vmm {
	const struct ffs_vmm_ops *ops;
	struct ffs_proc_id proc; /* of the VMM process */
	void (*beat)(void *arg); /* may be NULL */
	void *beat_arg;
	void (*on_gone)(void *arg); /* the VMM's process has ended; any thread; must not block; may be NULL */
	void *on_gone_arg;
	/* set by the sandbox when the watchdog has talked over its duplicate (a revocation): the next prepare
	 * reconnects */
	_Atomic bool suspect;
	/* moved by the driver at each new connection */
	unsigned socket_generation;
	/* set by save and resume, cleared by prepare: the VM ran before we let it, so what was captured in
	 * this pause is void */
	bool resumed_by_others;
};

extern const struct ffs_vmm_ops ffs_qemu_ops, ffs_coop_ops, ffs_firecracker_ops;
