/* What the watchdog does to a VMM with an HTTP API whose daemon died or hangs: let the VM run if it is
 * paused, for the daemon had paused it.
 *
 * Runs in the watchdog's process: one thread, no locks, no daemon state. The stream of the duplicate may
 * begin in the middle of an answer to the daemon, so a connection of our own comes first. The VMM may stand
 * in open(2) or write(2) of the daemon's FIFO: being read there sets it free. poll(2) with the deadline is
 * the only place that waits. */
#include "vmm/api.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define ASK_AGAIN_NS (100 * FFS_NS_PER_MS)

static int empty_fifo(struct ffs_http_wait *w, struct ffs_error *err)
{
	char buf[4096];
	ssize_t n;

	while ((n = read(w->fd, buf, sizeof(buf))) > 0)
		;
	/* end of file: the writer is gone, and poll(2) would say so for ever */
	if (n == 0)
		w->fd = -1;
	return 0;
}

static int ask(struct ffs_http *h, struct ffs_http_wait *w, const char *method, const char *path,
	const char *body, uint64_t deadline_ns, struct ffs_http_answer *a)
{
	int r = ffs_http_send(h, method, path, body, deadline_ns, NULL);

	return r ? r : ffs_http_recv(h, w, deadline_ns, a, NULL);
}

/* 0 when it runs. */
static int make_it_run(struct ffs_http *h, struct ffs_http_wait *w, uint64_t deadline_ns)
{
	for (;;) {
		struct ffs_http_answer a = {0};
		int state, r = ask(h, w, "GET", "/", NULL, deadline_ns, &a);

		if (r)
			return r;
		/* over the duplicate an answer to a request of the daemon's may come first */
		state = a.status == 200 ? ffs_api_state_of(a.body) : -EAGAIN;
		ffs_http_answer_free(&a);
		if (state == FFS_RUN_RUNNING)
			return 0;
		if (state == FFS_RUN_PAUSED) {
			r = ask(h, w, "PATCH", "/vm", "{\"state\":\"Resumed\"}", deadline_ns, &a);
			ffs_http_answer_free(&a);
			if (r)
				return r;
		}
		if (ffs_now_ns() >= deadline_ns)
			return -ETIMEDOUT;
	}
}

int ffs_api_rescue(int sock, uint64_t deadline_ns)
{
	struct ffs_api_place place = {.dir = -1};
	struct ucred cred = {0};
	socklen_t len = sizeof(cred);
	int r = -ENOTCONN;
	char state;

	if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0 && cred.pid)
		r = ffs_api_place_open(sock, cred.pid, &place, NULL);
	int fifo = r ? -1 : ffs_api_place_open_fifo(&place, FFS_API_STATE_FILE);
	struct ffs_http_wait w = {.fd = fifo, .ready = empty_fifo};

	for (bool own = !r;; own = !own) {
		struct ffs_http h;
		int fd = -1;

		if (own)
			r = ffs_api_place_dial(&place, deadline_ns, &fd);
		else
			r = (fd = dup(sock)) < 0 ? -errno : 0;
		if (!r) {
			ffs_http_init(&h, fd);
			r = make_it_run(&h, &w, deadline_ns);
			ffs_http_close(&h);
		}
		/* a VMM that is gone needs nothing */
		if (!r || ffs_now_ns() >= deadline_ns || ffs_proc_stat(cred.pid, &state, NULL) < 0 ||
			state == 'Z' || state == 'X')
			break;
		if (poll(NULL, 0, (int)(ASK_AGAIN_NS / FFS_NS_PER_MS)) < 0)
			r = -errno;
	}
	if (fifo >= 0) {
		ffs_api_place_remove(&place, FFS_API_STATE_FILE);
		close(fifo);
	}
	ffs_api_place_close(&place);
	return r;
}
