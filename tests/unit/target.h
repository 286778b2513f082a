/* Processes that tests of engine/uffd work on: started, observed through /proc, ended by pid. */
#pragma once

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"

/* A page that parent and children share. */
static inline void *shared_page(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		abort();
	return p;
}

/* Fork a child that dies with us and runs fn(arg), which calls target_ready() once. Returns when it did (or
 * exited). */
static int target_pipe_[2];
static int target_keep = -1; /* a descriptor that the next child keeps */
static inline void target_ready(void)
{
	close(target_pipe_[1]);
}

static inline struct ffs_proc_id target_start(void (*fn)(void *), void *arg)
{
	struct ffs_proc_id id;
	char c;

	if (pipe(target_pipe_) < 0)
		abort();
	id.pid = fork();
	if (id.pid < 0)
		abort();
	if (id.pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* nothing of ours keeps a socket or a uffd of the test open; what is left of the pipe goes
		 * with target_ready() */
		for (int fd = 3; fd < 256; fd++)
			if (fd != target_pipe_[1] && fd != target_keep)
				close(fd);
		fn(arg);
		_exit(0);
	}
	close(target_pipe_[1]);
	if (read(target_pipe_[0], &c, 1) != 0)
		abort();
	close(target_pipe_[0]);
	if (ffs_proc_stat(id.pid, NULL, &id.start) < 0)
		abort();
	return id;
}

static inline void target_end(struct ffs_proc_id id)
{
	kill(id.pid, SIGKILL);
	while (waitpid(id.pid, NULL, 0) < 0 && errno == EINTR)
		;
}

static inline unsigned target_fds(pid_t pid)
{
	char path[64];
	unsigned n = 0;

	snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
	DIR *d = opendir(path);

	if (!d)
		return ~0u;
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

/* A line of /proc/PID/status, "" when there is none. */
static inline void target_status(pid_t pid, const char *key, char out[128])
{
	char path[64], line[256];

	out[0] = '\0';
	snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
	FILE *f = fopen(path, "re");

	while (f && fgets(line, sizeof(line), f))
		if (strncmp(line, key, strlen(key)) == 0)
			snprintf(out, 128, "%.127s", line);
	if (f)
		fclose(f);
}

static inline char *target_maps(pid_t pid)
{
	char path[64], *text = NULL;

	snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	if (ffs_read_file(path, 1 << 20, &text, NULL) < 0)
		return NULL;
	return text;
}

/* Wait (at most ms) for a condition; true when it held. */
#define target_wait(cond, ms)                                                                                \
	({                                                                                                   \
		uint64_t end_ = ffs_now_ns() + (uint64_t)(ms)*FFS_NS_PER_MS;                                 \
		bool ok_;                                                                                    \
		while (!(ok_ = (cond)) && ffs_now_ns() < end_)                                               \
			poll(NULL, 0, 1);                                                                    \
		ok_;                                                                                         \
	})
