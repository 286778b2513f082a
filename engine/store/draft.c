/* Owns a branch that is being written: its directory <name>.partial, its files, the hashes of what was written.
 *
 * Threads: the writer's; rename and discard come from others and meet the writer in d->lock, which is held across
 * one rename(2) and its sync. The directory is locked with flock(2) as long as the draft lives (recovery leaves such
 * a one alone), by a descriptor that no child process inherits. */
#include "store/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Written back as it goes: the sync at the end has little left to do, and the cache is not full of dirty pages. */
#define WRITEBACK (32u << 20)
#define TRIES 8

static int lock_dir(int fd)
{
	return flock(fd, LOCK_EX | LOCK_NB) < 0 ? -errno : 0;
}

/* The sandbox's directory may be removed by a reaper just as we make it: then again. */
static int make_dirs(struct ffs_draft *d)
{
	struct stat s;
	int r = -ENOENT;

	for (unsigned i = 0; i < TRIES && r == -ENOENT; i++) {
		ffs_close_fd(&d->parent);
		r = ffs_store_ops->mkdir(d->st->fd, d->sandbox);
		if (!r)
			r = ffs_store_ops->fsync(d->st->fd);
		if (r && r != -EEXIST)
			return r;
		d->parent = ffs_store_open_subdir(d->st->fd, d->sandbox);
		if (d->parent < 0) {
			r = d->parent;
			continue;
		}
		if (!d->replaces && fstatat(d->parent, d->name, &s, AT_SYMLINK_NOFOLLOW) == 0)
			return -EEXIST;
		r = ffs_store_ops->mkdir(d->parent, d->dir);
		if (r == -EEXIST)
			return -EBUSY;
	}
	return r;
}

static int begin(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_stored *old,
	struct ffs_draft **out, struct ffs_error *err)
{
	struct ffs_draft *d;
	int r = ffs_check_name("sandbox", sandbox, err);

	if (!r)
		r = ffs_check_name("branch", name, err);
	if (!r)
		r = ffs_store_check_name(name, err);
	if (r < 0)
		return r;
	d = calloc(1, sizeof(*d));
	if (!d)
		return ffs_error_set(err, ENOMEM, "no memory");
	*d = (struct ffs_draft){.st = st, .parent = -1, .fd = -1, .began_ns = ffs_now_ns()};
	d->replaces = old ? ffs_stored_ref(old) : NULL;
	pthread_mutex_init(&d->lock, NULL);
	snprintf(d->sandbox, sizeof(d->sandbox), "%s", sandbox);
	snprintf(d->name, sizeof(d->name), "%s", name);
	snprintf(d->label, sizeof(d->label), "%s/%s", sandbox, name);
	snprintf(d->dir, sizeof(d->dir), "%s%s", name, FFS_SUFFIX_PARTIAL);
	r = make_dirs(d);
	if (!r) {
		d->fd = ffs_store_open_subdir(d->parent, d->dir);
		r = d->fd < 0 ? d->fd : lock_dir(d->fd);
	}
	if (!r) {
		*out = d;
		return 0;
	}
	if (r == -EEXIST)
		ffs_error_set(err, EEXIST, "the store has a branch %s/%s already", sandbox, name);
	else if (r == -EBUSY)
		ffs_error_set(
			err, EBUSY, "branch %s/%s is just being written by another process", sandbox, name);
	else
		ffs_store_errno(st, -r, err, "branch %s/%s cannot be written", sandbox, name);
	/* without its descriptor it is not ours to delete */
	if (d->fd < 0) {
		d->published = true;
		ffs_stored_unref(d->replaces);
		d->replaces = NULL;
	}
	ffs_draft_end(d);
	return r;
}

int ffs_draft_begin(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_draft **out,
	struct ffs_error *err)
{
	return begin(st, sandbox, name, NULL, out, err);
}

int ffs_draft_begin_other(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_stored *old,
	struct ffs_draft **out, struct ffs_error *err)
{
	return begin(st, sandbox, name, old, out, err);
}

int ffs_draft_dirfd(const struct ffs_draft *d)
{
	return d->fd;
}

int ffs_draft_rename(struct ffs_draft *d, const char *name, struct ffs_error *err)
{
	char dir[FFS_NAME_MAX];
	struct stat s;
	int r = ffs_store_check_name(name, err);

	if (r < 0)
		return r;
	snprintf(dir, sizeof(dir), "%.80s%s", name, FFS_SUFFIX_PARTIAL);
	pthread_mutex_lock(&d->lock);
	if (fstatat(d->parent, name, &s, AT_SYMLINK_NOFOLLOW) == 0)
		r = -EEXIST;
	else if (d->discarded)
		r = -ENOENT;
	else
		r = ffs_store_ops->rename(d->parent, d->dir, dir, FFS_RENAME_NEW);
	if (!r) {
		snprintf(d->dir, sizeof(d->dir), "%s", dir);
		snprintf(d->name, sizeof(d->name), "%.79s", name);
	}
	pthread_mutex_unlock(&d->lock);
	return r < 0 ? ffs_store_errno(d->st, -r, err, "branch %s cannot be renamed to %s in the store",
			       d->label, name)
		     : 0;
}

/* d->lock held. */
static void discard_locked(struct ffs_draft *d)
{
	char to[FFS_NAME_MAX], id[37];

	if (d->discarded || d->published)
		return;
	d->discarded = true;
	ffs_uuid(id);
	snprintf(to, sizeof(to), "%.80s.%.8s%s", d->name, id, FFS_SUFFIX_REMOVING);
	/* where it cannot be renamed it is deleted under the name it has */
	if (ffs_store_ops->rename(d->parent, d->dir, to, FFS_RENAME_NEW) == 0)
		snprintf(d->dir, sizeof(d->dir), "%s", to);
}

void ffs_draft_discard(struct ffs_draft *d)
{
	pthread_mutex_lock(&d->lock);
	discard_locked(d);
	pthread_mutex_unlock(&d->lock);
}

void ffs_draft_end(struct ffs_draft *d)
{
	if (!d)
		return;
	pthread_mutex_lock(&d->lock);
	discard_locked(d);
	pthread_mutex_unlock(&d->lock);
	/* the draft, or what had its place; what cannot be deleted now, recovery deletes */
	if ((!d->published || d->replaces) && ffs_store_remove_tree(d->parent, d->dir) == 0)
		ffs_store_ops->unlink(d->st->fd, d->sandbox, true);
	ffs_close_fd(&d->fd);
	ffs_close_fd(&d->parent);
	pthread_mutex_destroy(&d->lock);
	ffs_stored_unref(d->replaces);
	free(d->blocks);
	free(d->files);
	free(d);
}

int ffs_draft_add_file(struct ffs_draft *d, const char *name, uint64_t size, const struct ffs_hash *hash)
{
	if (d->n_files == d->room_files) {
		unsigned room = d->room_files ? d->room_files * 2 : 16;
		struct ffs_file_entry *more = realloc(d->files, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		d->files = more;
		d->room_files = room;
	}
	struct ffs_file_entry *f = &d->files[d->n_files++];

	snprintf(f->name, sizeof(f->name), "%s", name);
	f->size = size;
	f->hash = *hash;
	return 0;
}

/* ---- files ---- */

int ffs_draft_file(struct ffs_draft *d, const char *name, int fd, struct ffs_error *err)
{
	_cleanup_close_ int out = ffs_store_ops->create(d->fd, name);
	_cleanup_free_ char *buf = malloc(FFS_STORE_BLOCK);
	XXH3_state_t *state = XXH3_createState();
	uint64_t off = 0;
	ssize_t n = out < 0 ? out : buf && state ? 1 : -ENOMEM;

	if (state)
		XXH3_128bits_reset(state);
	while (n > 0) {
		n = ffs_store_ops->pread(fd, buf, FFS_STORE_BLOCK, off);
		if (n <= 0)
			break;
		XXH3_128bits_update(state, buf, (size_t)n);
		int r = ffs_store_ops->write(out, buf, (size_t)n, off);

		off += (uint64_t)n;
		if (r < 0)
			n = r;
	}
	if (n == 0) {
		struct ffs_hash h = ffs_hash_digest(state);

		n = ffs_draft_add_file(d, name, off, &h);
	}
	XXH3_freeState(state);
	return n < 0 ? ffs_store_errno(
			       d->st, (int)-n, err, "%s of branch %s cannot be written", name, d->label)
		     : 0;
}

/* The data between the holes. */
static int copy_extents(int in, int out, uint64_t size, struct ffs_store_progress *p)
{
	_cleanup_free_ char *buf = malloc(FFS_STORE_BLOCK);
	uint64_t off = 0;

	if (!buf)
		return -ENOMEM;
	while (off < size) {
		off_t data = lseek(in, (off_t)off, SEEK_DATA), hole;
		int r = 0;

		if (data < 0)
			return errno == ENXIO ? 0 : -errno;
		hole = lseek(in, data, SEEK_HOLE);
		if (hole < 0)
			return -errno;
		for (off = (uint64_t)data; !r && off < (uint64_t)hole;) {
			uint64_t left = (uint64_t)hole - off;
			ssize_t n = ffs_store_ops->pread(
				in, buf, left < FFS_STORE_BLOCK ? left : FFS_STORE_BLOCK, off);

			if (n <= 0)
				return n < 0 ? (int)n : -EIO;
			r = ffs_progress_cancelled(p) ? -EINTR
						      : ffs_store_ops->write(out, buf, (size_t)n, off);
			off += (uint64_t)n;
			ffs_progress_add(p, (uint64_t)n);
		}
		if (r < 0)
			return r;
	}
	return 0;
}

int ffs_draft_disk(
	struct ffs_draft *d, const char *id, int fd, struct ffs_store_progress *p, struct ffs_error *err)
{
	_cleanup_close_ int dir = -1, out = -1;
	struct stat st;
	int r = ffs_store_ops->mkdir(d->fd, "disks");

	if (!r || r == -EEXIST) {
		dir = ffs_store_open_subdir(d->fd, "disks");
		r = dir < 0 ? dir : fstat(fd, &st) < 0 ? -errno : 0;
	}
	if (!r) {
		out = ffs_store_ops->create(dir, id);
		r = out < 0 ? out : 0;
	}
	/* one file system that shares blocks: nothing to copy */
	if (!r && ioctl(out, FICLONE, fd) < 0) {
		r = ftruncate(out, st.st_size) < 0 ? -errno : 0;
		if (!r)
			r = copy_extents(fd, out, (uint64_t)st.st_size, p);
	}
	return r < 0 ? ffs_store_errno(d->st, -r, err, "disk %s of branch %s cannot be written", id, d->label)
		     : 0;
}

/* ---- memory ---- */

/* Where the blocks go: one file, or a packer. */
struct sink {
	struct ffs_draft *d;
	int fd;           /* dense */
	uint64_t started; /* of writing back */
	struct ffs_packer *packer;
};

static int open_dense(struct sink *k, uint64_t size)
{
	int r;

	k->fd = ffs_store_ops->create(k->d->fd, FFS_MEMORY_DENSE);
	if (k->fd < 0)
		return k->fd;
	/* a full disk is known before anything was written */
	r = ffs_store_ops->allocate(k->fd, size);
	return r == -ENOTSUP ? 0 : r;
}

static int put_dense(struct sink *k, const void *buf, size_t len, uint64_t off)
{
	int r = ffs_store_ops->write(k->fd, buf, len, off);

	if (!r && off + len - k->started >= WRITEBACK) {
		/* a hint: whether it worked the sync will say */
		(void)sync_file_range(
			k->fd, (off_t)k->started, (off_t)(off + len - k->started), SYNC_FILE_RANGE_WRITE);
		k->started = off + len;
	}
	return r;
}

static int write_blocks(struct sink *k, const struct ffs_store_source *src, uint64_t size,
	struct ffs_store_progress *p, XXH3_state_t *state, unsigned char *buf, const unsigned char *zeros,
	struct ffs_error *err)
{
	struct ffs_draft *d = k->d;
	struct ffs_hash zero_hash = ffs_hash_of(zeros, FFS_STORE_BLOCK);

	for (uint64_t off = 0, i = 0, hole = 0; off < size; off += FFS_STORE_BLOCK, i++) {
		size_t len = size - off < FFS_STORE_BLOCK ? (size_t)(size - off) : FFS_STORE_BLOCK;
		const unsigned char *at = buf;
		int r = 0;

		if (ffs_progress_cancelled(p) || d->discarded)
			return ffs_error_set(err, EINTR, "the writing of branch %s was given up", d->label);
		if (!hole && src->hole)
			hole = src->hole(src->arg, off);
		if (hole >= len)
			at = zeros;
		else
			r = src->read(src->arg, buf, len, off, err);
		if (r < 0)
			return r;
		d->blocks[i] = at == zeros && len == FFS_STORE_BLOCK ? zero_hash : ffs_hash_of(at, len);
		XXH3_128bits_update(state, at, len);
		if (k->packer)
			r = ffs_packer_put(k->packer, at, len, at == zeros, err);
		else if ((r = put_dense(k, at, len, off)) < 0)
			r = ffs_store_errno(
				d->st, -r, err, "memory of branch %s cannot be written", d->label);
		if (r < 0)
			return r;
		hole -= hole >= len ? len : hole;
		ffs_progress_add(p, len);
	}
	return 0;
}

static int write_memory(struct sink *k, const struct ffs_store_source *src, uint64_t size,
	struct ffs_stored *share, struct ffs_store_progress *p, struct ffs_error *err)
{
	struct ffs_draft *d = k->d;
	_cleanup_free_ unsigned char *buf = malloc(FFS_STORE_BLOCK), *zeros = calloc(1, FFS_STORE_BLOCK);
	XXH3_state_t *state = XXH3_createState();
	int r;

	if (!buf || !zeros || !state || !d->blocks) {
		XXH3_freeState(state);
		return ffs_error_set(err, ENOMEM, "no memory to write branch %s", d->label);
	}
	XXH3_128bits_reset(state);
	if (d->kind == FFS_STORE_PACKED)
		r = ffs_packer_new(d, size, share, &k->packer, err);
	else if ((r = open_dense(k, size)) < 0)
		r = ffs_store_errno(d->st, -r, err, "memory of branch %s cannot be written", d->label);
	if (!r)
		r = write_blocks(k, src, size, p, state, buf, zeros, err);
	if (!r && k->packer)
		r = ffs_packer_finish(k->packer, err);
	if (!r) {
		d->memory_hash = ffs_hash_digest(state);
		if (!k->packer && ffs_draft_add_file(d, FFS_MEMORY_DENSE, size, &d->memory_hash) < 0)
			r = ffs_error_set(err, ENOMEM, "no memory");
	}
	XXH3_freeState(state);
	return r;
}

int ffs_draft_memory_from(struct ffs_draft *d, const struct ffs_store_source *src, uint64_t size,
	enum ffs_store_kind kind, struct ffs_stored *share, struct ffs_store_progress *p,
	struct ffs_error *err)
{
	struct sink k = {.d = d, .fd = -1};
	int r;

	d->kind = kind;
	d->memory_size = size;
	d->n_blocks = (size + FFS_STORE_BLOCK - 1) / FFS_STORE_BLOCK;
	d->blocks = calloc(d->n_blocks ? d->n_blocks : 1, sizeof(*d->blocks));
	if (p)
		atomic_store(&p->total, size);
	r = write_memory(&k, src, size, share, p, err);
	ffs_packer_free(k.packer);
	ffs_close_fd(&k.fd);
	return r;
}

static int read_fd(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	ssize_t n = ffs_store_ops->pread(*(int *)arg, buf, len, off);

	if (n < 0)
		return ffs_error_errno(err, (int)-n, "memory cannot be read");
	return (size_t)n < len ? ffs_error_set(err, EIO, "memory ends before its size") : 0;
}

/* Holes of a memfd are zeros that need not be read. */
static uint64_t hole_of_fd(void *arg, uint64_t off)
{
	off_t data = lseek(*(int *)arg, (off_t)off, SEEK_DATA);
	struct stat s;

	if (data < 0 && errno == ENXIO && fstat(*(int *)arg, &s) == 0)
		return (uint64_t)s.st_size > off ? (uint64_t)s.st_size - off : 0;
	if (data < 0)
		return 0;
	return ((uint64_t)data - off) / FFS_STORE_BLOCK * FFS_STORE_BLOCK;
}

int ffs_draft_memory(struct ffs_draft *d, int fd, uint64_t size, enum ffs_store_kind kind,
	struct ffs_stored *share, struct ffs_store_progress *p, struct ffs_error *err)
{
	struct ffs_store_source src = {.read = read_fd, .hole = hole_of_fd, .arg = &fd};

	return ffs_draft_memory_from(d, &src, size, kind, share, p, err);
}
