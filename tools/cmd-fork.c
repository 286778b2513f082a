/* forkfs fork: a fork of a branch, with payloads for its guest's mailboxes, by one request.
 *
 * One thread. */
#include "cli.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "fork-request.h"
#include "options.h"
#include "tree.h"

static int build(const struct ffs_target *target, const char *fork, const struct ffs_words *boxes, const unsigned *ack_ms,
	char **out, struct ffs_error *err)
{
	char **box = calloc(boxes->n + 1, sizeof(*box));
	int r = box ? 0 : ffs_error_set(err, ENOMEM, "no memory for the request");

	for (unsigned i = 0; !r && i < boxes->n; i++)
		r = ffs_fork_box(boxes->word[i], &box[i], err);
	if (!r)
		r = ffs_fork_request(target, fork, box, boxes->n, ack_ms, out, err);
	for (unsigned i = 0; box && i < boxes->n; i++)
		free(box[i]);
	free(box);
	return r;
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
	if (build(&target, argv[1], &boxes, ack ? &ack_ms : NULL, &request, &err) < 0)
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
