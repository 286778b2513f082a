/* Owns the generations of one sandbox and the memory of what each key is owed. Pure logic.
 *
 * Threads: whoever holds the tree's lock. No locks of its own, no I/O; `alive` of ffs_gen_sweep() may look at
 * /proc. */
#include "generation.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

#define BUCKETS 256
/* Keys without a generation are forgotten, oldest first, beyond this many: a client can make up keys. */
#define MAX_KEYS 4096

struct ffs_gen_key {
	char *text;
	struct ffs_gen *newest;
	unsigned missing; /* the file whose next open is told that its pair is gone; 0: none */
	uint64_t used_ns;
	struct ffs_gen_key *next;
};

struct ffs_gen_table {
	struct ffs_gen_rules rules;
	struct ffs_gen_key *buckets[BUCKETS];
	unsigned n_keys, n_gens;
	uint64_t next_serial;
	uint64_t tokens_ns; /* rate limit: credit in nanoseconds, one generation costs 1 s / rate */
	uint64_t tokens_at_ns;
};

unsigned ffs_gen_other(unsigned file)
{
	return file == FFS_GEN_MEMORY ? FFS_GEN_VMSTATE : file == FFS_GEN_VMSTATE ? FFS_GEN_MEMORY : 0;
}

unsigned ffs_gen_count(const struct ffs_gen_table *t)
{
	return t ? t->n_gens : 0;
}

bool ffs_gen_owes(const struct ffs_gen_table *t)
{
	for (unsigned i = 0; i < BUCKETS; i++)
		for (struct ffs_gen_key *k = t->buckets[i]; k; k = k->next)
			if (k->missing)
				return true;
	return false;
}

struct ffs_gen_table *ffs_gen_table_new(struct ffs_gen_rules rules)
{
	struct ffs_gen_table *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->rules = rules;
	t->next_serial = 1;
	t->tokens_ns = FFS_NS_PER_S;
	return t;
}

static unsigned bucket_of(const char *text)
{
	uint32_t h = 2166136261u;

	for (; *text; text++)
		h = (h ^ (unsigned char)*text) * 16777619u;
	return h % BUCKETS;
}

static struct ffs_gen_key *find_key(struct ffs_gen_table *t, const char *text)
{
	for (struct ffs_gen_key *k = t->buckets[bucket_of(text)]; k; k = k->next)
		if (strcmp(k->text, text) == 0)
			return k;
	return NULL;
}

static void free_key(struct ffs_gen_table *t, struct ffs_gen_key *key)
{
	struct ffs_gen_key **p = &t->buckets[bucket_of(key->text)];

	while (*p != key)
		p = &(*p)->next;
	*p = key->next;
	t->n_keys--;
	free(key->text);
	free(key);
}

/* A key that holds nothing and is owed nothing needs no record; owed ones go oldest first. */
static void prune_keys(struct ffs_gen_table *t)
{
	struct ffs_gen_key *oldest = NULL;

	for (unsigned i = 0; i < BUCKETS; i++)
		for (struct ffs_gen_key *k = t->buckets[i], *next; k; k = next) {
			next = k->next;
			if (k->newest)
				continue;
			if (!k->missing)
				free_key(t, k);
			else if (!oldest || k->used_ns < oldest->used_ns)
				oldest = k;
		}
	if (t->n_keys >= MAX_KEYS && oldest)
		free_key(t, oldest);
}

static struct ffs_gen_key *get_key(struct ffs_gen_table *t, const char *text)
{
	struct ffs_gen_key *k = find_key(t, text);

	if (k)
		return k;
	if (t->n_keys >= MAX_KEYS)
		prune_keys(t);
	k = calloc(1, sizeof(*k));
	if (!k)
		return NULL;
	k->text = strdup(text);
	if (!k->text) {
		free(k);
		return NULL;
	}
	k->next = t->buckets[bucket_of(text)];
	t->buckets[bucket_of(text)] = k;
	t->n_keys++;
	return k;
}

void ffs_gen_table_free(struct ffs_gen_table *t)
{
	if (!t)
		return;
	for (unsigned i = 0; i < BUCKETS; i++)
		while (t->buckets[i])
			free_key(t, t->buckets[i]);
	free(t);
}

static bool opened_by(const struct ffs_gen *g, struct ffs_gen_who who)
{
	for (unsigned i = 0; who.tgid && i < g->n_openers; i++)
		if (g->openers[i].tgid == who.tgid && g->openers[i].start == who.start)
			return true;
	return false;
}

static bool in_lease(const struct ffs_gen_table *t, const struct ffs_gen *g, uint64_t now_ns)
{
	return now_ns < g->last_use_ns || now_ns - g->last_use_ns < t->rules.lease_ns;
}

/* Exactly one of the pair was read: the file that was not; else 0. */
static unsigned missing_of(const struct ffs_gen *g)
{
	unsigned pair = g->opened & (FFS_GEN_MEMORY | FFS_GEN_VMSTATE);

	/* a payload that nobody has read */
	if ((g->opened & (FFS_GEN_MEMORY | FFS_GEN_MAILBOX)) == FFS_GEN_MAILBOX)
		return FFS_GEN_MEMORY;

	return ffs_gen_other(pair);
}

/* What must not have been opened for a file to join. */
static unsigned barred_by(enum ffs_gen_file file)
{
	return file == FFS_GEN_MAILBOX ? FFS_GEN_MEMORY : file;
}

static struct ffs_gen *own_generation(const struct ffs_gen_table *t, struct ffs_gen_key *k,
	enum ffs_gen_file file, struct ffs_gen_who who, uint64_t now_ns)
{
	for (struct ffs_gen *g = k->newest; g; g = g->older)
		if (!g->failed && !(file == FFS_GEN_MAILBOX && g->opened & barred_by(file)) &&
			(g->handles || in_lease(t, g, now_ns)) && opened_by(g, who))
			return g;
	return NULL;
}

static bool may_join(
	const struct ffs_gen_table *t, const struct ffs_gen *g, enum ffs_gen_file file, uint64_t now_ns)
{
	return g && !g->failed && !g->retired && !(g->opened & barred_by(file)) && in_lease(t, g, now_ns);
}

struct ffs_gen *ffs_gen_peek(struct ffs_gen_table *t, const char *key, enum ffs_gen_file file,
	struct ffs_gen_who who, uint64_t now_ns)
{
	struct ffs_gen_key *k = find_key(t, key);

	if (!k)
		return NULL;
	struct ffs_gen *own = own_generation(t, k, file, who, now_ns);

	if (own)
		return own;
	if (k->missing == (unsigned)file)
		return NULL;
	return may_join(t, k->newest, file, now_ns) ? k->newest : NULL;
}

int ffs_gen_open_this(struct ffs_gen *g, enum ffs_gen_file file, struct ffs_gen_who who, uint64_t now_ns)
{
	if (who.tgid && !opened_by(g, who)) {
		struct ffs_gen_who *more = realloc(g->openers, (g->n_openers + 1) * sizeof(*more));

		if (!more)
			return -ENOMEM;
		g->openers = more;
		g->openers[g->n_openers++] = who;
	}
	/* a payload counts when it is staged */
	g->opened |= (unsigned)file & ~(unsigned)FFS_GEN_MAILBOX;
	g->handles++;
	g->last_use_ns = now_ns;
	return 0;
}

/* Who writes a payload wants a "now" that is still to come, and is done with what it has read: also when it
 * takes the payload back, it must not find itself in an older generation. */
static void leave_older(struct ffs_gen *g, struct ffs_gen_who who)
{
	for (g = g->older; g; g = g->older)
		for (unsigned i = 0; i < g->n_openers; i++)
			if (g->openers[i].tgid == who.tgid && g->openers[i].start == who.start)
				g->openers[i--] = g->openers[--g->n_openers];
}

static int join(struct ffs_gen_key *k, struct ffs_gen *g, enum ffs_gen_file file, struct ffs_gen_who who,
	uint64_t now_ns, struct ffs_gen **out)
{
	int r = ffs_gen_open_this(g, file, who, now_ns);

	if (r < 0)
		return r;
	/* whichever of the pair this is, from here on the key's pair is this generation's */
	if (ffs_gen_other((unsigned)file))
		k->missing = 0;
	*out = g;
	return FFS_GEN_JOIN;
}

static bool take_token(struct ffs_gen_table *t, uint64_t now_ns)
{
	if (!t->rules.rate)
		return true;
	uint64_t cost = FFS_NS_PER_S / t->rules.rate;

	if (t->tokens_at_ns && now_ns > t->tokens_at_ns) {
		uint64_t credit = now_ns - t->tokens_at_ns;

		t->tokens_ns = credit > FFS_NS_PER_S - t->tokens_ns ? FFS_NS_PER_S : t->tokens_ns + credit;
	}
	t->tokens_at_ns = now_ns;
	if (t->tokens_ns < cost)
		return false;
	t->tokens_ns -= cost;
	return true;
}

static int begin(struct ffs_gen_table *t, struct ffs_gen_key *k, enum ffs_gen_file file,
	struct ffs_gen_who who, uint64_t now_ns, struct ffs_gen **out)
{
	struct ffs_gen *g = calloc(1, sizeof(*g));

	if (!g)
		return -ENOMEM;
	int r = ffs_gen_open_this(g, file, who, now_ns);

	if (r < 0) {
		free(g);
		return r;
	}
	g->serial = t->next_serial++;
	g->key = k;
	g->missing_before = k->missing;
	/* A new memory.bin or vmstate begins a pair of its own. manifest.json does not: what the key is owed
	 * of the generation it replaces stays owed. */
	if (ffs_gen_other((unsigned)file))
		k->missing = 0;
	else if (k->newest && !k->newest->retired && missing_of(k->newest))
		k->missing = missing_of(k->newest);
	g->older = k->newest;
	k->newest = g;
	t->n_gens++;
	if (file == FFS_GEN_MAILBOX)
		leave_older(g, who);
	*out = g;
	return FFS_GEN_BEGIN;
}

int ffs_gen_open(struct ffs_gen_table *t, const char *key, enum ffs_gen_file file, struct ffs_gen_who who,
	uint64_t now_ns, struct ffs_gen **out)
{
	struct ffs_gen_key *k = get_key(t, key);

	if (!k)
		return -ENOMEM;
	k->used_ns = now_ns;
	struct ffs_gen *own = own_generation(t, k, file, who, now_ns);

	if (own)
		return join(k, own, file, who, now_ns, out);
	if (k->missing == (unsigned)file) {
		k->missing = 0;
		return FFS_GEN_TORN;
	}
	if (may_join(t, k->newest, file, now_ns))
		return join(k, k->newest, file, who, now_ns, out);
	if (k->newest && !k->newest->retired && (k->newest->failed || !in_lease(t, k->newest, now_ns))) {
		k->newest->retired = true;
		if (missing_of(k->newest))
			k->missing = missing_of(k->newest);
		if (k->missing == (unsigned)file) {
			k->missing = 0;
			return FFS_GEN_TORN;
		}
	}
	if (!take_token(t, now_ns))
		return FFS_GEN_LIMITED;
	return begin(t, k, file, who, now_ns, out);
}

void ffs_gen_staged(struct ffs_gen *g, bool staged)
{
	g->opened = staged ? g->opened | FFS_GEN_MAILBOX : g->opened & ~(unsigned)FFS_GEN_MAILBOX;
}

void ffs_gen_touch(struct ffs_gen *g, uint64_t now_ns)
{
	g->last_use_ns = now_ns;
}

void ffs_gen_close(struct ffs_gen *g, uint64_t now_ns)
{
	if (g->handles)
		g->handles--;
	g->last_use_ns = now_ns;
}

void ffs_gen_fail(struct ffs_gen *g)
{
	g->failed = true;
}

static void unlink_gen(struct ffs_gen_table *t, struct ffs_gen *g)
{
	struct ffs_gen **p = &g->key->newest;

	while (*p != g)
		p = &(*p)->older;
	*p = g->older;
	t->n_gens--;
	free(g->openers);
	free(g);
}

void ffs_gen_abort(struct ffs_gen_table *t, struct ffs_gen *g)
{
	if (g->key->newest == g)
		g->key->missing = g->missing_before;
	unlink_gen(t, g);
}

/* The key's newest goes: what was read of it alone is owed its pair. */
static void end_gen(
	struct ffs_gen_table *t, struct ffs_gen *g, void (*ended)(void *data, void *arg), void *arg)
{
	void *data = g->data;

	if (g->key->newest == g && !g->retired && missing_of(g))
		g->key->missing = missing_of(g);
	/* the one below must not come up as joinable */
	if (g->key->newest == g && g->older)
		g->older->retired = true;
	unlink_gen(t, g);
	if (data)
		ended(data, arg);
}

static bool any_alive(const struct ffs_gen *g, bool (*alive)(struct ffs_gen_who who))
{
	for (unsigned i = 0; i < g->n_openers; i++)
		if (alive(g->openers[i]))
			return true;
	return false;
}

uint64_t ffs_gen_sweep(struct ffs_gen_table *t, uint64_t now_ns, bool (*alive)(struct ffs_gen_who who),
	void (*ended)(void *data, void *arg), void *arg)
{
	uint64_t again = 0;

	for (unsigned i = 0; t->n_gens && i < BUCKETS; i++)
		for (struct ffs_gen_key *k = t->buckets[i]; k; k = k->next)
			for (struct ffs_gen *g = k->newest, *older; g; g = older) {
				uint64_t end = g->last_use_ns + t->rules.lease_ns;

				older = g->older;
				if (g->handles)
					continue;
				if (!in_lease(t, g, now_ns) || g->failed) {
					end_gen(t, g, ended, arg);
					continue;
				}
				if (g != k->newest) {
					if (!any_alive(g, alive)) {
						end_gen(t, g, ended, arg);
						continue;
					}
					/* a process's end is no event here: look again soon, it holds a VM's
					 * memory */
					if (end > now_ns + FFS_NS_PER_S)
						end = now_ns + FFS_NS_PER_S;
				}
				if (!again || end < again)
					again = end;
			}
	return again;
}

void ffs_gen_end_all(struct ffs_gen_table *t, void (*ended)(void *data, void *arg), void *arg)
{
	for (unsigned i = 0; i < BUCKETS; i++)
		for (struct ffs_gen_key *k = t->buckets[i]; k; k = k->next) {
			/* oldest first, so that the newest decides what is owed */
			while (k->newest) {
				struct ffs_gen *g = k->newest;

				while (g->older)
					g = g->older;
				end_gen(t, g, ended, arg);
			}
		}
}
