/* forks/NAME/ack: whether the guest of a child that others start has taken its payloads. The daemon listens for them, at a
 * port of UDP of the fork's own that is in its payloads. (Children of `forkfs restore` speak to that command.) */
#pragma once

#include "fork.h"
#include "mailbox/ack.h"

struct ffs_acks;

/* What a fork waits for. Tree lock; `sock` and `port` are fixed. */
struct ffs_fork_ack {
	struct ffs_list link; /* in fs->acks */
	struct ffs_fork *fork;
	int sock; /* -1: nobody listens, and `deaf` says why */
	unsigned port;
	struct ffs_error deaf;
	struct ffs_ack_wait wait;
	bool asked;            /* somebody has opened the file: from when its memory is open too, time runs */
	bool told;             /* those who poll know that it is over */
	struct ffs_list waits; /* struct ffs_parked */
};

/* In order: before any fork is there; before anybody reads; at the end. */
int ffs_acks_new(struct ffs_fs *fs, struct ffs_error *err);
int ffs_acks_start(struct ffs_fs *fs);
void ffs_acks_stop(struct ffs_fs *fs);

/* Listen for a fork that nobody else knows yet, at the port that its payloads name (0: any). Without the tree lock. */
int ffs_ack_listen(struct ffs_fs *fs, struct ffs_fork *f, unsigned port, struct ffs_error *err);
/* The same for a fork that an earlier daemon made: where the port is another's the file says so. */
void ffs_ack_listen_again(struct ffs_fs *fs, struct ffs_fork *f, unsigned port);

/* ---- tree lock held ---- */

/* Its payloads have changed. */
void ffs_ack_expect(struct ffs_fork *f);
/* Does anything of it ask to be acknowledged? Then it has the file. */
bool ffs_ack_asks(const struct ffs_fork *f);
/* Its memory, or (asked) its file `ack`, was opened. */
void ffs_ack_opened(struct ffs_fork *f, bool asked);
/* It was removed: who waits hears of it. */
void ffs_ack_wake(struct ffs_fs *fs);
/* The last of it. */
void ffs_ack_free(struct ffs_fork *f);
bool ffs_ack_readable(const struct ffs_fork *f);
/* What `status` says of it: a new object. */
struct json_object *ffs_ack_json(const struct ffs_fork *f);

/* FUSE. */
void ffs_ack_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off, int flags);
