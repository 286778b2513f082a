/* Owns the layout of memory.idx and of a pack's header (docs/format.md), to and from bytes. No I/O, no state; any
 * thread. What is decoded comes from a disk or a stranger: every number is checked before it is used. */
#include "store/internal.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define HEADER 128u
#define PACK_ENTRY 64u
#define MAGIC "forkfsIX"
#define PACK_MAGIC "forkfsPK"
/* bytes a chunk: pack 2, offset 4, stored 4, kind 1, hash 16 */
#define CHUNK_BYTES 27u
#define AT_HASH 112u

static void put32(unsigned char *p, uint32_t v)
{
	v = htole32(v);
	memcpy(p, &v, sizeof(v));
}

static void put64(unsigned char *p, uint64_t v)
{
	v = htole64(v);
	memcpy(p, &v, sizeof(v));
}

static uint32_t get32(const unsigned char *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return le32toh(v);
}

static uint64_t get64(const unsigned char *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return le64toh(v);
}

/* The offsets of the parts, which follow each other without gaps. */
struct layout {
	uint64_t packs, pack, offset, stored, kind, hash, end;
};

static struct layout lay_out(uint64_t n, uint32_t n_packs)
{
	struct layout l = {.packs = HEADER};

	l.hash = l.packs + (uint64_t)PACK_ENTRY * n_packs;
	l.offset = l.hash + 16 * n;
	l.stored = l.offset + 4 * n;
	l.pack = l.stored + 4 * n;
	l.kind = l.pack + 2 * n;
	l.end = l.kind + n;
	return l;
}

int ffs_index_new(struct ffs_index *x, uint64_t memory_size)
{
	uint64_t n = memory_size / FFS_STORE_CHUNK + (memory_size % FFS_STORE_CHUNK != 0), room = n ? n : 1;

	*x = (struct ffs_index){.memory_size = memory_size, .n_chunks = n};
	x->pack = calloc(room, sizeof(*x->pack));
	x->offset = calloc(room, sizeof(*x->offset));
	x->stored = calloc(room, sizeof(*x->stored));
	x->kind = calloc(room, sizeof(*x->kind));
	x->hash = calloc(room, sizeof(*x->hash));
	if (!x->pack || !x->offset || !x->stored || !x->kind || !x->hash) {
		ffs_index_clear(x);
		return -ENOMEM;
	}
	return 0;
}

void ffs_index_clear(struct ffs_index *x)
{
	free(x->packs);
	free(x->pack);
	free(x->offset);
	free(x->stored);
	free(x->kind);
	free(x->hash);
	*x = (struct ffs_index){0};
}

uint32_t ffs_index_chunk_len(const struct ffs_index *x, uint64_t chunk)
{
	uint64_t left = x->memory_size - chunk * FFS_STORE_CHUNK;

	return left < FFS_STORE_CHUNK ? (uint32_t)left : FFS_STORE_CHUNK;
}

void ffs_pack_header(unsigned char out[FFS_PACK_HEADER], const unsigned char id[16])
{
	memset(out, 0, FFS_PACK_HEADER);
	memcpy(out, PACK_MAGIC, 8);
	put32(out + 8, FFS_STORE_FORMAT);
	put32(out + 12, FFS_PACK_HEADER);
	memcpy(out + 16, id, 16);
}

/* ---- to bytes ---- */

int ffs_index_encode(const struct ffs_index *x, unsigned char **out, size_t *len)
{
	struct layout l = lay_out(x->n_chunks, x->n_packs);
	unsigned char *b = calloc(1, l.end);

	if (!b)
		return -ENOMEM;
	memcpy(b, MAGIC, 8);
	put32(b + 8, FFS_STORE_FORMAT);
	put32(b + 12, HEADER);
	put32(b + 16, FFS_STORE_CHUNK);
	put32(b + 20, x->n_packs);
	put64(b + 24, x->memory_size);
	put64(b + 32, x->n_chunks);
	put64(b + 40, l.packs);
	put64(b + 48, l.hash);
	put64(b + 56, l.offset);
	put64(b + 64, l.stored);
	put64(b + 72, l.pack);
	put64(b + 80, l.kind);
	put64(b + 88, l.end);
	for (uint32_t i = 0; i < x->n_packs; i++) {
		unsigned char *e = b + l.packs + (uint64_t)PACK_ENTRY * i;

		memcpy(e, x->packs[i].id, 16);
		put64(e + 16, x->packs[i].size);
		memcpy(e + 24, x->packs[i].hash.b, 16);
	}
	for (uint64_t i = 0; i < x->n_chunks; i++) {
		uint16_t pack = htole16(x->pack[i]);

		memcpy(b + l.hash + 16 * i, x->hash[i].b, 16);
		put32(b + l.offset + 4 * i, x->offset[i]);
		put32(b + l.stored + 4 * i, x->stored[i]);
		memcpy(b + l.pack + 2 * i, &pack, 2);
		b[l.kind + i] = x->kind[i];
	}
	struct ffs_hash h = ffs_hash_of(b, l.end);

	memcpy(b + AT_HASH, h.b, 16);
	*out = b;
	*len = l.end;
	return 0;
}

/* ---- from bytes ---- */

static int damaged(struct ffs_error *err, const char *what)
{
	return ffs_error_set(err, EBADMSG, FFS_MEMORY_INDEX " is damaged: %s", what);
}

static int check_header(const unsigned char *b, size_t len, struct ffs_error *err)
{
	if (len < HEADER || memcmp(b, MAGIC, 8) != 0)
		return damaged(err, "it is no index");
	if (get32(b + 8) > FFS_STORE_FORMAT)
		return ffs_error_set(err, ENOTSUP,
			FFS_MEMORY_INDEX
			" is of format %u, written by a newer forkfs: this one reads format %u at "
			"most, use that version",
			get32(b + 8), FFS_STORE_FORMAT);
	uint64_t size = get64(b + 24), n = get64(b + 32);
	uint32_t n_packs = get32(b + 20);

	if (get32(b + 8) < 1 || get32(b + 12) != HEADER || get32(b + 16) != FFS_STORE_CHUNK)
		return damaged(err, "its header makes no sense");
	/* the file's own length bounds every product below */
	if (n > len / CHUNK_BYTES || n_packs > FFS_MAX_PACKS || size > n * FFS_STORE_CHUNK ||
		(n && size <= (n - 1) * FFS_STORE_CHUNK))
		return damaged(err, "its numbers do not agree with its length");
	struct layout l = lay_out(n, n_packs);

	if (l.end != len || get64(b + 40) != l.packs || get64(b + 48) != l.hash ||
		get64(b + 56) != l.offset || get64(b + 64) != l.stored || get64(b + 72) != l.pack ||
		get64(b + 80) != l.kind || get64(b + 88) != l.end)
		return damaged(err, "its parts are not where they belong");
	return 0;
}

static int check_hash(const unsigned char *b, size_t len, struct ffs_error *err)
{
	static const unsigned char zeros[16];
	XXH3_state_t *state = XXH3_createState();
	struct ffs_hash is;

	if (!state)
		return ffs_error_set(err, ENOMEM, "no memory");
	XXH3_128bits_reset(state);
	XXH3_128bits_update(state, b, AT_HASH);
	XXH3_128bits_update(state, zeros, sizeof(zeros));
	XXH3_128bits_update(state, b + AT_HASH + 16, len - AT_HASH - 16);
	is = ffs_hash_digest(state);
	XXH3_freeState(state);
	return memcmp(is.b, b + AT_HASH, 16) == 0 ? 0 : damaged(err, "its checksum is wrong");
}

static bool good_chunk(const struct ffs_index *x, uint64_t i)
{
	uint32_t len = ffs_index_chunk_len(x, i), stored = x->stored[i], offset = x->offset[i];

	if (x->kind[i] == FFS_CHUNK_ZERO)
		return !stored && !offset && !x->pack[i];
	if (x->kind[i] >= FFS_CHUNK_KINDS || x->pack[i] >= x->n_packs || offset < FFS_PACK_HEADER)
		return false;
	if (x->kind[i] == FFS_CHUNK_RAW ? stored != len : !stored || stored >= len)
		return false;
	return (uint64_t)offset + stored <= x->packs[x->pack[i]].size;
}

static int decode_packs(const unsigned char *b, const struct layout *l, uint32_t n_packs, struct ffs_index *x)
{
	x->packs = calloc(n_packs ? n_packs : 1, sizeof(*x->packs));
	if (!x->packs)
		return -ENOMEM;
	x->n_packs = n_packs;
	for (uint32_t i = 0; i < n_packs; i++) {
		const unsigned char *e = b + l->packs + (uint64_t)PACK_ENTRY * i;

		memcpy(x->packs[i].id, e, 16);
		x->packs[i].size = get64(e + 16);
		memcpy(x->packs[i].hash.b, e + 24, 16);
		if (x->packs[i].size < FFS_PACK_HEADER || x->packs[i].size > FFS_PACK_MAX)
			return -EBADMSG;
	}
	return 0;
}

int ffs_index_decode(const unsigned char *b, size_t len, struct ffs_index *out, struct ffs_error *err)
{
	struct ffs_index x;
	int r = check_header(b, len, err);

	if (!r)
		r = check_hash(b, len, err);
	if (r < 0)
		return r;
	struct layout l = lay_out(get64(b + 32), get32(b + 20));

	r = ffs_index_new(&x, get64(b + 24));
	if (!r)
		r = decode_packs(b, &l, get32(b + 20), &x);
	for (uint64_t i = 0; !r && i < x.n_chunks; i++) {
		uint16_t pack;

		memcpy(&pack, b + l.pack + 2 * i, 2);
		memcpy(x.hash[i].b, b + l.hash + 16 * i, 16);
		x.pack[i] = le16toh(pack);
		x.offset[i] = get32(b + l.offset + 4 * i);
		x.stored[i] = get32(b + l.stored + 4 * i);
		x.kind[i] = b[l.kind + i];
		if (!good_chunk(&x, i))
			r = -EBADMSG;
	}
	if (r < 0) {
		ffs_index_clear(&x);
		return r == -ENOMEM ? ffs_error_set(err, ENOMEM, "no memory for an index")
				    : damaged(err, "a chunk or a pack makes no sense");
	}
	*out = x;
	return 0;
}
