/* A connection of somebody who asks a pool for something: one request, a line of JSON, and its answer, another. A child is
 * offered first: who has written its line down says so, by a line of his own, and only then it is theirs. So who goes away
 * at any moment takes nothing.
 *
 * The main thread; nothing here waits. A client that says its request slowly, or does not take its answer, is let go after
 * POOL_TALK_NS; one that has gone while a thread works for it stays until that is done. */
#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "pool.h"

#define DEPTH_MAX 8
#define FIRST_ROOM 1024u

void pool_client_accept(struct pool *p)
{
	struct pool_client *c;
	int fd = accept4(p->name.listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0) {
		/* they still wait there, and poll(2) would say so at once */
		if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
			p->accept_ns = ffs_now_ns() + POOL_FULL_NS;
		return;
	}
	c = calloc(1, sizeof(*c));
	if (!c) {
		close(fd);
		return;
	}
	c->pool = p;
	c->fd = fd;
	c->at = -1;
	c->deadline_ns = ffs_now_ns() + POOL_TALK_NS;
	p->client[p->n_clients++] = c;
}

void pool_client_free(struct pool_client *c)
{
	struct pool *p = c->pool;
	unsigned i = 0;

	while (p->client[i] != c)
		i++;
	p->client[i] = p->client[--p->n_clients];
	ffs_close_fd(&c->fd);
	pool_order_free(c->order);
	free(c->in);
	free(c->out);
	free(c);
}

/* Nobody is there any more: what was theirs goes where it belongs. */
static void lose(struct pool_client *c)
{
	struct pool *p = c->pool;
	int expected = POOL_OPEN;

	ffs_close_fd(&c->fd);
	c->gone = true;
	c->deadline_ns = UINT64_MAX;
	if (c->works) {
		/* nothing was done yet; or the end of the VM ends the work */
		if (!atomic_compare_exchange_strong(&c->order->state, &expected, POOL_CANCELLED) &&
			expected == POOL_BEGUN)
			ffs_child_kill(&p->child[c->at].vm);
		return;
	}
	ffs_pool_forget(&p->book, &c->waiter);
	if (c->state == POOL_OFFERED) {
		p->child[c->at].client = NULL;
		pool_end_child(p, (unsigned)c->at);
	} else if (c->state == POOL_RELEASES && c->at >= 0) {
		p->child[c->at].released_by = NULL;
	}
	pool_client_free(c);
}

/* ---- answers ---- */

static void flush(struct pool_client *c)
{
	while (c->out_at < c->out_len) {
		ssize_t n =
			send(c->fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0) {
			lose(c);
			return;
		}
		c->out_at += (size_t)n;
	}
	if (c->state == POOL_GOES)
		lose(c);
}

static void say(struct pool_client *c, struct json_object *o, enum pool_client_state next)
{
	const char *text =
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
	int n;

	free(c->out);
	n = asprintf(&c->out, "%s\n", text);
	json_object_put(o);
	if (n < 0) {
		c->out = NULL;
		lose(c);
		return;
	}
	c->out_len = (size_t)n;
	c->out_at = 0;
	c->state = next;
	c->deadline_ns = ffs_now_ns() + POOL_TALK_NS;
	flush(c);
}

void pool_client_answer(struct pool_client *c, struct json_object *o)
{
	say(c, o, POOL_GOES);
}

void pool_client_refuse(struct pool_client *c, int code, const char *fmt, ...)
{
	struct json_object *o = json_object_new_object();
	struct ffs_error err;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err.text, sizeof(err.text), fmt, ap);
	va_end(ap);
	json_object_object_add(o, "error", json_object_new_string(err.text));
	json_object_object_add(o, "errno", json_object_new_int(code));
	pool_client_answer(c, o);
}

void pool_client_offer(struct pool_client *c, struct json_object *o)
{
	say(c, o, POOL_OFFERED);
}

/* ---- requests ---- */

static void asks(struct pool_client *c, struct json_object *o)
{
	struct json_object *ms = ffs_json_get(o, "timeout_ms");
	uint64_t now = ffs_now_ns(), wait = ffs_json_u64(o, "timeout_ms");
	struct ffs_error err = {0};

	if (!json_object_is_type(ms, json_type_int) || json_object_get_int64(ms) < 0 ||
		wait > POOL_TIMEOUT_MAX_MS)
		pool_client_refuse(
			c, EINVAL, "timeout_ms is a number of milliseconds, at most %u", POOL_TIMEOUT_MAX_MS);
	else if (c->pool->book.draining)
		pool_client_refuse(c, ESHUTDOWN, "the pool is draining: it hands out nothing more");
	else if (pool_order_read(o, &c->order, &err) < 0)
		pool_client_refuse(c, err.code, "%s", err.text);
	else if (ffs_pool_ask(&c->pool->book, &c->waiter, now, now + wait * FFS_NS_PER_MS) < 0)
		pool_client_refuse(c, EAGAIN, "%u others wait already", FFS_POOL_WAITING);
	else {
		c->state = POOL_WAITS;
		c->deadline_ns = UINT64_MAX;
	}
}

static void releases(struct pool_client *c, struct json_object *o)
{
	uint64_t id = ffs_json_u64(o, "id");

	c->state = POOL_RELEASES;
	c->deadline_ns = UINT64_MAX;
	if (!pool_release(c->pool, id, c))
		pool_client_refuse(c, ENOENT,
			"no child %llu is out: the id is in the line that acquire printed",
			(unsigned long long)id);
}

static void obey(struct pool_client *c, struct json_object *request)
{
	struct json_object *o;

	if (json_object_is_type(o = ffs_json_get(request, "acquire"), json_type_object)) {
		asks(c, o);
	} else if (json_object_is_type(o = ffs_json_get(request, "release"), json_type_object)) {
		releases(c, o);
	} else if (json_object_is_type(ffs_json_get(request, "status"), json_type_object)) {
		pool_client_answer(c, pool_status(c->pool));
	} else if (json_object_is_type(o = ffs_json_get(request, "drain"), json_type_object)) {
		c->state = POOL_DRAINS;
		c->deadline_ns = UINT64_MAX;
		pool_drain(c->pool, ffs_cli_json_bool(o, "end_all"));
	} else {
		pool_client_refuse(
			c, EINVAL, "that is no request: acquire, release, status or drain, with an object");
	}
}

/* A whole line: what comes behind it is nobody's. */
static struct json_object *parse(const char *line, size_t len)
{
	struct json_tokener *t = json_tokener_new_ex(DEPTH_MAX);
	struct json_object *o;

	if (!t)
		return NULL;
	json_tokener_set_flags(t, JSON_TOKENER_STRICT);
	o = json_tokener_parse_ex(t, line, (int)len);
	/* an object that is whole, and nothing but space after it */
	if (json_tokener_get_error(t) != json_tokener_success || !json_object_is_type(o, json_type_object)) {
		json_object_put(o);
		o = NULL;
	}
	for (size_t i = o ? json_tokener_get_parse_end(t) : len; i < len; i++)
		if (line[i] != ' ' && line[i] != '\r') {
			json_object_put(o);
			o = NULL;
			break;
		}
	json_tokener_free(t);
	return o;
}

static void takes(struct pool_client *c, struct json_object *said)
{
	struct pool *p = c->pool;
	unsigned at = (unsigned)c->at;
	struct json_object *o;

	if (!ffs_cli_json_bool(said, "taken")) {
		lose(c);
		return;
	}
	ffs_pool_taken(&p->book, at, ffs_now_ns());
	p->child[at].client = NULL;
	c->at = -1;
	pool_taken(p, at);
	o = json_object_new_object();
	json_object_object_add(o, "yours", json_object_new_uint64(p->book.place[at].id));
	pool_client_answer(c, o);
}

static void on_line(struct pool_client *c, size_t len)
{
	struct json_object *o = parse(c->in, len);

	c->in_len -= len + 1;
	memmove(c->in, c->in + len + 1, c->in_len);
	if (c->state == POOL_OFFERED)
		takes(c, o);
	else if (!o)
		pool_client_refuse(c, EINVAL, "a request is one line with one JSON object");
	else
		obey(c, o);
	json_object_put(o);
}

/* False: there is nothing more of it, or no room. */
static bool fill(struct pool_client *c)
{
	size_t room = c->in_room ? 4 * c->in_room : FIRST_ROOM;
	ssize_t n;
	char *in;

	if (c->in_len == c->in_room) {
		in = room > POOL_REQUEST_MAX ? NULL : realloc(c->in, room);
		if (!in)
			return false;
		c->in = in;
		c->in_room = room;
	}
	n = recv(c->fd, c->in + c->in_len, c->in_room - c->in_len, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (n <= 0)
		return false;
	c->in_len += (size_t)n;
	return true;
}

/* ---- events ---- */

static bool listens(const struct pool_client *c)
{
	return c->state == POOL_SAYS || c->state == POOL_OFFERED;
}

short pool_client_events(const struct pool_client *c)
{
	/* the end of a connection is told in any case, that of the other's half too */
	return (short)((listens(c) ? POLLIN : 0) | POLLRDHUP | (c->out_at < c->out_len ? POLLOUT : 0));
}

void pool_client_ready(struct pool_client *c, short revents)
{
	char *end;

	if (c->fd < 0)
		return;
	if (listens(c) && revents & POLLIN) {
		if (!fill(c)) {
			if (c->in_room == POOL_REQUEST_MAX && c->in_len == c->in_room)
				pool_client_refuse(
					c, E2BIG, "a request has at most %u bytes", POOL_REQUEST_MAX);
			else
				lose(c);
			return;
		}
		end = memchr(c->in, '\n', c->in_len);
		if (end)
			on_line(c, (size_t)(end - c->in));
		return;
	}
	if (revents & (POLLHUP | POLLRDHUP | POLLERR | POLLNVAL))
		lose(c);
	else if (revents & POLLOUT)
		flush(c);
}

/* What a thread does for it is bounded by what it asked for. */
static uint64_t work_deadline(const struct pool_client *c)
{
	uint64_t least = c->waiter.asked_ns + POOL_WORK_NS;

	return c->waiter.deadline_ns > least ? c->waiter.deadline_ns : least;
}

uint64_t pool_client_due(const struct pool_client *c)
{
	uint64_t work = c->works && !c->gone && !c->late ? work_deadline(c) : UINT64_MAX;

	return work < c->deadline_ns ? work : c->deadline_ns;
}

void pool_client_check(struct pool_client *c, uint64_t now_ns)
{
	int expected = POOL_OPEN;

	if (c->works && !c->gone && !c->late && now_ns >= work_deadline(c)) {
		c->late = true;
		if (!atomic_compare_exchange_strong(&c->order->state, &expected, POOL_CANCELLED) &&
			expected == POOL_BEGUN)
			ffs_child_kill(&c->pool->child[c->at].vm);
		return;
	}
	if (now_ns < c->deadline_ns)
		return;
	if (c->state == POOL_SAYS)
		pool_client_refuse(c, ETIMEDOUT, "no request came within %llu s",
			(unsigned long long)(POOL_TALK_NS / FFS_NS_PER_S));
	else
		lose(c);
}
