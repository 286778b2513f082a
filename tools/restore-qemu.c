/* Children of QEMU: which binary and what it can do, the command line, and QMP until the guest runs.
 *
 * plan() runs in the main thread; what it makes is read only afterwards, and command, load and run of one child in that
 * child's thread. The monitor is one end of a socket pair that only we have; the two monitors of the child for others
 * are sockets in its directory. Every wait ends with the process: its end of the pair is closed then. */
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "restore-qemu-args.h"
#include "vmm/qmp.h"

/* "For ever": what is waited for is an answer or the end of the process. Far enough from where sums overflow. */
#define NO_DEADLINE (UINT64_MAX / 4)
#define OPEN_READ_ONLY "forkfs-open-read-only.so"

struct qemu_plan {
	char *binary;
	struct ffs_argv words; /* behind the binary's name; the same for all children */
	struct ffs_argv env;
	struct ffs_qemu_args args;
	bool migration; /* a stream with memory blocks, whose content it leaves out */
};

/* The monitor of a child between load and let_go. */
struct talk {
	struct ffs_qmp *q;
	bool loaded, failed, resumed;
};

/* ---- the binary ---- */

static bool is_qemu_name(const char *name)
{
	return (!strncmp(name, "qemu-system-", 12) && ffs_qemu_is_id(name)) || !strcmp(name, "qemu-kvm") ||
	       !strcmp(name, "kvm");
}

/* The name comes from the manifest, the directories from the host. */
static int find_binary(struct ffs_restore *r, char **out, struct ffs_error *err)
{
	static const char *const dirs[] = {"/usr/local/bin", "/usr/bin", "/bin", "/usr/libexec"};
	struct json_object *first = json_object_array_get_idx(ffs_json_get(r->vmm, "command_line"), 0);
	const char *name = json_object_is_type(first, json_type_string) ? json_object_get_string(first) : "";

	if (r->conf.binary) {
		*out = strdup(r->conf.binary);
		return *out ? 0 : ffs_error_set(err, ENOMEM, "no memory for a path");
	}
	name = strrchr(name, '/') ? strrchr(name, '/') + 1 : name;
	if (!is_qemu_name(name))
		return ffs_error_set(err, EINVAL,
			"the branched VM's program is called '%.60s', which is no QEMU's name: name one by "
			"--vmm",
			name);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(dirs); i++) {
		if (asprintf(out, "%s/%s", dirs[i], name) < 0)
			return ffs_error_set(err, ENOMEM, "no memory for a path");
		if (!access(*out, X_OK))
			return 0;
		free(*out);
		*out = NULL;
	}
	return ffs_error_set(err, ENOENT, "there is no %s on this machine: name one by --vmm", name);
}

/* Where a library of ours is: beside what was installed, or in the directory of a build. */
static char *find_library(void)
{
	char self[512];
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	char *path = NULL;

	if (n > 0 && memchr(self, '/', (size_t)n)) {
		self[n] = 0;
		*strrchr(self, '/') = 0;
		if (asprintf(&path, "%s/" OPEN_READ_ONLY, self) < 0)
			return NULL;
		if (!access(path, R_OK))
			return path;
		free(path);
	}
	path = strdup(FFS_LIBDIR "/" OPEN_READ_ONLY);
	if (path && access(path, R_OK)) {
		free(path);
		path = NULL;
	}
	return path;
}

/* A QEMU opens the file of its memory for writing although it maps it privately; since 8.2 it can be told not to.
 * Before, a library makes it so. Where that cannot be either, the daemon has to serve the child (it may be opened for
 * writing then; nothing is ever written). */
static int memory_way(struct ffs_restore *r, struct qemu_plan *p, struct ffs_error *err)
{
	const char *const ask[] = {p->binary, "-object", "memory-backend-file,help", NULL};
	_cleanup_free_ char *said = NULL, *library = NULL;
	int got = ffs_ask_program(ask, &said, err);

	if (got < 0)
		return got;
	if (strstr(said, "rom=<")) {
		p->args.memory_options = ",readonly=on,rom=off";
		return 0;
	}
	library = find_library();
	if (!library) {
		ffs_restore_note(r, "this QEMU opens its memory for writing, and " OPEN_READ_ONLY
				    " is not installed: start it by hand, from the mount (README)");
		return ffs_error_set(
			err, ENOENT, OPEN_READ_ONLY " is not installed, and this QEMU (before 8.2) needs it");
	}
	const char *before = getenv("LD_PRELOAD");

	ffs_argv_addf(
		&p->env, "LD_PRELOAD=%s%s%s", library, before && *before ? ":" : "", before ? before : "");
	ffs_argv_addf(&p->env, "FORKFS_OPEN_READ_ONLY=/proc/self/fd/%d", FFS_CHILD_MEMORY);
	return 0;
}

/* ---- disks ---- */

static int open_disk(const struct ffs_restore *r, const char *id, struct ffs_error *err)
{
	char file[80];

	snprintf(file, sizeof(file), "disks/%s", id);
	return ffs_restore_open(r, file, err);
}

/* A qcow2 image may name others, which the child would read: the image was written by the VMM, and is not believed. */
static int check_qcow2(const struct ffs_restore *r, const char *id, struct ffs_error *err)
{
	_cleanup_close_ int fd = open_disk(r, id, err);
	unsigned char head[80] = {0};
	bool backing = false, external;

	if (fd < 0)
		return fd;
	if (ffs_pread_full(fd, head, sizeof(head), 0) < 72 || memcmp(head, "QFI\xfb", 4))
		return ffs_error_set(err, EINVAL, "disk %s is no qcow2 image", id);
	for (unsigned i = 8; i < 16; i++)
		backing |= head[i] != 0;
	/* incompatible features, bit 2, since version 3 */
	external = head[7] >= 3 && (head[79] & 4);
	if ((backing || external) && !r->trust)
		return ffs_error_set(err, EPERM,
			"disk %s is an image that names another file of this host, and was written by the "
			"VMM: taken only with "
			"--trust",
			id);
	return 0;
}

/* ---- plan ---- */

static int plan(struct ffs_restore *r, struct ffs_error *err)
{
	struct qemu_plan *p = calloc(1, sizeof(*p));
	const char *kind = ffs_json_string(r->vmm, "vmstate_kind");
	int got;

	if (!p)
		return ffs_error_set(err, ENOMEM, "no memory for a plan");
	r->plan = p;
	p->migration = !strcmp(kind, "migration");
	if (!p->migration && strcmp(kind, "xen-save"))
		return ffs_error_set(err, ENOTSUP,
			"the branch's device state is of a kind that is not known: '%.40s'", kind);
	p->args.command_line = ffs_json_get(r->vmm, "command_line");
	p->args.disks = ffs_json_get(r->status, "disks");
	p->args.user = r->user_arg;
	p->args.n_user = r->n_user_args;
	p->args.trust = r->trust;
	p->args.memory_size = r->memory_size;
	p->args.notes = r->notes;
	got = find_binary(r, &p->binary, err);
	if (!got)
		got = memory_way(r, p, err);
	if (!got)
		got = ffs_qemu_args_make(&p->args, err);
	for (unsigned i = 0; !got && i < p->args.n_disks; i++)
		if (p->args.qcow2[i])
			got = check_qcow2(r, p->args.disk[i], err);
	for (unsigned i = 0; !got && i < r->conf.env.n; i++)
		ffs_argv_add(&p->env, r->conf.env.word[i]);
	return got;
}

static void end(struct ffs_restore *r)
{
	struct qemu_plan *p = r->plan;

	if (!p)
		return;
	free(p->binary);
	ffs_argv_free(&p->env);
	ffs_argv_free(&p->args.out);
	free(p);
	r->plan = NULL;
}

static const struct ffs_argv *environment(const struct ffs_restore *r)
{
	return &((const struct qemu_plan *)r->plan)->env;
}

/* ---- one child ---- */

static int command(struct ffs_restore *r, struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err)
{
	const struct qemu_plan *p = r->plan;
	char path[160];
	int pair[2], got = 0;

	ffs_argv_add(out, p->binary);
	for (unsigned i = 0; i < p->args.out.n; i++)
		ffs_argv_add(out, p->args.out.word[i]);
	ffs_argv_add(out, "-chardev");
	ffs_argv_addf(out, "socket,id=forkfs-control,fd=%d", FFS_CHILD_CONTROL);
	ffs_argv_add(out, "-mon");
	ffs_argv_add(out, "chardev=forkfs-control,mode=control");
	for (const char *const *name = (const char *const[]){"qmp", "qmp-forkfs", NULL}; *name; name++) {
		ffs_argv_add(out, "-qmp");
		ffs_argv_addf(out, "unix:%s,server=on,wait=off", *name);
	}
	ffs_argv_add(out, "-S");
	ffs_argv_add(out, "-incoming");
	ffs_argv_add(out, "defer");
	if (!p->migration) {
		ffs_argv_add(out, "-global");
		ffs_argv_add(out, "migration.send-configuration=off");
	}
	for (unsigned i = 0; i < r->conf.arg.n; i++)
		ffs_argv_add(out, r->conf.arg.word[i]);
	for (unsigned i = 0; i < r->n_user_args; i++)
		ffs_argv_add(out, r->user_arg[i]);
	if (!c->dir[0])
		return 0; /* it is only shown */
	ffs_child_socket(c, "qmp", "qmp", path);
	snprintf(c->attach_socket, sizeof(c->attach_socket), "%s/qmp-forkfs", c->dir);
	for (unsigned i = 0; !got && i < p->args.n_disks; i++) {
		_cleanup_close_ int fd = open_disk(r, p->args.disk[i], err);

		got = fd < 0 ? fd : ffs_child_give(c, FFS_CHILD_FIRST_DISK + (int)i, fd, err);
	}
	if (got < 0)
		return got;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return ffs_error_errno(err, errno, "a socket for a monitor");
	got = ffs_child_give(c, FFS_CHILD_CONTROL, pair[1], err);
	close(pair[1]);
	c->control = pair[0];
	return got;
}

static void on_event(void *arg, const char *name, struct json_object *data)
{
	struct talk *t = arg;
	const char *status = ffs_json_string(data, "status");

	if (!strcmp(name, "RESUME"))
		t->resumed = true;
	else if (!strcmp(name, "MIGRATION") && !strcmp(status, "completed"))
		t->loaded = true;
	else if (!strcmp(name, "MIGRATION") && !strcmp(status, "failed"))
		t->failed = true;
}

static bool load_is_over(void *arg)
{
	const struct talk *t = arg;

	return t->loaded || t->failed;
}

static bool has_resumed(void *arg)
{
	return ((const struct talk *)arg)->resumed;
}

static int set_capabilities(struct ffs_qmp *q, bool migration, struct ffs_error *err)
{
	struct json_object *args = json_tokener_parse(
		migration ? "{\"capabilities\":[{\"capability\":\"events\",\"state\":true},"
			    "{\"capability\":\"x-ignore-shared\",\"state\":true}]}"
			  : "{\"capabilities\":[{\"capability\":\"events\",\"state\":true}]}");
	int r = args ? ffs_qmp_call(q, "migrate-set-capabilities", args, -1, NO_DEADLINE, NULL, err)
		     : ffs_error_set(err, ENOMEM, "no memory for a command");

	json_object_put(args);
	return r;
}

static int call_with(struct ffs_qmp *q, const char *name, const char *key, const char *value, int fd,
	struct ffs_error *err)
{
	struct json_object *args = json_object_new_object();
	int r;

	json_object_object_add(args, key, json_object_new_string(value));
	r = ffs_qmp_call(q, name, args, fd, NO_DEADLINE, NULL, err);
	json_object_put(args);
	return r;
}

/* Until the guest is where the branch was taken; the monitor stays claimed by this thread. */
static int load(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	struct talk *t = calloc(1, sizeof(*t));
	struct ffs_qmp_hooks hooks = {.event = on_event, .arg = t};
	_cleanup_close_ int vmstate = ffs_restore_open(r, "vmstate", err);
	int got;

	if (!t)
		return ffs_error_set(err, ENOMEM, "no memory for a monitor");
	c->talk = t;
	if (vmstate < 0)
		return vmstate;
	got = ffs_qmp_open(ffs_steal_fd(&c->control), -1, &hooks, NO_DEADLINE, NULL, &t->q, NULL, err);
	if (got < 0)
		return got;
	ffs_qmp_claim(t->q);
	got = set_capabilities(t->q, ((const struct qemu_plan *)r->plan)->migration, err);
	if (!got)
		got = call_with(t->q, "getfd", "fdname", "forkfs-vmstate", vmstate, err);
	if (!got)
		got = call_with(t->q, "migrate-incoming", "uri", "fd:forkfs-vmstate", -1, err);
	if (!got) {
		got = ffs_qmp_wait(t->q, load_is_over, t, NO_DEADLINE);
		if (got < 0)
			ffs_error_set(err, -got, "the VM ended while it loaded the branch");
	}
	if (!got && t->failed)
		got = ffs_error_set(err, EIO, "QEMU could not load the branch's device state");
	return got;
}

static int run(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	struct talk *t = c->talk;
	int got = ffs_qmp_call(t->q, "cont", NULL, -1, NO_DEADLINE, NULL, err);

	if (!got) {
		got = ffs_qmp_wait(t->q, has_resumed, t, NO_DEADLINE);
		if (got < 0)
			ffs_error_set(err, -got, "the VM ended when it was told to run");
	}
	return got;
}

static void let_go(struct ffs_restore *r, struct ffs_child *c)
{
	struct talk *t = c->talk;

	if (t && t->q) {
		ffs_qmp_release(t->q);
		ffs_qmp_close(t->q);
	}
	free(t);
	c->talk = NULL;
	ffs_close_fd(&c->control);
}

const struct ffs_restore_ops ffs_restore_qemu = {
	.kind = "qemu",
	.plan = plan,
	.command = command,
	.environment = environment,
	.load = load,
	.run = run,
	.let_go = let_go,
	.end = end,
};
