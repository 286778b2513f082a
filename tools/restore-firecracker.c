/* Children of the kind firecracker: the stock VMM, told over its API to load a branch. Its memory is the
 * branch's file, mapped privately (File), or is served by a pager (Uffd) that is started once for all of them
 * and ends with the last.
 *
 * One thread a child (restore.h); the pager is started by the main thread, before them: the kernel tells it
 * when that thread, hence the command, has ended. No locks. */
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "restore-api.h"
#include "restore-drives.h"

#define PAGER_SOCKET "pager"

struct plan {
	bool uffd;
	bool vsock; /* the VM has one */
	struct ffs_drives drives;
	struct ffs_jails jails;
	struct ffs_child pager; /* a process of a directory of its own, as the children are */
};

/* ---- what can be started ---- */

static int find_program(struct ffs_restore *r, struct ffs_error *err)
{
	const char *path = getenv("PATH");
	_cleanup_free_ char *copy = strdup(path ? path : "");

	if (r->conf.binary)
		return 0;
	for (char *save = NULL, *dir = copy ? strtok_r(copy, ":", &save) : NULL; dir;
		dir = strtok_r(NULL, ":", &save)) {
		_cleanup_free_ char *full = NULL;

		if (dir[0] != '/')
			continue;
		if (asprintf(&full, "%s/firecracker", dir) < 0)
			full = NULL;
		else if (access(full, X_OK) == 0)
			r->conf.binary = ffs_steal_ptr(&full);
		if (r->conf.binary)
			return 0;
	}
	return ffs_error_set(err, ENOENT,
		"there is no firecracker in PATH: name it by --vmm, or in a file of " FFS_VMM_DIR);
}

static int plan(struct ffs_restore *r, struct ffs_error *err)
{
	struct plan *p = calloc(1, sizeof(*p));
	int got;

	if (!p)
		return ffs_error_set(err, ENOMEM, "no memory for a plan");
	r->plan = p;
	p->pager.pidfd = p->pager.control = -1;
	p->uffd = r->backend && !strcmp(r->backend, "uffd");
	p->drives.jailed = r->conf.jailer;
	got = ffs_drives_plan(r, &p->drives, err);
	if (got < 0)
		return got;
	p->vsock = ffs_cli_json_bool(r->vmm, "resets_vsock");
	if (p->vsock)
		ffs_restore_note(r, "the guest's vsock connections were reset when the branch was taken");
	got = find_program(r, err);
	return got ? got : ffs_jails_plan(r, &p->jails, err);
}

/* ---- the pager ---- */

static bool is_listening(const struct ffs_child *c)
{
	char path[160];
	struct stat st;

	snprintf(path, sizeof(path), "%s/stdout", c->dir);
	return stat(path, &st) == 0 && st.st_size > 0;
}

static int start_pager(struct ffs_restore *r, const char *dir, struct ffs_error *err)
{
	_cleanup_close_ int watch = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	_cleanup_free_ char *self = realpath("/proc/self/exe", NULL);
	const struct ffs_argv none = {0};
	struct plan *p = r->plan;
	struct ffs_argv argv = {0};
	unsigned uid = 0, gid = 0;
	char events[4096];
	int got = p->jails.on ? ffs_jails_owner(&p->jails, &uid, &gid, err) : 0;

	if (got < 0)
		return got;
	ffs_child_init(&p->pager, 0);
	if (!self || watch < 0)
		return ffs_error_errno(err, errno, "the pager cannot be started");
	got = ffs_child_make_dir(&p->pager, dir, "pager", err);
	if (got < 0)
		return got;
	if (inotify_add_watch(watch, p->pager.dir, IN_MODIFY) < 0)
		return ffs_error_errno(err, errno, "%s cannot be watched", p->pager.dir);
	ffs_argv_add(&argv, self);
	ffs_argv_add(&argv, "pager");
	ffs_argv_add(&argv, "--with-parent");
	ffs_argv_addf(&argv, "--mount=%s", r->tree->mount);
	if (r->no_prefetch)
		ffs_argv_add(&argv, "--no-prefetch");
	if (p->jails.on)
		ffs_argv_addf(&argv, "--owner=%u:%u", uid, gid);
	ffs_argv_addf(&argv, "%s/%s", r->target.sandbox, r->target.branch);
	ffs_argv_addf(&argv, "%s/" PAGER_SOCKET, p->pager.dir);
	got = ffs_child_spawn(&p->pager, &argv, &none, err);
	ffs_argv_free(&argv);
	while (!got && !is_listening(&p->pager)) {
		if (ffs_child_ended(&p->pager))
			return ffs_child_explain(&p->pager, -ECONNRESET, err);
		ffs_child_poll(&p->pager, watch, -1);
		while (read(watch, events, sizeof(events)) > 0)
			;
	}
	return got;
}

static int begin(struct ffs_restore *r, const char *dir, struct ffs_error *err)
{
	struct plan *p = r->plan;

	if (p->uffd)
		return start_pager(r, dir, err);
	return p->jails.on ? ffs_jails_image(r, &p->jails, err) : 0;
}

/* The children have started, or never will: what they touched is the working set. */
static void end(struct ffs_restore *r)
{
	struct plan *p = r->plan;

	if (!p)
		return;
	if (p->pager.pidfd >= 0 && syscall(SYS_pidfd_send_signal, p->pager.pidfd, SIGUSR1, NULL, 0) < 0)
		fprintf(stderr, "forkfs restore: the pager has ended: see %s/stderr\n", p->pager.dir);
	ffs_child_release(&p->pager);
	ffs_jails_free(&p->jails);
	free(p);
	r->plan = NULL;
}

/* ---- one child ---- */

/* The jailer starts it: what it needs is put into its jail. */
static int jailed_command(
	struct ffs_restore *r, struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err)
{
	const struct plan *p = r->plan;
	char path[160];
	int got = c->dir[0] ? ffs_jail_make(r, &p->jails, c, err) : 0;

	ffs_restore_api_socket(c, path);
	if (!got)
		got = ffs_jail_command(r, &p->jails, c, out, err);
	ffs_argv_add(out, "--api-sock");
	ffs_argv_add(out, "/api");
	if (!got)
		got = ffs_jail_vmm_words(&p->jails, c, out, err);
	return got ? got : ffs_drives_copy(r, &p->drives, c, err);
}

static int command(struct ffs_restore *r, struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err)
{
	const struct plan *p = r->plan;
	char api[160] = "api";
	int got;

	if (p->jails.on)
		return jailed_command(r, c, out, err);
	ffs_restore_api_socket(c, api);
	ffs_argv_add(out, r->conf.binary);
	ffs_argv_add(out, "--api-sock");
	ffs_argv_add(out, api);
	for (unsigned i = 0; i < r->conf.arg.n; i++)
		ffs_argv_add(out, r->conf.arg.word[i]);
	for (unsigned i = 0; i < r->n_user_args; i++)
		ffs_argv_add(out, r->user_arg[i]);
	got = ffs_drives_copy(r, &p->drives, c, err);
	return got ? got : ffs_restore_api_give_vmstate(r, c, err);
}

/* Its own socket for the guest's vsock; Firecrackers before 1.16 know the parent's only. */
static int add_vsock(struct ffs_child *c, struct json_object *body, struct ffs_error *err)
{
	struct json_object *root = NULL, *o;
	unsigned major = 0, minor = 0;
	char path[160];
	int got = ffs_restore_api_call(c, "GET", "/", NULL, &root, err);

	if (!got && sscanf(ffs_json_string(root, "vmm_version"), "%u.%u", &major, &minor) == 2 &&
		(major > 1 || (major == 1 && minor >= 16))) {
		o = json_object_new_object();
		ffs_child_socket(c, "vsock", FFS_CHILD_VSOCK, path);
		ffs_child_name(c, FFS_CHILD_VSOCK, path);
		c->vsock = true;
		json_object_object_add(o, "uds_path", json_object_new_string(path));
		json_object_object_add(body, "vsock_override", o);
	}
	json_object_put(root);
	return got;
}

/* The body of PUT /snapshot/load. */
static int load_request(
	struct ffs_restore *r, struct ffs_child *c, struct json_object *body, struct ffs_error *err)
{
	struct json_object *backend = json_object_new_object();
	struct plan *p = r->plan;
	char path[160];
	int got;

	if (p->jails.on)
		ffs_child_name(c, FFS_JAIL_VMSTATE, path);
	else
		snprintf(path, sizeof(path), "/proc/self/fd/%d", FFS_CHILD_VMSTATE);
	json_object_object_add(body, "snapshot_path", json_object_new_string(path));
	if (p->jails.on)
		ffs_child_name(c, p->uffd ? FFS_JAIL_PAGER : FFS_JAIL_MEMORY, path);
	else if (p->uffd)
		snprintf(path, sizeof(path), "%s/" PAGER_SOCKET, p->pager.dir);
	else
		snprintf(path, sizeof(path), "/proc/self/fd/%d", FFS_CHILD_MEMORY);
	json_object_object_add(backend, "backend_type", json_object_new_string(p->uffd ? "Uffd" : "File"));
	json_object_object_add(backend, "backend_path", json_object_new_string(path));
	json_object_object_add(body, "mem_backend", backend);
	json_object_object_add(body, "resume_vm", json_object_new_boolean(false));
	got = ffs_nets_add(r, c, body, err);
	return !got && p->vsock ? add_vsock(c, body, err) : got;
}

/* Its jail sees what is shared: the memory or the pager's socket, and drives of the caller's own. */
static int furnish(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	struct ffs_jail_bind bind[FFS_JAIL_BINDS] = {{.ns = -1}};
	struct plan *p = r->plan;
	char pager[160], memory[] = "the branch's memory";
	unsigned n = 1;
	int got;

	snprintf(pager, sizeof(pager), "%s/" PAGER_SOCKET, p->pager.dir);
	if (p->uffd)
		bind[0] = (struct ffs_jail_bind){.ns = -1, .fd = -1, .file = pager, .inside = FFS_JAIL_PAGER};
	else
		bind[0] = (struct ffs_jail_bind){.ns = p->jails.image_ns,
			.fd = r->memory_fd,
			.file = memory,
			.inside = FFS_JAIL_MEMORY,
			.read_only = true};
	got = ffs_drives_bind(&p->drives, c, bind, &n, err);
	if (!got)
		got = ffs_jail_bind(c, bind, n, err);
	for (unsigned i = 1; i < n; i++)
		free(bind[i].file);
	return got;
}

static int load(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	struct json_object *body = json_object_new_object();
	struct plan *p = r->plan;
	int got = p->jails.on ? ffs_jail_started(&p->jails, c, err) : 0;

	if (!got)
		got = ffs_restore_api_connect(c, err);
	if (!got && p->jails.on)
		got = furnish(r, c, err);
	if (!got)
		got = load_request(r, c, body, err);
	if (!got)
		got = ffs_restore_api_call(c, "PUT", "/snapshot/load",
			json_object_to_json_string_ext(
				body, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE),
			NULL, err);
	json_object_put(body);
	return got ? got : ffs_drives_patch(r, &p->drives, c, err);
}

const struct ffs_restore_ops ffs_restore_firecracker = {
	.kind = "firecracker",
	.plan = plan,
	.begin = begin,
	.command = command,
	.load = load,
	.run = ffs_restore_api_run,
	.let_go = ffs_restore_api_let_go,
	.end = end,
};
