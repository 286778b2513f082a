/* Owns what is known to be right of a branch's memory: a bit per block of a dense one. The chunks of a packed one are
 * checked by every read (packed.c).
 *
 * Threads: any number of readers. No locks: two that need the same block both check it. */
#include "store/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

struct ffs_checked {
	struct ffs_stored *stored;
	struct ffs_hash *blocks; /* of the manifest; NULL: packed */
	_Atomic uint8_t right[]; /* per block */
};

int ffs_checked_new(struct ffs_stored *s, struct ffs_checked **out, struct ffs_error *err)
{
	struct ffs_manifest m = {0};
	struct ffs_stored *own = NULL;
	struct ffs_checked *c = NULL;
	int r = ffs_stored_again(s, &own, err);

	if (!r)
		r = ffs_stored_hold(own, err);
	if (!r && own->kind == FFS_STORE_DENSE)
		r = ffs_stored_load_hashes(own, &m, err);
	if (!r) {
		c = calloc(1, sizeof(*c) + m.n_blocks);
		r = c ? 0 : ffs_error_set(err, ENOMEM, "no memory");
	}
	if (!r) {
		c->stored = ffs_steal_ptr(&own);
		c->blocks = ffs_steal_ptr(&m.blocks);
		*out = c;
	}
	ffs_manifest_clear(&m);
	ffs_stored_unref(own);
	return r;
}

void ffs_checked_free(struct ffs_checked *c)
{
	if (!c)
		return;
	ffs_stored_unref(c->stored);
	free(c->blocks);
	free(c);
}

/* A block that nobody has read yet: all of it, compared, and what is wanted of it. */
static ssize_t read_block(struct ffs_checked *c, uint64_t i, char *buf, size_t len, uint64_t off)
{
	uint64_t start = i * FFS_STORE_BLOCK, left = c->stored->m.memory_size - start;
	size_t size = left < FFS_STORE_BLOCK ? (size_t)left : FFS_STORE_BLOCK;
	_cleanup_free_ char *block = malloc(size);
	ssize_t n = block ? ffs_stored_read_memory(c->stored, block, size, start, NULL) : -ENOMEM;
	struct ffs_hash h;

	if (n < 0)
		return n;
	if ((size_t)n != size)
		return -EIO;
	h = ffs_hash_of(block, size);
	if (!ffs_hash_equal(&h, &c->blocks[i])) {
		ffs_log(FFS_LOG_WARN,
			"%s/" FFS_MEMORY_DENSE " is damaged at offset %llu: its children are not made of it",
			c->stored->path, (unsigned long long)start);
		return -EIO;
	}
	atomic_store(&c->right[i], 1);
	memcpy(buf, block + (off - start), len);
	return (ssize_t)len;
}

ssize_t ffs_checked_read(struct ffs_checked *c, void *buf, size_t len, uint64_t off)
{
	size_t done = 0;

	if (!c->blocks)
		return ffs_stored_read_memory(c->stored, buf, len, off, NULL);
	if (off >= c->stored->m.memory_size)
		return 0;
	if (len > c->stored->m.memory_size - off)
		len = (size_t)(c->stored->m.memory_size - off);
	while (done < len) {
		uint64_t at = off + done, i = at / FFS_STORE_BLOCK, end = (i + 1) * FFS_STORE_BLOCK;
		size_t n = end - at < len - done ? (size_t)(end - at) : len - done;
		ssize_t got = atomic_load(&c->right[i])
				      ? ffs_stored_read_memory(c->stored, (char *)buf + done, n, at, NULL)
				      : read_block(c, i, (char *)buf + done, n, at);

		if (got < 0)
			return got;
		if ((size_t)got != n)
			return -EIO;
		done += n;
	}
	return (ssize_t)done;
}
