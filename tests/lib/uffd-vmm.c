/* What a VMM is to the pager, and no more: memory of its own, registered for missing pages, handed over with
 * Firecracker's message, and threads that read it. It judges every byte against a copy of the image.
 *
 *     uffd-vmm SOCKET IMAGE [huge] [close] [regions=N] [features=MASK] [split=BYTES]
 *
 * huge: pages of 2 MiB; close: keeps no copy of its userfaultfd; features: asked of UFFDIO_API (default:
 * REMOVE). It prints "sent", then obeys lines of stdin, each with one line as the answer:
 *
 *     read OFFSET LENGTH      "same", or "differs OFFSET"
 *     race THREADS            as many threads read all of it, each from another place on; the same answers
 *     loop                    reads all of it over and over, until it is ended
 *     discard OFFSET LENGTH   gives the pages back to the kernel: "done"; from then on they have to be zeros
 *     resident                bytes that are there
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static const unsigned char *truth;
static unsigned char *memory;
static uint64_t size, page = 4096;
static bool *zeros; /* a page was discarded */
static unsigned n_threads;

static uint64_t difference(uint64_t off, uint64_t len)
{
	static const unsigned char nothing[4096];

	for (uint64_t at = off; at < off + len; at += 4096)
		if (memcmp(memory + at, zeros[at / 4096] ? nothing : truth + at, 4096) != 0)
			return at;
	return UINT64_MAX;
}

static void say_difference(uint64_t at)
{
	if (at == UINT64_MAX)
		puts("same");
	else
		printf("differs %lu\n", at);
}

static void *racer(void *arg)
{
	uint64_t start = size / 4096 * (uintptr_t)arg / n_threads, pages = size / 4096;

	for (uint64_t i = 0; i < pages; i++) {
		/* steps that share no factor with a power of two reach every page */
		uint64_t at = (start + i * (2 * (uintptr_t)arg + 1)) % pages * 4096;

		if (difference(at, 4096) != UINT64_MAX)
			return (void *)(uintptr_t)(at + 1);
	}
	return NULL;
}

static uint64_t race(unsigned n)
{
	pthread_t thread[64];
	uint64_t found = UINT64_MAX;

	n_threads = n = n < 64 ? n : 64;
	for (uintptr_t i = 0; i < n; i++)
		if (pthread_create(&thread[i], NULL, racer, (void *)i))
			errx(1, "thread");
	for (unsigned i = 0; i < n; i++) {
		void *at;

		pthread_join(thread[i], &at);
		if (at)
			found = (uintptr_t)at - 1;
	}
	return found;
}

static uint64_t resident(void)
{
	unsigned char *in = malloc(size / 4096);
	uint64_t n = 0;

	if (!in || mincore(memory, size, in) < 0)
		err(1, "mincore");
	for (uint64_t i = 0; i < size / 4096; i++)
		n += in[i] & 1;
	free(in);
	return n * 4096;
}

static void obey(void)
{
	char line[256];

	while (fgets(line, sizeof(line), stdin)) {
		uint64_t off = 0, len = 0;
		unsigned n;

		if (sscanf(line, "read %lu %lu", &off, &len) == 2) {
			say_difference(difference(off, len));
		} else if (sscanf(line, "race %u", &n) == 1) {
			say_difference(race(n));
		} else if (strcmp(line, "loop\n") == 0) {
			uint64_t at;

			puts("looping");
			fflush(stdout);
			while ((at = difference(0, size)) == UINT64_MAX)
				;
			say_difference(at);
		} else if (sscanf(line, "discard %lu %lu", &off, &len) == 2) {
			if (madvise(memory + off, len, MADV_DONTNEED) < 0)
				err(1, "madvise");
			for (uint64_t at = off; at < off + len; at += 4096)
				zeros[at / 4096] = true;
			puts("done");
		} else if (strcmp(line, "resident\n") == 0) {
			printf("%lu\n", resident());
		} else {
			errx(2, "what is '%s'?", line);
		}
		fflush(stdout);
	}
}

static void send_message(const char *path, int uffd, unsigned regions, size_t split)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	char text[8192] = "[", control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = {0};
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	for (unsigned i = 0; i < regions; i++) {
		uint64_t from = size / page * i / regions * page, to = size / page * (i + 1) / regions * page;

		sprintf(text + strlen(text),
			"%s{\"base_host_virt_addr\":%lu,\"size\":%lu,\"offset\":%lu,\"page_size\":%lu,\"page_"
			"size_kib\":%lu}",
			i ? "," : "", (unsigned long)memory + from, to - from, from, page, page);
	}
	strcat(text, "]");
	struct iovec iov = {text, split && split < strlen(text) ? split : strlen(text)};
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &uffd, sizeof(int));
	strncpy(a.sun_path, path, sizeof(a.sun_path) - 1);
	if (connect(sock, (struct sockaddr *)&a, sizeof(a)) < 0 || sendmsg(sock, &msg, 0) < 0)
		err(1, "%s", path);
	close(sock);
}

static const char *option(char **argv, const char *name)
{
	for (; *argv; argv++)
		if (strncmp(*argv, name, strlen(name)) == 0)
			return *argv + strlen(name);
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc < 3)
		errx(2, "usage: uffd-vmm SOCKET IMAGE [OPTION]...");
	const char *features = option(argv + 3, "features="), *regions = option(argv + 3, "regions="),
		   *split = option(argv + 3, "split=");
	struct uffdio_api api = {.api = UFFD_API,
		.features = features ? strtoull(features, NULL, 0) : UFFD_FEATURE_EVENT_REMOVE};
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, fd = open(argv[2], O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		err(1, "%s", argv[2]);
	size = (uint64_t)st.st_size;
	truth = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
	if (option(argv + 3, "huge")) {
		page = 2 << 20;
		flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
	}
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
	zeros = calloc(size / 4096, sizeof(*zeros));
	if (memory == MAP_FAILED || truth == MAP_FAILED || !zeros)
		err(77, "SKIP: %lu bytes of memory", size);
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)memory, .len = size}, .mode = UFFDIO_REGISTER_MODE_MISSING};

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0 || ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
		err(77, "SKIP: userfaultfd");
	send_message(argv[1], uffd, regions ? (unsigned)atoi(regions) : 1, split ? (size_t)atoi(split) : 0);
	if (option(argv + 3, "close"))
		close(uffd);
	puts("sent");
	fflush(stdout);
	obey();
	return 0;
}
