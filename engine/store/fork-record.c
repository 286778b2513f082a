/* Owns the language of forks/NAME.json, and the check of what it says against its branch. No state; any thread.
 *
 * The text comes from disk or from a stream. Nothing of it is believed before it was checked, and of the pages nothing
 * before the branch's own page, with the payload put into it anew, gave the same bytes: so a fork never shows others
 * than those its branch and its payloads make. */
#include "store/forks.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mailbox/ack.h"
#include "store/internal.h"

#define SEAL_KEY "fork_xxh3_128"

void ffs_fork_record_clear(struct ffs_fork_record *r)
{
	for (unsigned i = 0; i < r->n; i++)
		free(r->box[i].text);
	free(r->box);
	*r = (struct ffs_fork_record){0};
}

/* ---- hexadecimal ---- */

static struct json_object *to_hex(const uint8_t *bytes, size_t len)
{
	static const char digits[] = "0123456789abcdef";
	char text[2 * FFS_MAILBOX_PAGE];

	for (size_t i = 0; i < len; i++) {
		text[2 * i] = digits[bytes[i] >> 4];
		text[2 * i + 1] = digits[bytes[i] & 15];
	}
	return json_object_new_string_len(text, (int)(2 * len));
}

static int digit(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The bytes of a string, at most `room`; -1: it is none of lower-case pairs. */
static ssize_t from_hex(const char *text, uint8_t *out, size_t room)
{
	size_t len = strlen(text) / 2;

	if (strlen(text) % 2 || len > room)
		return -1;
	for (size_t i = 0; i < len; i++) {
		int high = digit(text[2 * i]), low = digit(text[2 * i + 1]);

		if (high < 0 || low < 0)
			return -1;
		out[i] = (uint8_t)(high << 4 | low);
	}
	return (ssize_t)len;
}

/* ---- writing ---- */

static struct json_object *box_object(const struct ffs_fork_box *b)
{
	struct json_object *o = json_object_new_object();
	const struct ffs_mailbox_id *id = &b->frame.id;

	json_object_object_add(o, "name", json_object_new_string(id->name));
	json_object_object_add(o, "kind", json_object_new_string(ffs_mailbox_layout(id->kind)->title));
	json_object_object_add(o, "token", to_hex((const uint8_t *)id->token, id->token_len));
	json_object_object_add(o, "offset", json_object_new_int64((int64_t)b->frame.offset));
	json_object_object_add(o, "payload", json_object_new_string_len(b->text, (int)b->text_len));
	json_object_object_add(o, "wait_for_ack", json_object_new_boolean(b->wants_ack));
	json_object_object_add(
		o, "ack_timeout_ms", json_object_new_int64(b->wants_ack ? b->ack_timeout_ms : 0));
	json_object_object_add(o, "page", to_hex(b->page, sizeof(b->page)));
	return o;
}

int ffs_fork_record_text(const struct ffs_fork_record *r, char **out, size_t *len, struct ffs_error *err)
{
	struct json_object *o = json_object_new_object(), *boxes = json_object_new_array();
	const struct ffs_seal seal = {.file = r->name, .key = SEAL_KEY, .max = FFS_FORK_FILE_MAX};
	char epoch[37];

	ffs_uuid_text(r->epoch, epoch);
	json_object_object_add(o, "format", json_object_new_int64(FFS_STORE_FORMAT));
	json_object_object_add(o, "name", json_object_new_string(r->name));
	json_object_object_add(o, "branch", json_object_new_string(r->branch));
	json_object_object_add(o, "epoch", json_object_new_string(epoch));
	json_object_object_add(o, "made_ns", json_object_new_int64((int64_t)r->made_ns));
	json_object_object_add(o, "ack_port", json_object_new_int64(r->ack_port));
	for (unsigned i = 0; i < r->n; i++)
		json_object_array_add(boxes, box_object(&r->box[i]));
	json_object_object_add(o, "mailboxes", boxes);
	int got = ffs_seal_text(&seal, o, out, len, err);

	json_object_put(o);
	return got;
}

/* ---- reading ---- */

static int wrong(const char *file, const char *what, struct ffs_error *err)
{
	return ffs_error_set(err, EBADMSG, "%s is damaged: %s makes no sense", file, what);
}

static bool parse_kind(const char *title, enum ffs_mailbox_kind *out)
{
	for (int k = 0; k < FFS_MAILBOX_KINDS; k++)
		if (strcmp(ffs_mailbox_layout((enum ffs_mailbox_kind)k)->title, title) == 0) {
			*out = (enum ffs_mailbox_kind)k;
			return true;
		}
	return false;
}

static bool parse_id(struct json_object *o, struct ffs_mailbox_id *id)
{
	const char *name = ffs_object_string(o, "name");
	ssize_t n = from_hex(ffs_object_string(o, "token"), (uint8_t *)id->token, FFS_MAILBOX_TOKEN_MAX);

	if (!parse_kind(ffs_object_string(o, "kind"), &id->kind) || n < 0 ||
		strlen(name) > FFS_MAILBOX_NAME_MAX || ffs_mailbox_check_name(name, NULL) < 0)
		return false;
	memcpy(id->name, name, strlen(name) + 1);
	id->token_len = (unsigned)n;
	return ffs_mailbox_check_token(id->kind, id->token, id->token_len, NULL) == 0;
}

static bool parse_bool(struct json_object *o, const char *key, bool *out)
{
	struct json_object *v = NULL;

	if (!json_object_object_get_ex(o, key, &v) || !json_object_is_type(v, json_type_boolean))
		return false;
	*out = json_object_get_boolean(v);
	return true;
}

static int parse_text(struct json_object *o, struct ffs_fork_box *b)
{
	struct json_object *v = NULL;

	if (!json_object_object_get_ex(o, "payload", &v) || !json_object_is_type(v, json_type_string) ||
		(size_t)json_object_get_string_len(v) > FFS_FORK_TEXT_MAX)
		return -EBADMSG;
	b->text_len = (size_t)json_object_get_string_len(v);
	b->text = malloc(b->text_len + 1);
	if (!b->text)
		return -ENOMEM;
	memcpy(b->text, json_object_get_string(v), b->text_len);
	return ffs_json_object(b->text, b->text_len, &b->payload, NULL) < 0 ? -EBADMSG : 0;
}

static int parse_box(struct json_object *o, const struct ffs_fork_record *r, struct ffs_fork_box *b,
	const char *file, struct ffs_error *err)
{
	uint64_t ms = 0;
	int got;

	if (!json_object_is_type(o, json_type_object) || !parse_id(o, &b->frame.id))
		return wrong(file, "a mailbox", err);
	got = parse_text(o, b);
	if (got == -ENOMEM)
		return ffs_error_set(err, ENOMEM, "no memory for %s", file);
	if (got < 0)
		return wrong(file, "a payload", err);
	if (!ffs_object_size(o, "offset", &b->frame.offset) || b->frame.offset % FFS_MAILBOX_PAGE)
		return wrong(file, "the place of a mailbox", err);
	if (!parse_bool(o, "wait_for_ack", &b->wants_ack) || !ffs_object_size(o, "ack_timeout_ms", &ms) ||
		ms > FFS_ACK_MAX_MS || !ms != !b->wants_ack)
		return wrong(file, "an acknowledgement", err);
	b->ack_timeout_ms = (unsigned)ms;
	if (from_hex(ffs_object_string(o, "page"), b->page, sizeof(b->page)) != (ssize_t)sizeof(b->page))
		return wrong(file, "a page", err);
	for (const struct ffs_fork_box *other = r->box; other != b; other++)
		if (other->frame.offset == b->frame.offset)
			return wrong(file, "a mailbox that is there twice", err);
	return 0;
}

static int parse_boxes(
	struct json_object *o, struct ffs_fork_record *r, const char *file, struct ffs_error *err)
{
	struct json_object *list = NULL;
	size_t n = 0;

	if (json_object_object_get_ex(o, "mailboxes", &list) && json_object_is_type(list, json_type_array))
		n = json_object_array_length(list);
	else
		return wrong(file, "the list of mailboxes", err);
	if (n > FFS_MAILBOX_MAX)
		return wrong(file, "the number of mailboxes", err);
	r->box = calloc(n ? n : 1, sizeof(*r->box));
	if (!r->box)
		return ffs_error_set(err, ENOMEM, "no memory for %s", file);
	for (size_t i = 0; i < n; i++) {
		struct ffs_fork_box *b = &r->box[r->n++];
		int got = parse_box(json_object_array_get_idx(list, i), r, b, file, err);

		if (got < 0)
			return got;
	}
	return 0;
}

static int load(struct json_object *o, const char *name, const char *branch, const char *file,
	struct ffs_fork_record *r, struct ffs_error *err)
{
	const char *own = ffs_object_string(o, "name"), *of = ffs_object_string(o, "branch");
	uint64_t port = 0;

	if (ffs_check_name("fork", own, NULL) < 0 || strlen(of) >= sizeof(r->branch))
		return wrong(file, "its name", err);
	if (name && strcmp(own, name) != 0)
		return ffs_error_set(
			err, EBADMSG, "%s is another fork's: it says that it is '%s'", file, own);
	if (branch && strcmp(of, branch) != 0)
		return ffs_error_set(err, EBADMSG, "%s is of another branch: of %.36s, and this one is %.36s",
			file, of, branch);
	snprintf(r->name, sizeof(r->name), "%s", own);
	snprintf(r->branch, sizeof(r->branch), "%s", of);
	if (!ffs_ack_parse_epoch(ffs_object_string(o, "epoch"), r->epoch) ||
		!ffs_object_size(o, "made_ns", &r->made_ns) || !ffs_object_size(o, "ack_port", &port) ||
		port > UINT16_MAX)
		return wrong(file, "a member", err);
	r->ack_port = (unsigned)port;
	return parse_boxes(o, r, file, err);
}

int ffs_fork_record_parse(const char *text, size_t len, const char *name, const char *branch,
	struct ffs_fork_record *out, struct ffs_error *err)
{
	struct ffs_fork_record r = {0};
	struct json_object *o = NULL;
	bool sealed = false;
	char file[FFS_NAME_MAX];

	snprintf(file, sizeof(file), FFS_FORKS "/%.80s" FFS_FORK_SUFFIX, name ? name : "…");
	const struct ffs_seal seal = {.file = file, .key = SEAL_KEY, .max = FFS_FORK_FILE_MAX};
	int got = ffs_seal_parse(&seal, text, len, &o, &sealed, err);

	if (!got && !sealed)
		got = ffs_error_set(err, EBADMSG, "%s is damaged: its checksum is missing", file);
	if (!got)
		got = load(o, name, branch, file, &r, err);
	json_object_put(o);
	if (got < 0)
		ffs_fork_record_clear(&r);
	else
		*out = r;
	return got;
}

/* ---- what the pages are worth ---- */

static int check_box(const struct ffs_fork_record *r, const struct ffs_fork_box *b,
	const struct ffs_mailbox_memory *mem, struct ffs_error *err)
{
	uint8_t page[FFS_MAILBOX_PAGE];
	struct ffs_mailbox_id id;
	int got = ffs_mailbox_fits(b->frame.id.kind, b->payload.len, b->frame.offset, mem->size, err);

	if (got < 0)
		return got;
	ssize_t n = mem->read(mem->arg, page, sizeof(page), b->frame.offset, err);

	if (n != (ssize_t)sizeof(page))
		return n < 0 ? (int)n : ffs_error_set(err, EIO, "the branch's memory ends too early");
	if (!ffs_mailbox_parse(page, &id) || id.kind != b->frame.id.kind ||
		strcmp(id.name, b->frame.id.name) != 0 || id.token_len != b->frame.id.token_len ||
		memcmp(id.token, b->frame.id.token, id.token_len) != 0)
		return ffs_error_set(err, EBADMSG, "the branch has no mailbox '%s' of that token at %#llx",
			b->frame.id.name, (unsigned long long)b->frame.offset);
	got = ffs_mailbox_lay(id.kind, b->payload, r->epoch, b->wants_ack, r->ack_port, page, err);
	if (got < 0)
		return got;
	if (memcmp(page, b->page, sizeof(page)) != 0)
		return ffs_error_set(err, EBADMSG,
			"the page of mailbox '%s' is not what the branch and the payload make", id.name);
	return 0;
}

int ffs_fork_record_check(
	const struct ffs_fork_record *r, const struct ffs_mailbox_memory *mem, struct ffs_error *err)
{
	for (unsigned i = 0; i < r->n; i++) {
		struct ffs_error why = {0};
		int got = check_box(r, &r->box[i], mem, &why);

		if (got < 0)
			return ffs_error_set(err, got == -ENOMEM || got == -EIO ? -got : EBADMSG,
				FFS_FORKS "/%s" FFS_FORK_SUFFIX ": %.400s", r->name, why.text);
	}
	return 0;
}
