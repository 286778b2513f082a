/* Owns the way from a store's directory into the tree: at the start for all that is there, later for a branch that an
 * import has put there.
 *
 * Threads: the main thread before there are others, then the pool. Locks: fs->names, then the tree lock, which is not
 * held while a file is read. */
#include "durable.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "events.h"
#include "fork.h"
#include "keyed.h"
#include "store/store.h"

static int adopt_disks(struct ffs_named *n, struct ffs_stored *stored)
{
	unsigned count = ffs_stored_disks(stored);
	int r = ffs_named_room_for_disks(n, count);

	for (unsigned i = 0; !r && i < count; i++)
		ffs_named_add_disk(n, ffs_stored_disk_id(stored, i), ffs_stored_disk_size(stored, i));
	return r;
}

/* The key that a branch was taken under (the caller's to free), or NULL. */
static char *key_of(struct ffs_stored *stored)
{
	struct json_object *m = NULL, *key;
	char *copy = NULL;

	if (ffs_stored_manifest(stored, &m, NULL) < 0)
		return NULL;
	if (json_object_object_get_ex(m, "key", &key) && json_object_is_type(key, json_type_string))
		copy = strdup(json_object_get_string(key));
	json_object_put(m);
	return copy;
}

/* Tree lock held. `stored` and `forks` are taken over; NULL: it failed, for the reason `why`. -EEXIST: the name is taken. */
static int insert(struct ffs_fs *fs, const char *sandbox, const char *name, struct ffs_stored *stored,
	const char *key, struct ffs_list *forks, const struct ffs_error *why)
{
	struct ffs_sbx *sbx = ffs_tree_find(fs, sandbox), *made = NULL;
	struct ffs_named *n;
	struct ffs_shot *s;
	int r = -ENOMEM;

	if (!sbx)
		sbx = made = ffs_sbx_new(fs, sandbox);
	n = sbx ? ffs_named_find(sbx, name) : NULL;
	/* a branch and the record of an earlier failure: the branch it is */
	if (n && (!stored || !n->shot || n->shot->stored || n->shot->branch)) {
		r = -EEXIST;
		goto out;
	}
	s = n ? n->shot : sbx ? ffs_shot_plain(sbx) : NULL;
	if (s && !n && (n = ffs_named_new(sbx, name)))
		ffs_named_unref(n); /* the list has the other */
	if (!s || !n)
		goto out;
	r = stored ? adopt_disks(n, stored) : 0;
	n->kind = stored ? ffs_stored_kind(stored) : FFS_STORE_DENSE;
	s->stored = stored;
	s->state = stored ? FFS_BRANCH_READY : FFS_BRANCH_FAILED;
	s->failure = *why;
	if (stored) {
		if (key)
			ffs_keyed_adopt(n, key);
		n->memory_size = s->memory_size = ffs_stored_memory_size(stored);
		n->vmstate_size = s->vmstate_size = ffs_stored_vmstate_size(stored);
		n->time_ns = s->time_ns = ffs_stored_time_ns(stored);
		s->manifest_len = ffs_stored_manifest_size(stored);
		if (!sbx->engine && n->time_ns >= sbx->adopted_ns &&
			ffs_stored_owner(stored, &sbx->uid, &sbx->gid, &sbx->writable))
			sbx->adopted_ns = n->time_ns;
		stored = NULL;
	}
	s->named = n;
	n->shot = s;
	ffs_forks_adopt(n, forks);
	sbx->changed_ns = ffs_wall_ns();
	if (made)
		ffs_tree_add(fs, made);
out:
	ffs_stored_unref(stored);
	ffs_forks_forget(forks);
	if (made)
		ffs_sbx_unref(made);
	return r;
}

/* At the start: what cannot be opened is shown as failed, with the reason. */
static int adopt(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry)
{
	struct ffs_fs *fs = arg;
	struct ffs_stored *stored = NULL;
	struct ffs_error why = {0};
	int r;

	if (entry == FFS_STORE_ENTRY_BRANCH)
		ffs_stored_open(fs->store, sandbox, name, &stored, &why);
	else if (ffs_store_failure(fs->store, sandbox, name, &why) < 0)
		ffs_error_set(&why, EIO, "the branch failed; the record of its reason cannot be read");
	if (!stored)
		ffs_log(FFS_LOG_WARN, "store: branch %s/%s: %s", sandbox, name, why.text);
	_cleanup_free_ char *key = stored ? key_of(stored) : NULL;
	struct ffs_list forks;

	ffs_list_init(&forks);
	if (stored)
		ffs_forks_load(fs, stored, &forks);
	pthread_mutex_lock(&fs->lock);
	r = insert(fs, sandbox, name, stored, key, &forks, &why);
	pthread_mutex_unlock(&fs->lock);
	return r == -EEXIST ? 0 : r;
}

int ffs_durable_adopt(struct ffs_fs *fs, const char *sandbox, const char *name, struct ffs_error *err)
{
	struct ffs_stored *stored = NULL;
	struct ffs_error none = {0};
	struct ffs_list forks;
	int r;

	ffs_list_init(&forks);
	if (!fs->store)
		return ffs_error_set(err, EOPNOTSUPP, "this mount has no store: mount it with -o store=DIR");
	pthread_mutex_lock(&fs->names);
	r = ffs_stored_open(fs->store, sandbox, name, &stored, err);
	if (!r) {
		ffs_forks_load(fs, stored, &forks);
		pthread_mutex_lock(&fs->lock);
		r = insert(fs, sandbox, name, stored, NULL, &forks, &none);
		if (!r)
			ffs_event(fs, "ready", sandbox, name, ffs_stored_id(stored), NULL);
		pthread_mutex_unlock(&fs->lock);
		if (r == -EEXIST)
			ffs_error_set(err, EEXIST, "sandbox '%s' has a branch '%s' already", sandbox, name);
	}
	pthread_mutex_unlock(&fs->names);
	return r;
}

int ffs_durable_open(struct ffs_fs *fs, struct ffs_error *err)
{
	int r;

	pthread_mutex_init(&fs->names, NULL);
	pthread_cond_init(&fs->durable_idle, NULL);
	if (!fs->opt.store[0])
		return 0;
	/* a branch of the store has a descriptor or more */
	r = ffs_raise_file_limit();
	if (r < 0)
		ffs_log(FFS_LOG_INFO, "the limit of open files stays: %s", strerror(-r));
	r = ffs_store_open(fs->opt.store, &fs->store, err);
	if (!r)
		r = ffs_store_recover(fs->store, err);
	if (!r) {
		r = ffs_store_each(fs->store, NULL, adopt, fs, err);
		if (r == -ENOMEM)
			ffs_error_set(
				err, ENOMEM, "no memory for the branches of the store %s", fs->opt.store);
	}
	if (r < 0)
		return r;
	atomic_store(&fs->store_pass, true);
	return 0;
}
