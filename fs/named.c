/* Owns the life of named branches: reserve, take, publish, rename, remove.
 *
 * Threads: tasks in the pool. The kernel holds the lock of branches/ while mkdir, rmdir and rename are under
 * way, so a mkdir is bounded by a second and the others never wait for a VMM; an interrupted client is
 * answered at once and a branch that comes too late is dropped. */
#include "named.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "data.h"
#include "durable.h"
#include "events.h"
#include "keyed.h"
#include "nodes.h"
#include "park.h"
#include "writers.h"

/* The lock of branches/ is held meanwhile: `ls` of it hangs. */
#define MKDIR_NS FFS_NS_PER_S

int ffs_named_reserve(struct ffs_sbx *sbx, const char *name, const struct ffs_caller *who,
	struct ffs_named **out, struct ffs_error *err)
{
	struct ffs_named *n;

	if (!sbx->engine || sbx->detaching || sbx->removed)
		return ffs_error_set(err, ESRCH, "sandbox '%s' has no VM: it was detached", sbx->name);
	if (sbx->exited)
		return ffs_error_set(err, ESRCH, "the VM of sandbox '%s' has exited", sbx->name);
	if (who->tgid && who->tgid == sbx->pid)
		return ffs_error_set(err, EDEADLK,
			"process %d is the VM of '%s' itself: it would wait for its own pause",
			(int)who->tgid, sbx->name);
	if (sbx->fs->store && ffs_store_check_name(name, err) < 0)
		return -EINVAL;
	n = ffs_named_find(sbx, name);
	if (n && !n->shot)
		return ffs_error_set(err, EBUSY, "branch '%s' of '%s' is just being taken", name, sbx->name);
	if (n)
		return ffs_error_set(err, EEXIST, "sandbox '%s' has a branch '%s' already", sbx->name, name);
	for (struct ffs_list *e = sbx->branches.next; e != &sbx->branches; e = e->next)
		if (strcmp(ffs_container(e, struct ffs_named, link)->next_name, name) == 0)
			return ffs_error_set(err, EBUSY, "a branch of '%s' is just being renamed to '%s'",
				sbx->name, name);
	n = ffs_named_new(sbx, name);
	if (!n)
		return ffs_error_set(err, ENOMEM, "no memory");
	n->kind = sbx->fs->opt.default_store;
	*out = n;
	return 0;
}

static void publish(struct ffs_named *n, struct ffs_shot *s)
{
	n->shot = s;
	n->memory_size = s->memory_size;
	n->vmstate_size = s->vmstate_size;
	n->time_ns = s->time_ns;
	n->sbx->changed_ns = ffs_wall_ns();
	s->named = n;
	ffs_durable_attach(n, s);
	ffs_event(n->sbx->fs, "branch", n->sbx->name, n->name, ffs_shot_id(s), NULL);
}

static int copy_disks(struct ffs_named *n, struct ffs_branch *branch)
{
	unsigned count = ffs_branch_disks(branch);
	int r = ffs_named_room_for_disks(n, count);

	for (unsigned i = 0; !r && i < count; i++)
		ffs_named_add_disk(n, ffs_branch_disk_id(branch, i), ffs_branch_disk_size(branch, i));
	return r;
}

static int take(struct ffs_named *n, const struct ffs_take_options *how, struct ffs_cancel *cancel,
	struct ffs_shot **out, struct ffs_error *err)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_branch_options opt = {.name = n->name,
		.mode = how->mode,
		.max_rate = how->max_rate,
		.force = how->force,
		.timeout_ns = how->timeout_ns,
		.without_disks = how->without_disks};
	struct ffs_branch *branch = NULL;
	struct ffs_sandbox *engine;
	int r = FFS_FAULT("fs-mkdir");

	if (r < 0)
		return r;
	pthread_mutex_lock(&fs->lock);
	engine = n->sbx->engine ? ffs_sandbox_ref(n->sbx->engine) : NULL;
	pthread_mutex_unlock(&fs->lock);
	if (!engine)
		return ffs_error_set(err, ESRCH, "sandbox '%s' was detached", n->sbx->name);
	r = ffs_branch_take(engine, &opt, cancel, &branch, err);
	if (r == -ENOSPC && ffs_keyed_make_room(n->sbx))
		r = ffs_branch_take(engine, &opt, cancel, &branch, err);
	ffs_sandbox_unref(engine);
	if (r < 0)
		return r;
	/* nobody looks at a name that has no shot yet */
	if (copy_disks(n, branch) < 0) {
		ffs_branch_unref(branch);
		return ffs_error_set(err, ENOMEM, "no memory for the branch");
	}
	*out = ffs_shot_new(n->sbx, branch);
	return *out ? 0 : ffs_error_set(err, ENOMEM, "no memory for the branch");
}

int ffs_named_take(struct ffs_named *n, const struct ffs_take_options *how, struct ffs_cancel *cancel,
	bool (*wanted)(void *arg), void *arg, struct ffs_error *err)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_shot *s = NULL, *watch = NULL;
	/* a store that cannot take it is known before the pause */
	int r = ffs_durable_begin(n, err);

	if (!r)
		r = take(n, how, cancel, &s, err);
	if (r == -EAGAIN && how->timeout_ns == MKDIR_NS && err) {
		struct ffs_error why = *err;

		ffs_error_set(err, EAGAIN,
			"no branch within 1 s, the bound of mkdir (it locks the directory): write "
			"{\"branch\":{\"name\":\"%s\"}} to the sandbox's ctl, which waits longer (%.250s)",
			n->name, why.text);
	}
	pthread_mutex_lock(&fs->lock);
	if (!r && !wanted(arg))
		r = ffs_error_set(err, EINTR, "branch '%s' was given up by its client", n->name);
	if (!r) {
		publish(n, s);
		watch = ffs_shot_ref(s);
	} else {
		struct ffs_sbx *sbx = n->sbx;

		ffs_named_remove(n);
		ffs_tree_drop_empty(fs, sbx);
	}
	pthread_mutex_unlock(&fs->lock);
	if (watch) {
		ffs_shot_watch(watch);
		ffs_shot_unref(watch);
		atomic_fetch_add(&fs->count.named, 1);
	} else {
		ffs_durable_abort(n);
		if (s)
			ffs_shot_unref(s);
	}
	return r;
}

/* ---- mkdir ---- */

static bool task_wanted(void *arg)
{
	return ffs_parked_claim(((struct ffs_task *)arg)->p);
}

static void mkdir_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_named *n = NULL;
	struct ffs_error err = {0};
	uint64_t dir_ino = ffs_node_dir_ino(t->node);
	int r = ffs_check_name("branch", t->name, &err);

	pthread_mutex_lock(&fs->lock);
	if (!r)
		r = ffs_named_reserve(t->node->sbx, t->name, &t->call.who, &n, &err);
	pthread_mutex_unlock(&fs->lock);
	if (!r)
		r = ffs_named_take(n, &(struct ffs_take_options){.timeout_ns = MKDIR_NS}, t->p->cancel,
			task_wanted, t, &err);
	if (!r) {
		struct ffs_node_key key = {.kind = FFS_KIND_NAMED, .object = n->serial};

		ffs_reply_node(&t->call, ffs_parked_req(t->p), &key, n->sbx, n, NULL);
	} else if (ffs_task_claim(t)) {
		ffs_reply_failure(fs, ffs_parked_req(t->p), &t->call.who, dir_ino, -r, &err);
	}
	pthread_mutex_lock(&fs->lock);
	ffs_named_unref(n);
	pthread_mutex_unlock(&fs->lock);
}

void ffs_named_mkdir(struct ffs_call *call, struct ffs_node *dir, const char *name)
{
	ffs_caller_of(call->req, &call->who);
	struct ffs_task *t = ffs_task_new(call, true);

	if (!t)
		return;
	snprintf(t->name, sizeof(t->name), "%s", name);
	pthread_mutex_lock(&call->fs->lock);
	t->node = ffs_node_ref(dir);
	pthread_mutex_unlock(&call->fs->lock);
	ffs_task_start(t, mkdir_task);
}

/* ---- rmdir ---- */

/* Tree lock held, and back again: out of the store, if it is there, then out of the tree. fs->names is held,
 * so nobody else removes or renames it meanwhile. */
static int remove_locked(
	struct ffs_named *n, struct ffs_list *waits, struct ffs_inval *inval, struct ffs_error *err)
{
	struct ffs_sbx *sbx = n->sbx;
	struct ffs_fs *fs = sbx->fs;
	int r;

	ffs_named_ref(n);
	pthread_mutex_unlock(&fs->lock);
	r = ffs_durable_remove(n, err);
	pthread_mutex_lock(&fs->lock);
	if (!r && n->shot) {
		ffs_event(fs, "removed", sbx->name, n->name, ffs_shot_id(n->shot), NULL);
		ffs_parked_claim_all(&n->waits, waits);
		ffs_named_remove(n);
		if (ffs_tree_drop_empty(fs, sbx))
			ffs_inval_collect(fs, sbx, inval);
	}
	ffs_named_unref(n);
	return r;
}

static int remove_named(struct ffs_sbx *sbx, const char *name, struct ffs_list *waits,
	struct ffs_inval *inval, struct ffs_error *err)
{
	struct ffs_named *n = ffs_named_find(sbx, name);

	if (!n || !n->shot)
		return ffs_error_set(err, n ? EBUSY : ENOENT,
			n ? "branch '%s' is just being taken" : "there is no branch '%s'", name);
	return remove_locked(n, waits, inval, err);
}

int ffs_named_drop(struct ffs_named *n, struct ffs_error *err)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_inval inval = {0};
	struct ffs_list waits;
	int r = 0;

	ffs_list_init(&waits);
	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	if (n->removed || !n->shot)
		r = ffs_error_set(err, ENOENT, "branch '%s' was removed", n->name);
	else if (!n->key) /* renamed meanwhile */
		r = ffs_error_set(err, ENOENT, "branch '%s' is its user's now", n->name);
	else
		r = remove_locked(n, &waits, &inval, err);
	pthread_mutex_unlock(&fs->lock);
	pthread_mutex_unlock(&fs->names);
	ffs_wait_answer_all(&waits, -ENOENT, NULL);
	ffs_inval_send(fs, &inval);
	ffs_polls_check(fs);
	if (!r)
		ffs_write_reap(n->sbx);
	return r;
}

static void rmdir_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_sbx *sbx = t->node->sbx;
	struct ffs_error err = {0};
	struct ffs_inval inval = {0};
	struct ffs_list waits;
	int r = FFS_FAULT("fs-rmdir");

	ffs_list_init(&waits);
	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	/* once it is removed no signal may take the answer back */
	bool mine = ffs_parked_claim(t->p);

	if (mine && !r)
		r = remove_named(sbx, t->name, &waits, &inval, &err);
	pthread_mutex_unlock(&fs->lock);
	pthread_mutex_unlock(&fs->names);
	if (!mine)
		return;
	/* before the answer: who has it, and takes a branch next, must find that there will be room */
	if (!r)
		ffs_write_reap(sbx);
	ffs_wait_answer_all(&waits, -ENOENT, NULL);
	if (r < 0)
		ffs_reply_failure(
			fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node), -r, &err);
	else
		fuse_reply_err(ffs_parked_req(t->p), 0);
	/* after the answer: the kernel holds the lock of branches/ until then */
	ffs_inval_send(fs, &inval);
	ffs_polls_check(fs);
}

void ffs_named_rmdir(struct ffs_call *call, struct ffs_node *dir, const char *name)
{
	struct ffs_task *t = ffs_task_new(call, false);

	if (!t)
		return;
	snprintf(t->name, sizeof(t->name), "%s", name);
	pthread_mutex_lock(&call->fs->lock);
	t->node = ffs_node_ref(dir);
	pthread_mutex_unlock(&call->fs->lock);
	ffs_task_start(t, rmdir_task);
}

/* ---- rename ---- */

/* Tree lock and fs->names held; the tree lock is given back while the store's directory is renamed. */
static int rename_locked(struct ffs_task *t, struct ffs_error *err)
{
	struct ffs_sbx *sbx = t->node->sbx;
	struct ffs_named *n = ffs_named_find(sbx, t->name), *other = ffs_named_find(sbx, t->name2);
	int r = 0;

	if (!n)
		return ffs_error_set(err, ENOENT, "there is no branch '%s'", t->name);
	if (!n->shot || (other && !other->shot))
		return ffs_error_set(
			err, EBUSY, "branch '%s' is just being taken", n->shot ? t->name2 : t->name);
	if (n == other)
		return 0;
	if (other)
		return ffs_error_set(err, t->flags & RENAME_NOREPLACE ? EEXIST : ENOTEMPTY,
			"sandbox '%s' has a branch '%s' already: rmdir it first", sbx->name, t->name2);
	ffs_named_ref(n);
	snprintf(n->next_name, sizeof(n->next_name), "%.79s", t->name2);
	pthread_mutex_unlock(&sbx->fs->lock);
	r = ffs_durable_rename(n, t->name2, err);
	pthread_mutex_lock(&sbx->fs->lock);
	n->next_name[0] = '\0';
	if (!r) {
		ffs_keyed_keep(n);
		snprintf(n->name, sizeof(n->name), "%.79s", t->name2);
		sbx->changed_ns = ffs_wall_ns();
	}
	ffs_named_unref(n);
	return r;
}

static void rename_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_error err = {0};
	int r = FFS_FAULT("fs-rename");

	if (!r)
		r = ffs_check_name("branch", t->name2, &err);
	if (!r && (t->flags & ~(unsigned)RENAME_NOREPLACE))
		r = ffs_error_set(&err, EINVAL, "branches can't be exchanged");
	if (!r && t->node->sbx != t->node2->sbx)
		r = ffs_error_set(
			&err, EPERM, "a branch belongs to its sandbox: it can't be moved to another");
	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	bool mine = ffs_parked_claim(t->p);

	if (mine && !r)
		r = rename_locked(t, &err);
	pthread_mutex_unlock(&fs->lock);
	pthread_mutex_unlock(&fs->names);
	if (!mine)
		return;
	if (r < 0)
		ffs_reply_failure(
			fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node), -r, &err);
	else
		fuse_reply_err(ffs_parked_req(t->p), 0);
}

void ffs_named_rename(struct ffs_call *call, struct ffs_node *dir, const char *name, struct ffs_node *newdir,
	const char *newname, unsigned flags)
{
	struct ffs_task *t = ffs_task_new(call, false);

	if (!t)
		return;
	snprintf(t->name, sizeof(t->name), "%s", name);
	snprintf(t->name2, sizeof(t->name2), "%s", newname);
	t->flags = flags;
	pthread_mutex_lock(&call->fs->lock);
	t->node = ffs_node_ref(dir);
	t->node2 = ffs_node_ref(newdir);
	pthread_mutex_unlock(&call->fs->lock);
	ffs_task_start(t, rename_task);
}
