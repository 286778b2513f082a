/* Owns the choice of the branch whose chunks a packed one shares when it is not written by the daemon that
 * took it: an import, a conversion.
 *
 * Threads: the caller's. Opens manifests; waits for the disk. */
#include "store/internal.h"

#include <string.h>

struct search {
	struct ffs_store *st;
	const char *sandbox;
	const struct ffs_manifest *m;
	struct ffs_stored *best;
};

static bool is_parent(const struct search *s, const struct ffs_stored *other)
{
	return s->m->parent[0] && strcmp(other->m.id, s->m->parent) == 0;
}

/* The parent wherever it is; else the youngest of the sandbox that is not the branch itself. */
static bool better(const struct search *s, const struct ffs_stored *other, const char *sandbox)
{
	if (other->kind != FFS_STORE_PACKED || other->m.memory_size != s->m->memory_size ||
		strcmp(other->m.id, s->m->id) == 0)
		return false;
	if (is_parent(s, other))
		return true;
	if (strcmp(sandbox, s->sandbox) != 0 || (s->best && is_parent(s, s->best)))
		return false;
	return !s->best || other->m.time_ns > s->best->m.time_ns;
}

static int look(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry)
{
	struct search *s = arg;
	struct ffs_stored *other = NULL;

	if (entry == FFS_STORE_ENTRY_BRANCH && ffs_stored_open(s->st, sandbox, name, &other, NULL) == 0 &&
		better(s, other, sandbox)) {
		ffs_stored_unref(s->best);
		s->best = other;
	} else {
		ffs_stored_unref(other);
	}
	return 0;
}

struct ffs_stored *ffs_store_find_share(
	struct ffs_store *st, const char *sandbox, const struct ffs_manifest *m)
{
	struct search s = {.st = st, .sandbox = sandbox, .m = m};

	/* without a list nothing is shared */
	if (ffs_store_each(st, NULL, look, &s, NULL) < 0) {
		ffs_stored_unref(s.best);
		return NULL;
	}
	return s.best;
}
