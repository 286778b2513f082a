/* forkfs fork: forks of a branch, with payloads for its guest's mailboxes, by a request for each.
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

struct fork_args {
	struct ffs_words boxes;
	const char *ack, *each, *mount;
	bool json, help;
	struct ffs_target branch;
	unsigned ack_ms;
	struct ffs_fork_list list;
};

static void free_args(struct fork_args *a)
{
	ffs_words_free(&a->boxes);
	ffs_fork_list_free(&a->list);
}

/* What is to be made, by the words that are no options; all of it is checked before the first is made. */
static int read_orders(struct fork_args *a, char **word, int n, struct ffs_error *err)
{
	struct ffs_fork_order *one = NULL;
	int r;

	if (a->each && (n != 1 || a->boxes.n))
		return ffs_error_set(err, EINVAL,
			"--each FILE goes with NAME/BRANCH alone: its lines name the forks and their "
			"payloads");
	if (!a->each && n != 2)
		return ffs_error_set(
			err, EINVAL, "a branch, NAME/BRANCH, and a name for the FORK are wanted");
	r = ffs_target_parse(word[0], FFS_TARGET_BRANCH, &a->branch, err);
	if (!r && a->ack)
		r = ffs_ack_option(a->ack, &a->ack_ms, err);
	if (!r && a->each)
		r = ffs_fork_list_read(&a->list, a->each, err);
	if (!r && !a->each) {
		one = ffs_fork_list_add(&a->list, word[1], err);
		r = one ? 0 : -err->code;
	}
	for (unsigned i = 0; !r && i < a->boxes.n; i++)
		r = ffs_fork_order_box(one, a->boxes.word[i], err);
	for (unsigned i = 0; !r && i < a->list.n; i++) {
		struct ffs_fork_order *o = &a->list.fork[i];

		r = ffs_fork_request(
			&a->branch, o->name, o->box, o->n, a->ack ? &a->ack_ms : NULL, &o->request, err);
	}
	return r;
}

static int make(const struct ffs_tree *t, const struct fork_args *a, const struct ffs_fork_order *o,
	struct ffs_error *err)
{
	struct json_object *answer = NULL, *status;
	char ctl[80];
	int r;

	snprintf(ctl, sizeof(ctl), "%s/ctl", a->branch.sandbox);
	r = ffs_tree_request_text(t, ctl, o->request, &answer, err);
	if (r < 0)
		return r;
	status = json_object_get(ffs_json_get(answer, "fork"));
	json_object_put(answer);
	if (a->json) {
		ffs_print_json(status);
		return 0;
	}
	printf("%s/%s/%s: epoch %s, %zu mailboxes with a payload\n", a->branch.sandbox, a->branch.branch,
		o->name, ffs_json_string(status, "epoch"),
		json_object_array_length(ffs_json_get(status, "mailboxes")));
	json_object_put(status);
	return 0;
}

int ffs_cmd_fork(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_(free_args) struct fork_args a = {0};
	const struct ffs_opt opts[] = {
		{"mailbox", 0, FFS_OPT_EACH, &a.boxes},
		{"each", 0, FFS_OPT_VALUE, &a.each},
		{"ack", 0, FFS_OPT_VALUE, &a.ack},
		{"json", 0, FFS_OPT_FLAG, &a.json},
		{"mount", 0, FFS_OPT_VALUE, &a.mount},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
		{0},
	};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct ffs_error err = {0};
	int n, r;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.help)
		return ffs_usage_help(self);
	r = read_orders(&a, argv, n, &err);
	if (r < 0)
		return r == -EINVAL ? ffs_usage_error(self, "%s", err.text) : ffs_failure(self, &err);
	ffs_interrupt_install();
	r = ffs_tree_open(&t, a.mount, &err);
	if (!r)
		r = ffs_tree_check_target(&t, &a.branch, &err);
	for (unsigned i = 0; !r && i < a.list.n; i++) {
		r = make(&t, &a, &a.list.fork[i], &err);
		if (r < 0 && a.each)
			ffs_error_prefix(&err, "fork %s", a.list.fork[i].name);
	}
	/* those before one that fails are there, each with its line */
	if (r < 0)
		return ffs_failure(self, &err);
	return ffs_finish_output(self);
}
