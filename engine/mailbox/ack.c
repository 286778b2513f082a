/* Owns what an acknowledgement is, and the one waiter for those of a VM: which mailboxes are still waited for, until
 * when, and what came that was none of them.
 *
 * Threads: any, one at a time for a waiter: the caller guards it. Nothing here waits, allocates or reads a clock. */
#include "mailbox/ack.h"

#include <errno.h>
#include <string.h>

#include "base/util.h"

#define STAGE_APPLIED 1u

int ffs_ack_timeout(int64_t ms, const char *what, unsigned *out, struct ffs_error *err)
{
	if (ms < 0)
		return ffs_error_set(err, EINVAL, "%s must not be negative", what);
	if (ms > FFS_ACK_MAX_MS)
		return ffs_error_set(err, EINVAL, "%s must be %u or less", what, FFS_ACK_MAX_MS);
	*out = ms ? (unsigned)ms : FFS_ACK_DEFAULT_MS;
	return 0;
}

const char *ffs_ack_verdict_name(enum ffs_ack_verdict v)
{
	static const char *const names[] = {"taken", "malformed", "other", "forged", "duplicate", "late"};

	return names[v];
}

const char *ffs_ack_state_name(enum ffs_ack_state s)
{
	static const char *const names[] = {"pending", "applied", "timeout"};

	return names[s];
}

/* ---- the text ---- */

static int hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* 32 digits; with dashes only where a UUID has them. */
static bool parse_epoch(const char *s, size_t len, uint8_t out[16])
{
	bool dashes = len == 36;
	unsigned n = 0;

	if (!dashes && len != 32)
		return false;
	for (size_t i = 0; i < len; i++) {
		int v = hex_digit(s[i]);

		if (dashes && (i == 8 || i == 13 || i == 18 || i == 23)) {
			if (s[i] != '-')
				return false;
			continue;
		}
		if (v < 0)
			return false;
		out[n / 2] = (uint8_t)(n % 2 ? out[n / 2] | v : v << 4);
		n++;
	}
	return true;
}

bool ffs_ack_parse_epoch(const char *text, uint8_t out[16])
{
	return parse_epoch(text, strlen(text), out);
}

struct fields {
	struct ffs_ack *ack;
	unsigned stages, names, epochs;
};

static bool is_key(const char *word, size_t key, const char *name)
{
	return key == strlen(name) && memcmp(word, name, key) == 0;
}

static bool take_field(struct fields *f, const char *word, size_t len)
{
	const char *equals = memchr(word, '=', len);
	size_t key = equals ? (size_t)(equals - word) : 0, value_len = len - key - 1;
	const char *value = word + key + 1;

	if (!key)
		return false;
	if (is_key(word, key, "stage")) {
		f->ack->applied = value_len == 7 && memcmp(value, "applied", 7) == 0;
		return !f->stages++ && value_len;
	}
	if (is_key(word, key, "mailbox")) {
		if (f->names++ || value_len > FFS_MAILBOX_NAME_MAX || memchr(value, 0, value_len))
			return false;
		memcpy(f->ack->name, value, value_len);
		f->ack->name[value_len] = '\0';
		return ffs_mailbox_check_name(f->ack->name, NULL) == 0;
	}
	if (is_key(word, key, "epoch")) {
		f->ack->has_epoch = true;
		return !f->epochs++ && parse_epoch(value, value_len, f->ack->epoch);
	}
	return true;
}

static bool is_space(char c)
{
	return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

bool ffs_ack_parse(const char *text, size_t len, struct ffs_ack *out)
{
	struct fields f = {.ack = out};

	*out = (struct ffs_ack){0};
	if (len > FFS_ACK_TEXT_MAX)
		return false;
	for (size_t at = 0; at < len;) {
		size_t end = at;

		while (end < len && !is_space(text[end]))
			end++;
		if (end > at && !take_field(&f, text + at, end - at))
			return false;
		at = end + 1;
	}
	return f.stages && f.names;
}

/* ---- the waiter ---- */

int ffs_ack_add(struct ffs_ack_wait *w, enum ffs_mailbox_kind kind, const char *name, unsigned timeout_ms)
{
	struct ffs_ack_box *b = &w->box[w->n];

	if (w->n == FFS_MAILBOX_MAX || strlen(name) > FFS_MAILBOX_NAME_MAX)
		return -E2BIG;
	*b = (struct ffs_ack_box){.kind = kind, .timeout_ms = timeout_ms};
	memcpy(b->name, name, strlen(name));
	w->n++;
	return 0;
}

void ffs_ack_begin(struct ffs_ack_wait *w, uint64_t now_ns)
{
	if (!w->began_ns)
		w->began_ns = now_ns;
}

static uint64_t deadline_of(const struct ffs_ack_wait *w, const struct ffs_ack_box *b)
{
	return w->began_ns + b->timeout_ms * FFS_NS_PER_MS;
}

/* The epoch is right: what becomes of it? */
static enum ffs_ack_verdict take(struct ffs_ack_wait *w, struct ffs_ack_box *b, uint64_t now_ns)
{
	if (b->state == FFS_ACK_APPLIED)
		return FFS_ACK_DUPLICATE;
	if (b->state == FFS_ACK_PENDING && w->began_ns && now_ns >= deadline_of(w, b))
		b->state = FFS_ACK_TIMEOUT;
	if (b->state == FFS_ACK_TIMEOUT)
		return FFS_ACK_LATE;
	b->state = FFS_ACK_APPLIED;
	b->after_ns = w->began_ns ? now_ns - w->began_ns : 0;
	return FFS_ACK_TAKEN;
}

static enum ffs_ack_verdict judge(struct ffs_ack_wait *w, const char *text, size_t len, uint64_t now_ns)
{
	struct ffs_ack_box *b = NULL;
	struct ffs_ack ack;

	if (!ffs_ack_parse(text, len, &ack))
		return FFS_ACK_MALFORMED;
	if (!ack.applied)
		return FFS_ACK_OTHER;
	for (unsigned i = 0; i < w->n; i++)
		if (strcmp(w->box[i].name, ack.name) == 0) {
			if (b)
				return FFS_ACK_OTHER; /* the name says not which */
			b = &w->box[i];
		}
	if (!b)
		return FFS_ACK_OTHER;
	/* where the frame has no room for one the guest cannot know it */
	if (ack.has_epoch ? memcmp(ack.epoch, w->epoch, 16) != 0
			  : ffs_mailbox_layout(b->kind)->extension_at != 0)
		return FFS_ACK_FORGED;
	return take(w, b, now_ns);
}

enum ffs_ack_verdict ffs_ack_offer(struct ffs_ack_wait *w, const char *text, size_t len, uint64_t now_ns)
{
	enum ffs_ack_verdict v = judge(w, text, len, now_ns);

	w->count[v]++;
	return v;
}

unsigned ffs_ack_feed(
	struct ffs_ack_wait *w, struct ffs_ack_stream *s, const char *bytes, size_t len, uint64_t now_ns)
{
	unsigned n = 0;

	for (size_t i = 0; i < len; i++)
		if (bytes[i] == '\n') {
			ffs_ack_offer(w, s->text, s->len, now_ns);
			s->len = 0;
			n++;
		} else if (s->len < sizeof(s->text)) {
			s->text[s->len++] = bytes[i];
		}
	return n;
}

void ffs_ack_feed_end(struct ffs_ack_wait *w, struct ffs_ack_stream *s)
{
	if (s->len)
		w->count[FFS_ACK_MALFORMED]++;
	s->len = 0;
}

static void put_u32(uint8_t *p, uint32_t v)
{
	for (unsigned i = 0; i < 4; i++)
		p[i] = (uint8_t)(v >> 8 * i);
}

void ffs_ack_word(const char *name, const uint8_t epoch[16], uint8_t out[FFS_ACK_WORD_LEN])
{
	put_u32(out, STAGE_APPLIED);
	put_u32(out + 4, ffs_crc32c(ffs_crc32c(0, epoch, 16), name, strlen(name)));
}

enum ffs_ack_verdict ffs_ack_offer_word(struct ffs_ack_wait *w, unsigned i, const void *word, uint64_t now_ns)
{
	static const uint8_t none[4] = {0};
	struct ffs_ack_box *b = &w->box[i];
	uint8_t right[FFS_ACK_WORD_LEN];
	enum ffs_ack_verdict v = FFS_ACK_FORGED;

	/* the guest writes the half that begins with the stage last; what was seen before counts once */
	if (!memcmp(word, none, sizeof(none)) || !memcmp(word, b->word, FFS_ACK_WORD_LEN))
		return FFS_ACK_OTHER;
	memcpy(b->word, word, FFS_ACK_WORD_LEN);
	ffs_ack_word(b->name, w->epoch, right);
	if (!memcmp(word, right, FFS_ACK_WORD_LEN))
		v = take(w, b, now_ns);
	w->count[v]++;
	return v;
}

uint64_t ffs_ack_expire(struct ffs_ack_wait *w, uint64_t now_ns)
{
	uint64_t next = 0;

	for (unsigned i = 0; i < w->n && w->began_ns; i++) {
		struct ffs_ack_box *b = &w->box[i];
		uint64_t deadline = deadline_of(w, b);

		if (b->state != FFS_ACK_PENDING)
			continue;
		if (now_ns >= deadline)
			b->state = FFS_ACK_TIMEOUT;
		else if (!next || deadline < next)
			next = deadline;
	}
	return next;
}

bool ffs_ack_over(const struct ffs_ack_wait *w, enum ffs_mailbox_kind kind)
{
	for (unsigned i = 0; i < w->n; i++)
		if (w->box[i].state == FFS_ACK_PENDING &&
			(kind == FFS_MAILBOX_KINDS || w->box[i].kind == kind))
			return false;
	return true;
}

enum ffs_ack_state ffs_ack_result(const struct ffs_ack_wait *w)
{
	enum ffs_ack_state all = FFS_ACK_APPLIED;

	for (unsigned i = 0; i < w->n; i++)
		if (w->box[i].state == FFS_ACK_TIMEOUT)
			return FFS_ACK_TIMEOUT;
		else if (w->box[i].state == FFS_ACK_PENDING)
			all = FFS_ACK_PENDING;
	return all;
}

uint64_t ffs_ack_ignored(const struct ffs_ack_wait *w)
{
	uint64_t n = 0;

	for (unsigned v = FFS_ACK_TAKEN + 1; v < FFS_ACK_VERDICTS; v++)
		n += w->count[v];
	return n;
}
