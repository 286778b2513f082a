/* What the watchdog does to a QEMU whose daemon died or hangs: ask for the run state, and let the VM run if
 * it is in one that our pause leaves behind.
 *
 * Runs in the watchdog's process: one thread, no locks, no daemon state. The socket is a duplicate: its
 * stream may begin in the middle of a message, carry replies to the daemon's commands and events, and the
 * daemon may have sent half a command. poll(2) with the deadline is the only place that waits. */
#include "vmm/qemu.h"

#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/qmp-frame.h"

#define RESCUE_LINE_MAX (256u << 10)
#define ASK_AGAIN_NS (100 * FFS_NS_PER_MS)

struct rescue {
	int sock;
	uint64_t deadline;
	unsigned id;
	char nonce[9];
	struct ffs_qmp_framer framer;
	struct json_tokener *tok;
	bool greeted;
	char status[32]; /* of the last reply to a query of ours */
	bool answered;   /* the last request of ours */
};

static int send_text(struct rescue *r, const char *text, size_t len)
{
	while (len) {
		ssize_t n = send(r->sock, text, len, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n > 0) {
			text += n;
			len -= (size_t)n;
			continue;
		}
		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return -errno;
		struct pollfd p = {.fd = r->sock, .events = POLLOUT};
		int ms = ffs_ms_until(r->deadline);

		if (!ms)
			return -ETIMEDOUT;
		if (poll(&p, 1, ms) < 0 && errno != EINTR)
			return -errno;
	}
	return 0;
}

static int request(struct rescue *r, const char *command)
{
	char text[160];
	/* a byte that is no UTF-8 resets QEMU's parser, whatever half of a command it holds
	 * (docs/interop/qmp-spec.txt) */
	int n = snprintf(text, sizeof(text), "\xff\n{\"execute\":\"%s\",\"id\":\"ffsrescue-%s-%u\"}\n",
		command, r->nonce, ++r->id);

	r->answered = false;
	return send_text(r, text, (size_t)n);
}

static void look_at(struct rescue *r, const char *frame, size_t len)
{
	char want[48];
	struct json_object *ret;

	json_tokener_reset(r->tok);
	struct json_object *msg = json_tokener_parse_ex(r->tok, frame, (int)len);

	snprintf(want, sizeof(want), "ffsrescue-%s-%u", r->nonce, r->id);
	const char *id = msg ? ffs_json_str(msg, "id") : NULL;

	if (msg && json_object_object_get_ex(msg, "QMP", NULL))
		r->greeted = true;
	if (id && strcmp(id, want) == 0) {
		r->answered = true;
		if (json_object_object_get_ex(msg, "return", &ret)) {
			const char *status = ffs_json_str(ret, "status");

			if (status)
				snprintf(r->status, sizeof(r->status), "%s", status);
		}
	}
	json_object_put(msg);
}

/* Read until *flag is set or `until`: 0, -ETIMEDOUT, or why the connection is over. */
static int read_until(struct rescue *r, const bool *flag, uint64_t until)
{
	while (!*flag) {
		struct pollfd p = {.fd = r->sock, .events = POLLIN};
		uint64_t limit = until < r->deadline ? until : r->deadline;
		size_t room, len;
		char *frame;
		int ms = ffs_ms_until(limit), f;

		if (!ms)
			return -ETIMEDOUT;
		if (poll(&p, 1, ms) < 0 && errno != EINTR)
			return -errno;
		char *buf = ffs_qmp_framer_room(&r->framer, &room);

		if (!buf)
			return -ENOMEM;
		ssize_t n = recv(r->sock, buf, room, MSG_DONTWAIT);

		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -ECONNRESET;
		ffs_qmp_framer_added(&r->framer, (size_t)n);
		while ((f = ffs_qmp_framer_next(&r->framer, &frame, &len)) != 0) {
			if (f < 0)
				ffs_qmp_framer_drop(&r->framer);
			else
				look_at(r, frame, len);
		}
	}
	return 0;
}

/* A command and its answer. A daemon that only hangs may take the answer away from us: ask again. */
static int ask(struct rescue *r, const char *command)
{
	for (;;) {
		int e = request(r, command);

		if (!e)
			e = read_until(r, &r->answered, ffs_now_ns() + ASK_AGAIN_NS);
		if (e != -ETIMEDOUT || ffs_now_ns() >= r->deadline)
			return e;
	}
}

static bool is_ours(const char *status)
{
	return strcmp(status, "paused") == 0 || strcmp(status, "postmigrate") == 0 ||
	       strcmp(status, "finish-migrate") == 0;
}

static int make_it_run(struct rescue *r)
{
	for (unsigned attempt = 0;; attempt++) {
		int e = ask(r, "query-status");

		if (e)
			return e;
		/* running, or stopped by what was none of us: either way there is nothing to do */
		if (r->status[0] && !is_ours(r->status))
			return 0;
		if (ffs_now_ns() >= r->deadline)
			return -ETIMEDOUT;
		if (r->status[0] && (e = ask(r, "cont")) != 0)
			return e;
		/* "Migration is not finalized yet" passes by itself, announced by nothing */
		static const bool never = false;

		if (attempt &&
			(e = read_until(r, &never,
				 ffs_now_ns() + (attempt < 20 ? attempt : 20) * FFS_NS_PER_MS)) != -ETIMEDOUT)
			return e;
	}
}

/* The daemon may have shut the connection down to make a new one, and died before it had: the address is
 * still known. */
static int dial_again(struct rescue *r, int old)
{
	struct sockaddr_un addr;
	socklen_t len = sizeof(addr);
	struct ucred cred;
	socklen_t cred_len = sizeof(cred);
	struct ffs_qemu_monitor m = {0};

	if (getpeername(old, (struct sockaddr *)&addr, &len) < 0 ||
		len <= offsetof(struct sockaddr_un, sun_path) ||
		getsockopt(old, SOL_SOCKET, SO_PEERCRED, &cred, &cred_len) < 0)
		return -ENOTCONN;
	size_t n = len - offsetof(struct sockaddr_un, sun_path);

	m.abstract = !addr.sun_path[0];
	m.padded = m.abstract && n == sizeof(addr.sun_path);
	snprintf(m.path, sizeof(m.path), "%.*s", (int)(n - m.abstract), addr.sun_path + m.abstract);
	int e = ffs_qemu_dial(&m, cred.pid, r->deadline, &r->sock);

	if (e)
		return e;
	e = read_until(r, &r->greeted, r->deadline);
	return e ? e : ask(r, "qmp_capabilities");
}

int ffs_qemu_rescue(int sock, uint64_t deadline_ns)
{
	struct rescue r = {.sock = sock, .deadline = deadline_ns};

	snprintf(r.nonce, sizeof(r.nonce), "%08x", (unsigned)(ffs_now_ns() ^ (uint64_t)getpid() << 20));
	ffs_qmp_framer_init(&r.framer, RESCUE_LINE_MAX);
	r.tok = json_tokener_new_ex(FFS_QMP_DEPTH_MAX);
	int e = r.tok ? make_it_run(&r) : -ENOMEM;

	if (e == -EPIPE || e == -ECONNRESET || e == -ENOTCONN) {
		ffs_qmp_framer_free(&r.framer);
		ffs_qmp_framer_init(&r.framer, RESCUE_LINE_MAX);
		e = dial_again(&r, sock);
		if (!e)
			e = make_it_run(&r);
	}
	if (r.sock != sock)
		close(r.sock);
	ffs_qmp_framer_free(&r.framer);
	if (r.tok)
		json_tokener_free(r.tok);
	return e;
}
