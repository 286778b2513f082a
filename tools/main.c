/* `forkfs`: finds the subcommand, and what all of them share: usage, errors, signals, output.
 *
 * One thread. The signal handler only sets a flag; whatever waits sees EINTR (no SA_RESTART) and asks for it.
 */
#include "cli.h"

#include <inttypes.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "options.h"

static int cmd_version(const struct ffs_command *self, int argc, char **argv);
static int cmd_help(const struct ffs_command *self, int argc, char **argv);

const char *ffs_global_mount;

const struct ffs_command ffs_commands[] = {
	{"mount", "DIR [-f] [-o OPTION[=VALUE],…]", "start a daemon that presents its sandboxes in DIR",
		ffs_cmd_mount},
	{"umount", "DIR", "detach every sandbox of a mount and end its daemon", ffs_cmd_umount},
	{"attach",
		"NAME (--pid PID | --qemu QMP_SOCKET | --firecracker API_SOCKET | --coop SOCKET) [--disk "
		"ID=PATH]... [--track] [--force] [--owner "
		"UID:GID[:rw]] "
		"[--json]",
		"make a running VM the sandbox NAME; the VM is not stopped", ffs_cmd_attach},
	{"detach", "NAME", "let go of a VM; it runs on", ffs_cmd_detach},
	{"ls", "[NAME] [--json]", "list the sandboxes, or the branches of one", ffs_cmd_ls},
	{"status", "[NAME[/BRANCH]] [--json]", "show the mount, a sandbox or a branch in detail",
		ffs_cmd_status},
	{"branch",
		"NAME (BRANCH | --key KEY) [--live | --diff | --full] [--no-wait] [--max-rate BYTES] "
		"[--force] [--store "
		"memory|dense|packed] [--json]",
		"take a branch: memory and device state of one instant", ffs_cmd_branch},
	{"fork",
		"NAME/BRANCH (FORK [--mailbox NAME[:TOKEN]=JSON|@FILE]… | --each FILE|-) [--ack MS] [--json]",
		"make a fork: the branch, with payloads in the mailboxes of its guest", ffs_cmd_fork},
	{"wait", "NAME/BRANCH…", "wait until branches are complete", ffs_cmd_wait},
	{"rm", "NAME/BRANCH[/FORK]…", "remove branches or forks; who has one open goes on reading it",
		ffs_cmd_rm},
	{"restore",
		"(NAME/BRANCH[/FORK] | NAME/BRANCH/FORK… | NAME/BRANCH --forks FILE|-) [-n COUNT] [--attach "
		"NAME [--track]] [--paused | --healthy [--ready-timeout SECONDS]] "
		"[--accept-torn] [--trust] [--as-served] [--show] "
		"[--vmm BINARY] [--jailer PATH] [--conf FILE] [--dir DIR] [--backend file|uffd] "
		"[--no-prefetch] [--drive ID=PATH]… "
		"[--net IFACE=TAP]… [--ack MS | --no-ack] [--ack-address IP] [-- [JAILER ARGS… --] VMM "
		"ARGS…]",
		"start VMs that go on where the branch was taken; a line of JSON for each", ffs_cmd_restore},
	{"exec",
		"(SANDBOX | --socket PATH) [-i] [-t] [--env NAME=VALUE]… [--cwd DIR] [--main [--log FILE] "
		"[--detach | --exit-file FILE]] [--ready-timeout SECONDS] -- COMMAND ARGS…",
		"run a command in a guest that has the agent; its exit code is ours", ffs_cmd_exec},
	{"health", "(SANDBOX | --socket PATH) [--wait SECONDS] [--json]",
		"ask whether the agent in a guest answers", ffs_cmd_health},
	{"pool",
		"serve NAME/BRANCH[/FORK] --socket PATH --min N --max N [--ttl SECONDS] [--end-all] [options "
		"of restore] [-- VMM ARGS…] | "
		"acquire --socket PATH [--mailbox NAME[:TOKEN]=JSON|@FILE]… [--ack MS | --no-ack] [--timeout "
		"SECONDS] "
		"[--main [--env NAME=VALUE]… [--log FILE] -- COMMAND ARGS…] | release --socket PATH ID… | "
		"status --socket PATH | "
		"drain --socket PATH [--end-all]",
		"keep children of a branch ready, and hand them out", ffs_cmd_pool},
	{"verify", "PATH…",
		"read all of a branch, or of a store, and name the first byte that is not as written",
		ffs_cmd_verify},
	{"export", "NAME/BRANCH FILE|-", "write a branch as one stream", ffs_cmd_export},
	{"import", "FILE|- NAME/BRANCH [--store dense|packed] [--store-dir DIR]",
		"read such a stream, check it, and make it a branch", ffs_cmd_import},
	{"convert", "NAME/BRANCH --to dense|packed", "give a branch of the store the other form, in place",
		ffs_cmd_convert},
	{"inspect", "PATH [--chunks]", "decode the files of a branch in a store", ffs_cmd_inspect},
	{"pager",
		"(NAME/BRANCH | FILE) SOCKET [-n COUNT] [--owner UID:GID] [--all] [--no-prefetch] [--limit "
		"SIZE] "
		"[--working-set FILE] [--with-parent]",
		"serve a branch's memory to VMMs that are restored with the Uffd backend", ffs_cmd_pager},
	{"doctor", "[--json]", "test what this machine can do, line by line, with the remedy",
		ffs_cmd_doctor},
	{"version", "", "print the version", cmd_version},
	{"help", "[COMMAND]", "print this, or the usage of one command", cmd_help},
	{0},
};

/* ---- usage and errors ---- */

static void print_safe(FILE *f, const char *text)
{
	for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
		/* C0, DEL, and the C1 controls as UTF-8 has them */
		if (p[0] == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0) {
			putc('?', f);
			p++;
		} else {
			putc(*p < 0x20 || *p == 0x7f ? '?' : *p, f);
		}
	}
}

static const struct ffs_command *find_command(const char *name)
{
	for (const struct ffs_command *c = ffs_commands; c->name; c++)
		if (!strcmp(c->name, name))
			return c;
	return NULL;
}

static void print_usage(FILE *f, const struct ffs_command *self)
{
	fprintf(f, "usage: forkfs %s%s%s\n", self->name, *self->synopsis ? " " : "", self->synopsis);
}

int ffs_usage_error(const struct ffs_command *self, const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "forkfs %s: ", self->name);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	print_usage(stderr, self);
	return FFS_EXIT_USAGE;
}

int ffs_usage_help(const struct ffs_command *self)
{
	print_usage(stdout, self);
	printf("  %s\n", self->help);
	return ffs_finish_output(self);
}

void ffs_print_failure(const struct ffs_command *self, const struct ffs_error *err)
{
	fprintf(stderr, "forkfs %s: ", self->name);
	print_safe(stderr, err->code ? err->text : "failed without a reason");
	fputc('\n', stderr);
}

int ffs_failure(const struct ffs_command *self, const struct ffs_error *err)
{
	if (ffs_interrupted())
		ffs_interrupt_exit();
	ffs_print_failure(self, err);
	return FFS_EXIT_FAILURE;
}

int ffs_finish_output(const struct ffs_command *self)
{
	if (!fflush(stdout) && !ferror(stdout))
		return FFS_EXIT_OK;
	fprintf(stderr, "forkfs %s: the output could not be written: %s\n", self->name, strerror(errno));
	return FFS_EXIT_FAILURE;
}

static int print_all_help(FILE *f)
{
	fputs("usage: forkfs [--mount DIR] COMMAND …\n\n"
	      "Live branches of running virtual machines, as files. The mount is --mount DIR, $FORKFS, or "
	      "/forkfs.\n\n",
		f);
	for (const struct ffs_command *c = ffs_commands; c->name; c++)
		fprintf(f, "  %-8s %s\n", c->name, c->help);
	fputs("\nforkfs help COMMAND prints the usage of one. Exit codes: 0, 1 (it failed), 2 (wrong "
	      "usage).\n",
		f);
	return FFS_EXIT_USAGE;
}

static int cmd_help(const struct ffs_command *self, int argc, char **argv)
{
	if (argc == 1) {
		print_all_help(stdout);
		return ffs_finish_output(self);
	}
	if (argc == 2) {
		const struct ffs_command *c = find_command(argv[1]);

		if (c)
			return ffs_usage_help(c);
		return ffs_usage_error(self, "there is no command '%s'", argv[1]);
	}
	return ffs_usage_error(self, "one command at a time");
}

static int cmd_version(const struct ffs_command *self, int argc, char **argv)
{
	if (argc > 1)
		return ffs_usage_error(self, "takes no arguments");
	puts("forkfs " FFS_VERSION);
	return ffs_finish_output(self);
}

/* ---- what is printed ---- */

void ffs_print_safe(const char *text)
{
	print_safe(stdout, text);
}

void ffs_print_json(struct json_object *obj)
{
	puts(json_object_to_json_string_ext(obj, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(obj);
}

const char *ffs_format_ns(char buf[32], uint64_t ns)
{
	if (ns < 1000000)
		snprintf(buf, 32, "%.0f µs", (double)ns / 1e3);
	else if (ns < 1000000000)
		snprintf(buf, 32, "%.*f ms", ns < 100000000 ? 2 : 0, (double)ns / 1e6);
	else
		snprintf(buf, 32, "%.2f s", (double)ns / 1e9);
	return buf;
}

const char *ffs_format_bytes(char buf[32], uint64_t bytes)
{
	static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
	double v = (double)bytes;
	unsigned u = 0;

	while (v >= 1024 && u + 1 < sizeof(units) / sizeof(*units)) {
		v /= 1024;
		u++;
	}
	snprintf(buf, 32, "%.*f %s", v == (double)(uint64_t)v ? 0 : 1, v, units[u]);
	return buf;
}

/* ---- signals ---- */

static atomic_int interrupted_by; /* asked by threads too, so no sig_atomic_t */

/* A signal that comes between the look at the flag and the call that waits would be missed: SIGALRM comes
 * every second from then on and ends that call too. */
static void on_signal(int sig)
{
	if (sig != SIGALRM)
		interrupted_by = sig;
	alarm(1);
}

void ffs_interrupt_install(void)
{
	static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
	struct sigaction sa = {.sa_handler = on_signal};

	sigemptyset(&sa.sa_mask);
	for (unsigned i = 0; i < sizeof(signals) / sizeof(*signals); i++) {
		struct sigaction old;

		/* nohup and background jobs of a script have it ignored: they mean it */
		if (!sigaction(signals[i], NULL, &old) && old.sa_handler != SIG_IGN)
			sigaction(signals[i], &sa, NULL);
	}
	sigaction(SIGALRM, &sa, NULL);
}

int ffs_signals_take(const int *signals, unsigned n)
{
	struct sigaction old;
	sigset_t set;

	sigemptyset(&set);
	for (unsigned i = 0; i < n; i++)
		/* what nohup has ignored stays so */
		if (!sigaction(signals[i], NULL, &old) && old.sa_handler != SIG_IGN)
			sigaddset(&set, signals[i]);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

bool ffs_interrupted(void)
{
	return interrupted_by != 0;
}

void ffs_interrupt_exit(void)
{
	int sig = interrupted_by ? interrupted_by : SIGINT;

	fflush(stdout);
	signal(sig, SIG_DFL);
	raise(sig);
	_exit(128 + sig); /* only when the signal is blocked */
}

/* ---- main ---- */

int main(int argc, char **argv)
{
	const char *base = argc > 0 && strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1
			   : argc > 0                        ? argv[0]
							     : "";
	const struct ffs_command *cmd;
	int i = 1;

	/* whoever started us may have it ignored; then nobody could be told how a child of ours ended */
	signal(SIGCHLD, SIG_DFL);
	if (!strcmp(base, "mount.fuse.forkfs") || !strcmp(base, "mount.forkfs"))
		return ffs_mount_helper(argc, argv);
	if (!strcmp(base, "forkfs-pool-guard"))
		return ffs_pool_guard_main(argc, argv);
	if (!strcmp(base, "forkfs-agent-link"))
		return ffs_agent_link_main(argc, argv);

	for (; i < argc && argv[i][0] == '-'; i++) {
		if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
			print_all_help(stdout);
			return fflush(stdout) ? FFS_EXIT_FAILURE : FFS_EXIT_OK;
		}
		if (!strcmp(argv[i], "--version") || !strcmp(argv[i], "-V")) {
			puts("forkfs " FFS_VERSION);
			return fflush(stdout) ? FFS_EXIT_FAILURE : FFS_EXIT_OK;
		}
		if (!strcmp(argv[i], "--mount") && i + 1 < argc) {
			ffs_global_mount = argv[++i];
		} else if (!strncmp(argv[i], "--mount=", 8)) {
			ffs_global_mount = argv[i] + 8;
		} else if (!strcmp(argv[i], "--mount")) {
			fputs("forkfs: --mount needs a directory\n", stderr);
			return FFS_EXIT_USAGE;
		} else {
			fprintf(stderr, "forkfs: there is no option %s (try: forkfs help)\n", argv[i]);
			return FFS_EXIT_USAGE;
		}
	}
	if (i >= argc)
		return print_all_help(stderr);
	cmd = find_command(argv[i]);
	if (!cmd) {
		fprintf(stderr, "forkfs: there is no command '%s' (try: forkfs help)\n", argv[i]);
		return FFS_EXIT_USAGE;
	}
	return cmd->run(cmd, argc - i, argv + i);
}
