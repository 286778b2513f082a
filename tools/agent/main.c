/* forkfs-agent: process 1 of a guest, or a service in it (docs/agent.md).
 *
 * Owns the loop. One thread. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

struct options options = {.vsock = true};
static int epoll_fd = -1;

void say(const char *fmt, ...)
{
	char line[512];
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(line, sizeof(line) - 1, fmt, ap);
	va_end(ap);
	if (n < 0)
		return;
	if (n > (int)sizeof(line) - 2)
		n = sizeof(line) - 2;
	line[n++] = '\n';
	if (write(STDERR_FILENO, line, (size_t)n) < 0)
		return; /* nobody to be told */
}

uint64_t now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void watch_arm(struct watch *w, uint32_t events)
{
	struct epoll_event e = {.events = events, .data.ptr = w};

	if (w->fd < 0 || (w->armed && epoll_ctl(epoll_fd, EPOLL_CTL_MOD, w->fd, &e) == 0))
		return;
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, w->fd, &e) < 0)
		say("forkfs-agent: descriptor %d cannot be waited for: %s", w->fd, strerror(errno));
	else
		w->armed = true;
}

void watch_disarm(struct watch *w)
{
	if (w->armed)
		epoll_ctl(epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
	w->armed = false;
}

void watch_close(struct watch *w)
{
	watch_disarm(w);
	if (w->fd >= 0)
		close(w->fd);
	w->fd = -1;
}

static void usage(void)
{
	say("usage: forkfs-agent [--unix PATH] [--no-vsock] [--mailbox NAME[:TOKEN]]… [--on-mailbox CMD] "
	    "[--ack-address IP] "
	    "[--exit-file PATH] [--halt] [-- MAIN ARGS…]");
	exit(2);
}

void option_mailbox(char *word)
{
	if (options.n_mailboxes < MAILBOXES_MAX)
		options.mailbox[options.n_mailboxes++] = word;
	else
		say("forkfs-agent: mailbox %.80s is one too many, there are at most %u", word, MAILBOXES_MAX);
}

static void parse(int argc, char **argv)
{
	static const struct option longs[] = {{"unix", required_argument, NULL, 'u'},
		{"no-vsock", no_argument, NULL, 'v'}, {"exit-file", required_argument, NULL, 'e'},
		{"halt", no_argument, NULL, 'h'}, {"mailbox", required_argument, NULL, 'm'},
		{"on-mailbox", required_argument, NULL, 'o'}, {"ack-address", required_argument, NULL, 'a'},
		{0}};

	for (int o; (o = getopt_long(argc, argv, "+", longs, NULL)) != -1;) {
		if (o == 'u')
			options.unix_path = optarg;
		else if (o == 'v')
			options.vsock = false;
		else if (o == 'e')
			options.exit_file = optarg;
		else if (o == 'm')
			option_mailbox(optarg);
		else if (o == 'o')
			options.on_mailbox = optarg;
		else if (o == 'a')
			options.ack_address = optarg;
		else if (o == 'h')
			options.halt = true;
		else
			usage();
	}
}

int main(int argc, char **argv)
{
	options.is_init = getpid() == 1;
	if (options.is_init)
		boot();
	parse(argc, argv);
	signal(SIGPIPE, SIG_IGN);
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	/* orphans of what it starts come to a service too, so none of them stays a zombie of another's */
	if (epoll_fd < 0 || prctl(PR_SET_CHILD_SUBREAPER, 1) < 0) {
		say("forkfs-agent: %s", strerror(errno));
		return 1;
	}
	reaper_start();
	mailboxes_start();
	channels_start();
	say("forkfs-agent: up");
	if (optind < argc)
		process_main_argv(argv + optind);
	for (;;) {
		struct epoll_event e;
		int look = mailboxes_due_ms(), due = process_due_ms();
		int n = epoll_wait(epoll_fd, &e, 1, due >= 0 && (look < 0 || due < look) ? due : look);

		if (n == 1) {
			struct watch *w = e.data.ptr;

			w->ready(w, e.events);
		} else if (n < 0 && errno != EINTR) {
			say("forkfs-agent: %s", strerror(errno));
			return 1;
		}
		/* only now: they may end, and free, what the event was of */
		mailboxes_look();
		process_tick();
	}
}
