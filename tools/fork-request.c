/* The request for a fork (fork-request.h). No locks. */
#include "fork-request.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "mailbox/mailbox.h"

/* The file of --mailbox NAME=@FILE: more is no payload. */
#define FILE_MAX 65536

/* A token may have equals signs, so the first that begins a payload counts. */
static const char *split(const char *text)
{
	for (const char *p = strchr(text, '='); p; p = strchr(p + 1, '=')) {
		const char *after = p + 1 + strspn(p + 1, " \t\r\n");

		if (*after == '{' || *after == '@')
			return p;
	}
	return NULL;
}

int ffs_fork_box(const char *arg, char **out, struct ffs_error *err)
{
	_cleanup_free_ char *file = NULL;
	const char *equals = split(arg);
	struct ffs_span object;

	if (!equals || equals == arg)
		return ffs_error_set(err, EINVAL,
			"--mailbox is NAME=JSON, NAME:TOKEN=JSON or NAME=@FILE, not '%.200s'", arg);
	const char *text = equals + 1;
	size_t len = strlen(text);

	if (*text == '@') {
		int r = ffs_read_file(text + 1, FILE_MAX, &file, &len);

		if (r < 0)
			return ffs_error_errno(err, -r, "%.200s can't be read", text + 1);
		text = file;
	}
	int r = ffs_json_object(text, len, &object, err);

	if (r < 0) {
		ffs_error_prefix(err, "the payload of %.*s", (int)(equals - arg), arg);
		return r;
	}
	if (asprintf(out, "%.*s%.*s", (int)(equals + 1 - arg), arg, (int)object.len, object.at) < 0)
		return ffs_error_set(err, ENOMEM, "no memory for a payload");
	return 0;
}

static int add_box(FILE *out, const char *box, const unsigned *ack_ms, struct ffs_error *err)
{
	const char *equals = split(box);
	struct json_object *name;
	struct ffs_span object;

	/* one whole object, so that nothing behind it becomes part of the request */
	if (!equals || ffs_json_object(equals + 1, strlen(equals + 1), &object, err) < 0)
		return ffs_error_set(err, EINVAL, "'%.60s' is no mailbox with a payload", box);
	name = json_object_new_string_len(box, (int)(equals - box));
	fprintf(out, "{\"name\":%s,\"payload\":%.*s",
		json_object_to_json_string_ext(name, JSON_C_TO_STRING_PLAIN), (int)object.len, object.at);
	if (ack_ms)
		fprintf(out, ",\"wait_for_ack\":true,\"ack_timeout_ms\":%u", *ack_ms);
	fprintf(out, "}");
	json_object_put(name);
	return 0;
}

int ffs_fork_request(const struct ffs_target *target, const char *fork, char *const *box, unsigned n,
	const unsigned *ack_ms, char **out, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	FILE *f = open_memstream(&text, &len);
	int r = 0;

	if (!f)
		return ffs_error_set(err, ENOMEM, "no memory for the request");
	/* names have been checked: nothing in them needs quoting */
	fprintf(f, "{\"fork\":{\"branch\":\"%s\",\"name\":\"%s\",\"mailboxes\":[", target->branch, fork);
	for (unsigned i = 0; !r && i < n; i++) {
		if (i)
			fprintf(f, ",");
		r = add_box(f, box[i], ack_ms, err);
	}
	fprintf(f, "]}}\n");
	if ((ferror(f) | fclose(f)) && !r)
		r = ffs_error_set(err, ENOMEM, "no memory for the request");
	if (!r)
		*out = ffs_steal_ptr(&text);
	return r;
}
