/* What a QEMU has of its host, for a child: consoles become sockets in its directory, networks an isolated one, disks
 * overlays of the branch's (restore-qemu-args.h).
 *
 * Any thread; pure logic, no locks. */
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/wire.h"
#include "base/util.h"
#include "restore-qemu-args.h"

/* ---- consoles ---- */

/* The port of the guest's agent: what goes over it is not to be kept. */
static bool is_agent(const struct ffs_qemu_args *a, const char *id)
{
	size_t n = json_object_array_length(a->command_line);
	char got[65];

	for (size_t i = 1; i < n; i++) {
		const char *value = json_object_get_string(json_object_array_get_idx(a->command_line, i));

		if (value && ffs_qemu_get(value, "driver", "driver", got, sizeof(got)) &&
			!strcmp(got, "virtserialport") &&
			ffs_qemu_get(value, "driver", "name", got, sizeof(got)) && !strcmp(got, AGENT_PORT) &&
			ffs_qemu_get(value, "driver", "chardev", got, sizeof(got)) && !strcmp(got, id))
			return true;
	}
	return false;
}

static void add_console(struct ffs_qemu_args *a, const char *id, bool mux)
{
	ffs_argv_add(&a->out, "-chardev");
	if (is_agent(a, id)) {
		ffs_argv_addf(&a->out, "socket,id=%s,path=%s.sock,server=on,wait=off", id, id);
		return;
	}
	ffs_argv_addf(&a->out, "socket,id=%s,path=%s.sock,server=on,wait=off,logfile=%s.log%s", id, id, id,
		mux ? ",mux=on" : "");
}

int ffs_qemu_chardev(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	char kind[64] = "", id[65] = "", mux[8] = "";

	ffs_qemu_get(value, "backend", "backend", kind, sizeof(kind));
	ffs_qemu_get(value, NULL, "id", id, sizeof(id));
	ffs_qemu_get(value, NULL, "mux", mux, sizeof(mux));
	if (!strcmp(id, "forkfs-control"))
		return 0; /* of a child of ours: each has its own */
	if (!ffs_qemu_is_id(id))
		return ffs_error_set(err, EINVAL,
			"-chardev %.100s of the branched VM has no name that can be used", value);
	if (ffs_qemu_user_has(a, "chardev", "id", id))
		return 0;
	if (!strcmp(kind, "null")) {
		ffs_argv_add(&a->out, "-chardev");
		ffs_argv_addf(&a->out, "null,id=%s", id);
	} else {
		add_console(a, id, !strcmp(mux, "on"));
	}
	return 0;
}

int ffs_qemu_serial(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	char id[32];

	if (!strcmp(value, "none") || !strcmp(value, "null")) {
		ffs_argv_add(&a->out, opt);
		ffs_argv_add(&a->out, value);
	} else if (!strncmp(value, "chardev:", 8)) {
		if (!ffs_qemu_is_id(value + 8))
			return ffs_error_set(
				err, EINVAL, "%s %.100s of the branched VM names no chardev", opt, value);
		ffs_argv_add(&a->out, opt);
		ffs_argv_add(&a->out, value);
	} else {
		snprintf(id, sizeof(id), "%.10s%u", opt + 1, a->n_serial);
		add_console(a, id, false);
		ffs_argv_add(&a->out, opt);
		ffs_argv_addf(&a->out, "chardev:%s", id);
	}
	a->n_serial += !strcmp(opt, "-serial");
	return 0;
}

/* ---- networks ---- */

/* Options of -netdev user that concern the guest's side alone. */
static bool inner_network(const char *key, const char *value)
{
	static const char *const keys[] = {"net", "host", "dhcpstart", "dns", "ipv4", "ipv6", "restrict",
		"hostname", "ipv6-prefix", "ipv6-prefixlen", "ipv6-host", "ipv6-dns", "domainname",
		"dnssearch"};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(keys); i++)
		if (!strcmp(key, keys[i]))
			return value[strspn(value, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234"
						   "56789.:/-")] == 0;
	return false;
}

int ffs_qemu_netdev(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	char kind[64] = "", id[65] = "", key[64], v[512], out[1024];
	const char *p = value;
	size_t n;
	bool dropped = false;

	ffs_qemu_get(value, "type", "type", kind, sizeof(kind));
	ffs_qemu_get(value, NULL, "id", id, sizeof(id));
	if (!ffs_qemu_is_id(id))
		return ffs_error_set(
			err, EINVAL, "-netdev %.100s of the branched VM has no name that can be used", value);
	if (ffs_qemu_user_has(a, "netdev", "id", id))
		return 0;
	ffs_argv_add(&a->out, opt);
	if (strcmp(kind, "user")) {
		ffs_argv_addf(&a->out, "user,id=%s,restrict=on", id);
		ffs_qemu_note(a,
			"network %s was %.20s of the parent's host: the child has an isolated one (give "
			"-netdev …,id=%s after --)",
			id, kind, id);
		return 0;
	}
	n = (size_t)snprintf(out, sizeof(out), "user,id=%s", id);
	while (ffs_qemu_next(&p, key, v)) {
		if (!key[0] || !strcmp(key, "id") || !strcmp(key, "type"))
			continue;
		if (inner_network(key, v) && n + strlen(key) + strlen(v) + 3 < sizeof(out))
			n += (size_t)snprintf(out + n, sizeof(out) - n, ",%s=%s", key, v);
		else
			dropped = true;
	}
	ffs_argv_add(&a->out, out);
	if (dropped)
		ffs_qemu_note(a,
			"network %s: what reaches to the parent's host (hostfwd and the like) was left out",
			id);
	return 0;
}

int ffs_qemu_nic(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	char kind[64] = "", model[64] = "", mac[64] = "";
	bool nic = !strcmp(opt, "-nic");

	ffs_qemu_get(value, "type", "type", kind, sizeof(kind));
	ffs_qemu_get(value, NULL, "model", model, sizeof(model));
	ffs_qemu_get(value, NULL, nic ? "mac" : "macaddr", mac, sizeof(mac));
	if ((model[0] && !ffs_qemu_is_id(model)) || mac[strspn(mac, "0123456789abcdefABCDEF:")])
		return ffs_error_set(err, EINVAL, "%s %.100s of the branched VM makes no sense", opt, value);
	ffs_argv_add(&a->out, opt);
	if (!strcmp(kind, "none")) {
		ffs_argv_add(&a->out, "none");
		return 0;
	}
	if (nic || !strcmp(kind, "nic"))
		ffs_argv_addf(&a->out, "%s%s%s%s%s", nic ? "user,restrict=on" : "nic",
			model[0] ? ",model=" : "", model, mac[0] ? (nic ? ",mac=" : ",macaddr=") : "", mac);
	else
		ffs_argv_add(&a->out, "user,restrict=on");
	if (strcmp(kind, "nic"))
		ffs_qemu_note(a, "%s %.60s is an isolated network in the child", opt, kind);
	return 0;
}

/* ---- disks ---- */

static const char *text_of(struct json_object *o, const char *key)
{
	struct json_object *v = NULL;

	return json_object_is_type(o, json_type_object) && json_object_object_get_ex(o, key, &v) &&
			       json_object_is_type(v, json_type_string)
		       ? json_object_get_string(v)
		       : "";
}

/* The branch's disk that has the content of that file of the parent; NULL: it has none. A relative name is found by
 * its end: the VMM's working directory is not known any more. */
static const char *disk_of(const struct ffs_qemu_args *a, const char *file)
{
	size_t n = json_object_is_type(a->disks, json_type_array) ? json_object_array_length(a->disks) : 0;

	for (size_t i = 0; i < n; i++) {
		struct json_object *d = json_object_array_get_idx(a->disks, i);
		const char *path = text_of(d, "path"), *id = text_of(d, "id");
		size_t whole = strlen(path), part = strlen(file);

		if (ffs_check_name("disk", id, NULL) < 0 || !part)
			continue;
		if (!strcmp(path, file) || (file[0] != '/' && whole > part && path[whole - part - 1] == '/' &&
						   !strcmp(path + whole - part, file)))
			return id;
	}
	return NULL;
}

/* Of a drive's options those that the guest sees. The rest (caching, locking, throttling) is the host's. */
static bool inner_drive(const char *key, const char *value)
{
	static const char *const keys[] = {"id", "if", "index", "bus", "unit", "media", "readonly", "werror",
		"rerror", "discard", "detect-zeroes"};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(keys); i++)
		if (!strcmp(key, keys[i]))
			return ffs_qemu_is_id(value);
	return false;
}

int ffs_qemu_drive(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	char file[512] = "", id[65] = "", format[32] = "raw", key[64], v[512], out[1024];
	const char *p = value, *disk;
	size_t n = 0;

	ffs_qemu_get(value, NULL, "id", id, sizeof(id));
	ffs_qemu_get(value, NULL, "file", file, sizeof(file));
	ffs_qemu_get(value, NULL, "format", format, sizeof(format));
	if (id[0] && ffs_qemu_user_has(a, "drive", "id", id))
		return 0;
	if (strcmp(format, "raw") && strcmp(format, "qcow2"))
		return ffs_error_set(
			err, ENOTSUP, "-drive %.100s of the branched VM: raw and qcow2 are restored", value);
	out[0] = 0;
	while (ffs_qemu_next(&p, key, v))
		if (inner_drive(key, v) && n + strlen(key) + strlen(v) + 3 < sizeof(out))
			n += (size_t)snprintf(out + n, sizeof(out) - n, "%s%s=%s", n ? "," : "", key, v);
	disk = disk_of(a, file);
	if (file[0] && !disk)
		return ffs_error_set(err, ENOTSUP,
			"drive %.60s of the branched VM (%.120s) is not among the disks of the branch: name "
			"it at attach (--disk "
			"ID=%.120s), or give the child another by -drive id=%.60s,… after --",
			id, file, file, id);
	ffs_argv_add(&a->out, opt);
	if (!disk) {
		ffs_argv_add(&a->out, out);
		return 0;
	}
	if (a->n_disks >= FFS_QEMU_MAX_DISKS)
		return ffs_error_set(
			err, ENOTSUP, "the branched VM has more than %d disks", FFS_QEMU_MAX_DISKS);
	/* never probed: who writes a raw disk could write the header of another format, which names other files */
	ffs_argv_addf(&a->out, "%s%sfile=/proc/self/fd/%u,format=%s,snapshot=on", out, n ? "," : "",
		FFS_CHILD_FIRST_DISK + a->n_disks, format);
	a->qcow2[a->n_disks] = !strcmp(format, "qcow2");
	snprintf(a->disk[a->n_disks++], sizeof(a->disk[0]), "%s", disk);
	return 0;
}
