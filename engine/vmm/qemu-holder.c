/* Who is at the ends of a unix socket: a QMP monitor serves one client, and a user who is refused wants to
 * know which.
 *
 * Any thread; owns nothing; walks /proc and asks NETLINK_SOCK_DIAG (sock_diag(7),
 * include/uapi/linux/unix_diag.h), only after a connection was refused or a pid did not match. */
#include "vmm/qemu.h"

#include <ctype.h>
#include <dirent.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <linux/unix_diag.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"

#define MAX_PEERS 64

static void closedirp(DIR **d)
{
	if (*d)
		closedir(*d);
}

/* Whether process pid has one of the sockets `ino` open. */
static bool has_socket(pid_t pid, const uint32_t *ino, unsigned n)
{
	char path[320], target[64];

	snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
	_cleanup_(closedirp) DIR *dir = opendir(path);

	for (struct dirent *e; dir && (e = readdir(dir)) != NULL;) {
		unsigned have;

		snprintf(path, sizeof(path), "/proc/%d/fd/%s", (int)pid, e->d_name);
		ssize_t len = readlink(path, target, sizeof(target) - 1);

		if (len <= 0)
			continue;
		target[len] = '\0';
		if (sscanf(target, "socket:[%u]", &have) != 1)
			continue;
		for (unsigned i = 0; i < n; i++)
			if (ino[i] == have)
				return true;
	}
	return false;
}

static int open_diag(void)
{
	int nl = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	struct {
		struct nlmsghdr h;
		struct unix_diag_req r;
	} req = {
		.h = {.nlmsg_len = sizeof(req),
			.nlmsg_type = SOCK_DIAG_BY_FAMILY,
			.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP},
		.r = {.sdiag_family = AF_UNIX,
			.udiag_states = -1u,
			.udiag_show = UDIAG_SHOW_NAME | UDIAG_SHOW_PEER},
	};

	if (nl >= 0 && send(nl, &req, sizeof(req), 0) != (ssize_t)sizeof(req)) {
		close(nl);
		nl = -1;
	}
	return nl;
}

struct search {
	const char *name; /* sun_path of the listener, `len` bytes */
	size_t len;
	uint32_t own;   /* our socket's inode: its embryo has the listener's name too */
	bool listeners; /* collect those, or the peers of accepted ones */
	uint32_t found[MAX_PEERS];
	unsigned n;
};

static void look_at(struct search *s, const struct nlmsghdr *h)
{
	const struct unix_diag_msg *m = NLMSG_DATA(h);
	long left = (long)h->nlmsg_len - (long)NLMSG_LENGTH(sizeof(*m));
	const char *name = NULL;
	size_t len = 0;
	uint32_t peer = 0;

	for (const struct nlattr *a = (const struct nlattr *)(m + 1);
		left >= (long)sizeof(*a) && a->nla_len >= sizeof(*a) && a->nla_len <= left;) {
		if (a->nla_type == UNIX_DIAG_NAME) {
			name = (const char *)(a + 1);
			len = a->nla_len - sizeof(*a);
		} else if (a->nla_type == UNIX_DIAG_PEER && a->nla_len >= sizeof(*a) + sizeof(peer)) {
			memcpy(&peer, a + 1, sizeof(peer));
		}
		left -= NLA_ALIGN(a->nla_len);
		a = (const struct nlattr *)((const char *)a + NLA_ALIGN(a->nla_len));
	}
	if (!name || len < s->len || memcmp(name, s->name, s->len) != 0 || s->n == MAX_PEERS)
		return;
	/* a file name is NUL-terminated in one kernel and not in another */
	if (len > s->len + 1 || (len == s->len + 1 && name[s->len] != '\0'))
		return;
	bool listening = m->udiag_state == 10; /* TCP_LISTEN, which sock_diag reports for unix sockets too */

	if (s->listeners && listening)
		s->found[s->n++] = m->udiag_ino;
	else if (!s->listeners && !listening && peer && peer != s->own)
		s->found[s->n++] = peer;
}

static void collect(struct search *s)
{
	_cleanup_close_ int nl = open_diag();
	_Alignas(struct nlmsghdr) char buf[32768];

	while (nl >= 0) {
		ssize_t n = recv(nl, buf, sizeof(buf), 0);

		if (n <= 0)
			return;
		unsigned left = (unsigned)n;

		for (struct nlmsghdr *h = (struct nlmsghdr *)buf; NLMSG_OK(h, left);
			h = NLMSG_NEXT(h, left)) {
			if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR)
				return;
			if (h->nlmsg_len >= NLMSG_LENGTH(sizeof(struct unix_diag_msg)))
				look_at(s, h);
		}
	}
}

static bool begin(int sock, struct sockaddr_un *addr, struct search *s)
{
	socklen_t len = sizeof(*addr);
	struct stat st;

	if (getpeername(sock, (struct sockaddr *)addr, &len) < 0 ||
		len <= offsetof(struct sockaddr_un, sun_path) || fstat(sock, &st) < 0)
		return false;
	size_t n = len - offsetof(struct sockaddr_un, sun_path);

	s->name = addr->sun_path;
	s->len = addr->sun_path[0] ? strnlen(addr->sun_path, n) : n;
	s->own = (uint32_t)st.st_ino;
	return true;
}

pid_t ffs_qemu_holder(int sock)
{
	struct sockaddr_un addr;
	struct search s = {0};

	if (!begin(sock, &addr, &s))
		return 0;
	collect(&s);
	_cleanup_(closedirp) DIR *proc = s.n ? opendir("/proc") : NULL;

	for (struct dirent *e; proc && (e = readdir(proc)) != NULL;)
		if (isdigit((unsigned char)e->d_name[0]) && has_socket((pid_t)atoi(e->d_name), s.found, s.n))
			return (pid_t)atoi(e->d_name);
	return 0;
}

bool ffs_qemu_listens(pid_t pid, int sock)
{
	struct sockaddr_un addr;
	struct search s = {.listeners = true};

	if (!begin(sock, &addr, &s))
		return false;
	collect(&s);
	return has_socket(pid, s.found, s.n);
}
