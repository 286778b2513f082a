/* Owns the bytes that wait to be sent (out.h). One thread. */
#include "out.h"

#include <stdlib.h>
#include <string.h>

/* Where n more bytes have room, behind what waits; NULL: no memory. */
static uint8_t *behind(struct agent_out *o, size_t n)
{
	/* once half of it was sent, moving the rest costs no more than it did to fill it */
	if (o->len + n > o->room && o->at && o->at >= agent_out_waits(o)) {
		memmove(o->p, o->p + o->at, agent_out_waits(o));
		o->len -= o->at;
		o->at = 0;
	}
	if (o->len + n > o->room) {
		size_t room = 2 * (o->len + n);
		uint8_t *more = realloc(o->p, room);

		if (!more)
			return NULL;
		o->p = more;
		o->room = room;
	}
	return o->p + o->len;
}

bool agent_out_bytes(struct agent_out *o, const void *bytes, size_t len)
{
	uint8_t *to = behind(o, len);

	if (!to)
		return false;
	memcpy(to, bytes, len);
	o->len += len;
	return true;
}

bool agent_out_frame(struct agent_out *o, uint8_t type, uint32_t stream, const void *payload, size_t len)
{
	uint8_t *to = behind(o, AGENT_WIRE_MAX);

	if (!to)
		return false;
	o->len += agent_encode(type, stream, payload, len, to);
	return true;
}

void agent_out_sent(struct agent_out *o, size_t n)
{
	o->at += n;
	if (o->at == o->len)
		agent_out_clear(o);
}

void agent_out_clear(struct agent_out *o)
{
	o->at = o->len = 0;
}

void agent_out_free(struct agent_out *o)
{
	free(o->p);
	*o = (struct agent_out){0};
}
