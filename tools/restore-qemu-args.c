/* The command line of a child of QEMU: the table of options, and those that describe the machine
 * (restore-qemu-args.h). Those that belong to the host are in restore-qemu-host.c.
 *
 * Any thread; pure logic, no locks. An option that is not in the table is refused, not passed on. */
#include "restore-qemu-args.h"

#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

/* ---- QEMU's lists of options ---- */

bool ffs_qemu_next(const char **opts, char key[64], char value[512])
{
	char piece[600];
	const char *p = *opts;
	size_t n = 0;
	char *eq;

	if (!*p)
		return false;
	for (; *p && !(p[0] == ',' && p[1] != ','); p++) {
		if (n + 2 >= sizeof(piece))
			return false;
		piece[n++] = *p;
		if (p[0] == ',')
			piece[n++] = *++p;
	}
	piece[n] = 0;
	*opts = *p ? p + 1 : p;
	eq = strchr(piece, '=');
	if ((eq ? (size_t)(eq - piece) : 0) >= 64 || strlen(eq ? eq + 1 : piece) >= 512)
		return false;
	snprintf(key, 64, "%.*s", eq ? (int)(eq - piece) : 0, piece);
	snprintf(value, 512, "%.511s", eq ? eq + 1 : piece);
	return true;
}

bool ffs_qemu_get(const char *opts, const char *first, const char *key, char *out, size_t size)
{
	char k[64], v[512];

	for (bool begin = true; ffs_qemu_next(&opts, k, v); begin = false) {
		const char *name = k[0] ? k : begin ? first : NULL;
		size_t n = 0;

		if (!name || strcmp(name, key))
			continue;
		for (const char *p = v; *p && n + 1 < size; p++) {
			p += p[0] == ',' && p[1] == ',';
			out[n++] = *p;
		}
		out[n] = 0;
		return true;
	}
	return false;
}

bool ffs_qemu_is_id(const char *id)
{
	size_t n = strlen(id);

	return n && n <= 40 && id[0] != '.' && id[0] != '-' &&
	       strspn(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == n;
}

/* Names no file of the host, and cannot be taken for an option. */
static bool is_plain(const char *value)
{
	for (const unsigned char *p = (const unsigned char *)value; *p; p++)
		if (*p < 0x20 || *p == 0x7f || *p == '/' || *p == '\\')
			return false;
	return value[0] != '-' && value[0] != '{';
}

void ffs_qemu_note(struct ffs_qemu_args *a, const char *fmt, ...)
{
	char text[400];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (a->notes)
		json_object_array_add(a->notes, json_object_new_string(text));
}

static const char *option_name(const char *word)
{
	return word[0] != '-' ? NULL : word[1] == '-' ? word + 2 : word + 1;
}

bool ffs_qemu_user_has(const struct ffs_qemu_args *a, const char *option, const char *key, const char *id)
{
	char value[512];

	for (unsigned i = 0; i + 1 < a->n_user; i++) {
		const char *name = option_name(a->user[i]);

		if (name && !strcmp(name, option) &&
			ffs_qemu_get(a->user[i + 1], NULL, key, value, sizeof(value)) && !strcmp(value, id))
			return true;
	}
	return false;
}

static void add(struct ffs_qemu_args *a, const char *opt, const char *value)
{
	ffs_argv_add(&a->out, opt);
	if (value)
		ffs_argv_add(&a->out, value);
}

/* ---- the machine ---- */

static int refuse(struct ffs_error *err, const char *opt, const char *value, const char *why)
{
	return ffs_error_set(err, EPERM, "%s %.120s of the branched VM %s", opt, value ? value : "", why);
}

static int keep(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	if (value && !a->trust && !is_plain(value))
		return refuse(err, opt, value, "may name a file of this host: taken only with --trust");
	add(a, opt, value);
	return 0;
}

static int flag(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	add(a, opt, NULL);
	return 0;
}

static int nodefaults(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	a->nodefaults = true;
	add(a, opt, NULL);
	return 0;
}

static int nographic(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	a->nographic = true;
	return 0;
}

/* The child has its own: said by ffs_qemu_args_make() and restore-qemu.c. */
static int own(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	return 0;
}

/* Of no importance to the machine as the guest has it in memory. */
static int host(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	if (a->trust) {
		add(a, opt, value);
		return 0;
	}
	ffs_qemu_note(a, "%s %.200s was left out: it is of the parent's host", opt, value ? value : "");
	return 0;
}

/* A file without a directory is one of QEMU's own. */
static int bios(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	return is_plain(value) ? keep(a, opt, value, err) : host(a, opt, value, err);
}

static int object(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	static const char *const harmless[] = {"iothread", "rng-builtin", "throttle-group"};
	char type[64] = "", id[65] = "", name[64] = "";

	ffs_qemu_get(value, "qom-type", "qom-type", type, sizeof(type));
	ffs_qemu_get(value, NULL, "id", id, sizeof(id));
	if (!strncmp(type, "memory-backend-", 15)) {
		if (!a->memory_id[0] || strcmp(id, a->memory_id))
			return ffs_error_set(err, ENOTSUP,
				"the branched VM has its memory in several pieces (%.60s): restore starts "
				"QEMUs with one, the machine's "
				"memory-backend",
				id);
		return 0; /* the child's own is in its place */
	}
	for (unsigned i = 0; i < FFS_ARRAY_LEN(harmless); i++)
		if (!strcmp(type, harmless[i]))
			return keep(a, opt, value, err);
	if (!strcmp(type, "rng-random") && ffs_qemu_is_id(id) &&
		(!ffs_qemu_get(value, NULL, "filename", name, sizeof(name)) ||
			!strcmp(name, "/dev/urandom") || !strcmp(name, "/dev/random"))) {
		add(a, opt, value);
		return 0;
	}
	if (a->trust)
		return keep(a, opt, value, err);
	return refuse(err, opt, value, "is an object that restore does not know: taken only with --trust");
}

/* Models that have nothing of the host but what other options give them. */
static bool known_device(const char *model)
{
	static const char *const models[] = {"virtserialport", "virtconsole", "vmgenid", "isa-serial",
		"pci-serial", "isa-debugcon", "isa-debug-exit", "pcie-root-port", "pcie-pci-bridge",
		"pci-bridge", "ioh3420", "scsi-hd", "scsi-cd", "ide-hd", "ide-cd", "nvme", "nvme-ns", "ahci",
		"ich9-ahci", "e1000", "e1000e", "rtl8139", "qemu-xhci", "usb-tablet", "usb-kbd", "usb-mouse",
		"VGA", "bochs-display", "pvpanic", "pvpanic-pci", "i6300esb", "ib700", "edu", "intel-iommu"};
	static const char *const virtio[] = {"blk", "net", "rng", "balloon", "serial", "scsi", "keyboard",
		"mouse", "tablet", "gpu", "iommu", "mem"};
	static const char *const bus[] = {
		"", "-pci", "-device", "-pci-non-transitional", "-pci-transitional"};
	char name[64];

	for (unsigned i = 0; i < FFS_ARRAY_LEN(models); i++)
		if (!strcmp(model, models[i]))
			return true;
	for (unsigned i = 0; i < FFS_ARRAY_LEN(virtio); i++)
		for (unsigned k = 0; k < FFS_ARRAY_LEN(bus); k++) {
			snprintf(name, sizeof(name), "virtio-%s%s", virtio[i], bus[k]);
			if (!strcmp(model, name))
				return true;
		}
	return false;
}

static int device(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err)
{
	char model[64] = "", file[8];

	ffs_qemu_get(value, "driver", "driver", model, sizeof(model));
	if (!a->trust && !known_device(model))
		return refuse(
			err, opt, value, "is a device that restore does not know: taken only with --trust");
	if (!a->trust && (ffs_qemu_get(value, NULL, "romfile", file, sizeof(file)) && file[0]))
		return refuse(err, opt, value, "names a file of the host: taken only with --trust");
	/* so that the guest's kernel notices that it was restored, and makes its random numbers anew */
	if (!strcmp(model, "vmgenid")) {
		char id[65] = "";

		ffs_qemu_get(value, NULL, "id", id, sizeof(id));
		ffs_argv_add(&a->out, opt);
		ffs_argv_addf(&a->out, "vmgenid,guid=auto%s%s", ffs_qemu_is_id(id) ? ",id=" : "",
			ffs_qemu_is_id(id) ? id : "");
		return 0;
	}
	return keep(a, opt, value, err);
}

/* ---- the table ---- */

typedef int (*handler)(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err);

static const struct option {
	const char *name;
	bool has_value;
	handler fn;
} options[] = {
	/* the machine */
	{"M", true, keep},
	{"machine", true, keep},
	{"cpu", true, keep},
	{"smp", true, keep},
	{"m", true, keep},
	{"accel", true, keep},
	{"rtc", true, keep},
	{"uuid", true, keep},
	{"name", true, keep},
	{"global", true, keep},
	{"vga", true, keep},
	{"icount", true, keep},
	{"boot", true, keep},
	{"action", true, keep},
	{"watchdog", true, keep},
	{"watchdog-action", true, keep},
	{"smbios", true, keep},
	{"fw_cfg", true, keep},
	{"overcommit", true, keep},
	{"numa", true, keep},
	{"sandbox", true, keep},
	{"bios", true, bios},
	{"nodefaults", false, nodefaults},
	{"no-user-config", false, flag},
	{"no-reboot", false, flag},
	{"no-shutdown", false, flag},
	{"no-acpi", false, flag},
	{"no-hpet", false, flag},
	{"enable-kvm", false, flag},
	{"snapshot", false, flag},
	{"usb", false, flag},
	{"nographic", false, nographic},
	{"object", true, object},
	{"device", true, device},
	/* what it has of the host: the child gets its own */
	{"chardev", true, ffs_qemu_chardev},
	{"serial", true, ffs_qemu_serial},
	{"parallel", true, ffs_qemu_serial},
	{"debugcon", true, ffs_qemu_serial},
	{"netdev", true, ffs_qemu_netdev},
	{"nic", true, ffs_qemu_nic},
	{"net", true, ffs_qemu_nic},
	{"drive", true, ffs_qemu_drive},
	/* how it is run and talked to: the child's is another */
	{"qmp", true, own},
	{"qmp-pretty", true, own},
	{"mon", true, own},
	{"monitor", true, own},
	{"S", false, own},
	{"incoming", true, own},
	{"loadvm", true, own},
	{"pidfile", true, own},
	{"daemonize", false, own},
	{"display", true, own},
	{"add-fd", true, own},
	{"gdb", true, own},
	{"s", false, own},
	{"mem-path", true, own},
	{"mem-prealloc", false, own},
	{"msg", true, own},
	{"vnc", true, own},
	{"spice", true, own},
	/* the guest has read them at its boot; or they are the host's business */
	{"kernel", true, host},
	{"initrd", true, host},
	{"append", true, host},
	{"dtb", true, host},
	{"D", true, host},
	{"d", true, host},
	{"trace", true, host},
	{"plugin", true, host},
	{"runas", true, host},
	{"chroot", true, host},
	{"run-with", true, host},
	{"L", true, host},
	{"k", true, host},
	{"seed", true, host},
	{"dfilter", true, host},
};

static const struct option *find_option(const char *word)
{
	const char *name = option_name(word);

	for (unsigned i = 0; name && i < FFS_ARRAY_LEN(options); i++)
		if (!strcmp(name, options[i].name))
			return &options[i];
	return NULL;
}

static const char *word_at(const struct ffs_qemu_args *a, size_t i)
{
	struct json_object *v = json_object_array_get_idx(a->command_line, i);

	return json_object_is_type(v, json_type_string) ? json_object_get_string(v) : NULL;
}

/* Which object is the machine's memory: needed before the objects are looked at. */
static void find_memory(struct ffs_qemu_args *a, size_t n)
{
	for (size_t i = 1; i + 1 < n; i++) {
		const char *opt = word_at(a, i), *name = opt ? option_name(opt) : NULL,
			   *value = word_at(a, i + 1);

		if (name && value && (!strcmp(name, "M") || !strcmp(name, "machine")))
			ffs_qemu_get(value, NULL, "memory-backend", a->memory_id, sizeof(a->memory_id));
	}
	if (!a->memory_id[0]) {
		a->memory_is_plain = true;
		/* as QEMU calls what -m alone makes, so that a stream with memory blocks finds it */
		snprintf(a->memory_id, sizeof(a->memory_id), "pc.ram");
	}
}

static void add_memory(struct ffs_qemu_args *a)
{
	ffs_argv_add(&a->out, "-object");
	ffs_argv_addf(&a->out,
		"memory-backend-file,id=%s,size=%llu,mem-path=/proc/self/fd/"
		"%d,share=off,merge=off,prealloc=off%s%s",
		a->memory_id, (unsigned long long)a->memory_size, FFS_CHILD_MEMORY,
		a->memory_options ? a->memory_options : "",
		a->memory_is_plain ? ",x-use-canonical-path-for-ramblock-id=off" : "");
	if (a->memory_is_plain) {
		ffs_argv_add(&a->out, "-machine");
		ffs_argv_addf(&a->out, "memory-backend=%s", a->memory_id);
	}
}

int ffs_qemu_args_make(struct ffs_qemu_args *a, struct ffs_error *err)
{
	size_t n = json_object_is_type(a->command_line, json_type_array)
			   ? json_object_array_length(a->command_line)
			   : 0;
	int r = 0;

	if (n < 2 || !word_at(a, 0))
		return ffs_error_set(
			err, EINVAL, "the branch has no command line of its VMM: give one after --");
	find_memory(a, n);
	if (!ffs_qemu_is_id(a->memory_id))
		return ffs_error_set(
			err, EINVAL, "memory-backend=%.60s is no name that can be used", a->memory_id);
	for (size_t i = 1; !r && i < n; i++) {
		const char *word = word_at(a, i), *value;
		const struct option *o = word ? find_option(word) : NULL;

		if (!o && a->trust && word) {
			ffs_argv_add(&a->out, word);
			continue;
		}
		if (!o)
			return ffs_error_set(err, ENOTSUP,
				"'%.120s' of the branched VM is an option that restore does not know: taken "
				"only with --trust",
				word ? word : "(no text)");
		value = o->has_value ? word_at(a, ++i) : NULL;
		if (o->has_value && !value)
			return ffs_error_set(err, EINVAL, "'%.60s' of the branched VM has no value", word);
		/* one spelling, so that nobody has to think of two */
		r = o->fn(a, word[1] == '-' ? word + 1 : word, value, err);
	}
	if (r < 0)
		return r;
	add_memory(a);
	if (a->nographic && !a->nodefaults && !a->n_serial)
		r = ffs_qemu_serial(a, "-serial", "stdio", err);
	for (const char *const *w = (const char *const[]){"-display", "none", "-monitor", "none", NULL}; *w;
		w++)
		ffs_argv_add(&a->out, *w);
	if (!r && a->out.failed)
		r = ffs_error_set(err, ENOMEM, "no memory for a command line");
	return r;
}
