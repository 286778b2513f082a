/* Owns the queue of branches that wait to be written to the store, the room that is kept for them, and the
 * jobs that give back the room of what was removed.
 *
 * Threads: any; everything is under the tree lock. The pool of writers gets a token for each branch and not
 * the branch: a token that comes up takes whichever branch's turn it is. */
#include "writers.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "store/store.h"

/* What was removed just before gives its room back first; a mkdir has a second in all. */
#define REAP_NS (400 * FFS_NS_PER_MS)
/* A file that was deleted takes its room until it is closed, and the kernel tells of that, and of a node that it
 * forgets, when it comes to it. */
#define CLOSE_NS (300 * FFS_NS_PER_MS)
#define LOOK_MS 5

struct ffs_write_token {
	struct ffs_work work;
	struct ffs_fs *fs;
};

/* Tree lock held: what is kept for the others and not yet taken. */
static uint64_t still_wanted(struct ffs_fs *fs)
{
	uint64_t sum = 0;

	for (struct ffs_list *e = fs->writes.next; e != &fs->writes; e = e->next) {
		const struct ffs_write *w = ffs_container(e, struct ffs_write, link);
		uint64_t done = atomic_load(w->done);

		sum += w->bytes > done ? w->bytes - done : 0;
	}
	return sum;
}

/* Wait until a job that deletes what was removed is done; false: there is none, or it takes too long. */
static bool await_reap(struct ffs_fs *fs, uint64_t deadline_ns)
{
	struct timespec ts = {.tv_sec = (time_t)(deadline_ns / FFS_NS_PER_S),
		.tv_nsec = (long)(deadline_ns % FFS_NS_PER_S)};
	int r = 0;

	pthread_mutex_lock(&fs->lock);
	unsigned before = fs->n_reaps;

	while (before && fs->n_reaps == before && r == 0)
		r = pthread_cond_clockwait(&fs->durable_idle, &fs->lock, CLOCK_MONOTONIC, &ts);
	pthread_mutex_unlock(&fs->lock);
	return before && r == 0;
}

/* Wait a little for the room of what was deleted just now; false: that was long ago. */
static bool await_close(struct ffs_fs *fs, uint64_t deadline_ns)
{
	uint64_t now = ffs_now_ns();

	pthread_mutex_lock(&fs->lock);
	bool fresh = fs->reaped_ns && now < fs->reaped_ns + CLOSE_NS;

	pthread_mutex_unlock(&fs->lock);
	if (!fresh || now >= deadline_ns)
		return false;
	poll(NULL, 0, LOOK_MS);
	return true;
}

int ffs_write_begin(struct ffs_write *w, struct ffs_sbx *sbx, uint64_t bytes, const atomic_ullong *done,
	struct ffs_error *err)
{
	struct ffs_fs *fs = sbx->fs;
	uint64_t free_bytes = 0, others = 0, deadline_ns = ffs_now_ns() + REAP_NS;
	bool fits = false;
	int r = FFS_FAULT("store-room");

	*w = (struct ffs_write){.bytes = bytes, .done = done};
	if (r < 0)
		return r;
	w->token = calloc(1, sizeof(*w->token));
	if (!w->token)
		return ffs_error_set(err, ENOMEM, "no memory");
	w->token->fs = fs;
	do {
		r = ffs_store_free_bytes(fs->store, &free_bytes, err);
		if (r < 0)
			break;
		pthread_mutex_lock(&fs->lock);
		others = still_wanted(fs);
		fits = others <= free_bytes && bytes <= free_bytes - others;
		if (fits) {
			w->sbx = ffs_sbx_ref(sbx);
			ffs_list_add(&fs->writes, &w->link);
		}
		pthread_mutex_unlock(&fs->lock);
	} while (!fits && (await_reap(fs, deadline_ns) || await_close(fs, deadline_ns)));
	if (!r && fits)
		return 0;
	free(w->token);
	w->token = NULL;
	if (r < 0)
		return r;
	return ffs_error_set(err, ENOSPC,
		"a branch of %s may take %llu MiB of the store %s, where %llu MiB are free and %llu MiB of "
		"them wanted by "
		"branches that are being written: remove branches, or take it with the store 'memory'",
		sbx->name, (unsigned long long)bytes >> 20, ffs_store_path(fs->store),
		(unsigned long long)free_bytes >> 20, (unsigned long long)others >> 20);
}

void ffs_write_end(struct ffs_write *w)
{
	struct ffs_fs *fs = w->sbx ? w->sbx->fs : NULL;

	if (!fs)
		return;
	pthread_mutex_lock(&fs->lock);
	ffs_list_del(&w->link);
	ffs_sbx_unref(w->sbx);
	w->sbx = NULL;
	pthread_mutex_unlock(&fs->lock);
	free(w->token);
	w->token = NULL;
}

/* Tree lock held: the one that has waited longest of the sandbox that was served longest ago; `turn_of` says
 * when that was. */
static struct ffs_write *next(struct ffs_fs *fs, uint64_t (*turn_of)(const struct ffs_sbx *sbx), bool counted)
{
	struct ffs_write *best = NULL;

	for (struct ffs_list *e = fs->writes.next; e != &fs->writes; e = e->next) {
		struct ffs_write *w = ffs_container(e, struct ffs_write, link);

		if (!w->waiting || (counted && w->counted))
			continue;
		uint64_t turn = turn_of(w->sbx), than = best ? turn_of(best->sbx) : 0;

		if (!best || turn < than || (turn == than && w->waiting < best->waiting))
			best = w;
	}
	return best;
}

static uint64_t real_turn(const struct ffs_sbx *sbx)
{
	return sbx->write_turn;
}

static uint64_t imagined_turn(const struct ffs_sbx *sbx)
{
	return sbx->imagined_turn;
}

static void run_token(struct ffs_work *work)
{
	struct ffs_write_token *t = ffs_container(work, struct ffs_write_token, work);
	struct ffs_fs *fs = t->fs;

	free(t);
	pthread_mutex_lock(&fs->lock);
	/* there are as many that wait as there are tokens */
	struct ffs_write *w = next(fs, real_turn, false);

	w->waiting = 0;
	w->sbx->write_turn = ++fs->write_turns;
	pthread_mutex_unlock(&fs->lock);
	w->run(w);
}

void ffs_write_submit(struct ffs_write *w, void (*run)(struct ffs_write *w))
{
	struct ffs_fs *fs = w->sbx->fs;
	struct ffs_write_token *t = w->token;

	w->token = NULL;
	w->run = run;
	t->work.fn = run_token;
	pthread_mutex_lock(&fs->lock);
	w->waiting = ++fs->writes_arrived;
	pthread_mutex_unlock(&fs->lock);
	ffs_pool_submit(fs->writers, &t->work);
}

unsigned ffs_write_place(struct ffs_write *w)
{
	struct ffs_fs *fs = w->sbx ? w->sbx->fs : NULL;
	uint64_t turns = fs ? fs->write_turns : 0;
	unsigned place = 0;
	struct ffs_write *n;

	if (!fs || !w->waiting)
		return 0;
	for (struct ffs_list *e = fs->writes.next; e != &fs->writes; e = e->next) {
		n = ffs_container(e, struct ffs_write, link);
		n->counted = false;
		n->sbx->imagined_turn = n->sbx->write_turn;
	}
	do {
		n = next(fs, imagined_turn, true);
		n->counted = true;
		n->sbx->imagined_turn = ++turns;
		place++;
	} while (n != w);
	return place;
}

/* ---- what was removed ---- */

struct reap {
	struct ffs_work work;
	struct ffs_fs *fs;
	char sandbox[80];
};

static void run_reap(struct ffs_work *w)
{
	struct reap *r = ffs_container(w, struct reap, work);
	struct ffs_error err = {0};

	if (ffs_store_reap(r->fs->store, r->sandbox, &err) < 0)
		ffs_log(FFS_LOG_WARN, "%s", err.text);
	pthread_mutex_lock(&r->fs->lock);
	r->fs->n_reaps--;
	r->fs->reaped_ns = ffs_now_ns();
	pthread_cond_broadcast(&r->fs->durable_idle);
	pthread_mutex_unlock(&r->fs->lock);
	free(r);
}

void ffs_write_reap(struct ffs_sbx *sbx)
{
	struct reap *r = sbx->fs->store ? calloc(1, sizeof(*r)) : NULL;

	/* without memory for the job the next daemon does it */
	if (!r)
		return;
	r->work.fn = run_reap;
	r->fs = sbx->fs;
	snprintf(r->sandbox, sizeof(r->sandbox), "%s", sbx->name);
	pthread_mutex_lock(&sbx->fs->lock);
	sbx->fs->n_reaps++;
	pthread_mutex_unlock(&sbx->fs->lock);
	ffs_pool_submit(sbx->fs->pool, &r->work);
}
