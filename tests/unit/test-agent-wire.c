/* Frames between host and agent: round trips, golden bytes, and what a hostile side may send (tools/agent/wire.c). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include <cmocka.h>
#include <errno.h>

#include "agent/out.h"
#include "agent/wire.h"

static uint8_t wire[4 * AGENT_WIRE_MAX];
static struct agent_decoder dec;

static void begin(void)
{
	memset(&dec, 0, sizeof(dec));
}

/* One whole frame and nothing else. */
static int decode_all(const uint8_t *in, size_t len, struct agent_frame *f)
{
	size_t used;
	int r = agent_decode(&dec, in, len, &used, f);

	assert_true(used <= len);
	return r;
}

/* An independent look at the bytes: PING on stream 0x01020304 with the payload "a\0b". */
static void test_golden(void **state)
{
	static const uint8_t body[] = {1, 3, 0, 0, 4, 3, 2, 1, 'a', 0, 'b'};
	uint32_t crc = agent_crc32c(body, sizeof(body));
	struct agent_frame f;
	size_t n = agent_encode(3, 0x01020304, "a\0b", 3, wire);
	static const uint8_t begins[] = {3, 1, 3, 1, 6, 4, 3, 2, 1, 'a'};

	assert_int_equal(agent_crc32c("123456789", 9), 0xe3069283); /* RFC 3720's check value */
	assert_memory_equal(wire, begins, sizeof(begins));
	assert_int_equal(wire[n - 1], 0);
	assert_null(memchr(wire, 0, n - 1));
	if (!memchr(&crc, 0, 4))
		assert_memory_equal(wire + n - 5, &crc, 4);
	begin();
	assert_int_equal(decode_all(wire, n, &f), 1);
	assert_int_equal(f.type, 3);
	assert_int_equal(f.stream, 0x01020304);
	assert_int_equal(f.len, 3);
	assert_memory_equal(f.payload, "a\0b", 3);
}

/* Every length around the blocks of the encoding, with and without zeros, in one piece and byte by byte. */
static void test_lengths(void **state)
{
	static uint8_t payload[AGENT_PAYLOAD_MAX + 1];
	static const size_t around[] = {0, 1, 240, 241, 242, 243, 254, 255, 256, 500, 508, 509, 16383, 16384};
	struct agent_frame f;

	for (unsigned kind = 0; kind < 3; kind++)
		for (unsigned i = 0; i < sizeof(around) / sizeof(*around); i++) {
			size_t len = around[i], n, used;
			int r = 0;

			for (size_t k = 0; k < len; k++)
				payload[k] = kind == 0 ? 0 : kind == 1 ? 0xff : (uint8_t)(k * 7);
			n = agent_encode(AGENT_STDOUT, 7, payload, len, wire);
			assert_true(n > len && n <= AGENT_WIRE_MAX);
			assert_ptr_equal(memchr(wire, 0, n), wire + n - 1);
			begin();
			assert_int_equal(decode_all(wire, n, &f), 1);
			assert_int_equal(f.len, len);
			assert_memory_equal(f.payload, payload, len);
			for (size_t k = 0; k < n; k++) {
				assert_int_equal(r, 0);
				r = agent_decode(&dec, wire + k, 1, &used, &f);
			}
			assert_int_equal(r, 1);
			assert_memory_equal(f.payload, payload, len);
		}
	assert_int_equal(agent_encode(AGENT_STDOUT, 7, payload, AGENT_PAYLOAD_MAX + 1, wire), 0);
}

/* A killed writer leaves half of a frame: what comes after the next zero is read. */
static void test_resync(void **state)
{
	struct agent_frame f;
	static uint8_t stream[512 + AGENT_WIRE_MAX];
	size_t whole = agent_encode(AGENT_PING, 0, "first", 5, wire), used;

	for (size_t cut = 1; cut < whole - 1; cut++) {
		size_t n = cut;

		memcpy(stream, wire, cut);
		stream[n++] = 0;
		n += agent_encode(AGENT_PING, 0, "second", 6, stream + n);
		begin();
		assert_int_equal(agent_decode(&dec, stream, n, &used, &f), -EBADMSG);
		assert_int_equal(used, cut + 1);
		assert_int_equal(agent_decode(&dec, stream + used, n - used, &used, &f), 1);
		assert_int_equal(f.len, 6);
		assert_int_equal(dec.damaged, 1);
	}
	begin();
	assert_int_equal(agent_decode(&dec, (const uint8_t *)"\0\0\0\0", 4, &used, &f), 0);
	assert_int_equal(dec.damaged, 0);
}

/* No frame with a changed bit is taken for another. */
static void test_flipped(void **state)
{
	struct agent_frame f;
	size_t n = agent_encode(AGENT_EXIT, 9, "\1\7", 2, wire);

	for (size_t i = 0; i < n - 1; i++)
		for (int bit = 0; bit < 8; bit++) {
			size_t at = 0, used;
			int r;

			wire[i] ^= (uint8_t)(1 << bit);
			begin();
			while (at < n) {
				r = agent_decode(&dec, wire + at, n - at, &used, &f);
				assert_true(r <= 0);
				at += used;
			}
			wire[i] ^= (uint8_t)(1 << bit);
		}
}

/* A frame without an end takes no more memory than the longest, and the next is read. */
static void test_endless(void **state)
{
	struct agent_frame f;
	size_t used;

	begin();
	memset(wire, 1, sizeof(wire));
	for (int i = 0; i < 50; i++) {
		assert_int_equal(agent_decode(&dec, wire, sizeof(wire), &used, &f), 0);
		assert_int_equal(used, sizeof(wire));
	}
	assert_int_equal(agent_decode(&dec, (const uint8_t *)"", 1, &used, &f), -EBADMSG);
	size_t n = agent_encode(AGENT_PING, 0, "x", 1, wire);

	assert_int_equal(agent_decode(&dec, wire, n, &used, &f), 1);
}

static void test_version(void **state)
{
	uint8_t body[] = {2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, out[64];
	uint32_t crc = agent_crc32c(body, 8);
	size_t n = 1, at = 0, used;
	uint8_t code = 1;
	struct agent_frame f;

	memcpy(body + 8, &crc, 4);
	/* stuffed by hand */
	for (size_t i = 0; i < sizeof(body); i++) {
		if (body[i]) {
			out[n++] = body[i];
			code++;
		} else {
			out[at] = code;
			code = 1;
			at = n++;
		}
	}
	out[at] = code;
	out[n++] = 0;
	begin();
	assert_int_equal(agent_decode(&dec, out, n, &used, &f), -EPROTONOSUPPORT);
	assert_int_equal(dec.version, 2);
}

/* A command: what was put in comes out, and no shorter or longer payload is one. */
static void test_exec(void **state)
{
	static struct agent_exec e = {.flags = AGENT_EXEC_TTY,
					 .rows = 24,
					 .cols = 80,
					 .cwd = "/tmp",
					 .argv = {"sh", "-c", ""},
					 .argc = 3,
					 .env = {"A=1", "B="},
					 .envc = 2},
				 got;
	uint8_t p[256];
	size_t n = agent_exec_make(&e, p, sizeof(p));
	struct agent_frame f = {.type = AGENT_EXEC, .stream = 1, .payload = p, .len = n};

	assert_true(agent_exec_parse(&f, &got));
	assert_int_equal(got.argc, 3);
	assert_string_equal(got.argv[1], "-c");
	assert_string_equal(got.argv[2], "");
	assert_null(got.argv[3]);
	assert_string_equal(got.env[0], "A=1");
	assert_null(got.env[2]);
	assert_string_equal(got.cwd, "/tmp");
	assert_int_equal(got.cols, 80);
	for (size_t cut = 0; cut < n; cut++) {
		uint8_t *exact = malloc(cut ? cut : 1);

		memcpy(exact, p, cut);
		f.payload = exact;
		f.len = cut;
		assert_false(agent_exec_parse(&f, &got));
		free(exact);
	}
	p[n] = 0;
	f.payload = p;
	f.len = n + 1;
	assert_false(agent_exec_parse(&f, &got));
	p[5] = p[6] = 0xff; /* 65535 arguments */
	f.len = n;
	assert_false(agent_exec_parse(&f, &got));
	e.argv[0] = "";
	f.len = agent_exec_make(&e, p, sizeof(p));
	assert_false(agent_exec_parse(&f, &got));
	e.argv[0] = "sh";
	e.env[1] = "no variable";
	f.len = agent_exec_make(&e, p, sizeof(p));
	assert_false(agent_exec_parse(&f, &got));
	assert_int_equal(agent_exec_make(&e, p, 8), 0);
}

static void test_hello(void **state)
{
	struct agent_hello h = {.nonce = "0123456789abcde",
				   .wall_ns = 1ull << 60,
				   .interface = "eth0",
				   .prefix = 24},
			   got;
	struct agent_ack a = {.rebind_ns = 1, .network_ns = 4, .failed = 2}, b;
	uint8_t p[256];
	struct agent_frame f = {.type = AGENT_HELLO, .payload = p, .len = agent_hello_make(&h, p)};

	assert_true(agent_hello_parse(&f, &got));
	assert_memory_equal(&h, &got, sizeof(h));
	for (size_t len = f.len; len-- > 0;) {
		struct agent_frame shorter = {.payload = p, .len = len};

		assert_false(agent_hello_parse(&shorter, &got));
	}
	h.prefix = 33;
	f.len = agent_hello_make(&h, p);
	assert_false(agent_hello_parse(&f, &got));
	h.prefix = 24;
	h.interface[15] = 'x'; /* no end */
	f.len = agent_hello_make(&h, p);
	assert_false(agent_hello_parse(&f, &got));
	f.len = agent_ack_make(&a, p);
	assert_true(agent_ack_parse(&f, &b));
	assert_memory_equal(&a, &b, sizeof(a));
	f.len--;
	assert_false(agent_ack_parse(&f, &b));
}

/* Random bytes, and true frames among them: nothing is read outside (a sanitizer sees it), true frames come through. */
static void test_noise(void **state)
{
	uint64_t x = 88172645463325252ull;

	begin();
	for (int round = 0; round < 3000; round++) {
		struct agent_frame f;
		size_t n = 0, at = 0, used;
		bool seen = false;

		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		for (; n < x % 300; n++)
			wire[n] = (uint8_t)(x >> (n % 57));
		wire[n++] = 0;
		n += agent_encode(AGENT_PING, (uint32_t)round, "true", 4, wire + n);
		while (at < n) {
			if (agent_decode(&dec, wire + at, n - at, &used, &f) == 1)
				seen = f.stream == (uint32_t)round && f.len == 4;
			at += used;
		}
		assert_true(seen);
	}
}

/* Something always waits, and never all of it is sent: the bytes come in order, and the room does not grow with what goes through. */
static void test_out(void **state)
{
	struct agent_out o = {0};
	uint8_t payload[1000];
	uint32_t next = 0;

	begin();
	for (uint32_t i = 0; i < 20000; i++) {
		size_t n, used, at = 0;
		struct agent_frame f;

		memset(payload, (int)i, sizeof(payload));
		assert_true(agent_out_frame(&o, AGENT_STDOUT, i, payload, i % sizeof(payload)));
		n = agent_out_waits(&o) > 3000 ? agent_out_waits(&o) - 2999 : 0;
		while (at < n) {
			int r = agent_decode(&dec, o.p + o.at + at, n - at, &used, &f);

			at += used;
			if (r != 1)
				continue;
			assert_int_equal(f.stream, next);
			assert_int_equal(f.len, next % sizeof(payload));
			assert_true(!f.len || f.payload[f.len - 1] == (uint8_t)next);
			next++;
		}
		agent_out_sent(&o, n);
		assert_true(o.room <= 4 * (AGENT_WIRE_MAX + 3000));
	}
	assert_true(next > 19900);
	agent_out_sent(&o, agent_out_waits(&o));
	assert_true(!o.at && !o.len);
	assert_true(agent_out_bytes(&o, "abc", 3));
	agent_out_clear(&o);
	assert_int_equal(agent_out_waits(&o), 0);
	agent_out_free(&o);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_out), cmocka_unit_test(test_golden),
		cmocka_unit_test(test_lengths), cmocka_unit_test(test_resync), cmocka_unit_test(test_flipped),
		cmocka_unit_test(test_endless), cmocka_unit_test(test_version), cmocka_unit_test(test_exec),
		cmocka_unit_test(test_hello), cmocka_unit_test(test_noise)};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
