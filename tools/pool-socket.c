/* The name at which a pool is found. Looked at and taken under a lock on the directory, so that of two pools that begin at
 * the same time one is told of the other. What waits is that lock, which is held for a bind(2). */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "pool.h"

#define BACKLOG 128

static int address_of(const char *path, struct sockaddr_un *a, struct ffs_error *err)
{
	*a = (struct sockaddr_un){.sun_family = AF_UNIX};
	if ((size_t)snprintf(a->sun_path, sizeof(a->sun_path), "%s", path) >= sizeof(a->sun_path))
		return ffs_error_set(err, ENAMETOOLONG, "%.100s: a socket's name has at most %zu bytes", path,
			sizeof(a->sun_path) - 1);
	return 0;
}

static int try_connect(const struct sockaddr_un *a, int flags)
{
	_cleanup_close_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);

	if (fd < 0 || connect(fd, (const struct sockaddr *)a, sizeof(*a)) < 0)
		return -errno;
	return ffs_steal_fd(&fd);
}

/* Nobody may be there who listens, and nothing that is no socket. */
static int make_room(const struct sockaddr_un *a, struct ffs_error *err)
{
	struct ucred peer = {0};
	socklen_t len = sizeof(peer);
	struct stat st;
	int fd;

	if (lstat(a->sun_path, &st) < 0)
		return errno == ENOENT ? 0 : ffs_error_errno(err, errno, "%s", a->sun_path);
	if (!S_ISSOCK(st.st_mode))
		return ffs_error_set(
			err, EEXIST, "%s is there, and no socket: name another by --socket", a->sun_path);
	/* EAGAIN: it has more to do than it can take */
	fd = try_connect(a, SOCK_NONBLOCK);
	if (fd >= 0 || fd == -EAGAIN) {
		if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0)
			peer.pid = 0;
		ffs_close_fd(&fd);
		return ffs_error_set(err, EADDRINUSE,
			"%s: process %d listens there already: a pool has a socket of its own", a->sun_path,
			(int)peer.pid);
	}
	if (fd != -ECONNREFUSED)
		return ffs_error_errno(err, -fd, "%s", a->sun_path);
	return unlink(a->sun_path) < 0 && errno != ENOENT ? ffs_error_errno(err, errno, "%s", a->sun_path)
							  : 0;
}

int pool_listen(struct pool_name *n, const char *path, struct ffs_error *err)
{
	_cleanup_close_ int lock = -1, fd = -1;
	struct sockaddr_un a;
	struct stat st;
	int r = address_of(path, &a, err);

	if (r < 0)
		return r;
	lock = ffs_agent_lock(path, err);
	if (lock < 0)
		return lock;
	r = make_room(&a, err);
	if (r < 0)
		return r;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	/* nobody can connect before listen(2), so nobody comes in before the mode is right */
	if (fd < 0 || bind(fd, (const struct sockaddr *)&a, sizeof(a)) < 0)
		return ffs_error_errno(err, errno, "%s", path);
	if (lstat(path, &st) < 0 || chmod(path, 0600) < 0 || listen(fd, BACKLOG) < 0) {
		r = ffs_error_errno(err, errno, "%s", a.sun_path);
		unlink(path);
		return r;
	}
	*n = (struct pool_name){
		.path = path, .dev = st.st_dev, .ino = st.st_ino, .listener = ffs_steal_fd(&fd)};
	return 0;
}

/* It may have been removed, and be another's by now. */
void pool_unlisten(struct pool_name *n)
{
	_cleanup_close_ int lock = n->listener < 0 ? -1 : ffs_agent_lock(n->path, NULL);
	struct stat st;

	if (lock >= 0 && lstat(n->path, &st) == 0 && st.st_dev == n->dev && st.st_ino == n->ino)
		unlink(n->path);
	ffs_close_fd(&n->listener);
}

int pool_dial(const char *path, struct ffs_error *err)
{
	struct sockaddr_un a;
	int r = address_of(path, &a, err);

	if (r < 0)
		return r;
	r = try_connect(&a, 0);
	if (r == -ENOENT || r == -ECONNREFUSED)
		return ffs_error_set(err, -r, "no pool serves at %s", path);
	return r < 0 ? ffs_error_errno(err, -r, "%s", path) : r;
}
