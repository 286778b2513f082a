/* Private to engine/uffd: what the daemon and the watchdog process share. */
#pragma once

#include "base/util.h"
#include "uffd/watchdog.h"

/* One page-aligned shared anonymous mapping, made before the fork. */
struct ffs_wd_shared {
	_Alignas(128) _Atomic uint32_t sleeping; /* the watchdog waits without a timer: a poke must wake it */
	struct ffs_wd_slot slots[FFS_WD_SLOTS];
};

enum ffs_wd_op { FFS_WD_HELLO = 1, FFS_WD_ADD, FFS_WD_REPLACE, FFS_WD_REMOVE };

struct ffs_wd_span {
	uint64_t hva, len;
};

/* HELLO carries the eventfd of ffs_watchdog_poke(); ADD and REPLACE carry the uffd and, where has_sock is
 * set, the control socket. */
struct ffs_wd_request {
	uint32_t op, slot;
	uint32_t n_spans;
	uint32_t has_sock;
	/* An address in the program's own code: the watchdog is a fork of the daemon, both have it at the
	 * same place. */
	int (*rescue)(int sock, uint64_t deadline_ns);
	struct ffs_wd_span spans[FFS_MAX_REGIONS];
};

struct ffs_wd_reply {
	int32_t code;           /* 0 or -errno */
	uint32_t locked;        /* HELLO: its memory is locked */
	uint32_t oom_protected; /* HELLO: oom_score_adj is -1000 */
};

/* The watchdog process, see watchdog.h; returns when the daemon is dead and everything is released. arg:
 * struct ffs_wd_shared. */
void ffs_watchdog_body(int sock, void *arg);
