/* Owns the cache: who takes the branch of a key, and which cached branches are let go.
 *
 * Threads: requests and pruning in the pool, the tick on the reaper's. Who waits for the winner of a key
 * sleeps on `changed` with the cache's own lock, below the tree lock (a cancel is set with that held), which
 * it therefore never takes while it has the other. A branch is let go as rmdir does, and the kernel is told
 * afterwards, by a job of its own: a mkdir that made the room holds the directory's lock meanwhile. */
#include "keyed.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cancel.h"
#include "base/log.h"
#include "base/util.h"
#include "data.h"
#include "events.h"
#include "nodes.h"
#include "park.h"
#include "prune.h"

/* What is in use when its time has come is looked at again. */
#define AGAIN_NS FFS_NS_PER_S
/* Who just looks at a branch that is let go is done by then. */
#define FREED_NS (200 * FFS_NS_PER_MS)

struct ffs_keyed {
	pthread_mutex_t lock; /* below */
	pthread_cond_t changed;
	uint64_t changes; /* a key's branch was taken, or could not be */
	struct ffs_work prune;
	bool pruning; /* tree lock: queued */
	struct ffs_fs *fs;
};

static void prune_work(struct ffs_work *w);

int ffs_keyed_init(struct ffs_fs *fs, struct ffs_error *err)
{
	fs->keyed = calloc(1, sizeof(*fs->keyed));
	if (!fs->keyed)
		return ffs_error_set(err, ENOMEM, "no memory");
	pthread_mutex_init(&fs->keyed->lock, NULL);
	ffs_cond_init(&fs->keyed->changed);
	fs->keyed->prune.fn = prune_work;
	fs->keyed->fs = fs;
	return 0;
}

void ffs_keyed_free(struct ffs_fs *fs)
{
	free(fs->keyed);
	fs->keyed = NULL;
}

/* ---- letting go ---- */

struct forget {
	struct ffs_work work;
	struct ffs_fs *fs;
	uint64_t dir;
	char name[80];
};

static void forget_work(struct ffs_work *w)
{
	struct forget *f = ffs_container(w, struct forget, work);

	ffs_inval_name(f->fs, f->dir, f->name);
	free(f);
}

/* Tree lock held: a job that tells the kernel; without memory for it the name lingers in the kernel's cache.
 */
static struct forget *make_forget(struct ffs_named *n)
{
	struct forget *f = calloc(1, sizeof(*f));

	if (!f)
		return NULL;
	f->work.fn = forget_work;
	f->fs = n->sbx->fs;
	f->dir = ffs_branches_node(f->fs, n->sbx);
	snprintf(f->name, sizeof(f->name), "%s", n->name);
	return f;
}

/* A cached branch that nobody uses; false: it is in use, or no longer cached. */
static bool let_go(struct ffs_named *n)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct forget *f = NULL;

	pthread_mutex_lock(&fs->lock);
	bool idle =
		n->key && n->shot && !n->removed && n->shot->state != FFS_BRANCH_WRITING && !n->shot->opens;
	struct ffs_shot *shot = idle ? ffs_shot_ref(n->shot) : NULL;

	if (idle)
		f = make_forget(n);
	pthread_mutex_unlock(&fs->lock);
	if (!idle)
		return false;
	bool gone = ffs_named_drop(n, NULL) == 0;

	if (gone)
		atomic_fetch_add(&fs->count.cache_pruned, 1);
	/* here and not in the pool: unless somebody just looks at it, its memory is free when this returns */
	ffs_shot_unref_now(shot);
	if (f && gone)
		ffs_pool_submit(fs->pool, &f->work);
	else
		free(f);
	return gone;
}

struct found {
	struct ffs_prune_entry *e;
	unsigned n, room;
};

/* Tree lock held: the cached branches of all sandboxes that take memory, or those that are stored, each
 * referenced. */
static void collect(struct ffs_fs *fs, bool stored, struct found *f)
{
	for (struct ffs_list *s = fs->sandboxes.next; s != &fs->sandboxes; s = s->next) {
		struct ffs_sbx *sbx = ffs_container(s, struct ffs_sbx, link);

		for (struct ffs_list *b = sbx->branches.next; b != &sbx->branches; b = b->next) {
			struct ffs_named *n = ffs_container(b, struct ffs_named, link);

			if (!n->key || !n->shot || !n->shot->stored == stored)
				continue;
			if (f->n == f->room) {
				unsigned room = f->room ? f->room * 2 : 32;
				struct ffs_prune_entry *more = realloc(f->e, room * sizeof(*more));

				if (!more)
					return;
				f->e = more;
				f->room = room;
			}
			f->e[f->n++] = (struct ffs_prune_entry){.data = ffs_named_ref(n),
				.size = ffs_shot_bytes(n->shot),
				.last_use_ns = n->last_use_ns,
				.in_use = n->shot->state == FFS_BRANCH_WRITING || n->shot->opens};
		}
	}
}

static void release(struct ffs_fs *fs, struct found *f)
{
	pthread_mutex_lock(&fs->lock);
	for (unsigned i = 0; i < f->n; i++)
		ffs_named_unref(f->e[i].data);
	pthread_mutex_unlock(&fs->lock);
	free(f->e);
}

static void prune_tier(struct ffs_fs *fs, bool stored)
{
	struct ffs_prune_limits limits = {
		.age_ns = fs->opt.cache_age_ns, .size = stored ? fs->opt.cache_store : fs->opt.cache_size};
	struct found f = {0};

	pthread_mutex_lock(&fs->lock);
	collect(fs, stored, &f);
	pthread_mutex_unlock(&fs->lock);
	if (ffs_prune(f.e, f.n, &limits, ffs_now_ns()))
		for (unsigned i = 0; i < f.n; i++)
			if (f.e[i].goes)
				let_go(f.e[i].data);
	release(fs, &f);
}

static void prune_work(struct ffs_work *w)
{
	struct ffs_keyed *k = ffs_container(w, struct ffs_keyed, prune);

	pthread_mutex_lock(&k->fs->lock);
	k->pruning = false;
	pthread_mutex_unlock(&k->fs->lock);
	prune_tier(k->fs, false);
	prune_tier(k->fs, true);
}

bool ffs_keyed_make_room(struct ffs_sbx *sbx)
{
	struct ffs_fs *fs = sbx->fs;
	struct found f = {0};
	bool any = false;

	/* it may have been something else that had no room */
	if (ffs_engine_has_room(fs->engine, sbx->memory_size))
		return false;
	pthread_mutex_lock(&fs->lock);
	collect(fs, false, &f);
	pthread_mutex_unlock(&fs->lock);
	while (!ffs_engine_has_room(fs->engine, sbx->memory_size)) {
		struct ffs_prune_entry *oldest = NULL;

		for (unsigned i = 0; i < f.n; i++)
			if (!f.e[i].in_use && (!oldest || f.e[i].last_use_ns < oldest->last_use_ns))
				oldest = &f.e[i];
		if (!oldest)
			break;
		oldest->in_use = true; /* not again */
		uint64_t frees = ffs_engine_frees(fs->engine);

		if (let_go(oldest->data)) {
			any = true;
			ffs_engine_await_free(fs->engine, frees, ffs_now_ns() + FREED_NS);
		}
	}
	release(fs, &f);
	return any && ffs_engine_has_room(fs->engine, sbx->memory_size);
}

static void start_pruning(struct ffs_fs *fs)
{
	if (!fs->keyed->pruning && !fs->closing) {
		fs->keyed->pruning = true;
		ffs_pool_submit(fs->pool, &fs->keyed->prune);
	}
}

uint64_t ffs_keyed_tick(struct ffs_fs *fs, uint64_t now_ns)
{
	uint64_t next = 0, age = fs->opt.cache_age_ns;

	for (struct ffs_list *s = fs->sandboxes.next; age && s != &fs->sandboxes; s = s->next) {
		struct ffs_sbx *sbx = ffs_container(s, struct ffs_sbx, link);

		for (struct ffs_list *b = sbx->branches.next; b != &sbx->branches; b = b->next) {
			struct ffs_named *n = ffs_container(b, struct ffs_named, link);

			if (n->key && n->shot && (!next || n->last_use_ns + age < next))
				next = n->last_use_ns + age;
		}
	}
	if (!next || next > now_ns)
		return next;
	start_pruning(fs);
	return now_ns + AGAIN_NS;
}

/* ---- finding and taking ---- */

void ffs_keyed_used(struct ffs_named *n)
{
	n->last_use_ns = ffs_now_ns();
}

void ffs_keyed_adopt(struct ffs_named *n, const char *key)
{
	char name[40];

	ffs_key_name(key, name);
	/* renamed, it has been its user's since */
	if (strcmp(n->name, name) == 0 && !n->key)
		n->key = strdup(key);
	ffs_keyed_used(n);
}

void ffs_keyed_keep(struct ffs_named *n)
{
	free(n->key);
	n->key = NULL;
}

static struct ffs_named *find(struct ffs_sbx *sbx, const char *key)
{
	char name[40];

	for (struct ffs_list *e = sbx->branches.next; e != &sbx->branches; e = e->next) {
		struct ffs_named *n = ffs_container(e, struct ffs_named, link);

		if (n->key && strcmp(n->key, key) == 0)
			return n;
	}
	/* one that failed under an earlier daemon, whose key nobody knows any more */
	ffs_key_name(key, name);
	struct ffs_named *n = ffs_named_find(sbx, name);

	if (n && !n->key && n->shot && n->shot->state == FFS_BRANCH_FAILED && (n->key = strdup(key)))
		return n;
	return NULL;
}

static uint64_t changes(struct ffs_keyed *k)
{
	pthread_mutex_lock(&k->lock);
	uint64_t n = k->changes;

	pthread_mutex_unlock(&k->lock);
	return n;
}

static void tell_change(struct ffs_keyed *k)
{
	pthread_mutex_lock(&k->lock);
	k->changes++;
	pthread_cond_broadcast(&k->changed);
	pthread_mutex_unlock(&k->lock);
}

/* Until something has changed since `seen`. */
static int await_change(struct ffs_keyed *k, uint64_t seen, struct ffs_cancel *cancel, uint64_t deadline_ns,
	struct ffs_error *err)
{
	int r = 0;

	pthread_mutex_lock(&k->lock);
	while (k->changes == seen && r == 0)
		r = ffs_cancel_wait(cancel, &k->changed, &k->lock, deadline_ns);
	bool moved = k->changes != seen;

	pthread_mutex_unlock(&k->lock);
	if (moved)
		return 0;
	return r == -EINTR
		       ? ffs_error_set(err, EINTR, "interrupted while another takes the branch of that key")
		       : ffs_error_set(
				 err, EAGAIN, "another has not yet taken the branch of that key: try again");
}

/* Tree lock held: become the one who takes it. */
static int win(struct ffs_sbx *sbx, const char *key, const struct ffs_caller *who,
	const struct ffs_take_options *how, struct ffs_named **out, struct ffs_error *err)
{
	char name[40], *copy = strdup(key);
	int r;

	if (!copy)
		return ffs_error_set(err, ENOMEM, "no memory");
	ffs_key_name(key, name);
	r = ffs_named_reserve(sbx, name, who, out, err);
	if (r < 0) {
		free(copy);
		return r;
	}
	(*out)->key = copy;
	if (how->has_store)
		(*out)->kind = how->store;
	ffs_keyed_used(*out);
	return 0;
}

/* One look: 0 and *out (found, or reserved when !*hit); 1: somebody takes it. */
static int look(struct ffs_sbx *sbx, const char *key, const struct ffs_caller *who,
	const struct ffs_take_options *how, struct ffs_named **out, bool *hit, struct ffs_named **failed,
	struct ffs_error *err)
{
	struct ffs_fs *fs = sbx->fs;
	int r = 0;

	*failed = NULL;
	pthread_mutex_lock(&fs->lock);
	struct ffs_named *n = find(sbx, key);

	*hit = n != NULL;
	if (n && !n->shot)
		r = 1;
	else if (n && n->shot->state == FFS_BRANCH_FAILED)
		*failed = ffs_named_ref(n);
	else if (n)
		*out = ffs_named_ref(n);
	else
		r = win(sbx, key, who, how, out, err);
	if (n)
		ffs_keyed_used(n);
	pthread_mutex_unlock(&fs->lock);
	return r;
}

static void unref(struct ffs_fs *fs, struct ffs_named *n)
{
	pthread_mutex_lock(&fs->lock);
	ffs_named_unref(n);
	pthread_mutex_unlock(&fs->lock);
}

int ffs_keyed_get(struct ffs_sbx *sbx, const char *key, const struct ffs_caller *who,
	const struct ffs_take_options *how, struct ffs_cancel *cancel, bool (*wanted)(void *arg), void *arg,
	struct ffs_named **out, bool *hit, struct ffs_error *err)
{
	struct ffs_fs *fs = sbx->fs;
	uint64_t deadline_ns = ffs_now_ns() + how->timeout_ns;
	struct ffs_named *n = NULL, *failed;

	for (;;) {
		uint64_t seen = changes(fs->keyed);
		int r = look(sbx, key, who, how, &n, hit, &failed, err);

		if (failed) {
			/* of no use to anybody; whoever finds it first clears it away */
			r = ffs_named_drop(failed, err);
			unref(fs, failed);
			if (r < 0 && r != -ENOENT)
				return r;
			continue;
		}
		if (r == 0)
			break;
		if (r > 0)
			r = await_change(fs->keyed, seen, cancel, deadline_ns, err);
		if (r < 0)
			return r;
	}
	if (*hit) {
		atomic_fetch_add(&fs->count.cache_hits, 1);
		*out = n;
		return 0;
	}
	atomic_fetch_add(&fs->count.cache_misses, 1);
	int r = ffs_named_take(n, how, cancel, wanted, arg, err);

	tell_change(fs->keyed);
	if (r < 0) {
		unref(fs, n);
		return r;
	}
	*out = n;
	pthread_mutex_lock(&fs->lock);
	start_pruning(fs);
	pthread_mutex_unlock(&fs->lock);
	ffs_reaper_push(fs->reaper, NULL); /* there is one more whose time will come */
	return 0;
}
