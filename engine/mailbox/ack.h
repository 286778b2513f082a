/* Acknowledgements: how a guest says that it has taken its payload, and one waiter for all of a VM's mailboxes.
 * The texts are in docs/mailbox.md. Whatever comes is untrusted: what is not exactly an acknowledgement that is
 * waited for changes nothing but a count. */
#pragma once

#include "mailbox/mailbox.h"

#define FFS_ACK_DEFAULT_MS 5000u
#define FFS_ACK_MAX_MS 30000u
#define FFS_ACK_TEXT_MAX 512u /* bytes of a text; longer ones are malformed */

/* How long to wait, as somebody asks for it: milliseconds, 0 the default. `what` begins the sentence. 0 or
 * -EINVAL. */
int ffs_ack_timeout(int64_t ms, const char *what, unsigned *out, struct ffs_error *err);

/* A text, taken apart. */
struct ffs_ack {
	char name[FFS_MAILBOX_NAME_MAX + 1]; /* of the mailbox */
	bool applied;                        /* stage=applied */
	bool has_epoch;
	uint8_t epoch[16];
};
/* 32 hexadecimal digits, with dashes where a UUID has them, or none. */
bool ffs_ack_parse_epoch(const char *text, uint8_t out[16]);
/* Fields KEY=VALUE in any order, between white space: stage and mailbox, once each, epoch at most once (32
 * hexadecimal digits, as a UUID's or without dashes); others are passed over. false: it is no such text. */
bool ffs_ack_parse(const char *text, size_t len, struct ffs_ack *out);

enum ffs_ack_verdict {
	FFS_ACK_TAKEN,     /* it is what was waited for */
	FFS_ACK_MALFORMED, /* no acknowledgement at all */
	FFS_ACK_OTHER,  /* another stage, or of a mailbox that is not waited for (or whose name two have) */
	FFS_ACK_FORGED, /* another epoch, or none where the frame has one */
	FFS_ACK_DUPLICATE, /* came before */
	FFS_ACK_LATE,      /* its time was over */
	FFS_ACK_VERDICTS
};
const char *ffs_ack_verdict_name(enum ffs_ack_verdict v);

enum ffs_ack_state { FFS_ACK_PENDING, FFS_ACK_APPLIED, FFS_ACK_TIMEOUT };
const char *ffs_ack_state_name(enum ffs_ack_state s);

/* One mailbox whose acknowledgement is waited for. */
struct ffs_ack_box {
	enum ffs_mailbox_kind kind;
	char name[FFS_MAILBOX_NAME_MAX + 1];
	unsigned timeout_ms; /* 1 to FFS_ACK_MAX_MS */
	enum ffs_ack_state state;
	uint64_t after_ns; /* applied: so long after the beginning */
	uint8_t word[8];   /* of its page, that was counted last */
};

/* All of one VM, or of one fork. Zero-initialised; the caller fills epoch and boxes, and guards it. */
struct ffs_ack_wait {
	uint8_t epoch[16];
	unsigned n;
	struct ffs_ack_box box[FFS_MAILBOX_MAX];
	uint64_t began_ns; /* 0: no time runs yet */
	uint64_t count[FFS_ACK_VERDICTS];
};
/* Add a mailbox to what is waited for: -E2BIG. */
int ffs_ack_add(struct ffs_ack_wait *w, enum ffs_mailbox_kind kind, const char *name, unsigned timeout_ms);
/* The time of all of them begins now (ffs_now_ns()), once. */
void ffs_ack_begin(struct ffs_ack_wait *w, uint64_t now_ns);
/* A text has come. */
enum ffs_ack_verdict ffs_ack_offer(struct ffs_ack_wait *w, const char *text, size_t len, uint64_t now_ns);
/* The same of texts that come as a stream, each ended by a newline: what has no end is no text, for it could be the
 * beginning of another. Zero-initialised. */
struct ffs_ack_stream {
	char text[FFS_ACK_TEXT_MAX + 1];
	size_t len; /* what is longer is cut here, and still too long */
};
/* So much of it has come: how many texts were in it, whatever they were. */
unsigned ffs_ack_feed(
	struct ffs_ack_wait *w, struct ffs_ack_stream *s, const char *bytes, size_t len, uint64_t now_ns);
/* It is over: half a text is malformed. */
void ffs_ack_feed_end(struct ffs_ack_wait *w, struct ffs_ack_stream *s);
/* The acknowledgement in the frame of box i, FFS_ACK_WORD_LEN bytes at FFS_ACK_WORD_AT of its page, as they are
 * now. FFS_ACK_OTHER: none yet. */
#define FFS_ACK_WORD_AT 232u
#define FFS_ACK_WORD_LEN 8u
enum ffs_ack_verdict ffs_ack_offer_word(
	struct ffs_ack_wait *w, unsigned i, const void *word, uint64_t now_ns);
/* What a guest puts there. */
void ffs_ack_word(const char *name, const uint8_t epoch[16], uint8_t out[FFS_ACK_WORD_LEN]);
/* Those whose time is over have failed. The next deadline (ffs_now_ns()) of those still waited for; 0: there is
 * none. */
uint64_t ffs_ack_expire(struct ffs_ack_wait *w, uint64_t now_ns);
/* Nothing of this kind is waited for any more (FFS_MAILBOX_KINDS: of any). */
bool ffs_ack_over(const struct ffs_ack_wait *w, enum ffs_mailbox_kind kind);
/* All of it together: applied when all are, timeout when one is over. */
enum ffs_ack_state ffs_ack_result(const struct ffs_ack_wait *w);
/* How many came that were not taken. */
uint64_t ffs_ack_ignored(const struct ffs_ack_wait *w);
