/* forkfs fork: a fork of a branch, with payloads for its guest's mailboxes, by one request.
 *
 * One thread. The request is put together as text: a payload goes into it byte by byte as it was given. */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "mailbox/mailbox.h"
#include "options.h"
#include "tree.h"

/* The file of --mailbox NAME=@FILE: more is no payload. */
#define FILE_MAX 65536

/* "NAME[:TOKEN]=JSON" or "…=@FILE": a token may have equals signs, so the first that begins a payload counts.
 */
static const char *split(const char *text)
{
	for (const char *p = strchr(text, '='); p; p = strchr(p + 1, '=')) {
		const char *after = p + 1 + strspn(p + 1, " \t\r\n");

		if (*after == '{' || *after == '@')
			return p;
	}
	return NULL;
}

static int add_mailbox(FILE *out, const char *arg, bool first, const unsigned *ack_ms, struct ffs_error *err)
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
	struct json_object *name = json_object_new_string_len(arg, (int)(equals - arg));

	fprintf(out, "%s{\"name\":%s,\"payload\":%.*s", first ? "" : ",",
		json_object_to_json_string_ext(name, JSON_C_TO_STRING_PLAIN), (int)object.len, object.at);
	if (ack_ms)
		fprintf(out, ",\"wait_for_ack\":true,\"ack_timeout_ms\":%u", *ack_ms);
	fprintf(out, "}");
	json_object_put(name);
	return 0;
}

/* NULL with a sentence. */
static char *build(const struct ffs_target *target, const char *fork, const struct ffs_words *boxes,
	const unsigned *ack_ms, struct ffs_error *err)
{
	char *text = NULL;
	size_t len = 0;
	FILE *out = open_memstream(&text, &len);
	int r = out ? 0 : ffs_error_set(err, ENOMEM, "no memory for the request");

	/* names have been checked: nothing in them needs quoting */
	if (out)
		fprintf(out, "{\"fork\":{\"branch\":\"%s\",\"name\":\"%s\",\"mailboxes\":[", target->branch,
			fork);
	for (unsigned i = 0; !r && i < boxes->n; i++)
		r = add_mailbox(out, boxes->word[i], i == 0, ack_ms, err);
	if (out) {
		fprintf(out, "]}}\n");
		if ((ferror(out) | fclose(out)) && !r)
			r = ffs_error_set(err, ENOMEM, "no memory for the request");
	}
	if (r < 0) {
		free(text);
		return NULL;
	}
	return text;
}

int ffs_cmd_fork(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_(ffs_words_free) struct ffs_words boxes = {0};
	const char *ack = NULL, *mount = NULL;
	bool json = false, help = false;
	const struct ffs_opt opts[] = {
		{"mailbox", 0, FFS_OPT_EACH, &boxes},
		{"ack", 0, FFS_OPT_VALUE, &ack},
		{"json", 0, FFS_OPT_FLAG, &json},
		{"mount", 0, FFS_OPT_VALUE, &mount},
		{"help", 'h', FFS_OPT_FLAG, &help},
		{0},
	};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	_cleanup_free_ char *request = NULL;
	struct json_object *answer = NULL;
	struct ffs_target target;
	struct ffs_error err = {0};
	char ctl[80];
	unsigned ack_ms = 0;
	int n;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (help)
		return ffs_usage_help(self);
	if (n != 2)
		return ffs_usage_error(self, "a branch, NAME/BRANCH, and a name for the FORK are wanted");
	if (ffs_target_parse(argv[0], FFS_TARGET_BRANCH, &target, &err) < 0 ||
		ffs_check_name("fork", argv[1], &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (ack && ffs_ack_option(ack, &ack_ms, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	request = build(&target, argv[1], &boxes, ack ? &ack_ms : NULL, &err);
	if (!request)
		return err.code == EINVAL ? ffs_usage_error(self, "%s", err.text) : ffs_failure(self, &err);
	snprintf(ctl, sizeof(ctl), "%s/ctl", target.sandbox);
	ffs_interrupt_install();
	int r = ffs_tree_open(&t, mount, &err);

	if (!r)
		r = ffs_tree_check_target(&t, &target, &err);
	if (!r)
		r = ffs_tree_request_text(&t, ctl, request, &answer, &err);
	if (r < 0)
		return ffs_failure(self, &err);
	struct json_object *status = json_object_get(ffs_json_get(answer, "fork"));

	json_object_put(answer);
	if (json) {
		ffs_print_json(status);
		return ffs_finish_output(self);
	}
	printf("%s/%s/%s: epoch %s, %zu mailboxes with a payload\n", target.sandbox, target.branch, argv[1],
		ffs_json_string(status, "epoch"),
		json_object_array_length(ffs_json_get(status, "mailboxes")));
	json_object_put(status);
	return ffs_finish_output(self);
}
