/* `load[,mib=96][,fill=0][,seq=1][,random=1][,disk=0][,rate=0]`: keeps writing guest memory, and says "load N"
 * twice a second.
 *
 *   seq, random   so many threads that write whole pages in order / 64 bytes at random places
 *   disk          so many threads that read /dev/vda into memory and write it, 64 KiB at a time, past the page
 *                 cache
 *   rate          pages (or transfers) a second and thread; 0: as fast as it goes
 *   fill          1: no page is zero to begin with
 *
 * Every thread owns a slice of the buffer; `steps` is what they share. No locks. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull
#define TRANSFER 65536ull
#define MAX_THREADS 16

enum kind { SEQ, RANDOM, DISK };

struct worker {
	enum kind kind;
	unsigned number;
	uint8_t *mem;
	uint64_t pages, rate;
};

static _Atomic uint64_t steps;

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* One page in order: every word of it changes at every round. */
static void step_seq(struct worker *w, uint64_t n)
{
	volatile uint64_t *page = (volatile uint64_t *)(w->mem + n % w->pages * PAGE);

	for (unsigned i = 0; i < PAGE / 8; i++)
		page[i] = n + i;
}

static void step_random(struct worker *w, uint64_t n, uint64_t *rnd)
{
	volatile uint64_t *line =
		(volatile uint64_t *)(w->mem + next_random(rnd) % (w->pages * PAGE / 64) * 64);

	for (unsigned i = 0; i < 8; i++)
		line[i] = n + i;
}

/* Reads three times of four, writes once; both straight between the disk and this buffer. */
static bool step_disk(struct worker *w, int fd, uint64_t disk_size, uint64_t n, uint64_t *rnd)
{
	uint8_t *buf = w->mem + n % (w->pages * PAGE / TRANSFER) * TRANSFER;
	off_t at = (off_t)(next_random(rnd) % (disk_size / TRANSFER) * TRANSFER);

	if (n % 4)
		return pread(fd, buf, TRANSFER, at) == (ssize_t)TRANSFER;
	memcpy(buf, &n, sizeof(n));
	return pwrite(fd, buf, TRANSFER, at) == (ssize_t)TRANSFER;
}

static void *work(void *arg)
{
	struct worker *w = arg;
	uint64_t rnd = 88172645463325252ull + w->number, disk_size = 0;
	struct timespec gap = {0, w->rate ? (long)(1000000000ull / w->rate % 1000000000ull) : 0};
	int fd = -1;

	if (w->kind == DISK) {
		fd = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
		off_t end = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);

		if (end < (off_t)TRANSFER) {
			guest_say("/dev/vda: %m");
			exit(1);
		}
		disk_size = (uint64_t)end;
	}
	for (uint64_t n = 1;; n++) {
		if (w->kind == SEQ)
			step_seq(w, n);
		else if (w->kind == RANDOM)
			step_random(w, n, &rnd);
		else if (!step_disk(w, fd, disk_size, n, &rnd)) {
			guest_say("/dev/vda: transfer failed: %m");
			exit(1);
		}
		atomic_fetch_add_explicit(&steps, 1, memory_order_relaxed);
		if (w->rate)
			nanosleep(&gap, NULL);
	}
	return NULL;
}

int load_main(int argc, char **argv)
{
	static struct worker workers[MAX_THREADS];
	unsigned count[] = {[SEQ] = (unsigned)guest_arg(argc, argv, "seq", 1),
		[RANDOM] = (unsigned)guest_arg(argc, argv, "random", 1),
		[DISK] = (unsigned)guest_arg(argc, argv, "disk", 0)};
	unsigned n = count[SEQ] + count[RANDOM] + count[DISK], made = 0;
	struct timespec half = {0, 500000000};
	pthread_t thread;

	if (n == 0 || n > MAX_THREADS) {
		guest_say("load: between 1 and %d threads", MAX_THREADS);
		return 1;
	}
	uint64_t pages = guest_arg(argc, argv, "mib", 96) * 256 / n;
	uint8_t *mem = guest_memory(pages * n * PAGE);

	if (guest_arg(argc, argv, "fill", 0))
		guest_fill(mem, pages * n * PAGE);

	for (unsigned kind = SEQ; kind <= DISK; kind++)
		for (unsigned i = 0; i < count[kind]; i++, made++) {
			workers[made] = (struct worker){kind, made, mem + made * pages * PAGE, pages,
				guest_arg(argc, argv, "rate", 0)};
			errno = pthread_create(&thread, NULL, work, &workers[made]);
			if (errno) {
				guest_say("load: thread: %m");
				return 1;
			}
		}
	for (;;) {
		guest_say(
			"load %llu", (unsigned long long)atomic_load_explicit(&steps, memory_order_relaxed));
		nanosleep(&half, NULL);
	}
}
