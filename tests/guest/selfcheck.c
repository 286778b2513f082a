/* `selfcheck[,mib=64][,threads=1][,step=1][,words=8][,every=4]`: a guest that knows whether it was restored
 * whole.
 *
 * Each thread has a power of two of pages and goes round them for ever, page i * step in turn (step odd; 1:
 * in order). In generation g it expects g - 1 in `words` words spread over the page, and writes g. What it
 * expects - the generation, the place in the round - is in registers only, so it travels in the vmstate and
 * not in memory: a memory image of another instant than the vmstate, be it by one page, is a MISMATCH within
 * a round. Says "ok THREAD GENERATION" each `every` rounds. No locks. */
#include "guest.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#define PAGE 4096ull
#define MAX_THREADS 8

struct checker {
	unsigned number;
	uint8_t *mem;
	uint64_t pages, step, stride, every;
};

static void mismatch(struct checker *c, uint64_t page, uint64_t off, uint64_t want, uint64_t got)
{
	guest_say("MISMATCH thread %u page %llu offset %llu: want %llu, is %llu", c->number,
		(unsigned long long)page, (unsigned long long)off, (unsigned long long)want,
		(unsigned long long)got);
	_exit(1);
}

static void *check(void *arg)
{
	struct checker *c = arg;
	register uint8_t *mem __asm__("r12") = c->mem;
	register uint64_t generation __asm__("r13") = 1;
	register uint64_t i __asm__("r14") = 0;
	uint64_t mask = c->pages - 1, step = c->step, stride = c->stride;

	for (;;) {
		volatile uint64_t *page = (volatile uint64_t *)(mem + ((i * step) & mask) * PAGE);

		for (uint64_t w = 0; w < PAGE / 8; w += stride) {
			uint64_t got = page[w];

			if (got != generation - 1)
				mismatch(c, (i * step) & mask, w * 8, generation - 1, got);
			page[w] = generation;
		}
		i = (i + 1) & mask;
		/* the compiler may not keep a copy of these anywhere but in their registers */
		__asm__ volatile("" : "+r"(mem), "+r"(generation), "+r"(i));
		if (i == 0) {
			if (generation % c->every == 0)
				guest_say("ok %u %llu", c->number, (unsigned long long)generation);
			generation++;
		}
	}
	return NULL;
}

int selfcheck_main(int argc, char **argv)
{
	static struct checker checkers[MAX_THREADS];
	uint64_t threads = guest_arg(argc, argv, "threads", 1), words = guest_arg(argc, argv, "words", 8);
	uint64_t pages = guest_arg(argc, argv, "mib", 64) * 256;
	pthread_t thread;

	if (threads == 0 || threads > MAX_THREADS || words == 0 || words > PAGE / 8 ||
		(pages & (pages - 1))) {
		guest_say("selfcheck: threads=1..%d, words=1..512, mib a power of two", MAX_THREADS);
		return 1;
	}
	for (unsigned t = 0; t < threads; t++) {
		checkers[t] = (struct checker){t, guest_memory(pages * PAGE), pages,
			guest_arg(argc, argv, "step", 1) | 1, PAGE / 8 / words,
			guest_arg(argc, argv, "every", 4)};
		errno = pthread_create(&thread, NULL, check, &checkers[t]);
		if (errno) {
			guest_say("selfcheck: thread: %m");
			return 1;
		}
	}
	for (;;)
		pause();
}
