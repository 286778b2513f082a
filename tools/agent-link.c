/* The link process of one VM (agent-link.h).
 *
 * Owns the connection to the agent and those of its clients. One thread; it waits in poll(2) only, and what the guest says
 * is believed in nothing: a stream's frames go to the client whose stream it is, or nowhere, and a client for whom more
 * comes than it has asked for is let go. It ends with the VM: by the end of the process (pidfd) or of the connection. */
#include "agent-link.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent-handshake.h"
#include "agent/out.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "json-log.h"

#define CLIENTS 64u
#define ATTEMPT_NS 500000000ull /* HELLO is said again after that */
#define REST_MAX 256u           /* reads of a connection whose other end is gone */
#define AGENT_MANY (256u << 10) /* towards the guest: clients are not read beyond */
#define CLIENT_MANY (1u << 20)  /* towards a client: no guest that keeps to the windows gets there */

struct client {
	int fd; /* -1: free */
	uint16_t group;
	bool ending; /* gets what is left, and no more */
	bool asks;   /* waits for the guest's next answer to the health monitor */
	struct agent_decoder dec;
	struct agent_out out;
	struct ffs_json_log *log; /* for the main command that it will ask for */
};

struct link {
	const struct ffs_agent_link *l;
	int listener;
	struct ffs_agent_vm vm;
	bool over;
	struct ffs_handshake hs;
	struct ffs_health health;
	struct agent_hello hello;
	uint8_t kind;
	struct agent_ack ack;
	uint64_t hello_due_ns;
	struct agent_decoder dec;
	struct agent_out out;
	struct client client[CLIENTS];
	uint16_t last_group;
	struct ffs_json_log *log; /* of the main command of that group, whether its client is there or not */
	uint16_t log_group;
};

/* ---- buffers ---- */

/* -errno: it is gone. */
static int flush(int fd, struct agent_out *o)
{
	while (agent_out_waits(o)) {
		ssize_t n = send(fd, o->p + o->at, agent_out_waits(o), MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN ? 0 : -errno;
		agent_out_sent(o, (size_t)n);
	}
	return 0;
}

/* ---- what the guest is told ---- */

static void to_agent(struct link *k, uint8_t type, uint32_t stream, const void *payload, size_t len)
{
	if (!agent_out_frame(&k->out, type, stream, payload, len))
		ffs_handshake_fail(&k->hs, ENOMEM, "no memory for what the guest is to be told", NULL);
}

static void say_hello(struct link *k, uint64_t now)
{
	uint8_t payload[256];

	k->hello.wall_ns = ffs_wall_ns();
	to_agent(k, AGENT_HELLO, 0, payload, agent_hello_make(&k->hello, payload));
	k->hello_due_ns = now + ATTEMPT_NS;
}

/* ---- what is known of it, as JSON ---- */

static struct json_object *timing(const struct link *k)
{
	static const char *const kinds[] = {"same", "first", "restored"};
	struct json_object *o = json_object_new_object(), *phases = json_object_new_object(),
			   *guest = json_object_new_object();
	uint64_t from = k->hs.began_ns;
	char uuid[37];

	ffs_uuid_text(k->hello.epoch, uuid);
	json_object_object_add(o, "epoch", json_object_new_string(uuid));
	json_object_object_add(o, "pid", json_object_new_int((int)k->vm.id.pid));
	json_object_object_add(o, "guest_was", json_object_new_string(kinds[k->kind < 3 ? k->kind : 0]));
	json_object_object_add(o, "healthy", json_object_new_boolean(k->health.healthy));
	json_object_object_add(o, "missed",
		json_object_new_int((int)k->health.missed)); /* answers, since the last that came */
	json_object_object_add(
		o, "due", k->hs.next < FFS_EDGES ? json_object_new_string(ffs_edge_name(k->hs.next)) : NULL);
	for (unsigned i = 0; i < k->hs.next && i < FFS_EDGES; i++) {
		json_object_object_add(
			phases, ffs_edge_name(i), json_object_new_uint64(k->hs.at_ns[i] - from));
		from = k->hs.at_ns[i];
	}
	json_object_object_add(o, "began_ns", json_object_new_uint64(k->hs.began_ns)); /* CLOCK_MONOTONIC */
	json_object_object_add(o, "phases_ns", phases);
	json_object_object_add(o, "total_ns", json_object_new_uint64(from - k->hs.began_ns));
	json_object_object_add(guest, "rebind", json_object_new_uint64(k->ack.rebind_ns));
	json_object_object_add(guest, "clock", json_object_new_uint64(k->ack.clock_ns));
	json_object_object_add(guest, "entropy", json_object_new_uint64(k->ack.entropy_ns));
	json_object_object_add(guest, "network", json_object_new_uint64(k->ack.network_ns));
	json_object_object_add(o, "guest_ns", guest);
	json_object_object_add(o, "error", k->hs.failed ? json_object_new_string(k->hs.why.text) : NULL);
	return o;
}

static const char *text_of(struct json_object *o)
{
	return json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
}

/* ---- clients ---- */

static bool has_log(const struct link *k, uint16_t group)
{
	return k->log && k->log_group == group;
}

static void drop(struct link *k, struct client *c)
{
	if (!k->over && k->hs.next == FFS_EDGES && !has_log(k, c->group))
		to_agent(k, AGENT_HANGUP, (uint32_t)c->group << 16, NULL, 0);
	ffs_close_fd(&c->fd);
	agent_out_free(&c->out);
	if (c->log)
		ffs_json_log_close(c->log, ffs_wall_ns(), NULL);
	c->log = NULL;
}

static void to_client(
	struct link *k, struct client *c, uint8_t type, uint32_t stream, const void *payload, size_t len)
{
	if (c->ending)
		return;
	if (agent_out_waits(&c->out) > CLIENT_MANY || !agent_out_frame(&c->out, type, stream, payload, len) ||
		flush(c->fd, &c->out) < 0)
		drop(k, c);
}

static void end_client(struct link *k, struct client *c, const char *why)
{
	to_client(k, c, AGENT_ERROR, 0, why, strlen(why));
	c->ending = true;
	if (c->fd >= 0 && !agent_out_waits(&c->out))
		drop(k, c);
}

static struct client *client_of(struct link *k, uint16_t group)
{
	for (unsigned i = 0; i < CLIENTS; i++)
		if (k->client[i].fd >= 0 && k->client[i].group == group)
			return &k->client[i];
	return NULL;
}

static void take_client(struct link *k)
{
	struct client *c = NULL;
	int fd;

	for (unsigned i = 0; i < CLIENTS && !c; i++)
		if (k->client[i].fd < 0)
			c = &k->client[i];
	fd = c ? accept4(k->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK) : -1;
	if (fd < 0)
		return;
	do
		k->last_group++; /* of those that went lately something may still be under way */
	while (!k->last_group || client_of(k, k->last_group) || has_log(k, k->last_group));
	*c = (struct client){.fd = fd, .group = k->last_group};
}

static void answer(struct link *k, struct client *c)
{
	struct json_object *o = timing(k);

	c->asks = false;
	to_client(k, c, AGENT_STATUS, 0, text_of(o), strlen(text_of(o)));
	json_object_put(o);
}

static void answer_all(struct link *k)
{
	for (unsigned i = 0; i < CLIENTS; i++)
		if (k->client[i].fd >= 0 && k->client[i].asks)
			answer(k, &k->client[i]);
}

/* ---- the log of the main command ---- */

static void open_log(struct link *k, struct client *c, const struct agent_frame *f)
{
	_cleanup_free_ char *path = strndup((const char *)f->payload, f->len);
	struct ffs_error err = {0};

	if (!path || path[0] != '/' || c->log)
		ffs_error_set(&err, EINVAL, "that is no name for a log");
	else
		ffs_json_log_open(path, FFS_JSON_LOG_BYTES, FFS_JSON_LOG_FILES, &c->log, &err);
	if (err.code)
		end_client(k, c, err.text);
}

/* It is the guest's from here on: its client may go. */
static bool begin_log(struct link *k, struct client *c)
{
	if (k->log)
		return false;
	k->log = c->log;
	k->log_group = c->group;
	c->log = NULL;
	return true;
}

static void end_log(struct link *k, struct client *c)
{
	_cleanup_free_ char *loss = NULL;

	ffs_json_log_close(k->log, ffs_wall_ns(), &loss);
	k->log = NULL;
	if (c && loss)
		to_client(k, c, AGENT_LOG, 0, loss, strlen(loss));
}

/* What the guest says of the command that has a log. True: it is no client's. */
static bool to_log(struct link *k, struct client *c, const struct agent_frame *f)
{
	uint8_t le[4];
	struct agent_writer w = {le, 0, 4, false};

	if (f->type == AGENT_EXIT || f->type == AGENT_REFUSED) {
		end_log(k, c);
		/* a guest that is to be switched off waits for that */
		if (!c)
			to_agent(k, AGENT_HANGUP, f->stream & 0xffff0000, NULL, 0);
	}
	if (f->type != AGENT_STDOUT && f->type != AGENT_STDERR)
		return !c;
	ffs_json_log_put(k->log, f->type == AGENT_STDERR, f->payload, f->len, ffs_wall_ns());
	agent_put(&w, f->len, 4);
	to_agent(k, AGENT_WINDOW_MORE, f->stream, le, 4);
	return true;
}

static void from_client(struct link *k, struct client *c, const struct agent_frame *f)
{
	bool through = k->hs.next == FFS_EDGES;
	static const char spawned[] = "\x72\0\0\0" /* EALREADY */ "container main already spawned";

	switch (f->type) {
	case AGENT_STATUS:
		c->asks = true;
		if (through)
			answer(k, c);
		return;
	case AGENT_HEALTH:
		c->asks = true;
		if (!f->len || !f->payload[0])
			answer(k, c);
		else if (through)
			ffs_health_now(&k->health, ffs_now_ns());
		return;
	case AGENT_LOG:
		open_log(k, c, f);
		return;
	case AGENT_MAIN:
	case AGENT_EXEC:
	case AGENT_STDIN:
	case AGENT_STDIN_END:
	case AGENT_SIGNAL:
	case AGENT_RESIZE:
	case AGENT_WINDOW_MORE:
		if (!through)
			end_client(k, c, "the guest is not ready yet: that is to be waited for");
		else if (!f->stream || f->stream > 0xffff)
			return;
		else if (f->type == AGENT_MAIN && c->log && !begin_log(k, c))
			to_client(k, c, AGENT_REFUSED, f->stream, spawned, sizeof(spawned) - 1);
		else
			to_agent(k, f->type, (uint32_t)c->group << 16 | f->stream, f->payload, f->len);
		return;
	default:
		end_client(k, c, "that is nothing a client may say");
	}
}

static void read_client(struct link *k, struct client *c)
{
	uint8_t in[16384];
	ssize_t n = recv(c->fd, in, sizeof(in), MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		drop(k, c);
		return;
	}
	for (size_t at = 0, used; at < (size_t)n && c->fd >= 0 && !c->ending; at += used) {
		struct agent_frame f;

		if (agent_decode(&c->dec, in + at, (size_t)n - at, &used, &f) == 1)
			from_client(k, c, &f);
	}
}

/* ---- what the guest says ---- */

static void edge(struct link *k, enum ffs_edge e, uint64_t now)
{
	if (ffs_handshake_edge(&k->hs, e, now, NULL) == 0 && e == FFS_EDGE_OUTPUT) {
		to_agent(k, AGENT_ACCEPT, 0, k->hello.nonce, 16);
		ffs_health_begin(&k->health, now);
	}
}

static bool is_ours(const struct link *k, const struct agent_frame *f)
{
	return f->stream == 0 && f->len >= 16 && !memcmp(f->payload, k->hello.nonce, 16);
}

static void from_agent_itself(struct link *k, const struct agent_frame *f, uint64_t now)
{
	char text[200];

	if (f->type == AGENT_PONG && k->hs.next >= FFS_EDGE_HEALTHY && k->health.waiting) {
		ffs_health_answer(&k->health, now);
		if (k->hs.next == FFS_EDGE_HEALTHY)
			edge(k, FFS_EDGE_HEALTHY, now);
		if (!k->hs.failed)
			answer_all(k);
	} else if (f->type == AGENT_ERROR && k->hs.next > FFS_EDGE_BEGUN && k->hs.next < FFS_EDGES) {
		/* it has no nonce; before BEGIN everything is of an older session */
		snprintf(text, sizeof(text), "the guest's agent says: %.*s",
			(int)(f->len > 150 ? 150 : f->len), (const char *)f->payload);
		ffs_handshake_fail(&k->hs, EPROTO, text, NULL);
	} else if (is_ours(k, f)) {
		if (f->type == AGENT_BEGIN && f->len >= 33) {
			k->kind = f->payload[32];
			edge(k, FFS_EDGE_BEGUN, now);
		} else if (f->type == AGENT_REBOUND) {
			edge(k, FFS_EDGE_REBOUND, now);
		} else if (f->type == AGENT_ACK && agent_ack_parse(f, &k->ack)) {
			edge(k, FFS_EDGE_ACKNOWLEDGED, now);
		} else if (f->type == AGENT_OUTPUT) {
			edge(k, FFS_EDGE_OUTPUT, now);
		}
	}
}

static void from_agent(struct link *k, const struct agent_frame *f, uint64_t now)
{
	struct client *c;

	if (!(f->stream >> 16)) {
		from_agent_itself(k, f, now);
		return;
	}
	if (k->hs.next != FFS_EDGES)
		return; /* of a session of the past */
	c = client_of(k, (uint16_t)(f->stream >> 16));
	if (has_log(k, (uint16_t)(f->stream >> 16)) && to_log(k, c, f))
		return;
	if (c && ((f->type >= AGENT_STARTED && f->type <= AGENT_EXIT) || f->type == AGENT_WINDOW_MORE))
		to_client(k, c, f->type, f->stream & 0xffff, f->payload, f->len);
}

/* True when something was there. */
static bool read_agent(struct link *k)
{
	uint8_t in[16384];
	ssize_t n = recv(k->vm.fd, in, sizeof(in), MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (n <= 0) {
		k->over = true;
		return false;
	}
	for (size_t at = 0, used; at < (size_t)n && !k->hs.failed; at += used) {
		struct agent_frame f;

		if (agent_decode(&k->dec, in + at, (size_t)n - at, &used, &f) == 1)
			from_agent(k, &f, ffs_now_ns());
	}
	return true;
}

/* ---- the loop ---- */

/* What is due; when the next thing will be. */
static uint64_t do_what_is_due(struct link *k, uint64_t now)
{
	uint64_t due;

	if (k->hs.failed || ffs_handshake_check(&k->hs, now, NULL) < 0)
		return UINT64_MAX;
	due = ffs_handshake_deadline(&k->hs);
	if (k->hs.next == FFS_EDGE_BEGUN) {
		if (now >= k->hello_due_ns)
			say_hello(k, now);
		if (k->hello_due_ns < due)
			due = k->hello_due_ns;
	}
	if (k->hs.next >= FFS_EDGE_HEALTHY) {
		if (ffs_health_ask(&k->health, now))
			to_agent(k, AGENT_PING, 0, "health", 6);
		if (k->health.due_ns < due)
			due = k->health.due_ns;
	}
	return due;
}

static void wait_and_serve(struct link *k, uint64_t due)
{
	struct pollfd p[3 + CLIENTS];
	bool serve = agent_out_waits(&k->out) < AGENT_MANY;

	p[0] = (struct pollfd){.fd = k->hs.failed ? -1 : k->vm.fd,
		.events = POLLIN | (agent_out_waits(&k->out) ? POLLOUT : 0)};
	p[1] = (struct pollfd){.fd = k->vm.pidfd, .events = POLLIN};
	p[2] = (struct pollfd){.fd = k->listener, .events = POLLIN};
	for (unsigned i = 0; i < CLIENTS; i++) {
		struct client *c = &k->client[i];

		p[3 + i] = (struct pollfd){.fd = c->fd,
			.events = (short)((serve && !c->ending ? POLLIN : 0) |
					  (agent_out_waits(&c->out) ? POLLOUT : 0))};
	}
	if (poll(p, 3 + CLIENTS, due == UINT64_MAX ? -1 : ffs_ms_until(due)) < 0)
		return;
	if (p[1].revents)
		k->over = true;
	if (p[0].revents & (POLLIN | POLLHUP | POLLERR))
		read_agent(k);
	if (p[2].revents)
		take_client(k);
	for (unsigned i = 0; i < CLIENTS; i++) {
		struct client *c = &k->client[i];

		if (p[3 + i].fd < 0 || c->fd != p[3 + i].fd)
			continue;
		if (p[3 + i].revents & POLLOUT &&
			(flush(c->fd, &c->out) < 0 || (c->ending && !agent_out_waits(&c->out))))
			drop(k, c);
		if (c->fd >= 0 && p[3 + i].revents & POLLIN)
			read_client(k, c);
		else if (c->fd >= 0 && p[3 + i].revents & (POLLHUP | POLLERR))
			drop(k, c);
	}
	if (!k->hs.failed && flush(k->vm.fd, &k->out) < 0)
		k->over = true;
}

/* ---- its beginning and end ---- */

/* Whoever comes from now on starts another link. Under the lock under which that is done; and we still listen, so no other
 * can have taken the name. */
static void remove_name(const struct ffs_agent_link *l)
{
	_cleanup_close_ int lock = ffs_agent_lock(l->socket, NULL);
	char path[120];

	snprintf(path, sizeof(path), "%.107s.link", ffs_agent_path(l->socket));
	if (lock >= 0)
		unlink(path);
}

/* Everybody gets the reason, also who was not let in yet, and what was still on its way; who does not take it is not
 * waited for long. */
static void say_goodbye(struct link *k)
{
	uint64_t deadline = ffs_now_ns() + 5 * FFS_NS_PER_S;
	const char *why = k->hs.failed ? k->hs.why.text : "the VM has ended";
	bool left = true;

	k->over = true;
	remove_name(k->l);
	for (unsigned before = 0, now = 1; before != now; before = now) {
		now = 0;
		take_client(k);
		for (unsigned i = 0; i < CLIENTS; i++) {
			if (k->client[i].fd >= 0)
				end_client(k, &k->client[i], why);
			now += k->client[i].fd >= 0;
		}
	}
	while (left && ffs_now_ns() < deadline) {
		struct pollfd p[CLIENTS];

		left = false;
		for (unsigned i = 0; i < CLIENTS; i++) {
			struct client *c = &k->client[i];

			if (c->fd >= 0 && (flush(c->fd, &c->out) < 0 || !agent_out_waits(&c->out)))
				drop(k, c);
			p[i] = (struct pollfd){.fd = c->fd, .events = POLLOUT};
			left |= c->fd >= 0;
		}
		if (left && poll(p, CLIENTS, ffs_ms_until(deadline)) < 0)
			return;
	}
}

int ffs_agent_link_run(const struct ffs_agent_link *l, int listener)
{
	static struct link k;
	struct ffs_error err = {0};

	k = (struct link){.l = l, .vm = {.fd = -1, .pidfd = -1}, .listener = listener};
	for (unsigned i = 0; i < CLIENTS; i++)
		k.client[i].fd = -1;
	signal(SIGPIPE, SIG_IGN);
	ffs_handshake_begin(&k.hs, ffs_now_ns(), l->ready_s * FFS_NS_PER_S);
	if (getrandom(k.hello.nonce, 16, 0) != 16 || getrandom(k.hello.entropy, 32, 0) != 32)
		ffs_handshake_fail(&k.hs, EIO, "no random numbers", NULL);
	else if (ffs_agent_connect(l, k.hs.began_ns + k.hs.ready_ns, &k.vm, &err) < 0) {
		/* nobody took the connection until the deadline: that is what the edge says */
		if (err.code != EAGAIN || ffs_handshake_check(&k.hs, ffs_now_ns(), NULL) == 0)
			ffs_handshake_fail(&k.hs, err.code, err.text, NULL);
	} else {
		memcpy(k.hello.epoch, k.vm.epoch, 16);
		edge(&k, FFS_EDGE_CONNECTED, ffs_now_ns());
	}
	/* a zero first: what somebody else left half said ends there */
	if (!k.hs.failed && !agent_out_bytes(&k.out, "", 1))
		ffs_handshake_fail(&k.hs, ENOMEM, "no memory for what the guest is to be told", NULL);
	while (!k.over) {
		uint64_t due = do_what_is_due(&k, ffs_now_ns());

		if (k.hs.failed)
			break;
		if (flush(k.vm.fd, &k.out) < 0)
			break;
		wait_and_serve(&k, due);
	}
	/* what it has said to its end, and is here already: the end of a command may be among it */
	for (unsigned i = 0; i < REST_MAX && k.vm.fd >= 0 && !k.hs.failed && read_agent(&k); i++)
		;
	if (k.log)
		end_log(&k, client_of(&k, k.log_group));
	if (!k.hs.failed && k.hs.next < FFS_EDGES)
		ffs_handshake_fail(&k.hs, ECONNRESET, "the VM ended before its agent was ready", NULL);
	say_goodbye(&k);
	return 0;
}
