/* Mailboxes: pages of guest memory that a guest's agent publishes for a payload of the host's, and overlays,
 * which put payloads over a branch without changing it. The public header of engine/mailbox/; it knows no VMM
 * and no branch, only memory that can be read.
 *
 * The format of the frames is in docs/mailbox.md. Guest memory is untrusted: nothing that is read from it is
 * believed before it was checked, and how much of it is kept is bounded. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

#define FFS_MAILBOX_PAGE 4096u
#define FFS_MAILBOX_MAX 16u           /* payloads of one fork */
#define FFS_MAILBOX_NAME_MAX 64u      /* bytes of a name */
#define FFS_MAILBOX_TOKEN_MAX 128u    /* bytes of the longest token of any layout */
#define FFS_MAILBOX_PAYLOAD_MAX 4024u /* bytes of the largest payload of any layout */
#define FFS_MAILBOX_FRAMES_MAX 4096u  /* frames of one memory; more are refused (EOVERFLOW) */

/* ---- layouts ---- */

enum ffs_mailbox_kind { FFS_MAILBOX_FORK, FFS_MAILBOX_NETWORK, FFS_MAILBOX_KINDS };

/* One row of the table of frames. Offsets are bytes from the beginning of the page; all numbers in a frame
 * are u32, little-endian. */
struct ffs_mailbox_layout {
	const char *title; /* "fork", "resume-network" */
	const char *magic;
	unsigned magic_len;  /* with its NUL */
	bool named;          /* after the magic: the name, a NUL */
	unsigned token_max;  /* bytes, at least 1 */
	unsigned marker_end; /* magic, name and token lie before it */
	unsigned seq_at, length_at, payload_at;
	unsigned payload_max;  /* payload_at + payload_max is the whole page */
	unsigned extension_at; /* our fields, 32 bytes; 0: none */
};
/* Never NULL. */
const struct ffs_mailbox_layout *ffs_mailbox_layout(enum ffs_mailbox_kind kind);

/* What a frame says of itself. The token may hold any byte but NUL. */
struct ffs_mailbox_id {
	enum ffs_mailbox_kind kind;
	char name[FFS_MAILBOX_NAME_MAX + 1]; /* of an unnamed layout: its title */
	unsigned token_len;
	char token[FFS_MAILBOX_TOKEN_MAX + 1];
};

/* 1 to 64 of A-Z a-z 0-9 . _ : -; padded or otherwise different names are refused, not trimmed. 0 or -EINVAL.
 */
int ffs_mailbox_check_name(const char *name, struct ffs_error *err);
/* 1 to token_max bytes, no NUL, not blank. 0 or -EINVAL. */
int ffs_mailbox_check_token(enum ffs_mailbox_kind kind, const char *token, size_t len, struct ffs_error *err);

/* Make the marker that a guest publishes (and tests look for). Bytes written to `out`, which has room for
 * marker_end of the layout; -EINVAL: a name or token that no frame can have. */
int ffs_mailbox_marker(const struct ffs_mailbox_id *id, void *out, struct ffs_error *err);
/* Is this page a frame? Name and token must be whole and terminated. */
bool ffs_mailbox_parse(const void *page, struct ffs_mailbox_id *out);

/* ---- finding ---- */

struct ffs_mailbox_frame {
	uint64_t offset; /* in memory.bin, a multiple of the page */
	struct ffs_mailbox_id id;
};

/* The frames of one memory by ascending offset. */
struct ffs_mailbox_frames {
	struct ffs_mailbox_frame *frame;
	unsigned n;
};
void ffs_mailbox_frames_free(struct ffs_mailbox_frames *f);
int ffs_mailbox_frames_copy(struct ffs_mailbox_frames *to, const struct ffs_mailbox_frames *from);

/* Memory that can be read. `fd`: a file with the same bytes at the same offsets, whose holes are zero, and
 * which nobody can cut off, or -1. `read`: from any thread; bytes read, short at the end only, or -errno.
 * `heads`, which may be NULL: the first 8 bytes of each of so many pages from `off`, quicker than `read`; 0 or
 * -errno. */
struct ffs_mailbox_memory {
	uint64_t size;
	int fd;
	ssize_t (*read)(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err);
	void *arg;
	int (*heads)(void *arg, uint64_t *head, size_t pages, uint64_t off, struct ffs_error *err);
};

/* Look at the beginning of every page of a memory. Takes about 0.1 s a GiB where there is a file or `heads`, as
 * long as reading all of it takes else; uses up to four threads; never call it inside a pause. -EOVERFLOW: more
 * than FFS_MAILBOX_FRAMES_MAX; -EIO and what `read` says; -ENOMEM. *out is the caller's then. */
int ffs_mailbox_scan(
	const struct ffs_mailbox_memory *mem, struct ffs_mailbox_frames *out, struct ffs_error *err);
/* Look again whether each of these frames is still there, and keep those that are (another branch of the same
 * VM). -errno of `read`. */
int ffs_mailbox_verify(
	const struct ffs_mailbox_memory *mem, struct ffs_mailbox_frames *frames, struct ffs_error *err);

/* The one frame that is meant. `name` is NAME, or NAME:TOKEN when token is NULL; without a token the name
 * alone must be unique. 0 and *out (borrowed from `in`); -ENOENT: there is none; -ENOTUNIQ: several, and the
 * sentence has their offsets (stale copies in freed pages and page cache are real); -EINVAL. */
int ffs_mailbox_find(const struct ffs_mailbox_frames *in, const char *name, const char *token,
	size_t token_len, const struct ffs_mailbox_frame **out, struct ffs_error *err);
/* Does NAME or NAME:TOKEN, as written, mean this frame? */
bool ffs_mailbox_means(const struct ffs_mailbox_id *id, const char *text);
/* Does the frame lie whole within a memory, and a payload of so many bytes within the frame? 0, -EFBIG or
 * -ERANGE. */
int ffs_mailbox_fits(
	enum ffs_mailbox_kind kind, size_t payload, uint64_t offset, uint64_t memory, struct ffs_error *err);

/* ---- writing ---- */

/* Bits of an extension's flags. */
#define FFS_MAILBOX_PRESENT 1u /* crc32c, flags and epoch are there */
#define FFS_MAILBOX_WANTS_ACK 2u

/* Put bytes somewhere into the frame at an offset within it: 0 or -errno. Each call is one step: whoever
 * looks at the frame meanwhile sees the steps in their order. */
typedef int (*ffs_mailbox_put)(void *arg, const void *bytes, size_t len, unsigned at);

/* Payload, then (fork frames) extension, then length, then seq = 1: the publication. `epoch`: the 16 bytes of
 * a UUID. The caller has asked ffs_mailbox_fits(). 0 or -errno of `put`, and the frame was not published. */
int ffs_mailbox_write(enum ffs_mailbox_kind kind, const void *payload, size_t len, const uint8_t epoch[16],
	uint32_t flags, ffs_mailbox_put put, void *arg);

/* What a guest finds in a frame. Untrusted on either side: lengths and checksum are checked. 1 and *payload
 * (within `page`) with *len; 0: nothing was published; -EBADMSG: it is damaged. epoch and flags are zero for
 * a writer without extension. */
int ffs_mailbox_read(enum ffs_mailbox_kind kind, const void *page, const void **payload, size_t *len,
	uint8_t epoch[16], uint32_t *flags);

/* CRC-32C (Castagnoli, RFC 3720 B.4), continuing `crc` (0 to begin). */
uint32_t ffs_crc32c(uint32_t crc, const void *bytes, size_t len);

/* ---- payloads: JSON that is checked and never made anew ---- */

#define FFS_JSON_DEPTH 32

/* An object that comes in pieces (RFC 8259, UTF-8). Zero-initialised; no allocation. */
struct ffs_json {
	size_t at;           /* bytes taken so far */
	size_t begin, end;   /* of the object, once `state` says so */
	uint8_t state, back; /* private, as all that follows */
	uint8_t digits, utf8_left, utf8_low, utf8_high;
	uint16_t unit;
	bool second;
	uint8_t depth;
	uint8_t stack[FFS_JSON_DEPTH];
	const char *word;
};
/* Take further bytes. 1: the object is complete (white space may follow); 0: more must come; -EINVAL with a
 * sentence that names the place: this can never become one JSON object. */
int ffs_json_feed(struct ffs_json *j, const char *bytes, size_t len, struct ffs_error *err);

/* A piece of a text. */
struct ffs_span {
	const char *at; /* NULL: nothing */
	size_t len;
};
/* A whole text: *object is what is left without the white space around it. 0 or -EINVAL. */
int ffs_json_object(const char *text, size_t len, struct ffs_span *object, struct ffs_error *err);
/* The value of a member of a checked object, as it stands there (the last one of several, as parsers have
 * it), and how many there were; at NULL when there is none. Keys are compared decoded. */
unsigned ffs_json_member(struct ffs_span object, const char *key, struct ffs_span *value);
/* An element of a checked array; false: it has no so many. */
bool ffs_json_element(struct ffs_span array, unsigned i, struct ffs_span *value);
/* Insert `"KEY":PORT` into a checked object (or replace its value where it has one) by an edit of its bytes; the key needs
 * no escapes. Bytes of the result, which may be as long as `room` at most; -EFBIG; -EINVAL: it has several. */
#define FFS_ACK_PORT_KEY "ack_port"             /* of UDP */
#define FFS_ACK_VSOCK_PORT_KEY "ack_vsock_port" /* of the host, by vsock */
ssize_t ffs_json_add_port(struct ffs_span object, const char *key, unsigned port, char *out, size_t room,
	struct ffs_error *err);

/* The page of a frame as a fork has it: `page` is the branch's, and gets the checked object `payload`. wants_ack: with
 * its flag, and with `port` as the payload's ack_port (0: none). 0 or -errno (-EFBIG: no room), and the page is spoilt. */
int ffs_mailbox_lay(enum ffs_mailbox_kind kind, struct ffs_span payload, const uint8_t epoch[16],
	bool wants_ack, unsigned port, void *page, struct ffs_error *err);

/* ---- overlays ---- */

/* A fork's pages over its branch: what it costs beyond the branch. Reference counted; changed by its one
 * owner until it is first read through, then fixed. */
struct ffs_overlay;

struct ffs_overlay *ffs_overlay_new(void);
struct ffs_overlay *ffs_overlay_ref(struct ffs_overlay *o);
void ffs_overlay_unref(struct ffs_overlay *o);
/* A copy to change. NULL: no memory. */
struct ffs_overlay *ffs_overlay_copy(const struct ffs_overlay *o);
/* Put a page (copied) at an offset, in place of one that is there. -EINVAL: not at a page; -ENOMEM. */
int ffs_overlay_set(struct ffs_overlay *o, uint64_t offset, const void *page);
void ffs_overlay_remove(struct ffs_overlay *o, uint64_t offset);
unsigned ffs_overlay_pages(const struct ffs_overlay *o);
/* Page i by ascending offset, i < ffs_overlay_pages(). Borrowed. */
const void *ffs_overlay_page(const struct ffs_overlay *o, unsigned i, uint64_t *offset);
/* Lay it over bytes of its branch that were read at `off`. NULL overlay: nothing. */
void ffs_overlay_apply(const struct ffs_overlay *o, void *buf, size_t len, uint64_t off);
