/* Owns nothing: connect(2) to unix sockets, for every driver. Waits with the caller's deadline. */
#include "vmm/dial.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

int ffs_dial_addr(const struct sockaddr_un *addr, socklen_t len, uint64_t deadline_ns, int *sock)
{
	_cleanup_close_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -errno;
	while (connect(fd, (const struct sockaddr *)addr, len) < 0) {
		/* EAGAIN: the listener's queue is full, and nothing tells when it no longer is */
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
		if (ffs_now_ns() >= deadline_ns)
			return -EAGAIN;
		if (poll(NULL, 0, 10) < 0 && errno != EINTR)
			return -errno;
	}
	*sock = ffs_steal_fd(&fd);
	return 0;
}

/* Through the directory's descriptor where the name is too long. */
int ffs_dial_path(const char *path, uint64_t deadline_ns, int *sock)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	char dir[PATH_MAX];
	const char *base = strrchr(path, '/');

	if (strlen(path) < sizeof(addr.sun_path)) {
		snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path);
		return ffs_dial_addr(&addr, sizeof(addr), deadline_ns, sock);
	}
	if (!base || strlen(base) > 60 || (size_t)(base - path) >= sizeof(dir))
		return -ENAMETOOLONG;
	snprintf(dir, sizeof(dir), "%.*s", (int)(base - path) + 1, path);
	_cleanup_close_ int fd = open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	snprintf(addr.sun_path, sizeof(addr.sun_path), "/proc/self/fd/%d/%.64s", fd, base + 1);
	return ffs_dial_addr(&addr, sizeof(addr), deadline_ns, sock);
}
