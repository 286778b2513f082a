/* Owns one QMP connection: its socket, the thread that reads events while nobody calls, the reply that is
 * awaited.
 *
 * Threads: the caller (one at a time) and the reader. `io` guards `claims` and `stopping`, and is held by the
 * reader while it handles input, so that a caller which has set `claims` under it owns everything else until
 * it releases: the framer, the awaited reply, the flags. No other lock is taken under it, except by hooks.
 * The reader sleeps without a timer. */
#include "vmm/qmp.h"

#include <json-c/json.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cancel.h"
#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "vmm/qmp-frame.h"

#define BEAT_MS 50
#define MAX_GARBAGE 64

struct ffs_qmp {
	int sock, pidfd, wake;
	struct ffs_qmp_hooks hooks;
	struct ffs_cancel *cancel; /* during ffs_qmp_open() only */
	pthread_t reader;
	bool reader_runs;
	pthread_mutex_t io;
	unsigned claims;
	bool stopping;
	struct ffs_qmp_framer framer;
	struct json_tokener *tok;
	struct json_object *greeting;
	struct json_object *reply; /* to `want`, once it came */
	char command[64];          /* the one `want` belongs to */
	char nonce[17];            /* makes our ids unlike anybody else's on the same stream */
	uint64_t want;             /* 0: none */
	uint64_t last_id;
	unsigned garbage;
	int dead; /* -errno */
	bool suspect;
	bool gone_told;
};

static int fault(const char *command, const char *stage)
{
#ifdef FFS_FAULTS
	char point[96];

	snprintf(point, sizeof(point), "qmp-%.64s%s", command, stage);
	return FFS_FAULT(point);
#else
	return 0;
#endif
}

/* ---- input: by the reader under io, or by the caller while claimed ---- */

static void tell_gone(struct ffs_qmp *q)
{
	if (!q->gone_told && q->hooks.gone)
		q->hooks.gone(q->hooks.arg);
	q->gone_told = true;
}

static void die(struct ffs_qmp *q, int r)
{
	if (q->dead)
		return;
	q->dead = r;
	if (q->pidfd < 0)
		tell_gone(q);
}

static bool id_is(struct ffs_qmp *q, struct json_object *id, uint64_t n)
{
	char want[48];

	if (!json_object_is_type(id, json_type_string))
		return false;
	snprintf(want, sizeof(want), "ffs-%s-%llu", q->nonce, (unsigned long long)n);
	return strcmp(json_object_get_string(id), want) == 0;
}

static void handle_message(struct ffs_qmp *q, struct json_object *msg)
{
	struct json_object *v, *id;

	if (json_object_object_get_ex(msg, "event", &v)) {
		struct json_object *data = NULL;

		if (json_object_object_get_ex(msg, "data", &data) &&
			!json_object_is_type(data, json_type_object))
			data = NULL;
		if (json_object_is_type(v, json_type_string) && q->hooks.event)
			q->hooks.event(q->hooks.arg, json_object_get_string(v), data);
	} else if (json_object_object_get_ex(msg, "return", NULL) ||
		   json_object_object_get_ex(msg, "error", NULL)) {
		if (json_object_object_get_ex(msg, "id", &id) && q->want && id_is(q, id, q->want)) {
			if (!q->reply)
				q->reply = json_object_get(msg);
		} else if (!json_object_object_get_ex(msg, "id", &id) ||
			   !json_object_is_type(id, json_type_string) ||
			   strncmp(json_object_get_string(id), "ffs-", 4) != 0 ||
			   strncmp(json_object_get_string(id) + 4, q->nonce, strlen(q->nonce)) != 0) {
			/* an answer to nobody, or to the watchdog: others have used the stream */
			q->suspect = true;
		}
	} else if (json_object_object_get_ex(msg, "QMP", &v)) {
		if (!q->greeting && json_object_is_type(v, json_type_object))
			q->greeting = json_object_get(v);
	} else {
		q->suspect = true;
	}
}

static void handle_input(struct ffs_qmp *q)
{
	char *frame;
	size_t len;
	int r;

	while (!q->dead && (r = ffs_qmp_framer_next(&q->framer, &frame, &len)) != 0) {
		if (r < 0) {
			die(q, -EPROTO);
			return;
		}
		json_tokener_reset(q->tok);
		struct json_object *msg = json_tokener_parse_ex(q->tok, frame, (int)len);

		if (!msg || !json_object_is_type(msg, json_type_object)) {
			q->suspect = true;
			if (++q->garbage > MAX_GARBAGE || !q->greeting)
				die(q, -EPROTO);
		} else {
			handle_message(q, msg);
		}
		json_object_put(msg);
	}
}

/* Take what is there; false when nothing was. */
static bool receive(struct ffs_qmp *q)
{
	size_t room;
	char *buf = ffs_qmp_framer_room(&q->framer, &room);

	if (!buf) {
		die(q, -ENOMEM);
		return false;
	}
	ssize_t n = recv(q->sock, buf, room, MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (n <= 0) {
		die(q, -ECONNRESET);
		return false;
	}
	ffs_qmp_framer_added(&q->framer, (size_t)n);
	handle_input(q);
	return true;
}

static void *reader_main(void *arg)
{
	struct ffs_qmp *q = arg;
	bool watch_pid = q->pidfd >= 0;
	bool watch_sock = true;

	for (;;) {
		struct pollfd p[3] = {
			{.fd = q->wake, .events = POLLIN},
			{.fd = watch_pid ? q->pidfd : -1, .events = POLLIN},
			{.fd = watch_sock ? q->sock : -1, .events = POLLIN},
		};

		if (poll(p, 3, -1) < 0 && errno != EINTR)
			return NULL;
		eventfd_t woken;

		if ((p[0].revents & POLLIN) && eventfd_read(q->wake, &woken) < 0 && errno != EAGAIN)
			return NULL;
		pthread_mutex_lock(&q->io);
		if (q->stopping) {
			pthread_mutex_unlock(&q->io);
			return NULL;
		}
		if (!q->claims && !q->dead && p[2].revents)
			receive(q);
		/* only this thread touches gone_told when there is a pidfd */
		if (p[1].revents) {
			tell_gone(q);
			watch_pid = false;
		}
		watch_sock = !q->claims && !q->dead;
		pthread_mutex_unlock(&q->io);
	}
}

/* ---- calls ---- */

static void wake_reader(struct ffs_qmp *q)
{
	/* fails only when the counter is full, and then the reader is being woken already */
	if (q->reader_runs && eventfd_write(q->wake, 1) < 0)
		return;
}

void ffs_qmp_claim(struct ffs_qmp *q)
{
	pthread_mutex_lock(&q->io);
	bool first = q->claims++ == 0;

	pthread_mutex_unlock(&q->io);
	if (first)
		wake_reader(q);
}

void ffs_qmp_release(struct ffs_qmp *q)
{
	pthread_mutex_lock(&q->io);
	bool last = --q->claims == 0;

	pthread_mutex_unlock(&q->io);
	if (last)
		wake_reader(q);
}

/* Wait for input (or room, when `events` says so) and handle input: 0, or why there will be none. */
static int pump(struct ffs_qmp *q, short events, uint64_t deadline_ns)
{
	struct pollfd p[2] = {
		{.fd = q->sock, .events = events}, {.fd = ffs_cancel_fd(q->cancel), .events = POLLIN}};
	int ms = ffs_ms_until(deadline_ns);

	if (poll(p, 2, ms < BEAT_MS ? ms : BEAT_MS) < 0 && errno != EINTR)
		return -errno;
	if (q->hooks.beat)
		q->hooks.beat(q->hooks.arg);
	if (p[1].revents & POLLIN)
		return -EINTR;
	if (p[0].revents & ~POLLOUT)
		receive(q);
	return q->dead;
}

int ffs_qmp_wait(struct ffs_qmp *q, bool (*done)(void *arg), void *arg, uint64_t deadline_ns)
{
	while (!done(arg)) {
		if (q->dead)
			return -ECONNRESET;
		if (ffs_now_ns() >= deadline_ns)
			return -ETIMEDOUT;
		int r = pump(q, POLLIN, deadline_ns);

		if (r == -EINTR)
			return r;
	}
	return 0;
}

void ffs_qmp_drain(struct ffs_qmp *q)
{
	/* a VMM that talks without end must not keep us: what matters came first */
	for (unsigned i = 0; i < 256 && !q->dead && receive(q); i++)
		;
}

static int say_dead(struct ffs_qmp *q, struct ffs_error *err)
{
	if (q->dead == -EPROTO)
		return ffs_error_set(err, EPROTO,
			"the monitor sent what is no QMP (a message is limited to %u KiB and %d levels): the "
			"connection is given up",
			FFS_QMP_LINE_MAX >> 10, FFS_QMP_DEPTH_MAX);
	if (q->dead == -ENOMEM)
		return ffs_error_set(err, ENOMEM, "no memory for the monitor's messages");
	return ffs_error_set(err, ECONNRESET, "the monitor closed the connection");
}

static int send_all(struct ffs_qmp *q, const char *text, size_t len, int fd, uint64_t deadline_ns)
{
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {{0}};
	size_t done = 0;

	while (done < len) {
		struct iovec iov = {.iov_base = (char *)text + done, .iov_len = len - done};
		struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

		if (fd >= 0 && !done) {
			msg.msg_control = control.buf;
			msg.msg_controllen = sizeof(control.buf);
			struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

			c->cmsg_level = SOL_SOCKET;
			c->cmsg_type = SCM_RIGHTS;
			c->cmsg_len = CMSG_LEN(sizeof(int));
			memcpy(CMSG_DATA(c), &fd, sizeof(int));
		}
		ssize_t n = sendmsg(q->sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n > 0) {
			done += (size_t)n;
		} else if (n < 0 && errno == EAGAIN) {
			int r = ffs_now_ns() >= deadline_ns ? -ETIMEDOUT
							    : pump(q, POLLIN | POLLOUT, deadline_ns);

			if (r) {
				/* a command sent by half would swallow the next one */
				if (done)
					die(q, -ECONNRESET);
				return r;
			}
		} else if (n == 0 || errno != EINTR) {
			die(q, -ECONNRESET);
			return -ECONNRESET;
		}
	}
	return 0;
}

int ffs_qmp_send(struct ffs_qmp *q, const char *command, struct json_object *args, int fd,
	uint64_t deadline_ns, struct ffs_error *err)
{
	int r = fault(command, "");

	if (r)
		return ffs_error_set(err, -r, "fault point qmp-%s", command);
	ffs_qmp_claim(q);
	json_object_put(q->reply);
	q->reply = NULL;
	q->want = ++q->last_id;
	snprintf(q->command, sizeof(q->command), "%s", command);
	const char *text = args ? json_object_to_json_string_ext(args, JSON_C_TO_STRING_PLAIN) : "{}";
	_cleanup_free_ char *line = NULL;
	int n = asprintf(&line, "{\"execute\":\"%s\",\"arguments\":%s,\"id\":\"ffs-%s-%llu\"}\n", command,
		text, q->nonce, (unsigned long long)q->want);

	if (n < 0) {
		line = NULL;
		r = ffs_error_set(err, ENOMEM, "no memory for the command %s", command);
	} else if (q->dead) {
		r = say_dead(q, err);
	} else {
		r = send_all(q, line, (size_t)n, fd, deadline_ns);
		if (r == -ETIMEDOUT || r == -EINTR)
			ffs_error_set(err, -r, "the monitor did not take the command %s in time", command);
		else if (r)
			r = say_dead(q, err);
	}
	ffs_qmp_release(q);
	return r;
}

static bool have_reply(void *arg)
{
	return ((struct ffs_qmp *)arg)->reply != NULL;
}

static int read_reply(
	struct ffs_qmp *q, struct json_object *msg, struct json_object **ret, struct ffs_error *err)
{
	struct json_object *v, *desc;

	if (json_object_object_get_ex(msg, "error", &v)) {
		const char *why = "no reason given";

		if (json_object_object_get_ex(v, "desc", &desc) &&
			json_object_is_type(desc, json_type_string))
			why = json_object_get_string(desc);
		return ffs_error_set(err, EREMOTEIO, "QEMU refused %s: %.300s", q->command, why);
	}
	if (ret) {
		json_object_object_get_ex(msg, "return", &v);
		*ret = json_object_get(v);
	}
	return 0;
}

int ffs_qmp_reply(struct ffs_qmp *q, uint64_t deadline_ns, struct json_object **ret, struct ffs_error *err)
{
	ffs_qmp_claim(q);
	int r = ffs_qmp_wait(q, have_reply, q, deadline_ns);

	if (!r && (r = fault(q->command, "-reply")) != 0) {
		ffs_error_set(err, -r, "fault point qmp-%s-reply", q->command);
	} else if (r == -ECONNRESET) {
		r = say_dead(q, err);
	} else if (r) {
		/* the reply may still come, or somebody else has read it */
		q->suspect = true;
		ffs_error_set(err, -r, "the monitor did not answer %s in time", q->command);
	} else {
		r = read_reply(q, q->reply, ret, err);
	}
	json_object_put(q->reply);
	q->reply = NULL;
	q->want = 0;
	ffs_qmp_release(q);
	return r;
}

int ffs_qmp_call(struct ffs_qmp *q, const char *command, struct json_object *args, int fd,
	uint64_t deadline_ns, struct json_object **ret, struct ffs_error *err)
{
	ffs_qmp_claim(q);
	int r = ffs_qmp_send(q, command, args, fd, deadline_ns, err);

	if (!r)
		r = ffs_qmp_reply(q, deadline_ns, ret, err);
	ffs_qmp_release(q);
	return r;
}

/* ---- life ---- */

static bool have_greeting(void *arg)
{
	return ((struct ffs_qmp *)arg)->greeting != NULL;
}

static int negotiate(
	struct ffs_qmp *q, uint64_t deadline_ns, struct json_object **version, struct ffs_error *err)
{
	int r = fault("greeting", "");

	if (r)
		return ffs_error_set(err, -r, "fault point qmp-greeting");
	r = ffs_qmp_wait(q, have_greeting, q, deadline_ns);
	if (r == -ETIMEDOUT)
		return ffs_error_set(err, EBUSY, "no greeting: somebody else is connected to the monitor");
	if (r == -EINTR)
		return ffs_error_set(err, EINTR, "cancelled while waiting for the monitor's greeting");
	if (r && q->dead == -EPROTO)
		return ffs_error_set(
			err, ENOTSUP, "what answers is no QMP monitor (a human monitor, or another program)");
	if (r)
		return say_dead(q, err);
	/* the other side may be slow now that it has begun to talk */
	r = ffs_qmp_call(q, "qmp_capabilities", NULL, -1, deadline_ns + 2 * FFS_NS_PER_S, NULL, err);
	struct json_object *v;

	if (!r && version)
		*version = json_object_object_get_ex(q->greeting, "version", &v) ? json_object_get(v) : NULL;
	return r;
}

static int start_reader(struct ffs_qmp *q)
{
	sigset_t all, old;

	/* signals are for the caller's threads */
	ffs_signals_to_block(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int r = -pthread_create(&q->reader, NULL, reader_main, q);

	pthread_sigmask(SIG_SETMASK, &old, NULL);
	q->reader_runs = r == 0;
	return r;
}

int ffs_qmp_open(int sock, int pidfd, const struct ffs_qmp_hooks *hooks, uint64_t deadline_ns,
	struct ffs_cancel *cancel, struct ffs_qmp **out, struct json_object **version, struct ffs_error *err)
{
	struct ffs_qmp *q = calloc(1, sizeof(*q));
	char uuid[37];

	if (!q) {
		close(sock);
		return ffs_error_set(err, ENOMEM, "no memory for a monitor connection");
	}
	q->sock = sock;
	q->pidfd = pidfd;
	q->hooks = *hooks;
	q->cancel = cancel;
	q->claims = 1;
	ffs_uuid(uuid);
	snprintf(q->nonce, sizeof(q->nonce), "%.8s", uuid);
	pthread_mutex_init(&q->io, NULL);
	ffs_qmp_framer_init(&q->framer, FFS_QMP_LINE_MAX);
	q->tok = json_tokener_new_ex(FFS_QMP_DEPTH_MAX);
	q->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int r = 0;

	if (!q->tok || q->wake < 0)
		r = ffs_error_set(err, q->tok ? errno : ENOMEM, "no resources for a monitor connection");
	if (!r) {
		json_tokener_set_flags(q->tok, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8);
		r = negotiate(q, deadline_ns, version, err);
	}
	q->cancel = NULL;
	if (!r && (r = start_reader(q)) != 0)
		ffs_error_errno(err, -r, "a thread for the monitor");
	if (r) {
		ffs_qmp_close(q);
		return r;
	}
	ffs_qmp_release(q);
	*out = q;
	return 0;
}

int ffs_qmp_fd(const struct ffs_qmp *q)
{
	return q->sock;
}

bool ffs_qmp_is_dead(const struct ffs_qmp *q)
{
	return q->dead != 0;
}

bool ffs_qmp_is_suspect(const struct ffs_qmp *q)
{
	return q->suspect;
}

static void destroy(struct ffs_qmp *q)
{
	close(q->sock);
	ffs_close_fd(&q->wake);
	json_object_put(q->reply);
	json_object_put(q->greeting);
	if (q->tok)
		json_tokener_free(q->tok);
	ffs_qmp_framer_free(&q->framer);
	pthread_mutex_destroy(&q->io);
	free(q);
}

void ffs_qmp_close(struct ffs_qmp *q)
{
	if (!q)
		return;
	/* first, or it would take our own end of the connection for the VMM's */
	if (q->reader_runs) {
		pthread_mutex_lock(&q->io);
		q->stopping = true;
		pthread_mutex_unlock(&q->io);
		wake_reader(q);
		pthread_join(q->reader, NULL);
	}
	/* fails only on a socket whose other end is gone already */
	if (shutdown(q->sock, SHUT_RDWR) < 0)
		q->dead = -ECONNRESET;
	destroy(q);
}
