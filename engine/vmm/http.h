/* HTTP/1.1 over a connected unix stream socket, as much of it as the control APIs of VMMs speak: requests
 * with a JSON body or none, answers with Content-Length, a connection that is kept.
 *
 * One caller at a time; no threads, no locks, so the watchdog's processes may use it too. The other side is
 * untrusted: what it sends is bounded, and whatever is not an answer as it should be ends the connection. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define FFS_HTTP_HEAD_MAX (16u << 10)
#define FFS_HTTP_BODY_MAX (1u << 20)

struct ffs_http {
	int sock;      /* non-blocking; owned; -1: none */
	bool dead;     /* no further request can be made on it */
	unsigned owed; /* answers that have not been read */
	char *buf;     /* bytes received and not used */
	size_t len, cap;
};

/* What happens while an answer is awaited. */
struct ffs_http_wait {
	void (*beat)(void *arg); /* at least every 50 ms; may be NULL */
	void *beat_arg;
	int fd; /* -1: none; watched for input, end of file is the callback's to notice */
	int (*ready)(struct ffs_http_wait *w, struct ffs_error *err); /* < 0 ends the wait with it */
};

struct ffs_http_answer {
	int status;
	char *body; /* NUL-terminated, "" when there was none; the caller frees it */
	size_t len;
};

/* Takes the socket over. */
void ffs_http_init(struct ffs_http *h, int sock);
void ffs_http_close(struct ffs_http *h);

/* Send a request; its answer comes after those of the requests before it. `body` NULL: none. 0, -ENOTCONN,
 * -ECONNRESET, -ETIMEDOUT, -errno, with the sentence. After a failure the connection is dead. */
int ffs_http_send(struct ffs_http *h, const char *method, const char *path, const char *body,
	uint64_t deadline_ns, struct ffs_error *err);
/* Receive the next answer; 1xx are passed over. w may be NULL. -ETIMEDOUT, -ECONNRESET, -EPROTO, -EMSGSIZE,
 * what w->ready said; the connection is dead then. */
int ffs_http_recv(struct ffs_http *h, struct ffs_http_wait *w, uint64_t deadline_ns,
	struct ffs_http_answer *out, struct ffs_error *err);
void ffs_http_answer_free(struct ffs_http_answer *a);
