/* Looks at /proc/PID/fd, fdinfo and maps of a VMM for files of our own mount. Owns nothing.
 *
 * Threads: the pool. Never follows the links: that would be a request to ourselves. fdinfo(5) names the mount
 * id and, since Linux 5.14, the inode number. */
#include "guard.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "nodes.h"

struct served {
	uint64_t ino;
	bool by_us;
};

static void look(struct ffs_handle *h, void *arg)
{
	struct served *s = arg;

	if (h->node->ino == s->ino && h->node->key.mode != FFS_MODE_PASS)
		s->by_us = true;
}

static bool served_by_us(struct ffs_fs *fs, uint64_t ino)
{
	struct served s = {.ino = ino};

	pthread_mutex_lock(&fs->lock);
	ffs_handles_each(fs, look, &s);
	pthread_mutex_unlock(&fs->lock);
	return s.by_us;
}

static int refuse(pid_t pid, const char *how, struct ffs_error *err)
{
	return ffs_error_set(err, EDEADLK,
		"process %d has a file of this mount %s that the daemon serves itself: its faults would wait "
		"for the "
		"daemon while that waits for it. Start it from a settled branch (wait for `wait`, open "
		"read-only) or "
		"from a copy",
		(int)pid, how);
}

static int check_maps(struct ffs_fs *fs, pid_t pid, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	char path[40], *save = NULL;

	snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	if (ffs_read_file(path, 16u << 20, &text, NULL) < 0)
		return 0;
	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		unsigned major, minor;
		unsigned long long ino;

		if (sscanf(line, "%*s %*s %*s %x:%x %llu", &major, &minor, &ino) != 3)
			continue;
		if (makedev(major, minor) == fs->mount_dev && served_by_us(fs, ino))
			return refuse(pid, "mapped", err);
	}
	return 0;
}

static int check_fd(struct ffs_fs *fs, pid_t pid, const char *fd, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/fdinfo/%.16s", (int)pid, fd);
	if (ffs_read_file(path, 65536, &text, NULL) < 0)
		return 0;
	const char *mnt = strstr(text, "mnt_id:"), *ino = strstr(text, "\nino:");

	if (!mnt || !ino || atoi(mnt + 7) != fs->mount_id)
		return 0;
	return served_by_us(fs, strtoull(ino + 5, NULL, 10)) ? refuse(pid, "open", err) : 0;
}

int ffs_guard_check(struct ffs_fs *fs, pid_t pid, struct ffs_error *err)
{
	char path[40];
	int r = check_maps(fs, pid, err);

	if (r < 0)
		return r;
	snprintf(path, sizeof(path), "/proc/%d/fdinfo", (int)pid);
	DIR *d = opendir(path);

	if (!d)
		return 0;
	for (struct dirent *e; !r && (e = readdir(d));)
		if (e->d_name[0] != '.')
			r = check_fd(fs, pid, e->d_name, err);
	closedir(d);
	return r;
}
