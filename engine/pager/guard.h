/* Private to engine/pager: the process that accepts VMMs, and ends them when the pager has died.
 *
 * A userfaultfd whose last descriptor is closed lets go of its memory: what was not put there yet then reads
 * as zeros; also one that is still in a message that nobody has received. So the guard is who accepts, it
 * holds a duplicate of each connection until it has one of the userfaultfd, and closes that only when the VMM
 * has ended or has all its pages. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

#define FFS_GUARD_WARDS 1024 /* looked after at once; who else connects waits */

struct ffs_guard {
	pid_t pid;
	int sock; /* readable: somebody has connected, or the guard has ended */
};

/* Who has connected. */
struct ffs_guard_peer {
	uint64_t id;
	pid_t pid; /* 0: not to be seen from here */
	uid_t uid;
	bool allowed;    /* of a user who is expected; the guard looks after nobody else */
	bool last;       /* nobody: after ffs_guard_close() no others will come */
	int sock, pidfd; /* the caller's; pidfd may be -1 where it is not allowed */
};

/* Fork it. Before any thread exists. */
int ffs_guard_start(struct ffs_guard *g, struct ffs_error *err);
/* Accept at a listening socket, which stays the caller's too, from root, our user and `uid`. */
int ffs_guard_listen(struct ffs_guard *g, int listening, uid_t uid, struct ffs_error *err);
/* The next of them; waits. -EPIPE: the guard has ended. One thread. */
int ffs_guard_next(struct ffs_guard *g, struct ffs_guard_peer *out);
/* The userfaultfd of a peer, which stays the caller's. Any thread. */
int ffs_guard_add(struct ffs_guard *g, uint64_t id, int uffd, struct ffs_error *err);
/* A peer is looked after no longer: it has handed over nothing, or has all its pages. Any thread. */
int ffs_guard_drop(struct ffs_guard *g, uint64_t id, struct ffs_error *err);
/* Accept who has connected so far, and nobody any more. Not waited for: see `last`. */
int ffs_guard_close(struct ffs_guard *g);
/* Ends it; the VMMs that it still looks after are killed. */
void ffs_guard_end(struct ffs_guard *g);

/* What the guard does itself, for a pager that has lost it. Accept one: 0, -EAGAIN, -errno. */
int ffs_guard_accept(int listening, uid_t uid, struct ffs_guard_peer *out);
/* SIGKILL, and wait until the process has ended, however long that takes. */
void ffs_guard_kill(int pidfd);
