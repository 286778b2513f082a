/* The handshake with a guest's agent (agent-handshake.h). Pure; no locks. */
#include "agent-handshake.h"

#include <stdio.h>

static const struct {
	const char *name, *missing;
	uint64_t wait_ns; /* from the edge before; 0: the caller's */
} edges[FFS_EDGES] = {
	[FFS_EDGE_CONNECTED] = {"connected", "took the connection", 0},
	[FFS_EDGE_BEGUN] = {"begun", "answered the host's HELLO", 0},
	[FFS_EDGE_REBOUND] = {"rebound", "said that its listeners are bound anew", FFS_REBIND_NS},
	[FFS_EDGE_ACKNOWLEDGED] = {"acknowledged", "acknowledged its clock, entropy and network", FFS_ACK_NS},
	[FFS_EDGE_OUTPUT] = {"output", "reconnected its output", FFS_OUTPUT_NS},
	[FFS_EDGE_HEALTHY] = {"healthy", "answered the health monitor", FFS_HEALTH_NS},
};

const char *ffs_edge_name(enum ffs_edge edge)
{
	return edges[edge].name;
}

void ffs_handshake_begin(struct ffs_handshake *h, uint64_t now_ns, uint64_t ready_ns)
{
	*h = (struct ffs_handshake){.began_ns = now_ns, .ready_ns = ready_ns};
}

int ffs_handshake_fail(struct ffs_handshake *h, int code, const char *why, struct ffs_error *err)
{
	if (!h->failed)
		ffs_error_set(&h->why, code, "%s", why);
	h->failed = true;
	return ffs_error_set(err, h->why.code, "%s", h->why.text);
}

int ffs_handshake_edge(struct ffs_handshake *h, enum ffs_edge edge, uint64_t now_ns, struct ffs_error *err)
{
	char why[160];

	if (h->failed)
		return ffs_handshake_fail(h, 0, "", err);
	if (edge != h->next) {
		snprintf(why, sizeof(why), "the guest's agent said '%s' when '%s' was due", edges[edge].name,
			h->next < FFS_EDGES ? edges[h->next].name : "nothing");
		return ffs_handshake_fail(h, EPROTO, why, err);
	}
	/* what comes too late has not come */
	if (ffs_handshake_check(h, now_ns, err) < 0)
		return -h->why.code;
	h->at_ns[edge] = now_ns;
	h->next = edge + 1;
	return 0;
}

uint64_t ffs_handshake_deadline(const struct ffs_handshake *h)
{
	if (h->failed || h->next == FFS_EDGES)
		return UINT64_MAX;
	if (!edges[h->next].wait_ns)
		return h->began_ns + h->ready_ns;
	return h->at_ns[h->next - 1] + edges[h->next].wait_ns;
}

int ffs_handshake_check(struct ffs_handshake *h, uint64_t now_ns, struct ffs_error *err)
{
	char why[200];
	uint64_t deadline = ffs_handshake_deadline(h), from = h->began_ns;

	if (h->failed)
		return ffs_handshake_fail(h, 0, "", err);
	if (now_ns < deadline)
		return 0;
	if (edges[h->next].wait_ns)
		from = h->at_ns[h->next - 1];
	snprintf(why, sizeof(why), "the guest's agent has not %s within %.1f s (edge '%s')",
		edges[h->next].missing, (double)(deadline - from) / 1e9, edges[h->next].name);
	return ffs_handshake_fail(h, ETIMEDOUT, why, err);
}

/* ---- health ---- */

void ffs_health_begin(struct ffs_health *h, uint64_t now_ns)
{
	*h = (struct ffs_health){.due_ns = now_ns, .pause_ns = FFS_HEALTH_FAST_NS};
}

bool ffs_health_ask(struct ffs_health *h, uint64_t now_ns)
{
	if (now_ns < h->due_ns)
		return false;
	if (h->waiting) {
		/* not answered: asked again, faster first and then ever slower */
		h->missed++;
		h->pause_ns = h->healthy ? FFS_HEALTH_FAST_NS : 2 * h->pause_ns;
		if (h->pause_ns > FFS_HEALTH_TIMEOUT_NS)
			h->pause_ns = FFS_HEALTH_TIMEOUT_NS;
		h->healthy = false;
		h->waiting = false;
		h->due_ns = now_ns + h->pause_ns;
		return false;
	}
	h->waiting = true;
	h->due_ns = now_ns + FFS_HEALTH_TIMEOUT_NS;
	return true;
}

void ffs_health_answer(struct ffs_health *h, uint64_t now_ns)
{
	h->healthy = true;
	h->waiting = false;
	h->missed = 0;
	h->pause_ns = FFS_HEALTH_FAST_NS;
	h->due_ns = now_ns + FFS_HEALTH_INTERVAL_NS;
}

void ffs_health_now(struct ffs_health *h, uint64_t now_ns)
{
	if (!h->waiting)
		h->due_ns = now_ns;
}
