/* Owns the way from an open in branch/ to a branch: the key, the generation (generation.c decides), the take
 * in the pool, and those who wait for it.
 *
 * Threads: FUSE workers for lookup and open, the pool for taking. An open that waits for a take is parked
 * with its live object; when the last of them is interrupted the take is cancelled. OPEN answered with ESTALE
 * is tried once more by the kernel after a new LOOKUP: that is how an open gets to another node (a writer's,
 * or another generation's). */
#include "live.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "data.h"
#include "events.h"
#include "fork.h"
#include "keyed.h"
#include "nodes.h"
#include "park.h"

/* Nothing of the kernel's is locked while an open waits; beyond this the VM is too busy to be branched. */
#define OPEN_TAKE_NS (30 * FFS_NS_PER_S)

static enum ffs_gen_file file_of(enum ffs_kind kind)
{
	return ffs_kind_is_box(kind)           ? FFS_GEN_MAILBOX
	       : kind == FFS_KIND_LIVE_MEMORY  ? FFS_GEN_MEMORY
	       : kind == FFS_KIND_LIVE_VMSTATE ? FFS_GEN_VMSTATE
					       : FFS_GEN_MANIFEST;
}

/* KEY, or the caller's session. False: the caller has none that we can see. */
static bool key_of(const struct ffs_node *node, const struct ffs_caller *who, char out[80])
{
	bool keyed = node->key.key && !ffs_kind_is_box(node->key.kind);

	if (keyed)
		snprintf(out, 80, "k:%s", node->key.key);
	else
		snprintf(out, 80, "s:%d", (int)who->sid);
	return keyed || who->sid;
}

struct ffs_node *ffs_live_lookup(struct ffs_call *call, struct ffs_node *dir, int kind)
{
	struct ffs_fs *fs = call->fs;
	uint64_t ino = ffs_ino(kind, dir->sbx->serial, dir->key.key);
	bool writer = ffs_retry_peek(fs, call->who.tid, ino) == FFS_RETRY_WRITER;
	struct ffs_node_key key = {.kind = kind, .key = dir->key.key};
	struct ffs_gen *g = NULL;
	char text[80];

	if (key_of(dir, &call->who, text))
		g = ffs_gen_peek(
			dir->sbx->gens, text, file_of(kind), ffs_caller_who(&call->who), ffs_now_ns());
	struct ffs_live *live = g ? g->data : NULL;
	bool settled = live && live->shot && live->shot->state == FFS_BRANCH_READY &&
		       (kind != FFS_KIND_LIVE_MEMORY ||
			       (live->shot->dense && !ffs_overlay_pages(live->fork->overlay)));

	key.mode = writer                                 ? FFS_MODE_DIRECT
		   : settled && atomic_load(&fs->pass.on) ? FFS_MODE_PASS
							  : FFS_MODE_CACHED;
	if (live) {
		key.object = live->serial;
	} else {
		key.object = dir->sbx->serial;
		key.extra = (uint64_t)call->who.tgid;
		key.unbound = true;
	}
	return ffs_node_get(fs, &key, dir->sbx, NULL, live);
}

/* ---- the take ---- */

struct take_job {
	struct ffs_work work;
	struct ffs_live *live; /* referenced */
};

static int take(struct ffs_live *l, struct ffs_shot **out, struct ffs_error *err)
{
	struct ffs_fs *fs = l->sbx->fs;
	/* branch/ has no disks/ */
	struct ffs_branch_options opt = {.timeout_ns = OPEN_TAKE_NS, .without_disks = true};
	struct ffs_sandbox *engine;
	struct ffs_branch *branch = NULL;
	int r = FFS_FAULT("fs-open");

	if (r < 0)
		return r;
	pthread_mutex_lock(&fs->lock);
	engine = l->sbx->engine ? ffs_sandbox_ref(l->sbx->engine) : NULL;
	pthread_mutex_unlock(&fs->lock);
	if (!engine)
		return ffs_error_set(err, ESRCH, "sandbox '%s' was detached", l->sbx->name);
	r = ffs_branch_take(engine, &opt, l->cancel, &branch, err);
	if (r == -ENOSPC && ffs_keyed_make_room(l->sbx))
		r = ffs_branch_take(engine, &opt, l->cancel, &branch, err);
	ffs_sandbox_unref(engine);
	if (r < 0)
		return r;
	*out = ffs_shot_new(l->sbx, branch);
	return *out ? 0 : ffs_error_set(err, ENOMEM, "no memory for the branch");
}

/* Tree lock held: the generation never was. */
static void abort_generation(struct ffs_live *l)
{
	if (!l->gen)
		return;
	ffs_gen_abort(l->sbx->gens, l->gen);
	l->gen = NULL;
	ffs_live_unref(l);
}

/* Tree lock held. False: nobody waits for it any more, or the VM was let go. */
static bool publish(struct ffs_live *l, struct ffs_shot *s)
{
	if (!l->gen || (ffs_list_empty(&l->openers) && !l->stagers))
		return false;
	l->shot = s;
	l->vmstate_size = s->vmstate_size;
	l->time_ns = s->time_ns;
	s->live = l;
	ffs_event(l->sbx->fs, "branch", l->sbx->name, NULL, ffs_branch_id(s->branch), NULL);
	return true;
}

static void run_take(struct ffs_work *w)
{
	struct take_job *job = ffs_container(w, struct take_job, work);
	struct ffs_live *l = job->live;
	struct ffs_fs *fs = l->sbx->fs;
	struct ffs_error err = {0};
	struct ffs_shot *s = NULL;
	struct ffs_list claimed;
	int r = take(l, &s, &err);

	pthread_mutex_lock(&fs->lock);
	l->taking = false;
	pthread_cond_broadcast(&fs->live_taken);
	/* the kernel may keep the node, and with it this object, as long as it likes: not an fd for each */
	ffs_cancel_unref(l->cancel);
	l->cancel = NULL;
	if (!r && !publish(l, s))
		r = ffs_error_set(&err, ESRCH, "sandbox '%s' was detached", l->sbx->name);
	if (r < 0) {
		l->why = err;
		abort_generation(l);
	} else
		ffs_shot_ref(s); /* ours, till the openers have theirs */
	ffs_parked_claim_all(&l->openers, &claimed);
	pthread_mutex_unlock(&fs->lock);
	if (!r) {
		atomic_fetch_add(&fs->count.generations, 1);
		ffs_shot_watch(s);
	}
	for (struct ffs_list *e = claimed.next, *next; e != &claimed; e = next) {
		struct ffs_parked *p = ffs_container(e, struct ffs_parked, link);

		next = e->next;
		if (r < 0) {
			ffs_parked_fail(p, ffs_node_dir_ino(p->node), -r, &err);
		} else {
			ffs_data_opened(fs, ffs_parked_req(p), &p->who, p->node, s, l, p->flags);
			ffs_parked_unref(p);
		}
	}
	if (s)
		ffs_shot_unref(s);
	pthread_mutex_lock(&fs->lock);
	ffs_live_unref(l);
	pthread_mutex_unlock(&fs->lock);
	free(job);
}

/* ---- open ---- */

/* Tree lock held: nobody waits for the take any more? */
static void drop_if_unwanted(struct ffs_live *l)
{
	if (l->taking && ffs_list_empty(&l->openers) && !l->stagers) {
		ffs_cancel_set(l->cancel);
		/* who comes now begins a new one */
		if (l->gen)
			ffs_gen_fail(l->gen);
	}
}

/* Tree lock held: an interrupted opener. */
static void opener_gone(struct ffs_parked *p)
{
	struct ffs_live *l = p->data;

	if (l->gen)
		ffs_gen_close(l->gen, ffs_now_ns());
	drop_if_unwanted(l);
}

/* Tree lock held: what can be refused before any generation is thought of. Positive errno. */
static int check_sandbox(struct ffs_call *call, struct ffs_node *node, struct ffs_error *err)
{
	struct ffs_sbx *s = node->sbx;
	char key[80];

	if (!s->engine || s->detaching)
		return -ffs_error_set(err, ESRCH, "sandbox '%s' has no VM: it was detached", s->name);
	if (call->who.tgid && call->who.tgid == s->pid)
		return -ffs_error_set(err, EDEADLK,
			"process %d is the VM of '%s' itself: it would wait for its own pause",
			(int)call->who.tgid, s->name);
	if (!key_of(node, &call->who, key) && ffs_kind_is_box(node->key.kind))
		return -ffs_error_set(err, EOPNOTSUPP,
			"the daemon can't see this caller's session (another pid namespace?): make a fork of "
			"a named "
			"branch, %s/branches/NAME/forks/NAME, and write into its mailboxes",
			s->name);
	if (!key_of(node, &call->who, key))
		return -ffs_error_set(err, EOPNOTSUPP,
			"the daemon can't see this caller's session (another pid namespace?): open "
			"%s/branch@KEY/%s with "
			"a KEY of your own, the same for both files of a pair",
			s->name, ffs_kind_name(node->key.kind));
	return 0;
}

static int torn(const struct ffs_node *node, struct ffs_error *err)
{
	bool memory = node->key.kind == FFS_KIND_LIVE_MEMORY;

	return -ffs_error_set(err, ESTALE,
		"the snapshot whose %s was read here is over: this %s would be of another instant. Read both "
		"again; "
		"use a named branch (mkdir %s/branches/NAME) where there is more time between the two",
		memory ? "vmstate" : "memory.bin", memory ? "memory.bin" : "vmstate", node->sbx->name);
}

/* Tree lock held: which generation this open reads. 0 and *out, with the open counted; *begun: the caller
 * takes its branch. A positive errno else. */
static int choose(struct ffs_call *call, struct ffs_node *node, enum ffs_retry retry, struct ffs_live **out,
	bool *begun, struct ffs_error *err)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_gen_table *t = node->sbx->gens;
	struct ffs_gen_who who = ffs_caller_who(&call->who);
	enum ffs_gen_file file = file_of(node->key.kind);
	uint64_t now = ffs_now_ns();
	struct ffs_gen *g = NULL;
	char key[80];
	int r;

	key_of(node, &call->who, key);
	if (node->live) {
		g = ffs_gen_peek(t, key, file, who, now);
		if (!g || g->data != node->live) {
			if (retry == FFS_RETRY_NONE) {
				ffs_retry_note(fs, call->who.tid, node->ino, FFS_RETRY_NODE);
				return ESTALE;
			}
			/* no lookup leads here: it is opened through a handle on this very file */
			if (!node->live->gen)
				return -ffs_error_set(err, ESTALE, "the snapshot of this handle is over");
			*out = node->live;
			node->live->fork->fixed |= file == FFS_GEN_MEMORY;
			return -ffs_gen_open_this(node->live->gen, file, who, now);
		}
	}
	r = ffs_gen_open(t, key, file, who, now, &g);
	if (r == FFS_GEN_TORN) {
		/* the kernel tries again behind our back: it must hear the same, once */
		if (retry == FFS_RETRY_NONE)
			ffs_retry_note(fs, call->who.tid, node->ino, FFS_RETRY_TORN);
		return torn(node, err);
	}
	if (r == FFS_GEN_LIMITED) {
		atomic_fetch_add(&fs->count.limited, 1);
		return -ffs_error_set(err, EAGAIN,
			"more than %u snapshots a second through %s/branch (mount option branch-rate): wait, "
			"or use "
			"branches/ or ctl, which have no limit",
			fs->opt.branch_rate, node->sbx->name);
	}
	if (r < 0)
		return -r;
	if (r == FFS_GEN_BEGIN) {
		struct ffs_live *l = ffs_live_new(node->sbx, key);

		if (!l) {
			ffs_gen_abort(t, g);
			return ENOMEM;
		}
		/* the generation has the object's first reference */
		g->data = l;
		l->gen = g;
		*begun = true;
	}
	*out = g->data;
	/* what lies over this memory is fixed from here on */
	if (file == FFS_GEN_MEMORY)
		(*out)->fork->fixed = true;
	return 0;
}

/* Tree lock held: hand a begun generation to the pool. */
static int start_take(struct ffs_live *l)
{
	struct take_job *job = calloc(1, sizeof(*job));

	if (!job)
		return ENOMEM;
	job->work.fn = run_take;
	job->live = ffs_live_ref(l);
	ffs_pool_submit(l->sbx->fs->pool, &job->work);
	return 0;
}

/* Tree lock held, the request parked (p): 0 when it waits for the take or *shot is to be opened now
 * (referenced). */
static int join_live(
	struct ffs_parked *p, struct ffs_node *node, struct ffs_live *l, bool begun, struct ffs_shot **shot)
{
	if (!node->live)
		ffs_node_bind(p->fs, node, l);
	if (l->shot) {
		*shot = ffs_shot_ref(l->shot);
		return 0;
	}
	p->data = l; /* the node, which p references, keeps it */
	p->gone = opener_gone;
	ffs_parked_wait(p, &l->openers);
	return begun ? start_take(l) : 0;
}

void ffs_live_open(struct ffs_call *call, struct ffs_node *node, int flags)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_error err = {0};
	struct ffs_live *l = NULL;
	struct ffs_shot *shot = NULL;
	bool begun = false, mine = true;
	int code = ffs_data_check_open(node, flags, &err);

	/* parked first: once a generation counts this open, an interrupt must find it */
	struct ffs_parked *p = ffs_park(call, false);

	if (!p)
		return;
	pthread_mutex_lock(&fs->lock);
	p->node = ffs_node_ref(node);
	p->flags = flags;
	enum ffs_retry retry = ffs_retry_take(fs, call->who.tid, node->ino);

	if (p->claimed)
		mine = false;
	else if (!code)
		code = check_sandbox(call, node, &err);
	if (mine && !code) {
		if (retry == FFS_RETRY_TORN) {
			code = torn(node, &err);
		} else if ((flags & O_ACCMODE) == O_RDWR && node->key.mode != FFS_MODE_DIRECT) {
			ffs_retry_note(fs, call->who.tid, node->ino, FFS_RETRY_WRITER);
			code = ESTALE;
		} else if (node->key.mode == FFS_MODE_PASS && node->key.kind == FFS_KIND_LIVE_MEMORY &&
			   node->live && ffs_overlay_pages(node->live->fork->overlay)) {
			/* a payload came after its lookup: the next one finds the node that we serve */
			if (retry == FFS_RETRY_NONE)
				ffs_retry_note(fs, call->who.tid, node->ino, FFS_RETRY_NODE);
			code = ESTALE;
		} else {
			code = choose(call, node, retry, &l, &begun, &err);
		}
		if (!code)
			code = join_live(p, node, l, begun, &shot);
	}
	if (mine && (code || shot))
		mine = ffs_parked_claim(p);
	else
		mine = false;
	if (l && code && begun)
		abort_generation(l);
	if (l && !code)
		ffs_live_ref(l);
	pthread_mutex_unlock(&fs->lock);
	if (mine && code)
		ffs_reply_failure(fs, ffs_parked_req(p), &call->who, ffs_node_dir_ino(node), code, &err);
	else if (mine)
		ffs_data_opened(fs, ffs_parked_req(p), &call->who, node, shot, l, flags);
	if (shot)
		ffs_shot_unref(shot);
	if (l && !code) {
		pthread_mutex_lock(&fs->lock);
		ffs_live_unref(l);
		pthread_mutex_unlock(&fs->lock);
	}
	ffs_parked_unref(p);
}

/* ---- payloads ---- */

/* Tree lock held: an interrupted write. */
static void stager_gone(struct ffs_parked *p)
{
	struct ffs_live *l = p->data;

	if (l) {
		l->stagers--;
		drop_if_unwanted(l);
	}
}

/* Tree lock held, and given back while it waits: the branch of a generation that was chosen. 0 or -errno. */
static int await_branch(struct ffs_parked *p, struct ffs_live *l, bool begun, struct ffs_error *err)
{
	struct ffs_fs *fs = p->fs;
	struct take_job *job = begun ? calloc(1, sizeof(*job)) : NULL;

	if (begun && !job) {
		abort_generation(l);
		l->taking = false;
		return ffs_error_set(err, ENOMEM, "no memory");
	}
	l->stagers++;
	p->data = l;
	p->gone = stager_gone;
	if (begun) {
		job->live = ffs_live_ref(l);
		pthread_mutex_unlock(&fs->lock);
		run_take(&job->work);
		pthread_mutex_lock(&fs->lock);
	}
	while (l->taking && !p->claimed)
		pthread_cond_wait(&fs->live_taken, &fs->lock);
	/* an interrupt has counted itself out */
	if (!p->claimed)
		l->stagers--;
	p->data = NULL;
	p->gone = NULL;
	if (p->claimed)
		return -EINTR;
	if (l->shot && l->gen)
		return 0;
	return l->why.code ? ffs_error_set(err, l->why.code, "%s", l->why.text)
			   : ffs_error_set(err, ESRCH, "sandbox '%s' was detached", l->sbx->name);
}

int ffs_live_begin_payload(
	struct ffs_task *t, struct ffs_live **out, struct ffs_shot **shot, struct ffs_error *err)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_handle *h = t->handle;
	struct ffs_live *l = NULL;
	bool begun = false;

	pthread_mutex_lock(&fs->lock);
	int r = t->p->claimed ? -EINTR : -check_sandbox(&t->call, t->node, err);

	if (!r)
		r = -choose(&t->call, t->node, FFS_RETRY_NONE, &l, &begun, err);
	if (r < 0) {
		pthread_mutex_unlock(&fs->lock);
		return r;
	}
	ffs_live_ref(l);
	r = await_branch(t->p, l, begun, err);
	/* open in its generation as long as the handle is */
	if (!l->gen || h->released || h->counted) {
		if (l->gen)
			ffs_gen_close(l->gen, ffs_now_ns());
	} else {
		h->live = ffs_live_ref(l);
		h->counted = true;
	}
	if (r < 0) {
		ffs_live_end_payload(l, h->counted);
		ffs_live_unref(l);
	} else {
		*out = l;
		*shot = ffs_shot_ref(l->shot);
	}
	pthread_mutex_unlock(&fs->lock);
	return r;
}

void ffs_live_end_payload(struct ffs_live *l, unsigned handles)
{
	bool staged = l->fork->n_staged != 0;

	if (!l->gen)
		return;
	ffs_gen_staged(l->gen, staged);
	/* a snapshot that was taken for a payload which did not come is nobody's "now" */
	if (!l->gen->opened && l->gen->handles <= handles && ffs_list_empty(&l->openers) && !l->stagers)
		ffs_gen_fail(l->gen);
}

struct ffs_live *ffs_live_of_payload(struct ffs_call *call, struct ffs_node *node)
{
	char key[80];
	struct ffs_gen *g = key_of(node, &call->who, key)
				    ? ffs_gen_peek(node->sbx->gens, key, FFS_GEN_MAILBOX,
					      ffs_caller_who(&call->who), ffs_now_ns())
				    : NULL;

	return g ? g->data : NULL;
}
