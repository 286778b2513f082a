/* The drives of a VMM with an HTTP API: what it says it has, and whether that is still so. Owns nothing.
 *
 * Called as the rest of api.c, outside any pause. No locks. */
#include "vmm/api.h"

#include <json-c/json.h>
#include <stdio.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"

#define MAX_DRIVES 64 /* listed; a VM with more has them, and its children are refused */

/* The drives that are files: which of them a child needs for itself. They are named as the VMM knows them. */
struct json_object *ffs_api_list_drives(struct json_object *config, unsigned *writable)
{
	struct json_object *drives, *list = json_object_new_array();

	if (!json_object_object_get_ex(config, "drives", &drives) ||
		!json_object_is_type(drives, json_type_array))
		return list;
	for (size_t i = 0; i < json_object_array_length(drives) && i < MAX_DRIVES; i++) {
		struct json_object *v, *drive = json_object_array_get_idx(drives, i),
				       *o = json_object_new_object();
		char id[65] = "", path[1024] = "";
		bool read_only;

		ffs_api_copy_string(drive, "drive_id", id, sizeof(id));
		ffs_api_copy_string(drive, "path_on_host", path, sizeof(path));
		read_only =
			json_object_object_get_ex(drive, "is_read_only", &v) && json_object_get_boolean(v);
		*writable += !read_only;
		json_object_object_add(o, "id", json_object_new_string(id));
		json_object_object_add(o, "path", json_object_new_string(path));
		json_object_object_add(o, "read_only", json_object_new_boolean(read_only));
		json_object_array_add(list, o);
	}
	return list;
}

/* What is not as it was, as a sentence's part: the first drive that is another, is new, or has gone. */
static void say_difference(struct json_object *was, struct json_object *is, char text[300])
{
	size_t n = json_object_array_length(was), m = json_object_array_length(is);

	for (size_t i = 0; i < n || i < m; i++) {
		struct json_object *a = i < n ? json_object_array_get_idx(was, i) : NULL;
		struct json_object *b = i < m ? json_object_array_get_idx(is, i) : NULL;
		char id[65] = "", before[1024] = "", after[1024] = "";

		if (a && b && json_object_equal(a, b))
			continue;
		ffs_api_copy_string(a ? a : b, "id", id, sizeof(id));
		if (a)
			ffs_api_copy_string(a, "path", before, sizeof(before));
		if (b)
			ffs_api_copy_string(b, "path", after, sizeof(after));
		snprintf(text, 300, "%s%s%.100s%s%.100s", id, a ? " was " : " was not there, and is ",
			a ? before : after, a && b ? ", and is " : "",
			a && b ? after
			: a    ? ", and has gone"
			       : "");
		return;
	}
}

int ffs_api_look_at_drives(struct ffs_api *d, struct ffs_error *err)
{
	struct json_object *config = NULL, *drives;
	unsigned writable = 0;
	char text[300] = "";
	int r = d->drives ? ffs_api_get(d, "/vm/config", ffs_now_ns() + FFS_API_CALL_NS, &config, err) : 0;

	if (r || !config)
		return r;
	drives = ffs_api_list_drives(config, &writable);
	json_object_put(config);
	if (!json_object_equal(drives, d->drives)) {
		say_difference(d->drives, drives, text);
		if (d->has_disks)
			r = ffs_error_set(err, ENOTSUP,
				"the drives of process %d are not those that it had at attach (%s), where "
				"disks were named that are captured "
				"with each branch: detach it, and attach it again",
				(int)d->vmm.proc.pid, text);
		else
			ffs_log(FFS_LOG_INFO, "process %d: its drives were changed: %s", (int)d->vmm.proc.pid,
				text);
	}
	if (!r) {
		json_object_put(d->drives);
		d->drives = ffs_steal_ptr(&drives);
		d->writable_drives = writable;
	}
	json_object_put(drives);
	return r;
}
