/* Test builds only: what a named fault point does is read from a file at each pass (see fault.h).
 *
 * Threads: any; `lock` guards the pass counters only and is never held while a point acts. */
#include "base/fault.h"

#ifdef FFS_FAULTS

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "base/log.h"
#include "base/util.h"

#define MAX_RULES 128

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	char text[160];
	unsigned passes;
} seen[MAX_RULES];

static const struct {
	const char *name;
	int code;
} codes[] = {{"EIO", EIO}, {"ENOSPC", ENOSPC}, {"ENOMEM", ENOMEM}, {"EAGAIN", EAGAIN}, {"EPERM", EPERM},
	{"ESRCH", ESRCH}, {"EINVAL", EINVAL}, {"ETIMEDOUT", ETIMEDOUT}, {"EBUSY", EBUSY}, {"ENOENT", ENOENT},
	{"ENOTTY", ENOTTY}};

/* How often the rule was passed since its text was first seen, this pass included. */
static unsigned count_pass(const char *rule)
{
	unsigned n = 0;

	pthread_mutex_lock(&lock);
	unsigned place = MAX_RULES;

	for (unsigned i = 0; i < MAX_RULES; i++) {
		if (strcmp(seen[i].text, rule) == 0) {
			place = i;
			break;
		}
		if (place == MAX_RULES && (!seen[i].text[0] || strcmp(seen[i].text, " ") == 0))
			place = i;
	}
	if (place < MAX_RULES) {
		snprintf(seen[place].text, sizeof(seen[place].text), "%s", rule);
		n = ++seen[place].passes;
	}
	pthread_mutex_unlock(&lock);
	return n;
}

/* A rule that is no longer in the file starts anew when it comes back. */
static void forget_missing(const char *file)
{
	pthread_mutex_lock(&lock);
	for (unsigned i = 0; i < MAX_RULES; i++)
		if (seen[i].text[0] && strcmp(seen[i].text, " ") != 0 && !strstr(file, seen[i].text)) {
			seen[i].passes = 0;
			seen[i].text[0] = ' '; /* free: matches nothing, taken again by the next new rule */
			seen[i].text[1] = '\0';
		}
	pthread_mutex_unlock(&lock);
}

static void hold(const char *path)
{
	char mark[256], dir[256];

	snprintf(mark, sizeof(mark), "%.240s.held", path);
	snprintf(dir, sizeof(dir), "%.250s", path);
	char *slash = strrchr(dir, '/');

	if (slash)
		*slash = '\0';
	_cleanup_close_ int in = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);

	if (in < 0 || inotify_add_watch(in, slash ? dir : ".", IN_CREATE | IN_MOVED_TO) < 0)
		return;
	_cleanup_close_ int m = open(mark, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	uint64_t deadline = ffs_now_ns() + 60 * FFS_NS_PER_S;
	char junk[4096];

	while (access(path, F_OK) != 0 && ffs_now_ns() < deadline) {
		struct pollfd p = {.fd = in, .events = POLLIN};

		if (poll(&p, 1, ffs_ms_until(deadline)) > 0 && read(in, junk, sizeof(junk)) < 0 &&
			errno != EAGAIN)
			return;
	}
}

static int act(const char *name, const char *action)
{
	if (strncmp(action, "error:", 6) == 0) {
		for (unsigned i = 0; i < FFS_ARRAY_LEN(codes); i++)
			if (strcmp(action + 6, codes[i].name) == 0) {
				ffs_log(FFS_LOG_DEBUG, "fault point %s: %s", name, action);
				return -codes[i].code;
			}
		return -EIO;
	}
	if (strcmp(action, "kill") == 0)
		raise(SIGKILL);
	else if (strcmp(action, "segv") == 0)
		raise(SIGSEGV);
	else if (strcmp(action, "stop") == 0)
		kill(getpid(), SIGSTOP);
	else if (strncmp(action, "hold:", 5) == 0)
		hold(action + 5);
	else if (strncmp(action, "delay:", 6) == 0)
		poll(NULL, 0, atoi(action + 6));
	return 0;
}

enum kind { POINT, MUTANT, PLACE };

static int lookup(const char *name, enum kind kind)
{
	const char *path = getenv("FORKFS_FAULT_FILE");
	_cleanup_free_ char *text = NULL;

	if (!path || ffs_read_file(path, 65536, &text, NULL) < 0)
		return 0;
	forget_missing(text);
	char *save = NULL;

	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		char point[80], action[200], rule[160];
		unsigned nth = 0;

		if (sscanf(line, "%79s %199s", point, action) != 2)
			continue;
		snprintf(rule, sizeof(rule), "%.159s", line);
		char *at = strchr(point, '@');

		if (at) {
			*at = '\0';
			nth = (unsigned)atoi(at + 1);
		}
		if (kind == MUTANT) {
			if (strncmp(point, "mutant:", 7) == 0 && strcmp(point + 7, name) == 0)
				return 1;
			continue;
		}
		if (strcmp(point, name) != 0 && (kind == PLACE || strcmp(point, "*") != 0))
			continue;
		unsigned pass = count_pass(rule);

		if (nth && pass != nth)
			continue;
		int r = act(name, action);

		if (r)
			return r;
	}
	return 0;
}

int ffs_fault_point(const char *name)
{
	return lookup(name, POINT);
}

void ffs_fault_place(const char *name)
{
	(void)lookup(name, PLACE);
}

int ffs_fault_mutant(const char *name)
{
	return lookup(name, MUTANT);
}

#else
typedef int ffs_fault_not_built; /* an empty translation unit is not C */
#endif
