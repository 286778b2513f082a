/* The VMM's side of forkfs' driver "coop": GET /, PATCH /vm, PUT /uffd/wp, PUT /snapshot/create.
 *
 * One thread; requests one after the other, over several connections (forkfs' watchdog makes one of its own
 * when the daemon has died in the pause). A real VMM has an HTTP server and a JSON parser already. */
#include "coop.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define CLIENTS 8

struct client {
	char text[4096];
	size_t len;
};

/* The string value of a key, as far as an example needs it: no escapes. */
static const char *string_of(const char *json, const char *key, char out[256])
{
	char name[64];
	const char *p;

	snprintf(name, sizeof(name), "\"%s\"", key);
	p = strstr(json, name);
	return p && sscanf(p + strlen(name), " : \"%255[^\"]\"", out) == 1 ? out : "";
}

static int connect_to(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strncpy(a.sun_path, path, sizeof(a.sun_path) - 1);
	if (sock >= 0 && connect(sock, (struct sockaddr *)&a, sizeof(a)) == 0)
		return sock;
	if (sock >= 0)
		close(sock);
	return -1;
}

/* A userfaultfd of this process, with UFFDIO_API left to the receiver, and what to protect with it: in one
 * message. Whatever happens, this process keeps no copy: with one, forkfs' death would hang the guest. */
static bool hand_over(const struct coop_vmm *vmm, const char *path)
{
	char text[16384] = "[", control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = {0};
	size_t n = 1;
	int sock = connect_to(path), uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	bool ok = sock >= 0 && uffd >= 0;

	for (unsigned i = 0; i < vmm->n_regions && n < sizeof(text); i++) {
		const struct coop_region *r = &vmm->regions[i];

		n += (size_t)snprintf(text + n, sizeof(text) - n,
			"%s{\"base_host_virt_addr\":%llu,\"size\":%llu,\"offset\":%llu,\"page_size\":%llu,"
			"\"page_size_kib\":%llu}",
			i ? "," : "", (unsigned long long)(uintptr_t)r->address, (unsigned long long)r->size,
			(unsigned long long)r->offset, (unsigned long long)r->page_size,
			(unsigned long long)r->page_size);
	}
	if (n + 1 >= sizeof(text))
		ok = false;
	else
		text[n++] = ']';
	struct iovec iov = {text, n};
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};

	*CMSG_FIRSTHDR(&msg) = (struct cmsghdr){
		.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
	memcpy(CMSG_DATA(CMSG_FIRSTHDR(&msg)), &uffd, sizeof(uffd));
	ok = ok && sendmsg(sock, &msg, MSG_NOSIGNAL) == (ssize_t)n;
	if (uffd >= 0)
		close(uffd);
	if (sock >= 0)
		close(sock);
	return ok;
}

static bool save_state(const struct coop_vmm *vmm, const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	bool ok = fd >= 0 && vmm->save(fd);

	if (fd >= 0)
		close(fd);
	return ok;
}

/* The answer to one request, in `out`. */
static void answer(const struct coop_vmm *vmm, const char *request, const char *body, char out[512])
{
	char value[256], json[200] = "";
	const char *fault = NULL;

	if (strncmp(request, "GET / ", 6) == 0) {
		snprintf(json, sizeof(json),
			"{\"app_name\":\"microvm\",\"vmm_version\":\"1\",\"state\":\"%s\"}",
			vmm->is_paused() ? "Paused" : "Running");
		snprintf(out, 512, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n%s", strlen(json), json);
		return;
	}
	if (strncmp(request, "PATCH /vm ", 10) == 0) {
		string_of(body, "state", value);
		if (strcmp(value, "Paused") == 0 || strcmp(value, "Resumed") == 0)
			vmm->set_paused(value[0] == 'P');
		else
			fault = "state is Paused or Resumed";
	} else if (strncmp(request, "PUT /uffd/wp ", 13) == 0) {
		if (!hand_over(vmm, string_of(body, "socket", value)))
			fault = "no userfaultfd was handed over";
	} else if (strncmp(request, "PUT /snapshot/create ", 21) == 0) {
		if (strcmp(string_of(body, "snapshot_type", value), "VmstateOnly") != 0)
			fault = "snapshot_type is VmstateOnly";
		else if (!vmm->is_paused() || !save_state(vmm, string_of(body, "snapshot_path", value)))
			fault = "not paused, or the file cannot be written";
	} else {
		snprintf(out, 512, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
		return;
	}
	if (fault)
		snprintf(json, sizeof(json), "{\"fault_message\":\"%s\"}", fault);
	snprintf(out, 512,
		fault ? "HTTP/1.1 400 Bad Request\r\nContent-Length: %zu\r\n\r\n%s"
		      : "HTTP/1.1 204 No Content\r\n\r\n",
		strlen(json), json);
}

/* Serve the requests that are complete. False: the connection is over. */
static bool serve(const struct coop_vmm *vmm, int sock, struct client *c)
{
	ssize_t n = recv(sock, c->text + c->len, sizeof(c->text) - 1 - c->len, 0);
	char *end, *length;

	if (n <= 0)
		return false;
	c->len += (size_t)n;
	c->text[c->len] = '\0';
	while ((end = strstr(c->text, "\r\n\r\n")) != NULL) {
		length = strcasestr(c->text, "\r\nContent-Length:");
		size_t body = length && length < end ? strtoul(length + 17, NULL, 10) : 0;
		size_t used = (size_t)(end - c->text) + 4 + body;
		char out[512], kept;

		if (body >= sizeof(c->text) || used > c->len)
			break;
		kept = c->text[used];
		c->text[used] = '\0'; /* so that nobody reads into the next request */
		answer(vmm, c->text, end + 4, out);
		c->text[used] = kept;
		c->len -= used;
		memmove(c->text, c->text + used, c->len + 1);
		if (send(sock, out, strlen(out), MSG_NOSIGNAL) < 0)
			return false;
	}
	return c->len < sizeof(c->text) - 1;
}

int coop_serve(const struct coop_vmm *vmm)
{
	static struct client clients[CLIENTS];
	struct pollfd p[1 + CLIENTS] = {
		{.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), .events = POLLIN}};
	struct sockaddr_un a = {.sun_family = AF_UNIX};

	strncpy(a.sun_path, vmm->socket, sizeof(a.sun_path) - 1);
	if (p[0].fd < 0 || bind(p[0].fd, (struct sockaddr *)&a, sizeof(a)) < 0 ||
		listen(p[0].fd, CLIENTS) < 0)
		return -1;
	for (unsigned i = 1; i <= CLIENTS; i++)
		p[i] = (struct pollfd){.fd = -1, .events = POLLIN};
	for (;;) {
		if (poll(p, 1 + CLIENTS, -1) < 0)
			continue; /* EINTR */
		for (unsigned i = 1; i <= CLIENTS; i++) {
			if (p[i].fd < 0 && p[0].revents) {
				p[i].fd = accept4(p[0].fd, NULL, NULL, SOCK_CLOEXEC);
				p[0].revents = 0;
				clients[i - 1].len = 0;
			} else if (p[i].fd >= 0 && p[i].revents && !serve(vmm, p[i].fd, &clients[i - 1])) {
				close(p[i].fd);
				p[i].fd = -1;
			}
		}
	}
}
