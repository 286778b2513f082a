#include "model-state.h"

#include <stdlib.h>

const char *const model_mutant_name[MUTANTS] = {"none", "unprotect-before-copy", "late-page",
	"reader-no-recheck", "captured-early", "sweep-race", "dirty-after-look", "one-sweep",
	"since-reset-early", "cancel-drops", "no-revoked-check", "release-keeps-bits", "open-look-first",
	"clear-no-wait", "copier-not-held"};

/* ---- what holds in every state ---- */

/* The state of a page for a branch in flight, in the words of pages.h. */
static enum page_state page_state(const struct state *s, const struct branch *b, unsigned p)
{
	if (s->writable >> p & 1)
		return DIRTY;
	if (!(b->need >> p & 1))
		return CAPTURED;
	return s->lock ? COPYING : CLEAN;
}

static void check(struct explorer *x, const struct state *s)
{
	for (unsigned i = 0; i < x->c->branches; i++) {
		const struct branch *b = &s->b[i];

		if (!b->slot || b->failed || s->revoked)
			continue;
		if (b->left < __builtin_popcount(b->need))
			x->wrong = "fewer pages are counted as missing than are needed";
		for (unsigned p = 0; p < x->c->pages; p++) {
			/* dirty implies need bit 0 in every branch */
			if (page_state(s, b, p) == DIRTY && !s->lock && !s->paused && (b->need >> p & 1))
				x->wrong = "a dirty page is needed by a branch in flight";
			if (b->taken && !(b->need >> p & 1) &&
				(!(b->have >> p & 1) || b->image[p] != b->truth[p]))
				x->wrong = "a captured page is not the page of the branch's instant";
		}
	}
	if (s->lock || !s->registered || s->revoked)
		return;
	if (~s->protect & ~s->writable & all_pages(x))
		x->wrong = "a page can be written and is not marked writable";
	if (s->writable && !s->dirty)
		x->wrong = "a page is marked writable and its slice is not marked dirty";
}

static void check_end(struct explorer *x, const struct state *s)
{
	if (s->waits || s->device_waits)
		x->wrong = "the guest waits for ever";
	else if (s->writes < x->c->writes)
		x->wrong = "the guest stands still";
	for (unsigned i = 0; i < x->c->branches; i++)
		if (s->b[i].state == WRITING)
			x->wrong = "a branch is never complete";
}

static uint64_t hash(const struct state *s)
{
	const uint8_t *p = (const uint8_t *)s;
	uint64_t h = 0x9e3779b97f4a7c15ull;

	for (size_t i = 0; i < sizeof(*s); i += 8) {
		uint64_t w = 0;

		memcpy(&w, p + i, sizeof(*s) - i < 8 ? sizeof(*s) - i : 8);
		h = (h ^ w) * 0xff51afd7ed558ccdull;
		h ^= h >> 32;
	}
	return h ? h : 1;
}

/* True: it is new. Kept by a hash of 64 bits: among ten million states two are mistaken for one once in
 * 300,000 runs. */
static bool remember(struct explorer *x, const struct state *s)
{
	uint64_t h = hash(s);

	for (uint64_t i = h & x->mask;; i = (i + 1) & x->mask) {
		if (x->seen[i] == h)
			return false;
		if (!x->seen[i]) {
			x->seen[i] = h;
			return true;
		}
	}
}

static void push(struct explorer *x, const struct state *s)
{
	if (x->depth == x->room) {
		x->room = x->room ? 2 * x->room : 256;
		x->stack = realloc(x->stack, x->room * sizeof(*x->stack));
		if (!x->stack)
			abort();
	}
	struct frame *f = &x->stack[x->depth++];

	f->s = *s;
	f->next = 0;
	memcpy(f->step, x->step, sizeof(f->step));
}

static void describe(struct explorer *x)
{
	size_t n = 0, cap = sizeof(x->out->trace);

	for (unsigned i = 1; i < x->depth && n < cap; i++)
		n += (size_t)snprintf(x->out->trace + n, cap - n, "  %s\n", x->stack[i].step);
	if (n < cap)
		snprintf(x->out->trace + n, cap - n, "  %s\n", x->step);
}

void model_explore(const struct model_config *config, uint64_t limit, struct model_result *out)
{
	struct explorer x = {.c = config, .out = out};
	struct state s;
	uint64_t size = 1024;

	while (size < 2 * limit)
		size *= 2;
	x.mask = size - 1;
	x.seen = calloc(size, sizeof(*x.seen));
	if (!x.seen)
		abort();
	memset(out, 0, sizeof(*out));
	memset(&s, 0, sizeof(s));
	s.writable = all_pages(&x);
	s.dirty = s.pc[TAKER] = 1;
	s.parent = s.heir = s.base = -1;
	remember(&x, &s);
	push(&x, &s);
	out->states = 1;
	bool any = false; /* of the frame on top: a step was possible; kept in `next`'s top bit */

	while (x.depth && !x.wrong) {
		struct frame *f = &x.stack[x.depth - 1];
		unsigned number = f->next & 0x7f;

		any = f->next & 0x80;
		if (number == MODEL_THREADS * CHOICES) {
			if (!any) {
				out->ends++;
				snprintf(x.step, sizeof(x.step), "the end");
				check_end(&x, &f->s);
			}
			if (!x.wrong)
				x.depth--;
			continue;
		}
		f->next = (uint8_t)(number + 1) | (any ? 0x80 : 0);
		s = f->s;
		if (!step(&x, &s, number))
			continue;
		f->next |= 0x80;
		check(&x, &s);
		if (x.wrong || !remember(&x, &s))
			continue;
		if (++out->states > limit)
			x.wrong = "too many states";
		push(&x, &s);
	}
	out->violation = x.wrong;
	if (x.wrong)
		describe(&x);
	free(x.stack);
	free(x.seen);
}
