/* What a branch that differs from the truth says of itself, so that a failure that comes once in ten thousand
 * rounds can be explained from its log.
 *
 * The guest writes time stamps (fake-vmm.c), so each word that differs has a date: older than the branch's
 * instant (a write that the image missed), or newer (one that came after the instant and was not trapped).
 * The newest stamp of the truth is the instant, as near as a guest that never rests can say. */
#pragma once

#include "branch-kit.h"

struct explain_page {
	bool zero;              /* the branch has nothing but zeros there, the truth has not */
	unsigned older, newer;  /* words of the branch that are so, compared with the truth's */
	uint64_t first, newest; /* stamps of the branch: of the first word that differs; of all that differ */
};

static inline struct explain_page explain_page(const uint64_t *got, const uint64_t *truth)
{
	struct explain_page p = {.zero = ffs_is_zero((const char *)got, 4096)};

	for (unsigned i = 0; i < 512; i++) {
		if (got[i] == truth[i])
			continue;
		p.older += got[i] < truth[i];
		p.newer += got[i] > truth[i];
		p.first = p.first ? p.first : got[i];
		p.newest = got[i] > p.newest ? got[i] : p.newest;
	}
	return p;
}

static inline const char *explain_kind(const struct explain_page *p)
{
	return p->zero                ? "zeros"
	       : p->newer && p->older ? "both older and newer"
	       : p->newer             ? "newer"
				      : "older";
}

/* What the engine knows of a page: bits of its cluster, and of the image below it. */
static inline void explain_engine(struct ffs_branch *b, uint64_t off)
{
	struct ffs_pages *pages = b->tracker->pages;

	for (unsigned i = 0; i < pages->n; i++) {
		struct ffs_pages_region *r = &pages->r[i];

		if (off < r->offset || off - r->offset >= r->size)
			continue;
		uint64_t c = (off - r->offset) / r->cluster_bytes;
		off_t data = lseek(b->image.fd, (off_t)off, SEEK_DATA);

		print_message("    region %u cluster %llu: writable %04x need %04x dirty %u zeros %u, image "
			      "has %s\n",
			i, (unsigned long long)c, r->writable[c], atomic_load(&b->need[i][c]),
			atomic_load(&r->dirty[c / r->clusters_per_slice]),
			atomic_load(&b->zeros[i][c / r->clusters_per_slice]),
			data == (off_t)off ? "data" : "a hole");
	}
}

/* A range of pages that differ in the same way, as one line. */
static inline void explain_range(
	uint64_t from, uint64_t to, const struct explain_page *p, uint64_t instant, bool again)
{
	print_message("  pages %llu-%llu (%llu): the branch has %s (first page: %u words older, %u newer; "
		      "its first "
		      "word that differs is of %+lld cycles, its newest of %+lld from the instant)%s\n",
		(unsigned long long)from, (unsigned long long)to - 1, (unsigned long long)(to - from),
		explain_kind(p), p->older, p->newer, p->first ? (long long)(p->first - instant) : 0,
		p->newest ? (long long)(p->newest - instant) : 0, again ? "" : ", AND NOT when read again");
}

static inline uint64_t explain_instant(const uint8_t *truth, uint64_t size)
{
	uint64_t newest = 0;

	for (uint64_t i = 0; i < size / 8; i++)
		newest = ((const uint64_t *)truth)[i] > newest ? ((const uint64_t *)truth)[i] : newest;
	return newest;
}

/* Everything about a branch that is not what the truth says. `when`: what the test was doing. */
static inline void explain(
	struct ffs_branch *b, struct fake_vmm *f, const uint8_t *truth, unsigned round, const char *when)
{
	uint8_t *got = malloc(f->size), *again = malloc(f->size);
	uint64_t instant = explain_instant(truth, f->size), from = 0, ranges = 0;
	struct explain_page first = {0};
	bool in = false, same = true;

	assert_non_null(got);
	assert_non_null(again);
	ssize_t n = ffs_branch_read_memory(b, got, f->size, 0),
		m = ffs_branch_read_memory(b, again, f->size, 0);

	print_message(
		"round %u, %s: branch %s is %s, %llu bytes remain, faults %llu, revoked %d, removes %u, "
		"stops %u, resumes %u; read %zd, again %zd of %llu\n",
		round, when, b->id, ffs_branch_state_name(ffs_branch_state(b)),
		(unsigned long long)atomic_load(&b->remaining), (unsigned long long)atomic_load(&b->faults),
		ffs_tracker_revoked(b->tracker), atomic_load(&b->tracker->removes), f->stops, f->resumes, n,
		m, (unsigned long long)f->size);
	for (uint64_t p = 0; p <= f->size / 4096 && n > 0; p++) {
		const uint8_t *g = got + p * 4096, *t = truth + p * 4096;
		bool bad = p < f->size / 4096 && memcmp(g, t, 4096) != 0;
		struct explain_page now = {0};

		if (bad)
			now = explain_page((const void *)g, (const void *)t);
		if (in && (!bad || strcmp(explain_kind(&now), explain_kind(&first)) != 0)) {
			explain_range(from, p, &first, instant, same);
			explain_engine(b, from * 4096);
			in = false;
			if (++ranges == 100) {
				print_message("  and more\n");
				break;
			}
		}
		if (bad && !in) {
			in = same = true;
			from = p;
			first = now;
		}
		if (bad)
			same &= memcmp(again + p * 4096, t, 4096) != 0;
	}
	if (!ranges)
		print_message("  read once more it is right\n");
	free(got);
	free(again);
}

/* The branch is the truth, byte for byte; else the test fails, and its log says all there is to say. */
static inline void assert_identical(
	struct ffs_branch *b, struct fake_vmm *f, const uint8_t *truth, unsigned round, const char *when)
{
	uint64_t bad = wrong_pages(b, truth, f->size);

	if (!bad)
		return;
	explain(b, f, truth, round, when);
	fail_msg("round %u, %s: %lld pages differ from the truth", round, when, (long long)bad);
}
