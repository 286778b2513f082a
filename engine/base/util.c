/* Owns nothing. Any thread. */
#include "base/util.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/cleanup.h"

uint64_t ffs_wall_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * FFS_NS_PER_S + (uint64_t)ts.tv_nsec;
}

int ffs_ms_until(uint64_t deadline_ns)
{
	uint64_t now = ffs_now_ns();

	if (now >= deadline_ns)
		return 0;
	uint64_t ms = (deadline_ns - now + FFS_NS_PER_MS - 1) / FFS_NS_PER_MS;

	return ms > 0x7fffffff ? 0x7fffffff : (int)ms;
}

ssize_t ffs_pread_full(int fd, void *buf, size_t len, uint64_t off)
{
	size_t done = 0;

	while (done < len) {
		ssize_t n = pread(fd, (char *)buf + done, len - done, (off_t)(off + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		done += (size_t)n;
	}
	return (ssize_t)done;
}

ssize_t ffs_pwrite_full(int fd, const void *buf, size_t len, uint64_t off)
{
	size_t done = 0;

	while (done < len) {
		ssize_t n = pwrite(fd, (const char *)buf + done, len - done, (off_t)(off + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		done += (size_t)n;
	}
	return (ssize_t)done;
}

ssize_t ffs_write_full(int fd, const void *buf, size_t len)
{
	size_t done = 0;

	while (done < len) {
		ssize_t n = write(fd, (const char *)buf + done, len - done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		done += (size_t)n;
	}
	return (ssize_t)done;
}

int ffs_read_file(const char *path, size_t max, char **out, size_t *out_len)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	size_t cap = 4096, len = 0;
	_cleanup_free_ char *buf = malloc(cap + 1);

	if (!buf)
		return -ENOMEM;
	for (;;) {
		ssize_t n = read(fd, buf + len, cap - len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		len += (size_t)n;
		if (len > max)
			return -EFBIG;
		if (len == cap) {
			char *bigger = realloc(buf, cap * 2 + 1);

			if (!bigger)
				return -ENOMEM;
			buf = bigger;
			cap *= 2;
		}
	}
	buf[len] = '\0';
	*out = ffs_steal_ptr(&buf);
	if (out_len)
		*out_len = len;
	return 0;
}

int ffs_raise_file_limit(void)
{
	struct rlimit r;

	if (getrlimit(RLIMIT_NOFILE, &r) < 0)
		return -errno;
	r.rlim_cur = r.rlim_max;
	return setrlimit(RLIMIT_NOFILE, &r) < 0 ? -errno : 0;
}

bool ffs_is_zero(const void *buf, size_t len)
{
	const unsigned char *p = buf;

	/* memcmp of a buffer with itself shifted is what libc vectorises best; the first bytes are checked
	 * alone so that the common non-zero page costs nothing. */
	if (len < 16) {
		for (size_t i = 0; i < len; i++)
			if (p[i])
				return false;
		return true;
	}
	for (size_t i = 0; i < 16; i++)
		if (p[i])
			return false;
	return memcmp(p, p + 16, len - 16) == 0;
}

/* include/linux/sched.h: set when a thread begins to end, before it gives up its memory and files */
#define PF_EXITING 0x4u

int ffs_proc_stat(pid_t pid, char *state, uint64_t *start)
{
	char path[64];
	_cleanup_free_ char *text = NULL;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	int r = ffs_read_file(path, 65536, &text, NULL);

	if (r < 0)
		return r == -ENOENT ? -ESRCH : r;
	char *p = strrchr(text, ')');
	char st;
	unsigned flags;
	unsigned long long ticks;

	/* after ')': state is field 3, flags field 9, start time field 22 */
	if (!p || sscanf(p + 1,
			  " %c %*s %*s %*s %*s %*s %u %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
			  &st, &flags, &ticks) != 3)
		return -EPROTO;
	if (state)
		*state = st != 'Z' && flags & PF_EXITING ? 'X' : st;
	if (start)
		*start = ticks;
	return 0;
}

bool ffs_proc_alive(struct ffs_proc_id id)
{
	char state;
	uint64_t start;

	return ffs_proc_stat(id.pid, &state, &start) == 0 && start == id.start && state != 'Z' &&
	       state != 'X';
}

void ffs_signals_to_block(void *set)
{
	static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};

	sigfillset(set);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(faults); i++)
		sigdelset(set, faults[i]);
}

bool ffs_held_again(uint64_t deadline_ns)
{
	if (ffs_now_ns() >= deadline_ns)
		return false;
	poll(NULL, 0, 2);
	return true;
}

int ffs_lock(int fd)
{
	uint64_t deadline = ffs_now_ns() + FFS_HELD_NS;
	int r;

	do
		r = flock(fd, LOCK_EX | LOCK_NB) < 0 ? -errno : 0;
	while ((r == -EWOULDBLOCK && ffs_held_again(deadline)) || r == -EINTR);
	return r;
}

void ffs_uuid_new(uint8_t b[16])
{
	/* up to 256 bytes getrandom never fails or returns short once the pool is ready (getrandom(2)) */
	while (getrandom(b, 16, 0) != 16)
		;
	b[6] = (uint8_t)((b[6] & 0x0f) | 0x40);
	b[8] = (uint8_t)((b[8] & 0x3f) | 0x80);
}

void ffs_uuid_text(const uint8_t b[16], char out[37])
{
	snprintf(out, 37, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
		b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
}

void ffs_uuid(char out[37])
{
	uint8_t b[16];

	ffs_uuid_new(b);
	ffs_uuid_text(b, out);
}

int ffs_check_name(const char *what, const char *name, struct ffs_error *err)
{
	size_t n = strlen(name);

	if (n < 1 || n > 64 || name[0] == '.' ||
		strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-") != n)
		return ffs_error_set(err, EINVAL,
			"%s name \"%.80s\": use 1 to 64 of A-Z a-z 0-9 . _ : - and no leading dot", what,
			name);
	return 0;
}
