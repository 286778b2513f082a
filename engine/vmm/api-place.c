/* Owns struct ffs_api_place: a directory that a VMM and we both reach, though it may be in a jail.
 *
 * Any thread, the watchdog's processes too: no locks, no allocation. The directory may belong to the VMM,
 * which is not trusted: it is resolved inside the VMM's root (openat2(2)), and every name in it is looked at
 * without following links. */
#include "vmm/api.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "vmm/dial.h"

static int open_inside(int root, const char *path, bool absolute)
{
	struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC,
		.resolve = RESOLVE_NO_MAGICLINKS | (absolute ? RESOLVE_IN_ROOT : RESOLVE_BENEATH)};
	int fd = (int)syscall(SYS_openat2, root, *path ? path : ".", &how, sizeof(how));

	return fd < 0 ? -errno : fd;
}

static int find_directory(const char *name, pid_t pid, struct ffs_api_place *out, struct ffs_error *err)
{
	const char *slash = strrchr(name, '/'), *base = slash ? slash + 1 : name;
	char proc[64];
	size_t n = slash ? (size_t)(slash - name) + 1 : 0;

	if (!*base || strlen(base) >= sizeof(out->base) || n >= sizeof(out->seen))
		return ffs_error_set(
			err, ENAMETOOLONG, "the name of the VMM's API socket, %.108s, is too long", name);
	snprintf(out->base, sizeof(out->base), "%s", base);
	snprintf(out->seen, sizeof(out->seen), "%.*s", (int)n, name);
	snprintf(proc, sizeof(proc), "/proc/%d/%s", (int)pid, name[0] == '/' ? "root" : "cwd");
	_cleanup_close_ int root = open(proc, O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (root < 0)
		return ffs_error_errno(err, errno == ENOENT ? ESRCH : errno, "open %s", proc);
	out->dir = open_inside(root, out->seen, name[0] == '/');
	if (out->dir < 0)
		return ffs_error_errno(err, -out->dir,
			"open the directory of the API socket %.108s as process %d sees it (start the VMM "
			"with "
			"an absolute name)",
			name, (int)pid);
	return 0;
}

/* Who its files belong to; /proc/PID itself is root's where the process is not dumpable. */
static int find_owner(pid_t pid, struct ffs_api_place *out)
{
	char path[64];
	_cleanup_free_ char *text = NULL;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
	int r = ffs_read_file(path, 65536, &text, NULL);

	if (r < 0)
		return r == -ENOENT ? -ESRCH : r;
	const char *u = strstr(text, "\nUid:"), *g = strstr(text, "\nGid:");

	return u && g && sscanf(u, "\nUid: %*u %*u %*u %u", &out->uid) == 1 &&
			       sscanf(g, "\nGid: %*u %*u %*u %u", &out->gid) == 1
		       ? 0
		       : -EPROTO;
}

int ffs_api_place_open(int sock, pid_t pid, struct ffs_api_place *out, struct ffs_error *err)
{
	struct sockaddr_un addr = {0};
	socklen_t len = sizeof(addr) - 1;
	int r = FFS_FAULT("api-place");

	out->dir = -1;
	if (r)
		return ffs_error_set(err, -r, "fault point api-place");
	if (getpeername(sock, (struct sockaddr *)&addr, &len) < 0)
		return ffs_error_errno(err, errno, "the name of the VMM's API socket");
	if (len <= offsetof(struct sockaddr_un, sun_path) || !addr.sun_path[0])
		return ffs_error_set(err, ENOTSUP, "the VMM's API socket has no name in a file system");
	r = find_owner(pid, out);
	if (r < 0)
		return ffs_error_errno(err, -r, "find out as whom process %d runs", (int)pid);
	return find_directory(addr.sun_path, pid, out, err);
}

void ffs_api_place_close(struct ffs_api_place *p)
{
	ffs_close_fd(&p->dir);
}

void ffs_api_place_name(const struct ffs_api_place *p, const char *what, char name[96])
{
	snprintf(name, 96, "%s.forkfs-%.16s", p->base, what);
}

void ffs_api_place_seen(const struct ffs_api_place *p, const char *what, char path[256])
{
	snprintf(path, 256, "%s%s.forkfs-%.16s", p->seen, p->base, what);
}

int ffs_api_place_dial(const struct ffs_api_place *p, uint64_t deadline_ns, int *sock)
{
	char path[128];

	snprintf(path, sizeof(path), "/proc/self/fd/%d/%s", p->dir, p->base);
	return ffs_dial_path(path, deadline_ns, sock);
}

static int say(const struct ffs_api_place *p, const char *name, int code, struct ffs_error *err)
{
	return ffs_error_errno(err, code, "make %s in the directory of the VMM's API socket (%s)", name,
		p->seen[0] ? p->seen : "its working directory");
}

int ffs_api_place_open_fifo(const struct ffs_api_place *p, const char *what)
{
	char name[96];
	struct stat st;

	ffs_api_place_name(p, what, name);
	if (fstatat(p->dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return -errno;
	if (!S_ISFIFO(st.st_mode))
		return -EINVAL;
	_cleanup_close_ int fd = openat(p->dir, name, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	return fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode) ? ffs_steal_fd(&fd) : -EINVAL;
}

int ffs_api_place_fifo(const struct ffs_api_place *p, const char *what, int *fd, struct ffs_error *err)
{
	char name[96];

	ffs_api_place_name(p, what, name);
	ffs_api_place_remove(p, what);
	if (mkfifoat(p->dir, name, 0600) < 0 ||
		fchownat(p->dir, name, p->uid, p->gid, AT_SYMLINK_NOFOLLOW) < 0)
		return say(p, name, errno, err);
	int f = ffs_api_place_open_fifo(p, what);

	if (f < 0) {
		ffs_api_place_remove(p, what);
		return say(p, name, -f, err);
	}
	/* as much as an unprivileged pipe may hold: a VMM need not wait for us */
	if (fcntl(f, F_SETPIPE_SZ, 1 << 20) < 0)
		errno = 0; /* smaller, and emptied while the VMM writes */
	*fd = f;
	return 0;
}

int ffs_api_place_file(const struct ffs_api_place *p, const char *what, struct ffs_error *err)
{
	char name[96];

	ffs_api_place_name(p, what, name);
	ffs_api_place_remove(p, what);
	_cleanup_close_ int fd =
		openat(p->dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);

	if (fd < 0 || fchown(fd, p->uid, p->gid) < 0)
		return say(p, name, errno, err);
	return 0;
}

int ffs_api_place_open_file(const struct ffs_api_place *p, const char *what, int *out, struct ffs_error *err)
{
	char name[96];
	struct stat st;

	ffs_api_place_name(p, what, name);
	/* not to block where the VMM has put something else */
	_cleanup_close_ int fd = openat(p->dir, name, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);

	if (fd < 0)
		return ffs_error_errno(err, errno, "open what the VMM was told to write, %s", name);
	if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
		return ffs_error_set(err, EPROTO, "what the VMM was told to write, %s, is no file", name);
	*out = ffs_steal_fd(&fd);
	return 0;
}

int ffs_api_place_listen(const struct ffs_api_place *p, const char *what, int *out, struct ffs_error *err)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	char name[96];

	ffs_api_place_name(p, what, name);
	ffs_api_place_remove(p, what);
	_cleanup_close_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int n = snprintf(addr.sun_path, sizeof(addr.sun_path), "/proc/self/fd/%d/%s", p->dir, name);

	if (n >= (int)sizeof(addr.sun_path))
		return say(p, name, ENAMETOOLONG, err);
	/* the mode before the name, which anybody who may write the directory can exchange */
	if (fd < 0 || fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0)
		return say(p, name, errno, err);
	if (fchownat(p->dir, name, p->uid, p->gid, AT_SYMLINK_NOFOLLOW) < 0 || listen(fd, 1) < 0) {
		int code = errno;

		ffs_api_place_remove(p, what);
		return say(p, name, code, err);
	}
	*out = ffs_steal_fd(&fd);
	return 0;
}

void ffs_api_place_remove(const struct ffs_api_place *p, const char *what)
{
	char name[96];

	ffs_api_place_name(p, what, name);
	if (p->dir >= 0 && unlinkat(p->dir, name, 0) < 0)
		errno = 0; /* not there, or not ours to remove: making it says so */
}
