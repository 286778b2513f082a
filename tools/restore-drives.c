/* Drives and networks of Firecracker's children. A device state names the parent's files; Firecracker opens them when it
 * loads the branch, and is told of the child's own before the guest runs: until then it writes nothing. In a jail the child's
 * own have the names of the parent's.
 *
 * ffs_drives_plan() is of the main thread, the rest of each child's; no locks. What waits is the copying of disks. */
#include "restore-drives.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"
#include "restore-api.h"

#define STEP (64u << 10)

/* ---- plan ---- */

/* What the caller has said of a drive or an interface; NULL: nothing. */
static const char *said_of(const struct ffs_words *words, const char *id)
{
	for (unsigned i = 0; i < words->n; i++) {
		const char *value = NULL;
		char name[65];

		if (!ffs_disk_parse(words->word[i], name, &value, NULL) && !strcmp(name, id))
			return value;
	}
	return NULL;
}

static bool is_path_of_drive(struct ffs_restore *r, const char *path)
{
	struct json_object *drives = ffs_json_get(r->vmm, "drives");

	for (size_t i = 0; i < json_object_array_length(drives); i++)
		if (!strcmp(ffs_json_string(json_object_array_get_idx(drives, i), "path"), path))
			return true;
	return false;
}

/* The branch's disk that has the content of that file. A VMM in a jail knows it by the end of its name. */
static const char *disk_of(struct ffs_restore *r, const char *file)
{
	struct json_object *disks = ffs_json_get(r->status, "disks");
	size_t n = json_object_is_type(disks, json_type_array) ? json_object_array_length(disks) : 0,
	       part = strlen(file);
	const char *found = NULL;
	unsigned ends = 0;

	for (size_t i = 0; part && i < n; i++) {
		struct json_object *d = json_object_array_get_idx(disks, i);
		const char *path = ffs_json_string(d, "path"), *id = ffs_json_string(d, "id");
		size_t whole = strlen(path);

		if (ffs_check_name("disk", id, NULL) < 0)
			continue;
		if (!strcmp(path, file))
			return id;
		if (whole > part && (file[0] == '/' || path[whole - part - 1] == '/') &&
			!strcmp(path + whole - part, file) && !is_path_of_drive(r, path)) {
			found = id;
			ends++;
		}
	}
	return ends == 1 ? found : NULL;
}

static int plan_drive(
	struct ffs_restore *r, struct json_object *drive, struct ffs_drives *d, struct ffs_error *err)
{
	const char *id = ffs_json_string(drive, "id"), *path = ffs_json_string(drive, "path");
	const char *pattern = said_of(&r->drives, id), *disk;
	struct ffs_drive *out = &d->drive[d->n];

	out->read_only = ffs_cli_json_bool(drive, "read_only");
	/* a reading child needs no file of its own */
	if (!pattern && out->read_only && !d->jailed)
		return 0;
	if (ffs_check_name("drive", id, err) < 0)
		return -EINVAL;
	if (d->n == FFS_DRIVES_MAX)
		return ffs_error_set(
			err, ENOTSUP, "the branched VM has more than %d writable drives", FFS_DRIVES_MAX);
	disk = pattern ? "" : disk_of(r, path);
	if (!disk && out->read_only)
		return ffs_error_set(err, ENOTSUP,
			"drive %s (%.120s) of the VM of branch %s is not among the disks of the branch, and "
			"no other file is in a jail: name "
			"it at attach (--disk %s=%.120s), or give the child one by --drive %s=PATH",
			id, path, r->target.branch, id, path, id);
	if (!disk)
		return ffs_error_set(err, ENOTSUP,
			"the VM of branch %s writes its drive %s (%.120s), which is not among the disks of "
			"the branch: name it at attach "
			"(--disk %s=%.120s), or give the child another by --drive %s=PATH",
			r->target.branch, id, path, id, path, id);
	if (d->jailed && !ffs_jail_is_name(path))
		return ffs_error_set(err, EINVAL,
			"drive %s of branch %s has a name that no file of a jail can have: %.120s", id,
			r->target.branch, path);
	out->path = path;
	snprintf(out->id, sizeof(out->id), "%s", id);
	snprintf(out->disk, sizeof(out->disk), "%s", disk);
	out->pattern = pattern;
	d->n++;
	return 0;
}

static int check_words(const struct ffs_words *words, const char *option, struct ffs_error *err)
{
	for (unsigned i = 0; i < words->n; i++) {
		const char *value = NULL;
		char name[65];

		if (ffs_disk_parse(words->word[i], name, &value, NULL) < 0)
			return ffs_error_set(
				err, EINVAL, "--%s is ID=VALUE, not '%.100s'", option, words->word[i]);
	}
	return 0;
}

/* Every --drive is of a drive that there is. */
static int check_used(struct ffs_restore *r, const struct ffs_drives *d, struct ffs_error *err)
{
	for (unsigned i = 0; i < r->drives.n; i++) {
		const char *value = NULL;
		char name[65];
		bool used = false;

		if (ffs_disk_parse(r->drives.word[i], name, &value, err) < 0)
			return -EINVAL;
		for (unsigned k = 0; k < d->n; k++)
			used = used || !strcmp(d->drive[k].id, name);
		if (!used)
			return ffs_error_set(err, EINVAL, "--drive %s: the VM of branch %s has no such drive",
				name, r->target.branch);
	}
	return 0;
}

int ffs_drives_plan(struct ffs_restore *r, struct ffs_drives *d, struct ffs_error *err)
{
	struct json_object *drives = ffs_json_get(r->vmm, "drives");
	size_t n = json_object_is_type(drives, json_type_array) ? json_object_array_length(drives) : 0;
	uint64_t writable = ffs_json_u64(r->vmm, "writable_drives"), seen = 0;
	int got = check_words(&r->drives, "drive", err);

	if (!got)
		got = check_words(&r->nets, "net", err);
	for (size_t i = 0; !got && i < n; i++) {
		struct json_object *drive = json_object_array_get_idx(drives, i);

		seen += !ffs_cli_json_bool(drive, "read_only");
		got = plan_drive(r, drive, d, err);
	}
	/* of an older forkfs, or more than it lists */
	if (!got && seen != writable)
		got = ffs_error_set(err, ENOTSUP,
			"the VM of branch %s has %llu writable drives, of which its manifest names %llu: "
			"load the branch by hand",
			r->target.branch, (unsigned long long)writable, (unsigned long long)seen);
	return got ? got : check_used(r, d, err);
}

/* ---- a child's own ---- */

static int copy_data(int from, int to, uint64_t size, const char *what, struct ffs_error *err)
{
	char file[100], read[120], write[200];
	const struct ffs_sparse_words words = {file, read, write};

	snprintf(file, sizeof(file), "a copy of disk %s", what);
	snprintf(read, sizeof(read), "disk %s of the branch cannot be read", what);
	snprintf(write, sizeof(write),
		"a copy of disk %s cannot be written (another place for it by --dir, another disk by "
		"--drive)",
		what);
	return ffs_copy_sparse(from, to, size, STEP, &words, err);
}

static void name_copy(const struct ffs_drive *d, const struct ffs_child *c, char path[200])
{
	snprintf(path, 200, "%s/drive-%s", c->dir, d->id);
}

int ffs_drives_copy(
	struct ffs_restore *r, const struct ffs_drives *d, struct ffs_child *c, struct ffs_error *err)
{
	int got = 0;

	for (unsigned i = 0; c->dir[0] && !got && i < d->n; i++) {
		_cleanup_close_ int from = -1, to = -1;
		char path[200], file[80];
		struct stat st;

		if (d->jailed)
			got = ffs_jail_create(c, d->drive[i].path, d->drive[i].read_only, &to, err);
		/* of the caller's own there is the place only */
		if (got < 0 || d->drive[i].pattern)
			continue;
		snprintf(file, sizeof(file), "disks/%s", d->drive[i].disk);
		name_copy(&d->drive[i], c, path);
		from = ffs_restore_open(r, file, err);
		if (from < 0)
			return from;
		if (!d->jailed)
			to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
		if (to < 0 || fstat(from, &st) < 0)
			return ffs_error_errno(err, errno, "%s", path);
		got = copy_data(from, to, (uint64_t)st.st_size, d->drive[i].disk, err);
	}
	return got;
}

/* "{number}" and "{dir}" of what the caller has said; the caller frees it. */
static char *expand(const char *pattern, const struct ffs_child *c)
{
	char number[16];
	const struct ffs_restore_word words[] = {{"dir", c->dir}, {"number", number}};

	snprintf(number, sizeof(number), "%u", c->number);
	return ffs_restore_expand(pattern, words, FFS_ARRAY_LEN(words));
}

int ffs_drives_bind(const struct ffs_drives *d, const struct ffs_child *c, struct ffs_jail_bind *bind,
	unsigned *n, struct ffs_error *err)
{
	for (unsigned i = 0; i < d->n; i++) {
		char *file = d->drive[i].pattern ? expand(d->drive[i].pattern, c) : NULL;

		if (!d->drive[i].pattern)
			continue;
		if (!file)
			return ffs_error_set(err, ENOMEM, "no memory for a path");
		bind[(*n)++] = (struct ffs_jail_bind){.ns = -1,
			.fd = -1,
			.file = file,
			.inside = d->drive[i].path,
			.read_only = d->drive[i].read_only};
	}
	return 0;
}

int ffs_drives_patch(
	struct ffs_restore *r, const struct ffs_drives *d, struct ffs_child *c, struct ffs_error *err)
{
	int got = 0;

	for (unsigned i = 0; !d->jailed && !got && i < d->n; i++) {
		const struct ffs_drive *drive = &d->drive[i];
		struct json_object *body = json_object_new_object();
		_cleanup_free_ char *given = drive->pattern ? expand(drive->pattern, c) : NULL;
		char path[200], request[80];

		name_copy(drive, c, path);
		snprintf(request, sizeof(request), "/drives/%s", drive->id);
		json_object_object_add(body, "drive_id", json_object_new_string(drive->id));
		json_object_object_add(body, "path_on_host", json_object_new_string(given ? given : path));
		got = drive->pattern && !given
			      ? ffs_error_set(err, ENOMEM, "no memory for a path")
			      : ffs_restore_api_call(c, "PATCH", request,
					json_object_to_json_string_ext(body,
						JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE),
					NULL, err);
		json_object_put(body);
	}
	return got;
}

int ffs_nets_add(const struct ffs_restore *r, const struct ffs_child *c, struct json_object *body,
	struct ffs_error *err)
{
	struct json_object *list;

	/* Firecracker before 1.12 does not know the word */
	if (!r->nets.n)
		return 0;
	list = json_object_new_array();
	json_object_object_add(body, "network_overrides", list);
	for (unsigned i = 0; i < r->nets.n; i++) {
		struct json_object *o = json_object_new_object();
		const char *pattern = NULL;
		char name[65];
		_cleanup_free_ char *device = NULL;

		json_object_array_add(list, o);
		if (ffs_disk_parse(r->nets.word[i], name, &pattern, err) < 0)
			return -EINVAL;
		device = expand(pattern, c);
		if (!device)
			return ffs_error_set(err, ENOMEM, "no memory for a name");
		json_object_object_add(o, "iface_id", json_object_new_string(name));
		json_object_object_add(o, "host_dev_name", json_object_new_string(device));
	}
	return 0;
}
