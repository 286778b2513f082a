/* forkfs-engine: live branches of running virtual machines. The one public header of engine/; no FUSE in it.
 *
 * Objects are reference counted (_ref/_unref) and may be used from any thread. Durations are nanoseconds of
 * CLOCK_MONOTONIC and end in _ns, sizes are bytes. Functions return 0 (or a count) or -errno and describe a
 * failure in a struct ffs_error (base/error.h), untouched on success.
 *
 * ffs_engine_new() forks the two helper processes and must therefore run before the caller starts a thread.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

struct json_object;
struct ffs_engine;
struct ffs_sandbox;
struct ffs_branch;
struct ffs_cancel;

/* ---- engine ---- */

/* Fork the spawner (runs the injections) and the watchdog (lets guests go when this process dies or hangs),
 * install the fatal-signal handlers that close every userfaultfd, set PR_SET_DUMPABLE 0. Call once, before
 * any thread exists. */
int ffs_engine_new(struct ffs_engine **out, struct ffs_error *err);
/* Detach every sandbox (guests run on), end the helpers, free. Branches that are still referenced stay
 * readable. */
void ffs_engine_unref(struct ffs_engine *engine);

/* What all branches of an engine may take together. */
#define FFS_MEMORY_UNLIMITED UINT64_MAX
#define FFS_MEMORY_AUTO (UINT64_MAX - 1) /* what the machine has left at the time, but for a sixteenth */
struct ffs_engine_limits {
	uint64_t memory;   /* bytes of images, settled or in flight; or one of the above. ENOSPC beyond */
	unsigned captures; /* in flight at once; further ones wait their turn, a sandbox after the other. 0:
			      any number */
};
/* Without it: no limits. For branches taken from now on. */
void ffs_engine_limit(struct ffs_engine *engine, const struct ffs_engine_limits *limits);

struct ffs_engine_usage {
	struct ffs_engine_limits limits;
	uint64_t memory_taken;    /* by images that are complete, until their last user is gone */
	uint64_t memory_reserved; /* for captures in flight: as much as each can need */
	unsigned captures, waiting;
};
void ffs_engine_usage(struct ffs_engine *engine, struct ffs_engine_usage *out);

/* Whether an image of so many bytes would be let in now. */
bool ffs_engine_has_room(struct ffs_engine *engine, uint64_t bytes);
/* How many images were freed so far, and waiting until there are more than `seen` or the deadline has come.
 */
uint64_t ffs_engine_frees(struct ffs_engine *engine);
void ffs_engine_await_free(struct ffs_engine *engine, uint64_t seen, uint64_t deadline_ns);

/* ---- cancellation ---- */

/* One per request that may wait. ffs_cancel_set() may be called from any thread (FUSE's interrupt), once or
 * often; the call that was given the object then returns -EINTR within a second, with everything put back. */
struct ffs_cancel *ffs_cancel_new(void);
struct ffs_cancel *ffs_cancel_ref(struct ffs_cancel *c);
void ffs_cancel_unref(struct ffs_cancel *c);
void ffs_cancel_set(struct ffs_cancel *c);

/* ---- sandboxes ---- */

enum ffs_run_state { FFS_RUN_RUNNING, FFS_RUN_PAUSED, FFS_RUN_EXITED };
/* "running" | "paused" | "exited" */
const char *ffs_run_state_name(enum ffs_run_state s);

#define FFS_MAX_DISKS 16

/* A disk of the VM that belongs to its branches: an image file that the VMM has open. */
struct ffs_disk_name {
	const char *id;   /* ffs_check_name() */
	const char *path; /* absolute */
};

struct ffs_attach_options {
	const char *name;               /* ffs_check_name() */
	pid_t pid;                      /* of the VMM; 0: found from the socket's peer */
	const char *qemu_socket;        /* QMP unix socket; NULL: found from the command line of pid */
	const char *firecracker_socket; /* API socket of a stock Firecracker; NULL: none */
	const char *coop_socket;        /* API socket of a VMM that hands over a userfaultfd; NULL: none */
	bool track;                     /* keep the write protection on between branches */
	bool force; /* attach, and take every branch, although guest memory has writers that are not trapped
		       (EBUSY otherwise); see ffs_branch_options */
	const struct ffs_disk_name *disks; /* n_disks of them, at most FFS_MAX_DISKS */
	unsigned n_disks;
	dev_t own_mount; /* st_dev of a file system that this process serves itself: no disk may lie in it; 0:
			    none */
};

/* Attach to a running VMM: connect its control socket, find and cross-check its guest memory, obtain a
 * userfaultfd of its address space. The guest is not stopped. Fails with a sentence that names culprit and
 * remedy: EEXIST (name or VM already attached), ESRCH (no such process), ENOTSUP (no VMM we know, memory that
 * cannot be branched), EBUSY (socket in use), … Waits for the VMM; may be cancelled. */
int ffs_sandbox_attach(struct ffs_engine *engine, const struct ffs_attach_options *opt,
	struct ffs_cancel *cancel, struct ffs_sandbox **out, struct ffs_error *err);
/* Let go of the VM: captures in flight fail ("detached"), protection and userfaultfd are gone when this
 * returns, the guest runs on. Settled branches stay. Idempotent. */
void ffs_sandbox_detach(struct ffs_sandbox *sb);
struct ffs_sandbox *ffs_sandbox_ref(struct ffs_sandbox *sb);
void ffs_sandbox_unref(struct ffs_sandbox *sb);

const char *ffs_sandbox_name(const struct ffs_sandbox *sb);
pid_t ffs_sandbox_pid(const struct ffs_sandbox *sb);
/* Bytes of memory.bin of every branch of this sandbox. */
uint64_t ffs_sandbox_memory_size(const struct ffs_sandbox *sb);
/* Read memory as it is now, while the guest goes on writing it: no branch is taken, nothing is stopped, and no two
 * bytes need be of one instant. Offsets are those of memory.bin; bytes read, short at the end; -ESRCH: the VM was
 * let go or is gone; -EFAULT: its memory is not what it was. At most 2 MiB a call. */
ssize_t ffs_sandbox_read_memory(struct ffs_sandbox *sb, void *buf, size_t len, uint64_t off);
/* The same of the first 8 bytes of each of so many pages (4096 bytes) from `off`, which is at a page: for a search. 0,
 * -EINVAL (not within the memory), or as above. */
int ffs_sandbox_read_heads(struct ffs_sandbox *sb, uint64_t *head, size_t pages, uint64_t off);
/* Last known run state (VMM events and the pidfd keep it fresh); never waits for the VMM. */
enum ffs_run_state ffs_sandbox_state(struct ffs_sandbox *sb);
/* A new JSON object for `status`, owned by the caller (json_object_put). Never waits for the VMM. Keys: name,
 * vmm, vmm_version, resets_vsock, pid, state, memory_bytes, regions[{name,gpa,offset,size,page_size,kind}], tracking,
 * in_flight, queue[{name,place}] (who waits for a permit), disks, branches_taken, last_branch{pause_ns,…} or
 * null. */
int ffs_sandbox_status(struct ffs_sandbox *sb, struct json_object **out);

/* ---- branches ---- */

enum ffs_branch_state { FFS_BRANCH_WRITING, FFS_BRANCH_READY, FFS_BRANCH_FAILED };
/* "writing" | "ready" | "failed" */
const char *ffs_branch_state_name(enum ffs_branch_state s);

enum ffs_branch_mode {
	FFS_BRANCH_LIVE, /* the guest stops for the instant only */
	FFS_BRANCH_DIFF, /* it stops until what was written since the parent's instant is copied; the rest is
			    the parent's. Needs tracking and a parent */
	FFS_BRANCH_FULL, /* it stops until everything is copied */
};
/* "live" | "diff" | "full" */
const char *ffs_branch_mode_name(enum ffs_branch_mode m);

struct ffs_branch_options {
	enum ffs_branch_mode mode;
	const char *name;    /* shown in status and log; NULL for an unnamed one */
	uint64_t max_rate;   /* bytes a second at which the copiers of a live branch fill its image; what the
				guest writes and what is read meanwhile is captured at once all the same. 0:
				as fast as it goes */
	uint64_t timeout_ns; /* bound on pre-arm + pause, and on waiting for another branch of the sandbox; 0:
				30 s. Past it: EAGAIN before the pause, and the guest runs */
	bool without_disks;  /* memory and device state only, whatever disks were named at attach */
	bool force; /* take it although guest memory has writers that are not trapped (vhost-user back ends,
		       passed-through devices, …): status and manifest then carry their sentences as
		       torn_possible; EBUSY otherwise */
};

/* Take a branch. Returns when the guest runs again (or still): a live one is WRITING then and readable, and
 * its capture goes on in the engine's threads; a diff or full one is READY. Where the sandbox is tracked,
 * live and diff share with their parent what was not written since its instant: the parent is the last named
 * branch that is ready and still held by somebody. ENOENT: a diff without parent. On failure the guest runs as before (a VM that was
 * found paused stays paused) and *out is untouched. Errors: ESRCH (VM gone), EAGAIN (timeout_ns), EINTR
 * (cancel), EBUSY (other writers, see force), ETIMEDOUT (VMM did not stop in 2 s; it was told to run on),
 * ENOSPC (memory of images, room for disks: before the pause), ENOMEM, EIO, ENOTSUP with the sentence. */
int ffs_branch_take(struct ffs_sandbox *sb, const struct ffs_branch_options *opt, struct ffs_cancel *cancel,
	struct ffs_branch **out, struct ffs_error *err);

struct ffs_branch *ffs_branch_ref(struct ffs_branch *b);
/* The last reference gone while WRITING cancels the capture. */
void ffs_branch_unref(struct ffs_branch *b);

enum ffs_branch_state ffs_branch_state(struct ffs_branch *b);
/* Why it failed, while FAILED: a copy into *err. */
void ffs_branch_failure(struct ffs_branch *b, struct ffs_error *err);
const char *ffs_branch_id(const struct ffs_branch *b);   /* UUID, 36 characters */
uint64_t ffs_branch_time_ns(const struct ffs_branch *b); /* the instant, CLOCK_REALTIME */
uint64_t ffs_branch_memory_size(const struct ffs_branch *b);
/* What its image counts for in the budget: reserved, then taken. */
uint64_t ffs_branch_image_bytes(struct ffs_branch *b);

/* Read memory of the branch's instant. Pages not yet captured are captured by the call. Returns bytes read
 * (short only at the end), or -EIO when the branch failed, in which case nothing that was returned before was
 * wrong. Any number of threads. Waits at most for one page copy of another thread. */
ssize_t ffs_branch_read_memory(struct ffs_branch *b, void *buf, size_t len, uint64_t off);
/* The first 8 bytes of each of so many pages (4096 bytes) from `off`, which is at a page: for a search. Pages not yet
 * captured are read where they are, and stay so: it neither waits for the capture nor is it. 0, -EINVAL (not within
 * the memory), -ENOMEM, or as above. */
int ffs_branch_read_heads(struct ffs_branch *b, uint64_t *head, size_t pages, uint64_t off);
/* The memory image, dense offsets, once READY: a read-only descriptor of a file in memory that nobody can open
 * for writing (EROFS), or of a sealed memfd where there is no privilege to mount (engine/branch/image.c). Owned by
 * the branch, valid as long as it. -EAGAIN while WRITING, -EIO when FAILED, -ENODATA when it shares
 * pages with a parent (ffs_branch_read_memory() has all of them). Holes of it are zero pages. */
int ffs_branch_memory_fd(struct ffs_branch *b);

/* Where else the memory of a branch can be read: in the store. Of `arg` the engine has one reference, which release
 * takes, from any thread. read: bytes (less than len is an error) or -errno; any thread, several at once; it may wait
 * for a disk. */
struct ffs_branch_copy {
	ssize_t (*read)(void *arg, void *buf, size_t len, uint64_t off);
	void (*release)(void *arg);
	void *arg;
};
struct ffs_layer;
/* Whether branches to come may share its pages: it is named, of a tracked sandbox, and not superseded. */
bool ffs_branch_is_parent(struct ffs_branch *b);
/* A READY branch of a tracked sandbox is in the store: children share its pages with the copy from now on, and its image
 * is given back with its last reader. It remains the parent of the next one, also without the branch, until what is returned is
 * released (or a later branch takes its place). NULL when it is none: *copy was not taken then. */
struct ffs_layer *ffs_branch_copied(struct ffs_branch *b, const struct ffs_branch_copy *copy);
/* The copy is elsewhere now; false when it is no parent any more, and *copy was not taken. */
bool ffs_layer_moved(struct ffs_layer *l, const struct ffs_branch_copy *copy);
/* The copy was removed. NULL: nothing. */
void ffs_layer_release(struct ffs_layer *l);

/* vmstate is complete when ffs_branch_take() returned. */
uint64_t ffs_branch_vmstate_size(const struct ffs_branch *b);
ssize_t ffs_branch_read_vmstate(struct ffs_branch *b, void *buf, size_t len, uint64_t off);
int ffs_branch_vmstate_fd(struct ffs_branch *b); /* sealed memfd, owned by the branch */

/* The disks of the branch's instant, complete when ffs_branch_take() returned: i from 0 to ffs_branch_disks()
 * - 1. */
unsigned ffs_branch_disks(const struct ffs_branch *b);
const char *ffs_branch_disk_id(const struct ffs_branch *b, unsigned i);
uint64_t ffs_branch_disk_size(const struct ffs_branch *b, unsigned i);
/* As ffs_branch_read_memory(). */
ssize_t ffs_branch_read_disk(struct ffs_branch *b, unsigned i, void *buf, size_t len, uint64_t off);
int ffs_branch_disk_fd(struct ffs_branch *b, unsigned i); /* read-only, owned by the branch */

/* Call fn(arg) once, from an engine thread (or from this call) as soon as the branch is no longer WRITING. fn
 * must not block. ffs_branch_unwatch() returns true when fn will not and did not run; after it returned fn is
 * not running. */
struct ffs_branch_watch {
	void (*fn)(void *arg);
	void *arg;
	struct ffs_branch_watch *next; /* private */
	int state;                     /* private */
};
void ffs_branch_watch(struct ffs_branch *b, struct ffs_branch_watch *w);
bool ffs_branch_unwatch(struct ffs_branch *b, struct ffs_branch_watch *w);
/* Wait until it is READY (0) or FAILED (-EIO and the reason); -EINTR when cancelled. */
int ffs_branch_wait(struct ffs_branch *b, struct ffs_cancel *cancel, struct ffs_error *err);

/* New JSON objects owned by the caller. status: id, sandbox, name, state, error, mode, parent (id or null), store,
 * memory_bytes, captured_bytes, shared_bytes, image_bytes, vmstate_bytes, instant (RFC 3339), pause_ns,
 * phases{scan_ns,prearm_ns,converge_ns,stop_ns,vmstate_ns,arm_ns,resume_ns,capture_ns}, faults, fault_max_ns,
 * fault_histogram_us, converge_rounds, dirty_at_pause_pages. manifest: what a restore needs: format, id,
 * sandbox, instant, mode, parent, memory{size,regions}, vmstate{size,kind},
 * vmm{kind,version,command_line,accelerator}, pause_ns, phases. The manifest is complete only when READY
 * (-EAGAIN before). */
int ffs_branch_status(struct ffs_branch *b, struct json_object **out);
int ffs_branch_manifest(struct ffs_branch *b, struct json_object **out);
