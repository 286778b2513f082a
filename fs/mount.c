/* Owns the mount itself. One thread (before the workers start, after they ended), or another process
 * (ffs_unmount).
 *
 * The mount is looked up in /proc/self/mountinfo (proc(5)), never by touching it: a hung daemon must hang
 * nobody. */
#include "mount.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fuse_lowlevel.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"

#define FSTYPE "fuse.forkfs"
#define READ_AHEAD_KB "1024"

extern char **environ;

/* ---- mountinfo ---- */

struct mounted {
	int id;
	dev_t dev;
	char type[64];
};

/* \040 and the like: space, tab, newline, backslash */
static void unescape(char *s)
{
	char *out = s;

	for (; *s; s++) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3]) {
			*out++ = (char)((s[1] - '0') * 64 + (s[2] - '0') * 8 + (s[3] - '0'));
			s += 3;
		} else {
			*out++ = *s;
		}
	}
	*out = '\0';
}

/* The topmost mount on exactly that directory. */
static bool find_mount(const char *dir, struct mounted *out)
{
	_cleanup_free_ char *text = NULL;
	char *save = NULL;
	bool found = false;

	if (ffs_read_file("/proc/self/mountinfo", 4u << 20, &text, NULL) < 0)
		return false;
	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		_cleanup_free_ char *at = NULL;
		unsigned major, minor;
		int id;
		const char *type = strstr(line, " - ");

		if (!type || sscanf(line, "%d %*d %u:%u %*s %ms", &id, &major, &minor, &at) != 4)
			continue;
		unescape(at);
		if (strcmp(at, dir) != 0)
			continue;
		*out = (struct mounted){.id = id, .dev = makedev(major, minor)};
		if (sscanf(type + 3, "%63s", out->type) != 1)
			out->type[0] = '\0';
		found = true;
	}
	return found;
}

bool ffs_is_mounted(const char *mountpoint)
{
	struct mounted m;

	return find_mount(mountpoint, &m) && strcmp(m.type, FSTYPE) == 0;
}

/* ---- fusermount3 ---- */

static int run_fusermount(const char *dir, bool lazy)
{
	char *argv[] = {(char *)"fusermount3", (char *)"-u", (char *)"-q", lazy ? (char *)"-z" : (char *)"--",
		NULL, NULL, NULL};
	pid_t pid;
	int status, n = lazy ? 4 : 4;

	if (lazy)
		argv[n++] = (char *)"--";
	argv[n] = (char *)dir;
	int r = posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ);

	if (r)
		return -r;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -EBUSY;
}

static int detach(const char *dir, bool lazy)
{
	if (umount2(dir, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) == 0)
		return 0;
	return errno == EPERM ? run_fusermount(dir, lazy) : -errno;
}

int ffs_unmount(const char *mountpoint, bool lazy, struct ffs_error *err)
{
	struct stat st;

	if (!ffs_is_mounted(mountpoint))
		return ffs_error_set(err, EINVAL, "no forkfs is mounted on %s", mountpoint);
	/* nobody can use a dead one: what is open on it fails anyway */
	bool dead = stat(mountpoint, &st) < 0 && (errno == ENOTCONN || errno == ECONNABORTED);
	int r = detach(mountpoint, lazy || dead);

	if (r == -EBUSY)
		return ffs_error_set(err, EBUSY,
			"%s is in use: leave its directories and close its files first", mountpoint);
	return r < 0 ? ffs_error_errno(err, -r, "unmounting %s", mountpoint) : 0;
}

/* ---- mounting ---- */

int ffs_mount_prepare(const char *dir, struct ffs_error *err)
{
	struct mounted m;
	struct stat st;

	if (stat(dir, &st) < 0 && (errno == ENOTCONN || errno == ECONNABORTED)) {
		int r = find_mount(dir, &m) && strncmp(m.type, "fuse", 4) == 0 ? detach(dir, true)
									       : -ENOTCONN;

		if (r < 0)
			return ffs_error_errno(err, -r, "a dead mount on %s cannot be detached", dir);
		ffs_log(FFS_LOG_INFO, "detached a dead mount from %s", dir);
		if (stat(dir, &st) < 0)
			return ffs_error_errno(err, errno, "%s", dir);
	} else if (access(dir, F_OK) < 0) {
		return ffs_error_errno(err, errno, "the mount point %s", dir);
	}
	if (!S_ISDIR(st.st_mode))
		return ffs_error_set(err, ENOTDIR, "the mount point %s is not a directory", dir);
	if (ffs_is_mounted(dir))
		return ffs_error_set(err, EBUSY, "a forkfs is mounted on %s already", dir);
	return 0;
}

static int by_hand(struct ffs_mount *m, const struct ffs_mount_options *opt, struct ffs_error *err)
{
	char options[200];
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

	if (fd < 0)
		return ffs_error_errno(err, errno, "/dev/fuse (is the module fuse loaded?)");
	snprintf(options, sizeof(options),
		"fd=%d,rootmode=40000,user_id=%u,group_id=%u,max_read=%u,default_permissions%s", fd,
		(unsigned)getuid(), (unsigned)getgid(), opt->max_read,
		opt->allow_other ? ",allow_other" : "");
	if (mount("forkfs", m->dir, FSTYPE, MS_NOSUID | MS_NODEV | MS_NOEXEC, options) < 0) {
		int code = errno;

		close(fd);
		return ffs_error_errno(err, code, "mounting on %s", m->dir);
	}
	m->device = fd;
	m->by_hand = true;
	return 0;
}

int ffs_mount_session(struct ffs_mount *m, const struct ffs_mount_options *opt, struct fuse_session *se,
	struct ffs_error *err)
{
	struct ffs_error why = {0};
	struct mounted at;
	int r = by_hand(m, opt, &why);

	if (r == -EPERM || r == -EACCES) {
		/* libfuse says on stderr what fusermount3 has against it */
		if (fuse_session_mount(se, m->dir) != 0)
			return ffs_error_set(err, EPERM,
				"mounting on %s: not permitted, neither by mount(2) nor by fusermount3 "
				"(package fuse3%s)",
				m->dir,
				opt->allow_other ? "; allow_other needs user_allow_other in /etc/fuse.conf"
						 : "");
		m->device = fuse_session_fd(se);
		r = 0;
	}
	if (r < 0) {
		if (err)
			*err = why;
		return r;
	}
	if (find_mount(m->dir, &at)) {
		m->id = at.id;
		m->dev = at.dev;
	}
	return 0;
}

void ffs_mount_end(struct ffs_mount *m, struct fuse_session *se)
{
	struct mounted at;
	bool there = find_mount(m->dir, &at) && at.id == m->id && m->id;

	if (!m->by_hand)
		fuse_session_unmount(se);
	else if (there && umount2(m->dir, MNT_FORCE | MNT_DETACH | UMOUNT_NOFOLLOW) < 0)
		ffs_log(FFS_LOG_WARN, "unmounting %s: %s", m->dir, strerror(errno));
}

void ffs_mount_read_ahead(const struct ffs_mount *m)
{
	char path[80];

	snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb", major(m->dev), minor(m->dev));
	_cleanup_close_ int fd = m->id ? open(path, O_WRONLY | O_CLOEXEC) : -1;

	if (fd < 0 || write(fd, READ_AHEAD_KB, sizeof(READ_AHEAD_KB) - 1) < 0)
		ffs_log(FFS_LOG_DEBUG, "read-ahead stays at its default: %s", strerror(errno));
}
