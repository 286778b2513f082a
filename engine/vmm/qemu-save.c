/* How the vmstate leaves QEMU: staging before the pause, the save inside it, release after the resume.
 *
 * Two ways. `xen-save-devices-state` writes device state only, leaves run state and block devices alone, and
 * works for any kind of guest memory: the default. `migrate` with x-ignore-shared carries the other RAM
 * blocks too (VGA memory, pflash), but inactivates block devices and leaves `postmigrate`, so it is used only
 * where such blocks exist, all guest memory is shared, no disk is writable and the VM runs; anything else is
 * refused in prepare.
 *
 * Called by the driver's caller only, connection claimed. No locks. Stream format: QEMU's
 * docs/devel/migration.rst: "QEVM", then the version 3, big endian. */
#include "vmm/qemu.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"

#define FD_NAME "forkfs-vmstate"
#define VMSTATE_MAX                                                                                          \
	(1ull << 30) /* VGA memory and pflash included: beyond it something else is in the stream */

static uint64_t soon(void)
{
	return ffs_now_ns() + FFS_QEMU_CALL_NS;
}

/* ---- which way ---- */

static bool ends_with(const char *s, const char *end)
{
	size_t n = strlen(s), m = strlen(end);

	return n >= m && strcmp(s + n - m, end) == 0;
}

/* Firmware images, option ROMs and the tables that firmware reads at boot: the child has them from the same
 * files. */
static bool block_is_rebuilt(const char *name)
{
	return strncmp(name, "/rom@", 5) == 0 || ends_with(name, ".rom") || ends_with(name, ".bios");
}

static int refuse_migration(const char *block, const char *why, struct ffs_error *err)
{
	return ffs_error_set(err, ENOTSUP,
		"the VM has memory besides the guest's (%s) that only a migration stream carries, and %s: "
		"start it without that "
		"device (-vga none or -nodefaults for a VGA, -bios instead of pflash)",
		block, why);
}

static int check_disks(struct ffs_qemu *d, const char *block, struct ffs_error *err)
{
	struct json_object *ret = NULL, *inserted;
	char why[160];
	int r = ffs_qemu_call(d, "query-block", NULL, -1, soon(), &ret, err);

	if (!r && !json_object_is_type(ret, json_type_array))
		r = ffs_error_set(err, EPROTO, "QEMU answered query-block with something else than a list");
	for (size_t i = 0; !r && i < json_object_array_length(ret); i++) {
		struct json_object *dev = json_object_array_get_idx(ret, i);

		if (!json_object_object_get_ex(dev, "inserted", &inserted) ||
			ffs_json_bool(inserted, "ro", false))
			continue;
		const char *name = ffs_json_str(dev, "device");

		if (!name || !*name)
			name = ffs_json_str(dev, "qdev");
		snprintf(why, sizeof(why),
			"the disk %.80s is writable, which a migration would flush and let go",
			name ? name : "?");
		r = refuse_migration(block, why, err);
	}
	json_object_put(ret);
	return r;
}

/* From 8.1 on x-ignore-shared leaves out only what is backed by a named file (RAM_NAMED_FILE): a memfd would
 * be in the stream. */
static int check_named(
	struct ffs_qemu *d, const struct ffs_qemu_block *b, const char *block, struct ffs_error *err)
{
	if (d->version_number < 801)
		return 0;
	char path[80];
	struct json_object *args = json_object_new_object(), *ret = NULL;

	snprintf(path, sizeof(path), "%s%s", b->name[0] == '/' ? "" : "/objects/", b->name);
	json_object_object_add(args, "path", json_object_new_string(path));
	json_object_object_add(args, "property", json_object_new_string("type"));
	int r = ffs_qemu_call(d, "qom-get", args, -1, soon(), &ret, err);

	if (!r && (!json_object_is_type(ret, json_type_string) ||
			  strcmp(json_object_get_string(ret), "memory-backend-file") != 0))
		r = refuse_migration(
			block, "this QEMU leaves guest memory out of it only for memory-backend-file", err);
	json_object_put(args);
	json_object_put(ret);
	return r;
}

static int choose_way(struct ffs_qemu *d, bool was_running, enum ffs_qemu_way *way, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_qemu_blocks *b = malloc(sizeof(*b));

	if (!b)
		return ffs_error_set(err, ENOMEM, "no memory for the list of RAM blocks");
	int r = ffs_qemu_read_blocks(d, b, err);
	const char *travels = NULL;

	for (unsigned i = 0; !r && i < b->n && !travels; i++)
		if (!b->block[i].guest && !block_is_rebuilt(b->block[i].name))
			travels = b->block[i].name;
	*way = FFS_QEMU_XEN_SAVE;
	if (r || !travels)
		return r;
	*way = FFS_QEMU_MIGRATE;
	if (!was_running)
		return refuse_migration(travels, "the VM is paused, so that it could be done only once", err);
	for (unsigned i = 0; i < b->n; i++) {
		if (b->block[i].guest && !b->block[i].shared)
			return refuse_migration(
				travels, "guest memory that is not shared would be in it", err);
		if (b->block[i].guest && (r = check_named(d, &b->block[i], travels, err)) != 0)
			return r;
	}
	return check_disks(d, travels, err);
}

/* ---- staging ---- */

/* The number of our set, always the same: a daemon that dies before it removed the set leaves it behind (QEMU
 * keeps it as long as another monitor is connected), and the next branch finds it by this. Far from the small
 * numbers that QEMU gives out and people write. */
#define FDSET_ID 1718580083

static int stage_xen(struct ffs_qemu *d, int fd, struct ffs_error *err)
{
	struct json_object *ret = NULL, *args = json_object_new_object();
	struct ffs_error none = {0};

	json_object_object_add(args, "fdset-id", json_object_new_int64(FDSET_ID));
	int r = ffs_qemu_call(d, "remove-fd", args, -1, soon(), NULL, &none);

	/* an error says that there was none; only a connection that is lost is one of ours */
	if (r == -ESRCH || r == -ETIMEDOUT)
		ffs_error_set(err, none.code, "%s", none.text);
	else
		r = ffs_qemu_call(d, "add-fd", args, fd, soon(), &ret, err);
	json_object_put(args);
	if (r)
		return r;
	int64_t id = ffs_json_int(ret, "fdset-id", -1);

	json_object_put(ret);
	if (id < 0)
		return ffs_error_set(err, EPROTO, "QEMU answered add-fd without the number of a set");
	d->stage.fdset = id;
	return 0;
}

static int set_caps(struct ffs_qemu *d, bool ignore_shared, bool events, struct ffs_error *err)
{
	char text[200];

	snprintf(text, sizeof(text),
		"{\"capabilities\":[{\"capability\":\"x-ignore-shared\",\"state\":%s},{\"capability\":"
		"\"events\",\"state\":%s}]}",
		ignore_shared ? "true" : "false", events ? "true" : "false");
	struct json_object *args = json_tokener_parse(text);
	int r = ffs_qemu_call(d, "migrate-set-capabilities", args, -1, soon(), NULL, err);

	json_object_put(args);
	return r;
}

static int set_bandwidth(struct ffs_qemu *d, int64_t bytes, struct ffs_error *err)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "max-bandwidth", json_object_new_int64(bytes));
	int r = ffs_qemu_call(d, "migrate-set-parameters", args, -1, soon(), NULL, err);

	json_object_put(args);
	return r;
}

static int read_caps(struct ffs_qemu *d, struct ffs_error *err)
{
	struct json_object *ret = NULL;
	int r = ffs_qemu_call(d, "query-migrate-capabilities", NULL, -1, soon(), &ret, err);

	for (size_t i = 0;
		!r && json_object_is_type(ret, json_type_array) && i < json_object_array_length(ret); i++) {
		struct json_object *c = json_object_array_get_idx(ret, i);
		const char *name = ffs_json_str(c, "capability");

		if (name && strcmp(name, "x-ignore-shared") == 0)
			d->stage.had_ignore_shared = ffs_json_bool(c, "state", false);
		else if (name && strcmp(name, "events") == 0)
			d->stage.had_events = ffs_json_bool(c, "state", false);
		else if (name && ffs_json_bool(c, "state", false) && strcmp(name, "return-path") != 0)
			r = ffs_error_set(err, ENOTSUP,
				"the VM's migration capability %.40s is on, which a branch of a VM with a "
				"VGA or pflash does not "
				"go with: switch it off (migrate-set-capabilities)",
				name);
	}
	json_object_put(ret);
	return r;
}

static int stage_migration(struct ffs_qemu *d, int fd, struct ffs_error *err)
{
	struct json_object *ret = NULL;
	int r = read_caps(d, err);

	if (!r)
		r = ffs_qemu_call(d, "query-migrate-parameters", NULL, -1, soon(), &ret, err);
	int64_t bandwidth = ffs_json_int(ret, "max-bandwidth", -1);

	json_object_put(ret);
	if (r)
		return r;
	d->stage.caps_changed = true;
	r = set_caps(d, true, true, err);
	/* the default, 128 MiB/s in slices of 100 ms, would stretch the pause when the VGA memory is full */
	if (!r && bandwidth >= 0) {
		d->stage.old_bandwidth = bandwidth;
		r = set_bandwidth(d, 1ll << 40, err);
	}
	if (r)
		return r;
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "fdname", json_object_new_string(FD_NAME));
	r = ffs_qemu_call(d, "getfd", args, fd, soon(), NULL, err);
	json_object_put(args);
	d->stage.fd_named = r == 0;
	return r;
}

int ffs_qemu_stage(struct ffs_qemu *d, int vmstate_fd, bool was_running, struct ffs_error *err)
{
	enum ffs_qemu_way way = FFS_QEMU_XEN_SAVE;
	int r = FFS_FAULT("vmstate-stage");

	if (r)
		return ffs_error_set(err, -r, "fault point vmstate-stage");
	r = choose_way(d, was_running, &way, err);
	if (r)
		return r;
	atomic_store(&d->way, way);
	d->stage = (struct ffs_qemu_stage){
		.active = true, .way = way, .vmstate_fd = vmstate_fd, .fdset = -1, .old_bandwidth = -1};
	/* A description of its own: QEMU looks in the fd set for one that is write-only, and its file
	 * position is not the caller's. */
	char path[40];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", vmstate_fd);
	_cleanup_close_ int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return ffs_error_errno(err, errno, "open the vmstate's memfd write-only");
	return way == FFS_QEMU_MIGRATE ? stage_migration(d, fd, err) : stage_xen(d, fd, err);
}

void ffs_qemu_unstage(struct ffs_qemu *d)
{
	struct ffs_error err = {0};
	struct json_object *args;
	int r = 0;

	if (!d->stage.active)
		return;
	d->stage.active = false;
	if (!d->q)
		return; /* QEMU drops a monitor's descriptors when it goes */
	if (d->stage.fdset >= 0) {
		args = json_object_new_object();
		json_object_object_add(args, "fdset-id", json_object_new_int64(d->stage.fdset));
		r = ffs_qemu_call(d, "remove-fd", args, -1, soon(), NULL, &err);
		json_object_put(args);
	}
	if (d->stage.fd_named) {
		args = json_object_new_object();
		json_object_object_add(args, "fdname", json_object_new_string(FD_NAME));
		r = ffs_qemu_call(d, "closefd", args, -1, soon(), NULL, &err);
		json_object_put(args);
	}
	if (d->stage.caps_changed)
		r = set_caps(d, d->stage.had_ignore_shared, d->stage.had_events, &err);
	if (d->stage.old_bandwidth >= 0)
		r = set_bandwidth(d, d->stage.old_bandwidth, &err);
	if (r && r != -ESRCH)
		ffs_log(FFS_LOG_WARN,
			"QEMU %d keeps something of a branch until forkfs lets go of its monitor: %s",
			(int)d->vmm.proc.pid, err.text);
}

/* ---- inside the pause ---- */

static bool migration_ended(void *arg)
{
	struct ffs_qemu *d = arg;

	return strcmp(d->migration, "completed") == 0 || strcmp(d->migration, "failed") == 0 ||
	       strcmp(d->migration, "cancelled") == 0;
}

static int save_migration(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "uri", json_object_new_string("fd:" FD_NAME));
	d->migration[0] = '\0';
	d->stage.migrate_sent = true;
	int r = ffs_qemu_call(d, "migrate", args, -1, deadline_ns, NULL, err);

	json_object_put(args);
	if (r)
		return r;
	d->stage.fd_named = false; /* migrate took it */
	r = ffs_qmp_wait(d->q, migration_ended, d, deadline_ns);
	if (r)
		return ffs_error_set(err, -r, "QEMU %d: the migration into the vmstate did not end (%s)",
			(int)d->vmm.proc.pid, d->migration[0] ? d->migration : "no event");
	d->stage.migrate_sent = false;
	if (strcmp(d->migration, "completed") != 0)
		return ffs_error_set(err, EIO, "QEMU %d: the migration into the vmstate %s",
			(int)d->vmm.proc.pid, d->migration);
	return 0;
}

static int save_xen(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err)
{
	struct json_object *args = json_object_new_object();
	char path[48];

	snprintf(path, sizeof(path), "/dev/fdset/%lld", (long long)d->stage.fdset);
	json_object_object_add(args, "filename", json_object_new_string(path));
	/* live, the default, makes QEMU let go of the disks of a stopped VM */
	json_object_object_add(args, "live", json_object_new_boolean(false));
	int r = ffs_qemu_call(d, "xen-save-devices-state", args, -1, deadline_ns, NULL, err);

	json_object_put(args);
	return r;
}

/* What the VMM wrote is checked like anything else that it says. */
static int check_stream(struct ffs_qemu *d, struct ffs_error *err)
{
	static const unsigned char magic[8] = {'Q', 'E', 'V', 'M', 0, 0, 0, 3};
	unsigned char head[8];
	struct stat st;

	if (fstat(d->stage.vmstate_fd, &st) < 0)
		return ffs_error_errno(err, errno, "the vmstate's memfd");
	ssize_t n = ffs_pread_full(d->stage.vmstate_fd, head, sizeof(head), 0);

	if (n != sizeof(head) || memcmp(head, magic, sizeof(magic)) != 0)
		return ffs_error_set(err, EIO, "QEMU %d wrote %lld bytes that are no vmstate",
			(int)d->vmm.proc.pid, (long long)st.st_size);
	if ((uint64_t)st.st_size > VMSTATE_MAX)
		return ffs_error_set(err, EFBIG,
			"QEMU %d wrote a vmstate of %lld MiB: guest memory must be in it",
			(int)d->vmm.proc.pid, (long long)st.st_size >> 20);
	return 0;
}

int ffs_qemu_save(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);
	int r = FFS_FAULT("vmstate-save");

	if (r)
		return ffs_error_set(err, -r, "fault point vmstate-save");
	if (!d->stage.active || !d->q)
		return ffs_error_set(err, ENOTCONN, "no vmstate is staged in QEMU %d", (int)vmm->proc.pid);
	ffs_qmp_claim(d->q);
	r = d->stage.way == FFS_QEMU_MIGRATE ? save_migration(d, deadline_ns, err)
					     : save_xen(d, deadline_ns, err);
	if (!r && atomic_load(&d->state) == FFS_RUN_RUNNING) {
		vmm->resumed_by_others = true;
		r = ffs_error_set(
			err, EAGAIN, "somebody else let the VM run in the middle of the branch: try again");
	}
	ffs_qmp_release(d->q);
	if (!r)
		r = check_stream(d, err);
	if (!r && (r = FFS_FAULT("vmstate-saved")) != 0)
		ffs_error_set(err, -r, "fault point vmstate-saved");
	return r;
}

void ffs_qemu_cancel_migration(struct ffs_qemu *d, uint64_t deadline_ns)
{
	struct ffs_error err = {0};

	if (!d->stage.active || !d->stage.migrate_sent || migration_ended(d))
		return;
	int r = ffs_qemu_call(d, "migrate_cancel", NULL, -1, deadline_ns, NULL, &err);

	/* when it had not begun there is no event: a second is what the slowest cancel took, and cont is
	 * tried anyhow */
	uint64_t limit = ffs_now_ns() + FFS_NS_PER_S;

	if (!r && d->migration[0])
		r = ffs_qmp_wait(d->q, migration_ended, d, limit < deadline_ns ? limit : deadline_ns);
	if (r)
		ffs_log(FFS_LOG_WARN, "QEMU %d: a migration that failed was not cancelled: %s",
			(int)d->vmm.proc.pid, err.text);
	d->stage.migrate_sent = false;
}
