/* Owns the way of a named branch into the store: its draft from before the take on, the job that writes the
 * settled image, the shot that serves the branch from the store afterwards, and the branches that a daemon
 * finds at its start.
 *
 * Threads: one writer (fs->writers) copies images, one after the other; the reaper hands them over and swaps
 * shots; tasks remove and rename. Locks: fs->names, then the tree lock. fs->names is held across a rename(2)
 * and a sync of the store, so that a branch has one name while it is published, renamed or removed; never
 * across a copy, and the kernel's lock of branches/ never waits for more than that. */
#include "durable.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/log.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "store/store.h"
#include "writers.h"

struct ffs_durable {
	struct ffs_work work;
	struct ffs_write write; /* its place among the writers, and its room */
	struct ffs_fs *fs;
	struct ffs_shot *shot; /* referenced while the job is queued or runs */
	enum ffs_store_kind kind;
	struct ffs_store_progress progress;
	/* fs->names: */
	struct ffs_draft *draft; /* NULL: published, or given up */
	/* written by the job, read when it is over: */
	struct ffs_stored *stored;
	struct ffs_layer *kin; /* of what was written */
	struct ffs_error why;  /* code 0: it is published */
	bool over;
};

void ffs_durable_leave(struct ffs_fs *fs)
{
	pthread_mutex_lock(&fs->lock);
	if (--fs->n_durable == 0)
		pthread_cond_broadcast(&fs->durable_idle);
	pthread_mutex_unlock(&fs->lock);
}

/* ---- before and at the take ---- */

int ffs_durable_begin(struct ffs_named *n, struct ffs_error *err)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_durable *d;
	int r;

	if (n->kind == FFS_STORE_MEMORY)
		return 0;
	d = calloc(1, sizeof(*d));
	if (!d)
		return ffs_error_set(err, ENOMEM, "no memory");
	d->fs = fs;
	d->kind = n->kind;
	r = FFS_FAULT("store-begin");
	/* how well it packs is known afterwards only: half, say */
	if (!r)
		r = ffs_write_begin(&d->write, n->sbx, n->sbx->memory_size >> (n->kind == FFS_STORE_PACKED),
			&d->progress.done, err);
	if (!r)
		r = ffs_draft_begin(fs->store, n->sbx->name, n->name, &d->draft, err);
	if (r < 0) {
		ffs_write_end(&d->write);
		free(d);
		return r;
	}
	n->durable = d;
	pthread_mutex_lock(&fs->lock);
	fs->n_durable++;
	pthread_mutex_unlock(&fs->lock);
	return 0;
}

static void free_durable(struct ffs_durable *d)
{
	struct ffs_fs *fs = d->fs;

	ffs_draft_end(d->draft);
	ffs_layer_release(d->kin);
	ffs_stored_unref(d->stored);
	ffs_write_end(&d->write);
	if (!d->over)
		ffs_durable_leave(fs);
	free(d);
}

void ffs_durable_abort(struct ffs_named *n)
{
	struct ffs_durable *d = n->durable;

	n->durable = NULL;
	if (d)
		free_durable(d);
}

void ffs_durable_attach(struct ffs_named *n, struct ffs_shot *s)
{
	s->durable = n->durable;
	n->durable = NULL;
}

void ffs_durable_free(struct ffs_shot *s)
{
	if (s->durable)
		free_durable(s->durable);
	ffs_layer_release(s->kin);
	ffs_stored_unref(s->stored);
}

/* ---- the job ---- */

static int gate_enter(void *arg)
{
	struct ffs_durable *d = arg;

	pthread_mutex_lock(&d->fs->names);
	return 0;
}

/* fs->names is held: nobody renames it before it was opened. */
static void gate_leave(void *arg, int result)
{
	struct ffs_durable *d = arg;
	struct ffs_fs *fs = d->fs;
	char name[80];

	if (!result) {
		pthread_mutex_lock(&fs->lock);
		snprintf(name, sizeof(name), "%s", d->shot->named ? d->shot->named->name : "");
		pthread_mutex_unlock(&fs->lock);
		if (name[0])
			ffs_stored_open(fs->store, d->shot->sbx->name, name, &d->stored, &d->why);
		ffs_draft_end(d->draft);
		d->draft = NULL;
	}
	pthread_mutex_unlock(&fs->names);
}

/* Tree lock held: the youngest packed branch of a sandbox with as much memory, the one of that id, or `best`. */
static struct ffs_stored *younger(
	const struct ffs_shot *s, const struct ffs_sbx *sbx, const char *id, struct ffs_stored *best)
{
	for (struct ffs_list *e = sbx->branches.next; e != &sbx->branches; e = e->next) {
		struct ffs_named *n = ffs_container(e, struct ffs_named, link);
		struct ffs_stored *other = n->shot ? n->shot->stored : NULL;

		if (other && ffs_stored_kind(other) == FFS_STORE_PACKED &&
			ffs_stored_memory_size(other) == s->memory_size &&
			(!id || strcmp(ffs_stored_id(other), id) == 0) &&
			(!best || ffs_stored_time_ns(other) > ffs_stored_time_ns(best)))
			best = other;
	}
	return best;
}

/* What the new branch most likely resembles: the one before of its sandbox; of a child's, if that is younger, the branch
 * that it was restored from, wherever that is. Who attached it may say what it likes: bytes are compared. */
static struct ffs_stored *find_share(struct ffs_shot *s)
{
	struct ffs_fs *fs = s->fs;

	pthread_mutex_lock(&fs->lock);
	struct ffs_stored *best = younger(s, s->sbx, NULL, NULL);

	for (struct ffs_list *e = fs->sandboxes.next; s->sbx->origin[0] && e != &fs->sandboxes; e = e->next)
		best = younger(s, ffs_container(e, struct ffs_sbx, link), s->sbx->origin, best);
	if (best)
		ffs_stored_ref(best);
	pthread_mutex_unlock(&fs->lock);
	return best;
}

/* Who the branch is lent to stays with it when the VM and the daemon are gone. */
static void add_owner(struct json_object *manifest, struct ffs_sbx *sbx)
{
	struct json_object *o = json_object_new_object();

	pthread_mutex_lock(&sbx->fs->lock);
	json_object_object_add(o, "uid", json_object_new_int64(sbx->uid));
	json_object_object_add(o, "gid", json_object_new_int64(sbx->gid));
	json_object_object_add(o, "writable", json_object_new_boolean(sbx->writable));
	pthread_mutex_unlock(&sbx->fs->lock);
	json_object_object_add(manifest, "owner", o);
}

/* What a cached branch was taken for, so that the next daemon finds it by its key. */
static void add_key(struct json_object *manifest, struct ffs_shot *s)
{
	pthread_mutex_lock(&s->fs->lock);
	if (s->named && s->named->key)
		json_object_object_add(manifest, "key", json_object_new_string(s->named->key));
	pthread_mutex_unlock(&s->fs->lock);
}

/* The engine says whose pages it shared; else it came after the one that it resembles, or that its VM is a child of. */
static void add_parent(struct json_object *manifest, struct ffs_shot *s, const struct ffs_stored *share)
{
	struct json_object *parent = NULL;
	char id[40];

	pthread_mutex_lock(&s->fs->lock);
	snprintf(id, sizeof(id), "%s", share ? ffs_stored_id(share) : s->sbx->origin);
	pthread_mutex_unlock(&s->fs->lock);
	if (id[0] && (!json_object_object_get_ex(manifest, "parent", &parent) || !parent))
		json_object_object_add(manifest, "parent", json_object_new_string(id));
}

static int read_branch(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	struct ffs_branch *b = arg;
	ssize_t n = ffs_branch_read_memory(b, buf, len, off);

	if (n == (ssize_t)len)
		return 0;
	return ffs_error_errno(
		err, n < 0 ? (int)-n : EIO, "memory of branch %s cannot be read", ffs_branch_id(b));
}

/* An image is a file; a branch that shares pages with its parent is read page by page, into no memory of ours. */
static int write_memory(struct ffs_durable *d, struct ffs_stored *share, struct ffs_error *err)
{
	struct ffs_shot *s = d->shot;
	struct ffs_store_source source = {.read = read_branch, .arg = s->branch};
	int fd = ffs_branch_memory_fd(s->branch);

	if (fd >= 0)
		return ffs_draft_memory(d->draft, fd, s->memory_size, d->kind, share, &d->progress, err);
	if (fd != -ENODATA)
		return ffs_error_errno(err, -fd, "the image of branch %s", ffs_branch_id(s->branch));
	return ffs_draft_memory_from(d->draft, &source, s->memory_size, d->kind, share, &d->progress, err);
}

static int write_branch(struct ffs_durable *d, struct ffs_error *err)
{
	struct ffs_publish_gate gate = {.enter = gate_enter, .leave = gate_leave, .arg = d};
	struct ffs_shot *s = d->shot;
	struct ffs_stored *share = d->kind == FFS_STORE_PACKED ? find_share(s) : NULL;
	struct json_object *manifest = NULL;
	int r = FFS_FAULT("store-memory");

	if (!r)
		r = write_memory(d, share, err);
	if (!r)
		r = FFS_FAULT("store-vmstate");
	if (!r)
		r = ffs_draft_file(d->draft, "vmstate", ffs_branch_vmstate_fd(s->branch), err);
	for (unsigned i = 0; !r && i < ffs_branch_disks(s->branch); i++)
		r = ffs_draft_disk(d->draft, ffs_branch_disk_id(s->branch, i),
			ffs_branch_disk_fd(s->branch, i), &d->progress, err);
	if (!r)
		r = ffs_branch_manifest(s->branch, &manifest);
	if (!r) {
		add_owner(manifest, s->sbx);
		add_key(manifest, s);
		add_parent(manifest, s, share);
		r = ffs_store_publish(d->draft, manifest, &gate, err);
	}
	json_object_put(manifest);
	ffs_stored_unref(share);
	return r;
}

static ssize_t read_copy(void *arg, void *buf, size_t len, uint64_t off)
{
	return ffs_checked_read(arg, buf, len, off);
}

static void release_copy(void *arg)
{
	ffs_checked_free(arg);
}

/* The copy of a branch for its children; false: there is none, and they will be made without it. */
static bool make_copy(struct ffs_stored *stored, const char *id, struct ffs_branch_copy *copy)
{
	struct ffs_checked *c = NULL;
	struct ffs_error why = {0};

	int r = ffs_checked_new(stored, &c, &why);

	if (r < 0) {
		if (r != -ENOENT) /* removed meanwhile */
			ffs_log(FFS_LOG_WARN, "branch %s will not be a parent: %s", id, why.text);
		return false;
	}
	*copy = (struct ffs_branch_copy){.read = read_copy, .release = release_copy, .arg = c};
	return true;
}

/* What the next branch shares with this one comes from the store from now on. */
static void keep_kin(struct ffs_durable *d)
{
	struct ffs_branch *b = d->shot->branch;
	struct ffs_branch_copy copy;

	if (!d->stored || !ffs_branch_is_parent(b) || !make_copy(d->stored, ffs_branch_id(b), &copy))
		return;
	d->kin = ffs_branch_copied(b, &copy);
	if (!d->kin)
		copy.release(copy.arg);
}

void ffs_durable_move_kin(struct ffs_shot *s)
{
	struct ffs_branch_copy copy;

	if (s->kin && make_copy(s->stored, ffs_shot_id(s), &copy) && !ffs_layer_moved(s->kin, &copy))
		copy.release(copy.arg);
}

/* A branch that failed is still there, as failed, for the next daemon. */
static void record_failure(struct ffs_durable *d)
{
	struct ffs_fs *fs = d->fs;
	struct ffs_error err = {0};
	char name[80] = "";

	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	if (d->shot->named)
		snprintf(name, sizeof(name), "%s", d->shot->named->name);
	pthread_mutex_unlock(&fs->lock);
	if (d->draft) {
		ffs_draft_end(d->draft);
		d->draft = NULL;
	}
	if (name[0] && ffs_store_record_failure(fs->store, d->shot->sbx->name, name, &d->why, &err) < 0)
		ffs_log(FFS_LOG_WARN, "%s", err.text);
	pthread_mutex_unlock(&fs->names);
}

static void run_job(struct ffs_work *w)
{
	struct ffs_durable *d = ffs_container(w, struct ffs_durable, work);
	struct ffs_shot *s = d->shot;
	struct ffs_error err = {0};

	if (!d->why.code) {
		int r = write_branch(d, &err);

		if (r < 0 && !err.code)
			ffs_error_errno(&err, -r, "branch %s cannot be written to the store",
				ffs_branch_id(s->branch));
		if (r < 0)
			d->why = err;
	}
	if (d->why.code)
		record_failure(d);
	else
		keep_kin(d);
	ffs_write_end(&d->write);
	d->shot = NULL;
	d->over = true;
	ffs_durable_leave(d->fs);
	/* with the reference that was ours */
	ffs_reaper_push(s->fs->reaper, &s->settle_work);
}

static void run_write(struct ffs_write *w)
{
	run_job(&ffs_container(w, struct ffs_durable, write)->work);
}

bool ffs_durable_take_over(struct ffs_shot *s, enum ffs_branch_state state, const struct ffs_error *why)
{
	struct ffs_durable *d = s->durable;

	if (!d || d->over)
		return false;
	d->shot = s;
	d->work.fn = run_job;
	if (state == FFS_BRANCH_FAILED)
		d->why = *why;
	/* a failure does not wait for others to be written */
	if (state == FFS_BRANCH_FAILED)
		ffs_pool_submit(d->fs->pool, &d->work);
	else
		ffs_write_submit(&d->write, run_write);
	return true;
}

char *ffs_durable_manifest(struct ffs_shot *s, size_t *len)
{
	struct ffs_stored *stored = s->durable && s->durable->over ? s->durable->stored : NULL;
	size_t size = stored ? (size_t)ffs_stored_manifest_size(stored) : 0;
	char *text = size ? malloc(size) : NULL;

	if (text && ffs_stored_read_manifest(stored, text, size, 0) != (ssize_t)size) {
		free(text);
		return NULL;
	}
	*len = text ? size : 0;
	return text;
}

struct ffs_shot *ffs_durable_successor(struct ffs_shot *s)
{
	struct ffs_durable *d = s->durable;
	struct ffs_shot *next;

	if (!d || !d->over)
		return NULL;
	if (d->why.code) {
		s->state = FFS_BRANCH_FAILED;
		s->failure = d->why;
	}
	next = ffs_shot_of_store(s, d->stored);
	/* without memory for it the image goes on serving */
	if (next) {
		d->stored = NULL;
		next->kin = ffs_steal_ptr(&d->kin);
	}
	return next;
}

/* ---- names ---- */

/* The draft of a branch that is not published yet; fs->names held. */
static struct ffs_draft *draft_of(struct ffs_named *n, struct ffs_shot **ref)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_shot *s;

	pthread_mutex_lock(&fs->lock);
	s = n->shot ? ffs_shot_ref(n->shot) : NULL;
	pthread_mutex_unlock(&fs->lock);
	*ref = s;
	return s && s->durable ? s->durable->draft : NULL;
}

int ffs_durable_remove(struct ffs_named *n, struct ffs_error *err)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_shot *s;
	struct ffs_draft *draft = draft_of(n, &s);
	int r = 0;

	if (draft) {
		atomic_store(&s->durable->progress.cancel, true);
		ffs_draft_discard(draft);
	} else if (fs->store && n->kind != FFS_STORE_MEMORY) {
		r = ffs_store_remove(fs->store, n->sbx->name, n->name, err);
		/* somebody removed it by hand: then it is as they want it */
		if (r == -ENOENT)
			r = 0;
	}
	if (s)
		ffs_shot_unref(s);
	return r;
}

int ffs_durable_rename(struct ffs_named *n, const char *to, struct ffs_error *err)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_shot *s;
	struct ffs_draft *draft = draft_of(n, &s);
	int r = 0;

	if (draft)
		r = ffs_draft_rename(draft, to, err);
	else if (fs->store && n->kind != FFS_STORE_MEMORY)
		r = ffs_store_rename(fs->store, n->sbx->name, n->name, to, err);
	if (s)
		ffs_shot_unref(s);
	return r;
}

int ffs_durable_dir(struct ffs_named *n)
{
	struct ffs_fs *fs = n->sbx->fs;
	struct ffs_shot *s;
	struct ffs_draft *draft = draft_of(n, &s);
	int dir = -ENODATA;

	if (draft) {
		dir = fcntl(ffs_draft_dirfd(draft), F_DUPFD_CLOEXEC, 0);
		dir = dir < 0 ? -errno : dir;
	} else if (fs->store && n->kind != FFS_STORE_MEMORY) {
		dir = ffs_store_branch_dir(fs->store, n->sbx->name, n->name);
	}
	if (s)
		ffs_shot_unref(s);
	return dir;
}

/* ---- status ---- */

/* The members of the manifest that a status has too. */
static void add_from_manifest(struct ffs_stored *stored, struct json_object *o)
{
	static const char *const keys[] = {"id", "instant", "mode", "pause_ns", "phases", "faults",
		"converge_rounds", "dirty_at_pause_pages", "torn_possible", "disks", "parent", "vmm",
		"imported", NULL};
	struct json_object *m = NULL, *v;

	if (ffs_stored_manifest(stored, &m, NULL) < 0)
		return;
	for (const char *const *k = keys; *k; k++)
		if (json_object_object_get_ex(m, *k, &v))
			json_object_object_add(o, *k, json_object_get(v));
	json_object_put(m);
}

void ffs_durable_status(struct ffs_shot *s, struct json_object *o)
{
	uint64_t all = 0, shared = 0;

	if (s->stored) {
		add_from_manifest(s->stored, o);
		ffs_stored_sizes(s->stored, &all, &shared);
		json_object_object_add(
			o, "store", json_object_new_string(ffs_store_kind_name(ffs_stored_kind(s->stored))));
		json_object_object_add(o, "memory_bytes", json_object_new_uint64(s->memory_size));
		json_object_object_add(o, "captured_bytes", json_object_new_uint64(s->memory_size));
		json_object_object_add(o, "vmstate_bytes", json_object_new_uint64(s->vmstate_size));
		json_object_object_add(o, "stored_bytes", json_object_new_uint64(s->memory_size));
		json_object_object_add(o, "disk_bytes", json_object_new_uint64(all));
		json_object_object_add(o, "disk_shared_bytes", json_object_new_uint64(shared));
	} else if (s->durable) {
		json_object_object_add(
			o, "store", json_object_new_string(ffs_store_kind_name(s->durable->kind)));
		json_object_object_add(
			o, "stored_bytes", json_object_new_uint64(atomic_load(&s->durable->progress.done)));
		pthread_mutex_lock(&s->fs->lock);
		json_object_object_add(
			o, "write_place", json_object_new_int64(ffs_write_place(&s->durable->write)));
		pthread_mutex_unlock(&s->fs->lock);
	}
}

/* ---- the end ---- */

void ffs_durable_drain(struct ffs_fs *fs)
{
	pthread_mutex_lock(&fs->lock);
	while (fs->n_durable)
		pthread_cond_wait(&fs->durable_idle, &fs->lock);
	pthread_mutex_unlock(&fs->lock);
}

void ffs_durable_close(struct ffs_fs *fs)
{
	ffs_store_close(fs->store);
	fs->store = NULL;
}
