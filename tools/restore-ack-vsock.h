/* Where the guest of a child finds its starter by vsock: see restore-ack-vsock.c. */
#pragma once

#include "mailbox/ack.h"
#include "restore.h"

struct pollfd;

#define FFS_ACK_VSOCK_PORT 5242u /* of the host; each child has its own host's ports, so all have the same */
#define FFS_ACK_VSOCK_PEERS 16u

struct ffs_ack_peer {
	int fd;
	struct ffs_ack_stream stream;
};

struct ffs_ack_vsock {
	int dir, sock; /* -1: it does not listen */
	unsigned n;
	struct ffs_ack_peer peer[FFS_ACK_VSOCK_PEERS]; /* the oldest first */
};

void ffs_ack_vsock_init(struct ffs_ack_vsock *v);
/* The child is loaded and does not run; it has a vsock. */
int ffs_ack_vsock_listen(struct ffs_ack_vsock *v, const struct ffs_child *c, struct ffs_error *err);
/* Take what has come. */
void ffs_ack_vsock_receive(struct ffs_ack_vsock *v, struct ffs_ack_wait *w, uint64_t now_ns);
/* What to wait for: so many. */
unsigned ffs_ack_vsock_poll(const struct ffs_ack_vsock *v, struct pollfd p[FFS_ACK_VSOCK_PEERS + 1]);
/* In any case, once. */
void ffs_ack_vsock_close(struct ffs_ack_vsock *v);
