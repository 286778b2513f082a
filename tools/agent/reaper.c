/* Reaps every child: those of process.c and mailboxes.c are told their status, orphans are of nobody.
 *
 * SIGCHLD is only a hint. All ended children are asked for one after the other, and each is taken as itself
 * (WNOWAIT, then its own number), so no child hides another and a status goes to whom it belongs. */
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

static struct watch hint = {.fd = -1};

static void reap(struct watch *w, uint32_t events)
{
	struct signalfd_siginfo si;
	siginfo_t info;

	while (read(w->fd, &si, sizeof(si)) == sizeof(si))
		;
	for (;;) {
		int status;

		info.si_pid = 0;
		if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0 || !info.si_pid)
			return;
		if (waitpid(info.si_pid, &status, WNOHANG) == info.si_pid &&
			!process_ended(info.si_pid, status))
			mailboxes_ended(info.si_pid, status);
	}
}

void reaper_start(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	hint.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	hint.ready = reap;
	if (hint.fd < 0)
		say("forkfs-agent: ended children cannot be seen: %s", strerror(errno));
	else
		watch_arm(&hint, EPOLLIN);
}
