/* The tree as its clients see it (tree.h). One thread, no locks; what may block are the opens and reads of
 * files of the mount, and every one of them ends with EINTR when a signal was caught. */
#include "tree.h"

#include <dirent.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"

#define FFS_SMALL_FILE_MAX (4u << 20)

/* ---- finding it ---- */

static int open_failed(int code, const char *dir, struct ffs_error *err)
{
	switch (code) {
	case ENOTCONN:
		return ffs_error_set(err, code,
			"the daemon of %s is gone: `forkfs mount %s` puts a new one there", dir, dir);
	case ENOENT:
		return ffs_error_set(err, code,
			"there is no %s: mount with `mkdir -p %s && forkfs mount %s`, or name another mount "
			"by --mount DIR or "
			"$FORKFS",
			dir, dir, dir);
	case EACCES:
	case EPERM:
		return ffs_error_set(err, EACCES,
			"%s belongs to another user: be that user, or mount with -o allow_other and attach "
			"with --owner",
			dir);
	default:
		return ffs_error_errno(err, code, "%s cannot be opened", dir);
	}
}

int ffs_tree_open_dir(struct ffs_tree *t, const char *dir, struct ffs_error *err)
{
	_cleanup_free_ char *real = realpath(dir, NULL);
	_cleanup_close_ int fd = -1;
	struct stat st;

	if (!real)
		return open_failed(errno, dir, err);
	fd = open(real, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return open_failed(errno, real, err);
	if (fstatat(fd, ".forkfs/version", &st, AT_SYMLINK_NOFOLLOW)) {
		if (errno != ENOENT && errno != ENOTDIR)
			return open_failed(errno, real, err);
		return ffs_error_set(err, ENOENT,
			"no forkfs is mounted at %s: `forkfs mount %s`, or name another mount by --mount DIR "
			"or $FORKFS",
			real, real);
	}
	t->mount = ffs_steal_ptr(&real);
	t->fd = ffs_steal_fd(&fd);
	return 0;
}

int ffs_tree_open(struct ffs_tree *t, const char *given, struct ffs_error *err)
{
	const char *dir = given ? given : ffs_global_mount;

	if (!dir)
		dir = getenv("FORKFS");
	if (!dir || !*dir)
		dir = "/forkfs";
	return ffs_tree_open_dir(t, dir, err);
}

void ffs_tree_close(struct ffs_tree *t)
{
	free(t->mount);
	t->mount = NULL;
	ffs_close_fd(&t->fd);
}

void ffs_tree_explain(const struct ffs_tree *t, const char *path, struct ffs_error *err)
{
	_cleanup_free_ char *full = NULL;
	char text[sizeof(err->text)];
	ssize_t n;

	if (!err || !err->code || asprintf(&full, "%s/%s", t->mount, path) < 0)
		return;
	n = lgetxattr(full, "user.forkfs.error", text, sizeof(text) - 1);
	if (n <= 0)
		return;
	text[n] = 0;
	if (text[n - 1] == '\n')
		text[n - 1] = 0;
	if (text[0])
		ffs_error_set(err, err->code, "%s", text);
}

/* ---- reading ---- */

/* All there is to read from fd; a signal that was caught ends it. */
static int read_all(int fd, size_t max, char **out, size_t *out_len)
{
	_cleanup_free_ char *buf = NULL;
	size_t len = 0, cap = 0;

	for (;;) {
		ssize_t n;

		if (len + 1 >= cap) {
			size_t more = cap ? cap * 2 : 16384;
			char *p;

			if (cap > max)
				return -EFBIG;
			p = realloc(buf, more);
			if (!p)
				return -ENOMEM;
			buf = p;
			cap = more;
		}
		n = read(fd, buf + len, cap - len - 1);
		if (n < 0 && errno == EINTR && !ffs_interrupted())
			continue;
		if (n < 0)
			return -errno;
		if (!n)
			break;
		len += (size_t)n;
	}
	buf[len] = 0;
	*out = ffs_steal_ptr(&buf);
	*out_len = len;
	return 0;
}

int ffs_tree_read(const struct ffs_tree *t, const char *path, char **out, struct ffs_error *err)
{
	_cleanup_close_ int fd = openat(t->fd, path, O_RDONLY | O_CLOEXEC);
	size_t len;
	int r;

	if (fd < 0)
		return ffs_error_errno(err, errno, "%s/%s", t->mount, path);
	r = read_all(fd, FFS_SMALL_FILE_MAX, out, &len);
	if (r < 0)
		return ffs_error_errno(err, -r, "%s/%s", t->mount, path);
	return 0;
}

int ffs_tree_word(const struct ffs_tree *t, const char *path, char *buf, size_t size, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	int r = ffs_tree_read(t, path, &text, err);

	if (r < 0)
		return r;
	text[strcspn(text, "\n")] = 0;
	snprintf(buf, size, "%s", text);
	return 0;
}

int ffs_tree_json(const struct ffs_tree *t, const char *path, struct json_object **out, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	struct json_object *obj;
	int r = ffs_tree_read(t, path, &text, err);

	if (r < 0)
		return r;
	obj = json_tokener_parse(text);
	if (!json_object_is_type(obj, json_type_object)) {
		json_object_put(obj);
		return ffs_error_set(err, EPROTO,
			"%s/%s is no JSON object: is the daemon of another version?", t->mount, path);
	}
	*out = obj;
	return 0;
}

static int compare_names(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

void ffs_tree_names_free(char **names, size_t n)
{
	for (size_t i = 0; i < n; i++)
		free(names[i]);
	free(names);
}

int ffs_tree_names(
	const struct ffs_tree *t, const char *path, char ***names, size_t *n, struct ffs_error *err)
{
	int fd = openat(t->fd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC), r = 0;
	DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
	char **list = NULL;
	size_t len = 0, cap = 0;
	struct dirent *e;

	if (!dir) {
		r = ffs_error_errno(err, errno, "%s/%s", t->mount, path);
		if (fd >= 0)
			close(fd);
		return r;
	}
	for (errno = 0; (e = readdir(dir)); errno = 0) {
		if (e->d_name[0] == '.' || (e->d_type != DT_DIR && e->d_type != DT_UNKNOWN))
			continue;
		if (len == cap) {
			size_t more = cap ? cap * 2 : 64;
			char **p = realloc(list, more * sizeof(*p));

			if (!p) {
				errno = ENOMEM;
				break;
			}
			list = p;
			cap = more;
		}
		list[len] = strdup(e->d_name);
		if (!list[len])
			break;
		len++;
	}
	if (errno) {
		r = ffs_error_errno(err, errno, "%s/%s cannot be listed", t->mount, path);
		ffs_tree_names_free(list, len);
	} else {
		if (len)
			qsort(list, len, sizeof(*list), compare_names);
		*names = list;
		*n = len;
	}
	closedir(dir);
	return r;
}

/* ---- requests ---- */

/* The sentence of an answer into *err: -errno when it tells of a failure, else 0. */
static int answer_error(struct json_object *answer, int code, struct ffs_error *err)
{
	const char *text = ffs_json_string(answer, "error");

	if (!*text)
		return 0;
	return ffs_error_set(err, code ? code : EIO, "%s", text);
}

int ffs_tree_request(const struct ffs_tree *t, const char *path, struct json_object *request,
	struct json_object **answer, struct ffs_error *err)
{
	return ffs_tree_request_text(
		t, path, json_object_to_json_string_ext(request, JSON_C_TO_STRING_PLAIN), answer, err);
}

int ffs_tree_request_text(const struct ffs_tree *t, const char *path, const char *text,
	struct json_object **answer, struct ffs_error *err)
{
	_cleanup_close_ int fd = openat(t->fd, path, O_RDWR | O_CLOEXEC);
	_cleanup_free_ char *reply = NULL, *parent = strdup(path);
	struct json_object *obj = NULL;
	struct ffs_error why = {0};
	int refused = 0, r;
	size_t len;

	if (!text || !parent)
		return ffs_error_set(err, ENOMEM, "no memory for the request");
	if (fd < 0)
		return ffs_error_errno(err, errno, "%s/%s", t->mount, path);
	*strrchr(parent, '/') = 0;

	for (size_t done = 0, all = strlen(text); done < all;) {
		ssize_t n = write(fd, text + done, all - done);

		if (n < 0 && errno == EINTR && !ffs_interrupted())
			continue;
		if (n < 0) {
			refused = errno;
			break;
		}
		done += (size_t)n;
	}
	r = refused == EINTR ? -EINTR : read_all(fd, FFS_SMALL_FILE_MAX, &reply, &len);
	if (!r && len)
		obj = json_tokener_parse(reply);
	if (!json_object_is_type(obj, json_type_object)) {
		json_object_put(obj);
		obj = NULL;
	}
	if (answer_error(obj, refused ? refused : EIO, &why) < 0) {
		json_object_put(obj);
		if (err)
			*err = why;
		return -why.code;
	}
	if (refused || r < 0) {
		int code = refused ? refused : -r;

		json_object_put(obj);
		ffs_error_errno(&why, code, "%s/%s", t->mount, path);
		ffs_tree_explain(t, parent, &why);
		if (err)
			*err = why;
		return -code;
	}
	if (!obj)
		return ffs_error_set(err, EPROTO, "%s/%s gave no JSON object as its answer", t->mount, path);
	if (answer)
		*answer = obj;
	else
		json_object_put(obj);
	return 0;
}

/* The branch of the target is there. */
static int check_fork(const struct ffs_tree *t, const struct ffs_target *target, struct ffs_error *err)
{
	char path[240];
	struct stat st;

	snprintf(
		path, sizeof(path), "%s/branches/%s/forks/%s", target->sandbox, target->branch, target->fork);
	if (fstatat(t->fd, path, &st, AT_SYMLINK_NOFOLLOW) == 0)
		return 0;
	if (errno != ENOENT)
		return ffs_error_errno(err, errno, "%s/%s", t->mount, path);
	return ffs_error_set(err, ENOENT, "branch %s/%s has no fork '%s': `forkfs fork %s/%s %s …` makes one",
		target->sandbox, target->branch, target->fork, target->sandbox, target->branch, target->fork);
}

int ffs_tree_check_target(const struct ffs_tree *t, const struct ffs_target *target, struct ffs_error *err)
{
	char path[200], list[300] = "";
	const char *dir = ".";
	char **names = NULL;
	size_t n = 0, used = 0;
	struct stat st;

	if (fstatat(t->fd, target->sandbox, &st, AT_SYMLINK_NOFOLLOW) == 0) {
		if (!target->branch[0])
			return 0;
		snprintf(path, sizeof(path), "%s/branches/%s", target->sandbox, target->branch);
		if (fstatat(t->fd, path, &st, AT_SYMLINK_NOFOLLOW) == 0)
			return target->fork[0] ? check_fork(t, target, err) : 0;
		snprintf(path, sizeof(path), "%s/branches", target->sandbox);
		dir = path;
	}
	if (errno != ENOENT)
		return ffs_error_errno(err, errno, "%s/%s", t->mount, dir == path ? path : target->sandbox);

	if (ffs_tree_names(t, dir, &names, &n, NULL) == 0) {
		for (size_t i = 0; i < n && used < sizeof(list) - 80; i++)
			used += (size_t)snprintf(
				list + used, sizeof(list) - used, "%s%.64s", i ? ", " : "", names[i]);
		ffs_tree_names_free(names, n);
	}
	if (dir == path)
		return ffs_error_set(err, ENOENT, "sandbox %s has no branch '%s'; it has: %s",
			target->sandbox, target->branch, n ? list : "none");
	return ffs_error_set(err, ENOENT, "there is no sandbox '%s' at %s; there are: %s", target->sandbox,
		t->mount, n ? list : "none (forkfs attach makes one)");
}

/* ---- JSON ---- */

struct json_object *ffs_json_get(struct json_object *obj, const char *key)
{
	struct json_object *v = NULL;

	if (!json_object_is_type(obj, json_type_object) || !json_object_object_get_ex(obj, key, &v))
		return NULL;
	return v;
}

uint64_t ffs_json_u64(struct json_object *obj, const char *key)
{
	struct json_object *v = ffs_json_get(obj, key);

	return json_object_is_type(v, json_type_int) ? json_object_get_uint64(v) : 0;
}

const char *ffs_json_string(struct json_object *obj, const char *key)
{
	struct json_object *v = ffs_json_get(obj, key);

	return json_object_is_type(v, json_type_string) ? json_object_get_string(v) : "";
}

bool ffs_cli_json_bool(struct json_object *obj, const char *key)
{
	struct json_object *v = ffs_json_get(obj, key);

	return json_object_is_type(v, json_type_boolean) && json_object_get_boolean(v);
}
