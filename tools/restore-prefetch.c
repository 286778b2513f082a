/* Owns the working set of the children of one call that map the branch's memory: what was recorded with the branch before,
 * and what the first of them that is ready has touched. It lies in the store beside the branch, where `forkfs pager` has its
 * own: either serves the other.
 *
 * It is worth it where pages come from a disk or from the daemon. An image in memory is there, and what its children would
 * save are the faults that map it, which nobody can take for another process (docs/restore.md has the figures).
 *
 * When a VM says that it runs its guest has not run yet, and has touched nothing. So of a child whose guest has not said that
 * it is ready the first START_MS count as its start, and the command, whose line about it is out, lives so long: once, for the
 * first child of a branch.
 *
 * Threads: the main thread, but for ffs_restore_set_ready(), which the children's threads call; the first of them has
 * what it writes for itself until they are joined. No locks. No child waits for anything here. */
#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"
#include "guest/touched.h"
#include "restore.h"
#include "store/working-set.h"

/* Written anew when a child has touched so much besides: an eighth of what is recorded. Children differ a little each time. */
#define NEWS_SHARE 8
#define START_MS 100

struct ffs_restore_set {
	char *path;
	struct ffs_working_set set; /* as it was read; none with --no-prefetch */
	atomic_bool taken;          /* there is a first child, which is asked */
	pid_t pid;         /* of it, from when it is ready; not reaped by us, so the number is its own */
	uint64_t until_ns; /* when its start is over */
	uint64_t *map;     /* what it has touched, a bit for each FFS_WORKING_SET_UNIT; NULL: not known */
};

static void say(const struct ffs_error *err, const char *what)
{
	fprintf(stderr, "forkfs restore: %s: %s\n", err->text, what);
}

static void free_set(struct ffs_restore_set *s)
{
	free(s->path);
	free(s->map);
	ffs_working_set_free(&s->set);
	free(s);
}

/* Where it is, or is to be; NULL: nowhere. */
static char *find_path(const struct ffs_restore *r)
{
	struct json_object *capabilities = NULL;
	const char *kind = ffs_json_string(r->status, "store");
	char *path = NULL;

	if (r->writing || (strcmp(kind, "dense") && strcmp(kind, "packed")))
		return NULL;
	if (!ffs_tree_json(r->tree, ".forkfs/capabilities", &capabilities, NULL) &&
		asprintf(&path, "%s/%s/%s/" FFS_WORKING_SET, ffs_json_string(capabilities, "store"),
			r->target.sandbox, r->target.branch) < 0)
		path = NULL;
	json_object_put(capabilities);
	return path;
}

void ffs_restore_set_open(struct ffs_restore *r)
{
	struct ffs_restore_set *s;
	struct ffs_error err = {0};
	char *path = r->backend && !strcmp(r->backend, "uffd")
			     ? NULL
			     : find_path(r); /* the pager has one of its own */

	if (!path)
		return;
	s = calloc(1, sizeof(*s));
	if (!s) {
		free(path);
		return;
	}
	s->path = path;
	r->set = s;
	if (r->no_prefetch || !ffs_working_set_read(path, r->memory_size, &s->set, &err) ||
		err.code == ENOENT)
		return;
	if (err.code != EACCES) {
		say(&err, "it is ignored");
		return;
	}
	/* a store that is not the caller's */
	r->set = NULL;
	free_set(s);
}

static bool nothing_to_read(void *arg)
{
	struct pollfd p = {.fd = *(const int *)arg, .events = POLLIN};

	return poll(&p, 1, 0) == 0;
}

void ffs_restore_set_prefetch(struct ffs_restore *r, int fd)
{
	if (r->set && !r->loaded)
		ffs_working_set_read_ahead(&r->set->set, r->memory_fd, r->memory_size, FFS_WORKING_SET_LIMIT,
			nothing_to_read, &fd);
}

static size_t words(const struct ffs_restore *r)
{
	return r->memory_size / FFS_WORKING_SET_UNIT / 64 + 1;
}

static void look(struct ffs_restore *r)
{
	struct ffs_restore_set *s = r->set;
	_cleanup_free_ uint64_t *map = calloc(words(r), sizeof(*map));
	struct ffs_error err = {0};
	struct stat st;

	if (!map || fstat(r->memory_fd, &st) < 0)
		return;
	/* a VMM that has ended by now, or has mapped something else, tells nothing */
	if (!ffs_touched_read(s->pid, st.st_dev, st.st_ino, r->memory_size, FFS_WORKING_SET_UNIT, map, &err))
		s->map = ffs_steal_ptr(&map);
	else if (err.code != ESRCH && err.code != ENOENT)
		say(&err, "the branch's working set is not recorded");
}

void ffs_restore_set_ready(struct ffs_restore *r, const struct ffs_child *c)
{
	struct ffs_restore_set *s = r->set;

	bool said = c->ack || r->healthy; /* it has told us that it is ready */

	/* one that has not is no news where a set is known */
	if (!s || (s->set.n && !said) || atomic_exchange(&s->taken, true))
		return;
	s->pid = c->pid;
	if (said || r->paused)
		look(r);
	else
		s->until_ns = ffs_now_ns() + START_MS * FFS_NS_PER_MS;
}

/* What a child has touched says enough that is new: then it is in the map, with what was there. */
static bool is_news(const struct ffs_restore *r)
{
	struct ffs_restore_set *s = r->set;
	size_t n = words(r);
	_cleanup_free_ uint64_t *old = calloc(n, sizeof(*old));
	uint64_t fresh = 0;

	if (!old)
		return false;
	ffs_working_set_mark(&s->set, FFS_WORKING_SET_UNIT, old);
	for (size_t i = 0; i < n; i++) {
		fresh += (unsigned)__builtin_popcountll(s->map[i] & ~old[i]);
		s->map[i] |= old[i];
	}
	return fresh && fresh * FFS_WORKING_SET_UNIT >= ffs_working_set_bytes(&s->set) / NEWS_SHARE;
}

void ffs_restore_set_end(struct ffs_restore *r)
{
	struct ffs_restore_set *s = r->set;
	struct ffs_working_set now = {0};
	struct ffs_error err = {0};

	if (!s)
		return;
	/* a signal ends it */
	if (s->until_ns && poll(NULL, 0, ffs_ms_until(s->until_ns)) == 0)
		look(r);
	if (s->map && is_news(r) &&
		!ffs_working_set_of(
			s->map, FFS_WORKING_SET_UNIT, r->memory_size, FFS_WORKING_SET_LIMIT, &now) &&
		ffs_working_set_write(s->path, r->memory_size, &now, &err) < 0 && err.code != ENOENT)
		say(&err,
			"the next children do without"); /* ENOENT: the branch was removed or renamed meanwhile */
	ffs_working_set_free(&now);
	free_set(s);
	r->set = NULL;
}
