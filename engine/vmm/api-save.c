/* The vmstate by way of a file in the directory of the API socket: for VMMs that save device state alone, and
 * for a Firecracker that was found paused. Owns nothing but the request. Threads: as api.c. */
#include "vmm/api.h"

#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define VMSTATE_MAX (256ll << 20)

int ffs_api_create(struct ffs_api *d, const char *type, const char *memory, struct ffs_http_wait *wait,
	uint64_t deadline_ns, struct ffs_http_answer *out, struct ffs_error *err)
{
	char seen[256], path[300];
	struct json_object *o = json_object_new_object();

	ffs_api_place_seen(&d->place, FFS_API_STATE_FILE, seen);
	snprintf(path, sizeof(path), "%s%s", seen, memory);
	json_object_object_add(o, "snapshot_type", json_object_new_string(type));
	json_object_object_add(o, "snapshot_path", json_object_new_string(seen));
	json_object_object_add(o, "mem_file_path", json_object_new_string(path));
	int r = ffs_api_call(d, "PUT", "/snapshot/create",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE),
		wait, deadline_ns, out, err);

	json_object_put(o);
	return r;
}

static int copy_out(struct ffs_api *d, struct ffs_error *err)
{
	_cleanup_close_ int fd = -1;
	char buf[16384];
	struct stat st;
	int r = ffs_api_place_open_file(&d->place, FFS_API_STATE_FILE, &fd, err);

	if (r)
		return r;
	if (fstat(fd, &st) < 0 || st.st_size > VMSTATE_MAX)
		return ffs_error_set(err, EFBIG, "the vmstate that the VMM wrote is larger than %lld MiB",
			VMSTATE_MAX >> 20);
	for (uint64_t off = 0; off < (uint64_t)st.st_size;) {
		ssize_t n = ffs_pread_full(fd, buf, sizeof(buf), off);

		if (n > 0)
			n = ffs_pwrite_full(d->vmstate_fd, buf, (size_t)n, off);
		if (n <= 0)
			return ffs_error_errno(err, n < 0 ? (int)-n : EIO, "copy the vmstate");
		off += (uint64_t)n;
	}
	return 0;
}

int ffs_api_save_file(struct ffs_api *d, const char *type, const char *memory, int status, const char *fault,
	uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_http_answer a = {0};
	char text[300];
	int r = ffs_api_create(d, type, memory, NULL, deadline_ns, &a, err);

	if (!r && (a.status != status || (fault && !strstr(ffs_api_fault(&a, text), fault))))
		r = ffs_error_set(
			err, EIO, "the VMM did not save its device state: %s", ffs_api_fault(&a, text));
	ffs_http_answer_free(&a);
	return r ? r : copy_out(d, err);
}
