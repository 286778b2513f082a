/* Starting a command: what it is connected to, and the fork. */
#pragma once

#include "agent.h"

struct spawned {
	pid_t pid;
	int born; /* end of file when its exec has worked; else an int, the errno. Not blocking, as the others */
	int in, out, err; /* -1: none. A terminal is out, and a duplicate of it is in */
};

/* 0 or -errno. inherit: stdout and stderr are the agent's own (process 1's console), stdin is `input`, which stays the
 * caller's, or, with -1, /dev/null. */
int spawn_command(const struct agent_exec *e, bool inherit, int input, struct spawned *out);
