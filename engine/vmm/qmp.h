/* A client of one QMP monitor of a QEMU (docs/interop/qmp-spec.txt), which is not trusted: messages are at
 * most 1 MiB and 32 levels deep, everything else ends the connection, and nothing waits without a deadline.
 *
 * Calls are made by one thread at a time. Between calls a thread of the client reads events; during a call,
 * or from ffs_qmp_claim() to ffs_qmp_release(), the caller reads the socket itself: a reply then costs one
 * wake-up and not two. Hooks run in whichever of the two threads reads (`gone` always in the client's own
 * when there is a pidfd) and must neither block nor call back.
 *
 * Fault points: qmp-COMMAND before a command is sent, qmp-COMMAND-reply when its reply has come. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct json_object;
struct ffs_cancel;
struct ffs_qmp;

#define FFS_QMP_LINE_MAX (1u << 20)
#define FFS_QMP_DEPTH_MAX 32

struct ffs_qmp_hooks {
	void (*event)(void *arg, const char *name, struct json_object *data); /* data may be NULL; borrowed */
	void (*gone)(void *arg); /* end of the process (pidfd); without pidfd: end of file. Once. */
	void (*beat)(void *arg); /* at least every 100 ms while a call waits */
	void *arg;
};

/* Take over a connected stream socket (owned by the client also on failure), wait for the greeting until
 * deadline_ns, negotiate. *version: the greeting's version object, owned by the caller; may be NULL. `pidfd`
 * (or -1) is borrowed and must outlive the client. Errors: -EBUSY no greeting came (somebody else is
 * connected), -ENOTSUP it speaks something else, -ECONNRESET, -ETIMEDOUT, -EINTR (cancel). */
int ffs_qmp_open(int sock, int pidfd, const struct ffs_qmp_hooks *hooks, uint64_t deadline_ns,
	struct ffs_cancel *cancel, struct ffs_qmp **out, struct json_object **version, struct ffs_error *err);
/* Ends the connection for every duplicate of the socket too (shutdown), or QEMU would let nobody else in. */
void ffs_qmp_close(struct ffs_qmp *q);

int ffs_qmp_fd(const struct ffs_qmp *q);
/* The connection ended, or something went over it that makes it doubtful (a reply that never came, one to
 * somebody else's command, a line that is no JSON): make a new one before relying on it. Caller's thread,
 * claimed. */
bool ffs_qmp_is_dead(const struct ffs_qmp *q);
bool ffs_qmp_is_suspect(const struct ffs_qmp *q);

/* Read the socket from this thread until released; nests. */
void ffs_qmp_claim(struct ffs_qmp *q);
void ffs_qmp_release(struct ffs_qmp *q);

/* Send a command; args (may be NULL) is borrowed; fd (or -1) travels with it. Returns when it is in the
 * socket. */
int ffs_qmp_send(struct ffs_qmp *q, const char *command, struct json_object *args, int fd,
	uint64_t deadline_ns, struct ffs_error *err);
/* Wait for the reply to the command sent last. *ret (may be NULL): what it returned, owned by the caller.
 * -EREMOTEIO: QEMU refused, in its words; -ETIMEDOUT; -ECONNRESET: the connection is gone; -EPROTO. */
int ffs_qmp_reply(struct ffs_qmp *q, uint64_t deadline_ns, struct json_object **ret, struct ffs_error *err);
/* Both. */
int ffs_qmp_call(struct ffs_qmp *q, const char *command, struct json_object *args, int fd,
	uint64_t deadline_ns, struct json_object **ret, struct ffs_error *err);

/* Handle what has already arrived, without waiting. Claimed. */
void ffs_qmp_drain(struct ffs_qmp *q);
/* Read until done(arg) is true, or -ETIMEDOUT, -ECONNRESET. Claimed; done is asked before the first wait. */
int ffs_qmp_wait(struct ffs_qmp *q, bool (*done)(void *arg), void *arg, uint64_t deadline_ns);
