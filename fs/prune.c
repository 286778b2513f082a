/* Owns the choice of what a cache lets go. Pure: no I/O, no clock. */
#include "prune.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

unsigned ffs_prune(
	struct ffs_prune_entry *e, unsigned n, const struct ffs_prune_limits *limits, uint64_t now_ns)
{
	uint64_t sum = 0;
	unsigned count = 0;

	for (unsigned i = 0; i < n; i++) {
		e[i].goes = limits->age_ns && !e[i].in_use && now_ns >= e[i].last_use_ns &&
			    now_ns - e[i].last_use_ns >= limits->age_ns;
		count += e[i].goes;
		if (!e[i].goes && __builtin_add_overflow(sum, e[i].size, &sum))
			sum = UINT64_MAX;
	}
	while (sum > limits->size) {
		struct ffs_prune_entry *oldest = NULL;

		for (unsigned i = 0; i < n; i++)
			if (!e[i].goes && !e[i].in_use && (!oldest || e[i].last_use_ns < oldest->last_use_ns))
				oldest = &e[i];
		if (!oldest)
			break;
		oldest->goes = true;
		count++;
		sum -= oldest->size < sum ? oldest->size : sum;
	}
	return count;
}

void ffs_key_name(const char *key, char out[40])
{
	XXH128_hash_t h = XXH3_128bits(key, strlen(key));

	snprintf(out, 40, "key-%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
}
