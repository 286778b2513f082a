/* Owns the ring of events and wakes those who wait for them or poll.
 *
 * Threads: events come from any thread with the tree lock held; readers are answered and pollers notified by
 * the reaper, without it. A reader that is slower than 1,024 events is told how many it lost. */
#include "events.h"

#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "ctl.h"
#include "nodes.h"
#include "park.h"
#include "text.h"

#define RING 1024

struct ffs_events {
	char *ring[RING]; /* of event seq: seq % RING */
	uint64_t next;    /* seq of the next event */
	struct ffs_list readers;
	struct ffs_work wake;
	struct ffs_fs *fs; /* fixed */
	bool wake_queued;
};

static void wake_readers(struct ffs_work *w);

struct ffs_events *ffs_events_new(struct ffs_fs *fs)
{
	struct ffs_events *e = calloc(1, sizeof(*e));

	if (e) {
		ffs_list_init(&e->readers);
		e->wake.fn = wake_readers;
		e->fs = fs;
	}
	return e;
}

void ffs_events_free(struct ffs_events *e)
{
	for (unsigned i = 0; e && i < RING; i++)
		free(e->ring[i]);
	free(e);
}

uint64_t ffs_events_next(struct ffs_fs *fs)
{
	return fs->events->next;
}

static void add(struct json_object *o, const char *key, const char *value)
{
	if (value)
		json_object_object_add(o, key, json_object_new_string(value));
}

void ffs_event(struct ffs_fs *fs, const char *what, const char *sandbox, const char *branch, const char *id,
	const char *error)
{
	struct ffs_events *e = fs->events;
	struct json_object *o = json_object_new_object();
	char when[40];

	ffs_rfc3339(ffs_wall_ns(), when);
	json_object_object_add(o, "seq", json_object_new_int64((int64_t)e->next));
	add(o, "time", when);
	add(o, "event", what);
	add(o, "sandbox", sandbox);
	add(o, "branch", branch);
	add(o, "id", id);
	add(o, "error", error);
	char *line = NULL;

	if (asprintf(&line, "%s\n",
		    json_object_to_json_string_ext(
			    o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE)) < 0)
		line = NULL;
	json_object_put(o);
	/* without memory the number is skipped: readers see a lost event */
	free(e->ring[e->next % RING]);
	e->ring[e->next % RING] = line;
	e->next++;
	if (!e->wake_queued) {
		e->wake_queued = true;
		ffs_reaper_push(fs->reaper, &e->wake);
	}
}

/* Whole lines from h's position that fit into size (at least one line's beginning never: a line that does not
 * fit alone is cut, its rest is gone). Tree lock held. NULL: nothing there. */
static char *take_lines(struct ffs_events *e, struct ffs_handle *h, size_t size, size_t *len)
{
	char *buf = malloc(size);
	uint64_t oldest = e->next > RING ? e->next - RING : 0;

	*len = 0;
	if (!buf)
		return NULL;
	if (h->event_seq < oldest) {
		int n = snprintf(buf, size, "{\"event\":\"lost\",\"count\":%llu}\n",
			(unsigned long long)(oldest - h->event_seq));

		*len = (size_t)n < size ? (size_t)n : size;
		h->event_seq = oldest;
	}
	for (; h->event_seq < e->next; h->event_seq++) {
		const char *line = e->ring[h->event_seq % RING];
		size_t n = line ? strlen(line) : 0;

		if (*len && n > size - *len)
			break;
		if (n > size)
			n = size;
		memcpy(buf + *len, line ? line : "", n);
		*len += n;
	}
	return buf;
}

bool ffs_events_pending(struct ffs_fs *fs, const struct ffs_handle *h)
{
	return h->event_seq < fs->events->next || fs->closing;
}

void ffs_events_read(struct ffs_call *call, struct ffs_handle *h, size_t size, int flags)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_parked *p = NULL;
	size_t len = 0;
	char *buf = NULL;

	for (;;) {
		pthread_mutex_lock(&fs->lock);
		if (ffs_events_pending(fs, h))
			break;
		if (flags & O_NONBLOCK) {
			pthread_mutex_unlock(&fs->lock);
			fuse_reply_err(call->req, EAGAIN);
			return;
		}
		if (p) {
			ffs_parked_wait(p, &fs->events->readers);
			pthread_mutex_unlock(&fs->lock);
			ffs_parked_unref(p);
			return;
		}
		pthread_mutex_unlock(&fs->lock);
		p = ffs_park(call, false);
		if (!p)
			return;
		pthread_mutex_lock(&fs->lock);
		p->handle = ffs_handle_ref(h);
		p->size = size;
		pthread_mutex_unlock(&fs->lock);
	}
	bool mine = !p || ffs_parked_claim(p);

	if (mine)
		buf = take_lines(fs->events, h, size, &len);
	pthread_mutex_unlock(&fs->lock);
	if (mine)
		fuse_reply_buf(p ? ffs_parked_req(p) : call->req, buf, buf ? len : 0);
	ffs_parked_unref(p);
	free(buf);
}

/* On the reaper's thread. */
static void wake_readers(struct ffs_work *w)
{
	struct ffs_events *e = ffs_container(w, struct ffs_events, wake);
	struct ffs_fs *fs = e->fs;
	struct ffs_list claimed;

	pthread_mutex_lock(&fs->lock);
	e->wake_queued = false;
	ffs_parked_claim_all(&e->readers, &claimed);
	pthread_mutex_unlock(&fs->lock);
	for (struct ffs_list *l = claimed.next, *next; l != &claimed; l = next) {
		struct ffs_parked *p = ffs_container(l, struct ffs_parked, link);
		size_t len;

		next = l->next;
		pthread_mutex_lock(&fs->lock);
		char *buf = take_lines(e, p->handle, p->size, &len);

		pthread_mutex_unlock(&fs->lock);
		fuse_reply_buf(ffs_parked_req(p), buf, buf ? len : 0);
		free(buf);
		ffs_parked_unref(p);
	}
	ffs_polls_check(fs);
}

void ffs_events_close(struct ffs_fs *fs)
{
	pthread_mutex_lock(&fs->lock);
	if (!fs->events->wake_queued) {
		fs->events->wake_queued = true;
		ffs_reaper_push(fs->reaper, &fs->events->wake);
	}
	pthread_mutex_unlock(&fs->lock);
}

/* ---- poll ---- */

struct ready {
	struct ffs_fs *fs;
	struct fuse_pollhandle *ph[64];
	unsigned n;
};

static void collect(struct ffs_handle *h, void *arg)
{
	struct ready *r = arg;

	if (!h->ph || r->n == FFS_ARRAY_LEN(r->ph) ||
		!(ffs_handle_revents(r->fs, h) & (POLLIN | POLLERR | POLLHUP)))
		return;
	r->ph[r->n++] = h->ph;
	h->ph = NULL;
}

void ffs_polls_check(struct ffs_fs *fs)
{
	struct ready r = {.fs = fs};

	do {
		r.n = 0;
		pthread_mutex_lock(&fs->lock);
		if (fs->handles)
			ffs_handles_each(fs, collect, &r);
		pthread_mutex_unlock(&fs->lock);
		for (unsigned i = 0; i < r.n; i++) {
			fuse_lowlevel_notify_poll(r.ph[i]);
			fuse_pollhandle_destroy(r.ph[i]);
		}
	} while (r.n == FFS_ARRAY_LEN(r.ph));
}
