/* forkfs exec: a command in a guest, through its agent.
 *
 * One thread. It waits in poll(2) for its own stdin, for signals and for what the guest says; stdin is read only as far as
 * the guest has room for it, and the guest sends only what was taken here. */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "options.h"

/* As docker, podman and env have them. */
enum { EXIT_OURS = 125, EXIT_CANNOT_RUN = 126, EXIT_NOT_FOUND = 127 };

struct exec_args {
	const char *socket, *cwd, *mount, *ready, *log, *exit_file;
	struct ffs_words env;
	bool input, tty, main, detach, help;
	unsigned ready_s;
	char **command;
	unsigned n_words;
};

struct running {
	int fd, signals;
	bool tty, input_open, detach, main;
	bool link_gone;  /* without a word */
	uint32_t credit; /* of stdin */
	struct ffs_agent_input in;
	int code; /* -1: it runs */
	struct ffs_error *err;
};

static struct termios before;
static bool raw;

static void restore_terminal(void)
{
	if (raw)
		tcsetattr(STDIN_FILENO, TCSANOW, &before);
	raw = false;
}

static void make_raw(void)
{
	struct termios t;

	if (tcgetattr(STDIN_FILENO, &before) < 0)
		return;
	t = before;
	cfmakeraw(&t);
	raw = tcsetattr(STDIN_FILENO, TCSANOW, &t) == 0;
}

static void window_size(uint16_t *rows, uint16_t *cols)
{
	struct winsize w = {.ws_row = 24, .ws_col = 80};

	if (ioctl(STDIN_FILENO, TIOCGWINSZ, &w) < 0 || !w.ws_row)
		w = (struct winsize){.ws_row = 24, .ws_col = 80};
	*rows = w.ws_row;
	*cols = w.ws_col;
}

static void send_size(struct running *run)
{
	uint8_t payload[4];
	struct agent_writer w = {payload, 0, 4, false};
	uint16_t rows, cols;

	window_size(&rows, &cols);
	agent_put(&w, rows, 2);
	agent_put(&w, cols, 2);
	ffs_agent_send(run->fd, AGENT_RESIZE, 1, payload, 4);
}

static void on_signal(struct running *run)
{
	struct signalfd_siginfo si;
	uint8_t number;

	while (read(run->signals, &si, sizeof(si)) == sizeof(si)) {
		number = (uint8_t)si.ssi_signo;
		if (number == SIGWINCH && run->tty)
			send_size(run);
		else if (number != SIGWINCH)
			ffs_agent_send(run->fd, AGENT_SIGNAL, 1, &number, 1);
	}
}

static int on_input(struct running *run)
{
	uint8_t buf[AGENT_PAYLOAD_MAX];
	size_t most = run->credit < sizeof(buf) ? run->credit : sizeof(buf);
	ssize_t n = read(STDIN_FILENO, buf, most);

	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return 0;
	if (n <= 0) {
		run->input_open = false;
		return ffs_agent_send(run->fd, AGENT_STDIN_END, 1, NULL, 0);
	}
	run->credit -= (uint32_t)n;
	return ffs_agent_send(run->fd, AGENT_STDIN, 1, buf, (size_t)n);
}

static int on_output(struct running *run, const struct agent_frame *f)
{
	uint8_t le[4];
	struct agent_writer w = {le, 0, 4, false};

	if (ffs_write_full(f->type == AGENT_STDOUT ? STDOUT_FILENO : STDERR_FILENO, f->payload, f->len) < 0)
		return ffs_error_errno(run->err, errno, "its output cannot be written");
	agent_put(&w, f->len, 4);
	/* when nobody takes it, what is here already is read all the same: the command's end may be among it */
	ffs_agent_send(run->fd, AGENT_WINDOW_MORE, 1, le, 4);
	return 0;
}

static void on_refused(struct running *run, const struct agent_frame *f)
{
	struct agent_reader r = {f->payload, f->len, false};
	int code = (int)agent_get(&r, 4);

	ffs_error_set(run->err, code > 0 && code < 4096 ? code : EIO, "%.*s",
		(int)(r.left > 200 ? 200 : r.left), (const char *)r.p);
	run->code = code == ENOENT || code == ENOTDIR                     ? EXIT_NOT_FOUND
		    : code == EACCES || code == ENOEXEC || code == EISDIR ? EXIT_CANNOT_RUN
									  : EXIT_OURS;
}

/* The link has lost lines of the main command's log. */
static void on_loss(const struct agent_frame *f)
{
	fprintf(stderr, "forkfs exec: the log is not whole: %.*s\n", (int)(f->len > 400 ? 400 : f->len),
		(const char *)f->payload);
}

/* It was killed: nobody else has what it had not passed on yet. */
static int on_link_gone(struct running *run)
{
	run->link_gone = true;
	return ffs_error_set(run->err, ECONNRESET,
		"the link to the guest's agent has ended before it told the command's end: what it had not "
		"passed on is lost, and %s",
		run->main ? "a main command that was started goes on" : "the command is hung up on");
}

/* Frames come from the guest; what makes no sense is passed over. */
static int on_frame(struct running *run, const struct agent_frame *f)
{
	struct agent_reader r = {f->payload, f->len, false};
	uint64_t a;

	switch (f->type) {
	case AGENT_STDOUT:
	case AGENT_STDERR:
		return on_output(run, f);
	case AGENT_WINDOW_MORE:
		a = agent_get(&r, 4);
		run->credit = (uint32_t)(a > AGENT_WINDOW - run->credit ? AGENT_WINDOW : run->credit + a);
		return 0;
	case AGENT_STARTED:
		if (run->detach)
			run->code = 0;
		return 0;
	case AGENT_LOG:
		on_loss(f);
		return 0;
	case AGENT_REFUSED:
		on_refused(run, f);
		return 0;
	case AGENT_EXIT:
		a = agent_get(&r, 1);
		run->code = (int)agent_get(&r, 1) + (a == AGENT_SIGNALLED ? 128 : 0);
		if (r.bad)
			return ffs_error_set(run->err, EPROTO, "the guest's agent told an end that is none");
		return 0;
	case AGENT_ERROR:
		return ffs_error_set(
			run->err, EIO, "%.*s", (int)(f->len > 400 ? 400 : f->len), (const char *)f->payload);
	default:
		return 0;
	}
}

static int on_guest(struct running *run)
{
	do {
		struct agent_frame f;
		int got = ffs_agent_next(run->fd, &run->in, &f);

		if (got == 0 || got == -ECONNRESET)
			return on_link_gone(run);
		if (got > 0)
			got = on_frame(run, &f);
		if (got < 0)
			return got;
	} while (run->in.at < run->in.len && run->code < 0);
	return 0;
}

static int run_to_the_end(struct running *run)
{
	int got = 0;

	while (run->code < 0 && got >= 0) {
		struct pollfd p[3] = {{.fd = run->fd, .events = POLLIN},
			{.fd = run->signals, .events = POLLIN},
			{.fd = run->input_open && run->credit ? STDIN_FILENO : -1, .events = POLLIN}};

		if (poll(p, 3, -1) < 0)
			continue;
		if (p[1].revents)
			on_signal(run);
		/* a connection that broke has its reason, or the command's end, in front of its own */
		if (p[2].revents && on_input(run) < 0)
			run->input_open = false;
		if (p[0].revents)
			got = on_guest(run);
	}
	return got;
}

/* ---- beginning ---- */

static int make_command(const struct exec_args *a, uint8_t *out, size_t *len, struct ffs_error *err)
{
	static struct agent_exec e;
	const char *term = getenv("TERM");
	static char term_var[80];

	if (a->n_words > AGENT_WORDS_MAX || a->env.n + 1 > AGENT_WORDS_MAX)
		return ffs_error_set(err, E2BIG, "at most %u words and as many variables", AGENT_WORDS_MAX);
	e.flags = (uint8_t)((a->tty ? AGENT_EXEC_TTY : 0) | (a->input ? AGENT_EXEC_STDIN : 0) |
			    (a->log ? AGENT_EXEC_OUTPUT : 0));
	window_size(&e.rows, &e.cols);
	e.cwd = a->cwd;
	for (; e.argc < a->n_words; e.argc++)
		e.argv[e.argc] = a->command[e.argc];
	if (a->tty && term &&
		(size_t)snprintf(term_var, sizeof(term_var), "TERM=%s", term) < sizeof(term_var))
		e.env[e.envc++] = term_var;
	for (unsigned i = 0; i < a->env.n; i++)
		e.env[e.envc++] = a->env.word[i];
	*len = agent_exec_make(&e, out, AGENT_PAYLOAD_MAX);
	return *len ? 0
		    : ffs_error_set(err, E2BIG, "a command and its variables have at most %u bytes",
			      AGENT_PAYLOAD_MAX);
}

static int signals_of(void)
{
	static const int all[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH};

	return ffs_signals_take(all, FFS_ARRAY_LEN(all));
}

/* The link writes it, wherever that was started. */
static int send_log(int fd, const char *log)
{
	_cleanup_free_ char *cwd = log[0] == '/' ? NULL : getcwd(NULL, 0), *path = NULL;

	if (log[0] != '/' && !cwd)
		return -errno;
	if (asprintf(&path, "%s%s%s", cwd ? cwd : "", cwd ? "/" : "", log) < 0)
		return -ENOMEM;
	return strlen(path) < PATH_MAX ? ffs_agent_send(fd, AGENT_LOG, 0, path, strlen(path)) : -ENAMETOOLONG;
}

/* ---- the file with the main command's code ---- */

/* The agent has it on the disk before anybody hears of the end, so it is there when the connection, or the VM, is gone.
 * One that is as it was before is of the past. -1: it says nothing. */
static int code_in_file(const char *path, const struct stat *before_it)
{
	_cleanup_free_ char *text = NULL;
	struct stat st;
	size_t len = 0;
	char *end;
	long code;

	if (!path || stat(path, &st) < 0 || ffs_read_file(path, 64, &text, &len) < 0)
		return -1;
	if (st.st_ino == before_it->st_ino && st.st_dev == before_it->st_dev &&
		st.st_mtim.tv_sec == before_it->st_mtim.tv_sec &&
		st.st_mtim.tv_nsec == before_it->st_mtim.tv_nsec)
		return -1;
	code = strtol(text, &end, 10);
	return end > text && *end == '\n' && code >= 0 && code <= 255 ? (int)code : -1;
}

static int run(const char *name, const struct exec_args *a, struct ffs_error *err)
{
	static struct running run = {.code = -1, .credit = AGENT_WINDOW};
	_cleanup_free_ char *path = NULL;
	struct ffs_agent_link l = {.ready_s = a->ready_s};
	uint8_t payload[AGENT_PAYLOAD_MAX];
	struct stat was = {0};
	size_t len;
	int got = make_command(a, payload, &len, err), code;

	if (!got && name)
		got = ffs_agent_of(name, a->mount, &l.pid, &path, err);
	if (got < 0)
		return EXIT_OURS;
	l.socket = name ? path : a->socket;
	run.err = err;
	run.tty = a->tty;
	run.detach = a->detach;
	run.main = a->main;
	run.input_open = a->input;
	run.fd = ffs_agent_dial(&l, err);
	/* until here Ctrl-C ends us: nothing of ours runs in the guest */
	if (run.fd < 0 || ffs_agent_wait(run.fd, -1, NULL, err) < 0)
		return EXIT_OURS;
	run.signals = signals_of();
	if (a->tty) {
		make_raw();
		atexit(restore_terminal);
	}
	if (a->exit_file && stat(a->exit_file, &was) < 0)
		was = (struct stat){0};
	got = a->log ? send_log(run.fd, a->log) : 0;
	if (!got)
		got = ffs_agent_send(run.fd, a->main ? AGENT_MAIN : AGENT_EXEC, 1, payload, len);
	/* a link that is gone already has said why */
	if (!got || got == -EPIPE)
		got = run_to_the_end(&run);
	restore_terminal();
	code = err->code && got >= 0 ? -1 : code_in_file(a->exit_file, &was);
	if (code >= 0) {
		if (run.link_gone && a->log)
			fprintf(stderr, "forkfs exec: the log may not be whole: the link to the guest's "
					"agent, which wrote it, has ended\n");
		*err = (struct ffs_error){0};
		return code;
	}
	if (got < 0 && !err->code)
		ffs_error_errno(err, -got, "the link to the guest's agent");
	return got < 0 ? EXIT_OURS : run.code;
}

static int check(struct exec_args *a, struct ffs_error *err)
{
	a->ready_s = FFS_AGENT_READY_S;
	if (a->ready && ffs_seconds_option("--ready-timeout", a->ready, &a->ready_s, err) < 0)
		return -EINVAL;
	for (unsigned i = 0; i < a->env.n; i++)
		if (!strchr(a->env.word[i], '=') || a->env.word[i][0] == '=')
			return ffs_error_set(
				err, EINVAL, "--env is NAME=VALUE, not '%.100s'", a->env.word[i]);
	if (a->tty && !isatty(STDIN_FILENO))
		return ffs_error_set(err, ENOTTY, "-t wants a terminal as stdin");
	if (!a->main && (a->log || a->detach || a->exit_file))
		return ffs_error_set(err, EINVAL, "%s is of a main command: --main",
			a->log      ? "--log"
			: a->detach ? "--detach"
				    : "--exit-file");
	if (a->detach && a->exit_file)
		return ffs_error_set(err, EINVAL,
			"--detach and --exit-file exclude each other: who leaves hears of no end");
	if (a->main && (a->tty || a->input))
		return ffs_error_set(err, EINVAL, "--main has the guest's console, and neither -t nor -i");
	return a->n_words ? 0 : ffs_error_set(err, EINVAL, "what shall be run goes after --");
}

/* 2 could be the command's own. */
static int wrong_usage(const struct ffs_command *self, const char *why)
{
	ffs_usage_error(self, "%s", why);
	return EXIT_OURS;
}

int ffs_cmd_exec(const struct ffs_command *self, int argc, char **argv)
{
	struct exec_args a = {0};
	const struct ffs_opt opts[] = {
		{"stdin", 'i', FFS_OPT_FLAG, &a.input},
		{"tty", 't', FFS_OPT_FLAG, &a.tty},
		{"env", 'e', FFS_OPT_EACH, &a.env},
		{"cwd", 'w', FFS_OPT_VALUE, &a.cwd},
		{"main", 0, FFS_OPT_FLAG, &a.main},
		{"log", 0, FFS_OPT_VALUE, &a.log},
		{"detach", 'd', FFS_OPT_FLAG, &a.detach},
		{"exit-file", 0, FFS_OPT_VALUE, &a.exit_file},
		{"socket", 0, FFS_OPT_VALUE, &a.socket},
		{"ready-timeout", 0, FFS_OPT_VALUE, &a.ready},
		{"mount", 0, FFS_OPT_VALUE, &a.mount},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
		{0},
	};
	struct ffs_error err = {0};
	int n, own = argc, code;

	for (int i = 1; i < argc && own == argc; i++)
		if (!strcmp(argv[i], "--"))
			own = i;
	if (own < argc) {
		a.command = argv + own + 1;
		a.n_words = (unsigned)(argc - own - 1);
	}
	bool usage = true;

	if (ffs_opts_parse(opts, own, argv, &n, &err) < 0)
		code = wrong_usage(self, err.text);
	else if (a.help)
		code = ffs_usage_help(self);
	else if (n != (a.socket ? 0 : 1))
		code = wrong_usage(
			self, "one SANDBOX or --socket PATH is wanted; what shall be run goes after --");
	else if (check(&a, &err) < 0)
		code = wrong_usage(self, err.text);
	else {
		usage = false;
		code = run(n ? argv[0] : NULL, &a, &err);
	}
	if (code >= EXIT_OURS && code <= EXIT_NOT_FOUND && err.code && !usage)
		ffs_print_failure(self, &err);
	ffs_words_free(&a.env);
	return code;
}

/* The link's process (agent-client.c starts it): SOCKET PID READY_S, and its listener as descriptor 3. */
int ffs_agent_link_main(int argc, char **argv)
{
	struct ffs_agent_link l = {0};

	if (argc != 4)
		return FFS_EXIT_USAGE;
	l.socket = argv[1];
	l.pid = (pid_t)atoi(argv[2]);
	l.ready_s = (unsigned)atoi(argv[3]);
	if (fcntl(3, F_SETFD, FD_CLOEXEC) < 0)
		return FFS_EXIT_FAILURE;
	return ffs_agent_link_run(&l, 3);
}
