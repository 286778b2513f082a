/* Owns the step from a draft to a branch. Nothing else renames a draft to a branch's name.
 *
 * The order is the product: every file is synced, the manifest is written and synced last, the directory is synced,
 * then renamed (never over another; a branch in another form changes places with the one there was), then the parent
 * is synced. Whatever fails or dies before the rename leaves a draft, which recovery removes; after it the branch is
 * whole.
 *
 * Threads: the draft's writer. d->lock is held across the rename and the sync of the parent. */
#include "store/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fault.h"
#include "store/forks.h"

#define MAX_DEPTH 4

struct listing {
	struct ffs_draft *d;
	struct ffs_file_entry *files;
	unsigned n, room;
};

static const struct ffs_file_entry *known(const struct ffs_draft *d, const char *name)
{
	for (unsigned i = 0; i < d->n_files; i++)
		if (strcmp(d->files[i].name, name) == 0)
			return &d->files[i];
	return NULL;
}

/* Sync a file and list it with its hash: the one that its writer knows, or one read now. */
static int sync_file(struct listing *l, int dir, const char *entry, const char *name)
{
	_cleanup_close_ int fd = openat(dir, entry, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	const struct ffs_file_entry *k = known(l->d, name);
	int r;

	if (fd < 0)
		return -errno;
	if (l->n == l->room) {
		unsigned room = l->room ? l->room * 2 : 16;
		struct ffs_file_entry *more = realloc(l->files, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		l->files = more;
		l->room = room;
	}
	struct ffs_file_entry *f = &l->files[l->n];

	if (k)
		*f = *k;
	else if ((r = ffs_hash_file(fd, &f->hash, &f->size, NULL)) < 0)
		return r;
	snprintf(f->name, sizeof(f->name), "%s", name);
	l->n++;
	return ffs_store_ops->fsync(fd);
}

static int sync_dir(struct listing *l, int fd, const char *prefix, unsigned depth)
{
	int own = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), r = 0;
	DIR *dir = own < 0 ? NULL : fdopendir(own);

	if (!dir) {
		r = -errno;
		ffs_close_fd(&own);
		return r;
	}
	for (struct dirent *e; !r && (e = readdir(dir));) {
		char name[256];
		struct stat s;

		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		/* forks come and go while the manifest never changes; each syncs its own file */
		if (!depth && strcmp(e->d_name, FFS_FORKS) == 0)
			continue;
		if (snprintf(name, sizeof(name), "%s%s", prefix, e->d_name) >= (int)sizeof(name))
			r = -ENAMETOOLONG;
		else if (fstatat(own, e->d_name, &s, AT_SYMLINK_NOFOLLOW) < 0)
			r = -errno;
		else if (S_ISREG(s.st_mode))
			r = sync_file(l, own, e->d_name, name);
		else if (!S_ISDIR(s.st_mode) || depth == MAX_DEPTH)
			r = -EINVAL;
		if (!r && S_ISDIR(s.st_mode)) {
			_cleanup_close_ int sub = ffs_store_open_subdir(own, e->d_name);
			size_t len = strlen(name);

			if (len + 1 < sizeof(name)) {
				name[len] = '/';
				name[len + 1] = '\0';
			}
			r = sub < 0 ? sub : sync_dir(l, sub, name, depth + 1);
			if (!r)
				r = ffs_store_ops->fsync(sub);
		}
	}
	closedir(dir);
	return r;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct ffs_file_entry *)a)->name, ((const struct ffs_file_entry *)b)->name);
}

static int write_manifest(struct listing *l, struct json_object *manifest, struct ffs_error *err)
{
	struct ffs_draft *d = l->d;
	struct json_object *copy = NULL;
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	int r;

	if (l->n)
		qsort(l->files, l->n, sizeof(*l->files), by_name);
	if (json_object_deep_copy(manifest, &copy, NULL) < 0)
		return ffs_error_set(err, ENOMEM, "no memory for a manifest");
	r = ffs_manifest_fill(copy, d, l->files, l->n, ffs_now_ns() - d->began_ns);
	if (!r)
		r = ffs_manifest_text(copy, &text, &len, err);
	if (!r)
		r = ffs_store_write_file(d->fd, FFS_MANIFEST, text, len);
	json_object_put(copy);
	return r;
}

/* Is the branch that it replaces still the one under its name? */
static int check_replaced(const struct ffs_draft *d)
{
	struct stat is, was;

	if (fstatat(d->parent, d->name, &is, AT_SYMLINK_NOFOLLOW) < 0 || fstat(d->replaces->dir, &was) < 0)
		return -errno;
	return is.st_dev == was.st_dev && is.st_ino == was.st_ino ? 0 : -ENOENT;
}

/* d->lock held: now it is a branch. */
static int rename_draft(struct ffs_draft *d)
{
	enum ffs_rename how = d->replaces ? FFS_RENAME_EXCHANGE : FFS_RENAME_NEW;
	int r = d->discarded ? -ECANCELED : d->replaces ? check_replaced(d) : 0;

	/* those of this very moment: nobody changes one while the gate is held */
	if (!r && d->replaces)
		r = ffs_fork_files_carry(d->replaces->dir, d->fd);

	if (!r)
		r = ffs_store_ops->rename(d->parent, d->dir, d->name, how);
	if (r < 0)
		return r;
	r = FFS_FAULT("store-renamed");
	if (!r)
		r = ffs_store_ops->fsync(d->parent);
	/* not known to be durable: then it must not be there */
	if (r < 0 && ffs_store_ops->rename(d->parent, d->name, d->dir, how) < 0)
		r = -EIO;
	if (!r)
		d->published = true;
	return r;
}

int ffs_store_publish(struct ffs_draft *d, struct json_object *manifest, const struct ffs_publish_gate *gate,
	struct ffs_error *err)
{
	struct listing l = {.d = d};
	int r = FFS_FAULT("store-sync");

	if (!r)
		r = sync_dir(&l, d->fd, "", 0);
	if (!r)
		r = FFS_FAULT("store-manifest");
	if (!r)
		r = write_manifest(&l, manifest, err);
	if (!r)
		r = ffs_store_ops->fsync(d->fd);
	free(l.files);
	if (!r)
		r = FFS_FAULT("store-publish");
	if (!r && gate)
		r = gate->enter(gate->arg);
	if (!r) {
		pthread_mutex_lock(&d->lock);
		r = rename_draft(d);
		pthread_mutex_unlock(&d->lock);
		if (gate)
			gate->leave(gate->arg, r);
	}
	if (r == -EEXIST)
		return ffs_error_set(
			err, EEXIST, "the store has a branch %s/%s already", d->sandbox, d->name);
	if (r == -ENOENT && d->replaces)
		return ffs_error_set(err, ENOENT, "branch %s was renamed or removed meanwhile", d->label);
	if (r == -EINVAL && d->replaces)
		return ffs_error_set(err, EOPNOTSUPP,
			"branch %s cannot be converted in place: the file system of the store cannot "
			"exchange two "
			"names (export and import it instead)",
			d->label);
	if (r == -ECANCELED)
		return ffs_error_set(err, EINTR, "the writing of branch %s was given up", d->label);
	return r < 0 ? ffs_store_errno(d->st, -r, err, "branch %s cannot be published", d->label) : 0;
}
