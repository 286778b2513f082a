/* What the benchmarks measure with: reads, look-ups and commands, timed close to the system call.
 *
 *   seq FILE BYTES-A-READ    one pass over FILE                                     prints ns and bytes
 *   random FILE COUNT        preads of 4 KiB, each at another place                 prints p50 p90 p99 max ns
 *   cold FILE COUNT          the same, with nothing of FILE in the page cache       the same
 *                            and no read-ahead
 *   stat FILE COUNT          stat(2) of FILE                                        the same
 *   first FILE COUNT         open, read the first byte, close                       the same, without the close
 *   run COMMAND…             a command from its start to its end                    prints ns and its exit status
 *   memcpy BYTES THREADS     copying memory that is present                         prints ns and bytes
 *   fresh BYTES THREADS      copying to memory that is made meanwhile, large pages  prints ns and bytes
 *   spin                     keeps a CPU busy until it is killed
 *
 * One thread, except for memcpy. Exit status 1 and a sentence when a call fails. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define MAX_THREADS 16

extern char **environ;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "bench-tool: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t number(const char *text)
{
	char *end;

	errno = 0;
	uint64_t n = strtoull(text, &end, 10);

	if (errno || *end || n == 0) {
		fprintf(stderr, "bench-tool: '%s' is no number above 0\n", text);
		exit(2);
	}
	return n;
}

static void *present(uint64_t bytes)
{
	void *p =
		mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED)
		die("memory");
	return p;
}

static int open_file(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		die(path);
	return fd;
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void print_spread(uint64_t *ns, uint64_t n)
{
	qsort(ns, n, sizeof(*ns), ascending);
	printf("%llu %llu %llu %llu\n", (unsigned long long)ns[n / 2], (unsigned long long)ns[n * 9 / 10],
		(unsigned long long)ns[n * 99 / 100], (unsigned long long)ns[n - 1]);
}

static void seq(const char *path, uint64_t block)
{
	void *buf = present(block);
	uint64_t start = now_ns(), bytes = 0;
	int fd = open_file(path);
	ssize_t n;

	while ((n = read(fd, buf, block)) > 0)
		bytes += (uint64_t)n;
	if (n < 0)
		die(path);
	printf("%llu %llu\n", (unsigned long long)(now_ns() - start), (unsigned long long)bytes);
	close(fd);
}

static void random_reads(const char *path, uint64_t count, bool cold)
{
	uint64_t *ns = present(count * sizeof(*ns)), rnd = 88172645463325252ull;
	void *buf = present(PAGE);
	int fd = open_file(path);
	struct stat st;

	if (fstat(fd, &st) < 0 || st.st_size < PAGE)
		die(path);
	if (cold &&
		(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) || posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM)))
		die(path);
	for (uint64_t i = 0; i < count; i++) {
		rnd ^= rnd << 13;
		rnd ^= rnd >> 7;
		rnd ^= rnd << 17;
		off_t at = (off_t)(rnd % ((uint64_t)st.st_size / PAGE) * PAGE);
		uint64_t start = now_ns();

		if (pread(fd, buf, PAGE, at) != PAGE)
			die(path);
		ns[i] = now_ns() - start;
	}
	print_spread(ns, count);
	close(fd);
}

static void stats(const char *path, uint64_t count)
{
	uint64_t *ns = present(count * sizeof(*ns));
	struct stat st;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t start = now_ns();

		if (stat(path, &st) < 0)
			die(path);
		ns[i] = now_ns() - start;
	}
	print_spread(ns, count);
}

static void first_byte(const char *path, uint64_t count)
{
	uint64_t *ns = present(count * sizeof(*ns));
	char byte;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t start = now_ns();
		int fd = open_file(path);

		if (pread(fd, &byte, 1, 0) != 1)
			die(path);
		ns[i] = now_ns() - start;
		close(fd);
	}
	print_spread(ns, count);
}

static int run(char **command)
{
	uint64_t start = now_ns();
	int status;
	pid_t pid;

	errno = posix_spawnp(&pid, command[0], NULL, NULL, command, environ);
	if (errno || waitpid(pid, &status, 0) < 0)
		die(command[0]);
	fprintf(stderr, "%llu\n", (unsigned long long)(now_ns() - start));
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

struct copy {
	char *from, *to;
	uint64_t bytes;
};

static void *copy_main(void *arg)
{
	struct copy *c = arg;

	memcpy(c->to, c->from, c->bytes);
	return NULL;
}

/* Large pages, made when they are written. */
static void *untouched(uint64_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED || madvise(p, bytes, MADV_HUGEPAGE) < 0)
		die("memory");
	return p;
}

static void copy_memory(uint64_t bytes, uint64_t threads, bool fresh)
{
	struct copy copies[MAX_THREADS];
	pthread_t ids[MAX_THREADS];

	if (threads > MAX_THREADS)
		threads = MAX_THREADS;
	for (uint64_t i = 0; i < threads; i++) {
		uint64_t part = bytes / threads;

		copies[i] = (struct copy){present(part), fresh ? untouched(part) : present(part), part};
	}
	uint64_t start = now_ns();

	for (uint64_t i = 0; i < threads; i++) {
		errno = pthread_create(&ids[i], NULL, copy_main, &copies[i]);
		if (errno)
			die("thread");
	}
	for (uint64_t i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
	printf("%llu %llu\n", (unsigned long long)(now_ns() - start),
		(unsigned long long)(bytes / threads * threads));
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (strcmp(what, "seq") == 0 && argc == 4)
		seq(argv[2], number(argv[3]));
	else if (strcmp(what, "random") == 0 && argc == 4)
		random_reads(argv[2], number(argv[3]), false);
	else if (strcmp(what, "cold") == 0 && argc == 4)
		random_reads(argv[2], number(argv[3]), true);
	else if (strcmp(what, "stat") == 0 && argc == 4)
		stats(argv[2], number(argv[3]));
	else if (strcmp(what, "first") == 0 && argc == 4)
		first_byte(argv[2], number(argv[3]));
	else if (strcmp(what, "run") == 0 && argc > 2)
		return run(argv + 2);
	else if (strcmp(what, "memcpy") == 0 && argc == 4)
		copy_memory(number(argv[2]), number(argv[3]), false);
	else if (strcmp(what, "fresh") == 0 && argc == 4)
		copy_memory(number(argv[2]), number(argv[3]), true);
	else if (strcmp(what, "spin") == 0 && argc == 2)
		for (;;)
			__asm__ volatile("" ::: "memory");
	else {
		fprintf(stderr, "bench-tool: seq, random, cold, stat, first, run, memcpy, fresh or spin: see "
				"bench-tool.c\n");
		return 2;
	}
	return 0;
}
