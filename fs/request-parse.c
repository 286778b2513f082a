/* Owns the language of ctl: which objects there are, their keys and types.
 *
 * Pure, any thread. JSON comes from untrusted clients: every key is known and every type is checked before
 * anything is reserved. */
#include <errno.h>
#include <json-c/json.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#include "base/util.h"
#include "ctl.h"
#include "prune.h"

int ffs_request_known_keys(
	struct json_object *o, const char *what, const char *const *keys, struct ffs_error *err)
{
	json_object_object_foreach(o, key, value)
	{
		bool found = false;

		for (const char *const *k = keys; *k && !found; k++)
			found = strcmp(key, *k) == 0;
		if (!found)
			return ffs_error_set(err, EINVAL, "%s has no key '%.64s'", what, key);
		(void)value;
	}
	return 0;
}

int ffs_request_string(struct json_object *o, const char *what, const char *key, size_t max, const char **out,
	struct ffs_error *err)
{
	struct json_object *v;

	*out = NULL;
	if (!json_object_object_get_ex(o, key, &v) || !v)
		return 0;
	if (!json_object_is_type(v, json_type_string))
		return ffs_error_set(err, EINVAL, "%s: '%s' is a string", what, key);
	const char *s = json_object_get_string(v);
	size_t len = (size_t)json_object_get_string_len(v);

	if (len > max || strlen(s) != len)
		return ffs_error_set(
			err, EINVAL, "%s: '%s' is longer than %zu bytes or has a NUL in it", what, key, max);
	*out = s;
	return 0;
}

int ffs_request_bool(
	struct json_object *o, const char *what, const char *key, bool *out, struct ffs_error *err)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v) || !v)
		return 0;
	if (!json_object_is_type(v, json_type_boolean))
		return ffs_error_set(err, EINVAL, "%s: '%s' is true or false", what, key);
	*out = json_object_get_boolean(v);
	return 0;
}

static int get_name(
	struct json_object *o, const char *what, const char *noun, char out[80], struct ffs_error *err)
{
	const char *name;
	int r = ffs_request_string(o, what, "name", 255, &name, err);

	if (r < 0)
		return r;
	if (!name)
		return ffs_error_set(err, EINVAL, "%s: the key 'name' is missing", what);
	r = ffs_check_name(noun, name, err);
	if (r < 0)
		return r;
	snprintf(out, 80, "%s", name);
	return 0;
}

/* UID:GID[:rw] in decimal */
static int parse_owner(const char *s, struct ffs_request *req, struct ffs_error *err)
{
	unsigned long uid, gid;
	char *end;

	if (*s >= '0' && *s <= '9') {
		uid = strtoul(s, &end, 10);
		if (*end == ':' && end[1] >= '0' && end[1] <= '9') {
			gid = strtoul(end + 1, &end, 10);
			req->owner_writes = strcmp(end, ":rw") == 0;
			if ((!*end || req->owner_writes) && uid < UINT32_MAX && gid < UINT32_MAX) {
				req->has_owner = true;
				req->uid = (uid_t)uid;
				req->gid = (gid_t)gid;
				return 0;
			}
		}
	}
	return ffs_error_set(
		err, EINVAL, "attach: 'owner' is UID:GID or UID:GID:rw in numbers, not '%.64s'", s);
}

/* {"ID":"PATH",…}; the engine checks the names and looks at the files */
static int parse_disks(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	struct json_object *disks;

	if (!json_object_object_get_ex(o, "disks", &disks) || !disks)
		return 0;
	if (!json_object_is_type(disks, json_type_object) || json_object_object_length(disks) > FFS_MAX_DISKS)
		return ffs_error_set(err, EINVAL,
			"attach: 'disks' is an object {\"ID\":\"PATH\"} of at most %d", FFS_MAX_DISKS);
	req->disks = calloc(FFS_MAX_DISKS, sizeof(*req->disks));
	if (!req->disks)
		return ffs_error_set(err, ENOMEM, "no memory");
	json_object_object_foreach(disks, id, value)
	{
		const char *path;
		int r = ffs_request_string(disks, "attach: disks", id, PATH_MAX - 1, &path, err);

		if (r < 0)
			return r;
		if (!path || path[0] != '/')
			return ffs_error_set(
				err, EINVAL, "attach: the path of disk '%.64s' is an absolute one", id);
		struct ffs_disk_name *d = &req->disks[req->n_disks++];

		d->id = strdup(id);
		d->path = strdup(path);
		if (!d->id || !d->path)
			return ffs_error_set(err, ENOMEM, "no memory");
		(void)value;
	}
	return 0;
}

/* The control socket of the VM, by one of the keys that name its kind. */
static int parse_socket(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	struct {
		const char *key;
		char **out;
	} kinds[] = {{"qemu", &req->qemu}, {"coop", &req->coop}, {"firecracker", &req->firecracker}};
	unsigned given = 0;

	for (unsigned i = 0; i < FFS_ARRAY_LEN(kinds); i++) {
		const char *key = kinds[i].key, *path;
		int r = ffs_request_string(
			o, "attach", key, sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1, &path, err);

		if (r < 0)
			return r;
		if (!path)
			continue;
		if (path[0] != '/')
			return ffs_error_set(err, EINVAL,
				"attach: the daemon has another working directory: '%s' is an absolute path, "
				"not "
				"'%s'",
				key, path);
		if (given++)
			return ffs_error_set(err, EINVAL, "attach: a VM has one control socket, not two");
		*kinds[i].out = strdup(path);
		if (!*kinds[i].out)
			return ffs_error_set(err, ENOMEM, "no memory");
	}
	if (!given && !req->pid)
		return ffs_error_set(err, EINVAL,
			"attach: name the VM by 'qemu' (the path of its QMP socket), by 'firecracker' or "
			"'coop' (of its API "
			"socket) "
			"or by 'pid'");
	return 0;
}

static int parse_attach(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const keys[] = {"name", "qemu", "coop", "firecracker", "pid", "track", "force",
		"owner", "disks", "restored_from", NULL};
	const char *owner, *origin;
	struct json_object *pid;
	int r = ffs_request_known_keys(o, "attach", keys, err);

	if (!r)
		r = get_name(o, "attach", "sandbox", req->name, err);
	if (!r)
		r = ffs_request_string(o, "attach", "owner", 64, &owner, err);
	if (!r)
		r = ffs_request_string(o, "attach", "restored_from", sizeof(req->origin) - 1, &origin, err);
	if (!r && origin)
		snprintf(req->origin, sizeof(req->origin), "%s", origin);
	if (!r)
		r = ffs_request_bool(o, "attach", "track", &req->track, err);
	if (!r)
		r = ffs_request_bool(o, "attach", "force", &req->force, err);
	if (r < 0)
		return r;
	if (json_object_object_get_ex(o, "pid", &pid) && pid) {
		int64_t v = json_object_is_type(pid, json_type_int) ? json_object_get_int64(pid) : 0;

		if (v <= 0 || v > INT_MAX)
			return ffs_error_set(err, EINVAL, "attach: 'pid' is the number of a process");
		req->pid = (pid_t)v;
	}
	r = parse_socket(o, req, err);
	if (r < 0)
		return r;
	req->said = strdup(
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
	if (!req->said)
		return ffs_error_set(err, ENOMEM, "no memory");
	if (owner) {
		r = parse_owner(owner, req, err);
		if (r < 0)
			return r;
	}
	return parse_disks(o, req, err);
}

static int parse_store(
	struct json_object *o, const char *what, struct ffs_request *req, struct ffs_error *err)
{
	const char *v;
	int r = ffs_request_string(o, what, "store", 64, &v, err);

	if (r < 0 || !v)
		return r;
	if (!ffs_store_kind_parse(v, &req->store))
		return ffs_error_set(
			err, EINVAL, "%s: there is no store '%s' (memory, dense, packed)", what, v);
	req->has_store = true;
	return 0;
}

static int parse_mode(struct json_object *o, enum ffs_branch_mode *out, struct ffs_error *err)
{
	static const enum ffs_branch_mode modes[] = {FFS_BRANCH_LIVE, FFS_BRANCH_DIFF, FFS_BRANCH_FULL};
	const char *v;
	int r = ffs_request_string(o, "branch", "mode", 64, &v, err);

	if (r < 0 || !v)
		return r;
	for (unsigned i = 0; i < FFS_ARRAY_LEN(modes); i++)
		if (strcmp(v, ffs_branch_mode_name(modes[i])) == 0) {
			*out = modes[i];
			return 0;
		}
	return ffs_error_set(err, EINVAL, "branch: there is no mode '%s': live, diff or full", v);
}

/* After the mode. */
static int parse_rate(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, "max_rate", &v) || !v)
		return 0;
	if (!json_object_is_type(v, json_type_int) || json_object_get_int64(v) <= 0)
		return ffs_error_set(err, EINVAL, "branch: 'max_rate' is a number of bytes a second");
	if (req->mode != FFS_BRANCH_LIVE)
		return ffs_error_set(err, EINVAL,
			"branch: 'max_rate' goes with the mode live: in mode %s the guest waits for the copy",
			ffs_branch_mode_name(req->mode));
	req->max_rate = (uint64_t)json_object_get_int64(v);
	return 0;
}

static int parse_branch(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const keys[] = {
		"name", "mode", "store", "wait", "disks", "max_rate", "force", "key", NULL};
	const char *key = NULL;
	bool disks = true;
	int r = ffs_request_known_keys(o, "branch", keys, err);

	if (!r)
		r = ffs_request_string(o, "branch", "key", FFS_KEY_MAX, &key, err);
	if (!r && key && (!*key || json_object_object_get_ex(o, "name", NULL)))
		return ffs_error_set(err, EINVAL,
			"branch: 'key' is not empty and stands in place of 'name': a cached branch is named "
			"after its key");
	if (!r && !key)
		r = get_name(o, "branch", "branch", req->name, err);
	if (!r)
		r = parse_mode(o, &req->mode, err);
	if (!r)
		r = parse_rate(o, req, err);
	if (!r)
		r = parse_store(o, "branch", req, err);
	if (!r)
		r = ffs_request_bool(o, "branch", "wait", &req->wait, err);
	if (!r)
		r = ffs_request_bool(o, "branch", "disks", &disks, err);
	if (!r)
		r = ffs_request_bool(o, "branch", "force", &req->force, err);
	req->without_disks = !disks;
	if (!r && key && !(req->key = strdup(key)))
		r = ffs_error_set(err, ENOMEM, "no memory");
	return r;
}

static int parse_adopt(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const keys[] = {"name", "branch", NULL};
	const char *branch;
	int r = ffs_request_known_keys(o, "adopt", keys, err);

	if (!r)
		r = get_name(o, "adopt", "sandbox", req->name, err);
	if (!r)
		r = ffs_request_string(o, "adopt", "branch", 255, &branch, err);
	if (!r)
		r = ffs_check_name("branch", branch ? branch : "", err);
	if (!r)
		snprintf(req->branch, sizeof(req->branch), "%s", branch);
	return r;
}

static int parse_convert(struct json_object *o, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const keys[] = {"name", "store", NULL};
	int r = ffs_request_known_keys(o, "convert", keys, err);

	if (!r)
		r = get_name(o, "convert", "branch", req->name, err);
	if (!r)
		r = parse_store(o, "convert", req, err);
	if (!r && (!req->has_store || req->store == FFS_STORE_MEMORY))
		r = ffs_error_set(err, EINVAL, "convert: 'store' is dense or packed");
	return r;
}

int ffs_request_parse(
	struct json_object *o, bool root, struct ffs_span raw, struct ffs_request *req, struct ffs_error *err)
{
	static const char *const none[] = {NULL}, *const only_name[] = {"name", NULL};
	const char *verb = NULL;
	struct json_object *arg = NULL;
	int n = 0;

	json_object_object_foreach(o, key, value)
	{
		verb = key;
		arg = value;
		n++;
	}
	if (n != 1)
		return ffs_error_set(err, EINVAL, "a request has exactly one key: %s",
			root ? "attach, detach, adopt or shutdown" : "branch, fork or convert");
	if (!json_object_is_type(arg, json_type_object))
		return ffs_error_set(err, EINVAL, "'%.64s' takes an object", verb);
	if (root && strcmp(verb, "attach") == 0) {
		req->kind = FFS_REQ_ATTACH;
		return parse_attach(arg, req, err);
	}
	if (root && strcmp(verb, "detach") == 0) {
		int r = ffs_request_known_keys(arg, "detach", only_name, err);

		req->kind = FFS_REQ_DETACH;
		return r < 0 ? r : get_name(arg, "detach", "sandbox", req->name, err);
	}
	if (root && strcmp(verb, "shutdown") == 0) {
		req->kind = FFS_REQ_SHUTDOWN;
		return ffs_request_known_keys(arg, "shutdown", none, err);
	}
	if (root && strcmp(verb, "adopt") == 0) {
		req->kind = FFS_REQ_ADOPT;
		return parse_adopt(arg, req, err);
	}
	if (!root && strcmp(verb, "branch") == 0) {
		req->kind = FFS_REQ_BRANCH;
		return parse_branch(arg, req, err);
	}
	if (!root && strcmp(verb, "convert") == 0) {
		req->kind = FFS_REQ_CONVERT;
		return parse_convert(arg, req, err);
	}
	if (!root && strcmp(verb, "fork") == 0) {
		req->kind = FFS_REQ_FORK;
		return ffs_request_parse_fork(arg, raw, req, err);
	}
	return ffs_error_set(err, EINVAL, "there is no request '%.64s' here: %s", verb,
		root ? ".forkfs/ctl takes attach, detach, adopt, shutdown"
		     : "a sandbox's ctl takes branch, fork, convert");
}
