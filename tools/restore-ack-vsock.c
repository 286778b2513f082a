/* Acknowledgements that a child's guest sends by vsock. A VMM with Firecracker's convention connects, when its guest connects
 * to port P of the host (CID 2), to the unix socket PATH_P beside the PATH of its vsock: that is what is listened at here,
 * in the child's own directory or in its jail, from before it runs until its hooks are closed.
 *
 * A connection brings one text, a line (two in one piece count as two), and is closed then: that is how the guest sees that it
 * was heard. Nothing that comes is trusted, nor is the jail, which is the VMM's to write: what is made there goes by a
 * descriptor of that directory and follows no link. Who connects and says nothing keeps a place until others need it.
 *
 * Threads: the child's. No locks. Nothing here waits. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "restore-ack-vsock.h"

#define NAME_FORMAT FFS_CHILD_VSOCK "_%u"
#define AT_ONCE 32  /* connections of one look: a flood of them does not keep us from the rest */
#define PIECE 4096u /* bytes of one look at a connection */

/* The VM's user may connect; by a descriptor of what was bound, whatever has that name now. */
static int lend(int dir, const char *name, const struct ffs_child *c, struct ffs_error *err)
{
	_cleanup_close_ int fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		return ffs_error_errno(err, errno, "%s/%s", c->jail, name);
	if (!S_ISSOCK(st.st_mode) || st.st_uid != geteuid())
		return ffs_error_set(
			err, EPERM, "%s/%s is not the socket that was made there", c->jail, name);
	if (fchownat(fd, "", c->uid, c->gid, AT_EMPTY_PATH) < 0)
		return ffs_error_errno(err, errno, "%s/%s", c->jail, name);
	return 0;
}

void ffs_ack_vsock_init(struct ffs_ack_vsock *v)
{
	v->sock = v->dir = -1;
	v->n = 0;
}

int ffs_ack_vsock_listen(struct ffs_ack_vsock *v, const struct ffs_child *c, struct ffs_error *err)
{
	const char *where = c->jail[0] ? c->jail : c->dir;
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	char name[40];
	int got = 0;

	snprintf(name, sizeof(name), NAME_FORMAT, FFS_ACK_VSOCK_PORT);
	v->dir = open(where, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	v->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	snprintf(a.sun_path, sizeof(a.sun_path), "/proc/self/fd/%d/%s", v->dir, name);
	if (v->dir < 0 || v->sock < 0 || bind(v->sock, (struct sockaddr *)&a, sizeof(a)) < 0)
		got = ffs_error_errno(err, errno, "%s/%s, where acknowledgements come by vsock", where, name);
	if (got < 0) {
		/* what has that name is another's */
		ffs_close_fd(&v->dir);
		ffs_close_fd(&v->sock);
		return got;
	}
	if (c->jail[0])
		got = lend(v->dir, name, c, err);
	if (!got && listen(v->sock, FFS_ACK_VSOCK_PEERS) < 0)
		got = ffs_error_errno(err, errno, "%s/%s", where, name);
	return got;
}

/* Whoever was first goes. */
static void drop(struct ffs_ack_vsock *v, struct ffs_ack_wait *w, unsigned i)
{
	ffs_ack_feed_end(w, &v->peer[i].stream);
	ffs_close_fd(&v->peer[i].fd);
	v->n--;
	memmove(&v->peer[i], &v->peer[i + 1], (v->n - i) * sizeof(v->peer[0]));
}

/* false: it has said what it had to, or is gone. */
static bool hear(struct ffs_ack_peer *p, struct ffs_ack_wait *w, uint64_t now_ns)
{
	char bytes[PIECE];
	ssize_t n = recv(p->fd, bytes, sizeof(bytes), 0);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	return n && !ffs_ack_feed(w, &p->stream, bytes, (size_t)n, now_ns) &&
	       p->stream.len <= FFS_ACK_TEXT_MAX;
}

void ffs_ack_vsock_receive(struct ffs_ack_vsock *v, struct ffs_ack_wait *w, uint64_t now_ns)
{
	if (v->sock < 0)
		return;
	for (unsigned i = 0; i < AT_ONCE; i++) {
		int fd = accept4(v->sock, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd < 0)
			break;
		if (v->n == FFS_ACK_VSOCK_PEERS)
			drop(v, w, 0);
		v->peer[v->n] = (struct ffs_ack_peer){.fd = fd};
		/* most have said it already; a place is for those who have not */
		if (!hear(&v->peer[v->n++], w, now_ns))
			drop(v, w, v->n - 1);
	}
	for (unsigned i = v->n; i-- > 0;)
		if (!hear(&v->peer[i], w, now_ns))
			drop(v, w, i);
}

unsigned ffs_ack_vsock_poll(const struct ffs_ack_vsock *v, struct pollfd p[FFS_ACK_VSOCK_PEERS + 1])
{
	if (v->sock < 0)
		return 0;
	p[0] = (struct pollfd){.fd = v->sock, .events = POLLIN};
	for (unsigned i = 0; i < v->n; i++)
		p[1 + i] = (struct pollfd){.fd = v->peer[i].fd, .events = POLLIN};
	return 1 + v->n;
}

void ffs_ack_vsock_close(struct ffs_ack_vsock *v)
{
	char name[40];

	while (v->n)
		ffs_close_fd(&v->peer[--v->n].fd);
	ffs_close_fd(&v->sock);
	snprintf(name, sizeof(name), NAME_FORMAT, FFS_ACK_VSOCK_PORT);
	if (v->dir >= 0 && unlinkat(v->dir, name, 0) < 0 && errno != ENOENT)
		fprintf(stderr, "forkfs restore: %s is left behind: %s\n", name, strerror(errno));
	ffs_close_fd(&v->dir);
}
