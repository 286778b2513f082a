/* forkfs attach, detach: requests to .forkfs/ctl. One thread; waits only for the daemon's answer. */
#include "cli.h"

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "options.h"
#include "tree.h"

#define FFS_ROOT_CTL ".forkfs/ctl"

struct attach_args {
	const char *pid, *qemu, *owner, *mount;
	const char *firecracker, *coop;
	struct ffs_words *disks;
	bool track, force, json, help;
};

/* The daemon has another working directory: paths travel absolute. Links are left as they are. */
static int absolute_path(const char *path, char **out, struct ffs_error *err)
{
	_cleanup_free_ char *cwd = NULL;
	char *full = NULL;

	if (path[0] == '/') {
		full = strdup(path);
	} else {
		cwd = getcwd(NULL, 0);
		if (!cwd)
			return ffs_error_errno(
				err, errno, "the working directory, which '%s' is relative to", path);
		if (asprintf(&full, "%s/%s", strcmp(cwd, "/") ? cwd : "", path) < 0)
			full = NULL;
	}
	if (!full)
		return ffs_error_set(err, ENOMEM, "no memory for a path");
	*out = full;
	return 0;
}

static int add_disks(const struct ffs_words *disks, struct json_object *body, struct ffs_error *err)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(body, "disks", o);
	for (unsigned i = 0; i < disks->n; i++) {
		_cleanup_free_ char *full = NULL;
		const char *path;
		char id[65];
		int r = ffs_disk_parse(disks->word[i], id, &path, err);

		if (!r && json_object_object_get_ex(o, id, NULL))
			r = ffs_error_set(err, EINVAL, "--disk %s is given twice", id);
		if (!r)
			r = absolute_path(path, &full, err);
		if (r < 0)
			return r;
		json_object_object_add(o, id, json_object_new_string(full));
	}
	return 0;
}

static int add_socket(struct json_object *body, const char *key, const char *path, struct ffs_error *err)
{
	_cleanup_free_ char *full = NULL;
	int r = absolute_path(path, &full, err);

	if (!r)
		json_object_object_add(body, key, json_object_new_string(full));
	return r;
}

static int build_attach(
	const struct attach_args *a, const char *name, struct json_object **out, struct ffs_error *err)
{
	struct json_object *body = json_object_new_object(), *request = json_object_new_object();
	int pid, r = 0;

	json_object_object_add(request, "attach", body);
	json_object_object_add(body, "name", json_object_new_string(name));
	if (a->pid) {
		r = ffs_pid_parse(a->pid, &pid, err);
		if (!r)
			json_object_object_add(body, "pid", json_object_new_int(pid));
	}
	if (!r && a->qemu)
		r = add_socket(body, "qemu", a->qemu, err);
	if (!r && a->firecracker)
		r = add_socket(body, "firecracker", a->firecracker, err);
	if (!r && a->coop)
		r = add_socket(body, "coop", a->coop, err);
	if (!r && a->track)
		json_object_object_add(body, "track", json_object_new_boolean(true));
	if (!r && a->force)
		json_object_object_add(body, "force", json_object_new_boolean(true));
	if (!r && a->owner) {
		char owner[64];

		r = ffs_owner_parse(a->owner, owner, err);
		if (!r)
			json_object_object_add(body, "owner", json_object_new_string(owner));
	}
	if (!r && a->disks->n)
		r = add_disks(a->disks, body, err);
	if (r < 0)
		json_object_put(request);
	else
		*out = request;
	return r;
}

static int print_attached(
	const struct ffs_command *self, const struct ffs_tree *t, const char *name, bool json)
{
	_cleanup_free_ char *path = NULL;
	struct json_object *status = NULL;
	struct ffs_error err = {0};
	char size[32];

	if (asprintf(&path, "%s/status", name) < 0)
		return FFS_EXIT_FAILURE;
	if (ffs_tree_json(t, path, &status, &err) < 0)
		return ffs_failure(self, &err);
	if (json) {
		ffs_print_json(status);
		return ffs_finish_output(self);
	}
	printf("%s/%s: ", t->mount, name);
	ffs_print_safe(ffs_json_string(status, "vmm"));
	putchar(' ');
	ffs_print_safe(ffs_json_string(status, "vmm_version"));
	printf(", pid %llu, %s of memory, ", (unsigned long long)ffs_json_u64(status, "pid"),
		ffs_format_bytes(size, ffs_json_u64(status, "memory_bytes")));
	ffs_print_safe(ffs_json_string(status, "state"));
	putchar('\n');
	json_object_put(status);
	return ffs_finish_output(self);
}

int ffs_cmd_attach(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_(ffs_words_free) struct ffs_words disks = {0};
	struct attach_args a = {.disks = &disks};
	const struct ffs_opt opts[] = {
		{"pid", 0, FFS_OPT_VALUE, &a.pid},
		{"qemu", 0, FFS_OPT_VALUE, &a.qemu},
		{"track", 0, FFS_OPT_FLAG, &a.track},
		{"force", 0, FFS_OPT_FLAG, &a.force},
		{"owner", 0, FFS_OPT_VALUE, &a.owner},
		{"firecracker", 0, FFS_OPT_VALUE, &a.firecracker},
		{"coop", 0, FFS_OPT_VALUE, &a.coop},
		{"disk", 0, FFS_OPT_EACH, &disks},
		{"json", 0, FFS_OPT_FLAG, &a.json},
		{"mount", 0, FFS_OPT_VALUE, &a.mount},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
		{0},
	};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct json_object *request = NULL;
	struct ffs_target target;
	struct ffs_error err = {0};
	int n, r;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.help)
		return ffs_usage_help(self);
	if (n != 1)
		return ffs_usage_error(
			self, "%s", n ? "one NAME at a time" : "a NAME for the sandbox is missing");
	if (ffs_target_parse(argv[0], FFS_TARGET_SANDBOX, &target, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	unsigned named = !!a.pid + !!a.qemu + !!a.firecracker + !!a.coop;

	if (named != 1)
		return ffs_usage_error(self,
			"say %s --pid PID, --qemu QMP_SOCKET, --firecracker API_SOCKET or --coop SOCKET",
			named ? "only one of" : "which VM:");
	if (build_attach(&a, target.sandbox, &request, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);

	ffs_interrupt_install();
	r = ffs_tree_open(&t, a.mount, &err);
	if (!r)
		r = ffs_tree_request(&t, FFS_ROOT_CTL, request, NULL, &err);
	json_object_put(request);
	if (r < 0)
		return ffs_failure(self, &err);
	return print_attached(self, &t, target.sandbox, a.json);
}

int ffs_detach(const struct ffs_tree *t, const char *name, struct ffs_error *err)
{
	struct json_object *request = json_object_new_object(), *body = json_object_new_object();
	int r;

	json_object_object_add(request, "detach", body);
	json_object_object_add(body, "name", json_object_new_string(name));
	r = ffs_tree_request(t, FFS_ROOT_CTL, request, NULL, err);
	json_object_put(request);
	return r;
}

int ffs_cmd_detach(const struct ffs_command *self, int argc, char **argv)
{
	bool help = false;
	const char *mount = NULL;
	const struct ffs_opt opts[] = {
		{"mount", 0, FFS_OPT_VALUE, &mount},
		{"help", 'h', FFS_OPT_FLAG, &help},
		{0},
	};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct ffs_target target;
	struct ffs_error err = {0};
	int n, r;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (help)
		return ffs_usage_help(self);
	if (n != 1)
		return ffs_usage_error(self, "%s", n ? "one NAME at a time" : "which sandbox?");
	if (ffs_target_parse(argv[0], FFS_TARGET_SANDBOX, &target, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);

	ffs_interrupt_install();
	r = ffs_tree_open(&t, mount, &err);
	if (!r)
		r = ffs_tree_check_target(&t, &target, &err);
	if (r < 0)
		return ffs_failure(self, &err);
	r = ffs_detach(&t, target.sandbox, &err);
	return r < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}
