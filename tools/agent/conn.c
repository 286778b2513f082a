/* One connection to a host: bytes in, frames to whom they concern, frames out.
 *
 * Edge-triggered: a virtio-serial port without a host always reports a hang-up, and would keep the loop busy. So whatever
 * happened, all is read that can be and all is written. */
#include "agent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define MANY (256u << 10)
#define HUNG_NS 500000000

static struct conn *all;

static void end_session(struct conn *c)
{
	process_hangup(c, true, 0);
	c->session = false;
	agent_out_clear(&c->out);
}

/* That a port's host is gone comes to us by another queue than what hosts say, and later when this machine is busy: the next
 * one's HELLO may have been answered before. So its end is not believed at once: who is there again within HUNG_NS goes on,
 * and if it is another, its HELLO has ended what the one before had. */
static void on_patience(struct watch *w, uint32_t events)
{
	uint64_t n;

	if (read(w->fd, &n, sizeof(n)) < 0)
		return;
	for (struct conn *c = all; c; c = c->next) {
		if (c->hung && c->session && !c->gone)
			end_session(c);
		c->hung = false;
	}
}

static void hang_up_later(struct conn *c)
{
	static struct watch patience = {.fd = -1, .ready = on_patience};
	struct itimerspec t = {.it_value.tv_nsec = HUNG_NS};

	if (c->hung || !c->session)
		return;
	c->hung = true;
	if (patience.fd < 0)
		patience.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (patience.fd < 0 || timerfd_settime(patience.fd, 0, &t, NULL) < 0)
		end_session(c);
	else
		watch_arm(&patience, EPOLLIN);
}

static void close_conn(struct conn *c)
{
	end_session(c);
	watch_close(&c->w);
	c->gone = true;
}

static void free_gone(void)
{
	for (struct conn **p = &all; *p;) {
		struct conn *c = *p;

		if (!c->gone) {
			p = &c->next;
			continue;
		}
		*p = c->next;
		agent_out_free(&c->out);
		free(c);
	}
}

bool conn_full(const struct conn *c)
{
	return agent_out_waits(&c->out) > MANY;
}

static void flush(struct conn *c)
{
	bool was_full = conn_full(c);

	while (c->w.fd >= 0 && agent_out_waits(&c->out)) {
		ssize_t n = write(c->w.fd, c->out.p + c->out.at, agent_out_waits(&c->out));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break; /* there will be room, or a hang-up */
		agent_out_sent(&c->out, (size_t)n);
	}
	if (was_full && !conn_full(c))
		process_resume(c);
}

void conn_send(struct conn *c, uint8_t type, uint32_t stream, const void *payload, size_t len)
{
	if (c->gone || !c->session)
		return;
	/* a zero in front of the first: half of an older session's frame may be under way */
	if ((type == AGENT_BEGIN && !agent_out_bytes(&c->out, "", 1)) ||
		!agent_out_frame(&c->out, type, stream, payload, len)) {
		say("forkfs-agent: no memory for what the host is to be told");
		return;
	}
	flush(c);
}

static void dispatch(struct conn *c, const struct agent_frame *f)
{
	if (f->type == AGENT_HELLO) {
		session_hello(c, f);
		return;
	}
	if (!c->session)
		return; /* of another session */
	switch (f->type) {
	case AGENT_PING:
		conn_send(c, AGENT_PONG, 0, f->payload, f->len > 64 ? 64 : f->len);
		break;
	case AGENT_EXEC:
		process_exec(c, f);
		break;
	case AGENT_MAIN:
		process_main(c, f);
		break;
	case AGENT_HANGUP:
		process_hangup(c, false, f->stream >> 16);
		break;
	default:
		process_frame(c, f);
	}
}

static void take(struct conn *c, const uint8_t *in, size_t len)
{
	while (len && !c->gone) {
		struct agent_frame f;
		size_t used;
		int r = agent_decode(&c->dec, in, len, &used, &f);

		in += used;
		len -= used;
		if (r == 1)
			dispatch(c, &f);
		else if (r == -EPROTONOSUPPORT)
			conn_send(c, AGENT_ERROR, 0, "this agent speaks version 1", 27);
	}
}

static void on_ready(struct watch *w, uint32_t events)
{
	struct conn *c = (struct conn *)((char *)w - offsetof(struct conn, w));
	uint8_t in[16384];

	while (!c->gone) {
		ssize_t n = read(c->w.fd, in, sizeof(in));

		if (n > 0) {
			c->hung = false;
			take(c, in, (size_t)n);
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) {
			c->hung = false;
			break;
		}
		if (!c->port || (n < 0 && errno == ENODEV))
			close_conn(c);
		else
			hang_up_later(c); /* the port stays for the next */
		break;
	}
	if (!c->gone)
		flush(c);
	free_gone();
}

void conn_add(int fd, const char *kind, bool port)
{
	struct conn *c = calloc(1, sizeof(*c));

	if (!c) {
		close(fd);
		return;
	}
	*c = (struct conn){.w = {.fd = fd, .ready = on_ready}, .kind = kind, .port = port, .next = all};
	all = c;
	watch_arm(&c->w, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
}

void conn_close_others(const struct conn *keep)
{
	for (struct conn *c = all; c; c = c->next)
		if (c != keep && !c->gone && !c->port)
			close_conn(c); /* freed by the handler that runs now */
}
