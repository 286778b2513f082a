/* Owns the format of a frame: the table of layouts, markers, the order of writing, the checksum.
 *
 * Pure, any thread; allocates nothing. Source of the two layouts: docs/mailbox.md. */
#include <ctype.h>
#include <errno.h>
#include <string.h>

#include "mailbox/mailbox.h"

#define NETWORK_MAGIC "HYPEMAN_RESUME_NETWORK_MAILBOX_V1"
#define FORK_MAGIC "HYPEMAN_FORK_MAILBOX_V1"

/* Within the extension. */
enum { CRC_AT = 0, FLAGS_AT = 4, EPOCH_AT = 16, EXTENSION_LEN = 32 };

static const struct ffs_mailbox_layout layouts[FFS_MAILBOX_KINDS] = {
	[FFS_MAILBOX_FORK] = {.title = "fork",
		.magic = FORK_MAGIC,
		.magic_len = sizeof(FORK_MAGIC),
		.named = true,
		.token_max = 128,
		.marker_end = 224,
		.seq_at = 256,
		.length_at = 260,
		.payload_at = 264,
		.payload_max = 3832,
		.extension_at = 224},
	[FFS_MAILBOX_NETWORK] = {.title = "resume-network",
		.magic = NETWORK_MAGIC,
		.magic_len = sizeof(NETWORK_MAGIC),
		.token_max = 30,
		.marker_end = 64,
		.seq_at = 64,
		.length_at = 68,
		.payload_at = 72,
		.payload_max = 4024},
};

_Static_assert(sizeof(FORK_MAGIC) == 24 && sizeof(NETWORK_MAGIC) == 34, "the magics with their NUL");
_Static_assert(24 + FFS_MAILBOX_NAME_MAX + 1 + FFS_MAILBOX_TOKEN_MAX == 217, "the longest marker");
_Static_assert(264 + 3832 == FFS_MAILBOX_PAGE && 72 + 4024 == FFS_MAILBOX_PAGE, "payloads end with the page");

const struct ffs_mailbox_layout *ffs_mailbox_layout(enum ffs_mailbox_kind kind)
{
	return &layouts[kind];
}

/* ---- numbers ---- */

static void put_u32(uint8_t *p, uint32_t v)
{
	for (int i = 0; i < 4; i++)
		p[i] = (uint8_t)(v >> 8 * i);
}

static uint32_t get_u32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* ---- names, tokens, markers ---- */

static bool name_char(unsigned char c)
{
	return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
	       c == '_' || c == ':' || c == '-';
}

static size_t name_length(const char *name, size_t room)
{
	size_t n = 0;

	while (n < room && name_char((unsigned char)name[n]))
		n++;
	return n;
}

int ffs_mailbox_check_name(const char *name, struct ffs_error *err)
{
	size_t len = strlen(name);

	if (len && len <= FFS_MAILBOX_NAME_MAX && name_length(name, len) == len)
		return 0;
	return ffs_error_set(err, EINVAL, "mailbox name \"%.80s\": use 1 to %u of A-Z a-z 0-9 . _ : -", name,
		FFS_MAILBOX_NAME_MAX);
}

static bool blank(const char *s, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (!isspace((unsigned char)s[i]))
			return false;
	return true;
}

int ffs_mailbox_check_token(enum ffs_mailbox_kind kind, const char *token, size_t len, struct ffs_error *err)
{
	if (!len || blank(token, len))
		return ffs_error_set(err, EINVAL, "the token of a mailbox is not blank");
	if (len > layouts[kind].token_max)
		return ffs_error_set(err, EINVAL,
			"a token of %zu bytes is too long: a %s mailbox has at most %u", len,
			layouts[kind].title, layouts[kind].token_max);
	if (memchr(token, 0, len))
		return ffs_error_set(err, EINVAL, "the token of a mailbox has no NUL byte");
	return 0;
}

int ffs_mailbox_marker(const struct ffs_mailbox_id *id, void *out, struct ffs_error *err)
{
	const struct ffs_mailbox_layout *l = &layouts[id->kind];
	char *p = out;
	int r = ffs_mailbox_check_token(id->kind, id->token, id->token_len, err);

	if (!r && l->named)
		r = ffs_mailbox_check_name(id->name, err);
	if (r < 0)
		return r;
	memcpy(p, l->magic, l->magic_len);
	p += l->magic_len;
	if (l->named) {
		size_t n = strlen(id->name) + 1;

		memcpy(p, id->name, n);
		p += n;
	}
	memcpy(p, id->token, id->token_len);
	return (int)(p - (char *)out) + (int)id->token_len;
}

static bool parse(const struct ffs_mailbox_layout *l, const char *page, struct ffs_mailbox_id *out)
{
	const char *p = page + l->magic_len, *end = page + l->marker_end;

	if (memcmp(page, l->magic, l->magic_len) != 0)
		return false;
	if (l->named) {
		size_t n = name_length(p, FFS_MAILBOX_NAME_MAX + 1);

		if (!n || n > FFS_MAILBOX_NAME_MAX || p[n])
			return false;
		memcpy(out->name, p, n + 1);
		p += n + 1;
	} else {
		strcpy(out->name, l->title);
	}
	size_t len = strnlen(p, (size_t)(end - p));

	/* a token that fills its field ends where seq begins, which is 0 or 1: else it is a longer one */
	if (p + len == end && get_u32((const uint8_t *)page + l->seq_at) > 1)
		return false;
	if (ffs_mailbox_check_token(out->kind, p, len, NULL) < 0)
		return false;
	out->token_len = (unsigned)len;
	memcpy(out->token, p, len);
	out->token[len] = '\0';
	return true;
}

bool ffs_mailbox_parse(const void *page, struct ffs_mailbox_id *out)
{
	for (int k = 0; k < FFS_MAILBOX_KINDS; k++) {
		out->kind = (enum ffs_mailbox_kind)k;
		if (parse(&layouts[k], page, out))
			return true;
	}
	return false;
}

int ffs_mailbox_fits(
	enum ffs_mailbox_kind kind, size_t payload, uint64_t offset, uint64_t memory, struct ffs_error *err)
{
	const struct ffs_mailbox_layout *l = &layouts[kind];

	if (payload > l->payload_max)
		return ffs_error_set(err, EFBIG,
			"a payload of %zu bytes is too large: a %s mailbox takes at most %u", payload,
			l->title, l->payload_max);
	if (memory < FFS_MAILBOX_PAGE || offset > memory - FFS_MAILBOX_PAGE)
		return ffs_error_set(err, ERANGE,
			"the mailbox at %#llx is too close to the end of memory (%llu bytes)",
			(unsigned long long)offset, (unsigned long long)memory);
	return 0;
}

/* ---- checksum ---- */

uint32_t ffs_crc32c(uint32_t crc, const void *bytes, size_t len)
{
	const uint8_t *p = bytes;

	crc = ~crc;
	for (size_t i = 0; i < len; i++) {
		crc ^= p[i];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	return ~crc;
}

/* Over all that is written but the checksum itself and seq: the extension behind it, the length, the payload.
 */
static uint32_t checksum(const uint8_t *extension, const uint8_t *length, const void *payload, size_t len)
{
	uint32_t crc = ffs_crc32c(0, extension + FLAGS_AT, EXTENSION_LEN - FLAGS_AT);

	crc = ffs_crc32c(crc, length, 4);
	return ffs_crc32c(crc, payload, len);
}

/* ---- writing and reading ---- */

int ffs_mailbox_write(enum ffs_mailbox_kind kind, const void *payload, size_t len, const uint8_t epoch[16],
	uint32_t flags, ffs_mailbox_put put, void *arg)
{
	const struct ffs_mailbox_layout *l = &layouts[kind];
	uint8_t length[4], seq[4], extension[EXTENSION_LEN] = {0};
	int r;

	put_u32(length, (uint32_t)len);
	put_u32(seq, 1);
	put_u32(extension + FLAGS_AT, flags | FFS_MAILBOX_PRESENT);
	memcpy(extension + EPOCH_AT, epoch, 16);
	put_u32(extension + CRC_AT, checksum(extension, length, payload, len));
	r = put(arg, payload, len, l->payload_at);
	if (!r && l->extension_at)
		r = put(arg, extension, sizeof(extension), l->extension_at);
	if (!r)
		r = put(arg, length, sizeof(length), l->length_at);
	if (!r)
		r = put(arg, seq, sizeof(seq), l->seq_at);
	return r;
}

int ffs_mailbox_read(enum ffs_mailbox_kind kind, const void *page, const void **payload, size_t *len,
	uint8_t epoch[16], uint32_t *flags)
{
	const struct ffs_mailbox_layout *l = &layouts[kind];
	const uint8_t *p = page, *extension = p + l->extension_at;
	uint32_t length = get_u32(p + l->length_at);

	if (!get_u32(p + l->seq_at))
		return 0;
	if (length > l->payload_max)
		return -EBADMSG;
	memset(epoch, 0, 16);
	*flags = 0;
	if (l->extension_at && get_u32(extension + FLAGS_AT) & FFS_MAILBOX_PRESENT) {
		if (get_u32(extension + CRC_AT) !=
			checksum(extension, p + l->length_at, p + l->payload_at, length))
			return -EBADMSG;
		memcpy(epoch, extension + EPOCH_AT, 16);
		*flags = get_u32(extension + FLAGS_AT);
	}
	*payload = p + l->payload_at;
	*len = length;
	return 1;
}
