/* Read a process's memory from outside, through /proc/PID/mem: the tests' truth, made by no code of the
 * product.
 *
 *   foreign-read [--held MARK --release PATH] PID OUT ADDRESS:SIZE…
 *
 * With --held it first waits until the file MARK exists (at most 60 s), and once everything is read creates
 * PATH: the two ends of a hold at a fault point. The pieces are written to OUT one behind the other. One
 * thread. */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void wait_for(const char *path)
{
	char junk[4096], *copy = strdup(path);
	int in = inotify_init1(IN_CLOEXEC);

	if (!copy || in < 0 || inotify_add_watch(in, dirname(copy), IN_CREATE | IN_MOVED_TO) < 0)
		err(2, "inotify for %s", path);
	while (access(path, F_OK) != 0) {
		struct pollfd p = {.fd = in, .events = POLLIN};

		if (poll(&p, 1, 60000) <= 0)
			errx(2, "%s did not appear", path);
		if (read(in, junk, sizeof(junk)) < 0)
			err(2, "inotify for %s", path);
	}
	close(in);
	free(copy);
}

int main(int argc, char **argv)
{
	const char *mark = NULL, *release = NULL;
	int at = 1;

	for (; at + 1 < argc && strncmp(argv[at], "--", 2) == 0; at += 2)
		if (strcmp(argv[at], "--held") == 0)
			mark = argv[at + 1];
		else if (strcmp(argv[at], "--release") == 0)
			release = argv[at + 1];
		else
			errx(2, "unknown option %s", argv[at]);
	if (argc - at < 3)
		errx(2, "usage: foreign-read [--held MARK --release PATH] PID OUT ADDRESS:SIZE...");

	char path[64];
	uint64_t total = 0, addr[64], size[64];
	int n = argc - at - 2;

	if (n > 64)
		errx(2, "at most 64 pieces");
	for (int i = 0; i < n; i++) {
		char *colon;

		addr[i] = strtoull(argv[at + 2 + i], &colon, 0);
		if (*colon != ':')
			errx(2, "ADDRESS:SIZE, not %s", argv[at + 2 + i]);
		size[i] = strtoull(colon + 1, NULL, 0);
		total += size[i];
	}
	int out = open(argv[at + 1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (out < 0 || ftruncate(out, (off_t)total) < 0)
		err(2, "%s", argv[at + 1]);
	uint8_t *map = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, out, 0);

	if (map == MAP_FAILED)
		err(2, "%s", argv[at + 1]);
	snprintf(path, sizeof(path), "/proc/%.20s/mem", argv[at]);
	int mem = open(path, O_RDONLY | O_CLOEXEC);

	if (mem < 0)
		err(2, "%s", path);
	if (mark)
		wait_for(mark);
	uint8_t *to = map;

	for (int i = 0; i < n; i++)
		for (uint64_t done = 0; done < size[i];) {
			ssize_t r = pread(mem, to, size[i] - done, (off_t)(addr[i] + done));

			if (r <= 0)
				err(2, "%s at %#llx", path, (unsigned long long)(addr[i] + done));
			done += (uint64_t)r;
			to += r;
		}
	if (release) {
		int fd = open(release, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

		if (fd < 0)
			err(2, "%s", release);
		close(fd);
	}
	return 0;
}
