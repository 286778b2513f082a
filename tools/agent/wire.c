/* The frames between host and agent (wire.h). Any thread; pure logic. */
#include "wire.h"

#include <errno.h>
#include <string.h>
#include <sys/types.h>

uint32_t agent_crc32c(const void *data, size_t len)
{
	static uint32_t
		table[256]; /* filled by whoever comes first; two that fill it at once write the same */
	const uint8_t *p = data;
	uint32_t crc = ~0u;

	if (!__atomic_load_n(&table[255], __ATOMIC_ACQUIRE))
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t c = i;

			for (int bit = 0; bit < 8; bit++)
				c = c >> 1 ^ (c & 1 ? 0x82f63b78u : 0);
			__atomic_store_n(&table[i], c, __ATOMIC_RELEASE);
		}
	for (size_t i = 0; i < len; i++)
		crc = crc >> 8 ^ __atomic_load_n(&table[(crc ^ p[i]) & 0xff], __ATOMIC_RELAXED);
	return ~crc;
}

/* ---- frames ---- */

/* Consistent overhead byte stuffing (Cheshire and Baker, 1997) without the zero at the end. */
static size_t stuff(const uint8_t *in, size_t len, uint8_t *out)
{
	size_t at = 0, n = 1;
	uint8_t code = 1;

	for (size_t i = 0; i < len; i++) {
		if (in[i]) {
			out[n++] = in[i];
			code++;
		}
		if (!in[i] || code == 0xff) {
			out[at] = code;
			code = 1;
			at = n++;
		}
	}
	out[at] = code;
	return n;
}

/* In place. -1: no such encoding. */
static ssize_t unstuff(uint8_t *buf, size_t len)
{
	size_t in = 0, out = 0;

	while (in < len) {
		uint8_t code = buf[in++];

		if (!code || code - 1u > len - in)
			return -1;
		for (unsigned i = 1; i < code; i++)
			buf[out++] = buf[in++];
		if (code != 0xff && in < len)
			buf[out++] = 0;
	}
	return (ssize_t)out;
}

static void put_number(uint8_t *p, uint64_t value, unsigned bytes)
{
	for (unsigned i = 0; i < bytes; i++)
		p[i] = (uint8_t)(value >> 8 * i);
}

static uint64_t get_number(const uint8_t *p, unsigned bytes)
{
	uint64_t value = 0;

	for (unsigned i = bytes; i-- > 0;)
		value = value << 8 | p[i];
	return value;
}

size_t agent_encode(uint8_t type, uint32_t stream, const void *payload, size_t len, uint8_t *out)
{
	uint8_t body[AGENT_BODY_MAX];
	size_t n;

	if (len > AGENT_PAYLOAD_MAX)
		return 0;
	body[0] = AGENT_VERSION;
	body[1] = type;
	body[2] = body[3] = 0;
	put_number(body + 4, stream, 4);
	if (len)
		memcpy(body + AGENT_HEADER, payload, len);
	put_number(body + AGENT_HEADER + len, agent_crc32c(body, AGENT_HEADER + len), 4);
	n = stuff(body, AGENT_HEADER + len + 4, out);
	out[n++] = 0;
	return n;
}

static int open_frame(struct agent_decoder *d, struct agent_frame *out)
{
	ssize_t n = d->too_long ? -1 : unstuff(d->buf, d->len);

	d->len = 0;
	d->too_long = false;
	if (n < (ssize_t)(AGENT_HEADER + 4) || n > (ssize_t)AGENT_BODY_MAX ||
		get_number(d->buf + n - 4, 4) != agent_crc32c(d->buf, (size_t)n - 4)) {
		d->damaged++;
		return -EBADMSG;
	}
	if (d->buf[0] != AGENT_VERSION) {
		d->version = d->buf[0];
		return -EPROTONOSUPPORT;
	}
	*out = (struct agent_frame){.type = d->buf[1],
		.stream = (uint32_t)get_number(d->buf + 4, 4),
		.payload = d->buf + AGENT_HEADER,
		.len = (size_t)n - AGENT_HEADER - 4};
	return 1;
}

int agent_decode(
	struct agent_decoder *d, const uint8_t *in, size_t len, size_t *used, struct agent_frame *out)
{
	*used = 0;
	while (*used < len) {
		const uint8_t *from = in + *used, *end = memchr(from, 0, len - *used);
		size_t n = end ? (size_t)(end - from) : len - *used;

		if (n > sizeof(d->buf) - d->len)
			d->too_long = true;
		if (!d->too_long)
			memcpy(d->buf + d->len, from, n);
		d->len = d->too_long ? sizeof(d->buf) : d->len + n;
		*used += n + (end != NULL);
		/* two zeros have nothing between them: that is how one begins anew */
		if (end && d->len)
			return open_frame(d, out);
	}
	return 0;
}

/* ---- fields ---- */

const uint8_t *agent_get_bytes(struct agent_reader *r, size_t len)
{
	const uint8_t *p = r->p;

	if (r->bad || len > r->left) {
		r->bad = true;
		return NULL;
	}
	r->p += len;
	r->left -= len;
	return p;
}

uint64_t agent_get(struct agent_reader *r, unsigned bytes)
{
	const uint8_t *p = agent_get_bytes(r, bytes);

	return p ? get_number(p, bytes) : 0;
}

const char *agent_get_string(struct agent_reader *r)
{
	const uint8_t *end = r->bad || !r->left ? NULL : memchr(r->p, 0, r->left);

	if (!end) {
		r->bad = true;
		return NULL;
	}
	return (const char *)agent_get_bytes(r, (size_t)(end - r->p) + 1);
}

void agent_put_bytes(struct agent_writer *w, const void *data, size_t len)
{
	if (w->bad || len > w->room - w->len) {
		w->bad = true;
		return;
	}
	if (len)
		memcpy(w->p + w->len, data, len);
	w->len += len;
}

void agent_put(struct agent_writer *w, uint64_t value, unsigned bytes)
{
	uint8_t le[8];

	put_number(le, value, bytes);
	agent_put_bytes(w, le, bytes);
}

void agent_put_string(struct agent_writer *w, const char *text)
{
	agent_put_bytes(w, text, strlen(text) + 1);
}

/* ---- payloads ---- */

static void copy(struct agent_reader *r, void *out, size_t len)
{
	const uint8_t *p = agent_get_bytes(r, len);

	if (p)
		memcpy(out, p, len);
}

bool agent_hello_parse(const struct agent_frame *f, struct agent_hello *out)
{
	struct agent_reader r = {f->payload, f->len, false};

	*out = (struct agent_hello){0};
	copy(&r, out->nonce, 16);
	copy(&r, out->epoch, 16);
	out->wall_ns = agent_get(&r, 8);
	copy(&r, out->entropy, 32);
	copy(&r, out->interface, 16);
	copy(&r, out->mac, 6);
	copy(&r, out->ipv4, 4);
	out->prefix = (uint8_t)agent_get(&r, 1);
	copy(&r, out->gateway, 4);
	/* what a later version adds comes behind */
	return f->stream == 0 && !r.bad && !out->interface[15] && out->prefix <= 32;
}

size_t agent_hello_make(const struct agent_hello *h, uint8_t out[256])
{
	struct agent_writer w = {out, 0, 256, false};

	agent_put_bytes(&w, h->nonce, 16);
	agent_put_bytes(&w, h->epoch, 16);
	agent_put(&w, h->wall_ns, 8);
	agent_put_bytes(&w, h->entropy, 32);
	agent_put_bytes(&w, h->interface, 16);
	agent_put_bytes(&w, h->mac, 6);
	agent_put_bytes(&w, h->ipv4, 4);
	agent_put(&w, h->prefix, 1);
	agent_put_bytes(&w, h->gateway, 4);
	return w.len;
}

bool agent_ack_parse(const struct agent_frame *f, struct agent_ack *out)
{
	struct agent_reader r = {f->payload, f->len, false};

	*out = (struct agent_ack){0};
	copy(&r, out->nonce, 16);
	out->rebind_ns = agent_get(&r, 8);
	out->clock_ns = agent_get(&r, 8);
	out->entropy_ns = agent_get(&r, 8);
	out->network_ns = agent_get(&r, 8);
	out->failed = (uint8_t)agent_get(&r, 1);
	return !r.bad;
}

size_t agent_ack_make(const struct agent_ack *a, uint8_t out[64])
{
	struct agent_writer w = {out, 0, 64, false};

	agent_put_bytes(&w, a->nonce, 16);
	agent_put(&w, a->rebind_ns, 8);
	agent_put(&w, a->clock_ns, 8);
	agent_put(&w, a->entropy_ns, 8);
	agent_put(&w, a->network_ns, 8);
	agent_put(&w, a->failed, 1);
	return w.len;
}

bool agent_exec_parse(const struct agent_frame *f, struct agent_exec *out)
{
	struct agent_reader r = {f->payload, f->len, false};

	out->flags = (uint8_t)agent_get(&r, 1);
	out->rows = (uint16_t)agent_get(&r, 2);
	out->cols = (uint16_t)agent_get(&r, 2);
	out->argc = (unsigned)agent_get(&r, 2);
	out->envc = (unsigned)agent_get(&r, 2);
	if (r.bad || !out->argc || out->argc > AGENT_WORDS_MAX || out->envc > AGENT_WORDS_MAX)
		return false;
	out->cwd = agent_get_string(&r);
	for (unsigned i = 0; i < out->argc; i++)
		out->argv[i] = agent_get_string(&r);
	for (unsigned i = 0; i < out->envc; i++)
		out->env[i] = agent_get_string(&r);
	if (r.bad || r.left || !out->argv[0][0])
		return false;
	out->argv[out->argc] = out->env[out->envc] = NULL;
	for (unsigned i = 0; i < out->envc; i++)
		if (out->env[i][0] == '=' || !strchr(out->env[i], '='))
			return false;
	return true;
}

size_t agent_exec_make(const struct agent_exec *e, uint8_t *out, size_t size)
{
	struct agent_writer w = {out, 0, size, false};

	agent_put(&w, e->flags, 1);
	agent_put(&w, e->rows, 2);
	agent_put(&w, e->cols, 2);
	agent_put(&w, e->argc, 2);
	agent_put(&w, e->envc, 2);
	agent_put_string(&w, e->cwd ? e->cwd : "");
	for (unsigned i = 0; i < e->argc; i++)
		agent_put_string(&w, e->argv[i]);
	for (unsigned i = 0; i < e->envc; i++)
		agent_put_string(&w, e->env[i]);
	return w.bad ? 0 : w.len;
}
