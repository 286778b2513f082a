/* Owns the spawner process: forks one injector per request, so that the daemon never forks after it has a
 * userfaultfd.
 *
 * Threads: one, in its own process. No locks. Waits for requests only; injectors run beside it and are reaped
 * by the kernel. */
#include "uffd/injector.h"

#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "uffd/helper.h"

static void answer_failure(int sock, int code)
{
	struct ffs_inject_reply reply = {0};

	reply.code = ffs_error_errno(&reply.err, code, "cannot start the injector process");
	if (ffs_msg_send(sock, &reply, sizeof(reply), NULL, 0) < 0)
		return; /* who asked is gone */
}

void ffs_spawner_body(int sock, void *unused)
{
	struct sigaction ign = {.sa_handler = SIG_IGN};
	struct ffs_inject_request req;
	int fds[FFS_MSG_FDS];

	sigaction(SIGCHLD, &ign, NULL); /* no zombies */
	for (;;) {
		int r = ffs_msg_recv(sock, &req, sizeof(req), fds);

		if (r == -EPROTO)
			continue;
		if (r < 0)
			return; /* the daemon is gone, and so is everybody who could ask */
		_cleanup_close_ int reply = fds[0];

		for (unsigned i = 1; i < FFS_MSG_FDS; i++)
			ffs_close_fd(&fds[i]);
		if (reply < 0)
			continue;
		pid_t pid = fork();

		if (pid == 0) {
			close(sock);
			ffs_injector_run(&req, reply);
			_exit(0);
		}
		if (pid < 0)
			answer_failure(reply, errno);
	}
}
