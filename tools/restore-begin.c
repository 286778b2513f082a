/* From a branch to what its children have in common: what may be restored, the plan of its kind, the image, the pages of a
 * fork; and how that is asked for on a command line.
 *
 * One thread, before any child is started; afterwards all of it is read only, but for the notes. No locks. What waits is
 * the reading of the branch (restore-image.c, restore-fork.c); a signal ends that. */
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "base/udp.h"
#include "base/util.h"
#include "restore.h"

#define DIR_DEFAULT "/run/forkfs/children"

const struct ffs_restore_ops *const ffs_restore_kinds[] = {
	&ffs_restore_qemu, &ffs_restore_coop, &ffs_restore_firecracker, NULL};

void ffs_restore_note(struct ffs_restore *r, const char *fmt, ...)
{
	char text[400];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	json_object_array_add(r->notes, json_object_new_string(text));
}

int ffs_restore_open(const struct ffs_restore *r, const char *file, struct ffs_error *err)
{
	char dir[160];
	int fd = openat(r->branch_fd, file, O_RDONLY | O_CLOEXEC);

	if (fd >= 0)
		return fd;
	struct ffs_error why = {0};

	snprintf(dir, sizeof(dir), "%s/branches/%s", r->target.sandbox, r->target.branch);
	ffs_error_errno(&why, errno, "%s/%s/%.100s", r->tree->mount, dir, file);
	ffs_tree_explain(r->tree, dir, &why);
	return ffs_error_set(err, why.code, "%s", why.text);
}

/* ---- the branch ---- */

/* What may be restored, and whether its command line may be used. */
static int look_at_branch(struct ffs_restore *r, const struct ffs_restore_args *a, struct ffs_error *err)
{
	const char *label = r->target.branch, *kind, *state;
	char path[160];
	int got;

	/* one directory from here on: a branch that is made in its place has other files */
	snprintf(path, sizeof(path), "%s/branches/%s", r->target.sandbox, label);
	r->branch_fd = openat(r->tree->fd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (r->branch_fd < 0)
		return ffs_error_errno(err, errno, "%s/%s", r->tree->mount, path);
	got = ffs_tree_json(
		&(struct ffs_tree){.mount = r->tree->mount, .fd = r->branch_fd}, "status", &r->status, err);
	if (got < 0)
		return got;
	state = ffs_json_string(r->status, "state");
	r->writing = !strcmp(state, "writing");
	if (!strcmp(state, "failed"))
		return ffs_error_set(err, EIO, "branch %s failed and can never be restored: %.300s", label,
			ffs_json_string(r->status, "error"));
	if (!r->writing && strcmp(state, "ready"))
		return ffs_error_set(
			err, EPROTO, "branch %s is in a state that is not known: '%.40s'", label, state);
	if (json_object_is_type(ffs_json_get(r->status, "torn_possible"), json_type_array) && !a->torn)
		return ffs_error_set(err, EPERM,
			"branch %s was taken by --force while others could write the guest's memory, and may "
			"be torn "
			"(torn_possible in its status): --accept-torn starts it all the same",
			label);
	r->memory_size = ffs_json_u64(r->status, "memory_bytes");
	r->imported = ffs_cli_json_bool(r->status, "imported");
	r->vmm = ffs_json_get(r->status, "vmm");
	kind = ffs_json_string(r->vmm, "kind");
	for (const struct ffs_restore_ops *const *k = ffs_restore_kinds; *k; k++)
		if (!strcmp((*k)->kind, kind))
			r->ops = *k;
	if (!r->ops)
		return ffs_error_set(err, ENOTSUP,
			"branch %s is of a VMM of the kind '%.40s', which restore cannot start", label, kind);
	if (!r->memory_size)
		return ffs_error_set(err, EPROTO, "branch %s has no memory", label);
	return 0;
}

/* The manifest of a stranger: they see what it wants to run, and nothing is run. */
static int refuse_imported(struct ffs_restore *r, struct ffs_error *err)
{
	struct json_object *line = ffs_json_get(r->vmm, "command_line");

	if (!r->imported || r->trust || !line)
		return 0;
	return ffs_error_set(err, EPERM,
		"branch %s was imported, and its manifest's command line is not run without --trust: %.300s",
		r->target.branch,
		json_object_to_json_string_ext(
			line, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
}

static int check_kind(const struct ffs_restore *r, struct ffs_error *err)
{
	if (r->healthy && r->ops != &ffs_restore_qemu)
		return ffs_error_set(err, ENOTSUP,
			"--healthy is for QEMU's children, which have a port for an agent; the branch is of "
			"a %s",
			r->ops->kind);
	if (r->ops == &ffs_restore_firecracker)
		return r->backend && r->target.fork[0] && !strcmp(r->backend, "uffd")
			       ? ffs_error_set(err, ENOTSUP,
					 "--backend uffd serves the branch's memory, without the payloads of "
					 "fork %s: leave it "
					 "out, or serve the fork's memory.bin by `forkfs pager`",
					 r->target.fork)
			       : 0;
	if (r->conf.jailer)
		return ffs_error_set(err, EINVAL,
			"a jailer is for Firecracker's children; the branch is of a %s", r->ops->kind);
	if (r->backend)
		return ffs_error_set(err, EINVAL,
			"--backend is for Firecracker's children; the branch is of a %s", r->ops->kind);
	if (r->drives.n || r->nets.n)
		return ffs_error_set(err, EINVAL,
			"--drive and --net are for Firecracker's children; the branch is of a %s",
			r->ops->kind);
	return 0;
}

/* Named by hand, so it may be found by PATH of theirs only as a path. */
static int name_program(const char *option, const char *path, char **out, struct ffs_error *err)
{
	free(*out);
	*out = realpath(path, NULL);
	return *out ? 0 : ffs_error_errno(err, errno, "%s %s", option, path);
}

int ffs_restore_plan(struct ffs_restore *r, const struct ffs_restore_args *a, struct ffs_error *err)
{
	int got = ffs_tree_check_target(r->tree, &r->target, err);

	if (!got)
		got = look_at_branch(r, a, err);
	if (!got)
		got = refuse_imported(r, err);
	if (!got)
		got = ffs_restore_conf_read(a->conf, r->ops->kind, &r->conf, err);
	if (!got && a->vmm)
		got = name_program("--vmm", a->vmm, &r->conf.binary, err);
	if (!got && a->jailer)
		got = name_program("--jailer", a->jailer, &r->conf.jailer, err);
	if (!got)
		got = check_kind(r, err);
	if (!got)
		got = r->ops->plan(r, err);
	return got;
}

int ffs_restore_begin(struct ffs_restore *r, const struct ffs_restore_args *a, struct ffs_error *err)
{
	/* served memory is not mapped, and a jail gets a copy of another kind */
	int got = ffs_restore_image(r, a->as_served || ffs_restore_is_uffd(a) || r->conf.jailer, err);

	if (!got && r->target.fork[0])
		got = ffs_restore_fork_read(r, err);
	if (!got && r->ops->begin)
		got = r->ops->begin(r, ffs_restore_dir(a), err);
	return got;
}

void ffs_restore_init(struct ffs_restore *r, const struct ffs_tree *t, const struct ffs_target *target,
	const struct ffs_restore_args *a)
{
	*r = (struct ffs_restore){
		.tree = t, .target = *target, .memory_fd = -1, .branch_fd = -1, .began_ns = ffs_now_ns()};
	r->trust = a->trust;
	r->backend = a->backend;
	r->no_prefetch = a->no_prefetch;
	r->drives = a->drives;
	r->nets = a->nets;
	r->ack_address = a->ack_address;
	r->healthy = a->healthy;
	r->ready_s = a->ready_s;
	r->user_arg = a->user_arg;
	r->n_user_args = a->n_user_args;
	r->notes = json_object_new_array();
}

int ffs_restore_view(const struct ffs_restore *r, const struct ffs_target *target, struct ffs_restore *out,
	struct ffs_error *err)
{
	*out = *r;
	out->target = *target;
	out->page = NULL;
	out->n_pages = 0;
	out->ack.n = 0;
	out->notes = json_object_new_array();
	for (size_t i = 0; i < json_object_array_length(r->notes); i++)
		ffs_restore_note(out, "%s", json_object_get_string(json_object_array_get_idx(r->notes, i)));
	return target->fork[0] ? ffs_restore_fork_read(out, err) : 0;
}

void ffs_restore_view_end(struct ffs_restore *view)
{
	free(view->page);
	json_object_put(view->notes);
}

void ffs_restore_end(struct ffs_restore *r)
{
	if (r->ops && r->ops->end)
		r->ops->end(r);
	ffs_restore_conf_free(&r->conf);
	ffs_close_fd(&r->memory_fd);
	ffs_close_fd(&r->branch_fd);
	free(r->page);
	json_object_put(r->notes);
	json_object_put(r->status);
}

/* ---- what is said of it on a command line ---- */

bool ffs_restore_is_uffd(const struct ffs_restore_args *a)
{
	return a->backend && !strcmp(a->backend, "uffd");
}

const char *ffs_restore_dir(const struct ffs_restore_args *a)
{
	return a->dir ? a->dir : DIR_DEFAULT;
}

void ffs_restore_opts(struct ffs_restore_args *a, struct ffs_opt out[FFS_RESTORE_OPTS])
{
	const struct ffs_opt opts[FFS_RESTORE_OPTS] = {
		{"vmm", 0, FFS_OPT_VALUE, &a->vmm},
		{"jailer", 0, FFS_OPT_VALUE, &a->jailer},
		{"conf", 0, FFS_OPT_VALUE, &a->conf},
		{"dir", 0, FFS_OPT_VALUE, &a->dir},
		{"backend", 0, FFS_OPT_VALUE, &a->backend},
		{"no-prefetch", 0, FFS_OPT_FLAG, &a->no_prefetch},
		{"drive", 0, FFS_OPT_EACH, &a->drives},
		{"net", 0, FFS_OPT_EACH, &a->nets},
		{"ack-address", 0, FFS_OPT_VALUE, &a->ack_address},
		{"accept-torn", 0, FFS_OPT_FLAG, &a->torn},
		{"trust", 0, FFS_OPT_FLAG, &a->trust},
		{"as-served", 0, FFS_OPT_FLAG, &a->as_served},
		{"healthy", 0, FFS_OPT_FLAG, &a->healthy},
		{"ready-timeout", 0, FFS_OPT_VALUE, &a->ready},
		{"mount", 0, FFS_OPT_VALUE, &a->mount},
	};

	memcpy(out, opts, sizeof(opts));
}

int ffs_restore_check_args(struct ffs_restore_args *a, struct ffs_error *err)
{
	a->ready_s = FFS_AGENT_READY_S;
	if (a->ready && !a->healthy)
		return ffs_error_set(err, EINVAL, "--ready-timeout goes with --healthy");
	if (a->ready && ffs_seconds_option("--ready-timeout", a->ready, &a->ready_s, err) < 0)
		return -EINVAL;
	if (a->ack_address &&
		ffs_ip_parse(a->ack_address, &(struct sockaddr_storage){0}, &(socklen_t){0}) < 0)
		return ffs_error_set(err, EINVAL, "--ack-address is an IP address of this host, not '%.60s'",
			a->ack_address);
	if (a->backend && strcmp(a->backend, "file") && strcmp(a->backend, "uffd"))
		return ffs_error_set(err, EINVAL, "--backend is file or uffd, not '%.40s'", a->backend);
	if (a->dir && a->dir[0] != '/')
		return ffs_error_set(err, EINVAL, "--dir is an absolute path");
	return 0;
}

void ffs_restore_args_free(struct ffs_restore_args *a)
{
	ffs_words_free(&a->drives);
	ffs_words_free(&a->nets);
}
