/* The handshake with a guest's agent, and its health afterwards, as the host sees them: pure logic over events and a
 * clock that the caller gives. One thread. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

/* What happens, in the only order in which it can. */
enum ffs_edge {
	FFS_EDGE_CONNECTED, /* the VMM has the connection */
	FFS_EDGE_BEGUN,     /* the agent has the epoch */
	FFS_EDGE_REBOUND,
	FFS_EDGE_ACKNOWLEDGED, /* clock, entropy, network */
	FFS_EDGE_OUTPUT,       /* output comes to us */
	FFS_EDGE_HEALTHY,      /* the first answer to the health monitor */
	FFS_EDGES
};

/* Longest times between edges. The first is the caller's: a guest may still have to boot. */
#define FFS_REBIND_NS 5000000000ull
#define FFS_ACK_NS 5000000000ull
#define FFS_OUTPUT_NS 30000000000ull
#define FFS_HEALTH_NS 30000000000ull

struct ffs_handshake {
	enum ffs_edge next; /* FFS_EDGES: it is through */
	bool failed;        /* for good */
	uint64_t began_ns, ready_ns;
	uint64_t at_ns[FFS_EDGES]; /* of the edges below next */
	struct ffs_error why;
};

void ffs_handshake_begin(struct ffs_handshake *h, uint64_t now_ns, uint64_t ready_ns);
/* An edge was seen. -EPROTO: not in this order, by which it has failed; once failed, the same error for ever. */
int ffs_handshake_edge(struct ffs_handshake *h, enum ffs_edge edge, uint64_t now_ns, struct ffs_error *err);
/* When the wait for the next edge ends; UINT64_MAX when there is none. */
uint64_t ffs_handshake_deadline(const struct ffs_handshake *h);
/* -ETIMEDOUT, with a sentence that names the edge, when it is later than that. */
int ffs_handshake_check(struct ffs_handshake *h, uint64_t now_ns, struct ffs_error *err);
/* It can never succeed, and this is why. The first reason stays. */
int ffs_handshake_fail(struct ffs_handshake *h, int code, const char *why, struct ffs_error *err);
/* As JSON members, and in sentences. */
const char *ffs_edge_name(enum ffs_edge edge);

/* ---- health ---- */

#define FFS_HEALTH_INTERVAL_NS 10000000000ull
#define FFS_HEALTH_TIMEOUT_NS 5000000000ull
#define FFS_HEALTH_FAST_NS 100000000ull

struct ffs_health {
	bool healthy, waiting;
	unsigned missed; /* answers, since the last that came */
	uint64_t due_ns; /* of the next question, or of the answer when waiting */
	uint64_t pause_ns;
};

/* The first question is due at once. */
void ffs_health_begin(struct ffs_health *h, uint64_t now_ns);
/* True: ask now. Otherwise wait until due_ns. */
bool ffs_health_ask(struct ffs_health *h, uint64_t now_ns);
void ffs_health_answer(struct ffs_health *h, uint64_t now_ns);
/* Somebody wants to know: the next question is due at once, unless one waits for its answer. */
void ffs_health_now(struct ffs_health *h, uint64_t now_ns);
