/* Owns what forks wait for that are to be acknowledged, and the thread that listens for it.
 *
 * The port of a fork is bound when the fork is made, for it is in the payloads, which are written then; so nothing that a
 * child says is missed. Time runs from when both its memory and its file `ack` were opened: who starts no child, or does
 * not ask, has nothing that times out.
 *
 * Threads: the listener alone reads the ports, ends what has timed out, and answers all who wait: it is waiting for
 * datagrams, for the next deadline, or to be woken (an eventfd). FUSE workers park reads and wake it; they never wait
 * here. What a flood of datagrams keeps busy is the listener. Lock: the tree lock, not held while a port is read. */
#include "ack.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/udp.h"
#include "base/util.h"
#include "events.h"
#include "park.h"

#define AT_ONCE 128 /* datagrams of one look: one port does not keep us from the others */
#define EVENTS 64

struct ffs_acks {
	struct ffs_fs *fs;
	struct ffs_list forks; /* struct ffs_fork_ack; tree lock */
	int epoll, wake;
	atomic_bool stop;
	bool started;
	pthread_t thread;
	uint64_t held_until_ns; /* the daemon before may only just be ending, with its ports */
};

/* ---- the thread ---- */

static struct ffs_fork_ack *of_serial(struct ffs_acks *a, uint64_t serial)
{
	for (struct ffs_list *e = a->forks.next; e != &a->forks; e = e->next) {
		struct ffs_fork_ack *ack = ffs_container(e, struct ffs_fork_ack, link);

		if (ack->fork->serial == serial)
			return ack;
	}
	return NULL;
}

static void receive(struct ffs_fs *fs, uint64_t serial)
{
	char text[FFS_ACK_TEXT_MAX + 1];
	struct ffs_fork *f = NULL;
	int sock = -1;

	pthread_mutex_lock(&fs->lock);
	struct ffs_fork_ack *ack = of_serial(fs->acks, serial);

	if (ack) {
		f = ffs_fork_ref(ack->fork);
		sock = ack->sock;
	}
	pthread_mutex_unlock(&fs->lock);
	if (!f)
		return;
	for (unsigned i = 0; i < AT_ONCE; i++) {
		ssize_t n = recv(sock, text, sizeof(text), MSG_TRUNC | MSG_DONTWAIT);

		if (n < 0)
			break;
		pthread_mutex_lock(&fs->lock);
		enum ffs_ack_verdict v = ffs_ack_offer(&f->ack->wait, text, (size_t)n, ffs_now_ns());

		pthread_mutex_unlock(&fs->lock);
		atomic_fetch_add(&fs->count.acks[v], 1);
	}
	pthread_mutex_lock(&fs->lock);
	ffs_fork_unref(f);
	pthread_mutex_unlock(&fs->lock);
}

/* What a read gets: 1: not yet; 0 and the word; -errno and the sentence. Tree lock held. */
static int result_of(const struct ffs_fork *f, char out[16], struct ffs_error *err)
{
	const struct ffs_fork_ack *a = f->ack;

	if (f->failure.code)
		return ffs_error_set(err, EIO, "%s", f->failure.text);
	if (f->removed)
		return ffs_error_set(err, ENOENT, "fork '%s' was removed", f->name);
	if (!a || !a->wait.n)
		return ffs_error_set(err, ENODATA,
			"no mailbox of fork '%s' is to be acknowledged: ask for it when the fork is made "
			"(wait_for_ack)",
			f->name);
	if (a->deaf.code)
		return ffs_error_set(err, a->deaf.code, "%s", a->deaf.text);
	if (!ffs_ack_over(&a->wait, FFS_MAILBOX_KINDS))
		return 1;
	snprintf(out, 16, "%s\n", ffs_ack_state_name(ffs_ack_result(&a->wait)));
	return 0;
}

static void answer(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, struct ffs_handle *h,
	size_t size, uint64_t off)
{
	struct ffs_error err = {0};
	char word[16] = "";

	pthread_mutex_lock(&fs->lock);
	int r = result_of(h->node->fork, word, &err);

	pthread_mutex_unlock(&fs->lock);
	size_t len = strlen(word);

	if (r < 0)
		ffs_reply_failure(fs, req, who, ffs_node_dir_ino(h->node), -r, &err);
	else if (off >= len)
		fuse_reply_buf(req, NULL, 0);
	else
		fuse_reply_buf(req, word + off, len - off < size ? len - off : size);
}

/* Tree lock held: claim those who need wait no longer, of one fork; false: there are none. */
static bool claim_some(struct ffs_acks *a, struct ffs_list *out)
{
	for (struct ffs_list *e = a->forks.next; e != &a->forks; e = e->next) {
		struct ffs_fork_ack *ack = ffs_container(e, struct ffs_fork_ack, link);
		char word[16];

		if (ffs_list_empty(&ack->waits) || result_of(ack->fork, word, NULL) == 1)
			continue;
		ffs_parked_claim_all(&ack->waits, out);
		return true;
	}
	return false;
}

static void answer_all(struct ffs_acks *a)
{
	struct ffs_fs *fs = a->fs;

	for (;;) {
		struct ffs_list claimed;

		pthread_mutex_lock(&fs->lock);
		bool some = claim_some(a, &claimed);

		pthread_mutex_unlock(&fs->lock);
		if (!some)
			return;
		for (struct ffs_list *e = claimed.next, *next; e != &claimed; e = next) {
			struct ffs_parked *p = ffs_container(e, struct ffs_parked, link);

			next = e->next;
			answer(fs, ffs_parked_req(p), &p->who, p->handle, p->size, p->offset);
			ffs_parked_unref(p);
		}
	}
}

/* End what has timed out; the next deadline (0: none), and whether there is news for those who poll. */
static uint64_t expire(struct ffs_acks *a, bool *news)
{
	uint64_t now = ffs_now_ns(), next = 0;

	*news = false;
	pthread_mutex_lock(&a->fs->lock);
	for (struct ffs_list *e = a->forks.next; e != &a->forks; e = e->next) {
		struct ffs_fork_ack *ack = ffs_container(e, struct ffs_fork_ack, link);
		uint64_t deadline = ffs_ack_expire(&ack->wait, now);

		if (deadline && (!next || deadline < next))
			next = deadline;
		if (!ack->told && ffs_ack_readable(ack->fork))
			*news = ack->told = true;
	}
	pthread_mutex_unlock(&a->fs->lock);
	return next;
}

static void *listen_thread(void *arg)
{
	struct ffs_acks *a = arg;
	struct epoll_event events[EVENTS];
	uint64_t woken;

	while (!atomic_load(&a->stop)) {
		bool news;
		uint64_t next = expire(a, &news);

		answer_all(a);
		if (news)
			ffs_polls_check(a->fs);
		int n = epoll_wait(a->epoll, events, EVENTS, next ? ffs_ms_until(next) : -1);

		for (int i = 0; i < n; i++) {
			if (events[i].data.u64)
				receive(a->fs, events[i].data.u64);
			else if (read(a->wake, &woken, sizeof(woken)) < 0 && errno != EAGAIN)
				ffs_log(FFS_LOG_ERROR, "acknowledgements: errno %d", errno);
		}
		if (n < 0 && errno != EINTR) {
			ffs_log(FFS_LOG_ERROR, "acknowledgements are not listened for any more: %s",
				strerror(errno));
			break;
		}
	}
	return NULL;
}

/* ---- its life ---- */

int ffs_acks_new(struct ffs_fs *fs, struct ffs_error *err)
{
	struct ffs_acks *a = calloc(1, sizeof(*a));
	struct epoll_event woken = {.events = EPOLLIN};

	if (!a)
		return ffs_error_set(err, ENOMEM, "no memory");
	a->fs = fs;
	a->held_until_ns = ffs_now_ns() + FFS_HELD_NS;
	ffs_list_init(&a->forks);
	a->epoll = epoll_create1(EPOLL_CLOEXEC);
	a->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	fs->acks = a;
	if (a->epoll < 0 || a->wake < 0 || epoll_ctl(a->epoll, EPOLL_CTL_ADD, a->wake, &woken) < 0)
		return ffs_error_errno(err, errno, "acknowledgements");
	return 0;
}

int ffs_acks_start(struct ffs_fs *fs)
{
	int r = ffs_thread_start(&fs->acks->thread, listen_thread, fs->acks);

	fs->acks->started = !r;
	return r;
}

void ffs_ack_wake(struct ffs_fs *fs)
{
	uint64_t one = 1;

	/* full: it is awake */
	if (write(fs->acks->wake, &one, sizeof(one)) < 0 && errno != EAGAIN)
		ffs_log(FFS_LOG_ERROR, "acknowledgements: errno %d", errno);
}

void ffs_acks_stop(struct ffs_fs *fs)
{
	if (!fs->acks || !fs->acks->started)
		return;
	atomic_store(&fs->acks->stop, true);
	ffs_ack_wake(fs);
	pthread_join(fs->acks->thread, NULL);
}

/* `deaf`: it can be without a port. */
static int listen_for(struct ffs_fs *fs, struct ffs_fork *f, unsigned port, bool deaf, struct ffs_error *err)
{
	struct ffs_fork_ack *a = calloc(1, sizeof(*a));
	struct epoll_event ev = {.events = EPOLLIN, .data = {.u64 = f->serial}};
	struct ffs_error why = {0};

	if (!a)
		return ffs_error_set(err, ENOMEM, "no memory to wait for acknowledgements");
	a->fork = f;
	a->port = port;
	ffs_list_init(&a->waits);
	memcpy(a->wait.epoch, f->epoch, sizeof(a->wait.epoch));
	a->sock = ffs_udp_listen(fs->opt.ack_address, port, fs->acks->held_until_ns, &a->port, &why);
	if (a->sock >= 0 && epoll_ctl(fs->acks->epoll, EPOLL_CTL_ADD, a->sock, &ev) < 0) {
		ffs_error_errno(&why, errno, "acknowledgements of fork '%s'", f->name);
		ffs_close_fd(&a->sock);
	}
	if (a->sock < 0 && !deaf) {
		free(a);
		return ffs_error_set(err, why.code, "%s", why.text);
	}
	a->deaf = why;
	pthread_mutex_lock(&fs->lock);
	f->ack = a;
	ffs_list_add(&fs->acks->forks, &a->link);
	ffs_ack_expect(f);
	pthread_mutex_unlock(&fs->lock);
	if (why.code)
		ffs_log(FFS_LOG_WARN, "fork '%s' can't be acknowledged: %s", f->name, why.text);
	return 0;
}

int ffs_ack_listen(struct ffs_fs *fs, struct ffs_fork *f, unsigned port, struct ffs_error *err)
{
	return listen_for(fs, f, port, false, err);
}

void ffs_ack_listen_again(struct ffs_fs *fs, struct ffs_fork *f, unsigned port)
{
	struct ffs_error why = {0};

	if (listen_for(fs, f, port, true, &why) < 0)
		ffs_log(FFS_LOG_WARN, "fork '%s': %s", f->name, why.text);
}

void ffs_ack_free(struct ffs_fork *f)
{
	struct ffs_fork_ack *a = f->ack;

	if (!a)
		return;
	ffs_list_del(&a->link);
	/* closing takes it out of the epoll as well */
	ffs_close_fd(&a->sock);
	free(a);
	f->ack = NULL;
}

void ffs_ack_expect(struct ffs_fork *f)
{
	struct ffs_fork_ack *a = f->ack;

	if (!a)
		return;
	a->wait.n = 0;
	a->told = false;
	for (struct ffs_list *e = f->staged.next; e != &f->staged; e = e->next) {
		const struct ffs_fork_box *b = &ffs_container(e, struct ffs_staged, link)->box;

		/* there are never more payloads than it takes */
		if (b->wants_ack &&
			ffs_ack_add(&a->wait, b->frame.id.kind, b->frame.id.name, b->ack_timeout_ms) < 0)
			ffs_log(FFS_LOG_ERROR, "fork '%s' has too many mailboxes", f->name);
	}
}

bool ffs_ack_asks(const struct ffs_fork *f)
{
	return f->ack && f->ack->wait.n;
}

void ffs_ack_opened(struct ffs_fork *f, bool asked)
{
	struct ffs_fork_ack *a = f->ack;

	if (!a)
		return;
	a->asked |= asked;
	if (!a->asked || !f->fixed || a->wait.began_ns)
		return;
	ffs_ack_begin(&a->wait, ffs_now_ns());
	ffs_ack_wake(f->named->sbx->fs);
}

bool ffs_ack_readable(const struct ffs_fork *f)
{
	char word[16];

	return result_of(f, word, NULL) != 1;
}

struct json_object *ffs_ack_json(const struct ffs_fork *f)
{
	const struct ffs_ack_wait *w = &f->ack->wait;
	struct json_object *o = json_object_new_object(), *boxes = json_object_new_object(),
			   *ignored = json_object_new_object();

	json_object_object_add(o, "state", json_object_new_string(ffs_ack_state_name(ffs_ack_result(w))));
	json_object_object_add(o, "port", json_object_new_int64(f->ack->port));
	if (f->ack->deaf.code)
		json_object_object_add(o, "error", json_object_new_string(f->ack->deaf.text));
	for (unsigned i = 0; i < w->n; i++)
		json_object_object_add(
			boxes, w->box[i].name, json_object_new_string(ffs_ack_state_name(w->box[i].state)));
	json_object_object_add(o, "mailboxes", boxes);
	for (enum ffs_ack_verdict v = FFS_ACK_TAKEN + 1; v < FFS_ACK_VERDICTS; v++)
		json_object_object_add(ignored, ffs_ack_verdict_name(v), json_object_new_uint64(w->count[v]));
	json_object_object_add(o, "ignored", ignored);
	return o;
}

/* ---- FUSE ---- */

void ffs_ack_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off, int flags)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_fork *f = h->node->fork;

	pthread_mutex_lock(&fs->lock);
	bool over = ffs_ack_readable(f);

	pthread_mutex_unlock(&fs->lock);
	if (over) {
		answer(fs, call->req, &call->who, h, size, off);
		return;
	}
	if (flags & O_NONBLOCK) {
		fuse_reply_err(call->req, EAGAIN);
		return;
	}
	struct ffs_parked *p = ffs_park(call, false);

	if (!p)
		return;
	pthread_mutex_lock(&fs->lock);
	p->handle = ffs_handle_ref(h);
	p->size = size;
	p->offset = off;
	/* whoever comes while it is over is answered by the listener too */
	ffs_parked_wait(p, &f->ack->waits);
	pthread_mutex_unlock(&fs->lock);
	ffs_ack_wake(fs);
	ffs_parked_unref(p);
}
