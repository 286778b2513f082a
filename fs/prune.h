/* Which cached branches go, and what they are called: pure logic. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define FFS_KEY_MAX 1024u
#define FFS_PRUNE_NO_LIMIT UINT64_MAX

struct ffs_prune_entry {
	void *data; /* the caller's */
	uint64_t size, last_use_ns;
	bool in_use; /* never goes now */
	bool goes;   /* out */
};

struct ffs_prune_limits {
	uint64_t age_ns; /* unused for longer; 0: any age */
	uint64_t size;   /* of all together; FFS_PRUNE_NO_LIMIT */
};

/* Mark what goes: what is too old, then what was not used for longest until the rest fits. Returns how many.
 */
unsigned ffs_prune(
	struct ffs_prune_entry *e, unsigned n, const struct ffs_prune_limits *limits, uint64_t now_ns);

/* The name of the branch of a key: "key-" and 32 hexadecimal digits. Two keys may share one. */
void ffs_key_name(const char *key, char out[40]);
