/* The commands that run for a host, and the main command: the list of them, their output and their ends.
 *
 * An EXIT is said when a command was reaped and all that it had written until then was passed on: what lies in its pipes
 * at that moment is counted, so neither a last line is lost nor is a grandchild waited for that keeps them open. Flow is
 * limited by the host's credit and by what its connection takes; a command that is not read waits in its own write.
 *
 * The main command has the agent's stdout and stderr, or pipes for a host that keeps its log; when that host is gone, and in
 * a guest that was restored, what comes through these goes to the agent's stderr. After its end they are read until nobody
 * has them any more or nothing has come for a while: a tee or a logger behind it may have the last words. */
#include "agent.h"
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PROCESSES_MAX 1024u
#define PTY_REST 65536u /* of a terminal, what may come after its command has ended: it cannot be counted */

#define QUIET_NS 1000000000ull
#define QUIET_MAX_NS 5000000000ull /* who is never silent is not waited for longer */

struct process {
	struct watch born, in, out, err;
	struct conn *c; /* NULL: nobody is told any more */
	uint32_t stream;
	pid_t pid;
	int pidfd;
	bool tty, ended, is_main, end_of_input;
	int status;
	uint32_t credit;
	size_t rest_out, rest_err; /* to be passed on yet; counts once it has ended */
	uint8_t *input;
	size_t input_len;
	struct process *next;
};

static struct process *all;
static unsigned count;
static pid_t main_pid = -1; /* -1: it was never started; -2: it is being started */
/* The main command, when it has ended and its pipes are still open, until when that is. */
static struct process *draining;
static uint64_t quiet_at_ns, drained_at_ns;

static void on_output(struct process *p, struct watch *w);
static void refresh(struct process *p);

static struct process *find(const struct conn *c, uint32_t stream)
{
	for (struct process *p = all; p; p = p->next)
		if (p->c == c && p->stream == stream)
			return p;
	return NULL;
}

static void tell(struct process *p, uint8_t type, const void *payload, size_t len)
{
	if (p->c)
		conn_send(p->c, type, p->stream, payload, len);
}

static void refuse(struct conn *c, uint32_t stream, int code, const char *text)
{
	uint8_t payload[260];
	struct agent_writer w = {payload, 0, sizeof(payload), false};
	size_t len = strlen(text);

	agent_put(&w, (uint64_t)code, 4);
	agent_put_bytes(&w, text, len > 256 ? 256 : len);
	if (c)
		conn_send(c, AGENT_REFUSED, stream, payload, w.len);
}

static void close_streams(struct process *p)
{
	watch_close(&p->in);
	watch_close(&p->out);
	watch_close(&p->err);
	free(p->input);
	p->input = NULL;
	p->input_len = 0;
}

/* Its entry goes when it is reaped and said. */
static void forget(struct process *p)
{
	struct process **at = &all;

	while (*at != p)
		at = &(*at)->next;
	*at = p->next;
	count--;
	if (draining == p)
		draining = NULL;
	close_streams(p);
	watch_close(&p->born);
	if (p->pidfd >= 0)
		close(p->pidfd);
	free(p);
}

/* ---- the main command's end ---- */

static void main_ended(const struct process *p)
{
	int code = WIFSIGNALED(p->status) ? 128 + WTERMSIG(p->status) : WEXITSTATUS(p->status);

	exit_file_write(code);
	say("forkfs-agent: main ended: %d", code);
}

/* ---- output ---- */

static void say_exit(struct process *p)
{
	uint8_t end[2] = {WIFSIGNALED(p->status) ? AGENT_SIGNALLED : AGENT_EXITED,
		(uint8_t)(WIFSIGNALED(p->status) ? WTERMSIG(p->status) : WEXITSTATUS(p->status))};
	bool halt = p->is_main && options.halt && options.is_init;
	const struct conn *c = p->c;
	uint32_t stream = p->stream;

	tell(p, AGENT_EXIT, end, 2);
	forget(p);
	if (halt)
		halt_when_heard(c, stream);
}

/* Somebody takes its output, and has room. */
static bool is_taken(const struct process *p)
{
	return p->c ? p->credit && !conn_full(p->c) : p->is_main && console_room();
}

static void refresh_one(struct process *p, struct watch *w)
{
	if (w->fd < 0)
		return;
	/* not even asked for: a pipe whose writers are gone would report that again and again */
	if (is_taken(p))
		watch_arm(w, EPOLLIN);
	else
		watch_disarm(w);
}

static void refresh(struct process *p)
{
	refresh_one(p, &p->out);
	refresh_one(p, &p->err);
}

/* Pass on a piece; closed at its end, or when nothing is left that its command wrote. */
static void on_output(struct process *p, struct watch *w)
{
	size_t *rest = w == &p->out ? &p->rest_out : &p->rest_err, most = AGENT_PAYLOAD_MAX;
	uint8_t piece[AGENT_PAYLOAD_MAX];
	ssize_t n;

	if (!is_taken(p)) {
		refresh(p);
		return;
	}
	if (p->c && most > p->credit)
		most = p->credit;
	if (p->ended && most > *rest)
		most = *rest;
	n = most ? read(w->fd, piece, most) : 0;
	if (n < 0 && (errno == EINTR || (errno == EAGAIN && (!p->ended || draining == p))))
		return;
	if (n > 0) {
		p->credit -= p->c ? (uint32_t)n : 0;
		*rest -= p->ended ? (size_t)n : 0;
		if (draining == p)
			quiet_at_ns = now_ns(CLOCK_MONOTONIC) + QUIET_NS;
		if (p->c)
			tell(p, w == &p->out ? AGENT_STDOUT : AGENT_STDERR, piece, (size_t)n);
		else
			console_put(piece, (size_t)n);
	}
	if (n <= 0 || (p->ended && !*rest))
		watch_close(w);
	refresh(p);
}

/* After each of its events: true when it is over, and gone. */
static bool is_over(struct process *p)
{
	if (!p->ended || p->born.fd >= 0)
		return false;
	if ((p->c || p->is_main) && (p->out.fd >= 0 || p->err.fd >= 0))
		return false;
	say_exit(p);
	return true;
}

static void out_ready(struct watch *w, uint32_t events)
{
	struct process *p = (struct process *)((char *)w - offsetof(struct process, out));

	on_output(p, w);
	is_over(p);
}

static void err_ready(struct watch *w, uint32_t events)
{
	struct process *p = (struct process *)((char *)w - offsetof(struct process, err));

	on_output(p, w);
	is_over(p);
}

/* ---- input ---- */

static void taken(struct process *p, size_t n)
{
	uint8_t le[4];
	struct agent_writer w = {le, 0, 4, false};

	agent_put(&w, n, 4);
	if (n)
		tell(p, AGENT_WINDOW_MORE, le, 4);
}

static void on_input(struct watch *w, uint32_t events)
{
	struct process *p = (struct process *)((char *)w - offsetof(struct process, in));

	while (w->fd >= 0 && p->input_len) {
		ssize_t n = write(w->fd, p->input, p->input_len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			break;
		if (n < 0) { /* nobody reads it any more: what comes is swallowed */
			watch_close(w);
			break;
		}
		memmove(p->input, p->input + n, p->input_len - (size_t)n);
		p->input_len -= (size_t)n;
		taken(p, (size_t)n);
	}
	if (w->fd < 0 && p->input_len) {
		taken(p, p->input_len);
		p->input_len = 0;
	}
	if (w->fd >= 0 && p->input_len)
		watch_arm(w, EPOLLOUT);
	else if (p->end_of_input)
		watch_close(w);
	else
		watch_disarm(w);
}

static void add_input(struct process *p, const uint8_t *data, size_t len)
{
	if (p->in.fd < 0) {
		taken(p, len);
		return;
	}
	if (!p->input)
		p->input = malloc(AGENT_WINDOW);
	if (!p->input || len > AGENT_WINDOW - p->input_len) {
		/* more than was asked for */
		watch_close(&p->in);
		return;
	}
	memcpy(p->input + p->input_len, data, len);
	p->input_len += len;
	on_input(&p->in, 0);
}

static void end_input(struct process *p)
{
	if (p->tty && p->in.fd >= 0)
		add_input(p, (const uint8_t *)"\4", 1);
	else {
		p->end_of_input = true;
		on_input(&p->in, 0);
	}
}

/* ---- beginning ---- */

/* The pipe that its exec closes: empty, it runs; else it says why not. */
static void on_born(struct watch *w, uint32_t events)
{
	struct process *p = (struct process *)((char *)w - offsetof(struct process, born));
	int why = 0;
	ssize_t n = read(w->fd, &why, sizeof(why));
	uint8_t pid[4];
	struct agent_writer out = {pid, 0, 4, false};

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	watch_close(w);
	if (n == sizeof(why)) {
		refuse(p->c, p->stream, why, strerror(why));
		p->c = NULL;
		close_streams(p);
		if (p->is_main)
			main_pid = -1;
		p->is_main = false;
	} else {
		if (p->is_main)
			main_pid = p->pid;
		agent_put(&out, (uint64_t)p->pid, 4);
		tell(p, AGENT_STARTED, pid, 4);
		refresh(p);
	}
	is_over(p);
}

static struct process *add(struct conn *c, uint32_t stream)
{
	struct process *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	*p = (struct process){.c = c,
		.stream = stream,
		.pidfd = -1,
		.credit = AGENT_WINDOW,
		.born = {.fd = -1, .ready = on_born},
		.in = {.fd = -1, .ready = on_input},
		.out = {.fd = -1, .ready = out_ready},
		.err = {.fd = -1, .ready = err_ready},
		.next = all};
	all = p;
	count++;
	return p;
}

static void start(struct conn *c, uint32_t stream, const struct agent_exec *e, bool is_main)
{
	struct process *p = add(c, stream);
	struct spawned s;
	int r;

	if (!p) {
		refuse(c, stream, ENOMEM, "no memory for another command");
		return;
	}
	if (is_main)
		exit_file_remove();
	r = spawn_command(e, is_main && !(e->flags & AGENT_EXEC_OUTPUT), -1, &s);
	if (r < 0) {
		refuse(c, stream, -r, strerror(-r));
		forget(p);
		return;
	}
	p->pid = s.pid;
	/* not reaped: the number is its own */
	p->pidfd = (int)syscall(SYS_pidfd_open, s.pid, 0);
	p->tty = e->flags & AGENT_EXEC_TTY && !is_main;
	p->is_main = is_main;
	p->born.fd = s.born;
	p->in.fd = s.in;
	p->out.fd = s.out;
	p->err.fd = s.err;
	if (is_main)
		main_pid = -2;
	watch_arm(&p->born, EPOLLIN);
}

void process_exec(struct conn *c, const struct agent_frame *f)
{
	static struct agent_exec e;

	if (!f->stream || find(c, f->stream) || !agent_exec_parse(f, &e))
		refuse(c, f->stream, EINVAL, "that is no command, or its number is in use");
	else if (count >= PROCESSES_MAX)
		refuse(c, f->stream, EAGAIN, "too many commands run in this guest");
	else
		start(c, f->stream, &e, false);
}

/* Requests are taken one after the other, and main_pid is set before the next is looked at: so it is started once,
 * whoever asks at the same time. A start that failed may be tried again. */
void process_main(struct conn *c, const struct agent_frame *f)
{
	static struct agent_exec e;

	if (!f->stream || find(c, f->stream) || !agent_exec_parse(f, &e))
		refuse(c, f->stream, EINVAL, "that is no command, or its number is in use");
	else if (main_pid != -1)
		refuse(c, f->stream, EALREADY, "container main already spawned");
	else {
		e.flags &= AGENT_EXEC_OUTPUT;
		start(c, f->stream, &e, true);
	}
}

void process_main_argv(char **argv)
{
	static struct agent_exec e;

	e = (struct agent_exec){.cwd = ""};
	for (; argv[e.argc] && e.argc < AGENT_WORDS_MAX; e.argc++)
		e.argv[e.argc] = argv[e.argc];
	start(NULL, 0, &e, true);
}

/* ---- what is said of one ---- */

static void resize(struct process *p, unsigned rows, unsigned cols)
{
	struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)cols};

	if (p->tty && p->out.fd >= 0)
		ioctl(p->out.fd, TIOCSWINSZ, &size);
}

static void send_signal(const struct process *p, int number)
{
	/* it is a session of its own, so its group has its number; which is its own until it is reaped */
	if (!p->ended && number > 0 && number < NSIG && kill(-p->pid, number) < 0 && p->pidfd >= 0)
		syscall(SYS_pidfd_send_signal, p->pidfd, number, NULL, 0);
}

void process_frame(struct conn *c, const struct agent_frame *f)
{
	struct process *p = f->stream ? find(c, f->stream) : NULL;
	struct agent_reader r = {f->payload, f->len, false};
	uint64_t a;

	if (!p)
		return; /* it has ended meanwhile */
	switch (f->type) {
	case AGENT_STDIN:
		add_input(p, f->payload, f->len);
		break;
	case AGENT_STDIN_END:
		end_input(p);
		break;
	case AGENT_SIGNAL:
		a = agent_get(&r, 1);
		send_signal(p, (int)a);
		break;
	case AGENT_RESIZE:
		a = agent_get(&r, 2);
		resize(p, (unsigned)a, (unsigned)agent_get(&r, 2));
		break;
	case AGENT_WINDOW_MORE:
		a = agent_get(&r, 4);
		/* never more than a window altogether */
		p->credit = (uint32_t)(a > AGENT_WINDOW - p->credit ? AGENT_WINDOW : p->credit + a);
		refresh(p);
		break;
	default:
		break; /* of a later version */
	}
}

void process_hangup(const struct conn *c, bool any, uint32_t group)
{
	for (struct process *p = all, *next; p; p = next) {
		next = p->next;
		if (p->c != c || (!any && p->stream >> 16 != group))
			continue;
		p->c = NULL;
		/* the main command is the guest's, not the connection's */
		if (p->is_main) {
			refresh(p);
		} else {
			send_signal(p, SIGHUP);
			close_streams(p);
		}
		is_over(p);
	}
	halt_heard(c, any, group);
}

void process_resume(const struct conn *c)
{
	for (struct process *p = all; p; p = p->next)
		if (p->c == c && p->born.fd < 0)
			refresh(p);
}

static size_t left_in(const struct watch *w, bool tty)
{
	int n = 0;

	if (tty)
		return PTY_REST;
	return w->fd >= 0 && ioctl(w->fd, FIONREAD, &n) == 0 && n > 0 ? (size_t)n : 0;
}

/* What was written until now is passed on, and nothing after it. */
static void count_rest(struct process *p)
{
	p->rest_out = left_in(&p->out, p->tty);
	p->rest_err = left_in(&p->err, false);
	if (p->out.fd >= 0 && !p->rest_out)
		watch_close(&p->out);
	if (p->err.fd >= 0 && !p->rest_err)
		watch_close(&p->err);
}

static void begin_drain(struct process *p)
{
	draining = p;
	p->rest_out = p->rest_err = SIZE_MAX;
	quiet_at_ns = now_ns(CLOCK_MONOTONIC) + QUIET_NS;
	drained_at_ns = now_ns(CLOCK_MONOTONIC) + QUIET_MAX_NS;
}

int process_due_ms(void)
{
	uint64_t now = now_ns(CLOCK_MONOTONIC),
		 due = quiet_at_ns < drained_at_ns ? quiet_at_ns : drained_at_ns;

	return !draining ? -1 : due <= now ? 0 : (int)((due - now + 999999) / 1000000);
}

void process_tick(void)
{
	struct process *p = draining;

	if (!p || process_due_ms() > 0)
		return;
	/* not silent: it is not taken */
	if (now_ns(CLOCK_MONOTONIC) < drained_at_ns && left_in(&p->out, false) + left_in(&p->err, false)) {
		quiet_at_ns = now_ns(CLOCK_MONOTONIC) + QUIET_NS;
		return;
	}
	draining = NULL;
	count_rest(p);
	refresh(p);
	is_over(p);
}

bool process_ended(pid_t pid, int status)
{
	struct process *p = all;

	while (p && (p->ended || p->pid != pid))
		p = p->next;
	if (!p)
		return false;
	if (p->born.fd >= 0)
		p->born.ready(&p->born, 0); /* its exec is over, one way or the other */
	p->ended = true;
	p->status = status;
	if (p->is_main)
		main_ended(p);
	if (p->is_main && p->out.fd >= 0)
		begin_drain(p);
	else
		count_rest(p);
	refresh(p);
	is_over(p);
	return true;
}
