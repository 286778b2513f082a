/* The end of a guest whose main command has ended, when it is to power off then (--halt).
 *
 * The host that is told of the end has it when it says so (HANGUP of that stream's group, or it is gone); until then what
 * it was told may lie anywhere between us and it, and would be lost with the machine. A host that says nothing is not
 * waited for long. */
#include "agent.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>

#define PATIENCE_S 10

static const struct conn *told; /* NULL: nobody is waited for */
static uint32_t group;

static void give_up(struct watch *w, uint32_t events)
{
	power_off();
}

void halt_when_heard(const struct conn *c, uint32_t stream)
{
	static struct watch patience = {.fd = -1, .ready = give_up};
	struct itimerspec t = {.it_value.tv_sec = PATIENCE_S};

	if (!c)
		power_off();
	patience.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (patience.fd < 0 || timerfd_settime(patience.fd, 0, &t, NULL) < 0) {
		say("forkfs-agent: no clock to wait for the host by: %s", strerror(errno));
		power_off();
	}
	told = c;
	group = stream >> 16;
	watch_arm(&patience, EPOLLIN);
}

void halt_heard(const struct conn *c, bool any, uint32_t which)
{
	if (told && told == c && (any || which == group))
		power_off();
}
