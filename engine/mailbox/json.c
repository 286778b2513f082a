/* Owns the checking of payloads: RFC 8259 byte by byte, and edits that leave every other byte as it was.
 *
 * Pure, any thread; allocates nothing. Payloads come from untrusted clients. Once a text was checked by
 * ffs_json_feed() the walks over it (spans) need no checks of their own. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "mailbox/mailbox.h"

enum state {
	BEFORE,      /* white space in front of the object */
	VALUE,       /* a value must come */
	FIRST_VALUE, /* a value or ']' */
	KEY,         /* a key must come */
	FIRST_KEY,   /* a key or '}' */
	COLON,
	NEXT, /* ',' or the end of the container */
	STRING,
	ESCAPE,
	HEX,
	SURROGATE, /* '\' of the second half */
	SURROGATE_U,
	UTF8,
	MINUS,
	ZERO,
	INTEGER,
	POINT,
	FRACTION,
	EXPONENT,
	SIGN,
	POWER,
	WORD,
	AFTER, /* white space behind the object */
};

static bool is_space(char c)
{
	return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static bool is_digit(char c)
{
	return c >= '0' && c <= '9';
}

static bool push(struct ffs_json *j, char c)
{
	if (j->depth == FFS_JSON_DEPTH)
		return false;
	j->stack[j->depth++] = (uint8_t)c;
	j->state = c == '{' ? FIRST_KEY : FIRST_VALUE;
	return true;
}

static bool pop(struct ffs_json *j, char c)
{
	if (j->stack[j->depth - 1] != (c == '}' ? '{' : '['))
		return false;
	j->state = --j->depth ? NEXT : AFTER;
	if (!j->depth)
		j->end = j->at + 1;
	return true;
}

static bool begin_string(struct ffs_json *j, uint8_t back)
{
	j->state = STRING;
	j->back = back;
	return true;
}

static bool begin_value(struct ffs_json *j, char c)
{
	static const char *const words[] = {"true", "false", "null"};

	if (c == '{' || c == '[')
		return push(j, c);
	if (c == '"')
		return begin_string(j, NEXT);
	if (c == '-' || is_digit(c)) {
		j->state = c == '-' ? MINUS : c == '0' ? ZERO : INTEGER;
		return true;
	}
	for (unsigned i = 0; i < 3; i++)
		if (words[i][0] == c) {
			j->word = words[i] + 1;
			j->state = WORD;
			return true;
		}
	return false;
}

/* The first byte of a character of several: how many follow, and what the next may be (RFC 3629, 4). */
static bool begin_utf8(struct ffs_json *j, unsigned char c)
{
	j->utf8_low = 0x80;
	j->utf8_high = 0xbf;
	if (c >= 0xc2 && c <= 0xdf)
		j->utf8_left = 1;
	else if (c >= 0xe0 && c <= 0xef)
		j->utf8_left = 2;
	else if (c >= 0xf0 && c <= 0xf4)
		j->utf8_left = 3;
	else
		return false;
	if (c == 0xe0)
		j->utf8_low = 0xa0;
	else if (c == 0xed)
		j->utf8_high = 0x9f;
	else if (c == 0xf0)
		j->utf8_low = 0x90;
	else if (c == 0xf4)
		j->utf8_high = 0x8f;
	j->state = UTF8;
	return true;
}

static bool in_string(struct ffs_json *j, unsigned char c)
{
	if (c == '"')
		j->state = j->back;
	else if (c == '\\')
		j->state = ESCAPE;
	else if (c < 0x20)
		return false;
	else if (c >= 0x80)
		return begin_utf8(j, c);
	return true;
}

static bool in_utf8(struct ffs_json *j, unsigned char c)
{
	if (c < j->utf8_low || c > j->utf8_high)
		return false;
	j->utf8_low = 0x80;
	j->utf8_high = 0xbf;
	if (!--j->utf8_left)
		j->state = STRING;
	return true;
}

static unsigned hex_value(char c)
{
	return is_digit(c) ? (unsigned)(c - '0') : (unsigned)((c | 0x20) - 'a') + 10;
}

/* Four digits of \u: a character of its own, or one half of a pair whose other half must follow. */
static bool in_hex(struct ffs_json *j, char c)
{
	if (!isxdigit((unsigned char)c))
		return false;
	j->unit = (uint16_t)(j->unit << 4 | hex_value(c));
	if (--j->digits)
		return true;
	bool high = (j->unit & 0xfc00) == 0xd800, low = (j->unit & 0xfc00) == 0xdc00;

	if (j->second != low)
		return false;
	j->second = false;
	j->state = high ? SURROGATE : STRING;
	return true;
}

static void begin_hex(struct ffs_json *j, bool second)
{
	j->state = HEX;
	j->digits = 4;
	j->unit = 0;
	j->second = second;
}

static bool in_escape(struct ffs_json *j, char c)
{
	if (c == 'u') {
		begin_hex(j, false);
		return true;
	}
	j->state = STRING;
	return c && strchr("\"\\/bfnrt", c) != NULL;
}

/* 1: the byte belongs to the number; 0: the number is over, and whole; -1: neither. */
static int in_number(struct ffs_json *j, char c)
{
	bool digit = is_digit(c);

	switch (j->state) {
	case MINUS:
		j->state = c == '0' ? ZERO : INTEGER;
		return digit ? 1 : -1;
	case ZERO:
	case INTEGER:
		if (digit)
			return j->state == INTEGER ? 1 : -1;
		if (c == '.')
			j->state = POINT;
		else if (c == 'e' || c == 'E')
			j->state = EXPONENT;
		else
			return 0;
		return 1;
	case POINT:
		j->state = FRACTION;
		return digit ? 1 : -1;
	case FRACTION:
		if (c == 'e' || c == 'E')
			j->state = EXPONENT;
		else if (!digit)
			return 0;
		return 1;
	case EXPONENT:
		j->state = digit ? POWER : SIGN;
		return digit || c == '+' || c == '-' ? 1 : -1;
	case SIGN:
		j->state = POWER;
		return digit ? 1 : -1;
	default:
		return digit ? 1 : 0;
	}
}

static bool in_word(struct ffs_json *j, char c)
{
	if (*j->word != c)
		return false;
	if (!*++j->word) {
		j->word = NULL;
		j->state = NEXT;
	}
	return true;
}

/* Between the values. */
static bool in_structure(struct ffs_json *j, char c)
{
	if (is_space(c))
		return true;
	switch (j->state) {
	case BEFORE:
		j->begin = j->at;
		return c == '{' && push(j, c);
	case FIRST_VALUE:
		return c == ']' ? pop(j, c) : begin_value(j, c);
	case VALUE:
		return begin_value(j, c);
	case FIRST_KEY:
		if (c == '}')
			return pop(j, c);
		return c == '"' && begin_string(j, COLON);
	case KEY:
		return c == '"' && begin_string(j, COLON);
	case COLON:
		j->state = VALUE;
		return c == ':';
	case NEXT:
		if (c == '}' || c == ']')
			return pop(j, c);
		j->state = j->stack[j->depth - 1] == '{' ? KEY : VALUE;
		return c == ',';
	default:
		return false;
	}
}

static bool take(struct ffs_json *j, char c)
{
	switch (j->state) {
	case STRING:
		return in_string(j, (unsigned char)c);
	case UTF8:
		return in_utf8(j, (unsigned char)c);
	case ESCAPE:
		return in_escape(j, c);
	case HEX:
		return in_hex(j, c);
	case SURROGATE:
		j->state = SURROGATE_U;
		return c == '\\';
	case SURROGATE_U:
		begin_hex(j, true);
		return c == 'u';
	case WORD:
		return in_word(j, c);
	case MINUS:
	case ZERO:
	case INTEGER:
	case POINT:
	case FRACTION:
	case EXPONENT:
	case SIGN:
	case POWER: {
		int r = in_number(j, c);

		if (r)
			return r > 0;
		j->state = NEXT;
		return in_structure(j, c);
	}
	default:
		return in_structure(j, c);
	}
}

int ffs_json_feed(struct ffs_json *j, const char *bytes, size_t len, struct ffs_error *err)
{
	for (size_t i = 0; i < len; i++, j->at++)
		if (!take(j, bytes[i])) {
			bool object = j->state != BEFORE && j->state != AFTER;

			return ffs_error_set(err, EINVAL,
				object ? "not JSON: byte %zu can't stand there"
				       : "a payload is one JSON object and nothing else: byte %zu is "
					 "something else",
				j->at);
		}
	return j->state == AFTER;
}

int ffs_json_object(const char *text, size_t len, struct ffs_span *object, struct ffs_error *err)
{
	struct ffs_json j = {0};
	int r = ffs_json_feed(&j, text, len, err);

	if (r < 0)
		return r;
	if (!r)
		return ffs_error_set(err, EINVAL, "not a whole JSON object: it ends after %zu bytes", len);
	*object = (struct ffs_span){text + j.begin, j.end - j.begin};
	return 0;
}

/* ---- walks over checked texts ---- */

static const char *skip_space(const char *p, const char *end)
{
	while (p < end && is_space(*p))
		p++;
	return p;
}

static const char *skip_string(const char *p, const char *end)
{
	for (p++; p < end && *p != '"'; p++)
		if (*p == '\\')
			p++;
	return p + 1;
}

static const char *skip_value(const char *p, const char *end)
{
	unsigned depth = 0;

	do {
		if (*p == '"') {
			p = skip_string(p, end);
		} else if (*p == '{' || *p == '[') {
			depth++;
			p++;
		} else if (*p == '}' || *p == ']') {
			depth--;
			p++;
		} else if (depth) {
			p++;
		} else {
			while (p < end && !is_space(*p) && !strchr(",]}", *p))
				p++;
		}
	} while (depth && p < end);
	return p;
}

/* A key may be written with escapes; ours are ASCII. */
static bool same_key(const char *p, const char *key)
{
	static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";

	for (p++; *p != '"'; key++) {
		unsigned c = (unsigned char)*p++;

		if (c == '\\') {
			c = (unsigned char)*p++;
			if (c == 'u') {
				c = 0;
				for (unsigned i = 0; i < 4; i++)
					c = c << 4 | hex_value(*p++);
			} else {
				c = (unsigned char)to[strchr(from, (int)c) - from];
			}
		}
		if (!*key || c != (unsigned char)*key)
			return false;
	}
	return !*key;
}

unsigned ffs_json_member(struct ffs_span object, const char *key, struct ffs_span *value)
{
	const char *p = object.at, *end = object.at + object.len;
	unsigned n = 0;

	*value = (struct ffs_span){0};
	if (!p || !object.len || *p != '{')
		return 0;
	for (p = skip_space(p + 1, end); *p == '"'; p = skip_space(p + 1, end)) {
		bool found = same_key(p, key);

		p = skip_space(skip_string(p, end), end);
		p = skip_space(p + 1, end);
		const char *after = skip_value(p, end);

		if (found) {
			*value = (struct ffs_span){p, (size_t)(after - p)};
			n++;
		}
		p = skip_space(after, end);
		if (*p != ',')
			break;
	}
	return n;
}

bool ffs_json_element(struct ffs_span array, unsigned i, struct ffs_span *value)
{
	const char *p = array.at, *end = array.at + array.len;

	*value = (struct ffs_span){0};
	if (!p || !array.len || *p != '[')
		return false;
	for (p = skip_space(p + 1, end); *p != ']'; p = skip_space(p + 1, end)) {
		const char *after = skip_value(p, end);

		if (!i--) {
			*value = (struct ffs_span){p, (size_t)(after - p)};
			return true;
		}
		p = skip_space(after, end);
		if (*p != ',')
			break;
	}
	return false;
}

ssize_t ffs_json_add_port(
	struct ffs_span object, const char *key, unsigned port, char *out, size_t room, struct ffs_error *err)
{
	struct ffs_span old, head, tail;
	char text[60];
	unsigned n = ffs_json_member(object, key, &old);
	const char *end = object.at + object.len;
	int len;

	if (n > 1)
		return ffs_error_set(err, EINVAL, "the payload has %u members '%s'", n, key);
	if (n) {
		head = (struct ffs_span){object.at, (size_t)(old.at - object.at)};
		tail = (struct ffs_span){old.at + old.len, (size_t)(end - old.at) - old.len};
		len = snprintf(text, sizeof(text), "%u", port);
	} else {
		bool empty = *skip_space(object.at + 1, end) == '}';

		head = (struct ffs_span){object.at, 1};
		tail = (struct ffs_span){object.at + 1, object.len - 1};
		len = snprintf(text, sizeof(text), "\"%s\":%u%s", key, port, empty ? "" : ",");
	}
	if (head.len + (size_t)len + tail.len > room)
		return ffs_error_set(err, EFBIG,
			"the payload is too large: %zu bytes with its %s, at most %zu",
			head.len + (size_t)len + tail.len, key, room);
	memcpy(out, head.at, head.len);
	memcpy(out + head.len, text, (size_t)len);
	memcpy(out + head.len + len, tail.at, tail.len);
	return (ssize_t)(head.len + (size_t)len + tail.len);
}
