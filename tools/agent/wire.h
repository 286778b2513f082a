/* What a host and the agent in a guest say to each other: frames on any stream of bytes (docs/agent.md has them byte by
 * byte). Both sides use it, so it needs the C library and nothing else.
 *
 * A frame is COBS encoded and ends with a zero byte, which is nowhere else: whoever begins to listen in the middle, or
 * finds half of a frame that a killed writer left, is right again at the next zero. Its CRC-32C tells what is whole.
 *
 * Pure; no locks, no allocation. Nothing that comes from the other side is believed: lengths are checked against what
 * is there, and a frame or a field that is wrong is refused, never cut to fit. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AGENT_VERSION 1
#define AGENT_PORT "forkfs.agent" /* name of the virtio-serial port */
#define AGENT_VSOCK_PORT 5241
#define AGENT_PAYLOAD_MAX 16384u
#define AGENT_HEADER 8u
#define AGENT_BODY_MAX (AGENT_HEADER + AGENT_PAYLOAD_MAX + 4u)
#define AGENT_WIRE_MAX (AGENT_BODY_MAX + AGENT_BODY_MAX / 254u + 3u)
/* Bytes of stdin, and of stdout and stderr together, that may be on their way before the reader has taken some. */
#define AGENT_WINDOW 65536u
#define AGENT_WORDS_MAX 1024u /* arguments and variables of one command */

enum agent_type {
	/* host to guest */
	AGENT_HELLO = 1,
	AGENT_ACCEPT = 2,
	AGENT_PING = 3,
	AGENT_EXEC = 16,
	AGENT_STDIN = 17,
	AGENT_STDIN_END = 18,
	AGENT_SIGNAL = 19,
	AGENT_RESIZE = 20,
	AGENT_HANGUP = 21,
	AGENT_MAIN = 22,
	/* both ways */
	AGENT_WINDOW_MORE = 32,
	/* guest to host */
	AGENT_BEGIN = 64,
	AGENT_REBOUND = 65,
	AGENT_ACK = 66,
	AGENT_OUTPUT = 67,
	AGENT_PONG = 68,
	AGENT_ERROR = 69,
	AGENT_STARTED = 80,
	AGENT_REFUSED = 81,
	AGENT_STDOUT = 82,
	AGENT_STDERR = 83,
	AGENT_EXIT = 84,
	/* between commands and the link process of the same host: what it knows as JSON, when the handshake is through; or (1 byte)
	 * 0 at once, 1 with the guest's next answer to the health monitor, which asks it now */
	AGENT_STATUS = 96,
	AGENT_HEALTH = 97,
	/* the file that gets the output of the main command which is asked for next; the other way: what is missing in it */
	AGENT_LOG = 98,
};

struct agent_frame {
	uint8_t type;
	uint32_t stream; /* 0: of the connection */
	const uint8_t *payload;
	size_t len;
};

uint32_t agent_crc32c(const void *data, size_t len);

/* The bytes of a frame, in `out`, which has room for AGENT_WIRE_MAX; how many. 0: the payload is longer than
 * AGENT_PAYLOAD_MAX. */
size_t agent_encode(uint8_t type, uint32_t stream, const void *payload, size_t len, uint8_t *out);

struct agent_decoder {
	uint8_t buf[AGENT_WIRE_MAX];
	size_t len;
	bool too_long;
	uint64_t damaged; /* frames that were dropped */
	uint8_t version;  /* of the last frame that was dropped because of it */
};

/* Take bytes, and of them *used, up to the end of one frame. 1: *out is it, valid until the next call; 0: all were
 * taken and no frame is whole yet; -EBADMSG: a frame was damaged; -EPROTONOSUPPORT: it is whole, and of another version.
 * After an error the next frame can be read. */
int agent_decode(
	struct agent_decoder *d, const uint8_t *in, size_t len, size_t *used, struct agent_frame *out);

/* ---- fields of a payload ---- */

/* Little-endian numbers and bytes, one after the other. `bad` once something was not there: what is read then is 0. */
struct agent_reader {
	const uint8_t *p;
	size_t left;
	bool bad;
};
uint64_t agent_get(struct agent_reader *r, unsigned bytes);
const uint8_t *agent_get_bytes(struct agent_reader *r, size_t len);
/* A string with its NUL, in place. NULL and bad: it does not end. */
const char *agent_get_string(struct agent_reader *r);

/* The other way round. `bad` once something had no room. */
struct agent_writer {
	uint8_t *p;
	size_t len, room;
	bool bad;
};
void agent_put(struct agent_writer *w, uint64_t value, unsigned bytes);
void agent_put_bytes(struct agent_writer *w, const void *data, size_t len);
void agent_put_string(struct agent_writer *w, const char *text);

/* ---- payloads ---- */

struct agent_hello {
	uint8_t nonce[16]; /* of this session; everything that is said before it is of another */
	uint8_t epoch[16]; /* of this VM: another for each that was restored */
	uint64_t wall_ns;  /* CLOCK_REALTIME of the host; 0: leave the clock */
	uint8_t entropy[32];
	/* the guest's address on the network; interface "": leave it */
	char interface[16];
	uint8_t mac[6], ipv4[4], prefix, gateway[4];
};
bool agent_hello_parse(const struct agent_frame *f, struct agent_hello *out);
size_t agent_hello_make(const struct agent_hello *h, uint8_t out[256]);

enum { AGENT_FIRST = 1, AGENT_RESTORED = 2, AGENT_SAME = 0 };

/* How long a guest took for each part, in nanoseconds of its own clock. */
struct agent_ack {
	uint8_t nonce[16];
	uint64_t rebind_ns, clock_ns, entropy_ns, network_ns;
	uint8_t failed; /* bits: 1 clock, 2 entropy, 4 network could not be set */
};
bool agent_ack_parse(const struct agent_frame *f, struct agent_ack *out);
size_t agent_ack_make(const struct agent_ack *a, uint8_t out[64]);

/* OUTPUT: of a main command, whose output then goes to the host and not to the console. */
enum { AGENT_EXEC_TTY = 1, AGENT_EXEC_STDIN = 2, AGENT_EXEC_OUTPUT = 4 };

struct agent_exec {
	uint8_t flags;
	uint16_t rows, cols; /* of the terminal */
	const char *cwd;     /* "": where the agent is */
	const char *argv[AGENT_WORDS_MAX + 1],
		*env[AGENT_WORDS_MAX + 1]; /* end with NULL; in the payload's memory */
	unsigned argc, envc;
};
/* False: it is wrong in any way, or has no argument at all. */
bool agent_exec_parse(const struct agent_frame *f, struct agent_exec *out);
/* Bytes of the payload, or 0 when it does not fit into `size`. */
size_t agent_exec_make(const struct agent_exec *e, uint8_t *out, size_t size);

enum { AGENT_EXITED = 0, AGENT_SIGNALLED = 1 };
