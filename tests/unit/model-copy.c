#include "model-state.h"

/* ---- the kernel ---- */

static void wake(struct state *s, uint8_t pages)
{
	if (s->waits && pages >> (s->waits - 1) & 1)
		s->waits = 0;
	if (pages & 1)
		s->device_waits = 0;
}

void unprotect(struct state *s, uint8_t pages)
{
	if (s->registered)
		s->protect &= (uint8_t)~pages;
	wake(s, pages);
}

void unregister(struct state *s)
{
	s->protect = 0;
	wake(s, 0xff);
}

/* ---- copying, with the lock held: capture.c ---- */

void copy_step(struct explorer *x, struct state *s, enum model_thread t, uint8_t at, bool again)
{
	bool early = x->c->mutant == MUTANT_CAPTURED_EARLY;
	uint8_t pages = 0;

	switch (s->pc[t] - at) {
	case 0: /* who needs what, and the read */
		for (unsigned i = 0; i < x->c->branches; i++)
			if (s->b[i].slot && !s->b[i].failed && s->b[i].need) {
				pages |= s->b[i].need;
				s->want[t] |= (uint8_t)(1u << i);
			}
		if (!again) {
			s->want[t] |= (uint8_t)(1u << s->r_branch);
			pages |= s->took[t]; /* the mutant: what was missing before the lock */
		}
		s->took[t] = pages;
		for (unsigned p = 0; p < x->c->pages; p++)
			s->buf[t][p] = pages >> p & 1 ? s->mem[p] : 0;
		say(x, "reads the guest");
		break;
	case 1: /* after the read */
		s->void_copy[t] = s->revoked && x->c->mutant != MUTANT_NO_REVOKED_CHECK;
		say(x, "looks whether it counts");
		break;
	case 2:
	case 3:
		for (unsigned i = 0; i < x->c->branches; i++) {
			struct branch *b = &s->b[i];
			uint8_t mine = again ? b->need & s->took[t] : s->took[t];

			if (early && s->pc[t] - at == 3)
				mine = s->took[t] & (uint8_t)~b->have;
			if (!(s->want[t] >> i & 1) || b->failed || !mine)
				continue;
			if (s->void_copy[t]) {
				b->failed = 1;
				continue;
			}
			if ((s->pc[t] - at == 2) != early) {
				for (unsigned p = 0; p < x->c->pages; p++)
					if (mine >> p & 1)
						b->image[p] = s->buf[t][p];
				b->have |= mine;
			} else {
				s->cleared[t][i] = (uint8_t)__builtin_popcount(b->need & mine);
				b->need &= (uint8_t)~mine;
			}
		}
		say(x, (s->pc[t] - at == 2) != early ? "writes the image" : "clears the need bits");
		break;
	case 4: /* set_captured(), and lets go of the slots */
		for (unsigned i = 0; i < x->c->branches; i++)
			s->b[i].left = (uint8_t)(s->b[i].left - s->cleared[t][i]);
		memset(s->cleared[t], 0, sizeof(s->cleared[t]));
		say(x, "counts what it captured");
		break;
	}
	s->pc[t]++;
	if (s->pc[t] - at < COPY_PCS)
		return;
	s->took[t] = s->want[t] = s->void_copy[t] = 0;
	memset(s->buf[t], 0, sizeof(s->buf[t]));
}

bool take_lock(struct explorer *x, struct state *s, enum model_thread t)
{
	if (s->lock)
		return false;
	s->lock = (uint8_t)(t + 1);
	say(x, "locks");
	return true;
}

void unlock(struct explorer *x, struct state *s)
{
	s->lock = 0;
	say(x, "unlocks");
}

/* ---- a sweep: pages.c. Five pcs from `at`; beyond them it is over. ---- */

enum { SWEEP_LOOK, SWEEP_LOCK, SWEEP_PROTECT, SWEEP_BITS, SWEEP_UNLOCK };

bool sweep_step(struct explorer *x, struct state *s, enum model_thread t, uint8_t at)
{
	bool racing = x->c->mutant == MUTANT_SWEEP_RACE;

	switch (s->pc[t] - at) {
	case SWEEP_LOOK:
		say(x, s->dirty ? "sweeps" : "passes over");
		s->pc[t] = (uint8_t)(at + (!s->dirty ? SWEEP_PCS : racing ? SWEEP_PROTECT : SWEEP_LOCK));
		return true;
	case SWEEP_LOCK:
		if (!take_lock(x, s, t))
			return false;
		break;
	case SWEEP_PROTECT:
		if (!s->registered && !s->revoked)
			x->wrong = "a sweep protects memory that is not registered";
		s->took[t] = s->writable;
		if (s->registered)
			s->protect |= s->writable;
		say(x, "protects");
		break;
	case SWEEP_BITS:
		s->changed |= x->c->track ? s->writable : 0;
		s->since |= x->c->track ? s->writable : 0;
		s->writable = s->dirty = s->took[t] = 0;
		say(x, "clears writable and dirty");
		if (racing) {
			s->pc[t] = (uint8_t)(at + SWEEP_PCS);
			return true;
		}
		break;
	case SWEEP_UNLOCK:
		unlock(x, s);
		break;
	}
	s->pc[t]++;
	return true;
}
