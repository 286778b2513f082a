/* What a guest and a host say to each other is read from a stranger: frames, and the payloads in them.
 *
 *   with -fsanitize=fuzzer   a fuzzer of it (meson option `fuzz`)
 *   -DFFS_REPLAY             a plain program: true frames, with each byte changed in turn, and cut short
 *
 * The first byte says in what pieces the rest is read. Whatever the input, nothing may crash, and what was accepted must
 * be what it says. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "agent/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_exec(const struct agent_frame *f)
{
	static struct agent_exec e;
	uint8_t again[AGENT_PAYLOAD_MAX];

	if (!agent_exec_parse(f, &e))
		return;
	if (!e.argc || e.argv[e.argc] || e.env[e.envc] ||
		agent_exec_make(&e, again, sizeof(again)) != f->len || memcmp(again, f->payload, f->len) != 0)
		abort();
}

static void try_payload(const struct agent_frame *f)
{
	/* a copy of exactly that size: so that a sanitizer sees a read beyond it */
	uint8_t *copy = malloc(f->len ? f->len : 1);
	struct agent_frame exact = *f;
	struct agent_hello h;
	struct agent_ack a;

	if (!copy)
		abort();
	memcpy(copy, f->payload, f->len);
	exact.payload = copy;
	try_exec(&exact);
	if (agent_hello_parse(&exact, &h) && (h.interface[15] || h.prefix > 32))
		abort();
	agent_ack_parse(&exact, &a);
	free(copy);
}

static void try_frame(const struct agent_frame *f)
{
	static uint8_t wire[AGENT_WIRE_MAX];
	static struct agent_decoder d;
	struct agent_frame again;
	size_t used, n;

	if (f->len > AGENT_PAYLOAD_MAX)
		abort();
	n = agent_encode(f->type, f->stream, f->payload, f->len, wire);
	if (!n || agent_decode(&d, wire, n, &used, &again) != 1 || used != n || again.type != f->type ||
		again.stream != f->stream || again.len != f->len ||
		memcmp(again.payload, f->payload, f->len) != 0)
		abort();
	try_payload(f);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct agent_decoder *d = calloc(1, sizeof(*d));
	size_t piece = size ? 1 + data[0] : 1, at = 1;

	if (!d)
		abort();
	/* as a payload by itself too: a CRC would keep a fuzzer away from it */
	if (size > 1)
		try_payload(&(struct agent_frame){.payload = data + 1, .len = size - 1});
	while (at < size) {
		size_t n = size - at < piece ? size - at : piece, used;
		struct agent_frame f;

		if (agent_decode(d, data + at, n, &used, &f) == 1)
			try_frame(&f);
		if (!used || used > n)
			abort();
		at += used;
	}
	free(d);
	return 0;
}

#ifdef FFS_REPLAY
/* A session as it is: HELLO, EXEC, some data and an ACK. Returns its length. */
static size_t session(uint8_t *out)
{
	static struct agent_exec e = {
		.cwd = "/", .argv = {"sh", "-c", "exit 7"}, .argc = 3, .env = {"A=b"}, .envc = 1};
	struct agent_hello h = {
		.nonce = "nonce", .epoch = "epoch", .wall_ns = 77, .interface = "eth0", .prefix = 24};
	struct agent_ack a = {.nonce = "nonce", .clock_ns = 5};
	uint8_t p[512];
	size_t n = 0, len;

	out[n++] = 40;
	len = agent_hello_make(&h, p);
	n += agent_encode(AGENT_HELLO, 0, p, len, out + n);
	len = agent_ack_make(&a, p);
	n += agent_encode(AGENT_ACK, 0, p, len, out + n);
	len = agent_exec_make(&e, p, sizeof(p));
	n += agent_encode(AGENT_EXEC, 1, p, len, out + n);
	n += agent_encode(AGENT_STDOUT, 1, "hello\n", 6, out + n);
	return n;
}

int main(void)
{
	static uint8_t in[5 * AGENT_WIRE_MAX], changed[5 * AGENT_WIRE_MAX];
	static const uint8_t with[] = {0xff, 0x80, 0x01};
	size_t n = session(in);

	LLVMFuzzerTestOneInput(in, n);
	for (size_t i = 0; i < n; i++) {
		LLVMFuzzerTestOneInput(in, i);
		for (unsigned k = 0; k < sizeof(with); k++) {
			memcpy(changed, in, n);
			changed[i] ^= with[k];
			LLVMFuzzerTestOneInput(changed, n);
		}
	}
	/* payloads by themselves: of HELLO and EXEC, each byte changed */
	struct agent_decoder d = {0};
	size_t at = 1, used;
	struct agent_frame f;

	while (at < n) {
		if (agent_decode(&d, in + at, n - at, &used, &f) == 1)
			for (size_t i = 0; i < f.len; i++)
				for (unsigned k = 0; k < sizeof(with); k++) {
					memcpy(changed, f.payload, f.len);
					changed[i] ^= with[k];
					try_payload(&(struct agent_frame){.payload = changed, .len = f.len});
				}
		at += used;
	}
	return 0;
}
#endif
