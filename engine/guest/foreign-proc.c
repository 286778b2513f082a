/* Looks at one process in /proc for guest memory that it could write: its mappings with PROCMAP_QUERY
 * (Linux 6.11), with which the kernel finds the shared writable ones, or in the text of maps; its descriptors
 * by dev:ino, asked for without letting a file system be asked.
 *
 * Called by the worker threads of foreign-walk.c; walk->lock for a finding. May hang in the kernel on the
 * process's mmap lock. */
#include "guest/foreign-walk.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"

int ffs_foreign_each(int dir, int (*fn)(void *arg, int dir, const char *number), void *arg)
{
	/* struct linux_dirent64 of getdents64(2); small, so that several threads share a directory evenly */
	struct entry {
		uint64_t ino;
		int64_t off;
		unsigned short len;
		unsigned char type;
		char name[];
	};
	_Alignas(8) char buf[2048];
	long n;

	while ((n = syscall(SYS_getdents64, dir, buf, sizeof(buf))) > 0)
		for (long at = 0; at < n;) {
			const struct entry *d = (const struct entry *)(buf + at);
			int r = d->name[0] >= '0' && d->name[0] <= '9' ? fn(arg, dir, d->name) : 0;

			if (r)
				return r;
			at += d->len;
		}
	return n < 0 && errno != ENOENT && errno != ESRCH ? -errno : 0; /* the process may end meanwhile */
}

/* ---- one process ---- */

/* A process in other clothes (CLONE_VM without CLONE_THREAD): protected as the VMM is. */
static bool same_memory(const struct ffs_walk *w, pid_t task)
{
	return syscall(SYS_kcmp, w->vmm.pid, task, KCMP_VM, 0, 0) == 0;
}

static void report(struct ffs_walk *w, enum ffs_foreign_kind kind, pid_t pid, const struct ffs_region *r)
{
	const char *does = kind == FFS_FOREIGN_MAPPING ? "maps" : "holds open for writing";

	pthread_mutex_lock(&w->lock);
	w->reports++;
	ffs_foreign_add(&w->found, kind, pid,
		"%s the guest memory %s of the VMM (pid %d)%s (a vhost-user back end?): what it writes is "
		"not "
		"trapped; remove the device it serves (device_del) or end it first",
		does, r->name, (int)w->vmm.pid, kind == FFS_FOREIGN_MAPPING ? " writably" : "");
	pthread_mutex_unlock(&w->lock);
}

void ffs_walk_mapping(struct ffs_walk *w, pid_t pid, pid_t task, uint64_t dev, uint64_t ino, uint64_t start,
	uint64_t end, uint64_t offset)
{
	const struct ffs_region *r = ffs_foreign_region(&w->geo, dev, ino, start, end, offset, false);

	if (r && !same_memory(w, task))
		report(w, FFS_FOREIGN_MAPPING, pid, r);
}

/* The region that whoever has its file open for writing can write. */
static const struct ffs_region *held_region(const struct ffs_walk *w, uint64_t dev, uint64_t ino)
{
	for (unsigned i = 0; i < w->geo.n_regions; i++) {
		const struct ffs_region *r = &w->geo.regions[i];

		if (r->ino == ino && r->dev == dev && r->kind == FFS_REGION_SHARED)
			return r;
	}
	return NULL;
}

void ffs_walk_descriptor(struct ffs_walk *w, pid_t pid, pid_t task, uint64_t dev, uint64_t ino)
{
	const struct ffs_region *r = held_region(w, dev, ino);

	if (r && !same_memory(w, task))
		report(w, FFS_FOREIGN_DESCRIPTOR, pid, r);
}

/* 1: it has memory, 0: it has none, -ENOTTY: the kernel has no such query. */
static int query_maps(struct ffs_walk *w, int maps, pid_t pid, pid_t task)
{
	struct ffs_procmap_query q = {.size = sizeof(q),
		.query_flags = FFS_PROCMAP_QUERY_COVERING_OR_NEXT_VMA | FFS_PROCMAP_QUERY_FILE_BACKED_VMA |
			       FFS_PROCMAP_QUERY_VMA_SHARED | FFS_PROCMAP_QUERY_VMA_WRITABLE};

	while (ioctl(maps, FFS_PROCMAP_QUERY, &q) == 0) {
		ffs_walk_mapping(w, pid, task, makedev(q.dev_major, q.dev_minor), q.inode, q.vma_start,
			q.vma_end, q.vma_offset);
		q.query_addr = q.vma_end;
	}
	return errno == ENOENT                      ? 1
	       : errno == ESRCH                     ? 0
	       : errno == ENOTTY || errno == EINVAL ? -ENOTTY
						    : -errno;
}

static void maps_line(struct ffs_walk *w, const char *line, pid_t pid, pid_t task)
{
	const char *perm = strchr(line, ' ');
	uint64_t start, end, offset, ino;
	unsigned maj, min;

	if (!perm || strnlen(perm, 5) < 5 || perm[2] != 'w' || perm[4] != 's')
		return;
	if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %x:%x %" SCNu64, &start, &end, &offset,
		    &maj, &min, &ino) == 6)
		ffs_walk_mapping(w, pid, task, makedev(maj, min), ino, start, end, offset);
}

/* The same from the text, line by line: no line is longer than a path and 80 characters, and of one that is,
 * only its beginning matters. */
static int read_maps(struct ffs_walk *w, int maps, pid_t pid, pid_t task)
{
	char buf[16384];
	size_t have = 0;
	bool any = false;
	ssize_t n;

	while ((n = read(maps, buf + have, sizeof(buf) - 1 - have)) > 0) {
		char *line = buf, *nl;

		any = true;
		have += (size_t)n;
		buf[have] = '\0';
		while ((nl = memchr(line, '\n', have - (size_t)(line - buf))) != NULL) {
			*nl = '\0';
			maps_line(w, line, pid, task);
			line = nl + 1;
		}
		have -= (size_t)(line - buf);
		if (have == sizeof(buf) - 1) {
			maps_line(w, buf, pid, task);
			have = 0;
		}
		memmove(buf, line, have);
	}
	return n < 0 ? (errno == ESRCH ? 0 : -errno) : any;
}

struct fd_walk {
	struct ffs_walk *w;
	pid_t pid, task;
	const char *prefix;
};

static bool open_for_writing(const struct fd_walk *f, const char *number)
{
	char path[80], text[1024];
	unsigned flags = 0;

	snprintf(path, sizeof(path), "%s/fdinfo/%s", f->prefix, number);
	_cleanup_close_ int fd = openat(f->w->proc, path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (n <= 0)
		return false; /* closed meanwhile */
	text[n] = '\0';
	const char *line = strstr(text, "flags:");

	return line && sscanf(line, "flags: %o", &flags) == 1 && (flags & O_ACCMODE) != O_RDONLY;
}

static int look_at_fd(void *arg, int dir, const char *number)
{
	const struct fd_walk *f = arg;
	struct statx st;

	/* never asks a file system: it may be a dead server's, or our own mount */
	if (statx(dir, number, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, STATX_INO, &st) < 0)
		return 0;
	uint64_t dev = makedev(st.stx_dev_major, st.stx_dev_minor);

	if (held_region(f->w, dev, st.stx_ino) && open_for_writing(f, number))
		ffs_walk_descriptor(f->w, f->pid, f->task, dev, st.stx_ino);
	return 0;
}

/* `prefix` of the task below /proc. 1: looked at; 0: it has no memory (any more); -EACCES, … */
static int look_at_task(struct ffs_walk *w, const char *prefix, pid_t pid, pid_t task)
{
	struct fd_walk f = {.w = w, .pid = pid, .task = task, .prefix = prefix};
	char path[64];
	int e = -ENOTTY;

	snprintf(path, sizeof(path), "%s/maps", prefix);
	_cleanup_close_ int maps = openat(w->proc, path, O_RDONLY | O_CLOEXEC);

	if (maps < 0)
		return errno == ESRCH || errno == ENOENT ? 0 : -errno;
	if (atomic_load_explicit(&w->query, memory_order_relaxed)) {
		e = query_maps(w, maps, pid, task);
		if (e == -ENOTTY)
			atomic_store(&w->query, false);
	}
	if (e == -ENOTTY)
		e = read_maps(w, maps, pid, task);
	if (e <= 0 || !w->fds)
		return e;
	snprintf(path, sizeof(path), "%s/fd", prefix);
	_cleanup_close_ int dir = openat(w->proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (dir < 0)
		return errno == ESRCH || errno == ENOENT ? 0 : -errno;
	e = ffs_foreign_each(dir, look_at_fd, &f);
	return e < 0 ? e : 1;
}

static int look_at_thread(void *arg, int dir, const char *number)
{
	const struct fd_walk *f = arg;
	char prefix[48];

	snprintf(prefix, sizeof(prefix), "%s/task/%.10s", f->prefix, number);
	return look_at_task(f->w, prefix, f->pid, (pid_t)atoi(number));
}

/* A process without memory is a kernel thread or ended, or only its first thread has. */
static int look_at_threads(struct ffs_walk *w, const char *number, pid_t pid)
{
	struct fd_walk f = {.w = w, .pid = pid, .prefix = number};
	struct stat st;
	char path[32];

	snprintf(path, sizeof(path), "%.10s/task", number);
	if (fstatat(w->proc, path, &st, 0) < 0 || st.st_nlink <= 3) /* two, and one a thread */
		return 0;
	_cleanup_close_ int dir = openat(w->proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	return dir < 0 ? 0 : ffs_foreign_each(dir, look_at_thread, &f);
}

int ffs_walk_process(struct ffs_walk *w, const char *number)
{
	pid_t pid = (pid_t)atoi(number);
	int e = look_at_task(w, number, pid, pid);

	return e == 0 ? look_at_threads(w, number, pid) : e;
}
