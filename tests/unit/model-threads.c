#include "model-state.h"

/* ---- the threads ---- */

static bool guest_step(struct explorer *x, struct state *s, unsigned page)
{
	if (s->paused || s->waits || s->writes == x->c->writes || page >= x->c->pages)
		return false;
	if (s->protect >> page & 1) {
		s->waits = (uint8_t)(page + 1);
		s->event |= (uint8_t)(1u << page);
		say(x, page ? "faults on page 1" : "faults on page 0");
		return true;
	}
	s->mem[page]++;
	s->writes++;
	say(x, page ? "writes page 1" : "writes page 0");
	return true;
}

/* tracker.c: serve_fault() */
static bool handler_step(struct explorer *x, struct state *s, unsigned page)
{
	enum { IDLE, LOCK, MARK, LOOK, COPY, OPEN = COPY + COPY_PCS, BITS, UNLOCK };
	enum model_mutant m = x->c->mutant;
	uint8_t *pc = &s->pc[HANDLER];

	if (page && *pc != IDLE)
		return false;
	switch (*pc) {
	case IDLE:
		if (!(s->event >> page & 1))
			return false;
		s->event &= (uint8_t) ~(1u << page);
		s->h_page = (uint8_t)page;
		say(x, "takes up a fault");
		*pc = LOCK;
		return true;
	case LOCK:
		if (!take_lock(x, s, HANDLER))
			return false;
		*pc = m == MUTANT_DIRTY_AFTER_LOOK ? LOOK : MARK;
		return true;
	case MARK:
		s->dirty = 1;
		say(x, "marks the slice dirty");
		*pc = m != MUTANT_DIRTY_AFTER_LOOK ? LOOK : s->h_needed ? COPY : OPEN;
		return true;
	case LOOK:
		s->h_needed = 0;
		for (unsigned i = 0; i < x->c->branches; i++)
			s->h_needed |= s->b[i].slot && s->b[i].need;
		say(x, s->h_needed ? "finds it needed" : "finds it not needed");
		*pc = m == MUTANT_DIRTY_AFTER_LOOK ? MARK : s->h_needed ? COPY : OPEN;
		if (m == MUTANT_LATE_PAGE)
			*pc = OPEN;
		if (m == MUTANT_UNPROTECT_BEFORE_COPY && s->h_needed)
			unprotect(s, all_pages(x));
		return true;
	case OPEN:
		unprotect(s, s->h_needed ? all_pages(x) : (uint8_t)(1u << s->h_page));
		say(x, "unprotects");
		*pc = BITS;
		return true;
	case BITS:
		s->writable |= s->h_needed ? all_pages(x) : (uint8_t)(1u << s->h_page);
		say(x, "sets writable");
		*pc = UNLOCK;
		return true;
	case UNLOCK:
		unlock(x, s);
		s->h_page = s->h_needed = 0;
		*pc = IDLE;
		return true;
	default:
		copy_step(x, s, HANDLER, COPY, true);
		return true;
	}
}

/* copier.c: copy_slice(), open_slice(), finish(), ffs_tracker_release_idle() */
static bool copier_step(struct explorer *x, struct state *s)
{
	enum {
		IDLE,
		LOOK,
		LOCK,
		COPY,
		UNLOCK = COPY + COPY_PCS,
		MAY_OPEN,
		OPEN_LOCK,
		OPEN_MARK,
		OPEN_LOOK,
		OPEN,
		OPEN_BITS,
		OPEN_UNLOCK,
		FINISH,
		WAIT_USERS,
		SETTLE,
		RELEASE,
		RELEASE_LOCK,
		RELEASE_BITS,
		RELEASE_UNLOCK,
		UNREGISTER,
		RELEASED
	};
	uint8_t *pc = &s->pc[COPIER];
	struct branch *b = &s->b[s->c_branch];
	bool needed = false, late_mark = x->c->mutant == MUTANT_OPEN_LOOK_FIRST;

	switch (*pc) {
	case IDLE:
		if (s->hold && x->c->mutant != MUTANT_COPIER_NOT_HELD)
			return false;
		for (unsigned i = 0; i < x->c->branches; i++)
			if (s->b[i].slot) {
				s->c_branch = (uint8_t)i;
				*pc = s->b[i].failed ? FINISH : LOOK;
				say(x, "takes up a branch");
				return true;
			}
		return false;
	case LOOK: /* ffs_tracker_needed(), which takes no lock */
		say(x, b->need ? "finds pages missing" : "finds no page missing");
		*pc = b->need ? LOCK : MAY_OPEN;
		return true;
	case LOCK:
		if (!take_lock(x, s, COPIER))
			return false;
		*pc = COPY;
		return true;
	case UNLOCK:
		unlock(x, s);
		*pc = b->failed ? FINISH : MAY_OPEN;
		return true;
	case MAY_OPEN:
		say(x, "looks for a take");
		*pc = x->c->track || s->taking || s->revoked ? FINISH : OPEN_LOCK;
		return true;
	case OPEN_LOCK:
		if (!take_lock(x, s, COPIER))
			return false;
		*pc = late_mark ? OPEN_LOOK : OPEN_MARK;
		return true;
	case OPEN_MARK:
		s->dirty = 1;
		say(x, "marks the slice dirty");
		*pc = late_mark ? OPEN : OPEN_LOOK;
		return true;
	case OPEN_LOOK:
		for (unsigned i = 0; i < x->c->branches; i++)
			needed |= s->b[i].slot && s->b[i].need;
		say(x, needed ? "finds it needed" : "finds it not needed");
		*pc = needed ? OPEN_UNLOCK : late_mark ? OPEN_MARK : OPEN;
		return true;
	case OPEN:
		say(x, s->taking ? "sees a take" : "unprotects the slice");
		if (!s->taking)
			unprotect(s, all_pages(x));
		*pc = s->taking ? OPEN_UNLOCK : OPEN_BITS;
		return true;
	case OPEN_BITS:
		s->writable = all_pages(x);
		say(x, "sets writable");
		*pc = OPEN_UNLOCK;
		return true;
	case OPEN_UNLOCK:
		unlock(x, s);
		*pc = FINISH;
		return true;
	case FINISH:
		b->slot = 0;
		say(x, "empties the slot");
		if (x->c->mutant == MUTANT_CANCEL_DROPS && b->failed)
			unprotect(s, b->need);
		*pc = x->c->mutant == MUTANT_CLEAR_NO_WAIT ? SETTLE : WAIT_USERS;
		return true;
	case WAIT_USERS: /* ffs_slot_clear() */
		for (unsigned t = 0; t < MODEL_THREADS; t++)
			if (s->want[t] >> s->c_branch & 1)
				return false;
		say(x, "waits for the slot's users");
		*pc = SETTLE;
		return true;
	case SETTLE:
		if (s->revoked)
			b->failed = 1;
		if (!b->failed && b->need)
			x->wrong = "a branch is settled with pages missing";
		if (!b->failed && b->left)
			x->wrong = "a branch is settled with pages that nobody has counted";
		for (unsigned p = 0; p < x->c->pages; p++)
			if (!b->failed && b->image[p] != b->truth[p])
				x->wrong = "a branch is ready and wrong";
		b->state = b->failed ? FAILED : READY;
		s->in_flight--;
		say(x, b->failed ? "settles it as failed" : "settles it as ready");
		*pc = RELEASE;
		return true;
	case RELEASE:
		*pc = IDLE;
		if (!s->in_flight && !s->taking && !x->c->track && s->registered) {
			s->releasing = 1;
			*pc = x->c->mutant == MUTANT_RELEASE_KEEPS_BITS ? UNREGISTER : RELEASE_LOCK;
		}
		s->c_branch = 0;
		say(x, s->releasing ? "begins to release" : "releases nothing");
		return true;
	case RELEASE_LOCK:
		if (!take_lock(x, s, COPIER))
			return false;
		*pc = RELEASE_BITS;
		return true;
	case RELEASE_BITS:
		s->writable = all_pages(x);
		s->dirty = 1;
		say(x, "marks all writable");
		*pc = RELEASE_UNLOCK;
		return true;
	case RELEASE_UNLOCK:
		unlock(x, s);
		*pc = UNREGISTER;
		return true;
	case UNREGISTER:
		s->registered = 0;
		unregister(s);
		say(x, "unregisters");
		*pc = RELEASED;
		return true;
	case RELEASED:
		s->releasing = 0;
		say(x, "has released");
		*pc = IDLE;
		return true;
	default:
		copy_step(x, s, COPIER, COPY, true);
		return true;
	}
}

/* branch.c: ffs_branch_read_memory(). `which`: branch and page. */
static bool reader_step(struct explorer *x, struct state *s, unsigned which)
{
	enum { IDLE, LOCK, COPY, UNLOCK = COPY + COPY_PCS, READ };
	uint8_t *pc = &s->pc[READER];
	unsigned branch = which / MODEL_PAGES, page = which % MODEL_PAGES;
	struct branch *b;

	if (*pc == IDLE) {
		if (s->reads == x->c->reads || branch >= x->c->branches || page >= x->c->pages)
			return false;
		b = &s->b[branch];
		if (!b->taken)
			return false;
		s->r_branch = (uint8_t)branch;
		s->r_page = (uint8_t)page;
		s->took[READER] =
			x->c->mutant == MUTANT_READER_NO_RECHECK ? (uint8_t)(b->need & 1u << page) : 0;
		*pc = b->state == WRITING && (b->need >> page & 1) ? LOCK : READ;
		say(x, *pc == LOCK ? "finds a page missing" : "finds a page there");
		return true;
	}
	if (which)
		return false;
	b = &s->b[s->r_branch];
	switch (*pc) {
	case LOCK:
		if (!take_lock(x, s, READER))
			return false;
		*pc = COPY;
		return true;
	case UNLOCK:
		unlock(x, s);
		*pc = READ;
		return true;
	case READ: /* and `failing` once more behind it */
		if (!b->failed && b->image[s->r_page] != b->truth[s->r_page])
			x->wrong = "a reader was given a wrong page";
		say(x, "reads the image");
		s->reads++;
		s->r_branch = s->r_page = s->took[READER] = 0;
		*pc = IDLE;
		return true;
	default:
		copy_step(x, s, READER, COPY, x->c->mutant != MUTANT_READER_NO_RECHECK);
		return true;
	}
}

/* lineage.c */
static void lineage_begin(struct explorer *x, struct state *s)
{
	if (!x->c->track)
		return;
	if (s->heir >= 0 && s->b[s->heir].state == READY) {
		uint8_t old = s->changed;

		s->parent = s->heir;
		s->heir = -1;
		s->changed = s->since;
		s->since = old;
	} else if (s->heir >= 0 && s->b[s->heir].failed) {
		s->heir = -1;
	}
	s->base = s->parent;
}

static void inherit(struct explorer *x, struct state *s, struct branch *b, bool heir)
{
	uint8_t shared = s->base >= 0 ? (uint8_t)(b->need & ~s->changed) : 0;

	if (heir || x->c->mutant == MUTANT_SINCE_RESET_EARLY)
		s->since = (uint8_t)(all_pages(x) & ~b->need);
	for (unsigned p = 0; p < x->c->pages; p++)
		if (shared >> p & 1) {
			b->image[p] = s->b[s->base].image[p];
			b->have |= (uint8_t)(1u << p);
		}
	s->cleared[TAKER][b - s->b] = (uint8_t)__builtin_popcount(shared);
	b->need &= (uint8_t)~shared;
}

/* take.c */
static bool taker_step(struct explorer *x, struct state *s)
{
	enum {
		BEGIN = 1,
		REGISTER,
		PREARM,
		PAUSE = PREARM + SWEEP_PCS,
		VMSTATE,
		ARM,
		INSTANT = ARM + SWEEP_PCS,
		ARM_AGAIN,
		RESUME = ARM_AGAIN + SWEEP_PCS,
		INHERIT_LOCK,
		INHERIT,
		INHERIT_UNLOCK,
		INHERIT_COUNT,
		TAKEN
	};
	uint8_t *pc = &s->pc[TAKER];
	unsigned n = 0;

	while (n < x->c->branches && s->b[n].taken)
		n++;
	if (n == x->c->branches)
		return false;
	struct branch *b = &s->b[n];

	switch (*pc) {
	case 0:
	case BEGIN:
		if (s->revoked) /* the next branch begins with a new userfaultfd */
			return false;
		lineage_begin(x, s);
		s->taking = 1;
		say(x, "begins");
		*pc = REGISTER;
		return true;
	case REGISTER:
		if (s->releasing)
			return false;
		s->registered = !s->revoked;
		say(x, "registers");
		*pc = PREARM;
		return true;
	case PAUSE:
		if (s->waits) /* a vCPU that waits for a fault does not stop */
			return false;
		s->paused = s->hold = 1;
		say(x, "pauses the guest");
		*pc = x->c->vmstate_writes ? VMSTATE : ARM;
		return true;
	case VMSTATE: /* saving device state writes guest memory */
		if (s->device_waits)
			return false;
		if (s->protect & 1) {
			s->device_waits = 1;
			s->event |= 1;
			say(x, "faults: the VMM on page 0");
			return true;
		}
		s->mem[0]++;
		say(x, "lets the VMM write page 0");
		*pc = ARM;
		return true;
	case INSTANT:
		b->slot = 1;
		b->state = WRITING;
		b->need = all_pages(x);
		b->left = (uint8_t)x->c->pages;
		memcpy(b->truth, s->mem, sizeof(b->truth));
		s->in_flight++;
		say(x, "fills the slot");
		*pc = x->c->mutant == MUTANT_ONE_SWEEP ? RESUME : ARM_AGAIN;
		return true;
	case RESUME:
		s->paused = 0;
		say(x, "resumes the guest");
		*pc = x->c->track ? INHERIT_LOCK : TAKEN;
		return true;
	case INHERIT_LOCK:
		if (!take_lock(x, s, TAKER))
			return false;
		*pc = INHERIT;
		return true;
	case INHERIT:
		inherit(x, s, b, s->heir < 0);
		say(x, "inherits");
		*pc = INHERIT_UNLOCK;
		return true;
	case INHERIT_UNLOCK:
		unlock(x, s);
		*pc = INHERIT_COUNT;
		return true;
	case INHERIT_COUNT: /* at the end, for all clusters */
		b->left = (uint8_t)(b->left - s->cleared[TAKER][n]);
		s->cleared[TAKER][n] = 0;
		say(x, "counts what it inherited");
		*pc = TAKEN;
		return true;
	case TAKEN:
		if (s->revoked)
			b->failed = 1;
		b->taken = 1;
		if (x->c->track && s->heir < 0 && !b->failed)
			s->heir = (int8_t)n;
		s->taking = s->hold = 0;
		s->base = -1;
		say(x, "has taken it");
		*pc = BEGIN;
		return true;
	default:
		if (*pc < PAUSE)
			return sweep_step(x, s, TAKER, PREARM);
		return sweep_step(x, s, TAKER, *pc < INSTANT ? ARM : ARM_AGAIN);
	}
}

static bool cancel_step(struct explorer *x, struct state *s)
{
	if (!x->c->cancel || s->pc[CANCEL] || s->b[0].state != WRITING || !s->b[0].taken)
		return false;
	s->pc[CANCEL] = 1;
	s->b[0].failed = 1;
	say(x, "cancels the first branch");
	return true;
}

static bool watchdog_step(struct explorer *x, struct state *s)
{
	if (!x->c->watchdog || s->pc[WATCHDOG] == 2)
		return false;
	if (s->pc[WATCHDOG]++ == 0) {
		s->revoked = 1;
		say(x, "revokes");
		return true;
	}
	s->registered = s->paused = 0;
	unregister(s);
	say(x, "lets the guest go");
	return true;
}

/* ---- all of it ---- */

bool step(struct explorer *x, struct state *s, unsigned number)
{
	static const char *const names[] = {
		"guest", "handler", "copier", "reader", "taker", "cancel", "watchdog"};
	enum model_thread t = (enum model_thread)(number / CHOICES);
	unsigned choice = number % CHOICES;
	char what[sizeof(x->step)];
	bool did = false;

	if (t == GUEST && choice < MODEL_PAGES)
		did = guest_step(x, s, choice);
	else if (t == HANDLER && choice < MODEL_PAGES)
		did = handler_step(x, s, choice);
	else if (t == READER)
		did = reader_step(x, s, choice);
	else if (choice == 0 && t == COPIER)
		did = copier_step(x, s);
	else if (choice == 0 && t == TAKER)
		did = taker_step(x, s);
	else if (choice == 0 && t == CANCEL)
		did = cancel_step(x, s);
	else if (choice == 0 && t == WATCHDOG)
		did = watchdog_step(x, s);
	if (did) {
		snprintf(what, sizeof(what), "%s", x->step);
		snprintf(x->step, sizeof(x->step), "%.8s %.28s", names[t], what);
	}
	return did;
}
