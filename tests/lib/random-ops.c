/* Read a file at random in every way there is, and compare each byte with a reference: the tests' proof that
 * a branch has one content.
 *
 *   random-ops --seed N --processes N REFERENCE FILE
 *
 * Works by lines on its input, each answered by one line when all processes are through with it:
 *   run N        N operations in all; the answer is "done OPERATIONS WRONG REFUSED" since the start
 *   path FILE    new opens go there; "path -": there are no new opens
 *   settled      files opened for reading from now on are served by the kernel itself
 *   severed      the daemon is gone: close what is not, and ask for nothing that it would have to answer
 * What was wrong is told on stderr. Every operation draws the same count of random numbers, whatever comes of
 * it: the same seed, processes and lines give the same operations. Exit status 0: nothing was wrong.
 *
 * Processes of one thread each; they share the reference, one open file, and the file position of nothing. */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ull
#define HANDLES 6
#define MAX_PROCESSES 32
#define MAX_LEN (512u << 10)
#define TOLD 10

struct handle {
	int fd;
	bool shared, writer, kernel; /* position is everybody's; O_RDWR; passthrough */
	const uint8_t *map;          /* of the whole file, private, for as long as the handle lives */
};

struct report {
	uint64_t done, wrong, refused;
};

static const uint8_t *reference;
static uint64_t size;
static char path[4096];
static struct handle handles[HANDLES];
static unsigned n_handles, self;
static bool settled, severed;
static uint64_t rng, op_number, wrong, refused;
static const char *op_name = "";
static uint8_t *buffer;
static int scratch, pipe_fds[2];
static sigjmp_buf on_sigbus;

static uint64_t draw(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng * 0x2545f4914f6cdd1dull;
}

static void tell(const struct handle *h, uint64_t at, size_t len, const char *what)
{
	if (++wrong <= TOLD)
		fprintf(stderr,
			"WRONG: process %u operation %" PRIu64 " %s%s%s at %" PRIu64 " of %zu bytes: %s\n",
			self, op_number, op_name, h->writer ? " O_RDWR" : "", h->kernel ? " settled" : "", at,
			len, what);
}

static void tell_errno(const struct handle *h, uint64_t at, size_t len)
{
	tell(h, at, len, strerror(errno));
}

static void compare(const struct handle *h, uint64_t at, const uint8_t *got, size_t len)
{
	size_t bad = 0;

	if (len == 0 || memcmp(got, reference + at, len) == 0)
		return;
	while (bad + 1 < len && got[bad] == reference[at + bad])
		bad++;
	char text[96];

	snprintf(text, sizeof(text), "byte %" PRIu64 " is %02x, should be %02x", at + bad, got[bad],
		reference[at + bad]);
	tell(h, at, len, text);
}

/* How much of a request there is to read. */
static size_t there(uint64_t at, size_t len)
{
	return at >= size ? 0 : len < size - at ? len : (size_t)(size - at);
}

/* ---- the ways to read, each of `len` bytes at `at`; `more` is random ---- */

static void by_pread(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	ssize_t r = pread(h->fd, buffer, len, (off_t)at);

	if (r < 0)
		tell_errno(h, at, len);
	else if ((size_t)r != there(at, len))
		tell(h, at, len, "it is short, or beyond the end");
	else
		compare(h, at, buffer, (size_t)r);
}

static void by_read(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	size_t first = len / 2 + 1;

	if (h->shared) {
		by_pread(h, at, len, more);
		return;
	}
	if (lseek(h->fd, (off_t)at, SEEK_SET) < 0) {
		tell_errno(h, at, len);
		return;
	}
	for (size_t ask = first; ask; ask = ask == first && len > first ? len - first : 0) {
		ssize_t r = read(h->fd, buffer, ask);

		if (r < 0)
			tell_errno(h, at, ask);
		else if ((size_t)r != there(at, ask))
			tell(h, at, ask, "it is short, or beyond the end");
		else
			compare(h, at, buffer, (size_t)r);
		if (r <= 0 || len <= first)
			break;
		at += (uint64_t)r;
	}
}

static void by_preadv(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	struct iovec v[5];
	int n = 1 + (int)(more % 5);
	size_t part = len / (size_t)n, used = 0;

	for (int i = 0; i < n; i++) {
		v[i].iov_base = buffer + used;
		v[i].iov_len = i == n - 1 ? len - used : part;
		used += v[i].iov_len;
	}
	ssize_t r = preadv(h->fd, v, n, (off_t)at);

	if (r < 0)
		tell_errno(h, at, len);
	else if ((size_t)r != there(at, len))
		tell(h, at, len, "it is short, or beyond the end");
	else
		compare(h, at, buffer, (size_t)r);
}

static void by_mmap(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	uint64_t from = at & ~(PAGE - 1);
	bool shared = more % 8 == 0, change = !shared && more % 2 != 0;

	len = there(at, len);
	if (len == 0)
		return;
	size_t mapped = (size_t)(at - from) + len;
	uint8_t *m = mmap(NULL, mapped, PROT_READ | (change ? PROT_WRITE : 0),
		shared ? MAP_SHARED : MAP_PRIVATE, h->fd, (off_t)from);

	if (m == MAP_FAILED) {
		/* what the daemon serves past the page cache cannot be mapped shared */
		if (shared && errno == ENODEV)
			refused++;
		else
			tell_errno(h, at, len);
		return;
	}
	if (sigsetjmp(on_sigbus, 1) == 0)
		compare(h, at, m + (at - from), len);
	else
		tell(h, at, len, "SIGBUS");
	if (change) {
		m[at - from] ^= 0xff;
		if (m[at - from] == reference[at])
			tell(h, at, 1, "a private mapping does not keep what is written to it");
	}
	munmap(m, mapped);
	if (change)
		by_pread(h, at, 1, 0);
}

static void by_kept_map(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	uint64_t from = at & ~(PAGE - 1);

	len = there(at, len);
	if (!h->map || len == 0)
		return;
	if (more % 2 && madvise((void *)(h->map + from), (size_t)(at - from) + len, MADV_DONTNEED) < 0)
		tell_errno(h, at, len);
	if (sigsetjmp(on_sigbus, 1) == 0)
		compare(h, at, h->map + at, len);
	else
		tell(h, at, len, "SIGBUS");
}

/* What a copy wrote to the scratch file. */
static void compare_scratch(struct handle *h, uint64_t at, size_t len, size_t copied)
{
	if (copied != there(at, len))
		tell(h, at, len, "the copy is short, or beyond the end");
	else if (pread(scratch, buffer, copied, 0) != (ssize_t)copied)
		err(2, "scratch file");
	else
		compare(h, at, buffer, copied);
	if (ftruncate(scratch, 0) < 0 || lseek(scratch, 0, SEEK_SET) < 0)
		err(2, "scratch file");
}

static void by_sendfile(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	off_t from = (off_t)at;
	size_t copied = 0;
	ssize_t r;

	while (copied < len && (r = sendfile(scratch, h->fd, &from, len - copied)) != 0) {
		if (r < 0) {
			tell_errno(h, at, len);
			break;
		}
		copied += (size_t)r;
	}
	compare_scratch(h, at, len, copied);
}

static void by_copy_file_range(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	off_t from = (off_t)at, to = 0;
	size_t copied = 0;
	ssize_t r;

	while (copied < len && (r = copy_file_range(h->fd, &from, scratch, &to, len - copied, 0)) != 0) {
		if (r < 0 && copied == 0 && errno == EXDEV) {
			refused++;
			by_sendfile(h, at, len, more);
			return;
		}
		if (r < 0) {
			tell_errno(h, at, len);
			break;
		}
		copied += (size_t)r;
	}
	compare_scratch(h, at, len, copied);
}

static void by_splice(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	loff_t from = (loff_t)at;
	size_t done = 0;

	len = there(at, len);
	while (done < len) {
		ssize_t r = splice(h->fd, &from, pipe_fds[1], NULL, len - done, SPLICE_F_MOVE);

		if (r <= 0) {
			tell(h, at, len, r < 0 ? strerror(errno) : "it ends too early");
			break;
		}
		for (ssize_t got = 0, n; got < r; got += n) {
			n = read(pipe_fds[0], buffer + done + got, (size_t)(r - got));
			if (n <= 0)
				err(2, "pipe");
		}
		done += (size_t)r;
	}
	compare(h, at, buffer, done);
}

static void by_dropped_cache(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	int r = posix_fadvise(
		h->fd, (off_t)at, (off_t)len, more % 2 ? POSIX_FADV_DONTNEED : POSIX_FADV_WILLNEED);

	if (r != 0) {
		errno = r;
		tell_errno(h, at, len);
	}
	by_pread(h, at, len, more);
}

static void by_size(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	struct stat st;

	if (severed) {
		by_pread(h, at, len, more);
		return;
	}
	if (fstat(h->fd, &st) < 0)
		tell_errno(h, at, len);
	else if ((uint64_t)st.st_size != size)
		tell(h, at, len, "the file's size has changed");
	if (h->shared || at >= size)
		return;
	if (lseek(h->fd, (off_t)at, SEEK_HOLE) != (off_t)size)
		tell(h, at, len, "SEEK_HOLE is not the end");
	if (lseek(h->fd, (off_t)at, SEEK_DATA) != (off_t)at)
		tell(h, at, len, "SEEK_DATA is not where it was asked for");
}

/* Whoever tries to change it is refused. */
static void by_write(struct handle *h, uint64_t at, size_t len, uint64_t more)
{
	if (h->writer && !severed) {
		memset(buffer, (int)more, len);
		if (pwrite(h->fd, buffer, len, (off_t)at) >= 0)
			tell(h, at, len, "a branch was written to");
		else if (errno != EPERM)
			tell_errno(h, at, len);
		void *m = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, h->fd, 0);

		if (m != MAP_FAILED) {
			tell(h, at, len, "a branch was mapped for writing");
			munmap(m, PAGE);
		}
	}
	by_pread(h, at, len, more);
}

/* ---- opening and closing ---- */

static void drop(struct handle *h)
{
	if (h->map)
		munmap((void *)h->map, size);
	close(h->fd);
	*h = handles[--n_handles];
}

static void open_another(uint64_t more)
{
	struct handle h = {.writer = more % 3 == 0, .kernel = settled && more % 3 != 0};

	if (path[0] == '-')
		return;
	h.fd = open(path, (h.writer ? O_RDWR : O_RDONLY) | O_CLOEXEC | (more / 3 % 4 == 0 ? O_DIRECT : 0));
	if (h.fd < 0) {
		/* just renamed or removed */
		if (errno != ENOENT)
			tell_errno(&h, 0, 0);
		return;
	}
	if (more / 12 % 2 == 0) {
		void *m = mmap(NULL, size, PROT_READ, MAP_PRIVATE, h.fd, 0);

		if (m == MAP_FAILED)
			tell_errno(&h, 0, size);
		else
			h.map = m;
	}
	if (n_handles == HANDLES)
		drop(&handles[1 + more / 24 % (HANDLES - 1)]);
	handles[n_handles++] = h;
}

static void sever(void)
{
	severed = true;
	path[0] = '-';
	for (unsigned i = n_handles; i-- > 0;)
		if (!handles[i].kernel)
			drop(&handles[i]);
}

static const struct {
	const char *name;
	void (*run)(struct handle *h, uint64_t at, size_t len, uint64_t more);
	unsigned weight;
} ways[] = {
	{"read", by_read, 15},
	{"pread", by_pread, 20},
	{"preadv", by_preadv, 12},
	{"mmap", by_mmap, 15},
	{"kept mmap", by_kept_map, 10},
	{"sendfile", by_sendfile, 7},
	{"copy_file_range", by_copy_file_range, 7},
	{"splice", by_splice, 7},
	{"fadvise", by_dropped_cache, 3},
	{"lseek", by_size, 2},
	{"write", by_write, 2},
};

static void operate(void)
{
	uint64_t kind = draw() % 100, which = draw(), at = draw(), len = draw(), more = draw();
	unsigned way = 0;
	/* sizes of all magnitudes; one request in four is on page boundaries */
	size_t bytes = 1 + (size_t)(len >> 8) % (16u << (len % 15 + (len % 16 == 0)));

	if (bytes > MAX_LEN)
		bytes = MAX_LEN;
	at %= size;
	if (more % 4 == 0) {
		at &= ~(PAGE - 1);
		bytes = (bytes + PAGE - 1) & ~(PAGE - 1);
	}
	if (which % 256 == 0)
		open_another(more >> 8);
	if (n_handles) {
		while (kind >= ways[way].weight)
			kind -= ways[way++].weight;
		op_name = ways[way].name;
		ways[way].run(&handles[(which >> 8) % n_handles], at, bytes, more >> 16);
	} else if (severed) {
		errx(2, "process %u has no file that outlives the daemon", self);
	}
	op_number++;
}

/* ---- the processes ---- */

static void command(char *line, unsigned processes)
{
	uint64_t n;

	if (sscanf(line, "run %" SCNu64, &n) == 1)
		for (n = n / processes + (self < n % processes); n > 0; n--)
			operate();
	else if (strncmp(line, "path ", 5) == 0)
		snprintf(path, sizeof(path), "%s", line + 5);
	else if (strcmp(line, "settled") == 0) {
		settled = true;
		for (unsigned i = 0; i < 3; i++)
			open_another(1 + i * 3);
	} else if (strcmp(line, "severed") == 0)
		sever();
	else
		errx(2, "unknown: %s", line);
}

static void sigbus(int number)
{
	siglongjmp(on_sigbus, 1);
}

static void work(FILE *in, int out, unsigned processes, uint64_t seed)
{
	char line[sizeof(path)];
	struct sigaction action = {.sa_handler = sigbus};

	rng = (seed * 1000 + self + 1) * 0x9e3779b97f4a7c15ull;
	buffer = aligned_alloc(PAGE, MAX_LEN + PAGE);
	scratch = memfd_create("scratch", MFD_CLOEXEC);
	if (!buffer || scratch < 0 || pipe2(pipe_fds, O_CLOEXEC) < 0 || sigaction(SIGBUS, &action, NULL) < 0)
		err(2, "process %u", self);
	open_another(13);
	open_another(1);
	open_another(3);
	while (fgets(line, sizeof(line), in)) {
		line[strcspn(line, "\n")] = 0;
		command(line, processes);
		struct report r = {op_number, wrong, refused};

		if (write(out, &r, sizeof(r)) != sizeof(r))
			err(2, "process %u", self);
	}
	exit(wrong ? 1 : 0);
}

int main(int argc, char **argv)
{
	int to[MAX_PROCESSES], from[MAX_PROCESSES];
	char line[sizeof(path)];
	struct stat st;

	if (argc != 7 || strcmp(argv[1], "--seed") != 0 || strcmp(argv[3], "--processes") != 0)
		errx(2, "usage: random-ops --seed N --processes N REFERENCE FILE");
	uint64_t seed = strtoull(argv[2], NULL, 0);
	unsigned n = (unsigned)strtoul(argv[4], NULL, 0);
	int truth = open(argv[5], O_RDONLY | O_CLOEXEC);

	if (n < 1 || n > MAX_PROCESSES || truth < 0 || fstat(truth, &st) < 0)
		err(2, "%s", argv[5]);
	size = (uint64_t)st.st_size;
	reference = mmap(NULL, size, PROT_READ, MAP_SHARED, truth, 0);
	snprintf(path, sizeof(path), "%s", argv[6]);
	handles[0] = (struct handle){.fd = open(path, O_RDONLY | O_CLOEXEC), .shared = true};
	n_handles = 1;
	if (reference == MAP_FAILED || handles[0].fd < 0)
		err(2, "%s", path);
	for (self = 0; self < n; self++) {
		int down[2], up[2];

		if (pipe2(down, O_CLOEXEC) < 0 || pipe2(up, O_CLOEXEC) < 0)
			err(2, "pipe");
		pid_t pid = fork();

		if (pid < 0)
			err(2, "fork");
		if (pid == 0) {
			for (unsigned i = 0; i < self; i++) {
				close(to[i]);
				close(from[i]);
			}
			close(down[1]);
			work(fdopen(down[0], "r"), up[1], n, seed);
		}
		close(down[0]);
		close(up[1]);
		to[self] = down[1];
		from[self] = up[0];
	}
	while (fgets(line, sizeof(line), stdin)) {
		struct report all = {0}, r;

		if (strcmp(line, "severed\n") == 0)
			close(handles[0].fd);
		for (unsigned i = 0; i < n; i++)
			if (write(to[i], line, strlen(line)) < 0)
				err(2, "process %u", i);
		for (unsigned i = 0; i < n; i++) {
			if (read(from[i], &r, sizeof(r)) != sizeof(r))
				errx(2, "process %u has ended", i);
			all.done += r.done;
			all.wrong += r.wrong;
			all.refused += r.refused;
		}
		printf("done %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", all.done, all.wrong, all.refused);
		fflush(stdout);
	}
	int bad = 0, status;

	for (unsigned i = 0; i < n; i++)
		close(to[i]);
	while (wait(&status) > 0)
		bad |= !WIFEXITED(status) || WEXITSTATUS(status) != 0;
	return bad;
}
