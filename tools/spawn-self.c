/* Owns nothing. Any thread; no locks. */
#include "spawn-self.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <unistd.h>

#define GIVEN 3

int ffs_spawn_self(char *const argv[], int fd, bool says, pid_t *pid)
{
	posix_spawn_file_actions_t fa;
	posix_spawnattr_t attr;
	sigset_t none, all;
	int r;

	sigemptyset(&none);
	sigfillset(&all);
	posix_spawn_file_actions_init(&fa);
	posix_spawnattr_init(&attr);
	r = posix_spawnattr_setsigmask(&attr, &none);
	if (!r)
		r = posix_spawnattr_setsigdefault(&attr, &all);
	if (!r)
		r = posix_spawnattr_setflags(
			&attr, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	for (int i = 0; !r && i < (says ? STDERR_FILENO : GIVEN); i++)
		r = posix_spawn_file_actions_addopen(&fa, i, "/dev/null", O_RDWR, 0);
	/* also where it is that one already: glibc lets the new process have it then (Austin Group issue 411) */
	if (!r)
		r = posix_spawn_file_actions_adddup2(&fa, fd, GIVEN);
	if (!r)
		r = posix_spawn_file_actions_addclosefrom_np(&fa, GIVEN + 1);
	if (!r)
		r = posix_spawn(pid, "/proc/self/exe", &fa, &attr, argv, environ);
	posix_spawnattr_destroy(&attr);
	posix_spawn_file_actions_destroy(&fa);
	return -r;
}
