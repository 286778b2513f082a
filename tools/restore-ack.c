/* What is handed over between a child and whoever starts it, in order: a list of hooks, each with what it does before the
 * VM is there, when it is loaded, after it runs, and at the end, whatever the end is. The port for acknowledgements comes first, then the
 * network, then all other mailboxes; a missing acknowledgement that was asked for is a failure like any other, and the
 * caller's one teardown ends the child.
 *
 * Threads: the child's; what the fork asks for is read by the main thread before. No locks. What waits here, waits for
 * datagrams and connections, for the child's end, for the next deadline, and, as a page of a guest tells nobody that it has changed, for
 * a few milliseconds before it looks there again. */
#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/udp.h"
#include "base/util.h"
#include "mailbox/ack.h"
#include "restore-ack-vsock.h"

#define ADDRESS_DEFAULT "127.0.0.1"
#define AT_ONCE 128 /* datagrams of one look: what floods the port does not keep us from the rest */
#define LOOKS_SOON 64
#define SOON_MS 1
#define LATER_MS 5

struct ffs_restore_ack {
	struct ffs_ack_wait wait;
	int sock;
	unsigned port;
	struct ffs_ack_vsock vsock;
	uint64_t at[FFS_MAILBOX_MAX]; /* where the frame of box i is in the child; 0: not written */
	uint64_t looked_ns;           /* what has come since counts as come then */
	unsigned looks;
};

/* ---- what is asked for ---- */

static int add_box(struct ffs_restore *r, struct json_object *box, struct ffs_error *err)
{
	struct json_object *own = ffs_json_get(box, "ack_timeout_ms");
	const char *name = ffs_json_string(box, "name"), *kind = ffs_json_string(box, "kind");
	enum ffs_mailbox_kind k = FFS_MAILBOX_FORK;
	unsigned ms = r->ack_ms, i = r->ack.n;

	if (!own && !r->ack_all)
		return 0;
	while (k < FFS_MAILBOX_KINDS && strcmp(ffs_mailbox_layout(k)->title, kind))
		k++;
	if (k == FFS_MAILBOX_KINDS)
		return ffs_error_set(err, EPROTO,
			"the status of fork %s names a kind of mailbox that is not known", r->target.fork);
	int got = r->ack_all ? 0 : ffs_ack_timeout(json_object_get_int64(own), "ack_timeout_ms", &ms, err);

	if (!got && ffs_ack_add(&r->ack, k, name, ms) < 0)
		got = ffs_error_set(
			err, EPROTO, "the status of fork %s names too many mailboxes", r->target.fork);
	if (!got)
		r->ack_offset[i] = ffs_json_u64(box, "offset");
	return got;
}

int ffs_restore_ack_read(struct ffs_restore *r, struct json_object *status, struct ffs_error *err)
{
	struct json_object *boxes = ffs_json_get(status, "mailboxes");
	size_t n = json_object_is_type(boxes, json_type_array) ? json_object_array_length(boxes) : 0;
	int got = 0;

	if (r->ack_none)
		return 0;
	if (!ffs_ack_parse_epoch(ffs_json_string(status, "epoch"), r->ack.epoch))
		return ffs_error_set(err, EPROTO, "the status of fork %s has no epoch", r->target.fork);
	for (size_t i = 0; !got && i < n; i++)
		got = add_box(r, json_object_array_get_idx(boxes, i), err);
	if (!got && r->ack.n && r->paused) {
		ffs_restore_note(r, "fork %s wants an ACK, which a VM that is left paused cannot give",
			r->target.fork);
		r->ack.n = 0;
	}
	return got;
}

/* ---- the port ---- */

/* Every child has its own: the text does not say which of a fork's children it is from. */
static int open_port(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	const char *address = r->ack_address ? r->ack_address : ADDRESS_DEFAULT;
	struct ffs_restore_ack *a = calloc(1, sizeof(*a));

	if (!a)
		return ffs_error_set(err, ENOMEM, "no memory to wait for acknowledgements");
	c->ack = a;
	ffs_ack_vsock_init(&a->vsock);
	a->wait = r->ack;
	a->sock = ffs_udp_listen(address, 0, 0, &a->port, err);
	return a->sock < 0 ? a->sock : 0;
}

static int open_vsock(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	return c->vsock ? ffs_ack_vsock_listen(&c->ack->vsock, c, err) : 0;
}

static void close_port(struct ffs_restore *r, struct ffs_child *c)
{
	if (!c->ack)
		return;
	ffs_close_fd(&c->ack->sock);
	ffs_ack_vsock_close(&c->ack->vsock);
	free(c->ack);
	c->ack = NULL;
}

/* ---- the pages ---- */

static int put_into(void *arg, const void *bytes, size_t len, unsigned at)
{
	memcpy((uint8_t *)arg + at, bytes, len);
	return 0;
}

static int add_port(
	const struct ffs_restore_ack *a, const struct ffs_ack_box *b, uint8_t *page, struct ffs_error *err)
{
	char with_port[FFS_MAILBOX_PAYLOAD_MAX], with_both[FFS_MAILBOX_PAYLOAD_MAX];
	size_t most = ffs_mailbox_layout(b->kind)->payload_max;
	uint8_t epoch[16];
	const void *payload;
	struct ffs_span object;
	uint32_t flags;
	size_t len;
	ssize_t n;

	if (ffs_mailbox_read(b->kind, page, &payload, &len, epoch, &flags) != 1)
		return ffs_error_set(err, EPROTO, "mailbox %s has no payload to be acknowledged", b->name);
	int got = ffs_json_object(payload, len, &object, err);

	if (got < 0)
		return got;
	n = ffs_json_add_port(object, FFS_ACK_PORT_KEY, a->port, with_port, most, err);
	const char *text = with_port;

	if (n >= 0 && a->vsock.sock >= 0) {
		struct ffs_error why = {0};
		ssize_t both = ffs_json_add_port((struct ffs_span){with_port, (size_t)n},
			FFS_ACK_VSOCK_PORT_KEY, FFS_ACK_VSOCK_PORT, with_both, most, &why);

		/* when the fork was made there had to be room for one port only: then the other ways are left */
		if (both >= 0) {
			n = both;
			text = with_both;
		} else if (both != -EFBIG) {
			n = ffs_error_set(err, why.code, "%s", why.text);
		}
	}
	if (n < 0) {
		ffs_error_prefix(err, "mailbox %s", b->name);
		return (int)n;
	}
	return ffs_mailbox_write(
		b->kind, text, (size_t)n, a->wait.epoch, flags | FFS_MAILBOX_WANTS_ACK, put_into, page);
}

int ffs_restore_ack_page(const struct ffs_restore *r, const struct ffs_child *c, uint64_t offset, uint64_t at,
	void *page, struct ffs_error *err)
{
	struct ffs_restore_ack *a = c->ack;

	for (unsigned i = 0; a && i < a->wait.n; i++)
		if (r->ack_offset[i] == offset) {
			a->at[i] = at;
			return add_port(a, &a->wait.box[i], page, err);
		}
	return 0;
}

/* ---- waiting ---- */

static void receive(struct ffs_restore_ack *a)
{
	char text[FFS_ACK_TEXT_MAX + 1];

	for (unsigned i = 0; i < AT_ONCE; i++) {
		ssize_t n = recv(a->sock, text, sizeof(text), MSG_TRUNC);

		if (n < 0)
			return;
		ffs_ack_offer(&a->wait, text, (size_t)n, a->looked_ns);
	}
}

/* A process that has ended has no pages: its end is seen elsewhere. */
static void look_at_pages(const struct ffs_child *c, struct ffs_restore_ack *a)
{
	uint8_t word[FFS_ACK_WORD_LEN];

	for (unsigned i = 0; i < a->wait.n; i++) {
		struct iovec ours = {word, sizeof(word)},
			     theirs = {(void *)(uintptr_t)(a->at[i] + FFS_ACK_WORD_AT),
				     sizeof(word)}; /* NOLINT */

		if (a->at[i] && a->wait.box[i].state == FFS_ACK_PENDING &&
			ffs_mailbox_layout(a->wait.box[i].kind)->extension_at &&
			process_vm_readv(c->pid, &ours, 1, &theirs, 1, 0) == (ssize_t)sizeof(word))
			ffs_ack_offer_word(&a->wait, i, word, a->looked_ns);
	}
}

static int missing(const struct ffs_restore_ack *a, struct ffs_error *err)
{
	const struct ffs_ack_box *b = a->wait.box;
	char ignored[120] = "";
	size_t len = 0;

	while (b->state != FFS_ACK_TIMEOUT)
		b++;
	for (enum ffs_ack_verdict v = FFS_ACK_TAKEN + 1; v < FFS_ACK_VERDICTS; v++)
		if (a->wait.count[v])
			len += (size_t)snprintf(ignored + len, sizeof(ignored) - len, "%s%llu %s",
				len ? ", " : "; ignored: ", (unsigned long long)a->wait.count[v],
				ffs_ack_verdict_name(v));
	return ffs_error_set(err, ETIMEDOUT, "mailbox %s was not acknowledged within %u ms%s", b->name,
		b->timeout_ms, ignored);
}

/* Until nothing of this kind is waited for; all that comes is looked at, whatever it is for. */
static int await(struct ffs_child *c, enum ffs_mailbox_kind kind, struct ffs_error *err)
{
	struct ffs_restore_ack *a = c->ack;

	for (;;) {
		bool ended = ffs_child_ended(c);
		struct pollfd p[3 + FFS_ACK_VSOCK_PEERS] = {
			{.fd = c->pidfd, .events = POLLIN}, {.fd = a->sock, .events = POLLIN}};
		int look = a->looks++ < LOOKS_SOON ? SOON_MS : LATER_MS, until;
		uint64_t next;

		receive(a);
		ffs_ack_vsock_receive(&a->vsock, &a->wait, a->looked_ns);
		look_at_pages(c, a);
		a->looked_ns = ffs_now_ns();
		next = ffs_ack_expire(&a->wait, a->looked_ns);
		if (ffs_ack_result(&a->wait) == FFS_ACK_TIMEOUT)
			return missing(a, err);
		if (ffs_ack_over(&a->wait, kind))
			return 0;
		if (ended)
			return ffs_error_set(
				err, ECONNRESET, "the VM ended before its mailboxes were acknowledged");
		until = ffs_ms_until(next);
		if (poll(p, 2 + ffs_ack_vsock_poll(&a->vsock, p + 2), until < look ? until : look) < 0 &&
			errno != EINTR)
			return ffs_error_errno(err, errno, "acknowledgements cannot be waited for");
	}
}

static int await_network(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	return await(c, FFS_MAILBOX_NETWORK, err);
}

static int await_mailboxes(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	return await(c, FFS_MAILBOX_FORK, err);
}

/* ---- the list ---- */

struct hook {
	const char *before_point, *loaded_point, *after_point; /* of fault injection */
	int (*before)(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
	int (*loaded)(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
	int (*after_resume)(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
	void (*close)(struct ffs_restore *r, struct ffs_child *c);
};

static const struct hook hooks[] = {
	{.before_point = "restore-port",
		.after_point = "restore-port-after",
		.before = open_port,
		.close = close_port},
	{.before_point = "restore-vsock",
		.loaded_point = "restore-vsock-loaded",
		.after_point = "restore-vsock-after",
		.loaded = open_vsock},
	{.before_point = "restore-network",
		.after_point = "restore-network-after",
		.after_resume = await_network},
	{.before_point = "restore-mailbox",
		.after_point = "restore-mailbox-after",
		.after_resume = await_mailboxes},
};

static int point(const char *name, struct ffs_error *err)
{
	int r = FFS_FAULT(name);

	return r < 0 ? ffs_error_errno(err, -r, "%s", name) : 0;
}

int ffs_restore_hooks_before(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	int got = 0;

	for (size_t i = 0; !got && r->ack.n && i < FFS_ARRAY_LEN(hooks); i++) {
		got = point(hooks[i].before_point, err);
		if (!got && hooks[i].before)
			got = hooks[i].before(r, c, err);
	}
	return got;
}

int ffs_restore_hooks_loaded(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	int got = 0;

	for (size_t i = 0; !got && c->ack && i < FFS_ARRAY_LEN(hooks); i++) {
		if (!hooks[i].loaded)
			continue;
		got = hooks[i].loaded(r, c, err);
		if (!got)
			got = point(hooks[i].loaded_point, err);
	}
	return got;
}

void ffs_restore_hooks_resuming(struct ffs_child *c)
{
	if (!c->ack)
		return;
	c->ack->looked_ns = ffs_now_ns();
	ffs_ack_begin(&c->ack->wait, c->ack->looked_ns);
}

int ffs_restore_hooks_after_resume(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	int got = 0;

	for (size_t i = 0; !got && r->ack.n && i < FFS_ARRAY_LEN(hooks); i++) {
		got = point(hooks[i].after_point, err);
		if (!got && hooks[i].after_resume)
			got = hooks[i].after_resume(r, c, err);
	}
	return got;
}

void ffs_restore_hooks_close(struct ffs_restore *r, struct ffs_child *c)
{
	for (size_t i = FFS_ARRAY_LEN(hooks); i-- > 0;)
		if (hooks[i].close)
			hooks[i].close(r, c);
}

struct json_object *ffs_restore_ack_json(const struct ffs_child *c)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < c->ack->wait.n; i++) {
		const struct ffs_ack_box *b = &c->ack->wait.box[i];
		struct json_object *o = json_object_new_object();

		json_object_object_add(o, "mailbox", json_object_new_string(b->name));
		json_object_object_add(o, "state", json_object_new_string(ffs_ack_state_name(b->state)));
		json_object_object_add(o, "after_ns", json_object_new_uint64(b->after_ns));
		json_object_array_add(list, o);
	}
	return list;
}

struct json_object *ffs_restore_ack_ignored_json(const struct ffs_child *c)
{
	struct json_object *o = json_object_new_object();

	for (enum ffs_ack_verdict v = FFS_ACK_TAKEN + 1; v < FFS_ACK_VERDICTS; v++)
		json_object_object_add(
			o, ffs_ack_verdict_name(v), json_object_new_uint64(c->ack->wait.count[v]));
	return o;
}
