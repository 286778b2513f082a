/* Owns the files that say what is attached.
 *
 * They name what this process, usually root, will do by itself when it starts: so a directory that belongs to
 * anybody else, or that others can write, is not used. A record is replaced by rename, synced with its
 * directory before the client that attached is told so. The directory is locked (flock) for as long as the
 * daemon lives: two mounts of one path, in different mount namespaces, do not share it.
 *
 * Threads: as the header says. No locks but the one around opening; file I/O under it. */
#include "attached.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"

#define FORMAT 1
#define RECORD_MAX (256u << 10)
#define FRESH ".new"

struct ffs_attached {
	char *base; /* what it is made in, if it is not there; NULL: it must be */
	char *path;
	char boot[40];
	pthread_mutex_t lock; /* below */
	int dir;              /* -1: not opened yet */
};

/* ---- the directory ---- */

/* One component for a path: '/' is '-', and whatever would be mistaken for it is escaped. With a prefix:
 * others keep things in the runtime directory too. */
static int component(const char *path, char out[NAME_MAX + 1])
{
	size_t n = (size_t)snprintf(out, NAME_MAX + 1, "mount-"), begin = n;

	for (const char *p = path + strspn(path, "/"); *p; p++) {
		if (n + 4 > NAME_MAX)
			return -ENAMETOOLONG;
		if (*p == '-' || *p == '%' || (*p == '.' && n == begin))
			n += (size_t)snprintf(out + n, 4, "%%%02x", (unsigned char)*p);
		else
			out[n++] = *p == '/' ? '-' : *p;
	}
	out[n] = '\0';
	return n > begin ? 0 : -EINVAL;
}

/* systemd's RuntimeDirectory= first; then what the user has, or the machine. NULL: none. */
static char *runtime_base(void)
{
	const char *given = getenv("RUNTIME_DIRECTORY"), *user = getenv("XDG_RUNTIME_DIR");
	char *base = NULL;

	if (given && given[0] == '/')
		return strndup(given, strcspn(given, ":"));
	if (geteuid() == 0)
		return strdup("/run/forkfs");
	if (!user || user[0] != '/' || asprintf(&base, "%s/forkfs", user) < 0)
		return NULL;
	return base;
}

struct ffs_attached *ffs_attached_new(const struct ffs_mount_options *opt, const char *mount_dir)
{
	struct ffs_attached *a = calloc(1, sizeof(*a));
	_cleanup_free_ char *boot = NULL;
	char name[NAME_MAX + 1];
	int r = -ENOMEM;

	if (!a)
		return NULL;
	a->dir = -1;
	pthread_mutex_init(&a->lock, NULL);
	if (ffs_read_file("/proc/sys/kernel/random/boot_id", 4096, &boot, NULL) == 0)
		snprintf(a->boot, sizeof(a->boot), "%.36s", boot);
	if (opt->store[0]) {
		r = asprintf(&a->path, "%s/.attached", opt->store) < 0 ? -ENOMEM : 0;
	} else if ((a->base = runtime_base()) != NULL) {
		r = component(mount_dir, name);
		if (!r && asprintf(&a->path, "%s/%s", a->base, name) < 0)
			r = -ENOMEM;
	} else {
		r = -ENOENT;
	}
	if (!r)
		return a;
	ffs_log(FFS_LOG_INFO, "VMs will not be found again by a later daemon: no place to record them (%s)",
		strerror(-r));
	free(a->base);
	free(a);
	return NULL;
}

static bool trusted(const struct stat *st)
{
	return st->st_uid == geteuid() && !(st->st_mode & (S_IWGRP | S_IWOTH));
}

/* Under the lock: the directory's descriptor, -ENOENT when it is not there and not to be made. */
static int open_dir(struct ffs_attached *a, bool make)
{
	struct stat st;

	if (a->dir >= 0)
		return a->dir;
	if (make && a->base && mkdir(a->base, 0700) < 0 && errno != EEXIST)
		return -errno;
	if (make && mkdir(a->path, 0700) < 0 && errno != EEXIST)
		return -errno;
	_cleanup_close_ int dir = open(a->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

	if (dir < 0 || fstat(dir, &st) < 0)
		return -errno;
	if (!trusted(&st)) {
		ffs_log(FFS_LOG_WARN,
			"%s belongs to another user or can be written by others: it is not used", a->path);
		return -EPERM;
	}
	int r = ffs_lock(dir);

	if (r < 0)
		return r == -EWOULDBLOCK ? -EBUSY : r;
	a->dir = ffs_steal_fd(&dir);
	return a->dir;
}

static int directory(struct ffs_attached *a, bool make)
{
	pthread_mutex_lock(&a->lock);
	int dir = open_dir(a, make);

	pthread_mutex_unlock(&a->lock);
	if (dir < 0 && dir != -ENOENT && !make)
		ffs_log(FFS_LOG_WARN, "what was attached is not known: %s: %s", a->path, strerror(-dir));
	return dir;
}

void ffs_attached_free(struct ffs_attached *a)
{
	if (!a)
		return;
	/* fails where records are left, which is right */
	if (a->dir >= 0 && rmdir(a->path) < 0 && errno != ENOTEMPTY && errno != EEXIST)
		ffs_log(FFS_LOG_DEBUG, "%s stays: %s", a->path, strerror(errno));
	ffs_close_fd(&a->dir);
	pthread_mutex_destroy(&a->lock);
	free(a->base);
	free(a->path);
	free(a);
}

/* ---- records ---- */

static int write_record(int dir, const char *fresh, const char *text)
{
	if (unlinkat(dir, fresh, 0) < 0 && errno != ENOENT)
		return -errno;
	_cleanup_close_ int fd =
		openat(dir, fresh, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);

	if (fd < 0)
		return -errno;
	ssize_t n = ffs_write_full(fd, text, strlen(text));

	if (n < 0)
		return (int)n;
	return fsync(fd) < 0 ? -errno : 0;
}

int ffs_attached_remember(struct ffs_attached *a, const char *name, struct ffs_proc_id vmm,
	const char *request, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	char fresh[NAME_MAX];
	int dir = directory(a, true), r = dir < 0 ? dir : 0;

	snprintf(fresh, sizeof(fresh), ".%s" FRESH, name);
	if (!r && asprintf(&text,
			  "{\"format\":%d,\"boot\":\"%s\",\"pid\":%d,\"start\":%" PRIu64 ",\"attach\":%s}\n",
			  FORMAT, a->boot, (int)vmm.pid, vmm.start, request) < 0) {
		text = NULL;
		r = -ENOMEM;
	}
	if (!r)
		r = write_record(dir, fresh, text);
	if (!r && renameat(dir, fresh, dir, name) < 0)
		r = -errno;
	if (!r && fsync(dir) < 0)
		r = -errno;
	if (r == -EBUSY)
		return ffs_error_set(err, EBUSY, "another daemon keeps its records in %s", a->path);
	return r < 0 ? ffs_error_errno(err, -r, "the record of '%s' in %s", name, a->path) : 0;
}

static void forget(struct ffs_attached *a, int dir, const char *name)
{
	if ((unlinkat(dir, name, 0) < 0 && errno != ENOENT) || fsync(dir) < 0)
		ffs_log(FFS_LOG_WARN, "%s/%s stays, and will be attached again: %s", a->path, name,
			strerror(errno));
}

void ffs_attached_forget(struct ffs_attached *a, const char *name)
{
	int dir = directory(a, false);

	if (dir >= 0)
		forget(a, dir, name);
}

/* What a file says; NULL with *why: it is none of ours, or damaged. */
static struct json_object *read_record(struct ffs_attached *a, int dir, const char *name,
	struct ffs_proc_id *vmm, bool *this_boot, const char **why)
{
	_cleanup_close_ int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	_cleanup_free_ char *text = NULL;
	struct json_object *format, *boot, *pid, *start, *request = NULL;
	struct stat st;

	*why = "it is no file of ours";
	if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || !trusted(&st) || st.st_size > RECORD_MAX)
		return NULL;
	*why = "it cannot be read";
	text = calloc(1, (size_t)st.st_size + 1);
	if (!text || ffs_pread_full(fd, text, (size_t)st.st_size, 0) != st.st_size)
		return NULL;
	struct json_object *o = json_tokener_parse(text);

	*why = "it is damaged, or of another version";
	if (json_object_is_type(o, json_type_object) && json_object_object_get_ex(o, "format", &format) &&
		json_object_get_int(format) == FORMAT && json_object_object_get_ex(o, "boot", &boot) &&
		json_object_is_type(boot, json_type_string) && json_object_object_get_ex(o, "pid", &pid) &&
		json_object_get_int(pid) > 0 && json_object_object_get_ex(o, "start", &start) &&
		json_object_is_type(start, json_type_int) &&
		json_object_object_get_ex(o, "attach", &request) &&
		json_object_is_type(request, json_type_object)) {
		*vmm = (struct ffs_proc_id){
			.pid = json_object_get_int(pid), .start = json_object_get_uint64(start)};
		*this_boot = a->boot[0] && strcmp(json_object_get_string(boot), a->boot) == 0;
		json_object_get(request);
	} else {
		request = NULL;
	}
	json_object_put(o);
	return request;
}

/* A descriptor of its own: a directory's has one position. */
static DIR *list(int dir)
{
	int fd = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *d = fd < 0 ? NULL : fdopendir(fd);

	if (!d)
		ffs_close_fd(&fd);
	return d;
}

/* fn NULL: forget them. */
static void walk(struct ffs_attached *a, ffs_attached_fn fn, void *arg)
{
	int dir = directory(a, false);
	DIR *d = dir < 0 ? NULL : list(dir);

	for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
		struct ffs_proc_id vmm = {0};
		struct json_object *request;
		bool this_boot = false;
		const char *why;

		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		/* a write that a crash cut short begins with a dot */
		if (!fn || ffs_check_name("", e->d_name, NULL) < 0) {
			forget(a, dir, e->d_name);
			continue;
		}
		request = read_record(a, dir, e->d_name, &vmm, &this_boot, &why);
		if (request) {
			fn(arg, e->d_name, vmm, this_boot, request);
			json_object_put(request);
		} else {
			ffs_log(FFS_LOG_WARN, "the record %s/%s of a VM is dropped: %s", a->path, e->d_name,
				why);
			forget(a, dir, e->d_name);
		}
	}
	if (d)
		closedir(d);
}

void ffs_attached_each(struct ffs_attached *a, ffs_attached_fn fn, void *arg)
{
	walk(a, fn, arg);
}

void ffs_attached_forget_all(struct ffs_attached *a)
{
	walk(a, NULL, NULL);
}
