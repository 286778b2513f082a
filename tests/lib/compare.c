/* Compare two images of memory page by page.
 *
 *   compare TRUTH IMAGE [FROM:TO]…        byte ranges that are not compared
 *
 * Exit status 0: equal; 1: not, with one line that counts the pages and names the first; 2: could not be
 * compared. One thread. */
#include <err.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096
#define BLOCK (1 << 20)
#define NAMED 8

static size_t fill(int fd, const char *path, uint8_t *buf)
{
	size_t done = 0;

	while (done < BLOCK) {
		ssize_t r = read(fd, buf + done, BLOCK - done);

		if (r < 0)
			err(2, "%s", path);
		if (r == 0)
			break;
		done += (size_t)r;
	}
	return done;
}

static bool skipped(int argc, char **argv, uint64_t at)
{
	for (int i = 3; i < argc; i++) {
		char *colon;
		uint64_t from = strtoull(argv[i], &colon, 0);

		if (*colon != ':')
			errx(2, "FROM:TO, not %s", argv[i]);
		if (at >= from && at < strtoull(colon + 1, NULL, 0))
			return true;
	}
	return false;
}

int main(int argc, char **argv)
{
	static uint8_t a[BLOCK], b[BLOCK];
	uint64_t at = 0, bad = 0, first[NAMED];

	if (argc < 3)
		errx(2, "usage: compare TRUTH IMAGE [FROM:TO]...");
	int truth = open(argv[1], O_RDONLY | O_CLOEXEC), image = open(argv[2], O_RDONLY | O_CLOEXEC);

	if (truth < 0 || image < 0)
		err(2, "%s", argv[truth < 0 ? 1 : 2]);
	for (;;) {
		size_t n = fill(truth, argv[1], a), m = fill(image, argv[2], b);

		if (n != m)
			errx(2, "sizes differ: at byte %llu %s has %zu more, %s has %zu",
				(unsigned long long)at, argv[1], n, argv[2], m);
		for (size_t p = 0; p < n; p += PAGE) {
			size_t len = n - p < PAGE ? n - p : PAGE;

			if (memcmp(a + p, b + p, len) == 0 || skipped(argc, argv, at + p))
				continue;
			if (bad < NAMED)
				first[bad] = (at + p) / PAGE;
			bad++;
		}
		if (n < BLOCK)
			break;
		at += n;
	}
	if (bad == 0)
		return 0;
	printf("%llu pages differ, the first:", (unsigned long long)bad);
	for (unsigned i = 0; i < bad && i < NAMED; i++)
		printf(" %llu", (unsigned long long)first[i]);
	printf("\n");
	return 1;
}
