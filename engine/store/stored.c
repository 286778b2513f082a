/* Owns a published branch as readers see it: its directory's descriptor, the checked manifest, its files once they
 * are asked for.
 *
 * Threads: any number of readers; references are atomic. s->lock is held while a file is opened. Reading waits for
 * the disk and for nothing else. */
#include "store/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- opening ---- */

static int read_manifest(const struct ffs_stored *s, char **out, size_t *len, struct ffs_error *err)
{
	_cleanup_close_ int fd = openat(s->dir, FFS_MANIFEST, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	size_t room = 65536, n = 0;
	char *buf;
	ssize_t got = 1;

	if (fd < 0)
		return ffs_error_errno(err, errno, "%s/" FFS_MANIFEST, s->path);
	/* a manifest in the tree has no size before it was read */
	buf = malloc(room + 1);
	while (buf && got > 0) {
		if (n == room) {
			char *more = room * 2 > FFS_MANIFEST_MAX ? NULL : realloc(buf, room * 2 + 1);

			if (!more)
				break;
			buf = more;
			room *= 2;
		}
		got = ffs_store_ops->read(fd, buf + n, room - n);
		if (got == -EINTR)
			got = 1;
		else if (got > 0)
			n += (size_t)got;
	}
	if (!buf || got != 0) {
		int code = !buf ? ENOMEM : got < 0 ? (int)-got : EFBIG;

		free(buf);
		return ffs_error_errno(err, code, "%s/" FFS_MANIFEST, s->path);
	}
	buf[n] = '\0';
	*out = buf;
	*len = n;
	return 0;
}

/* dense when there is a memory.bin, packed when there is an index. */
static int find_kind(struct ffs_stored *s, struct ffs_error *err)
{
	struct stat st;

	if (fstatat(s->dir, FFS_MEMORY_DENSE, &st, AT_SYMLINK_NOFOLLOW) == 0) {
		s->kind = FFS_STORE_DENSE;
		if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != s->m.memory_size)
			return ffs_error_set(err, EBADMSG,
				"%s/" FFS_MEMORY_DENSE " has %lld bytes and not the %llu that " FFS_MANIFEST
				" says",
				s->path, (long long)st.st_size, (unsigned long long)s->m.memory_size);
		return 0;
	}
	s->kind = FFS_STORE_PACKED;
	if (fstatat(s->dir, FFS_MEMORY_INDEX, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return ffs_error_set(
			err, EBADMSG, "%s has neither " FFS_MEMORY_DENSE " nor " FFS_MEMORY_INDEX, s->path);
	return 0;
}

static int add_sizes(struct ffs_stored *s, int dir, unsigned depth)
{
	DIR *d = fdopendir(dir);

	if (!d) {
		ffs_close_fd(&dir);
		return -ENOMEM;
	}
	for (struct dirent *e; (e = readdir(d));) {
		struct stat st;

		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 ||
			fstatat(dir, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
			continue;
		if (S_ISREG(st.st_mode)) {
			s->all += (uint64_t)st.st_blocks * 512;
			s->shared += st.st_nlink > 1 ? (uint64_t)st.st_blocks * 512 : 0;
		} else if (S_ISDIR(st.st_mode) && depth) {
			int sub = ffs_store_open_subdir(dir, e->d_name);

			if (sub >= 0)
				add_sizes(s, sub, depth - 1);
		}
	}
	closedir(d);
	return 0;
}

static int open_at(
	int parent, const char *name, const char *path, struct ffs_stored **out, struct ffs_error *err)
{
	struct ffs_stored *s = calloc(1, sizeof(*s));
	_cleanup_free_ char *text = NULL;
	struct json_object *o = NULL;
	size_t len = 0;
	int r;

	if (!s)
		return ffs_error_set(err, ENOMEM, "no memory");
	atomic_init(&s->refs, 1);
	atomic_init(&s->memory, -1);
	atomic_init(&s->vmstate, -1);
	atomic_init(&s->manifest, -1);
	pthread_mutex_init(&s->lock, NULL);
	for (unsigned i = 0; i < FFS_CHUNK_SLOTS; i++) {
		pthread_mutex_init(&s->slots[i].lock, NULL);
		s->slots[i].chunk = UINT64_MAX;
	}
	s->path = strdup(path);
	s->dir = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (!s->path || s->dir < 0)
		r = ffs_error_errno(err, s->path ? errno : ENOMEM, "%s", path);
	else
		r = read_manifest(s, &text, &len, err);
	if (!r) {
		r = ffs_manifest_parse(text, len, &o, &s->sealed, err);
		if (!r)
			r = ffs_manifest_load(o, false, &s->m, err);
		if (r < 0)
			ffs_error_prefix(err, "%s", path);
	}
	json_object_put(o);
	s->manifest_size = len;
	if (!r)
		r = find_kind(s, err);
	if (!r) {
		s->disks = malloc((s->m.n_files + 1) * sizeof(*s->disks));
		if (!s->disks)
			r = ffs_error_set(err, ENOMEM, "no memory");
	}
	for (unsigned i = 0; !r && i < s->m.n_files; i++)
		atomic_init(&s->disks[i], -1);
	if (r < 0) {
		ffs_stored_unref(s);
		return r;
	}
	*out = s;
	return 0;
}

int ffs_stored_open(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_stored **out,
	struct ffs_error *err)
{
	char below[FFS_NAME_MAX];
	_cleanup_free_ char *path = NULL;

	snprintf(below, sizeof(below), "%.64s/%.64s", sandbox, name);
	if (asprintf(&path, "%s/%s", st->path, below) < 0) {
		path = NULL;
		return ffs_error_set(err, ENOMEM, "no memory");
	}
	int r = open_at(st->fd, below, path, out, err);

	/* what a store has published is sealed: the checksum is damaged where there is none */
	if (!r && !(*out)->sealed) {
		ffs_stored_unref(*out);
		*out = NULL;
		r = ffs_error_set(
			err, EBADMSG, "%s/" FFS_MANIFEST " is damaged: its checksum is missing", path);
	}
	return r;
}

int ffs_stored_open_dir(const char *path, struct ffs_stored **out, struct ffs_error *err)
{
	return open_at(AT_FDCWD, path, path, out, err);
}

int ffs_stored_open_draft(const struct ffs_draft *d, struct ffs_stored **out, struct ffs_error *err)
{
	return open_at(d->parent, d->dir, d->label, out, err);
}

int ffs_stored_again(struct ffs_stored *s, struct ffs_stored **out, struct ffs_error *err)
{
	return open_at(s->dir, ".", s->path, out, err);
}

struct ffs_stored *ffs_stored_ref(struct ffs_stored *s)
{
	atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
	return s;
}

static void close_atomic(atomic_int *fd)
{
	int old = atomic_exchange(fd, -1);

	ffs_close_fd(&old);
}

void ffs_stored_unref(struct ffs_stored *s)
{
	if (!s || atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) != 1)
		return;
	close_atomic(&s->memory);
	close_atomic(&s->vmstate);
	close_atomic(&s->manifest);
	for (unsigned i = 0; s->disks && i < s->m.n_files; i++)
		close_atomic(&s->disks[i]);
	free(s->disks);
	ffs_packed_close(s);
	ffs_manifest_clear(&s->m);
	ffs_close_fd(&s->dir);
	pthread_mutex_destroy(&s->lock);
	free(s->path);
	free(s);
}

/* ---- what it is ---- */

const char *ffs_stored_id(const struct ffs_stored *s)
{
	return s->m.id;
}

enum ffs_store_kind ffs_stored_kind(const struct ffs_stored *s)
{
	return s->kind;
}

uint64_t ffs_stored_memory_size(const struct ffs_stored *s)
{
	return s->m.memory_size;
}

uint64_t ffs_stored_vmstate_size(const struct ffs_stored *s)
{
	return s->m.vmstate_size;
}

uint64_t ffs_stored_time_ns(const struct ffs_stored *s)
{
	return s->m.time_ns;
}

bool ffs_stored_owner(const struct ffs_stored *s, uid_t *uid, gid_t *gid, bool *writable)
{
	if (!s->m.has_owner)
		return false;
	*uid = s->m.uid;
	*gid = s->m.gid;
	*writable = s->m.owner_writes;
	return true;
}

uint64_t ffs_stored_manifest_size(const struct ffs_stored *s)
{
	return s->manifest_size;
}

int ffs_stored_dirfd(const struct ffs_stored *s)
{
	return s->dir;
}

void ffs_stored_sizes(const struct ffs_stored *s, uint64_t *all, uint64_t *shared)
{
	struct ffs_stored sum = {0};
	int dir = openat(s->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (dir >= 0)
		add_sizes(&sum, dir, 1);
	*all = sum.all;
	*shared = sum.shared;
}

int ffs_stored_manifest(const struct ffs_stored *s, struct json_object **out, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	bool sealed;
	int r = read_manifest(s, &text, &len, err);

	if (!r) {
		r = ffs_manifest_parse(text, len, out, &sealed, err);
		if (r < 0)
			ffs_error_prefix(err, "%s", s->path);
	}
	return r;
}

/* ---- reading ---- */

static bool is_disk(const struct ffs_file_entry *f)
{
	return strncmp(f->name, FFS_DISKS, strlen(FFS_DISKS)) == 0;
}

/* The descriptor of a file, opened at the first use. */
static int file_fd(struct ffs_stored *s, atomic_int *slot, const char *name)
{
	int fd = atomic_load_explicit(slot, memory_order_acquire);

	if (fd >= 0)
		return fd;
	pthread_mutex_lock(&s->lock);
	fd = atomic_load(slot);
	if (fd < 0) {
		fd = openat(s->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
		if (fd < 0)
			fd = -errno;
		else
			atomic_store_explicit(slot, fd, memory_order_release);
	}
	pthread_mutex_unlock(&s->lock);
	return fd;
}

int ffs_stored_memory_fd(struct ffs_stored *s)
{
	return s->kind == FFS_STORE_DENSE ? file_fd(s, &s->memory, FFS_MEMORY_DENSE) : -ENOTSUP;
}

int ffs_stored_vmstate_fd(struct ffs_stored *s)
{
	return file_fd(s, &s->vmstate, FFS_VMSTATE);
}

int ffs_stored_hold(struct ffs_stored *s, struct ffs_error *err)
{
	int r = s->kind == FFS_STORE_PACKED ? ffs_packed_open(s, err) : 0;

	if (r < 0)
		return r;
	if (s->kind == FFS_STORE_DENSE)
		r = file_fd(s, &s->memory, FFS_MEMORY_DENSE);
	if (r >= 0)
		r = file_fd(s, &s->vmstate, FFS_VMSTATE);
	if (r >= 0)
		r = file_fd(s, &s->manifest, FFS_MANIFEST);
	for (unsigned i = 0; r >= 0 && i < s->m.n_files; i++)
		if (is_disk(&s->m.files[i]))
			r = file_fd(s, &s->disks[i], s->m.files[i].name);
	return r < 0 ? ffs_error_errno(err, -r, "%s", s->path) : 0;
}

/* Up to `size`; a file that ends before is damaged. */
static ssize_t read_at(int fd, uint64_t size, void *buf, size_t len, uint64_t off)
{
	ssize_t n;

	if (fd < 0)
		return fd;
	if (off >= size)
		return 0;
	if (len > size - off)
		len = (size_t)(size - off);
	n = ffs_store_ops->pread(fd, buf, len, off);
	return n >= 0 && (size_t)n < len ? -EIO : n;
}

ssize_t ffs_stored_read_memory(
	struct ffs_stored *s, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	ssize_t n;

	if (s->kind == FFS_STORE_PACKED)
		return ffs_packed_read(s, buf, len, off, err);
	n = read_at(ffs_stored_memory_fd(s), s->m.memory_size, buf, len, off);
	if (n < 0)
		ffs_error_errno(err, (int)-n, "%s/" FFS_MEMORY_DENSE, s->path);
	return n;
}

ssize_t ffs_stored_read_vmstate(struct ffs_stored *s, void *buf, size_t len, uint64_t off)
{
	return read_at(ffs_stored_vmstate_fd(s), s->m.vmstate_size, buf, len, off);
}

/* ---- disks ---- */

unsigned ffs_stored_disks(const struct ffs_stored *s)
{
	unsigned n = 0;

	for (unsigned i = 0; i < s->m.n_files; i++)
		n += is_disk(&s->m.files[i]);
	return n;
}

/* The file that is disk i; there is one. */
static const struct ffs_file_entry *disk_at(const struct ffs_stored *s, unsigned i)
{
	const struct ffs_file_entry *f = s->m.files;

	while (!is_disk(f) || i--)
		f++;
	return f;
}

const char *ffs_stored_disk_id(const struct ffs_stored *s, unsigned i)
{
	return disk_at(s, i)->name + strlen(FFS_DISKS);
}

uint64_t ffs_stored_disk_size(const struct ffs_stored *s, unsigned i)
{
	return disk_at(s, i)->size;
}

/* The number of a disk's file in the manifest, or -ENOENT. */
static int find_disk(const struct ffs_stored *s, const char *id)
{
	for (unsigned i = 0; i < s->m.n_files; i++)
		if (is_disk(&s->m.files[i]) && strcmp(s->m.files[i].name + strlen(FFS_DISKS), id) == 0)
			return (int)i;
	return -ENOENT;
}

int ffs_stored_disk_fd(struct ffs_stored *s, const char *id)
{
	int i = find_disk(s, id);

	return i < 0 ? i : file_fd(s, &s->disks[i], s->m.files[i].name);
}

ssize_t ffs_stored_read_disk(struct ffs_stored *s, const char *id, void *buf, size_t len, uint64_t off)
{
	int i = find_disk(s, id);

	return i < 0 ? i : read_at(ffs_stored_disk_fd(s, id), s->m.files[i].size, buf, len, off);
}

ssize_t ffs_stored_read_manifest(struct ffs_stored *s, void *buf, size_t len, uint64_t off)
{
	return read_at(file_fd(s, &s->manifest, FFS_MANIFEST), s->manifest_size, buf, len, off);
}
