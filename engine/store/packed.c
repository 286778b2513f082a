/* Owns the reading of packed memory: the index in memory, the packs' descriptors, a few decoded chunks.
 *
 * Threads: any number of readers. s->lock is held while index and packs are opened, once; a slot's lock while its
 * chunk is decoded and copied. Every chunk is checked against its hash before a byte of it is given out. */
#include "store/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INDEX_MAX (4ull << 30)

bool ffs_chunk_decode(enum ffs_chunk_kind kind, const void *in, uint32_t stored, void *out, uint32_t len,
	const struct ffs_hash *hash)
{
	struct ffs_hash is;

	if (kind == FFS_CHUNK_LZ4) {
		if (LZ4_decompress_safe(in, out, (int)stored, (int)len) != (int)len)
			return false;
	} else {
		memcpy(out, in, len);
	}
	if (!hash)
		return true;
	is = ffs_hash_of(out, len);
	return ffs_hash_equal(&is, hash);
}

/* ---- opening ---- */

static int load_index(struct ffs_stored *s, struct ffs_error *err)
{
	_cleanup_close_ int fd = openat(s->dir, FFS_MEMORY_INDEX, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	_cleanup_free_ unsigned char *buf = NULL;
	struct stat st;
	int r;

	if (fd < 0 || fstat(fd, &st) < 0)
		return ffs_error_errno(err, errno, "%s/" FFS_MEMORY_INDEX, s->path);
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > INDEX_MAX)
		return ffs_error_set(err, EBADMSG, "%s/" FFS_MEMORY_INDEX " is no index", s->path);
	buf = malloc((size_t)st.st_size + 1);
	if (!buf)
		return ffs_error_set(err, ENOMEM, "no memory for the index of %s", s->path);
	ssize_t n = ffs_store_ops->pread(fd, buf, (size_t)st.st_size, 0);

	if (n < 0)
		return ffs_error_errno(err, (int)-n, "%s/" FFS_MEMORY_INDEX, s->path);
	r = ffs_index_decode(buf, (size_t)n, &s->index, err);
	if (r < 0)
		ffs_error_prefix(err, "%s", s->path);
	else if (s->index.memory_size != s->m.memory_size)
		r = ffs_error_set(err, EBADMSG,
			"%s: " FFS_MEMORY_INDEX " and " FFS_MANIFEST " are of different memories", s->path);
	return r;
}

static int open_pack(struct ffs_stored *s, uint32_t i, struct ffs_error *err)
{
	unsigned char want[FFS_PACK_HEADER], is[FFS_PACK_HEADER];
	char name[40];
	struct stat st;
	int fd;

	snprintf(name, sizeof(name), FFS_MEMORY_PACK "%u", i);
	fd = openat(s->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return ffs_error_errno(err, errno, "%s/%s", s->path, name);
	s->pack_fds[i] = fd;
	ffs_pack_header(want, s->index.packs[i].id);
	ssize_t n = fstat(fd, &st) < 0 ? -errno : ffs_store_ops->pread(fd, is, sizeof(is), 0);

	if (n < 0)
		return ffs_error_errno(err, (int)-n, "%s/%s", s->path, name);
	if ((uint64_t)st.st_size != s->index.packs[i].size || n != (ssize_t)sizeof(is) ||
		memcmp(is, want, sizeof(is)) != 0)
		return ffs_error_set(
			err, EBADMSG, "%s/%s is not the pack that the index names", s->path, name);
	return 0;
}

static int open_all(struct ffs_stored *s, struct ffs_error *err)
{
	int r = load_index(s, err);

	if (r < 0)
		return r;
	s->pack_fds = malloc((s->index.n_packs + 1) * sizeof(*s->pack_fds));
	if (!s->pack_fds)
		return ffs_error_set(err, ENOMEM, "no memory for %s", s->path);
	memset(s->pack_fds, 0xff, (s->index.n_packs + 1) * sizeof(*s->pack_fds));
	for (uint32_t i = 0; !r && i < s->index.n_packs; i++)
		r = open_pack(s, i, err);
	return r;
}

static void close_all(struct ffs_stored *s)
{
	for (uint32_t i = 0; s->pack_fds && i < s->index.n_packs; i++)
		ffs_close_fd(&s->pack_fds[i]);
	free(s->pack_fds);
	s->pack_fds = NULL;
	ffs_index_clear(&s->index);
}

int ffs_packed_open(struct ffs_stored *s, struct ffs_error *err)
{
	int r = 0;

	if (atomic_load_explicit(&s->packed_open, memory_order_acquire))
		return 0;
	pthread_mutex_lock(&s->lock);
	if (!atomic_load(&s->packed_open) && !s->packed_error) {
		s->packed_why = (struct ffs_error){0};
		r = open_all(s, &s->packed_why);
		if (!r)
			atomic_store_explicit(&s->packed_open, true, memory_order_release);
		else
			close_all(s);
		/* damage stays; what a disk or a lack of memory refuses may be there the next time */
		s->packed_error = r == -EBADMSG || r == -ENOTSUP ? r : 0;
	} else {
		r = s->packed_error;
	}
	if (r < 0 && err)
		*err = s->packed_why;
	pthread_mutex_unlock(&s->lock);
	return r;
}

void ffs_packed_close(struct ffs_stored *s)
{
	close_all(s);
	for (unsigned i = 0; i < FFS_CHUNK_SLOTS; i++) {
		free(s->slots[i].buf);
		pthread_mutex_destroy(&s->slots[i].lock);
	}
}

/* ---- reading ---- */

int ffs_packed_chunk(struct ffs_stored *s, uint64_t chunk, bool checked, void *out, struct ffs_error *err)
{
	const struct ffs_index *x = &s->index;
	unsigned char in[FFS_STORE_CHUNK];
	uint32_t len = ffs_index_chunk_len(x, chunk), stored = x->stored[chunk];
	ssize_t n;

	if (x->kind[chunk] == FFS_CHUNK_ZERO) {
		memset(out, 0, len);
		return 0;
	}
	n = ffs_store_ops->pread(s->pack_fds[x->pack[chunk]], in, stored, x->offset[chunk]);
	if (n == (ssize_t)stored &&
		ffs_chunk_decode(x->kind[chunk], in, stored, out, len, checked ? &x->hash[chunk] : NULL))
		return 0;
	return ffs_error_set(err, EIO,
		"%s: memory at offset %llu is damaged (" FFS_MEMORY_PACK
		"%u at %u%s): forkfs verify says what else is",
		s->path, (unsigned long long)chunk * FFS_STORE_CHUNK, x->pack[chunk], x->offset[chunk],
		n < 0 ? ", it cannot be read" : "");
}

/* A part of a chunk, by way of the slot it falls into: readers come back for the rest. */
static int read_part(
	struct ffs_stored *s, uint64_t chunk, void *buf, size_t skip, size_t len, struct ffs_error *err)
{
	struct ffs_chunk_slot *slot = &s->slots[chunk % FFS_CHUNK_SLOTS];
	int r = 0;

	if (s->index.kind[chunk] == FFS_CHUNK_ZERO) {
		memset(buf, 0, len);
		return 0;
	}
	pthread_mutex_lock(&slot->lock);
	if (!slot->buf)
		slot->buf = malloc(FFS_STORE_CHUNK);
	if (!slot->buf) {
		r = ffs_error_set(err, ENOMEM, "no memory");
	} else if (slot->chunk != chunk) {
		r = ffs_packed_chunk(s, chunk, true, slot->buf, err);
		slot->chunk = r < 0 ? UINT64_MAX : chunk;
	}
	if (!r)
		memcpy(buf, slot->buf + skip, len);
	pthread_mutex_unlock(&slot->lock);
	return r;
}

ssize_t ffs_packed_read(struct ffs_stored *s, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	size_t done = 0;
	int r = ffs_packed_open(s, err);

	if (r < 0)
		return r == -ENOMEM ? r : -EIO;
	if (off >= s->m.memory_size)
		return 0;
	if (len > s->m.memory_size - off)
		len = (size_t)(s->m.memory_size - off);
	while (!r && done < len) {
		uint64_t chunk = (off + done) / FFS_STORE_CHUNK;
		size_t skip = (size_t)((off + done) % FFS_STORE_CHUNK);
		size_t n = ffs_index_chunk_len(&s->index, chunk) - skip;

		if (n > len - done)
			n = len - done;
		if (n == ffs_index_chunk_len(&s->index, chunk))
			r = ffs_packed_chunk(s, chunk, true, (char *)buf + done, err);
		else
			r = read_part(s, chunk, (char *)buf + done, skip, n, err);
		done += n;
	}
	return r < 0 ? r : (ssize_t)done;
}
