/* Tells processes that have not run since they were looked at from all others.
 *
 * Owns nothing but the lists. Any thread; who adds to a list excludes others. Blocks on nothing: it reads
 * counters of /proc (schedstat, Documentation/scheduler/sched-stats.rst), and asks once whether a thread is
 * off its CPU (syscall, which is "running" otherwise).
 *
 * Why that is enough: descriptors and mappings of a process change in system calls of its own threads (a
 * descriptor that comes through a socket, a tracer, seccomp or binder is installed when the target runs). The
 * order in ffs_known_mark() matters: turns are counted when a thread gets a CPU, so they are read first, then
 * the thread is seen without one. If at a later moment the count is the same, it has had none from when it
 * was seen until now, and the look lies in between. */
#include "guest/foreign-known.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "guest/foreign-walk.h"

#define ENTRIES_MAX (1u << 18)

struct ffs_foreign_known *ffs_known_new(struct ffs_proc_id vmm, const struct ffs_geometry *geo)
{
	struct ffs_foreign_known *k = calloc(1, sizeof(*k));

	if (k) {
		k->vmm = vmm;
		k->geo = *geo;
	}
	return k;
}

void ffs_foreign_known_free(struct ffs_foreign_known *k)
{
	if (k)
		free(k->list);
	free(k);
}

bool ffs_known_fits(const struct ffs_foreign_known *k, struct ffs_proc_id vmm, const struct ffs_geometry *geo)
{
	/* where only padding differs it is forgotten, which costs a full look */
	return k && k->vmm.pid == vmm.pid && k->vmm.start == vmm.start &&
	       memcmp(&k->geo, geo, sizeof(*geo)) == 0;
}

/* ---- one thread ---- */

static ssize_t read_text(int proc, pid_t tid, const char *name, char *text, size_t size)
{
	char path[48];

	snprintf(path, sizeof(path), "%d/%s", (int)tid, name);
	_cleanup_close_ int fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);

	text[n > 0 ? n : 0] = '\0';
	return n;
}

/* False also where the kernel does not count (CONFIG_SCHED_INFO): zeros. */
static bool read_turns(int proc, pid_t tid, struct ffs_known_thread *t)
{
	char text[96];

	t->tid = tid;
	return read_text(proc, tid, "schedstat", text, sizeof(text)) > 0 &&
	       sscanf(text, "%" SCNu64 " %*u %" SCNu64, &t->ran_ns, &t->turns) == 2 && t->turns;
}

static bool off_cpu(int proc, pid_t tid)
{
	char text[256];

	return read_text(proc, tid, "syscall", text, sizeof(text)) > 0 && strncmp(text, "running", 7) != 0;
}

/* ---- one process ---- */

static int add_thread(void *arg, int dir, const char *number)
{
	struct ffs_known_mark *m = arg;

	if (m->n == FFS_KNOWN_THREADS)
		return 1;
	m->t[m->n++].tid = (pid_t)atoi(number);
	return 0;
}

static unsigned count_threads(int proc, pid_t pid)
{
	struct stat st;
	char path[32];

	snprintf(path, sizeof(path), "%d/task", (int)pid);
	return fstatat(proc, path, &st, 0) < 0 || st.st_nlink < 3 ? 0 : (unsigned)st.st_nlink - 2;
}

static bool list_threads(int proc, pid_t pid, struct ffs_known_mark *m)
{
	char path[32];

	m->n = 0;
	snprintf(path, sizeof(path), "%d/task", (int)pid);
	_cleanup_close_ int dir = openat(proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	return dir >= 0 && ffs_foreign_each(dir, add_thread, m) == 0;
}

/* All threads of the list without a CPU, and no other thread there. */
static bool at_rest(int proc, pid_t pid, struct ffs_known_mark *m)
{
	bool rest = m->n > 0;

	for (unsigned i = 0; i < m->n && rest; i++) {
		m->t[i].pid = pid;
		rest = read_turns(proc, m->t[i].tid, &m->t[i]);
	}
	for (unsigned i = 0; i < m->n && rest; i++)
		rest = off_cpu(proc, m->t[i].tid);
	/* One that began before its maker was seen at rest would be missing: it is counted now. (One of the
	 * list that ended meanwhile, so that the number is right, will be missed next time.) */
	return rest && count_threads(proc, pid) == m->n;
}

void ffs_known_mark(int proc, pid_t pid, struct ffs_known_mark *m)
{
	m->n = 1; /* most have one thread */
	m->t[0].tid = pid;
	if (at_rest(proc, pid, m))
		return;
	unsigned n = count_threads(proc, pid);

	if (n < 2 || n > FFS_KNOWN_THREADS || !list_threads(proc, pid, m) || !at_rest(proc, pid, m))
		m->n = 0;
}

void ffs_known_add(struct ffs_foreign_known *k, const struct ffs_known_mark *m)
{
	if (k->n + m->n > k->cap) {
		size_t cap = k->cap ? 2 * k->cap : 1024;
		struct ffs_known_thread *list =
			cap > ENTRIES_MAX ? NULL : realloc(k->list, cap * sizeof(*list));

		if (!list)
			return; /* it is looked at again */
		k->list = list;
		k->cap = cap;
	}
	memcpy(k->list + k->n, m->t, m->n * sizeof(m->t[0]));
	k->n += m->n;
}

static int by_pid(const void *a, const void *b)
{
	const struct ffs_known_thread *x = a, *y = b;

	return (x->pid > y->pid) - (x->pid < y->pid);
}

void ffs_known_sort(struct ffs_foreign_known *k)
{
	if (k->n)
		qsort(k->list, k->n, sizeof(*k->list), by_pid);
}

bool ffs_known_quiet(const struct ffs_foreign_known *k, int proc, pid_t pid, struct ffs_known_mark *m)
{
	const struct ffs_known_thread key = {.pid = pid},
				      *t = k->n ? bsearch(&key, k->list, k->n, sizeof(key), by_pid) : NULL;

	m->n = 0;
	while (t && t > k->list && t[-1].pid == pid)
		t--;
	for (; t && t < k->list + k->n && t->pid == pid && m->n < FFS_KNOWN_THREADS; t++)
		m->t[m->n++] = *t;
	for (unsigned i = 0; i < m->n; i++) {
		struct ffs_known_thread now;

		if (!read_turns(proc, m->t[i].tid, &now) || now.turns != m->t[i].turns ||
			now.ran_ns != m->t[i].ran_ns)
			return false;
	}
	return m->n > 0;
}
