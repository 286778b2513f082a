/* forkfs mount, umount, and the mount(8) helper mount.fuse.forkfs.
 *
 * One thread: ffs_daemon_run() forks the daemon, which has to happen before any thread exists. */
#include "cli.h"

#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "fs/fs.h"
#include "mountpoint.h"
#include "options.h"
#include "tree.h"

/* How long a daemon may take to let go of its VMs after its mount is gone. */
#define FFS_DAEMON_END_NS (30 * FFS_NS_PER_S)

static int do_mount(const char *dir, bool foreground, const char *options, struct ffs_error *err)
{
	_cleanup_free_ char *real = NULL;
	struct ffs_mount_options opt;
	bool dead;
	int r = ffs_mountpoint_resolve(dir, &real, err);

	ffs_mount_options_init(&opt);
	if (!r && options)
		r = ffs_mount_options_parse(&opt, options, err);
	if (!r)
		r = ffs_mountpoint_check(real, &dead, err);
	/* one dead mount may lie on another */
	while (!r && dead) {
		r = ffs_unmount(real, true, err);
		if (!r)
			r = ffs_mountpoint_check(real, &dead, err);
	}
	if (r < 0)
		return r;
	opt.mountpoint = real;
	opt.foreground = foreground;
	return ffs_daemon_run(&opt, err);
}

int ffs_cmd_mount(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_free_ char *options = NULL;
	bool foreground = false, help = false;
	const struct ffs_opt opts[] = {
		{"foreground", 'f', FFS_OPT_FLAG, &foreground},
		{"options", 'o', FFS_OPT_LIST, &options},
		{"help", 'h', FFS_OPT_FLAG, &help},
		{0},
	};
	struct ffs_mount_options checked;
	struct ffs_error err = {0};
	int n;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (help)
		return ffs_usage_help(self);
	if (n == 0 && ffs_global_mount) {
		argv[0] = (char *)ffs_global_mount;
		n = 1;
	}
	if (n != 1)
		return ffs_usage_error(self, "%s", n ? "one directory at a time" : "which directory?");
	/* an option that does not exist is wrong usage, whatever the directory is */
	ffs_mount_options_init(&checked);
	if (options && ffs_mount_options_parse(&checked, options, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	return do_mount(argv[0], foreground, options, &err) < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}

/* ---- umount ---- */

/* A descriptor that becomes readable when the daemon of the mount ends; -1 when the mount does not tell (a
 * dead or foreign one). */
static int daemon_pidfd(const char *dir, int *pid)
{
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct json_object *capabilities = NULL;
	uint64_t v;

	if (ffs_tree_open_dir(&t, dir, NULL) < 0 ||
		ffs_tree_json(&t, ".forkfs/capabilities", &capabilities, NULL) < 0)
		return -1;
	v = ffs_json_u64(capabilities, "pid");
	json_object_put(capabilities);
	if (!v || v > INT32_MAX)
		return -1;
	*pid = (int)v;
	return (int)syscall(SYS_pidfd_open, *pid, 0);
}

/* Let go of every VM, as the end of the daemon would: it has the files open that VMs started from its branches have
 * mapped. What cannot be detached (it is detached already) is no matter: the unmounting tells. */
static void detach_all(const char *dir)
{
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	char **names = NULL;
	size_t n = 0;

	if (ffs_tree_open_dir(&t, dir, NULL) < 0 || ffs_tree_names(&t, ".", &names, &n, NULL) < 0)
		return;
	for (size_t i = 0; i < n; i++)
		ffs_detach(&t, names[i], NULL);
	ffs_tree_names_free(names, n);
}

/* While nobody can be named who uses it: a process that ends, and who looks at others, holds it for a moment longer. */
static int unmount_unless_used(
	const char *dir, int daemon, char *users, size_t size, bool *by_daemon, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + FFS_HELD_NS;
	int r;

	do {
		r = ffs_unmount(dir, false, err);
		if (r != -EBUSY)
			return r;
		*by_daemon = ffs_mountpoint_users(dir, daemon, users, size);
	} while (!users[0] && !*by_daemon && !ffs_interrupted() && ffs_held_again(deadline));
	return r;
}

static int try_unmount(const char *dir, int daemon, struct ffs_error *err)
{
	char users[300];
	bool by_daemon;
	int r = unmount_unless_used(dir, daemon, users, sizeof(users), &by_daemon, err);

	if (r != -EBUSY)
		return r;
	if (!users[0] && by_daemon) {
		detach_all(dir);
		r = unmount_unless_used(dir, daemon, users, sizeof(users), &by_daemon, err);
		if (r != -EBUSY)
			return r;
	}
	return ffs_error_set(err, EBUSY, "%s is in use%s%s: let them end or leave it, then try again", dir,
		users[0] ? " by " : " by processes that you may not see", users);
}

/* Until the daemon has ended: its VMs are let go by then. */
static int await_end(int fd, int pid, const char *dir, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + FFS_DAEMON_END_NS;

	for (;;) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		int r = poll(&p, 1, ffs_ms_until(deadline));

		if (r > 0)
			return 0;
		if (r < 0 && errno == EINTR && !ffs_interrupted())
			continue;
		if (r < 0)
			return ffs_error_errno(err, errno, "waiting for the daemon (pid %d)", pid);
		return ffs_error_set(err, ETIMEDOUT,
			"%s is unmounted, but its daemon (pid %d) has not ended after %llu s: somebody still "
			"maps a file of it, or "
			"it hangs (its log is in syslog)",
			dir, pid, (unsigned long long)(FFS_DAEMON_END_NS / FFS_NS_PER_S));
	}
}

int ffs_cmd_umount(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_free_ char *real = NULL;
	_cleanup_close_ int fd = -1;
	char type[80];
	bool help = false;
	const struct ffs_opt opts[] = {
		{"help", 'h', FFS_OPT_FLAG, &help},
		{0},
	};
	struct ffs_error err = {0};
	int n, pid = 0, r;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (help)
		return ffs_usage_help(self);
	if (n == 0 && ffs_global_mount) {
		argv[0] = (char *)ffs_global_mount;
		n = 1;
	}
	if (n != 1)
		return ffs_usage_error(self, "%s", n ? "one directory at a time" : "which directory?");

	ffs_interrupt_install();
	r = ffs_mountpoint_resolve(argv[0], &real, &err);
	if (r < 0)
		return ffs_failure(self, &err);
	if (ffs_mountpoint_type(real, type, sizeof(type)) < 0 || strcmp(type, "fuse.forkfs")) {
		ffs_error_set(&err, EINVAL, "no forkfs is mounted on %s", real);
		return ffs_failure(self, &err);
	}
	fd = daemon_pidfd(real, &pid);
	r = try_unmount(real, pid, &err);
	if (!r && fd >= 0)
		r = await_end(fd, pid, real, &err);
	return r < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}

/* ---- mount.fuse.forkfs ---- */

/* mount(8): exit codes of a helper */
enum { FFS_MOUNT_OK = 0, FFS_MOUNT_USAGE = 1, FFS_MOUNT_FAIL = 32 };

/* mount.fuse.forkfs SOURCE DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS], as mount(8) calls it ("External
 * helpers"). */
int ffs_mount_helper(int argc, char **argv)
{
	bool sloppy = false, fake = false, no_mtab = false, verbose = false, help = false;
	_cleanup_free_ char *options = NULL;
	const char *type = NULL, *space = NULL;
	const struct ffs_opt opts[] = {
		{NULL, 's', FFS_OPT_FLAG, &sloppy},
		{NULL, 'f', FFS_OPT_FLAG, &fake},
		{NULL, 'n', FFS_OPT_FLAG, &no_mtab},
		{NULL, 'v', FFS_OPT_FLAG, &verbose},
		{NULL, 'N', FFS_OPT_VALUE, &space},
		{NULL, 't', FFS_OPT_VALUE, &type},
		{NULL, 'o', FFS_OPT_LIST, &options},
		{"help", 'h', FFS_OPT_FLAG, &help},
		{0},
	};
	struct ffs_mount_options checked;
	struct ffs_error err = {0};
	int n;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0 || help || n != 2) {
		fprintf(help ? stdout : stderr,
			"%s%susage: mount.fuse.forkfs none DIR [-sfnv] [-o OPTION[=VALUE],…]\n", err.text,
			err.code ? "\n" : "");
		return help ? FFS_MOUNT_OK : FFS_MOUNT_USAGE;
	}
	if (space) {
		fputs("mount.fuse.forkfs: -N is not supported: enter the namespace first (nsenter)\n",
			stderr);
		return FFS_MOUNT_USAGE;
	}
	ffs_mount_options_init(&checked);
	if (options && ffs_mount_options_parse(&checked, options, &err) < 0) {
		fprintf(stderr, "mount.fuse.forkfs: %s\n", err.text);
		/* -s: "tolerate sloppy mount options rather than failing"; what cannot be understood is then
		 * left out whole */
		if (!sloppy)
			return FFS_MOUNT_USAGE;
		free(options);
		options = NULL;
	}
	if (fake)
		return FFS_MOUNT_OK;
	if (do_mount(argv[1], false, options, &err) < 0) {
		fprintf(stderr, "mount.fuse.forkfs: %s\n", err.text);
		return FFS_MOUNT_FAIL;
	}
	if (verbose)
		printf("mount.fuse.forkfs: mounted on %s\n", argv[1]);
	return FFS_MOUNT_OK;
}
