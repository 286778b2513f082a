/* What lies at a directory (mountpoint.h). One thread, no locks. Only ffs_mountpoint_check() asks the file
 * system itself, and only after /proc said that no live forkfs is there. */
#include "mountpoint.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define FFS_MOUNTINFO_MAX (8u << 20)

int ffs_mountpoint_resolve(const char *dir, char **out, struct ffs_error *err)
{
	_cleanup_free_ char *real = realpath(dir, NULL), *copy1 = NULL, *copy2 = NULL, *parent = NULL;
	const char *name;

	if (real) {
		*out = ffs_steal_ptr(&real);
		return 0;
	}
	if (errno == ENOENT)
		return ffs_error_set(err, ENOENT, "there is no %s: `mkdir -p %s` first", dir, dir);
	if (errno != ENOTCONN)
		return ffs_error_errno(err, errno, "%s", dir);
	copy1 = strdup(dir);
	copy2 = strdup(dir);
	if (!copy1 || !copy2)
		return ffs_error_set(err, ENOMEM, "no memory for a path");
	name = basename(copy1);
	parent = realpath(dirname(copy2), NULL);
	if (!parent)
		return ffs_error_errno(err, errno, "the directory above %s", dir);
	if (asprintf(out, "%s/%s", strcmp(parent, "/") ? parent : "", name) < 0)
		return ffs_error_set(err, ENOMEM, "no memory for a path");
	return 0;
}

/* Undo the octal escapes of mountinfo (proc(5): space, tab, newline and backslash) in place. */
static void unescape(char *s)
{
	char *to = s;

	for (; *s; s++, to++) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] >= '0' && s[2] <= '7' && s[3] >= '0' &&
			s[3] <= '7') {
			*to = (char)((s[1] - '0') * 64 + (s[2] - '0') * 8 + (s[3] - '0'));
			s += 3;
		} else {
			*to = *s;
		}
	}
	*to = 0;
}

int ffs_mountpoint_type(const char *dir, char *type, size_t size)
{
	_cleanup_free_ char *text = NULL;
	char *save = NULL;
	int found = -ENOENT, r = ffs_read_file("/proc/self/mountinfo", FFS_MOUNTINFO_MAX, &text, NULL);

	if (r < 0)
		return r;
	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		char *rest = strstr(line, " - "), *field = line, *point = NULL;

		if (!rest)
			continue;
		*rest = 0;
		rest += 3;
		/* id parent major:minor root MOUNTPOINT … - TYPE source options (proc(5)) */
		for (int i = 0; i < 5 && field; i++)
			point = strsep(&field, " ");
		if (!point)
			continue;
		unescape(point);
		if (strcmp(point, dir))
			continue;
		snprintf(type, size, "%.*s", (int)strcspn(rest, " "), rest);
		found = 0; /* a later line is mounted on top */
	}
	return found;
}

static int check_empty(const char *dir, struct ffs_error *err)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	int r = 0;

	if (!d)
		return ffs_error_errno(err, errno, "%s cannot be listed", dir);
	while ((e = readdir(d))) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		r = ffs_error_set(err, ENOTEMPTY,
			"%s is not empty (it has '%.80s'): what is in it would be hidden; mount on an empty "
			"directory",
			dir, e->d_name);
		break;
	}
	closedir(d);
	return r;
}

int ffs_mountpoint_check(const char *dir, bool *dead, struct ffs_error *err)
{
	struct statx stx;
	char type[80];
	bool mounted = ffs_mountpoint_type(dir, type, sizeof(type)) == 0;
	/* not from the attribute cache, which outlives a daemon */
	bool gone = statx(AT_FDCWD, dir, AT_STATX_FORCE_SYNC, STATX_TYPE | STATX_MODE, &stx) &&
		    (errno == ENOTCONN || errno == ECONNABORTED);

	*dead = false;
	if (mounted && !strcmp(type, "fuse.forkfs")) {
		*dead = gone;
		return gone ? 0
			    : ffs_error_set(err, EBUSY,
				      "forkfs is already mounted on %s: use it, or `forkfs umount %s` first",
				      dir, dir);
	}
	if (gone)
		return ffs_error_set(err, ENOTCONN,
			"%s carries a dead mount (%s) that is not ours: `umount -l %s` first", dir,
			mounted ? type : "?", dir);
	if (mounted)
		return ffs_error_set(err, EBUSY,
			"%s is already a mount point (%s): mount on another directory", dir, type);
	if (statx(AT_FDCWD, dir, 0, STATX_TYPE | STATX_MODE, &stx))
		return ffs_error_errno(err, errno, "%s", dir);
	if (!S_ISDIR(stx.stx_mode))
		return ffs_error_set(err, ENOTDIR, "%s is no directory: mount on an empty directory", dir);
	return check_empty(dir, err);
}

/* ---- who uses it ---- */

static bool below(const char *path, const char *dir)
{
	size_t n = strlen(dir);

	return !strncmp(path, dir, n) && (path[n] == '/' || !path[n] || path[n] == ' ');
}

static bool link_below(const char *link, const char *dir)
{
	char target[PATH_MAX];
	ssize_t n = readlink(link, target, sizeof(target) - 1);

	if (n < 0)
		return false;
	target[n] = 0;
	return below(target, dir);
}

static bool maps_below(const char *maps, const char *dir)
{
	_cleanup_fclose_ FILE *f = fopen(maps, "re");
	_cleanup_free_ char *line = NULL;
	size_t cap = 0;
	ssize_t n;

	while (f && (n = getline(&line, &cap, f)) > 0) {
		const char *path = strchr(line, '/');

		line[n - 1] = 0;
		if (path && below(path, dir))
			return true;
	}
	return false;
}

static bool process_uses(const char *pid, const char *dir)
{
	static const char *const links[] = {"cwd", "root"};
	char path[320];
	struct dirent *e;
	bool uses = false;
	DIR *d;

	for (unsigned i = 0; i < FFS_ARRAY_LEN(links); i++) {
		snprintf(path, sizeof(path), "/proc/%.20s/%s", pid, links[i]);
		if (link_below(path, dir))
			return true;
	}
	snprintf(path, sizeof(path), "/proc/%.20s/fd", pid);
	d = opendir(path);
	while (d && !uses && (e = readdir(d))) {
		snprintf(path, sizeof(path), "/proc/%.20s/fd/%.255s", pid, e->d_name);
		uses = link_below(path, dir);
	}
	if (d)
		closedir(d);
	if (uses)
		return true;
	snprintf(path, sizeof(path), "/proc/%.20s/maps", pid);
	return maps_below(path, dir);
}

bool ffs_mountpoint_users(const char *dir, int apart, char *out, size_t size)
{
	DIR *proc = opendir("/proc");
	size_t used = 0;
	struct dirent *e;
	bool it_does = false;

	out[0] = 0;
	while (proc && used < size && (e = readdir(proc))) {
		_cleanup_free_ char *comm = NULL;
		char path[64];

		if (!isdigit((unsigned char)e->d_name[0]) || atoi(e->d_name) == getpid() ||
			!process_uses(e->d_name, dir))
			continue;
		if (atoi(e->d_name) == apart) {
			it_does = true;
			continue;
		}
		snprintf(path, sizeof(path), "/proc/%.20s/comm", e->d_name);
		if (ffs_read_file(path, 4096, &comm, NULL) < 0)
			continue;
		comm[strcspn(comm, "\n")] = 0;
		used += (size_t)snprintf(
			out + used, size - used, "%s%s (%.20s)", used ? ", " : "", comm, e->d_name);
	}
	if (proc)
		closedir(proc);
	return it_does;
}
