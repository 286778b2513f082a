/* Owns the objects behind the tree: sandboxes, named branches, generations' payloads, and the shots they
 * share.
 *
 * Threads: any, tree lock held (daemon.h), except shots, whose references are atomic: the last one is dropped
 * in the pool, because letting go of an image may wait for its capture to end. The engine's settle callback
 * takes no lock but the reaper's. */
#include "daemon.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "box.h"
#include "data.h"
#include "durable.h"
#include "events.h"
#include "fork.h"
#include "park.h"

/* ---- shots ---- */

static void call_waiters(struct ffs_shot *s, struct ffs_list *waiters)
{
	for (struct ffs_list *e = waiters->next, *next; e != waiters; e = next) {
		struct ffs_waiter *waiter = ffs_container(e, struct ffs_waiter, link);

		next = e->next;
		waiter->settled(waiter, s);
	}
}

static void free_shot(struct ffs_work *w)
{
	struct ffs_shot *s = ffs_container(w, struct ffs_shot, free_work);
	struct ffs_fs *fs = s->fs;
	struct ffs_list waiters;

	/* after this the callback neither runs nor will */
	if (s->branch)
		ffs_branch_unwatch(s->branch, &s->watch);
	/* who waited by name, without a file of it open, must hear that it was removed */
	pthread_mutex_lock(&fs->lock);
	ffs_list_move(&waiters, &s->waiters);
	pthread_mutex_unlock(&fs->lock);
	call_waiters(s, &waiters);
	ffs_durable_free(s);
	ffs_branch_unref(s->branch);
	pthread_mutex_lock(&fs->lock);
	ffs_sbx_unref(s->sbx);
	pthread_mutex_unlock(&fs->lock);
	ffs_mailbox_frames_free(&s->frames);
	free(s->manifest);
	free(s);
}

struct ffs_shot *ffs_shot_ref(struct ffs_shot *s)
{
	atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
	return s;
}

void ffs_shot_unref(struct ffs_shot *s)
{
	if (s && atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) == 1)
		ffs_pool_submit(s->fs->pool, &s->free_work);
}

bool ffs_shot_unref_now(struct ffs_shot *s)
{
	if (atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) != 1)
		return false;
	free_shot(&s->free_work);
	return true;
}

uint64_t ffs_shot_bytes(const struct ffs_shot *s)
{
	uint64_t all = 0, shared;

	if (s->stored)
		ffs_stored_sizes(s->stored, &all, &shared);
	return s->stored ? all : s->branch ? ffs_branch_image_bytes(s->branch) : 0;
}

/* From an engine thread. A shot that is being freed is left alone. */
static void settled(void *arg)
{
	struct ffs_shot *s = arg;
	unsigned refs = atomic_load(&s->refs);

	while (refs && !atomic_compare_exchange_weak(&s->refs, &refs, refs + 1))
		;
	if (refs)
		ffs_reaper_push(s->fs->reaper, &s->settle_work);
}

static char *make_manifest(struct ffs_shot *s, size_t *len)
{
	struct json_object *obj = NULL;
	char *text = NULL;
	int r = ffs_branch_manifest(s->branch, &obj);

	if (r < 0) {
		ffs_log(FFS_LOG_ERROR, "%s: no manifest: %s", ffs_branch_id(s->branch), strerror(-r));
		return NULL;
	}
	int n = asprintf(&text, "%s\n",
		json_object_to_json_string_ext(
			obj, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));

	json_object_put(obj);
	if (n < 0)
		return NULL;
	*len = (size_t)n;
	return text;
}

static void tell_settled(struct ffs_shot *s)
{
	struct ffs_fs *fs = s->fs;
	bool ready = s->state == FFS_BRANCH_READY;

	if (s->named)
		ffs_event(fs, ready ? "ready" : "failed", s->sbx->name, s->named->name, ffs_shot_id(s),
			ready ? NULL : s->failure.text);
	else if (s->live && !ready)
		ffs_event(fs, "failed", s->sbx->name, NULL, ffs_shot_id(s), s->failure.text);
	if (s->live && !ready && s->live->gen)
		ffs_gen_fail(s->live->gen);
}

void ffs_shot_succeed(struct ffs_shot *s, struct ffs_shot *next)
{
	struct ffs_named *n = s->named;

	/* removed meanwhile: the last reference of `next` is ours */
	if (n) {
		n->shot = next;
		next->named = n;
		s->named = NULL;
	}
	ffs_shot_unref(n ? s : next);
}

/* On the reaper's thread: when the capture is over, and again when the branch is in the store. */
static void settle(struct ffs_work *w)
{
	struct ffs_shot *s = ffs_container(w, struct ffs_shot, settle_work);
	struct ffs_fs *fs = s->fs;
	enum ffs_branch_state state = ffs_branch_state(s->branch);
	struct ffs_error why = {0};
	struct ffs_list waiters, waits;
	size_t len = 0;
	char *manifest;

	if (state == FFS_BRANCH_FAILED)
		ffs_branch_failure(s->branch, &why);
	if (ffs_durable_take_over(s, state, &why))
		return;
	manifest = ffs_durable_manifest(s, &len);
	if (!manifest && state == FFS_BRANCH_READY)
		manifest = make_manifest(s, &len);
	pthread_mutex_lock(&fs->lock);
	s->state = state;
	s->failure = why;
	s->dense = state == FFS_BRANCH_READY && ffs_branch_memory_fd(s->branch) >= 0;
	s->manifest = manifest;
	s->manifest_len = len;
	struct ffs_shot *next = ffs_durable_successor(s);

	state = s->state;
	why = s->failure;
	ffs_list_move(&waiters, &s->waiters);
	ffs_list_init(&waits);
	if (s->named)
		ffs_parked_claim_all(&s->named->waits, &waits);
	tell_settled(s);
	if (next)
		ffs_shot_succeed(s, next);
	pthread_mutex_unlock(&fs->lock);
	if (state == FFS_BRANCH_FAILED)
		ffs_log(FFS_LOG_WARN, "%s: branch %s failed: %s", s->sbx->name, ffs_shot_id(s), why.text);
	ffs_wait_answer_all(&waits, state == FFS_BRANCH_READY ? 0 : -EIO, &why);
	call_waiters(s, &waiters);
	ffs_polls_check(fs);
	ffs_shot_unref(s);
}

struct ffs_shot *ffs_shot_new(struct ffs_sbx *sbx, struct ffs_branch *branch)
{
	struct ffs_shot *s;

	pthread_mutex_lock(&sbx->fs->lock);
	s = ffs_shot_plain(sbx);
	pthread_mutex_unlock(&sbx->fs->lock);
	if (!s) {
		ffs_branch_unref(branch);
		return NULL;
	}
	s->branch = branch;
	s->watch = (struct ffs_branch_watch){.fn = settled, .arg = s};
	s->settle_work.fn = settle;
	s->memory_size = ffs_branch_memory_size(branch);
	s->vmstate_size = ffs_branch_vmstate_size(branch);
	s->time_ns = ffs_branch_time_ns(branch);
	s->state = FFS_BRANCH_WRITING;
	return s;
}

struct ffs_shot *ffs_shot_plain(struct ffs_sbx *sbx)
{
	struct ffs_shot *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	atomic_init(&s->refs, 1);
	s->fs = sbx->fs;
	s->free_work.fn = free_shot;
	ffs_list_init(&s->waiters);
	s->sbx = ffs_sbx_ref(sbx);
	return s;
}

struct ffs_shot *ffs_shot_of_store(const struct ffs_shot *like, struct ffs_stored *stored)
{
	struct ffs_shot *s = ffs_shot_plain(like->sbx);

	if (!s)
		return NULL;
	s->memory_size = like->memory_size;
	s->vmstate_size = like->vmstate_size;
	s->time_ns = like->time_ns;
	s->state = like->state;
	s->failure = like->failure;
	s->stored = stored;
	s->manifest_len = stored ? ffs_stored_manifest_size(stored) : 0;
	return s;
}

bool ffs_shot_is_file(const struct ffs_shot *s, bool memory)
{
	if (!s->stored)
		return s->branch && (!memory || s->dense);
	return atomic_load(&s->fs->store_pass) && (!memory || ffs_stored_kind(s->stored) == FFS_STORE_DENSE);
}

const char *ffs_shot_id(const struct ffs_shot *s)
{
	return s->branch ? ffs_branch_id(s->branch) : s->stored ? ffs_stored_id(s->stored) : "";
}

void ffs_shot_watch(struct ffs_shot *s)
{
	ffs_branch_watch(s->branch, &s->watch);
}

/* ---- generations ---- */

struct ffs_live *ffs_live_new(struct ffs_sbx *sbx, const char *key)
{
	struct ffs_live *l = calloc(1, sizeof(*l));

	if (!l)
		return NULL;
	l->key = strdup(key);
	l->cancel = ffs_cancel_new();
	if (!l->key || !l->cancel) {
		ffs_cancel_unref(l->cancel);
		free(l->key);
		free(l);
		return NULL;
	}
	l->refs = 1;
	l->serial = sbx->fs->next_serial++;
	l->fork = ffs_fork_new(sbx->fs, NULL, "");
	if (!l->fork) {
		ffs_cancel_unref(l->cancel);
		free(l->key);
		free(l);
		return NULL;
	}
	l->sbx = ffs_sbx_ref(sbx);
	l->taking = true;
	ffs_list_init(&l->openers);
	return l;
}

struct ffs_live *ffs_live_ref(struct ffs_live *l)
{
	l->refs++;
	return l;
}

void ffs_live_unref(struct ffs_live *l)
{
	if (!l || --l->refs)
		return;
	if (l->shot)
		l->shot->live = NULL;
	ffs_shot_unref(l->shot);
	ffs_fork_unref(l->fork);
	ffs_cancel_unref(l->cancel);
	ffs_sbx_unref(l->sbx);
	free(l->key);
	free(l);
}

void ffs_live_ended(void *data, void *arg)
{
	struct ffs_live *l = data;
	struct ffs_shot *s = l->shot;

	l->gen = NULL;
	l->shot = NULL;
	if (s) {
		s->live = NULL;
		ffs_shot_unref(s);
	}
	ffs_live_unref(l);
}

/* ---- named branches ---- */

struct ffs_named *ffs_named_find(struct ffs_sbx *sbx, const char *name)
{
	for (struct ffs_list *e = sbx->branches.next; e != &sbx->branches; e = e->next) {
		struct ffs_named *n = ffs_container(e, struct ffs_named, link);

		if (strcmp(n->name, name) == 0)
			return n;
	}
	return NULL;
}

struct ffs_named *ffs_named_new(struct ffs_sbx *sbx, const char *name)
{
	struct ffs_named *n = calloc(1, sizeof(*n));

	if (!n)
		return NULL;
	n->refs = 2; /* the list's and the caller's */
	n->serial = sbx->fs->next_serial++;
	snprintf(n->name, sizeof(n->name), "%s", name);
	n->sbx = ffs_sbx_ref(sbx);
	n->time_ns = ffs_wall_ns();
	ffs_list_init(&n->waits);
	ffs_list_init(&n->forks);
	ffs_list_add(&sbx->branches, &n->link);
	sbx->n_branches++;
	return n;
}

int ffs_named_disk(const struct ffs_named *n, const char *id)
{
	for (unsigned i = 0; i < n->n_disks; i++)
		if (strcmp(n->disks[i].id, id) == 0)
			return (int)i;
	return -1;
}

int ffs_named_room_for_disks(struct ffs_named *n, unsigned count)
{
	n->disks = count ? calloc(count, sizeof(*n->disks)) : NULL;
	return count && !n->disks ? -ENOMEM : 0;
}

void ffs_named_add_disk(struct ffs_named *n, const char *id, uint64_t size)
{
	snprintf(n->disks[n->n_disks].id, sizeof(n->disks[0].id), "%s", id);
	n->disks[n->n_disks++].size = size;
}

struct ffs_named *ffs_named_ref(struct ffs_named *n)
{
	n->refs++;
	return n;
}

void ffs_named_unref(struct ffs_named *n)
{
	if (!n || --n->refs)
		return;
	ffs_sbx_unref(n->sbx);
	free(n->disks);
	free(n->key);
	free(n);
}

void ffs_named_remove(struct ffs_named *n)
{
	struct ffs_shot *s = n->shot;

	if (n->removed)
		return;
	n->removed = true;
	n->shot = NULL;
	ffs_forks_drop(n);
	ffs_list_del(&n->link);
	n->sbx->n_branches--;
	n->sbx->changed_ns = ffs_wall_ns();
	if (s) {
		s->named = NULL;
		ffs_shot_unref(s);
	}
	ffs_named_unref(n);
}

/* ---- sandboxes ---- */

struct ffs_sbx *ffs_tree_find(struct ffs_fs *fs, const char *name)
{
	for (struct ffs_list *e = fs->sandboxes.next; e != &fs->sandboxes; e = e->next) {
		struct ffs_sbx *s = ffs_container(e, struct ffs_sbx, link);

		if (strcmp(s->name, name) == 0)
			return s;
	}
	return NULL;
}

/* Who read half a pair of a VM is told so, also when another VM has the name by then. */
struct owed {
	struct ffs_list link;
	char name[80];
	struct ffs_gen_table *gens;
};
#define MAX_OWED 256

static void keep_owed(struct ffs_fs *fs, struct ffs_sbx *s)
{
	struct owed *o = ffs_gen_owes(s->gens) ? calloc(1, sizeof(*o)) : NULL;

	if (!o)
		return;
	snprintf(o->name, sizeof(o->name), "%s", s->name);
	o->gens = s->gens;
	s->gens = NULL;
	ffs_list_add(&fs->owed, &o->link);
	if (++fs->n_owed > MAX_OWED) {
		o = ffs_container(fs->owed.next, struct owed, link);
		ffs_list_del(&o->link);
		fs->n_owed--;
		ffs_gen_table_free(o->gens);
		free(o);
	}
}

static struct ffs_gen_table *take_owed(struct ffs_fs *fs, const char *name)
{
	struct ffs_gen_table *gens = NULL;

	for (struct ffs_list *e = fs->owed.next; !gens && e != &fs->owed; e = e->next) {
		struct owed *o = ffs_container(e, struct owed, link);

		if (strcmp(o->name, name) != 0)
			continue;
		gens = o->gens;
		ffs_list_del(&o->link);
		fs->n_owed--;
		free(o);
		break;
	}
	return gens;
}

struct ffs_sbx *ffs_sbx_new(struct ffs_fs *fs, const char *name)
{
	struct ffs_sbx *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->gens = take_owed(fs, name);
	if (!s->gens)
		s->gens = ffs_gen_table_new(
			(struct ffs_gen_rules){.lease_ns = fs->opt.lease_ns, .rate = fs->opt.branch_rate});
	if (!s->gens) {
		free(s);
		return NULL;
	}
	s->refs = 1;
	s->serial = fs->next_serial++;
	snprintf(s->name, sizeof(s->name), "%s", name);
	s->fs = fs;
	s->pidfd = -1;
	s->uid = fs->uid;
	s->gid = fs->gid;
	s->writable = true;
	s->attached_ns = s->changed_ns = ffs_wall_ns();
	ffs_list_init(&s->branches);
	ffs_list_init(&s->tokens);
	return s;
}

void ffs_tree_add(struct ffs_fs *fs, struct ffs_sbx *sbx)
{
	ffs_list_add(&fs->sandboxes, &ffs_sbx_ref(sbx)->link);
}

bool ffs_tree_drop_empty(struct ffs_fs *fs, struct ffs_sbx *sbx)
{
	if (sbx->removed || sbx->engine || sbx->attaching || sbx->detaching || sbx->n_branches)
		return false;
	sbx->removed = true;
	/* the VM was let go, so every generation has ended */
	keep_owed(fs, sbx);
	if (ffs_list_linked(&sbx->link)) {
		ffs_list_del(&sbx->link);
		ffs_sbx_unref(sbx);
	}
	return true;
}

struct ffs_sbx *ffs_sbx_ref(struct ffs_sbx *sbx)
{
	sbx->refs++;
	return sbx;
}

void ffs_sbx_unref(struct ffs_sbx *sbx)
{
	if (!sbx || --sbx->refs)
		return;
	ffs_gen_table_free(sbx->gens);
	if (sbx->pidfd >= 0)
		close(sbx->pidfd);
	if (sbx->engine)
		ffs_sandbox_unref(sbx->engine);
	ffs_tokens_free(&sbx->tokens);
	ffs_mailbox_frames_free(&sbx->frames);
	free(sbx->last_status);
	free(sbx);
}

const char *ffs_sbx_state(struct ffs_sbx *sbx)
{
	if (!sbx->engine || sbx->detaching)
		return "detached";
	if (sbx->exited)
		return ffs_run_state_name(FFS_RUN_EXITED);
	return ffs_run_state_name(ffs_sandbox_state(sbx->engine));
}
