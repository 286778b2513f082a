/* Owns struct ffs_http: the socket and what came over it, framed by RFC 9112.
 *
 * Threads: one caller at a time. No locks. Waits in poll(2) only, with the caller's deadline, and calls the
 * caller's beat meanwhile. */
#include "vmm/http.h"

#include <ctype.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define BEAT_MS 50

void ffs_http_init(struct ffs_http *h, int sock)
{
	*h = (struct ffs_http){.sock = sock};
}

void ffs_http_close(struct ffs_http *h)
{
	ffs_close_fd(&h->sock);
	free(h->buf);
	*h = (struct ffs_http){.sock = -1, .dead = true};
}

void ffs_http_answer_free(struct ffs_http_answer *a)
{
	free(a->body);
	*a = (struct ffs_http_answer){0};
}

static int fail(struct ffs_http *h, int code, const char *what, struct ffs_error *err)
{
	h->dead = true;
	return ffs_error_set(err, code, "%s", what);
}

static int say_lost(struct ffs_http *h, int code, struct ffs_error *err)
{
	h->dead = true;
	if (code == EPIPE || code == ECONNRESET || code == ENOTCONN)
		return ffs_error_set(err, ECONNRESET, "the VMM closed the connection to its API");
	return ffs_error_errno(err, code, "the connection to the VMM's API");
}

/* ---- requests ---- */

static int send_all(
	struct ffs_http *h, const char *p, size_t len, uint64_t deadline_ns, struct ffs_error *err)
{
	while (len) {
		ssize_t n = send(h->sock, p, len, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n >= 0) {
			p += n;
			len -= (size_t)n;
			continue;
		}
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN)
			return say_lost(h, errno, err);
		struct pollfd pfd = {.fd = h->sock, .events = POLLOUT};
		int ms = ffs_ms_until(deadline_ns);

		if (!ms)
			return fail(h, ETIMEDOUT, "the VMM's API takes no requests", err);
		if (poll(&pfd, 1, ms) < 0 && errno != EINTR)
			return say_lost(h, errno, err);
	}
	return 0;
}

int ffs_http_send(struct ffs_http *h, const char *method, const char *path, const char *body,
	uint64_t deadline_ns, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	int n;

	if (h->sock < 0 || h->dead)
		return ffs_error_set(err, ENOTCONN, "there is no connection to the VMM's API");
	if (body)
		n = asprintf(&text,
			"%s %s HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
			"Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
			method, path, strlen(body), body);
	else
		n = asprintf(&text, "%s %s HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n",
			method, path);
	if (n < 0) {
		text = NULL;
		return ffs_error_set(err, ENOMEM, "no memory for a request");
	}
	int r = send_all(h, text, (size_t)n, deadline_ns, err);

	if (r == 0)
		h->owed++;
	return r;
}

/* ---- answers ---- */

struct head {
	int status;
	size_t len, body; /* of the head with its empty line; of the body */
	bool close;
};

/* The value of a header line, if it is the one; surrounding blanks taken off. */
static bool header(char *line, const char *name, char **value)
{
	size_t n = strlen(name);

	if (strncasecmp(line, name, n) != 0 || line[n] != ':')
		return false;
	char *v = line + n + 1;

	v += strspn(v, " \t");
	for (size_t l = strlen(v); l && (v[l - 1] == ' ' || v[l - 1] == '\t'); l--)
		v[l - 1] = '\0';
	*value = v;
	return true;
}

static int parse_length(const char *v, size_t *out)
{
	char *end;

	if (!isdigit((unsigned char)*v) || strlen(v) > 9)
		return -EPROTO;
	*out = strtoul(v, &end, 10);
	return *end ? -EPROTO : 0;
}

/* `text` is a copy of the head, to be cut up. */
static int parse_head(char *text, struct head *out)
{
	char *save = NULL, *line = strtok_r(text, "\r\n", &save), *v;
	bool has_length = false;
	int minor, at = 0;

	if (!line || sscanf(line, "HTTP/1.%1d %3d%n", &minor, &out->status, &at) != 2 || !at ||
		(line[at] && line[at] != ' ') || out->status < 100)
		return -EPROTO;
	out->close = minor == 0;
	while ((line = strtok_r(NULL, "\r\n", &save)) != NULL) {
		if (header(line, "Content-Length", &v)) {
			size_t had = out->body;

			if (parse_length(v, &out->body) < 0 || (has_length && had != out->body))
				return -EPROTO;
			has_length = true;
		} else if (header(line, "Transfer-Encoding", &v)) {
			return -EPROTO;
		} else if (header(line, "Connection", &v)) {
			out->close = strcasecmp(v, "close") == 0;
		}
	}
	if (out->status < 200 || out->status == 204 || out->status == 304)
		out->body = 0;
	return 0;
}

/* 1: a whole head is there; 0: not yet. */
static int find_head(struct ffs_http *h, struct head *out)
{
	const char *end = h->len ? memmem(h->buf, h->len, "\r\n\r\n", 4) : NULL;

	if (!end)
		return h->len > FFS_HTTP_HEAD_MAX ? -EMSGSIZE : 0;
	*out = (struct head){.len = (size_t)(end - h->buf) + 4};
	if (out->len > FFS_HTTP_HEAD_MAX)
		return -EMSGSIZE;
	if (memchr(h->buf, '\0', out->len))
		return -EPROTO;
	_cleanup_free_ char *text = strndup(h->buf, out->len);

	if (!text)
		return -ENOMEM;
	int r = parse_head(text, out);

	if (r < 0)
		return r;
	return out->body > FFS_HTTP_BODY_MAX ? -EMSGSIZE : 1;
}

static int receive(struct ffs_http *h)
{
	if (h->cap - h->len < 4096) {
		size_t cap = h->cap ? 2 * h->cap : 16384;
		char *buf = realloc(h->buf, cap);

		if (!buf)
			return -ENOMEM;
		h->buf = buf;
		h->cap = cap;
	}
	ssize_t n = recv(h->sock, h->buf + h->len, h->cap - h->len, MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (n == 0)
		return -ECONNRESET;
	h->len += (size_t)n;
	return 0;
}

/* One turn of waiting for input. */
static int wait_input(
	struct ffs_http *h, struct ffs_http_wait *w, uint64_t deadline_ns, struct ffs_error *err)
{
	struct pollfd p[2] = {{.fd = h->sock, .events = POLLIN}, {.fd = w ? w->fd : -1, .events = POLLIN}};
	int ms = ffs_ms_until(deadline_ns), n;

	if (!ms)
		return fail(h, ETIMEDOUT, "the VMM's API does not answer", err);
	n = poll(p, w && w->fd >= 0 ? 2 : 1, w && w->beat && ms > BEAT_MS ? BEAT_MS : ms);
	if (n < 0 && errno != EINTR)
		return say_lost(h, errno, err);
	if (w && w->beat)
		w->beat(w->beat_arg);
	if (n > 0 && w && w->fd >= 0 && p[1].revents) {
		int r = w->ready(w, err);

		if (r < 0) {
			h->dead = true;
			return r;
		}
	}
	if (n > 0 && p[0].revents) {
		int r = receive(h);

		if (r < 0)
			return say_lost(h, -r, err);
	}
	return 0;
}

static void consume(struct ffs_http *h, size_t n)
{
	memmove(h->buf, h->buf + n, h->len - n);
	h->len -= n;
}

int ffs_http_recv(struct ffs_http *h, struct ffs_http_wait *w, uint64_t deadline_ns,
	struct ffs_http_answer *out, struct ffs_error *err)
{
	struct head head;

	if (h->sock < 0 || h->dead)
		return ffs_error_set(err, ENOTCONN, "there is no connection to the VMM's API");
	for (;;) {
		int r = find_head(h, &head);

		if (r == -EMSGSIZE)
			return fail(h, EMSGSIZE, "the VMM's API sent an answer that is too large", err);
		if (r < 0)
			return fail(h, -r, "the VMM's API sent something that is no HTTP answer", err);
		if (r > 0 && h->len >= head.len + head.body) {
			if (head.status >= 200)
				break;
			consume(h, head.len);
			continue;
		}
		r = wait_input(h, w, deadline_ns, err);
		if (r < 0)
			return r;
	}
	char *body = strndup(h->buf + head.len, head.body);

	if (!body)
		return fail(h, ENOMEM, "no memory for an answer", err);
	consume(h, head.len + head.body);
	h->owed -= h->owed > 0;
	/* nothing was asked for that could still come */
	h->dead |= head.close || (!h->owed && h->len);
	*out = (struct ffs_http_answer){.status = head.status, .body = body, .len = strlen(body)};
	return 0;
}
