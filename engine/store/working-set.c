/* Owns the file of a working set: reading, checking and replacing it.
 *
 * Threads: any; who writes the same file at once: the last rename counts. No locks. Waits for the disk. */
#include "store/working-set.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "store/internal.h"

#define MAGIC "forkfsWS"
#define FORMAT 1u
#define UNIT 4096u
#define FILE_MAX (64u << 20)
#define AHEAD (128u << 10) /* of more at once the kernel takes the beginning: read_ahead_kb */

/* Little-endian, as on disk. */
struct header {
	char magic[8];
	uint32_t format, size;
	uint64_t memory_size, n;
	uint8_t zeros[16];
	struct ffs_hash hash; /* of the file with these bytes as zeros */
};
_Static_assert(sizeof(struct header) == 64, "the header of a working set");
_Static_assert(sizeof(struct ffs_range) == 16, "a span of a working set");

static int damaged(const char *path, const char *why, struct ffs_error *err)
{
	return ffs_error_set(err, EBADMSG, "the working set %.300s %s", path, why);
}

static int check(const char *path, char *text, size_t len, uint64_t memory_size, struct ffs_error *err)
{
	struct header h;
	uint64_t last = 0;

	if (len < sizeof(h))
		return damaged(path, "is cut off", err);
	memcpy(&h, text, sizeof(h));
	if (memcmp(h.magic, MAGIC, sizeof(h.magic)) != 0 || le32toh(h.size) != sizeof(h))
		return damaged(path, "is none", err);
	if (le32toh(h.format) != FORMAT)
		return damaged(path, "is of another format", err);
	if (le64toh(h.n) > FILE_MAX / sizeof(struct ffs_range) ||
		len != sizeof(h) + le64toh(h.n) * sizeof(struct ffs_range))
		return damaged(path, "is cut off", err);
	memset(text + offsetof(struct header, hash), 0, sizeof(h.hash));
	struct ffs_hash now = ffs_hash_of(text, len);

	if (!ffs_hash_equal(&now, &h.hash))
		return damaged(path, "is damaged: its hash is another", err);
	if (le64toh(h.memory_size) != memory_size)
		return damaged(path, "is of memory of another size", err);
	for (uint64_t i = 0; i < le64toh(h.n); i++) {
		struct ffs_range s;
		uint64_t end;

		memcpy(&s, text + sizeof(h) + i * sizeof(s), sizeof(s));
		s = (struct ffs_range){le64toh(s.offset), le64toh(s.len)};
		if ((s.offset | s.len) % UNIT || !s.len || s.offset < last ||
			ffs_add_overflow(s.offset, s.len, &end) || end > memory_size)
			return damaged(path, "names what is not in its memory", err);
		last = end;
	}
	return 0;
}

int ffs_working_set_read(
	const char *path, uint64_t memory_size, struct ffs_working_set *out, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	int r = ffs_read_file(path, FILE_MAX, &text, &len);

	if (r == -ENOENT || r == -ENOTDIR)
		return ffs_error_set(err, ENOENT, "there is no working set %.300s", path);
	if (r < 0)
		return ffs_error_errno(err, -r, "the working set %.300s cannot be read", path);
	r = check(path, text, len, memory_size, err);
	if (r < 0)
		return r;
	unsigned n = (unsigned)((len - sizeof(struct header)) / sizeof(struct ffs_range));
	struct ffs_range *span = malloc((n + 1) * sizeof(*span));

	if (!span)
		return ffs_error_set(err, ENOMEM, "no memory for a working set");
	memcpy(span, text + sizeof(struct header), n * sizeof(*span));
	for (unsigned i = 0; i < n; i++)
		span[i] = (struct ffs_range){le64toh(span[i].offset), le64toh(span[i].len)};
	*out = (struct ffs_working_set){.n = n, .span = span};
	return 0;
}

/* Through a file of its own, which is removed again when it cannot be completed. */
static int replace(int dir, const char *name, const void *text, size_t len)
{
	char fresh[64], uuid[37];

	ffs_uuid(uuid);
	snprintf(fresh, sizeof(fresh), "." FFS_WORKING_SET ".%.8s", uuid);
	_cleanup_close_ int fd = ffs_store_ops->create(dir, fresh);

	if (fd < 0)
		return fd;
	int r = ffs_store_ops->write(fd, text, len, 0);

	if (!r)
		r = ffs_store_ops->fsync(fd);
	if (!r)
		r = ffs_store_ops->rename(dir, fresh, name, true);
	if (r) {
		int gone = ffs_store_ops->unlink(dir, fresh, false);

		return gone && gone != -ENOENT ? gone : r;
	}
	return 0;
}

int ffs_working_set_write(
	const char *path, uint64_t memory_size, const struct ffs_working_set *set, struct ffs_error *err)
{
	const char *slash = strrchr(path, '/');
	_cleanup_free_ char *parent = slash ? strndup(path, (size_t)(slash + 1 - path)) : strdup("./");
	size_t len = sizeof(struct header) + set->n * sizeof(struct ffs_range);
	_cleanup_free_ char *text = calloc(1, len);
	struct header h = {.magic = MAGIC,
		.format = htole32(FORMAT),
		.size = htole32(sizeof(h)),
		.memory_size = htole64(memory_size),
		.n = htole64(set->n)};

	if (!parent || !text)
		return ffs_error_set(err, ENOMEM, "no memory for a working set");
	memcpy(text, &h, sizeof(h));
	for (unsigned i = 0; i < set->n; i++) {
		struct ffs_range s = {htole64(set->span[i].offset), htole64(set->span[i].len)};

		memcpy(text + sizeof(h) + i * sizeof(s), &s, sizeof(s));
	}
	h.hash = ffs_hash_of(text, len);
	memcpy(text, &h, sizeof(h));
	_cleanup_close_ int dir = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int r = dir < 0 ? -errno : replace(dir, slash ? slash + 1 : path, text, len);

	return r < 0 ? ffs_error_errno(err, -r, "the working set %.300s cannot be written", path) : 0;
}

int ffs_working_set_of(
	const uint64_t *map, uint64_t unit, uint64_t memory_size, uint64_t limit, struct ffs_working_set *out)
{
	struct ffs_range *span = NULL;
	unsigned n = 0;
	uint64_t taken = 0;

	for (uint64_t off = 0; off < memory_size && taken < limit; off += unit) {
		uint64_t len = memory_size - off < unit ? memory_size - off : unit;

		if (!(map[off / unit / 64] >> (off / unit % 64) & 1))
			continue;
		taken += len;
		if (n && span[n - 1].offset + span[n - 1].len == off) {
			span[n - 1].len += len;
			continue;
		}
		if (n % 64 == 0) {
			struct ffs_range *more = realloc(span, (n + 64) * sizeof(*span));

			if (!more) {
				free(span);
				return -ENOMEM;
			}
			span = more;
		}
		span[n++] = (struct ffs_range){off, len};
	}
	*out = (struct ffs_working_set){.n = n, .span = span};
	return 0;
}

void ffs_working_set_mark(const struct ffs_working_set *set, uint64_t unit, uint64_t *map)
{
	for (unsigned i = 0; i < set->n; i++)
		for (uint64_t at = set->span[i].offset / unit;
			at * unit < set->span[i].offset + set->span[i].len; at++)
			ffs_bit_set(map, at);
}

uint64_t ffs_working_set_read_ahead(const struct ffs_working_set *set, int fd, uint64_t size, uint64_t limit,
	bool (*wanted)(void *arg), void *arg)
{
	uint64_t asked = 0;
	bool on = set->n > 0;
	/* through a mapping: only so the kernel finds the file behind one that is passed through, and what is in swap */
	char *file = on ? mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd, 0) : MAP_FAILED;

	if (file == MAP_FAILED)
		return 0;
	for (unsigned i = 0; on && i < set->n; i++) {
		const struct ffs_range *s = &set->span[i];

		for (uint64_t done = 0; on && done < s->len; done += AHEAD) {
			uint64_t len = s->len - done < AHEAD ? s->len - done : AHEAD;

			on = asked + len <= limit && (!wanted || wanted(arg)) &&
			     madvise(file + s->offset + done, len, MADV_WILLNEED) == 0;
			asked += on ? len : 0;
		}
	}
	return munmap(file, size) < 0 ? 0 : asked;
}

uint64_t ffs_working_set_bytes(const struct ffs_working_set *set)
{
	uint64_t sum = 0;

	for (unsigned i = 0; i < set->n; i++)
		sum += set->span[i].len;
	return sum;
}

void ffs_working_set_free(struct ffs_working_set *set)
{
	free(set->span);
	*set = (struct ffs_working_set){0};
}
