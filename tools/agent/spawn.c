/* Starting a command (spawn.h). The agent has one thread and is small, so a plain fork is right and cheap; between it and
 * exec there is nothing but system calls. */
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

/* The ends of a command's files: [0] ours, [1] its. */
struct ends {
	int in[2], out[2], err[2], born[2];
};

static void close_pair(int pair[2])
{
	for (int i = 0; i < 2; i++)
		if (pair[i] >= 0)
			close(pair[i]);
	pair[0] = pair[1] = -1;
}

static void close_all(struct ends *f)
{
	close_pair(f->in);
	close_pair(f->out);
	close_pair(f->err);
	close_pair(f->born);
}

/* ours_reads: [0] is the reading end. Only ours is not blocking. */
static int make_pipe(int pair[2], bool ours_reads)
{
	int p[2];

	if (pipe2(p, O_CLOEXEC) < 0)
		return -errno;
	pair[0] = p[ours_reads ? 0 : 1];
	pair[1] = p[ours_reads ? 1 : 0];
	return fcntl(pair[0], F_SETFL, O_NONBLOCK) < 0 ? -errno : 0;
}

static int make_terminal(const struct agent_exec *e, struct ends *f)
{
	struct winsize size = {.ws_row = e->rows, .ws_col = e->cols};
	int unlock = 0;

	f->out[0] = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (f->out[0] < 0 || ioctl(f->out[0], TIOCSPTLCK, &unlock) < 0 ||
		ioctl(f->out[0], TIOCSWINSZ, &size) < 0)
		return -errno;
	/* by the master itself: in whatever place /dev/pts is */
	f->out[1] = ioctl(f->out[0], TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (f->out[1] < 0)
		return -errno;
	f->in[0] = fcntl(f->out[0], F_DUPFD_CLOEXEC, 3);
	return f->in[0] < 0 ? -errno : 0;
}

static int make_ends(const struct agent_exec *e, bool inherit, struct ends *f)
{
	bool tty = e->flags & AGENT_EXEC_TTY && !inherit;
	int r = make_pipe(f->born, true);

	if (!r && tty)
		r = make_terminal(e, f);
	else if (!r && !inherit && e->flags & AGENT_EXEC_STDIN)
		r = make_pipe(f->in, false);
	if (!r && !tty && !inherit) {
		r = make_pipe(f->out, true);
		if (!r)
			r = make_pipe(f->err, true);
	}
	return r;
}

/* ---- in the child ---- */

static void defaults(void)
{
	sigset_t none;

	for (int s = 1; s < NSIG; s++)
		signal(s, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static int connect_ends(const struct ends *f, bool tty, int input)
{
	int in = input >= 0 ? input : f->in[1];

	if (tty) {
		if (ioctl(f->out[1], TIOCSCTTY, 0) < 0)
			return -1;
		return dup2(f->out[1], 0) < 0 || dup2(f->out[1], 1) < 0 || dup2(f->out[1], 2) < 0 ? -1 : 0;
	}
	if (in < 0)
		in = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (in < 0 || dup2(in, 0) < 0)
		return -1;
	if (f->out[1] < 0)
		return 0; /* process 1's */
	return dup2(f->out[1], 1) < 0 || dup2(f->err[1], 2) < 0 ? -1 : 0;
}

static void become(const struct agent_exec *e, const struct ends *f, bool tty, int input)
	__attribute__((noreturn));
static void become(const struct agent_exec *e, const struct ends *f, bool tty, int input)
{
	int why;

	defaults();
	if (setsid() >= 0 && connect_ends(f, tty, input) == 0 && (!e->cwd[0] || chdir(e->cwd) == 0)) {
		for (unsigned i = 0; i < e->envc; i++)
			putenv((char *)(uintptr_t)e->env[i]);
		execvp(e->argv[0], (char *const *)(uintptr_t)e->argv);
	}
	why = errno;
	if (write(f->born[1], &why, sizeof(why)) < 0)
		_exit(126);
	_exit(127);
}

int spawn_command(const struct agent_exec *e, bool inherit, int input, struct spawned *out)
{
	struct ends f = {{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}};
	int r = make_ends(e, inherit, &f);
	pid_t pid = r ? -1 : fork();

	if (pid == 0)
		become(e, &f, e->flags & AGENT_EXEC_TTY && !inherit, input);
	if (pid < 0) {
		r = r ? r : -errno;
		close_all(&f);
		return r;
	}
	*out = (struct spawned){
		.pid = pid, .born = f.born[0], .in = f.in[0], .out = f.out[0], .err = f.err[0]};
	f.born[0] = f.in[0] = f.out[0] = f.err[0] = -1;
	close_all(&f);
	return 0;
}
