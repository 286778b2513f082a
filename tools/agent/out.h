/* Frames on their way out, on either side of a connection: filled behind, sent from the front. However much goes through,
 * the room is at most a few times of what waits. Zero-initialised; one thread. */
#pragma once

#include <stdbool.h>

#include "wire.h"

struct agent_out {
	uint8_t *p;
	size_t at, len, room; /* [at, len) waits */
};

static inline size_t agent_out_waits(const struct agent_out *o)
{
	return o->len - o->at;
}

/* False: no memory, and nothing was added. */
bool agent_out_bytes(struct agent_out *o, const void *bytes, size_t len);
bool agent_out_frame(struct agent_out *o, uint8_t type, uint32_t stream, const void *payload, size_t len);
/* So many from the front are gone. */
void agent_out_sent(struct agent_out *o, size_t n);
/* All are. The room stays, until it is freed. */
void agent_out_clear(struct agent_out *o);
void agent_out_free(struct agent_out *o);
