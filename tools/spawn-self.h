/* Processes of this program that work for others in the background: the link to a guest's agent, the guard of a pool. */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

/* Start this program once more, as argv[0], in a session of its own. All it has of the caller's is `fd`, as descriptor 3,
 * and stderr where `says` is true; else /dev/null. *pid is a child of the caller's process. 0 or -errno. Any thread. */
int ffs_spawn_self(char *const argv[], int fd, bool says, pid_t *pid);
