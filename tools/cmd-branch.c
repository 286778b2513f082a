/* forkfs branch, wait, rm: branches made through NAME/ctl, awaited through their file `wait`, removed by
 * rmdir(2).
 *
 * One thread. Ctrl-C ends the waiting, never the branch once it was taken. */
#include "cli.h"

#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "options.h"
#include "progress.h"
#include "tree.h"

struct branch_args {
	const char *mode, *store, *rate, *key, *mount;
	uint64_t max_rate;
	bool no_wait, force, json, help;
};

static bool known_store(const char *store)
{
	return !strcmp(store, "memory") || !strcmp(store, "dense") || !strcmp(store, "packed");
}

/* name: NULL with a key. */
static struct json_object *build_branch(const struct branch_args *a, const char *name)
{
	struct json_object *body = json_object_new_object(), *request = json_object_new_object();

	json_object_object_add(request, "branch", body);
	if (name)
		json_object_object_add(body, "name", json_object_new_string(name));
	else
		json_object_object_add(body, "key", json_object_new_string(a->key));
	json_object_object_add(body, "mode", json_object_new_string(a->mode ? a->mode : "live"));
	if (a->store)
		json_object_object_add(body, "store", json_object_new_string(a->store));
	if (a->max_rate)
		json_object_object_add(body, "max_rate", json_object_new_int64((int64_t)a->max_rate));
	if (a->force)
		json_object_object_add(body, "force", json_object_new_boolean(true));
	/* answered when the guest runs again; the rest is awaited through the branch's own file, which can be
	 * interrupted without harm to the branch */
	json_object_object_add(body, "wait", json_object_new_boolean(false));
	return request;
}

static int print_branch(const struct ffs_command *self, const struct ffs_tree *t,
	const struct ffs_target *target, bool json, uint64_t began_ns)
{
	struct json_object *status = NULL;
	struct ffs_error err = {0};
	char path[176], pause[32], size[32], took[32];

	snprintf(path, sizeof(path), "%s/branches/%s/status", target->sandbox, target->branch);
	if (ffs_tree_json(t, path, &status, &err) < 0)
		return ffs_failure(self, &err);
	if (json) {
		ffs_print_json(status);
		return ffs_finish_output(self);
	}
	printf("%s/%s: guest paused for %s, %s of memory, %s after %s\n", target->sandbox, target->branch,
		ffs_format_ns(pause, ffs_json_u64(status, "pause_ns")),
		ffs_format_bytes(size, ffs_json_u64(status, "memory_bytes")),
		ffs_json_string(status, "state"), ffs_format_ns(took, ffs_now_ns() - began_ns));
	json_object_put(status);
	return ffs_finish_output(self);
}

int ffs_cmd_branch(const struct ffs_command *self, int argc, char **argv)
{
	struct branch_args a = {0};
	const struct ffs_opt opts[] = {
		{"live", 0, FFS_OPT_CHOICE, &a.mode},
		{"diff", 0, FFS_OPT_CHOICE, &a.mode},
		{"full", 0, FFS_OPT_CHOICE, &a.mode},
		{"no-wait", 0, FFS_OPT_FLAG, &a.no_wait},
		{"force", 0, FFS_OPT_FLAG, &a.force},
		{"max-rate", 0, FFS_OPT_VALUE, &a.rate},
		{"store", 0, FFS_OPT_VALUE, &a.store},
		{"key", 0, FFS_OPT_VALUE, &a.key},
		{"json", 0, FFS_OPT_FLAG, &a.json},
		{"mount", 0, FFS_OPT_VALUE, &a.mount},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
		{0},
	};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	uint64_t began_ns = ffs_now_ns();
	struct json_object *request, *answer = NULL;
	struct ffs_target target;
	struct ffs_error err = {0};
	char ctl[80];
	int n, r;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.help)
		return ffs_usage_help(self);
	if (a.key && n != 1)
		return ffs_usage_error(self, "a sandbox's NAME is wanted, and --key in place of a BRANCH");
	if (!a.key && n != 2)
		return ffs_usage_error(self, "a sandbox's NAME and a name for the BRANCH are wanted");
	if (ffs_target_parse(argv[0], FFS_TARGET_SANDBOX, &target, &err) < 0 ||
		(!a.key && ffs_check_name("branch", argv[1], &err) < 0))
		return ffs_usage_error(self, "%s", err.text);
	if (a.no_wait && a.mode && strcmp(a.mode, "live"))
		return ffs_usage_error(self, "--no-wait goes with --live only, not with --%s", a.mode);
	if (a.rate && a.mode && strcmp(a.mode, "live"))
		return ffs_usage_error(self, "--max-rate goes with --live only, not with --%s", a.mode);
	if (a.rate && ffs_size_parse("--max-rate", a.rate, &a.max_rate, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.store && !known_store(a.store))
		return ffs_usage_error(self, "--store is memory, dense or packed, not '%s'", a.store);
	snprintf(ctl, sizeof(ctl), "%s/ctl", target.sandbox);

	ffs_interrupt_install();
	r = ffs_tree_open(&t, a.mount, &err);
	if (!r)
		r = ffs_tree_check_target(&t, &target, &err);
	if (r < 0)
		return ffs_failure(self, &err);
	request = build_branch(&a, a.key ? NULL : argv[1]);
	r = ffs_tree_request(&t, ctl, request, &answer, &err);
	json_object_put(request);
	/* a cached branch is named by the daemon */
	snprintf(target.branch, sizeof(target.branch), "%s",
		a.key ? ffs_json_string(ffs_json_get(answer, "branch"), "name") : argv[1]);
	json_object_put(answer);
	if (!r && !a.no_wait) {
		r = ffs_wait_branch(&t, &target, true, &err);
		if (r == -EINTR)
			fprintf(stderr,
				"forkfs branch: interrupted; the branch goes on (forkfs wait %s/%s)\n",
				target.sandbox, target.branch);
	}
	if (r < 0)
		return ffs_failure(self, &err);
	return print_branch(self, &t, &target, a.json, began_ns);
}

/* ---- wait and rm: several branches, all of them tried ---- */

typedef int (*target_fn)(const struct ffs_tree *t, const struct ffs_target *target, struct ffs_error *err);

static int each_target(
	const struct ffs_command *self, int argc, char **argv, enum ffs_target_kind kind, target_fn fn)
{
	bool help = false;
	const char *mount = NULL;
	const struct ffs_opt opts[] = {
		{"mount", 0, FFS_OPT_VALUE, &mount},
		{"help", 'h', FFS_OPT_FLAG, &help},
		{0},
	};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	int n, code = FFS_EXIT_OK;
	struct ffs_error err = {0};

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (help)
		return ffs_usage_help(self);
	if (!n)
		return ffs_usage_error(self, "which branch? say NAME/BRANCH");
	/* all names are right before the first is acted upon */
	for (int i = 0; i < n; i++) {
		struct ffs_target target;

		if (ffs_target_parse(argv[i], kind, &target, &err) < 0)
			return ffs_usage_error(self, "%s", err.text);
	}
	ffs_interrupt_install();
	if (ffs_tree_open(&t, mount, &err) < 0)
		return ffs_failure(self, &err);
	for (int i = 0; i < n; i++) {
		struct ffs_target target;
		struct ffs_error why = {0};

		if (ffs_target_parse(argv[i], kind, &target, &why) < 0 || fn(&t, &target, &why) < 0)
			code = ffs_failure(self, &why);
	}
	return code;
}

static int wait_one(const struct ffs_tree *t, const struct ffs_target *target, struct ffs_error *err)
{
	return ffs_wait_branch(t, target, true, err);
}

int ffs_cmd_wait(const struct ffs_command *self, int argc, char **argv)
{
	return each_target(self, argc, argv, FFS_TARGET_BRANCH, wait_one);
}

static int remove_one(const struct ffs_tree *t, const struct ffs_target *target, struct ffs_error *err)
{
	char parent[160], path[240];
	struct ffs_error why = {0};
	int code;

	snprintf(parent, sizeof(parent), "%s/branches", target->sandbox);
	snprintf(path, sizeof(path), "%s/%s", parent, target->branch);
	if (target->fork[0]) {
		snprintf(parent, sizeof(parent), "%s/branches/%s/forks", target->sandbox, target->branch);
		snprintf(path, sizeof(path), "%s/%s", parent, target->fork);
	}
	if (!unlinkat(t->fd, path, AT_REMOVEDIR))
		return 0;
	code = errno;
	if (code == ENOENT && ffs_tree_check_target(t, target, err) < 0)
		return -code;
	ffs_error_errno(&why, code, "%s/%s%s%s cannot be removed", target->sandbox, target->branch,
		target->fork[0] ? "/" : "", target->fork);
	if (code != EINTR)
		ffs_tree_explain(t, parent, &why);
	if (err)
		*err = why;
	return -code;
}

int ffs_cmd_rm(const struct ffs_command *self, int argc, char **argv)
{
	return each_target(self, argc, argv, FFS_TARGET_BRANCH | FFS_TARGET_FORK, remove_one);
}
