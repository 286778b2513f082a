/* `counter[,ms=100]`: prints "tick N" every ms milliseconds, N from 1. One thread. */
#include "guest.h"

#include <time.h>

int counter_main(int argc, char **argv)
{
	uint64_t ms = guest_arg(argc, argv, "ms", 100);
	struct timespec step = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};

	for (uint64_t n = 1;; n++) {
		guest_say("tick %llu", (unsigned long long)n);
		nanosleep(&step, NULL);
	}
}
