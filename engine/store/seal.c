/* Owns what all JSON files of the store have in common: the version, and the checksum at the end. No I/O, no state; any
 * thread.
 *
 * The last member is the xxh3-128 of the whole text with its own 32 digits taken as zeros: so a byte that was changed
 * anywhere in the file is found. */
#include "store/internal.h"

#include <errno.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TAIL "\"\n}\n"
#define ZEROS "00000000000000000000000000000000"
#define MAX_DEPTH 32
#define HEAD_MAX 64

int ffs_seal_text(
	const struct ffs_seal *s, struct json_object *o, char **out, size_t *len, struct ffs_error *err)
{
	struct ffs_hash h;
	char *text = NULL;
	char hex[33];

	json_object_object_del(o, s->key);
	json_object_object_add(o, s->key, json_object_new_string(ZEROS));
	int n = asprintf(&text, "%s\n",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));

	if (n < 0)
		return ffs_error_set(err, ENOMEM, "no memory for %s", s->file);
	h = ffs_hash_of(text, (size_t)n);
	ffs_hash_hex(&h, hex);
	memcpy(text + (size_t)n - strlen(TAIL) - 32, hex, 32);
	*out = text;
	*len = (size_t)n;
	return 0;
}

/* 1: sealed and whole; 0: has no seal; -EBADMSG. */
static int check_seal(const struct ffs_seal *s, const char *text, size_t len)
{
	char head[HEAD_MAX], hex[33];
	size_t tail = strlen(TAIL), n = (size_t)snprintf(head, sizeof(head), "\"%s\":\"", s->key),
	       need = tail + 32 + n;
	_cleanup_free_ char *copy = NULL;
	struct ffs_hash want, is;

	if (!memmem(text, len, head, n - 2))
		return 0;
	if (len < need || memcmp(text + len - tail, TAIL, tail) != 0 ||
		memcmp(text + len - need, head, n) != 0)
		return -EBADMSG;
	memcpy(hex, text + len - tail - 32, 32);
	hex[32] = '\0';
	copy = malloc(len);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, text, len);
	memcpy(copy + len - tail - 32, ZEROS, 32);
	is = ffs_hash_of(copy, len);
	return ffs_hash_parse(hex, &want) && ffs_hash_equal(&want, &is) ? 1 : -EBADMSG;
}

static int check_format(const struct ffs_seal *s, struct json_object *o, struct ffs_error *err)
{
	struct json_object *v = NULL;
	int64_t format = json_object_object_get_ex(o, "format", &v) && json_object_is_type(v, json_type_int)
				 ? json_object_get_int64(v)
				 : 0;

	if (format > FFS_STORE_FORMAT)
		return ffs_error_set(err, ENOTSUP,
			"%s is of format %" PRId64
			", written by a newer forkfs: this one reads format %u at most, use that version",
			s->file, format, FFS_STORE_FORMAT);
	if (format < 1)
		return ffs_error_set(err, EBADMSG, "%s does not say its format", s->file);
	return 0;
}

static bool only_space(const char *text, size_t len)
{
	while (len && strchr(" \t\r\n", *text) && *text) {
		text++;
		len--;
	}
	return !len;
}

int ffs_seal_parse(const struct ffs_seal *s, const char *text, size_t len, struct json_object **out,
	bool *sealed, struct ffs_error *err)
{
	struct json_tokener *tok = len <= s->max ? json_tokener_new_ex(MAX_DEPTH) : NULL;
	struct json_object *o;
	int r, seal;

	if (!tok)
		return ffs_error_set(err, len > s->max ? EFBIG : ENOMEM, "%s has %zu bytes", s->file, len);
	json_tokener_set_flags(tok, JSON_TOKENER_STRICT | JSON_TOKENER_ALLOW_TRAILING_CHARS);
	o = json_tokener_parse_ex(tok, text, (int)len);
	size_t used = json_tokener_get_parse_end(tok);
	enum json_tokener_error bad = json_tokener_get_error(tok);

	json_tokener_free(tok);
	if (!o || bad != json_tokener_success || !json_object_is_type(o, json_type_object) ||
		!only_space(text + used, len - used)) {
		json_object_put(o);
		return ffs_error_set(err, EBADMSG, "%s is no JSON object (near byte %zu)", s->file, used);
	}
	/* the version first: a newer one may be sealed in another way */
	r = check_format(s, o, err);
	seal = r ? 0 : check_seal(s, text, len);
	if (!r && seal == -ENOMEM)
		r = ffs_error_set(err, ENOMEM, "no memory");
	else if (!r && seal < 0)
		r = ffs_error_set(err, -seal, "%s is damaged: its checksum is wrong", s->file);
	if (r < 0) {
		json_object_put(o);
		return r;
	}
	*out = o;
	*sealed = seal == 1;
	return 0;
}

const char *ffs_object_string(struct json_object *o, const char *key)
{
	struct json_object *v = NULL;

	return o && json_object_object_get_ex(o, key, &v) && json_object_is_type(v, json_type_string)
		       ? json_object_get_string(v)
		       : "";
}

bool ffs_object_size(struct json_object *o, const char *key, uint64_t *out)
{
	struct json_object *v = NULL;

	if (!o || !json_object_object_get_ex(o, key, &v))
		return false;
	if (!json_object_is_type(v, json_type_int) || json_object_get_int64(v) < 0)
		return false;
	*out = (uint64_t)json_object_get_int64(v);
	return true;
}
