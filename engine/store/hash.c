/* Owns nothing: xxh3-128 in the form in which the store keeps it. Any thread. */
#include "store/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PIECE (1u << 20)

static struct ffs_hash canonical(XXH128_hash_t h)
{
	struct ffs_hash out;
	XXH128_canonical_t c;

	XXH128_canonicalFromHash(&c, h);
	memcpy(out.b, c.digest, sizeof(out.b));
	return out;
}

struct ffs_hash ffs_hash_of(const void *buf, size_t len)
{
	return canonical(XXH3_128bits(buf, len));
}

struct ffs_hash ffs_hash_digest(const XXH3_state_t *state)
{
	return canonical(XXH3_128bits_digest(state));
}

void ffs_hash_hex(const struct ffs_hash *h, char out[33])
{
	static const char digits[] = "0123456789abcdef";

	for (unsigned i = 0; i < sizeof(h->b); i++) {
		out[2 * i] = digits[h->b[i] >> 4];
		out[2 * i + 1] = digits[h->b[i] & 15];
	}
	out[32] = '\0';
}

bool ffs_hash_parse(const char *hex, struct ffs_hash *out)
{
	if (strlen(hex) != 32)
		return false;
	for (unsigned i = 0; i < 32; i++) {
		unsigned char c = (unsigned char)hex[i], v;

		if (c >= '0' && c <= '9')
			v = (unsigned char)(c - '0');
		else if (c >= 'a' && c <= 'f')
			v = (unsigned char)(c - 'a' + 10);
		else
			return false;
		out->b[i / 2] = (unsigned char)(i % 2 ? out->b[i / 2] | v : v << 4);
	}
	return true;
}

bool ffs_hash_equal(const struct ffs_hash *a, const struct ffs_hash *b)
{
	return memcmp(a->b, b->b, sizeof(a->b)) == 0;
}

int ffs_hash_file(int fd, struct ffs_hash *out, uint64_t *size, struct ffs_store_progress *p)
{
	_cleanup_free_ char *buf = malloc(PIECE);
	XXH3_state_t *state = XXH3_createState();
	uint64_t off = 0;
	ssize_t n = buf && state ? 1 : -ENOMEM;

	if (state)
		XXH3_128bits_reset(state);
	while (n > 0) {
		n = ffs_progress_cancelled(p) ? -EINTR : ffs_store_ops->pread(fd, buf, PIECE, off);
		if (n <= 0)
			break;
		XXH3_128bits_update(state, buf, (size_t)n);
		off += (uint64_t)n;
		ffs_progress_add(p, (uint64_t)n);
	}
	if (n == 0) {
		*out = ffs_hash_digest(state);
		*size = off;
	}
	XXH3_freeState(state);
	return (int)n;
}
