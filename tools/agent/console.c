/* What a main command says that no host takes: on the agent's own stderr, the console of a process 1.
 *
 * Through a description of its own, which does not block: a console that stands holds up the main command,
 * and nothing else. Owns the piece that waits for room. One thread. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <unistd.h>

static void on_room(struct watch *w, uint32_t events);

static struct watch console = {.fd = -1, .ready = on_room};
static uint8_t waits[AGENT_PAYLOAD_MAX];
static size_t len;
static bool opened;

bool console_room(void)
{
	return !len;
}

static void flush(void)
{
	while (len) {
		ssize_t n = write(console.fd, waits, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) {
			watch_arm(&console, EPOLLOUT);
			return;
		}
		if (n <= 0)
			len = 0; /* nobody to be told */
		else
			memmove(waits, waits + n, len -= (size_t)n);
	}
	watch_disarm(&console);
}

static void on_room(struct watch *w, uint32_t events)
{
	flush();
	if (console_room())
		process_resume(NULL);
}

/* A file never blocks, and has one place to write at, which another description would not share. */
static int open_again(void)
{
	struct stat st;

	if (fstat(STDERR_FILENO, &st) == 0 && S_ISREG(st.st_mode))
		return fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
	return open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

void console_put(const void *bytes, size_t n)
{
	if (!opened)
		console.fd = open_again();
	opened = true;
	if (console.fd < 0 || n > sizeof(waits))
		return;
	memcpy(waits, bytes, n);
	len = n;
	flush();
}
