/* Owns the count of the memory that images take.
 *
 * Threads: any; it outlives the engine with the last branch. One lock, held for additions only. */
#include "branch/budget.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/cancel.h"
#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"

/* What FFS_MEMORY_AUTO leaves alone of the machine's memory: a sixteenth. */
#define AUTO_LEAVES 16u

struct ffs_budget {
	atomic_uint refs;
	pthread_mutex_t lock;
	pthread_cond_t freed;
	uint64_t limit, taken, reserved, frees;
};

struct ffs_budget *ffs_budget_new(void)
{
	struct ffs_budget *b = calloc(1, sizeof(*b));

	if (!b)
		return NULL;
	atomic_init(&b->refs, 1);
	pthread_mutex_init(&b->lock, NULL);
	ffs_cond_init(&b->freed);
	b->limit = FFS_MEMORY_UNLIMITED;
	return b;
}

struct ffs_budget *ffs_budget_ref(struct ffs_budget *b)
{
	atomic_fetch_add_explicit(&b->refs, 1, memory_order_relaxed);
	return b;
}

void ffs_budget_unref(struct ffs_budget *b)
{
	if (!b || atomic_fetch_sub_explicit(&b->refs, 1, memory_order_acq_rel) != 1)
		return;
	pthread_cond_destroy(&b->freed);
	pthread_mutex_destroy(&b->lock);
	free(b);
}

void ffs_budget_set_limit(struct ffs_budget *b, uint64_t limit)
{
	pthread_mutex_lock(&b->lock);
	b->limit = limit;
	pthread_mutex_unlock(&b->lock);
}

/* A line of /proc/meminfo, in bytes; 0 when it is not there. */
static uint64_t meminfo(const char *text, const char *key)
{
	const char *line = strstr(text, key);

	return line ? strtoull(line + strlen(key), NULL, 10) << 10 : 0;
}

/* What the machine could give to images now. */
static int machine_has(uint64_t *out)
{
	_cleanup_free_ char *text = NULL;
	int r = ffs_read_file("/proc/meminfo", 65536, &text, NULL);

	if (r < 0)
		return r;
	uint64_t available = meminfo(text, "\nMemAvailable:"),
		 keep = meminfo(text, "MemTotal:") / AUTO_LEAVES;

	*out = available > keep ? available - keep : 0;
	return 0;
}

static unsigned long long mib(uint64_t bytes)
{
	return bytes >> 20;
}

static int check_auto(struct ffs_budget *b, const char *sandbox, uint64_t bytes, struct ffs_error *err)
{
	uint64_t has;
	int r = machine_has(&has);

	if (r < 0)
		return ffs_error_errno(err, -r, "/proc/meminfo");
	/* captures in flight have part of theirs already, which MemAvailable knows: a little too careful */
	uint64_t left = has > b->reserved ? has - b->reserved : 0;

	if (bytes > left)
		return ffs_error_set(err, ENOSPC,
			"a branch of %s takes up to %llu MiB of memory, and the machine has %llu MiB left "
			"for images (a "
			"sixteenth stays free): remove branches, or mount with memory=SIZE or "
			"memory=unlimited",
			sandbox, mib(bytes), mib(left));
	return 0;
}

static int check_limited(struct ffs_budget *b, const char *sandbox, uint64_t bytes, struct ffs_error *err)
{
	uint64_t used = b->taken + b->reserved, left = b->limit > used ? b->limit - used : 0;

	if (bytes > left)
		return ffs_error_set(err, ENOSPC,
			"a branch of %s takes up to %llu MiB of memory, and %llu MiB of the %llu MiB for "
			"images (mount "
			"option memory=) are left: remove branches, and close what is open of removed ones",
			sandbox, mib(bytes), mib(left), mib(b->limit));
	return 0;
}

static int check(struct ffs_budget *b, const char *sandbox, uint64_t bytes, struct ffs_error *err)
{
	if (b->limit == FFS_MEMORY_AUTO)
		return check_auto(b, sandbox, bytes, err);
	return b->limit == FFS_MEMORY_UNLIMITED ? 0 : check_limited(b, sandbox, bytes, err);
}

int ffs_budget_reserve(struct ffs_budget *b, const char *sandbox, uint64_t bytes, struct ffs_error *err)
{
	int r = FFS_FAULT("budget");

	if (r < 0)
		return ffs_error_errno(err, -r, "memory for a branch of %s", sandbox);
	pthread_mutex_lock(&b->lock);
	r = check(b, sandbox, bytes, err);
	if (r == 0)
		b->reserved += bytes;
	pthread_mutex_unlock(&b->lock);
	return r;
}

void ffs_budget_settle(struct ffs_budget *b, uint64_t reserved, uint64_t taken)
{
	pthread_mutex_lock(&b->lock);
	b->reserved -= reserved;
	b->taken += taken;
	pthread_mutex_unlock(&b->lock);
}

void ffs_budget_release(struct ffs_budget *b, uint64_t reserved, uint64_t taken)
{
	pthread_mutex_lock(&b->lock);
	b->reserved -= reserved;
	b->taken -= taken;
	b->frees++;
	pthread_cond_broadcast(&b->freed);
	pthread_mutex_unlock(&b->lock);
}

bool ffs_budget_fits(struct ffs_budget *b, uint64_t bytes)
{
	pthread_mutex_lock(&b->lock);
	bool fits = check(b, "", bytes, NULL) == 0;

	pthread_mutex_unlock(&b->lock);
	return fits;
}

uint64_t ffs_budget_frees(struct ffs_budget *b)
{
	pthread_mutex_lock(&b->lock);
	uint64_t n = b->frees;

	pthread_mutex_unlock(&b->lock);
	return n;
}

void ffs_budget_await_free(struct ffs_budget *b, uint64_t seen, uint64_t deadline_ns)
{
	int r = 0;

	pthread_mutex_lock(&b->lock);
	while (b->frees == seen && r == 0)
		r = ffs_cancel_wait(NULL, &b->freed, &b->lock, deadline_ns);
	pthread_mutex_unlock(&b->lock);
}

void ffs_budget_usage(struct ffs_budget *b, uint64_t *limit, uint64_t *taken, uint64_t *reserved)
{
	pthread_mutex_lock(&b->lock);
	*limit = b->limit;
	*taken = b->taken;
	*reserved = b->reserved;
	pthread_mutex_unlock(&b->lock);
}
