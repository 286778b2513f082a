/* The guard of a pool: a process that knows which children nobody has yet. It does nothing until the pool is gone (its
 * connection ends, however the pool did); then it ends them, and removes their directories and the pool's socket. A child
 * that has been taken is forgotten, and lives on.
 *
 * A child is told of before its process is there, by its directory, and again with a descriptor of the process. For those
 * that were being started the directory is removed first, and then all processes are looked at: whoever had it as its working
 * directory by then is ended, and whoever comes later cannot get in (it changes there before it runs the VMM).
 *
 * The first half runs in the pool's main thread, and never waits: a guard that does not listen is replaced. The second is
 * the guard's own process, one thread. No locks. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"
#include "pool.h"
#include "spawn-self.h"

#define FD 3         /* of the connection, in the guard */
#define END_MS 10000 /* for the end of a process that was killed */

enum kind { CHILD, SOCKET, FORGET };

struct message {
	enum kind kind;
	uint64_t dev, ino; /* SOCKET */
	char path[112];
};

/* ---- the pool's side ---- */

int pool_guard_start(struct pool_guard *g, struct ffs_error *err)
{
	char name[] = "forkfs-pool-guard";
	char *argv[] = {name, NULL};
	int pair[2], r;

	*g = (struct pool_guard){.fd = -1, .pidfd = -1};
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return ffs_error_errno(err, errno, "a socket for the guard of the pool");
	r = -ffs_spawn_self(argv, pair[1], true, &g->pid);
	close(pair[1]);
	g->fd = pair[0];
	if (r)
		g->pid = 0;
	else
		g->pidfd = (int)syscall(SYS_pidfd_open, g->pid, 0);
	if (r || g->pidfd < 0) {
		r = ffs_error_errno(err, r ? r : errno, "the guard of the pool cannot be started");
		pool_guard_end(g);
		return r;
	}
	return 0;
}

static bool tell(struct pool_guard *g, const struct message *m, int fd)
{
	struct iovec data = {.iov_base = (void *)(uintptr_t)m, .iov_len = sizeof(*m)};
	char room[CMSG_SPACE(sizeof(int))] = {0};
	struct msghdr h = {.msg_iov = &data, .msg_iovlen = 1};

	if (fd >= 0) {
		h.msg_control = room;
		h.msg_controllen = sizeof(room);
		struct cmsghdr *c = CMSG_FIRSTHDR(&h);

		*c = (struct cmsghdr){
			.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
		memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	}
	return sendmsg(g->fd, &h, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof(*m);
}

static struct message message_of(enum kind kind, const char *path)
{
	struct message m = {.kind = kind};

	snprintf(m.path, sizeof(m.path), "%s", path);
	return m;
}

bool pool_guard_socket(struct pool_guard *g, const struct pool_name *n)
{
	struct message m = message_of(SOCKET, n->path);

	m.dev = n->dev;
	m.ino = n->ino;
	return tell(g, &m, -1);
}

bool pool_guard_child(struct pool_guard *g, const char *dir, int pidfd)
{
	struct message m = message_of(CHILD, dir);

	return tell(g, &m, pidfd);
}

bool pool_guard_forget(struct pool_guard *g, const char *path)
{
	struct message m = message_of(FORGET, path);

	return tell(g, &m, -1);
}

/* What it still knows of it ends. */
void pool_guard_end(struct pool_guard *g)
{
	int status;

	ffs_close_fd(&g->fd);
	while (g->pid > 0 && waitpid(g->pid, &status, 0) < 0 && errno == EINTR)
		;
	g->pid = 0;
	ffs_close_fd(&g->pidfd);
}

/* ---- the guard ---- */

struct known {
	struct message m;
	int pidfd;
};

struct guard {
	struct known *known;
	unsigned n, room;
};

static struct known *find(struct guard *g, const char *path)
{
	for (unsigned i = 0; i < g->n; i++)
		if (!strcmp(g->known[i].m.path, path))
			return &g->known[i];
	return NULL;
}

/* False: no memory, so it cannot be trusted: the pool is to start another. */
static bool take(struct guard *g, const struct message *m, int pidfd)
{
	struct known *k = find(g, m->path);

	if (m->kind == FORGET) {
		ffs_close_fd(&pidfd);
		if (!k)
			return true;
		ffs_close_fd(&k->pidfd);
		*k = g->known[--g->n];
		return true;
	}
	if (!k && g->n == g->room) {
		unsigned room = g->room ? 2 * g->room : 64;
		struct known *bigger = realloc(g->known, room * sizeof(*bigger));

		if (!bigger)
			return false;
		g->known = bigger;
		g->room = room;
	}
	if (!k) {
		k = &g->known[g->n++];
		k->pidfd = -1;
	}
	k->m = *m;
	ffs_close_fd(&k->pidfd);
	k->pidfd = pidfd;
	return true;
}

/* 0: the pool is gone. */
static int listen_to_pool(struct guard *g)
{
	for (;;) {
		struct message m;
		struct iovec data = {&m, sizeof(m)};
		char room[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
		struct msghdr h = {.msg_iov = &data,
			.msg_iovlen = 1,
			.msg_control = room,
			.msg_controllen = sizeof(room)};
		ssize_t n = recvmsg(FD, &h, MSG_CMSG_CLOEXEC);
		struct cmsghdr *c;
		int pidfd = -1;

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return 0;
		c = CMSG_FIRSTHDR(&h);
		if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
			memcpy(&pidfd, CMSG_DATA(c), sizeof(pidfd));
		m.path[sizeof(m.path) - 1] = 0;
		if (n != (ssize_t)sizeof(m) || !take(g, &m, pidfd))
			return -1;
	}
}

/* It is ended when this returns, or cannot be. */
static void end_process(int pidfd)
{
	struct pollfd p = {.fd = pidfd, .events = POLLIN};

	if (syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0) == 0 && poll(&p, 1, END_MS) < 0)
		return;
}

static bool works_in(const char *pid, const char *dir)
{
	char link[32], where[160];
	size_t len = strlen(dir);
	ssize_t n;

	snprintf(link, sizeof(link), "/proc/%.15s/cwd", pid);
	n = readlink(link, where, sizeof(where) - 1);
	if (n < 0)
		return false;
	where[n] = 0;
	return !strncmp(where, dir, len) && (!where[len] || !strcmp(where + len, " (deleted)"));
}

/* Those that nobody has told us of: they were being started. */
static void end_those_in(const char *dir)
{
	DIR *proc = opendir("/proc");
	struct dirent *e;

	while (proc && (e = readdir(proc))) {
		_cleanup_close_ int pidfd = -1;

		if (e->d_name[0] < '0' || e->d_name[0] > '9' || !works_in(e->d_name, dir))
			continue;
		pidfd = (int)syscall(SYS_pidfd_open, atoi(e->d_name), 0);
		/* the number may have become another's meanwhile */
		if (pidfd >= 0 && works_in(e->d_name, dir))
			end_process(pidfd);
	}
	if (proc)
		closedir(proc);
}

static void clean_up(struct guard *g)
{
	struct stat st;

	for (unsigned i = 0; i < g->n; i++) {
		const struct known *k = &g->known[i];

		if (k->m.kind == SOCKET && lstat(k->m.path, &st) == 0 && st.st_dev == k->m.dev &&
			st.st_ino == k->m.ino)
			unlink(k->m.path);
		if (k->pidfd >= 0)
			end_process(k->pidfd);
	}
	for (unsigned i = 0; i < g->n; i++)
		if (g->known[i].m.kind == CHILD)
			ffs_remove_tree(g->known[i].m.path);
	for (unsigned i = 0; i < g->n; i++)
		if (g->known[i].m.kind == CHILD && g->known[i].pidfd < 0) {
			end_those_in(g->known[i].m.path);
			ffs_remove_tree(g->known[i].m.path);
		}
}

int ffs_pool_guard_main(int argc, char **argv)
{
	struct guard g = {0};

	if (listen_to_pool(&g) < 0)
		return FFS_EXIT_FAILURE;
	clean_up(&g);
	return FFS_EXIT_OK;
}
