/* What /proc says about a QEMU: the monitors that its command line names. Owns nothing; any thread; never
 * blocks.
 *
 * Option syntax: QEMU's man page (-qmp, -qmp-pretty, -mon, -chardev socket); values are comma separated, ",,"
 * is a comma. */
#include "vmm/qemu.h"

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define CMDLINE_MAX (4u << 20)
#define MAX_ARGS 4096

struct args {
	char *text;
	unsigned n;
	const char *arg[MAX_ARGS];
};

/* What a process calls itself goes into sentences and JSON: only what every reader of those takes. */
static void make_plain(char *s, bool keep_utf8)
{
	for (unsigned char *p = (unsigned char *)s; *p; p++) {
		unsigned n = *p >= 0xf0 ? 3 : *p >= 0xe0 ? 2 : *p >= 0xc2 ? 1 : 0, i = 0;

		if (*p >= 0x20 && *p < 0x7f)
			continue;
		while (i < n && (p[i + 1] & 0xc0) == 0x80)
			i++;
		if (keep_utf8 && n && i == n && *p < 0xf5)
			p += n;
		else
			*p = '?';
	}
}

void ffs_proc_comm(pid_t pid, char out[32])
{
	char path[64];
	_cleanup_free_ char *text = NULL;

	snprintf(path, sizeof(path), "/proc/%d/comm", (int)pid);
	snprintf(out, 32, "?");
	if (ffs_read_file(path, 4096, &text, NULL) == 0) {
		text[strcspn(text, "\n")] = '\0';
		make_plain(text, false);
		snprintf(out, 32, "%s", text);
	}
}

static int read_args(pid_t pid, struct args *a)
{
	char path[64];
	size_t len;

	snprintf(path, sizeof(path), "/proc/%d/cmdline", (int)pid);
	int r = ffs_read_file(path, CMDLINE_MAX, &a->text, &len);

	if (r < 0)
		return r == -ENOENT ? -ESRCH : r;
	for (size_t i = 0; i < len && a->n < MAX_ARGS; i += strlen(a->text + i) + 1)
		a->arg[a->n++] = a->text + i;
	return 0;
}

struct json_object *ffs_qemu_command_line(pid_t pid)
{
	_cleanup_free_ struct args *a = calloc(1, sizeof(*a));

	if (!a || read_args(pid, a) < 0)
		return NULL;
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < a->n; i++)
		make_plain(a->text + (a->arg[i] - a->text), true);
	for (unsigned i = 0; list && i < a->n; i++)
		json_object_array_add(list, json_object_new_string(a->arg[i]));
	free(a->text);
	return list;
}

/* The next comma separated piece of *opts into out (cut when too long), commas unescaped; false at the end.
 */
static bool next_piece(const char **opts, char *out, size_t cap)
{
	const char *p = *opts;
	size_t n = 0;

	if (!*p)
		return false;
	for (; *p && !(p[0] == ',' && p[1] != ','); p++) {
		if (p[0] == ',')
			p++;
		if (n + 1 < cap)
			out[n++] = *p;
	}
	out[n] = '\0';
	*opts = *p ? p + 1 : p;
	return true;
}

/* The value of `key` in a list of options; "on" for a bare key. */
static bool get_opt(const char *opts, const char *key, char *out, size_t cap)
{
	char piece[1200];
	size_t n = strlen(key);

	while (next_piece(&opts, piece, sizeof(piece))) {
		if (strncmp(piece, key, n) == 0 && (piece[n] == '=' || !piece[n])) {
			snprintf(out, cap, "%s", piece[n] ? piece + n + 1 : "on");
			return true;
		}
	}
	return false;
}

static bool opt_on(const char *opts, const char *key, bool dflt)
{
	char v[16];

	if (!get_opt(opts, key, v, sizeof(v)))
		return dflt;
	return strcmp(v, "off") != 0 && strcmp(v, "no") != 0 && strcmp(v, "false") != 0 &&
	       strcmp(v, "n") != 0;
}

/* The name that the listening socket `ino` is bound to. */
static bool name_of_inode(pid_t pid, unsigned long long ino, struct ffs_qemu_monitor *m)
{
	char path[64];
	_cleanup_free_ char *text = NULL;
	char *save = NULL;

	snprintf(path, sizeof(path), "/proc/%d/net/unix", (int)pid);
	if (ffs_read_file(path, 16u << 20, &text, NULL) < 0)
		return false;
	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		unsigned long long inode;
		int at = 0;

		/* Num RefCount Protocol Flags Type St Inode Path (net/unix/af_unix.c, unix_seq_show) */
		if (sscanf(line, "%*s %*s %*s %*s %*s %*s %llu %n", &inode, &at) != 1 || inode != ino ||
			!at || !line[at])
			continue;
		m->abstract = line[at] == '@';
		snprintf(m->path, sizeof(m->path), "%s", line + at + m->abstract);
		return true;
	}
	return false;
}

/* Options of a socket chardev; `path` as -qmp unix: has it in front, or NULL. */
static bool monitor_of(pid_t pid, const char *opts, const char *path, struct ffs_qemu_monitor *m)
{
	char value[1024], link[64], target[64];
	unsigned long long ino;

	*m = (struct ffs_qemu_monitor){0};
	if (get_opt(opts, "fd", value, sizeof(value))) {
		snprintf(link, sizeof(link), "/proc/%d/fd/%d", (int)pid, atoi(value));
		ssize_t n = readlink(link, target, sizeof(target) - 1);

		if (n <= 0)
			return false;
		target[n] = '\0';
		return sscanf(target, "socket:[%llu]", &ino) == 1 && name_of_inode(pid, ino, m);
	}
	/* without "server" QEMU is the client of somebody else's socket */
	if (!opt_on(opts, "server", false))
		return false;
	if (!path) {
		if (!get_opt(opts, "path", value, sizeof(value)))
			return false;
		path = value;
	}
	if (strlen(path) >= sizeof(m->path) || !*path)
		return false;
	snprintf(m->path, sizeof(m->path), "%s", path);
	m->abstract = opt_on(opts, "abstract", false);
	m->padded = m->abstract && !opt_on(opts, "tight", true);
	return true;
}

static const char *option_name(const char *arg)
{
	if (arg[0] != '-')
		return "";
	return arg[1] == '-' ? arg + 2 : arg + 1;
}

static bool monitor_of_chardev(pid_t pid, const struct args *a, const char *id, struct ffs_qemu_monitor *m)
{
	char have[128];

	for (unsigned i = 0; i + 1 < a->n; i++) {
		const char *v = a->arg[i + 1];

		if (strcmp(option_name(a->arg[i]), "chardev") == 0 && strncmp(v, "socket,", 7) == 0 &&
			get_opt(v, "id", have, sizeof(have)) && strcmp(have, id) == 0)
			return monitor_of(pid, v, NULL, m);
	}
	return false;
}

static bool monitor_of_option(
	pid_t pid, const struct args *a, const char *name, const char *v, struct ffs_qemu_monitor *m)
{
	char id[128], mode[32], path[1024];

	if (strcmp(name, "qmp") == 0 || strcmp(name, "qmp-pretty") == 0) {
		if (strncmp(v, "chardev:", 8) == 0)
			return monitor_of_chardev(pid, a, v + 8, m);
		if (strncmp(v, "unix:", 5) != 0)
			return false;
		const char *rest = v + 5;

		return next_piece(&rest, path, sizeof(path)) && monitor_of(pid, rest, path, m);
	}
	if (strcmp(name, "mon") != 0 || !get_opt(v, "mode", mode, sizeof(mode)) ||
		strcmp(mode, "control") != 0)
		return false;
	if (!get_opt(v, "chardev", id, sizeof(id))) {
		const char *rest = v;

		/* the first piece may be the chardev without its key */
		if (!next_piece(&rest, id, sizeof(id)))
			return false;
	}
	return monitor_of_chardev(pid, a, id, m);
}

int ffs_qemu_find_monitors(
	pid_t pid, struct ffs_qemu_monitor out[FFS_QEMU_MAX_MONITORS], struct ffs_error *err)
{
	_cleanup_free_ struct args *a = calloc(1, sizeof(*a));
	char comm[32];
	int n = 0;
	bool asked = false;

	if (!a)
		return ffs_error_set(err, ENOMEM, "no memory for a command line");
	int r = read_args(pid, a);

	if (r == -ESRCH)
		return ffs_error_set(err, ESRCH, "there is no process %d", (int)pid);
	if (r < 0)
		return ffs_error_errno(err, -r, "read the command line of process %d", (int)pid);
	ffs_proc_comm(pid, comm);
	for (unsigned i = 0; i + 1 < a->n && n < FFS_QEMU_MAX_MONITORS; i++) {
		const char *name = option_name(a->arg[i]);

		if (strcmp(name, "qmp") == 0 || strcmp(name, "qmp-pretty") == 0)
			asked = true;
		if (monitor_of_option(pid, a, name, a->arg[i + 1], &out[n]))
			n++;
	}
	bool is_qemu = asked || strstr(comm, "qemu") || (a->n && strstr(a->arg[0], "qemu"));

	free(a->text);
	if (n)
		return n;
	if (!is_qemu)
		return ffs_error_set(err, ENOTSUP,
			"process %d (%s) is no VMM that forkfs knows: give it the pid of a QEMU, or the "
			"VMM's socket",
			(int)pid, comm);
	return ffs_error_set(err, ENOTSUP,
		"QEMU %d has no QMP monitor on a unix socket that it serves%s: start it with -qmp "
		"unix:/PATH,server=on,wait=off, or name "
		"the socket",
		(int)pid, asked ? " (its -qmp is something else)" : "");
}
