/* forkfs ls, status: the tree's status files, for people and (--json) for machines.
 *
 * One thread. Lists directories and reads `status` files only: never a file that takes a branch. */
#include "cli.h"

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "options.h"
#include "tree.h"

struct show_args {
	const char *mount;
	bool json, help;
};

/* Parse a command of at most one target. 0 to go on, or *code to return with. */
static int parse_show(const struct ffs_command *self, int argc, char **argv, enum ffs_target_kind allowed,
	struct show_args *a, struct ffs_target *target, int *code)
{
	const struct ffs_opt opts[] = {
		{"json", 0, FFS_OPT_FLAG, &a->json},
		{"mount", 0, FFS_OPT_VALUE, &a->mount},
		{"help", 'h', FFS_OPT_FLAG, &a->help},
		{0},
	};
	struct ffs_error err = {0};
	int n;

	memset(target, 0, sizeof(*target));
	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		*code = ffs_usage_error(self, "%s", err.text);
	else if (a->help)
		*code = ffs_usage_help(self);
	else if (n > 1)
		*code = ffs_usage_error(self, "one name at a time");
	else if (n == 1 && ffs_target_parse(argv[0], allowed, target, &err) < 0)
		*code = ffs_usage_error(self, "%s", err.text);
	else
		return 0;
	return -1;
}

/* The status of each name under `dir` ("" for the root), as an array whose elements always have a `name`: one
 * that vanished meanwhile is left out, one that cannot be read keeps its name and an `error`. */
static int collect(const struct ffs_tree *t, const char *dir, struct json_object **out, struct ffs_error *err)
{
	struct json_object *all;
	char **names = NULL;
	size_t n = 0;
	int r = ffs_tree_names(t, *dir ? dir : ".", &names, &n, err);

	if (r < 0)
		return r;
	all = json_object_new_array();
	for (size_t i = 0; i < n; i++) {
		_cleanup_free_ char *path = NULL;
		struct json_object *status = NULL;
		struct ffs_error why = {0};

		if (asprintf(&path, "%s%s%s/status", dir, *dir ? "/" : "", names[i]) < 0)
			continue;
		r = ffs_tree_json(t, path, &status, &why);
		if (r == -ENOENT)
			continue;
		if (r < 0) {
			status = json_object_new_object();
			json_object_object_add(status, "error", json_object_new_string(why.text));
		}
		/* the directory's name is what every other command takes */
		json_object_object_add(status, "name", json_object_new_string(names[i]));
		json_object_array_add(all, status);
	}
	ffs_tree_names_free(names, n);
	*out = all;
	return 0;
}

static void cell(const char *text, int width)
{
	int len = (int)strlen(text);

	ffs_print_safe(*text ? text : "-");
	for (int pad = (len ? len : 1); pad < width; pad++)
		putchar(' ');
	putchar(' ');
}

static void print_sandboxes(struct json_object *all)
{
	char buf[32];

	printf("%-16s %-8s %-12s %8s %10s %8s %s\n", "NAME", "STATE", "VMM", "PID", "MEMORY", "BRANCHES",
		"LAST PAUSE");
	for (size_t i = 0; i < json_object_array_length(all); i++) {
		struct json_object *s = json_object_array_get_idx(all, i),
				   *last = ffs_json_get(s, "last_branch"),
				   *named = ffs_json_get(s, "branches");

		if (!json_object_is_type(named, json_type_array))
			named = NULL;

		cell(ffs_json_string(s, "name"), 16);
		if (*ffs_json_string(s, "error")) {
			ffs_print_safe(ffs_json_string(s, "error"));
			putchar('\n');
			continue;
		}
		cell(ffs_json_string(s, "state"), 8);
		cell(ffs_json_string(s, "vmm"), 12);
		printf("%8llu %10s ", (unsigned long long)ffs_json_u64(s, "pid"),
			ffs_format_bytes(buf, ffs_json_u64(s, "memory_bytes")));
		printf("%8zu %s\n", named ? json_object_array_length(named) : 0,
			last ? ffs_format_ns(buf, ffs_json_u64(last, "pause_ns")) : "-");
	}
}

static void print_branches(struct json_object *all)
{
	char buf[32];

	printf("%-20s %-8s %-6s %-8s %10s %10s %10s %10s %s\n", "NAME", "STATE", "MODE", "STORE", "MEMORY",
		"OWN DISK", "SHARED", "PAUSE", "INSTANT");
	for (size_t i = 0; i < json_object_array_length(all); i++) {
		struct json_object *b = json_object_array_get_idx(all, i);

		cell(ffs_json_string(b, "name"), 20);
		cell(ffs_json_string(b, "state"), 8);
		cell(ffs_json_string(b, "mode"), 6);
		cell(ffs_json_string(b, "store"), 8);
		printf("%10s ", ffs_format_bytes(buf, ffs_json_u64(b, "memory_bytes")));
		uint64_t disk = ffs_json_u64(b, "disk_bytes"), shared = ffs_json_u64(b, "disk_shared_bytes");

		printf("%10s ", disk > shared ? ffs_format_bytes(buf, disk - shared) : "-");
		printf("%10s ", shared ? ffs_format_bytes(buf, shared) : "-");
		printf("%10s ", ffs_format_ns(buf, ffs_json_u64(b, "pause_ns")));
		ffs_print_safe(ffs_json_string(b, "instant"));
		if (*ffs_json_string(b, "error")) {
			fputs("  ", stdout);
			ffs_print_safe(ffs_json_string(b, "error"));
		}
		putchar('\n');
	}
}

int ffs_cmd_ls(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct json_object *all = NULL;
	struct show_args a = {0};
	struct ffs_target target;
	struct ffs_error err = {0};
	char dir[80] = "";
	int code, r;

	if (parse_show(self, argc, argv, FFS_TARGET_SANDBOX, &a, &target, &code))
		return code;
	ffs_interrupt_install();
	r = ffs_tree_open(&t, a.mount, &err);
	if (!r && target.sandbox[0]) {
		r = ffs_tree_check_target(&t, &target, &err);
		snprintf(dir, sizeof(dir), "%s/branches", target.sandbox);
	}
	if (!r)
		r = collect(&t, dir, &all, &err);
	if (r < 0)
		return ffs_failure(self, &err);
	if (a.json) {
		ffs_print_json(all);
	} else {
		(dir[0] ? print_branches : print_sandboxes)(all);
		json_object_put(all);
	}
	return ffs_finish_output(self);
}

/* ---- status ---- */

static bool ends_with(const char *s, const char *tail)
{
	size_t a = strlen(s), b = strlen(tail);

	return a >= b && !strcmp(s + a - b, tail);
}

/* Without the unit: the value is printed with its own. */
static void print_key(const char *key)
{
	size_t len = strlen(key);
	char copy[80];

	if (ends_with(key, "_ns"))
		len -= strlen("_ns");
	else if (ends_with(key, "_bytes"))
		len -= strlen("_bytes");
	snprintf(copy, sizeof(copy), "%.*s", (int)(len < 79 ? len : 79), key);
	ffs_print_safe(copy);
}

static void print_value(struct json_object *v)
{
	if (!v)
		putchar('-');
	else if (json_object_is_type(v, json_type_string))
		ffs_print_safe(json_object_get_string(v));
	else
		ffs_print_safe(json_object_to_json_string_ext(
			v, JSON_C_TO_STRING_SPACED | JSON_C_TO_STRING_NOSLASHESCAPE));
}

/* A status file as indented lines of "key: value". Sizes and durations are told by the endings of their keys,
 * so that a key a later daemon adds is shown too. */
static void print_tree(struct json_object *obj, int depth)
{
	json_object_object_foreach(obj, key, v)
	{
		size_t n = json_object_is_type(v, json_type_array) ? json_object_array_length(v) : 0;
		char buf[32];

		printf("%*s", depth * 2, "");
		print_key(key);
		putchar(':');
		if (json_object_is_type(v, json_type_object)) {
			putchar('\n');
			print_tree(v, depth + 1);
			continue;
		}
		if (n && json_object_is_type(json_object_array_get_idx(v, 0), json_type_object)) {
			putchar('\n');
			for (size_t i = 0; i < n; i++) {
				struct json_object *e = json_object_array_get_idx(v, i);

				printf("%*s- ", depth * 2 + 2, "");
				print_value(e);
				putchar('\n');
			}
			continue;
		}
		putchar(' ');
		if (json_object_is_type(v, json_type_int) && ends_with(key, "_ns"))
			fputs(ffs_format_ns(buf, json_object_get_uint64(v)), stdout);
		else if (json_object_is_type(v, json_type_int) && ends_with(key, "_bytes"))
			fputs(ffs_format_bytes(buf, json_object_get_uint64(v)), stdout);
		else
			print_value(v);
		putchar('\n');
	}
}

/* The daemon itself: version and capabilities as they are, and its sandboxes. */
static int collect_mount(const struct ffs_tree *t, struct json_object **out, struct ffs_error *err)
{
	struct json_object *all, *capabilities = NULL, *sandboxes = NULL;
	char version[128];
	int r = ffs_tree_word(t, ".forkfs/version", version, sizeof(version), err);

	if (!r)
		r = ffs_tree_json(t, ".forkfs/capabilities", &capabilities, err);
	if (!r)
		r = collect(t, "", &sandboxes, err);
	if (r < 0) {
		json_object_put(capabilities);
		return r;
	}
	all = json_object_new_object();
	json_object_object_add(all, "mount", json_object_new_string(t->mount));
	json_object_object_add(all, "version", json_object_new_string(version));
	json_object_object_add(all, "capabilities", capabilities);
	json_object_object_add(all, "sandboxes", sandboxes);
	*out = all;
	return 0;
}

int ffs_cmd_status(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct json_object *status = NULL, *sandboxes;
	struct show_args a = {0};
	struct ffs_target target;
	struct ffs_error err = {0};
	char path[176];
	int code, r;

	if (parse_show(self, argc, argv, FFS_TARGET_ANY, &a, &target, &code))
		return code;
	ffs_interrupt_install();
	r = ffs_tree_open(&t, a.mount, &err);
	if (!r && !target.sandbox[0]) {
		r = collect_mount(&t, &status, &err);
	} else if (!r) {
		snprintf(path, sizeof(path), target.branch[0] ? "%s/branches/%s/status" : "%s/status",
			target.sandbox, target.branch);
		r = ffs_tree_check_target(&t, &target, &err);
		if (!r)
			r = ffs_tree_json(&t, path, &status, &err);
	}
	if (r < 0)
		return ffs_failure(self, &err);
	if (a.json) {
		ffs_print_json(status);
		return ffs_finish_output(self);
	}
	sandboxes = json_object_get(target.sandbox[0] ? NULL : ffs_json_get(status, "sandboxes"));
	if (sandboxes)
		json_object_object_del(status, "sandboxes");
	print_tree(status, 0);
	if (sandboxes)
		print_sandboxes(sandboxes);
	json_object_put(sandboxes);
	json_object_put(status);
	return ffs_finish_output(self);
}
