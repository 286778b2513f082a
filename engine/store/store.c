/* Owns a store's directory: its lock, its list, what is removed, renamed, recovered.
 *
 * Threads: any; the file system is the only shared state, and each change of it is one atomic step followed by a
 * sync of the directory. A draft is locked (flock) by its writer for as long as that lives, so recovery tells an
 * abandoned one from one that another process (an import) is writing. Nothing here may be called with a lock held
 * that a guest waits for. */
#include "store/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/log.h"

#define LOCK_FILE ".lock"
#define FAILURE_MAX 65536

static const char *const kinds[] = {"memory", "dense", "packed"};

const char *ffs_store_kind_name(enum ffs_store_kind k)
{
	return kinds[k];
}

bool ffs_store_kind_parse(const char *name, enum ffs_store_kind *out)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(kinds); i++)
		if (strcmp(name, kinds[i]) == 0) {
			*out = (enum ffs_store_kind)i;
			return true;
		}
	return false;
}

int ffs_store_errno(const struct ffs_store *st, int code, struct ffs_error *err, const char *fmt, ...)
{
	char what[300];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(what, sizeof(what), fmt, ap);
	va_end(ap);
	if (code == ENOSPC || code == EDQUOT)
		return ffs_error_set(err, code, "%s: %s: make room in the store %s (forkfs rm) or enlarge it",
			what, strerror(code), st->path);
	return ffs_error_errno(err, code, "%s", what);
}

/* ---- opening ---- */

int ffs_store_open(const char *path, struct ffs_store **out, struct ffs_error *err)
{
	_cleanup_close_ int fd = -1;
	struct ffs_store *st;
	char *real;

	if (mkdir(path, 0700) < 0 && errno != EEXIST)
		return ffs_error_errno(err, errno, "the store %s cannot be made", path);
	fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return ffs_error_errno(err, errno, "the store %s cannot be opened", path);
	st = calloc(1, sizeof(*st));
	real = realpath(path, NULL);
	if (!st || !real) {
		free(st);
		free(real);
		return ffs_error_set(err, ENOMEM, "no memory for the store %s", path);
	}
	*st = (struct ffs_store){.path = real, .fd = ffs_steal_fd(&fd), .lock = -1};
	*out = st;
	return 0;
}

void ffs_store_close(struct ffs_store *st)
{
	if (!st)
		return;
	ffs_close_fd(&st->lock);
	ffs_close_fd(&st->fd);
	free(st->path);
	free(st);
}

const char *ffs_store_path(const struct ffs_store *st)
{
	return st->path;
}

int ffs_store_fd(const struct ffs_store *st)
{
	return st->fd;
}

int ffs_store_free_bytes(const struct ffs_store *st, uint64_t *out, struct ffs_error *err)
{
	struct statvfs v;

	if (fstatvfs(st->fd, &v) < 0)
		return ffs_error_errno(err, errno, "the store %s", st->path);
	*out = (uint64_t)v.f_bavail * v.f_frsize;
	return 0;
}

int ffs_store_check_name(const char *name, struct ffs_error *err)
{
	static const char *const taken[] = {FFS_SUFFIX_PARTIAL, FFS_SUFFIX_FAILED, FFS_SUFFIX_REMOVING};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(taken); i++)
		if (ffs_has_suffix(name, taken[i]))
			return ffs_error_set(err, EINVAL,
				"branch name \"%.80s\": names that end in %s belong to the store", name,
				taken[i]);
	return 0;
}

/* ---- the list ---- */

/* A name that could be a sandbox's or a branch's. */
static bool plain(const char *name)
{
	return ffs_check_name("", name, NULL) == 0;
}

typedef int (*entry_fn)(void *arg, int dir, const char *name);

/* Call fn for each name in a directory that could be ours; dots are left out. */
static int each_name(int dir, const char *name, entry_fn fn, void *arg)
{
	int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW), r = 0;
	DIR *d = fd < 0 ? NULL : fdopendir(fd);

	if (!d) {
		r = -errno;
		ffs_close_fd(&fd);
		return r;
	}
	for (;;) {
		errno = 0;
		struct dirent *e = readdir(d);

		if (!e) {
			r = -errno;
			break;
		}
		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		r = fn(arg, dirfd(d), e->d_name);
		if (r < 0)
			break;
	}
	closedir(d);
	return r;
}

struct walk {
	const char *sandbox;
	int (*fn)(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry);
	void *arg;
};

static int walk_branch(void *arg, int dir, const char *name)
{
	struct walk *w = arg;
	char plain_name[FFS_NAME_MAX];
	struct stat st;

	if (!plain(name) && !ffs_has_suffix(name, FFS_SUFFIX_FAILED))
		return 0;
	if (ffs_has_suffix(name, FFS_SUFFIX_FAILED)) {
		snprintf(plain_name, sizeof(plain_name), "%.*s",
			(int)(strlen(name) - strlen(FFS_SUFFIX_FAILED)), name);
		return plain(plain_name) ? w->fn(w->arg, w->sandbox, plain_name, FFS_STORE_ENTRY_FAILED) : 0;
	}
	if (ffs_store_check_name(name, NULL) < 0 || fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0 ||
		!S_ISDIR(st.st_mode))
		return 0;
	return w->fn(w->arg, w->sandbox, name, FFS_STORE_ENTRY_BRANCH);
}

static int walk_sandbox(void *arg, int dir, const char *name)
{
	struct walk w = *(struct walk *)arg;
	int r;

	if (!plain(name))
		return 0;
	w.sandbox = name;
	r = each_name(dir, name, walk_branch, &w);
	return r == -ENOTDIR || r == -ELOOP ? 0 : r;
}

int ffs_store_each(struct ffs_store *st, const char *sandbox,
	int (*fn)(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry), void *arg,
	struct ffs_error *err)
{
	struct walk w = {.fn = fn, .arg = arg};
	struct ffs_error why = {0};
	int r = sandbox ? walk_sandbox(&w, st->fd, sandbox) : each_name(st->fd, ".", walk_sandbox, &w);

	if (sandbox && r == -ENOENT)
		return 0;
	if (r < 0 && err && !err->code) {
		ffs_error_errno(&why, -r, "the store %s cannot be listed", st->path);
		*err = why;
	}
	return r;
}

/* ---- records of failed branches ---- */

static int record_failure(struct ffs_store *st, int dir, const char *name, const char *why)
{
	char fresh[FFS_NAME_MAX], final[FFS_NAME_MAX];
	struct json_object *o = json_object_new_object();
	int r;

	snprintf(fresh, sizeof(fresh), ".%.80s%s.new", name, FFS_SUFFIX_FAILED);
	snprintf(final, sizeof(final), "%.80s%s", name, FFS_SUFFIX_FAILED);
	if (!o)
		return -ENOMEM;
	json_object_object_add(o, "format", json_object_new_int(FFS_STORE_FORMAT));
	json_object_object_add(o, "name", json_object_new_string(name));
	json_object_object_add(o, "error", json_object_new_string(why));
	const char *text =
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);

	r = ffs_store_ops->unlink(dir, fresh, false);
	if (r == -ENOENT)
		r = 0;
	if (!r)
		r = ffs_store_write_file(dir, fresh, text, strlen(text));
	if (!r)
		r = ffs_store_ops->rename(dir, fresh, final, FFS_RENAME_OVER);
	if (!r)
		r = ffs_store_ops->fsync(dir);
	json_object_put(o);
	return r;
}

int ffs_store_record_failure(struct ffs_store *st, const char *sandbox, const char *name,
	const struct ffs_error *why, struct ffs_error *err)
{
	_cleanup_close_ int dir = ffs_store_open_subdir(st->fd, sandbox);
	int r = dir < 0 ? dir : record_failure(st, dir, name, why->text);

	if (r < 0)
		return ffs_store_errno(st, -r, err, "%s/%s: its failure cannot be recorded", sandbox, name);
	return 0;
}

int ffs_store_failure(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_error *why)
{
	char path[256];
	_cleanup_free_ char *text = NULL;
	_cleanup_close_ int fd = -1;
	struct json_object *o = NULL, *v = NULL;
	struct stat s;

	snprintf(path, sizeof(path), "%.80s/%.80s%s", sandbox, name, FFS_SUFFIX_FAILED);
	fd = openat(st->fd, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0 || fstat(fd, &s) < 0)
		return -errno;
	if (!S_ISREG(s.st_mode) || s.st_size > FAILURE_MAX)
		return -EBADMSG;
	text = calloc(1, (size_t)s.st_size + 1);
	if (!text)
		return -ENOMEM;
	if (ffs_store_ops->pread(fd, text, (size_t)s.st_size, 0) < 0)
		return -EIO;
	o = json_tokener_parse(text);
	if (o && json_object_is_type(o, json_type_object) && json_object_object_get_ex(o, "error", &v) &&
		json_object_is_type(v, json_type_string))
		ffs_error_set(why, EIO, "%.500s", json_object_get_string(v));
	else
		ffs_error_set(why, EIO, "the branch failed; the record of its reason cannot be read");
	json_object_put(o);
	return 0;
}

/* ---- removing and renaming ---- */

/* <name>.XXXXXXXX.removing: more than one of a name can be there. */
static void removing_name(char out[FFS_NAME_MAX], const char *name)
{
	char id[37];

	ffs_uuid(id);
	snprintf(out, FFS_NAME_MAX, "%.80s.%.8s%s", name, id, FFS_SUFFIX_REMOVING);
}

int ffs_store_remove(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_error *err)
{
	_cleanup_close_ int dir = ffs_store_open_subdir(st->fd, sandbox);
	char to[FFS_NAME_MAX], failed[FFS_NAME_MAX];
	int r = dir, gone;

	if (dir >= 0) {
		removing_name(to, name);
		snprintf(failed, sizeof(failed), "%.80s%s", name, FFS_SUFFIX_FAILED);
		r = ffs_store_ops->rename(dir, name, to, FFS_RENAME_NEW);
		if (!r || r == -ENOENT) {
			gone = ffs_store_ops->unlink(dir, failed, false);
			if (!gone || gone != -ENOENT)
				r = gone;
		}
		if (!r)
			r = ffs_store_ops->fsync(dir);
	}
	if (r == -ENOENT)
		return ffs_error_set(err, ENOENT, "the store has no branch %s/%s", sandbox, name);
	return r < 0 ? ffs_store_errno(
			       st, -r, err, "branch %s/%s cannot be removed from the store", sandbox, name)
		     : 0;
}

static int reap_entry(void *arg, int dir, const char *name)
{
	if (!ffs_has_suffix(name, FFS_SUFFIX_REMOVING) && !(name[0] == '.' && ffs_has_suffix(name, ".new")))
		return 0;
	int r = ffs_store_remove_tree(dir, name);

	/* two reapers may meet */
	return r == -ENOENT ? 0 : r;
}

int ffs_store_reap(struct ffs_store *st, const char *sandbox, struct ffs_error *err)
{
	int r = each_name(st->fd, sandbox, reap_entry, NULL);

	if (r == -ENOENT)
		return 0;
	if (r < 0)
		return ffs_store_errno(st, -r, err, "what was removed of %s cannot be deleted", sandbox);
	/* the last branch takes the sandbox's directory along */
	r = ffs_store_ops->unlink(st->fd, sandbox, true);
	if (!r)
		r = ffs_store_ops->fsync(st->fd);
	return r == -ENOTEMPTY || r == -EEXIST || r == -ENOENT || !r
		       ? 0
		       : ffs_store_errno(st, -r, err, "the directory of %s cannot be removed", sandbox);
}

int ffs_store_rename(
	struct ffs_store *st, const char *sandbox, const char *from, const char *to, struct ffs_error *err)
{
	_cleanup_close_ int dir = ffs_store_open_subdir(st->fd, sandbox);
	char failed_from[FFS_NAME_MAX], failed_to[FFS_NAME_MAX];
	int r = dir < 0 ? dir : ffs_store_ops->rename(dir, from, to, FFS_RENAME_NEW);

	if (r == -ENOENT && dir >= 0) {
		snprintf(failed_from, sizeof(failed_from), "%.80s%s", from, FFS_SUFFIX_FAILED);
		snprintf(failed_to, sizeof(failed_to), "%.80s%s", to, FFS_SUFFIX_FAILED);
		r = ffs_store_ops->rename(dir, failed_from, failed_to, FFS_RENAME_NEW);
	}
	if (!r)
		r = ffs_store_ops->fsync(dir);
	return r < 0 ? ffs_store_errno(st, -r, err, "branch %s/%s cannot be renamed to %s in the store",
			       sandbox, from, to)
		     : 0;
}

int ffs_store_branch_dir(struct ffs_store *st, const char *sandbox, const char *name)
{
	_cleanup_close_ int dir = ffs_store_open_subdir(st->fd, sandbox);

	return dir < 0 ? dir : ffs_store_open_subdir(dir, name);
}

/* ---- recovery ---- */

struct recovery {
	struct ffs_store *st;
	const char *sandbox;
};

static int recover_draft(struct recovery *r, int dir, const char *name)
{
	char branch[FFS_NAME_MAX], gone[FFS_NAME_MAX];
	_cleanup_close_ int fd = ffs_store_open_subdir(dir, name);
	struct stat s;
	int code = 0;

	snprintf(branch, sizeof(branch), "%.*s", (int)(strlen(name) - strlen(FFS_SUFFIX_PARTIAL)), name);
	/* another process is writing it: an import */
	if (fd >= 0 && ffs_lock(fd) == -EWOULDBLOCK)
		return 0;
	if (plain(branch) && fstatat(dir, branch, &s, AT_SYMLINK_NOFOLLOW) < 0) {
		ffs_log(FFS_LOG_WARN,
			"store: branch %s/%s was not complete when its daemon ended: it has failed",
			r->sandbox, branch);
		code = record_failure(r->st, dir, branch,
			"the daemon ended while the branch was being written to the store");
	}
	if (!code) {
		removing_name(gone, branch);
		code = ffs_store_ops->rename(dir, name, gone, FFS_RENAME_NEW);
	}
	return code;
}

static int recover_entry(void *arg, int dir, const char *name)
{
	if (ffs_has_suffix(name, FFS_SUFFIX_PARTIAL))
		return recover_draft(arg, dir, name);
	return 0;
}

static int recover_sandbox(void *arg, int dir, const char *name)
{
	struct recovery *r = arg;
	int code;

	if (!plain(name))
		return 0;
	r->sandbox = name;
	code = each_name(dir, name, recover_entry, r);
	if (code == -ENOTDIR || code == -ELOOP)
		return 0;
	return code ? code : ffs_store_reap(r->st, name, NULL);
}

static int lock_store(struct ffs_store *st, struct ffs_error *err)
{
	int code;

	if (st->lock >= 0)
		return 0;
	st->lock = openat(st->fd, LOCK_FILE, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (st->lock < 0)
		return ffs_store_errno(st, errno, err, "the store %s cannot be locked", st->path);
	code = ffs_lock(st->lock);
	if (!code)
		return 0;
	ffs_close_fd(&st->lock);
	if (code == -EWOULDBLOCK)
		return ffs_error_set(err, EBUSY,
			"the store %s is served by another forkfs daemon: give each mount a store of its "
			"own, or end that "
			"one",
			st->path);
	return ffs_error_errno(err, -code, "the store %s cannot be locked", st->path);
}

int ffs_store_recover(struct ffs_store *st, struct ffs_error *err)
{
	struct recovery r = {.st = st};
	int code = lock_store(st, err);

	if (code < 0)
		return code;
	code = each_name(st->fd, ".", recover_sandbox, &r);
	return code < 0 ? ffs_store_errno(st, -code, err, "the store %s cannot be recovered", st->path) : 0;
}
