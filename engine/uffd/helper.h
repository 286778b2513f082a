/* Private to engine/uffd: the two processes that are forked before anything else (spawner and watchdog), and
 * how the daemon talks to them.
 *
 * A request is one SOCK_SEQPACKET message that carries, as its last descriptor, a socket of its own for the
 * answer. So requests of several threads do not wait for each other, an answer cannot be taken for another's,
 * and an answer that comes too late dies (with its descriptors) in a socket that nobody has any more. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

/* Most descriptors in one message. */
#define FFS_MSG_FDS 4

/* Fork a helper that runs body(sock, arg) and ends when that returns. It has its own session, all signals
 * blocked, / as working directory, /dev/null as standard streams, and no descriptor of the daemon but `sock`.
 * The caller owns *pid (to be waited for) and *sock. Call before threads exist. */
int ffs_helper_fork(const char *name, void (*body)(int sock, void *arg), void *arg, pid_t *pid, int *sock,
	struct ffs_error *err);

/* End a helper: close its socket, wait for its end. */
void ffs_helper_end(pid_t pid, int *sock);

/* In a process just forked from a helper: name, session, all signals blocked, SIGCHLD back to its default (a
 * blocked SIGCHLD of default disposition stays pending, which is what sigtimedwait and signalfd need). */
void ffs_helper_child(const char *name);

/* Close every descriptor above 2 but `a` and `b` (either may be -1). */
void ffs_close_all_but(int a, int b);

/* Ask the kernel's OOM killer to take somebody else. False where the privilege (CAP_SYS_RESOURCE) is missing.
 */
bool ffs_helper_oom_protect(void);

/* Send or receive one message. Descriptors that are received are close-on-exec and owned by the caller, fds[]
 * is filled up with -1. -EPIPE: the other side is gone; -EPROTO: a message of another length, or with more
 * descriptors. Blocks. */
int ffs_msg_send(int sock, const void *buf, size_t len, const int *fds, unsigned n_fds);
int ffs_msg_recv(int sock, void *buf, size_t len, int fds[FFS_MSG_FDS]);

/* A request and its answer. fds (n_fds < FFS_MSG_FDS, none -1) stay the caller's; *reply_fd (may be NULL) is
 * what came with the answer, or -1. Returns when the helper has closed its side too, hence every copy of what
 * it sent. 0, -EPIPE (helper gone before it answered), -ETIMEDOUT, -errno. Any thread. */
int ffs_helper_call(int sock, const void *req, size_t len, const int *fds, unsigned n_fds,
	uint64_t deadline_ns, void *reply, size_t reply_len, int *reply_fd);
