/* Owns the files of a log (json-log.h).
 *
 * A file is locked by who writes it (flock), has whole lines only, and never more bytes than it may. PATH is
 * there all the time: the next one is made beside it and takes its name. One thread a log; writes may wait
 * for the disk. */
#include "json-log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define RECORD_MAX (6u * FFS_JSON_LOG_LINE + 128u) /* all of it \u00XX */
#define LOSS_MAX 300u
#define BATCH 65536u /* records that go into one write */

struct line {
	uint8_t text[FFS_JSON_LOG_LINE];
	size_t len;
};

struct loss {
	uint64_t lines, bytes;
	int why; /* errno of the last time */
};

struct ffs_json_log {
	char *path;
	int fd;
	uint64_t size, max;
	unsigned files;
	struct line line[2];
	char time[40];
	char out[BATCH + RECORD_MAX];
	size_t out_len;
	struct loss batch, untold, all; /* batch: what is in `out` */
};

/* ---- files ---- */

/* A new or an old one, locked; -errno. */
static int open_file(const char *path, int flags)
{
	_cleanup_close_ int fd =
		open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | flags, 0600);
	struct stat st;

	if (fd < 0)
		return -errno;
	if (flock(fd, LOCK_EX | LOCK_NB) < 0)
		return errno == EWOULDBLOCK ? -EBUSY : -errno;
	if (fstat(fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return -EINVAL;
	return ffs_steal_fd(&fd);
}

static void name_of(const struct ffs_json_log *l, unsigned number, char *out, size_t size)
{
	snprintf(out, size, "%s.%u", l->path, number);
}

/* PATH.1 becomes PATH.2, PATH becomes PATH.1 too, and a new one takes the name PATH. */
static int rotate(struct ffs_json_log *l)
{
	size_t size = strlen(l->path) + 16;
	_cleanup_free_ char *from = malloc(size), *to = malloc(size), *new = malloc(size);
	int fd, code;

	if (!from || !to || !new)
		return -ENOMEM;
	snprintf(new, size, "%s.new", l->path);
	fd = open_file(new, O_TRUNC);
	if (fd < 0)
		return fd;
	for (unsigned i = l->files - 1; i > 1; i--) {
		name_of(l, i - 1, from, size);
		name_of(l, i, to, size);
		if (rename(from, to) < 0 && errno != ENOENT)
			goto failed;
	}
	name_of(l, 1, to, size);
	/* some file systems know no second name */
	if (l->files > 1 && link(l->path, to) < 0 && rename(l->path, to) < 0 && errno != ENOENT)
		goto failed;
	if (rename(new, l->path) < 0)
		goto failed;
	ffs_close_fd(&l->fd);
	l->fd = fd;
	l->size = 0;
	return 0;
failed:
	code = errno;
	close(fd);
	unlink(new);
	return -code;
}

/* A rotation that was cut off between its last two steps left one file with two names. */
static void finish_rotation(const struct ffs_json_log *l, const struct stat *now)
{
	size_t size = strlen(l->path) + 16;
	_cleanup_free_ char *name = malloc(size);
	struct stat st;

	if (!name)
		return;
	name_of(l, 1, name, size);
	if (stat(name, &st) == 0 && st.st_ino == now->st_ino && st.st_dev == now->st_dev)
		unlink(name);
}

int ffs_json_log_open(
	const char *path, uint64_t bytes, unsigned files, struct ffs_json_log **out, struct ffs_error *err)
{
	struct ffs_json_log *l = calloc(1, sizeof(*l));
	struct stat st;
	int r;

	if (!l || !(l->path = strdup(path))) {
		free(l);
		return ffs_error_set(err, ENOMEM, "no memory for a log");
	}
	l->fd = open_file(path, 0);
	r = l->fd < 0 ? l->fd : fstat(l->fd, &st) < 0 ? -errno : 0;
	if (r < 0) {
		ffs_close_fd(&l->fd);
		free(l->path);
		free(l);
		return r == -EBUSY
			       ? ffs_error_set(err, EBUSY, "%.300s is the log of another main command", path)
		       : r == -EINVAL ? ffs_error_set(err, EINVAL,
						"%.300s is no regular file: a log is rotated", path)
				      : ffs_error_errno(err, -r, "%.300s, the log", path);
	}
	l->size = (uint64_t)st.st_size;
	l->max = bytes;
	l->files = files;
	finish_rotation(l, &st);
	*out = l;
	return 0;
}

/* ---- records ---- */

/* Bytes of the character at `p`, 0 when it is none (RFC 3629: no surrogates, nothing longer than it need be);
 * *cut: it may be one, but `len` ends in it. */
static size_t character(const uint8_t *p, size_t len, bool *cut)
{
	static const uint8_t lowest[] = {0x80, 0xa0, 0x90}, highest[] = {0xbf, 0x9f, 0x8f};
	size_t want = p[0] < 0x80                   ? 1
		      : p[0] >= 0xc2 && p[0] < 0xe0 ? 2
		      : (p[0] & 0xf0) == 0xe0       ? 3
		      : p[0] >= 0xf0 && p[0] < 0xf5 ? 4
						    : 0;
	uint8_t low = p[0] == 0xe0 ? lowest[1] : p[0] == 0xf0 ? lowest[2] : lowest[0];
	uint8_t high = p[0] == 0xed ? highest[1] : p[0] == 0xf4 ? highest[2] : highest[0];

	for (size_t i = 1; i < want; i++) {
		if (i == len) {
			*cut = true;
			return 0;
		}
		if (p[i] < low || p[i] > high)
			return 0;
		low = 0x80;
		high = 0xbf;
	}
	return want;
}

static void add(struct ffs_json_log *l, const char *text, size_t len)
{
	memcpy(l->out + l->out_len, text, len);
	l->out_len += len;
}

static void add_escaped(struct ffs_json_log *l, uint8_t c)
{
	char text[8];

	if (c == '\n')
		add(l, "\\n", 2);
	else if (c == '"' || c == '\\')
		add(l, (char[]){'\\', (char)c}, 2);
	else
		add(l, text, (size_t)snprintf(text, sizeof(text), "\\u%04x", c));
}

/* What is no UTF-8 becomes U+FFFD, a byte each: JSON has no bytes. */
static void add_text(struct ffs_json_log *l, const uint8_t *p, size_t len)
{
	for (size_t i = 0, n; i < len; i += n ? n : 1) {
		bool cut = false;

		n = character(p + i, len - i, &cut);
		if (!n)
			add(l, "\xef\xbf\xbd", 3);
		else if (n == 1 && (p[i] < ' ' || p[i] == '"' || p[i] == '\\' || p[i] == 0x7f))
			add_escaped(l, p[i]);
		else
			add(l, (const char *)p + i, n);
	}
}

static void add_record(struct ffs_json_log *l, bool is_stderr, const uint8_t *text, size_t len)
{
	add(l, "{\"log\":\"", 8);
	add_text(l, text, len);
	add(l, is_stderr ? "\",\"stream\":\"stderr\",\"time\":\"" : "\",\"stream\":\"stdout\",\"time\":\"",
		28);
	add(l, l->time, strlen(l->time));
	add(l, "\"}\n", 3);
}

/* ---- writing ---- */

/* Back to what was whole. If even that fails, the next line is broken, and the loss is told before it. */
static void cut_back(struct ffs_json_log *l, uint64_t size)
{
	if (ftruncate(l->fd, (off_t)size) == 0)
		l->size = size;
}

/* All of it, or none: -errno. */
static int write_whole(struct ffs_json_log *l, const char *bytes, size_t len)
{
	uint64_t before = l->size;
	ssize_t n = ffs_write_full(l->fd, bytes, len);

	l->size += len;
	if (n < 0)
		cut_back(l, before);
	return n < 0 ? (int)n : 0;
}

/* What was lost before, as a line of its own, in front of what comes next. */
static int tell_loss(struct ffs_json_log *l)
{
	char text[LOSS_MAX];
	int n;

	n = snprintf(text, sizeof(text),
		"{\"log\":\"forkfs: %llu lines (%llu bytes) are missing here: "
		"%s\\n\",\"stream\":\"stderr\",\"time\":\"%s\"}\n",
		(unsigned long long)l->untold.lines, (unsigned long long)l->untold.bytes,
		strerror(l->untold.why), l->time);
	return write_whole(l, text, (size_t)n);
}

/* What is in `out`, and before it what was lost: both, or nothing, or else a full disk would fill up with the
 * lines that say so. */
static int write_out(struct ffs_json_log *l)
{
	size_t len = l->out_len + (l->untold.lines ? LOSS_MAX : 0);
	uint64_t before;
	int r = l->size && l->size + len > l->max ? rotate(l) : 0;

	before = l->size;
	if (!r && l->untold.lines)
		r = tell_loss(l);
	if (!r)
		r = write_whole(l, l->out, l->out_len);
	if (r < 0 && l->size != before)
		cut_back(l, before);
	else if (!r)
		l->untold = (struct loss){0};
	return r;
}

static void count(struct loss *to, const struct loss *from, int why)
{
	to->lines += from->lines;
	to->bytes += from->bytes;
	to->why = why;
}

static void flush(struct ffs_json_log *l)
{
	int r = l->out_len || l->untold.lines ? write_out(l) : 0;

	if (r < 0) {
		count(&l->untold, &l->batch, -r);
		count(&l->all, &l->batch, -r);
	}
	l->out_len = 0;
	l->batch = (struct loss){0};
}

static void end_line(struct ffs_json_log *l, bool is_stderr, size_t len)
{
	struct line *line = &l->line[is_stderr];

	add_record(l, is_stderr, line->text, len);
	l->batch.lines++;
	l->batch.bytes += len;
	memmove(line->text, line->text + len, line->len - len);
	line->len -= len;
	if (l->out_len >= BATCH)
		flush(l);
}

/* Where a line that is too long is cut: not in a character. */
static size_t cut_at(const struct line *line)
{
	size_t len = line->len;

	for (size_t back = 1; back < 4 && back < len; back++) {
		bool cut = false;

		if (line->text[len - back] >= 0xc0) {
			character(line->text + len - back, back, &cut);
			return cut ? len - back : len;
		}
	}
	return len;
}

static void set_time(struct ffs_json_log *l, uint64_t wall_ns)
{
	time_t s = (time_t)(wall_ns / FFS_NS_PER_S);
	struct tm tm;
	size_t n;

	gmtime_r(&s, &tm);
	n = strftime(l->time, sizeof(l->time), "%Y-%m-%dT%H:%M:%S", &tm);
	snprintf(l->time + n, sizeof(l->time) - n, ".%09lluZ", (unsigned long long)(wall_ns % FFS_NS_PER_S));
}

void ffs_json_log_put(struct ffs_json_log *l, bool is_stderr, const void *bytes, size_t len, uint64_t wall_ns)
{
	struct line *line = &l->line[is_stderr];
	const uint8_t *p = bytes, *end = p + len;

	set_time(l, wall_ns);
	while (p < end) {
		size_t room = sizeof(line->text) - line->len, left = (size_t)(end - p),
		       most = left < room ? left : room;
		const uint8_t *newline = memchr(p, '\n', most);
		size_t n = newline ? (size_t)(newline - p) + 1 : most;

		memcpy(line->text + line->len, p, n);
		line->len += n;
		p += n;
		if (newline)
			end_line(l, is_stderr, line->len);
		else if (line->len == sizeof(line->text))
			end_line(l, is_stderr, cut_at(line));
	}
	flush(l);
}

void ffs_json_log_close(struct ffs_json_log *l, uint64_t wall_ns, char **lost)
{
	set_time(l, wall_ns);
	for (unsigned i = 0; i < 2; i++)
		if (l->line[i].len)
			end_line(l, i, l->line[i].len);
	flush(l);
	/* what is on its way to the disk may still fail: by then nobody knows which lines those are */
	if (fsync(l->fd) < 0)
		l->all.why = errno;
	if (lost)
		*lost = NULL;
	if (lost && l->all.why &&
		asprintf(lost, "%llu lines (%llu bytes) are missing: %s", (unsigned long long)l->all.lines,
			(unsigned long long)l->all.bytes, strerror(l->all.why)) < 0)
		*lost = NULL;
	ffs_close_fd(&l->fd);
	free(l->path);
	free(l);
}
