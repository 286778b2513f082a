/* Asks who else could write the guest's memory, at attach and before each branch, and decides what follows.
 *
 * Threads: whoever has the sandbox busy. Locks: sb->lock for the moment in which the findings are replaced.
 * Outside any pause: it reads /proc. */
#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "branch/internal.h"
#include "branch/sandbox.h"
#include "guest/foreign.h"

#define PASSING_NS (200 * FFS_NS_PER_MS)
#define PASSING_LOOK_MS 10

static struct json_object *findings_json(const struct ffs_foreign *f)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; list && i < f->n; i++) {
		const struct ffs_foreign_finding *x = &f->list[i];
		struct json_object *o = json_object_new_object();

		json_object_object_add(o, "kind", json_object_new_string(ffs_foreign_kind_name(x->kind)));
		json_object_object_add(o, "refuses", json_object_new_boolean(i < f->refusing));
		json_object_object_add(o, "pid", json_object_new_int(x->pid));
		json_object_object_add(o, "comm", json_object_new_string(x->comm));
		json_object_object_add(o, "text", json_object_new_string(x->text));
		json_object_array_add(list, o);
	}
	return list;
}

static struct json_object *torn_json(const struct ffs_foreign *f)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; list && i < f->refusing; i++)
		json_object_array_add(list, json_object_new_string(f->list[i].text));
	return list;
}

/* Are they all processes that hold it? One that was just forked, by the VMM for a helper say, has its descriptors until it
 * runs a program. */
static bool may_pass(const struct ffs_foreign *f)
{
	for (unsigned i = 0; i < f->refusing; i++)
		if (f->list[i].kind != FFS_FOREIGN_MAPPING && f->list[i].kind != FFS_FOREIGN_DESCRIPTOR)
			return false;
	return f->refusing > 0;
}

/* `patient`: only who holds it for longer than a moment counts. What they wrote meanwhile is in the branch. */
static int look(
	struct ffs_sandbox *sb, bool patient, struct ffs_foreign *f, uint64_t *took_ns, struct ffs_error *why)
{
	uint64_t start = ffs_now_ns(), end = start + PASSING_NS;
	int e;

	while ((e = ffs_foreign_scan(sb->proc, &sb->tracker->geo, &sb->known, f, NULL, why)) == -EBUSY &&
		patient && may_pass(f) && ffs_now_ns() < end)
		poll(NULL, 0, PASSING_LOOK_MS);
	if (took_ns)
		*took_ns = ffs_now_ns() - start;
	return e;
}

int ffs_sandbox_scan(struct ffs_sandbox *sb, bool force, uint64_t *took_ns, struct json_object **torn,
	struct ffs_error *err)
{
	_cleanup_free_ struct ffs_foreign *f = malloc(sizeof(*f));
	struct ffs_error why = {0};

	if (!f)
		return ffs_error_set(err, ENOMEM, "out of memory for a look at the memory of %s", sb->name);
	int e = look(sb, !force && !sb->force, f, took_ns, &why);
	struct json_object *found = findings_json(f);

	pthread_mutex_lock(&sb->lock);
	struct json_object *old = sb->findings;
	bool news = !old || !found || json_object_array_length(old) != json_object_array_length(found);

	sb->findings = found;
	pthread_mutex_unlock(&sb->lock);
	json_object_put(old);
	for (unsigned i = 0; news && i < f->n; i++)
		ffs_log(i < f->refusing ? FFS_LOG_WARN : FFS_LOG_INFO, "%s: %s", sb->name, f->list[i].text);
	if (e < 0 && !f->refusing)
		return ffs_error_set(err, why.code, "%s", why.text);
	if (e < 0 && !force && !sb->force)
		return ffs_error_set(err, why.code,
			"%s; or insist (force, --force): the branch is then marked as possibly torn",
			why.text);
	if (e < 0 && torn && !(*torn = torn_json(f)))
		return ffs_error_set(err, ENOMEM, "out of memory for the findings about %s", sb->name);
	return 0;
}
