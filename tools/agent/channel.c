/* Where a host can come in, one entry of a table each: a virtio-serial port (QEMU), vsock (Firecracker), a unix socket
 * (a service beside its host, tests).
 *
 * What is not there yet is looked for again when the kernel says that a device has come. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

struct channel {
	const char *name;
	/* A listener, or a connection of its own (port). -1: there is none, at least not now. */
	int (*open)(void);
	bool port;
	struct watch w; /* the listener */
	bool there;     /* the port is open */
};

/* ---- virtio-serial ---- */

/* The device of the port called AGENT_PORT; udev, which makes /dev/virtio-ports, need not be there. */
static bool find_port(char path[300])
{
	DIR *d = opendir("/sys/class/virtio-ports");
	bool found = false;

	for (struct dirent *e; d && !found && (e = readdir(d));) {
		char name[64] = "";

		if (e->d_name[0] == '.')
			continue;
		snprintf(path, 300, "/sys/class/virtio-ports/%.200s/name", e->d_name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		found = fd >= 0 && read(fd, name, sizeof(name) - 1) > 0 &&
			!strncmp(name, AGENT_PORT, sizeof(AGENT_PORT) - 1) &&
			name[sizeof(AGENT_PORT) - 1] <= '\n';
		if (fd >= 0)
			close(fd);
		snprintf(path, 300, "/dev/%.200s", e->d_name);
	}
	if (d)
		closedir(d);
	return found;
}

static int open_port(void)
{
	char path[300];

	return find_port(path) ? open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC) : -1;
}

/* ---- sockets ---- */

static int listen_on(int fd, const void *addr, socklen_t len)
{
	if (fd >= 0 && (bind(fd, addr, len) < 0 || listen(fd, 64) < 0)) {
		close(fd);
		return -1;
	}
	return fd;
}

static int open_vsock(void)
{
	struct sockaddr_vm a = {
		.svm_family = AF_VSOCK, .svm_port = AGENT_VSOCK_PORT, .svm_cid = VMADDR_CID_ANY};

	return options.vsock ? listen_on(socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), &a,
				       sizeof(a))
			     : -1;
}

static int open_unix(void)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	mode_t old;
	int fd;

	if (!options.unix_path || strlen(options.unix_path) >= sizeof(a.sun_path))
		return -1;
	strcpy(a.sun_path, options.unix_path);
	unlink(a.sun_path);
	old = umask(0177);
	fd = listen_on(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), &a, sizeof(a));
	umask(old);
	return fd;
}

static struct channel channels[] = {
	{.name = "virtio-serial", .open = open_port, .port = true, .w = {.fd = -1}},
	{.name = "vsock", .open = open_vsock, .w = {.fd = -1}},
	{.name = "unix", .open = open_unix, .w = {.fd = -1}},
};
#define N_CHANNELS (sizeof(channels) / sizeof(*channels))

/* ---- all of them ---- */

static void on_listener(struct watch *w, uint32_t events)
{
	struct channel *ch = (struct channel *)((char *)w - offsetof(struct channel, w));
	int fd = accept4(w->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd >= 0)
		conn_add(fd, ch->name, false);
}

static void open_channel(struct channel *ch)
{
	int fd = ch->there || ch->w.fd >= 0 ? -1 : ch->open();

	if (fd >= 0 && ch->port) {
		ch->there = true;
		conn_add(fd, ch->name, true);
	} else if (fd >= 0) {
		ch->w.fd = fd;
		ch->w.ready = on_listener;
		watch_arm(&ch->w, EPOLLIN);
	}
}

static void open_missing(void)
{
	for (unsigned i = 0; i < N_CHANNELS; i++)
		open_channel(&channels[i]);
}

static void on_device(struct watch *w, uint32_t events)
{
	char text[8192];
	bool any = false;

	/* what it says does not matter (it may have been too much): something has come */
	for (ssize_t n; (n = recv(w->fd, text, sizeof(text), 0)) > 0 || (n < 0 && errno == ENOBUFS);)
		any = true;
	if (any)
		open_missing();
}

void channels_start(void)
{
	static struct watch devices = {.fd = -1, .ready = on_device};
	struct sockaddr_nl a = {.nl_family = AF_NETLINK, .nl_groups = 1};

	/* before the first look: what comes between is not missed */
	devices.fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
	if (devices.fd >= 0 && bind(devices.fd, (struct sockaddr *)&a, sizeof(a)) == 0)
		watch_arm(&devices, EPOLLIN);
	open_missing();
}

void channels_rebind(const struct conn *keep)
{
	conn_close_others(keep);
	/* those that were there: to look for another costs the kernel a search for a module each time, and its device would be
	 * announced. A unix socket is of this machine's file system, which was restored with it */
	for (unsigned i = 0; i < N_CHANNELS; i++)
		if (channels[i].w.fd >= 0 && channels[i].open != open_unix) {
			watch_close(&channels[i].w);
			open_channel(&channels[i]);
		}
}
