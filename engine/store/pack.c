/* Owns the writing of packed memory: chunks into pack files, each chunk once.
 *
 * A chunk whose hash was seen before (in this branch, or in the one whose chunks are shared) is used again only when
 * its bytes are the same: the guest chooses its memory's contents, and xxh3 does not resist that. A shared pack is
 * taken into our directory by a hard link: so every branch holds all its files, deleting a parent is unlinking its
 * directory, and the file system's own link count says when a pack is free.
 *
 * Threads: the draft's writer. */
#include "store/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUFFER (1u << 20)
#define NONE UINT32_MAX
/* of shared packs */
#define UNUSED (-1)
#define REFUSED (-2)

struct ffs_packer {
	struct ffs_draft *d;
	struct ffs_stored *share; /* NULL: none */
	struct ffs_index x;
	uint64_t at; /* the chunk that comes next */
	struct ffs_hash zero_hash;
	/* the pack being written; fd -1: none */
	int fd;
	uint32_t number, size;
	XXH3_state_t *state;
	unsigned char *buf;
	uint32_t buffered; /* of size: not yet in the file */
	/* by hash: numbers of chunks, of ours, and of the shared branch's from n_chunks on */
	uint32_t *table;
	uint64_t mask;
	int *shared_packs; /* of each of the shared branch's packs: ours, UNUSED or REFUSED */
	unsigned char *compressed, *other;
};

static void pack_name(char out[40], uint32_t n)
{
	snprintf(out, 40, FFS_MEMORY_PACK "%u", n);
}

static int fail(struct ffs_packer *p, int code, struct ffs_error *err)
{
	return ffs_store_errno(p->d->st, -code, err, "memory of branch %s cannot be written", p->d->label);
}

/* ---- the pack file ---- */

static int flush(struct ffs_packer *p)
{
	int r = p->buffered ? ffs_store_ops->write(p->fd, p->buf, p->buffered, p->size - p->buffered) : 0;

	if (!r) {
		XXH3_128bits_update(p->state, p->buf, p->buffered);
		p->buffered = 0;
	}
	return r;
}

static int append(struct ffs_packer *p, const void *bytes, uint32_t len)
{
	int r = 0;

	if (p->buffered + len > BUFFER)
		r = flush(p);
	if (!r) {
		memcpy(p->buf + p->buffered, bytes, len);
		p->buffered += len;
		p->size += len;
	}
	return r;
}

static int end_pack(struct ffs_packer *p)
{
	struct ffs_pack_entry *e = &p->x.packs[p->number];
	char name[40];
	int r = flush(p);

	if (r < 0)
		return r;
	e->size = p->size;
	e->hash = ffs_hash_digest(p->state);
	pack_name(name, p->number);
	ffs_close_fd(&p->fd);
	return ffs_draft_add_file(p->d, name, e->size, &e->hash);
}

/* A new entry in the pack table; its number or -errno. */
static int add_pack(struct ffs_packer *p)
{
	if (p->x.n_packs == FFS_MAX_PACKS)
		return -EFBIG;
	struct ffs_pack_entry *more = realloc(p->x.packs, (p->x.n_packs + 1) * sizeof(*more));

	if (!more)
		return -ENOMEM;
	p->x.packs = more;
	memset(&more[p->x.n_packs], 0, sizeof(*more));
	return (int)p->x.n_packs++;
}

static void random_id(unsigned char id[16])
{
	char text[37], *t = text;

	ffs_uuid(text);
	for (unsigned i = 0; i < 16; i++) {
		unsigned v = 0;

		t += *t == '-';
		sscanf(t, "%2x", &v);
		id[i] = (unsigned char)v;
		t += 2;
	}
}

static int begin_pack(struct ffs_packer *p)
{
	unsigned char header[FFS_PACK_HEADER];
	char name[40];
	int n = add_pack(p);

	if (n < 0)
		return n;
	random_id(p->x.packs[n].id);
	pack_name(name, (uint32_t)n);
	p->fd = ffs_store_ops->create(p->d->fd, name);
	if (p->fd < 0)
		return p->fd;
	p->number = (uint32_t)n;
	p->size = p->buffered = 0;
	XXH3_128bits_reset(p->state);
	ffs_pack_header(header, p->x.packs[n].id);
	return append(p, header, sizeof(header));
}

/* ---- sharing ---- */

static const struct ffs_hash *hash_at(const struct ffs_packer *p, uint32_t ref)
{
	return ref < p->x.n_chunks ? &p->x.hash[ref] : &p->share->index.hash[ref - p->x.n_chunks];
}

static uint64_t slot_of(const struct ffs_packer *p, const struct ffs_hash *h)
{
	uint64_t v;

	memcpy(&v, h->b, sizeof(v));
	return v & p->mask;
}

static void remember(struct ffs_packer *p, uint32_t ref)
{
	uint64_t i = slot_of(p, hash_at(p, ref));

	while (p->table[i] != NONE)
		i = (i + 1) & p->mask;
	p->table[i] = ref;
}

/* The bytes of an earlier chunk, into p->other: to be compared, so their hash need not be. */
static int read_other(struct ffs_packer *p, uint32_t ref, uint32_t len)
{
	uint32_t stored, offset, written = p->size - p->buffered;
	_cleanup_close_ int fd = -1;
	char name[40];
	bool open;

	if (ref >= p->x.n_chunks)
		return ffs_packed_chunk(p->share, ref - p->x.n_chunks, false, p->other, NULL);
	stored = p->x.stored[ref];
	offset = p->x.offset[ref];
	open = p->fd >= 0 && p->x.pack[ref] == p->number;
	if (!open) {
		pack_name(name, p->x.pack[ref]);
		fd = openat(p->d->fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
		if (fd < 0)
			return -errno;
	}
	/* one that is being written is in the file up to what is buffered */
	if (open && offset >= written)
		memcpy(p->compressed, p->buf + (offset - written), stored);
	else if (ffs_store_ops->pread(open ? p->fd : fd, p->compressed, stored, offset) != (ssize_t)stored)
		return -EIO;
	return ffs_chunk_decode(p->x.kind[ref], p->compressed, stored, p->other, len, NULL) ? 0 : -EIO;
}

/* Take a pack of the shared branch into our directory; its number, or REFUSED: a link count that is full, a file
 * system without links. */
static int link_pack(struct ffs_packer *p, uint16_t theirs)
{
	const struct ffs_pack_entry *e = &p->share->index.packs[theirs];
	char from[40], to[40];
	int n, r;

	if (p->shared_packs[theirs] != UNUSED)
		return p->shared_packs[theirs];
	p->shared_packs[theirs] = REFUSED;
	pack_name(from, theirs);
	pack_name(to, p->x.n_packs);
	r = ffs_store_ops->link(p->share->dir, from, p->d->fd, to);
	if (r < 0)
		return r == -EMLINK || r == -EPERM || r == -EXDEV || r == -ENOTSUP || r == -ENOENT ? REFUSED
												   : r;
	n = add_pack(p);
	if (n < 0)
		return n;
	p->x.packs[n] = *e;
	r = ffs_draft_add_file(p->d, to, e->size, &e->hash);
	if (r < 0)
		return r;
	p->shared_packs[theirs] = n;
	snprintf(p->d->shared_id, sizeof(p->d->shared_id), "%s", p->share->m.id);
	snprintf(p->d->shared_name, sizeof(p->d->shared_name), "%s", p->share->m.name);
	return n;
}

/* 1: the chunk is one that is there already; 0; -errno. */
static int try_share(struct ffs_packer *p, const unsigned char *chunk, uint32_t len, const struct ffs_hash *h)
{
	for (uint64_t i = slot_of(p, h); p->table[i] != NONE; i = (i + 1) & p->mask) {
		uint32_t ref = p->table[i];
		const struct ffs_index *x = ref < p->x.n_chunks ? &p->x : &p->share->index;
		uint64_t at = ref < p->x.n_chunks ? ref : ref - p->x.n_chunks;
		int pack;

		if (!ffs_hash_equal(hash_at(p, ref), h) || ffs_index_chunk_len(x, at) != len)
			continue;
		/* a parent's damaged chunk is no reason to fail: it is just not shared */
		if (read_other(p, ref, len) < 0 || memcmp(p->other, chunk, len) != 0)
			continue;
		pack = ref < p->x.n_chunks ? p->x.pack[at] : link_pack(p, x->pack[at]);
		if (pack == REFUSED)
			continue;
		if (pack < 0)
			return pack;
		p->x.pack[p->at] = (uint16_t)pack;
		p->x.offset[p->at] = x->offset[at];
		p->x.stored[p->at] = x->stored[at];
		p->x.kind[p->at] = x->kind[at];
		return 1;
	}
	return 0;
}

/* ---- chunks ---- */

static int store_chunk(struct ffs_packer *p, const unsigned char *chunk, uint32_t len)
{
	/* a chunk that compression does not make smaller by a sixteenth is faster to read as it is */
	int n = LZ4_compress_default(
		(const char *)chunk, (char *)p->compressed, (int)len, (int)(len - len / 16 - 1));
	uint32_t stored = n > 0 ? (uint32_t)n : len;
	int r = 0;

	if (p->fd >= 0 && p->size + stored > FFS_PACK_MAX)
		r = end_pack(p);
	if (!r && p->fd < 0)
		r = begin_pack(p);
	if (r < 0)
		return r;
	p->x.pack[p->at] = (uint16_t)p->number;
	p->x.offset[p->at] = p->size;
	p->x.stored[p->at] = stored;
	p->x.kind[p->at] = n > 0 ? FFS_CHUNK_LZ4 : FFS_CHUNK_RAW;
	r = append(p, n > 0 ? p->compressed : chunk, stored);
	if (!r)
		remember(p, (uint32_t)p->at);
	return r;
}

static int put_chunk(struct ffs_packer *p, const unsigned char *chunk, uint32_t len, bool zero)
{
	int r;

	if (zero || ffs_is_zero(chunk, len)) {
		p->x.hash[p->at] = len == FFS_STORE_CHUNK ? p->zero_hash : ffs_hash_of(chunk, len);
		p->x.kind[p->at] = FFS_CHUNK_ZERO;
		return 0;
	}
	p->x.hash[p->at] = ffs_hash_of(chunk, len);
	r = try_share(p, chunk, len, &p->x.hash[p->at]);
	return r ? (r > 0 ? 0 : r) : store_chunk(p, chunk, len);
}

int ffs_packer_put(
	struct ffs_packer *p, const unsigned char *buf, size_t len, bool zero, struct ffs_error *err)
{
	for (size_t done = 0; done < len;) {
		uint32_t n = len - done < FFS_STORE_CHUNK ? (uint32_t)(len - done) : FFS_STORE_CHUNK;
		int r = put_chunk(p, buf + done, n, zero);

		if (r < 0)
			return fail(p, r, err);
		p->at++;
		done += n;
	}
	return 0;
}

/* ---- beginning and end ---- */

static int begin(struct ffs_packer *p, uint64_t memory_size, struct ffs_stored *share)
{
	static const unsigned char zeros[FFS_STORE_CHUNK];
	uint64_t refs, room = 1;
	int r = ffs_index_new(&p->x, memory_size);

	if (r < 0)
		return r;
	p->zero_hash = ffs_hash_of(zeros, sizeof(zeros));
	/* a parent that cannot be read is not shared */
	if (share && ffs_stored_kind(share) == FFS_STORE_PACKED && ffs_packed_open(share, NULL) == 0)
		p->share = share;
	refs = p->x.n_chunks + (p->share ? p->share->index.n_chunks : 0);
	if (refs >= NONE)
		return -EFBIG;
	while (room < 2 * refs + 2)
		room *= 2;
	p->mask = room - 1;
	p->table = malloc(room * sizeof(*p->table));
	p->buf = malloc(BUFFER);
	p->compressed = malloc(FFS_STORE_CHUNK);
	p->other = malloc(FFS_STORE_CHUNK);
	p->state = XXH3_createState();
	p->shared_packs = p->share ? calloc(p->share->index.n_packs + 1, sizeof(int)) : NULL;
	if (!p->table || !p->buf || !p->compressed || !p->other || !p->state ||
		(p->share && !p->shared_packs))
		return -ENOMEM;
	memset(p->table, 0xff, room * sizeof(*p->table));
	if (!p->share)
		return 0;
	for (uint32_t i = 0; i < p->share->index.n_packs; i++)
		p->shared_packs[i] = UNUSED;
	for (uint64_t i = 0; i < p->share->index.n_chunks; i++)
		if (p->share->index.kind[i] != FFS_CHUNK_ZERO)
			remember(p, (uint32_t)(p->x.n_chunks + i));
	return 0;
}

int ffs_packer_new(struct ffs_draft *d, uint64_t memory_size, struct ffs_stored *share,
	struct ffs_packer **out, struct ffs_error *err)
{
	struct ffs_packer *p = calloc(1, sizeof(*p));
	int r;

	if (!p)
		return ffs_error_set(err, ENOMEM, "no memory");
	p->d = d;
	p->fd = -1;
	r = begin(p, memory_size, share);
	if (r < 0) {
		fail(p, r, err);
		ffs_packer_free(p);
		return r;
	}
	*out = p;
	return 0;
}

int ffs_packer_finish(struct ffs_packer *p, struct ffs_error *err)
{
	_cleanup_free_ unsigned char *bytes = NULL;
	_cleanup_close_ int fd = -1;
	struct ffs_hash h;
	size_t len = 0;
	int r = p->fd >= 0 ? end_pack(p) : 0;

	if (!r)
		r = ffs_index_encode(&p->x, &bytes, &len);
	if (!r) {
		fd = ffs_store_ops->create(p->d->fd, FFS_MEMORY_INDEX);
		r = fd < 0 ? fd : ffs_store_ops->write(fd, bytes, len, 0);
	}
	if (!r) {
		h = ffs_hash_of(bytes, len);
		r = ffs_draft_add_file(p->d, FFS_MEMORY_INDEX, len, &h);
	}
	return r < 0 ? fail(p, r, err) : 0;
}

void ffs_packer_free(struct ffs_packer *p)
{
	if (!p)
		return;
	ffs_close_fd(&p->fd);
	ffs_index_clear(&p->x);
	XXH3_freeState(p->state);
	free(p->table);
	free(p->buf);
	free(p->compressed);
	free(p->other);
	free(p->shared_packs);
	free(p);
}
