/* Jails of Firecracker's children from the start of their jailer: who runs there, what is mounted there, and their end.
 *
 * All of it is of the child's thread; a thread of its own goes to the jail, where the names of what is mounted are looked up,
 * and ends. No locks. What waits: for a jailer that makes a pid namespace, and for the end of who was killed. */
#include "restore-jail.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <mntent.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/tmpfs.h"
#include "base/util.h"

#define LEAVE_NS (2 * FFS_NS_PER_S)

/* ---- its process ---- */

static bool is_in_jail(pid_t pid, const struct stat *root)
{
	char path[64];
	struct stat st;

	snprintf(path, sizeof(path), "/proc/%d/root", (int)pid);
	return stat(path, &st) == 0 && st.st_dev == root->st_dev && st.st_ino == root->st_ino;
}

int ffs_jail_started(const struct ffs_jails *j, struct ffs_child *c, struct ffs_error *err)
{
	_cleanup_free_ char *path = NULL;
	_cleanup_free_ char *text = NULL;
	_cleanup_close_ int pidfd = -1;
	struct stat root;
	pid_t pid;
	int status = 0, got;

	if (!j->pid_ns)
		return 0;
	while (!ffs_child_ended(c))
		ffs_child_poll(c, -1, -1);
	if (asprintf(&path, "%s/%s.pid", c->jail, j->name) < 0) {
		path = NULL;
		return ffs_error_set(err, ENOMEM, "no memory for a path");
	}
	got = ffs_read_file(path, 64, &text, NULL);
	pid = got < 0 ? 0 : (pid_t)atoi(text);
	pidfd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
	/* the jailer failed, and says why on stderr; or what it started has ended */
	if (pidfd < 0 || stat(c->jail, &root) < 0 || !is_in_jail(pid, &root))
		return ffs_error_set(err, ECONNRESET, "the jailer has not started the VM");
	if (waitpid(c->pid, &status, 0) < 0)
		return ffs_error_errno(err, errno, "the end of the jailer");
	c->pid = pid;
	/* in one step: a signal may just now end whom it names */
	return dup3(pidfd, c->pidfd, O_CLOEXEC) < 0
		       ? ffs_error_errno(err, errno, "a descriptor of process %d", (int)pid)
		       : 0;
}

/* ---- what is mounted there ---- */

/* A thread that goes to other mount namespaces, and does not come back. `work` returns 0 or -errno with a sentence. */
struct visit {
	int (*work)(struct visit *v, struct ffs_error *err);
	struct ffs_error err;
	int code;
	/* what the works are about */
	const struct ffs_jail_bind *bind;
	unsigned n;
	int jail;
	const char *at;
	mode_t mode;
	int fd, ns;
};

static void *go(void *arg)
{
	struct visit *v = arg;

	v->code = unshare(CLONE_FS) < 0
			  ? ffs_error_errno(&v->err, errno, "a thread with a root directory of its own")
			  : v->work(v, &v->err);
	return NULL;
}

static int travel(struct visit *v, struct ffs_error *err)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, go, v) != 0 || pthread_join(thread, NULL) != 0)
		return ffs_error_set(err, EAGAIN, "no thread can be started");
	if (v->code < 0 && err)
		*err = v->err;
	return v->code;
}

static int show(const struct ffs_jail_bind *b, int jail, struct ffs_error *err)
{
	struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC};
	_cleanup_close_ int tree = -1;
	char inside[1100];

	if (b->ns >= 0 && setns(b->ns, CLONE_NEWNS) < 0)
		return ffs_error_errno(err, errno, "the namespace of %.200s", b->file);
	tree = open_tree(b->fd >= 0 ? b->fd : AT_FDCWD, b->fd >= 0 ? "" : b->file,
		OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (b->fd >= 0 ? AT_EMPTY_PATH : 0));
	if (tree < 0)
		return ffs_error_errno(err, errno, "%.200s cannot be shown in a jail", b->file);
	if (b->read_only && mount_setattr(tree, "", AT_EMPTY_PATH, &attr, sizeof(attr)) < 0)
		return ffs_error_errno(err, errno, "%.200s cannot be made read-only in a jail", b->file);
	/* from here on names are those of the jail */
	snprintf(inside, sizeof(inside), "/%s", b->inside + (b->inside[0] == '/'));
	if (setns(jail, CLONE_NEWNS) < 0 ||
		move_mount(tree, "", AT_FDCWD, inside, MOVE_MOUNT_F_EMPTY_PATH) < 0)
		return ffs_error_errno(
			err, errno, "%.200s cannot be mounted at %.200s in a jail", b->file, inside);
	return 0;
}

static int show_one(struct visit *v, struct ffs_error *err)
{
	return show(v->bind, v->jail, err);
}

int ffs_jail_bind(
	const struct ffs_child *c, const struct ffs_jail_bind *bind, unsigned n, struct ffs_error *err)
{
	_cleanup_close_ int jail = -1;
	char path[64];
	int got = 0;

	snprintf(path, sizeof(path), "/proc/%d/ns/mnt", (int)c->pid);
	jail = open(path, O_RDONLY | O_CLOEXEC);
	if (jail < 0)
		return ffs_error_errno(err, errno, "%s", path);
	for (unsigned i = 0; !got && i < n; i++) {
		struct visit v = {.work = show_one, .bind = &bind[i], .jail = jail};

		got = travel(&v, err);
	}
	return got;
}

/* ---- a file that can be mounted ---- */

static int make_shared(struct visit *v, struct ffs_error *err)
{
	_cleanup_close_ int tree = -1;
	_cleanup_close_ int fd = -1;

	/* what is mounted here is seen nowhere else; what is unmounted elsewhere is here too */
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
		return ffs_error_errno(err, errno, "a mount namespace of one's own");
	tree = ffs_tmpfs_mount(NULL);
	if (tree < 0)
		return ffs_error_errno(err, -tree, "a tmpfs of one's own");
	if (move_mount(tree, "", AT_FDCWD, v->at, MOVE_MOUNT_F_EMPTY_PATH) < 0)
		return ffs_error_errno(
			err, errno, "a tmpfs cannot be mounted at %.200s, in a namespace of its own", v->at);
	fd = openat(tree, FFS_JAIL_MEMORY, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0 || fchmod(fd, v->mode) < 0)
		return ffs_error_errno(err, errno, "a file in a tmpfs");
	v->ns = open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC);
	if (v->ns < 0)
		return ffs_error_errno(err, errno, "/proc/thread-self/ns/mnt");
	v->fd = ffs_steal_fd(&fd);
	return 0;
}

int ffs_jail_shared_file(const char *at, mode_t mode, int *fd, int *ns, struct ffs_error *err)
{
	struct visit v = {.work = make_shared, .at = at, .mode = mode, .fd = -1, .ns = -1};
	int got = travel(&v, err);

	*fd = v.fd;
	*ns = v.ns;
	return got;
}

/* ---- its end ---- */

/* Whom a jailer left behind that was killed before it could say whom it has started. */
static void end_all(const struct stat *root)
{
	DIR *proc = opendir("/proc");
	struct dirent *d;

	while (proc && (d = readdir(proc))) {
		pid_t pid = (pid_t)atoi(d->d_name);
		_cleanup_close_ int pidfd =
			pid > 0 && is_in_jail(pid, root) ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
		const struct ffs_child in_jail = {.pid = pid, .pidfd = pidfd};

		/* looked at again: the number may have become another's before it had a descriptor */
		if (pidfd < 0 || !is_in_jail(pid, root))
			continue;
		ffs_child_kill(&in_jail);
		ffs_child_poll(&in_jail, -1, -1);
		if (waitpid(pid, NULL, WNOHANG) < 0)
			continue; /* it is another's to reap */
	}
	if (proc)
		closedir(proc);
}

/* A process that has ended is in its group for a moment longer, and of the end of that nobody is told. */
static int remove_cgroup(const char *path)
{
	uint64_t deadline = ffs_now_ns() + LEAVE_NS;

	while (rmdir(path) < 0) {
		if (errno != EBUSY || ffs_now_ns() >= deadline)
			return -errno;
		poll(NULL, 0, 1);
	}
	return 0;
}

/* In each hierarchy there is; never anything but an empty group with the jail's name. */
static void remove_cgroups(const char *name)
{
	FILE *f = setmntent("/proc/self/mounts", "re");
	struct mntent *m;

	while (f && (m = getmntent(f))) {
		_cleanup_free_ char *path = NULL;

		if (strncmp(m->mnt_type, "cgroup", 6))
			continue;
		if (asprintf(&path, "%s/%s", m->mnt_dir, name) < 0) {
			path = NULL;
			continue;
		}
		int got = remove_cgroup(path);

		if (got < 0 && got != -ENOENT)
			fprintf(stderr, "forkfs restore: %s is left behind: %s\n", path, strerror(-got));
	}
	if (f)
		endmntent(f);
}

void ffs_jail_remove(struct ffs_child *c)
{
	struct stat root;

	if (!c->jail[0])
		return;
	if (stat(c->jail, &root) == 0)
		end_all(&root);
	*strrchr(c->jail, '/') = 0;
	if (ffs_remove_tree(c->jail) != 0)
		fprintf(stderr, "forkfs restore: %s is left behind: %s\n", c->jail, strerror(errno));
	if (c->cgroup[0])
		remove_cgroups(c->cgroup);
	c->jail[0] = c->cgroup[0] = 0;
}
