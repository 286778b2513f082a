/* forkfs-fs: the FUSE daemon. Its one public header, for tools/ and tests.
 *
 * Source of the tree's format: docs/tree.md. Functions return 0 or -errno and describe a failure in struct
 * ffs_error. */
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/log.h"
#include "store/store.h"

enum ffs_passthrough_option {
	FFS_PASSTHROUGH_AUTO, /* where the kernel and our rights allow it */
	FFS_PASSTHROUGH_OFF,  /* settled branches are served from the page cache */
};

/* Initialise with ffs_mount_options_init(); strings are borrowed for the length of ffs_daemon_run(). */
struct ffs_mount_options {
	const char *mountpoint; /* a directory; a dead FUSE mount on it is detached first */
	bool foreground;        /* no fork; log to stderr */
	bool allow_other; /* other users may enter what they are lent (owner=); default: the mounting user
				 alone */
	bool branch_off;  /* hide branch/ and branch@KEY/ */
	bool reattach_off; /* neither find again what an earlier daemon had attached, nor leave word for a later one */
	uint64_t lease_ns;     /* life of a generation after its last open, read or close; 30 s */
	unsigned branch_rate;  /* branch/ triggers a second and sandbox, then EAGAIN; 10. 0: no limit */
	uint64_t memory;       /* for images: struct ffs_engine_limits; FFS_MEMORY_AUTO */
	unsigned captures;     /* at once; twice the CPUs, at least 8. 0: any number */
	uint64_t cache_age_ns; /* a cached branch goes when nobody has used it for so long; 0: by age never */
	uint64_t cache_size;   /* of all cached branches in memory, bytes; UINT64_MAX: no limit */
	uint64_t cache_store;  /* of all cached branches in the store, bytes; UINT64_MAX: no limit */
	enum ffs_passthrough_option passthrough;
	char store[PATH_MAX];              /* directory of the store; "": branches live in memory only */
	enum ffs_store_kind default_store; /* of mkdir and of requests that do not say; dense with a store */
	bool default_store_given;
	char ack_address[64]; /* IP address at which acknowledgements of forks are listened for; 127.0.0.1 */
	uint32_t max_read;    /* largest read request asked for, bytes, a multiple of 4096; 1 MiB */
	enum ffs_log_level log; /* FFS_LOG_INFO */
	/* Called in the serving process once the mount answers, from a thread of the daemon; may be NULL. */
	void (*ready)(void *arg);
	void *ready_arg;
};

void ffs_mount_options_init(struct ffs_mount_options *opt);

/* Take in a comma-separated list as -o gives it: allow_other, branch=on|off, branch-rate=N, lease=SECONDS,
 * memory=SIZE|auto|unlimited, captures=N, cache-age=SECONDS, cache-size=SIZE, cache-store=SIZE,
 * passthrough=auto|off, reattach=on|off, store=DIR, default-store=memory|dense|packed,
 * ack-address=IP, max_read=BYTES, log=error|warning|info|debug. What mount(8) and fstab add (rw, dev, suid, exec, auto, user,
 * _netdev, x-*, …) is accepted and ignored. -EINVAL with a sentence that names the option. */
int ffs_mount_options_parse(struct ffs_mount_options *opt, const char *list, struct ffs_error *err);

/* Mount and serve. The calling process must have one thread (the engine forks helpers first).
 *
 * foreground: serves in this process and returns 0 after umount, `shutdown`, SIGTERM or SIGINT, every VM let
 * go. else: the daemon is a process of its own (session leader, log to syslog); this call returns in the
 * caller, 0 as soon as the mount answers or -errno with the daemon's own reason. */
int ffs_daemon_run(const struct ffs_mount_options *opt, struct ffs_error *err);

/* Unmount a forkfs mount as `forkfs umount` does: umount(2), or fusermount3 without the right to. A dead
 * mount is detached. `lazy`: detach it though files are open (they go on as far as the daemon lives). -EINVAL
 * when nothing of ours is mounted there, -EBUSY when it is in use. Any process but the daemon. */
int ffs_unmount(const char *mountpoint, bool lazy, struct ffs_error *err);

/* True when a forkfs mount (alive or dead) is on that very directory; reads /proc/self/mountinfo only, so
 * that a hung mount hangs nobody. */
bool ffs_is_mounted(const char *mountpoint);
