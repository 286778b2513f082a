/* `stall[,mib=64][,hot=0][,writers=1][,ms=50]`: how long each write to a random page takes, as the guest
 * itself sees it.
 *
 * Each writer writes one word of a random page of its slice, over and over, between two readings of the time
 * stamp counter. Every `ms` milliseconds one line says what came since the line before:
 *
 *     stall NUMBER WRITES BUCKET:COUNT …        all but NUMBER in hexadecimal, buckets with a count only
 *
 * A bucket is an eighth of a power of two of nanoseconds: value v < 8 is bucket v; else, with e = floor(log2
 * v), it is (e - 2) * 8 + the three bits below the highest. QEMU's counter stands still while the VM is
 * stopped, so a pause is not in it. A writer alone changes its counts; the main thread reads them. No locks.
 */
#include "guest.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

#define PAGE 4096ull
#define MAX_WRITERS 4
#define BUCKETS 280

struct writer {
	uint8_t *mem;
	uint64_t pages, seed;
	double ns_per_tick;
	volatile uint64_t counts[BUCKETS];
};

static uint64_t ticks(void)
{
	unsigned aux;

	return __rdtscp(&aux);
}

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static double calibrate(void)
{
	struct timespec half = {0, 500000000};
	uint64_t ns = clock_ns(), tick = ticks();

	nanosleep(&half, NULL);
	tick = ticks() - tick;
	return (double)(clock_ns() - ns) / (double)tick;
}

static unsigned bucket_of(uint64_t ns)
{
	if (ns < 8)
		return (unsigned)ns;
	unsigned e = 63 - (unsigned)__builtin_clzll(ns);
	unsigned b = (e - 2) * 8 + (unsigned)(ns >> (e - 3) & 7);

	return b < BUCKETS ? b : BUCKETS - 1;
}

static void *write_pages(void *arg)
{
	struct writer *w = arg;
	uint64_t rnd = w->seed;

	for (uint64_t n = 1;; n++) {
		rnd ^= rnd << 13;
		rnd ^= rnd >> 7;
		rnd ^= rnd << 17;
		volatile uint64_t *word = (volatile uint64_t *)(w->mem + rnd % w->pages * PAGE);
		uint64_t start = ticks();

		*word = n;
		uint64_t ns = (uint64_t)((double)(ticks() - start) * w->ns_per_tick);

		w->counts[bucket_of(ns)]++;
	}
	return NULL;
}

int stall_main(int argc, char **argv)
{
	static struct writer writers[MAX_WRITERS];
	static uint64_t told[BUCKETS], fresh[BUCKETS];
	static char line[3072];
	uint64_t n = guest_arg(argc, argv, "writers", 1), ms = guest_arg(argc, argv, "ms", 50);
	struct timespec step = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};
	pthread_t thread;

	if (n == 0 || n > MAX_WRITERS) {
		guest_say("stall: writers=1..%d", MAX_WRITERS);
		return 1;
	}
	uint64_t pages = guest_arg(argc, argv, "mib", 64) * 256 / n;
	uint64_t hot = guest_arg(argc, argv, "hot", 0) * 256 / n;
	uint8_t *mem = guest_memory(pages * n * PAGE);

	guest_fill(mem, pages * n * PAGE);
	double ns_per_tick = calibrate();

	for (uint64_t i = 0; i < n; i++) {
		writers[i].mem = mem + i * pages * PAGE;
		writers[i].pages = hot > 0 && hot < pages ? hot : pages;
		writers[i].seed = 88172645463325252ull + i;
		writers[i].ns_per_tick = ns_per_tick;
		errno = pthread_create(&thread, NULL, write_pages, &writers[i]);
		if (errno) {
			guest_say("stall: thread: %m");
			return 1;
		}
	}
	for (uint64_t number = 1;; number++) {
		uint64_t writes = 0;
		size_t len = 0;

		nanosleep(&step, NULL);
		for (unsigned b = 0; b < BUCKETS; b++) {
			uint64_t now = 0;

			for (uint64_t i = 0; i < n; i++)
				now += writers[i].counts[b];
			fresh[b] = now - told[b];
			told[b] = now;
			writes += fresh[b];
		}
		line[0] = 0;
		for (unsigned b = 0; b < BUCKETS && len + 32 < sizeof(line); b++)
			if (fresh[b])
				len += (size_t)snprintf(line + len, sizeof(line) - len, " %x:%llx", b,
					(unsigned long long)fresh[b]);
		guest_say("stall %llu %llx%s", (unsigned long long)number, (unsigned long long)writes, line);
	}
}
