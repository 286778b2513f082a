/* Owns the files of a branch's forks: forks/NAME.json in its directory.
 *
 * A file is written as forks/.NAME.new, synced, renamed, and the directory synced: so whoever comes after a crash finds
 * the old one or the new one, whole. They are no part of the branch's manifest, which never changes.
 *
 * Threads: any; whoever changes one keeps others away (the daemon by fs->names). Waits for the disk. */
#include "store/forks.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fault.h"
#include "store/internal.h"

#define FRESH_SUFFIX ".new"

static void file_name(char out[FFS_NAME_MAX], const char *name)
{
	snprintf(out, FFS_NAME_MAX, "%.80s" FFS_FORK_SUFFIX, name);
}

/* No fork's name begins with a dot. */
static void fresh_name(char out[FFS_NAME_MAX], const char *name)
{
	snprintf(out, FFS_NAME_MAX, ".%.80s" FRESH_SUFFIX, name);
}

/* forks/, made when it is not there: then its name is durable too. */
static int open_forks(int dir, bool make)
{
	int fd = ffs_store_open_subdir(dir, FFS_FORKS), r;

	if (fd != -ENOENT || !make)
		return fd;
	r = ffs_store_ops->mkdir(dir, FFS_FORKS);
	if (!r || r == -EEXIST)
		r = ffs_store_ops->fsync(dir);
	return r < 0 ? r : ffs_store_open_subdir(dir, FFS_FORKS);
}

/* ---- changes ---- */

int ffs_fork_file_write(int dir, const char *name, const char *text, size_t len)
{
	_cleanup_close_ int forks = open_forks(dir, true);
	char fresh[FFS_NAME_MAX];
	int r, gone;

	if (forks < 0)
		return forks;
	r = FFS_FAULT("fork-write");
	if (r < 0)
		return r;
	fresh_name(fresh, name);
	r = ffs_store_ops->unlink(forks, fresh, false);
	if (r && r != -ENOENT)
		return r;
	r = ffs_store_write_file(forks, fresh, text, len);
	if (!r)
		return 0;
	/* it takes room, and would be swept by the next daemon only */
	gone = ffs_store_ops->unlink(forks, fresh, false);
	return gone && gone != -ENOENT ? gone : r;
}

int ffs_fork_file_publish(int dir, const char *name, bool fresh, bool *there)
{
	_cleanup_close_ int forks = open_forks(dir, false);
	char from[FFS_NAME_MAX], to[FFS_NAME_MAX];
	int r = forks < 0 ? forks : 0, gone;

	*there = false;
	fresh_name(from, name);
	file_name(to, name);
	if (!r)
		r = FFS_FAULT("fork-publish");
	if (!r)
		r = ffs_store_ops->rename(forks, from, to, fresh ? FFS_RENAME_NEW : FFS_RENAME_OVER);
	if (r < 0) {
		gone = forks < 0 ? 0 : ffs_store_ops->unlink(forks, from, false);
		return gone && gone != -ENOENT ? gone : r;
	}
	*there = true;
	r = FFS_FAULT("fork-published");
	return r ? r : ffs_store_ops->fsync(forks);
}

int ffs_fork_file_remove(int dir, const char *name)
{
	_cleanup_close_ int forks = open_forks(dir, false);
	char file[FFS_NAME_MAX];
	int r;

	if (forks < 0)
		return forks;
	file_name(file, name);
	r = ffs_store_ops->unlink(forks, file, false);
	return r ? r : ffs_store_ops->fsync(forks);
}

/* ---- what is there ---- */

/* forks/NAME.json of a store, forks/NAME/record.json of a mount: the name, or false. */
static bool name_of(const struct dirent *e, char out[FFS_NAME_MAX])
{
	size_t len = strlen(e->d_name);

	if (e->d_type == DT_DIR) {
		snprintf(out, FFS_NAME_MAX, "%.100s", e->d_name);
	} else {
		if (!ffs_has_suffix(e->d_name, FFS_FORK_SUFFIX))
			return false;
		snprintf(out, FFS_NAME_MAX, "%.*s", (int)(len - strlen(FFS_FORK_SUFFIX)), e->d_name);
	}
	return ffs_check_name("fork", out, NULL) == 0;
}

/* fn for each entry of forks/; none where there is no such directory. */
static int each_entry(int dir, int (*fn)(void *arg, int forks, const struct dirent *e), void *arg)
{
	int fd = open_forks(dir, false), r = 0;
	DIR *d = fd < 0 ? NULL : fdopendir(fd);

	if (!d) {
		if (fd >= 0)
			close(fd);
		return fd >= 0 ? -ENOMEM : fd == -ENOENT ? 0 : fd;
	}
	while (!r) {
		errno = 0;
		const struct dirent *e = readdir(d);

		if (!e) {
			r = -errno;
			break;
		}
		r = fn(arg, dirfd(d), e);
	}
	closedir(d);
	return r < 0 ? r : 0;
}

struct names {
	int (*fn)(void *arg, const char *name);
	void *arg;
};

static int call_with_name(void *arg, int forks, const struct dirent *e)
{
	const struct names *n = arg;
	char name[FFS_NAME_MAX];

	return name_of(e, name) ? n->fn(n->arg, name) : 0;
}

int ffs_fork_files_each(int dir, int (*fn)(void *arg, const char *name), void *arg)
{
	struct names n = {.fn = fn, .arg = arg};

	return each_entry(dir, call_with_name, &n);
}

static int sweep(void *arg, int forks, const struct dirent *e)
{
	if (e->d_name[0] != '.' || !ffs_has_suffix(e->d_name, FRESH_SUFFIX))
		return 0;
	int r = ffs_store_ops->unlink(forks, e->d_name, false);

	return r == -ENOENT ? 0 : r;
}

int ffs_fork_files_sweep(int dir)
{
	return each_entry(dir, sweep, NULL);
}

static int carry(void *arg, int forks, const struct dirent *e)
{
	const int *to = arg;
	char name[FFS_NAME_MAX];
	int r;

	if (e->d_type == DT_DIR || !name_of(e, name))
		return 0;
	r = ffs_store_ops->link(forks, e->d_name, *to, e->d_name);
	if (r == -EMLINK || r == -EPERM || r == -ENOTSUP) {
		/* no links here: a copy */
		_cleanup_free_ char *text = NULL;
		char path[FFS_NAME_MAX + 40];
		size_t len = 0;

		snprintf(path, sizeof(path), "/proc/self/fd/%d/%.100s", forks, e->d_name);
		r = ffs_read_file(path, FFS_FORK_FILE_MAX, &text, &len);
		if (!r)
			r = ffs_store_write_file(*to, e->d_name, text, len);
	}
	return r;
}

int ffs_fork_files_carry(int from, int to)
{
	_cleanup_close_ int old = open_forks(from, false), forks = -1;
	int r;

	if (old < 0)
		return old == -ENOENT ? 0 : old;
	forks = open_forks(to, true);
	if (forks < 0)
		return forks;
	r = each_entry(from, carry, &forks);
	return r ? r : ffs_store_ops->fsync(forks);
}

/* A file of the store has its size; one of a mount none before it was read. */
static int read_all(int fd, char **out, size_t *len)
{
	char *buf = malloc(FFS_FORK_FILE_MAX + 1);
	size_t n = 0;
	ssize_t got = 1;

	if (!buf)
		return -ENOMEM;
	while (got > 0 && n <= FFS_FORK_FILE_MAX) {
		got = ffs_store_ops->read(fd, buf + n, FFS_FORK_FILE_MAX + 1 - n);
		if (got == -EINTR)
			got = 1;
		else if (got > 0)
			n += (size_t)got;
	}
	if (got < 0 || n > FFS_FORK_FILE_MAX) {
		free(buf);
		return got < 0 ? (int)got : -EFBIG;
	}
	buf[n] = '\0';
	*out = buf;
	*len = n;
	return 0;
}

int ffs_fork_file_read(int dir, const char *name, char **text, size_t *len, struct ffs_error *err)
{
	char path[2 * FFS_NAME_MAX];
	_cleanup_close_ int fd = -1;
	struct stat st;
	int r;

	snprintf(path, sizeof(path), FFS_FORKS "/%.80s" FFS_FORK_SUFFIX, name);
	/* of whoever put it there: a FIFO must not hold us */
	fd = openat(dir, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0 && errno == ENOENT) {
		snprintf(path, sizeof(path), FFS_FORKS "/%.80s/" FFS_FORK_RECORD, name);
		fd = openat(dir, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	}
	if (fd < 0 || fstat(fd, &st) < 0)
		return ffs_error_errno(err, errno, "%s", path);
	if (!S_ISREG(st.st_mode))
		return ffs_error_set(err, EBADMSG, "%s is no file", path);
	r = read_all(fd, text, len);
	if (r == -EFBIG)
		return ffs_error_set(err, EBADMSG, "%s is too large for a fork: more than %u bytes", path,
			FFS_FORK_FILE_MAX);
	return r < 0 ? ffs_error_errno(err, -r, "%s", path) : 0;
}

/* ---- with the branch ---- */

static ssize_t read_memory(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	return ffs_stored_read_memory(arg, buf, len, off, err);
}

int ffs_stored_fork(
	struct ffs_stored *s, const char *name, struct ffs_fork_record *out, struct ffs_error *err)
{
	const struct ffs_mailbox_memory mem = {
		.size = s->m.memory_size, .fd = -1, .read = read_memory, .arg = s};
	struct ffs_fork_record r = {0};
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	int got = ffs_fork_file_read(s->dir, name, &text, &len, err);

	if (!got)
		got = ffs_fork_record_parse(text, len, name, s->m.id, &r, err);
	if (!got)
		got = ffs_fork_record_check(&r, &mem, err);
	if (got < 0) {
		ffs_error_prefix(err, "%s", s->path);
		ffs_fork_record_clear(&r);
		return got;
	}
	*out = r;
	return 0;
}

struct check {
	struct ffs_stored *s;
	struct ffs_error *err;
};

static int check_one(void *arg, const char *name)
{
	const struct check *c = arg;
	struct ffs_fork_record r = {0};
	int got = ffs_stored_fork(c->s, name, &r, c->err);

	ffs_fork_record_clear(&r);
	return got;
}

int ffs_stored_check_forks(struct ffs_stored *s, struct ffs_error *err)
{
	struct ffs_error why = {0};
	struct check c = {.s = s, .err = &why};
	int r = ffs_fork_files_each(s->dir, check_one, &c);

	if (r < 0 && why.code)
		return ffs_error_set(err, why.code, "%s", why.text);
	return r < 0 ? ffs_error_errno(err, -r, "%s/" FFS_FORKS, s->path) : 0;
}
