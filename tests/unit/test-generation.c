/* The pair rule as a table of cases: each is a list of opens, closes and waits of made-up processes with a
 * made-up clock, and what each open must lead to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "../../fs/generation.h"

#define M FFS_GEN_MEMORY
#define V FFS_GEN_VMSTATE
#define J FFS_GEN_MANIFEST
#define X FFS_GEN_MAILBOX

#define LEASE_S 30u

enum what { END, OPEN, CLOSE, READ, WAIT, SWEEP, FAIL, STAGE, ABORT, END_ALL, EXIT };

/* Generations are numbered from 1 in the order they begin; `want` of an OPEN is such a number (joined or
 * begun), or one of these. */
#define TORN (-1)
#define LIMITED (-2)

struct step {
	enum what what;
	const char *key;
	int pid;  /* OPEN; EXIT */
	int file; /* OPEN */
	int want; /* OPEN; the generation of CLOSE, READ, FAIL, STAGE, ABORT; seconds of WAIT; how many are
		     left after SWEEP */
};

#define O(key_, pid_, file_, want_)                                                                          \
	{                                                                                                    \
		.what = OPEN, .key = (key_), .pid = (pid_), .file = (file_), .want = (want_)                 \
	}
#define C(gen_)                                                                                              \
	{                                                                                                    \
		.what = CLOSE, .want = (gen_)                                                                \
	}
#define R(gen_)                                                                                              \
	{                                                                                                    \
		.what = READ, .want = (gen_)                                                                 \
	}
#define W(seconds_)                                                                                          \
	{                                                                                                    \
		.what = WAIT, .want = (seconds_)                                                             \
	}
#define S(left_)                                                                                             \
	{                                                                                                    \
		.what = SWEEP, .want = (left_)                                                               \
	}

static const struct {
	const char *name;
	struct step steps[24];
} cases[] = {
	{"cp memory.bin; cp vmstate in one shell",
		{O("s:1", 10, M, 1), C(1), O("s:1", 11, V, 1), C(1), O("s:1", 12, J, 1)}},
	{"however long the first cp takes", {O("s:1", 10, M, 1), W(3600), C(1), O("s:1", 11, V, 1)}},
	{"as long as it reads, beyond the lease",
		{O("s:1", 10, M, 1), W(29), R(1), W(29), R(1), W(29), O("s:1", 11, V, 1)}},
	{"two cp memory.bin are two snapshots", {O("s:1", 10, M, 1), C(1), O("s:1", 11, M, 2)}},
	{"two at once too", {O("s:1", 10, M, 1), O("s:1", 11, M, 2), O("s:1", 12, M, 3)}},
	{"the pair of the second is the second",
		{O("s:1", 10, M, 1), C(1), O("s:1", 11, M, 2), C(2), O("s:1", 12, V, 2)}},
	{"two shells have each their own",
		{O("s:1", 10, M, 1), O("s:2", 20, M, 2), O("s:1", 11, V, 1), O("s:2", 21, V, 2)}},
	{"an explicit key crosses sessions", {O("k:x", 10, M, 1), O("k:x", 20, V, 1), O("k:y", 20, V, 2)}},
	{"cp -r: one process opens all",
		{O("s:1", 10, M, 1), C(1), O("s:1", 10, V, 1), C(1), O("s:1", 10, J, 1)}},
	{"cp -r beside a cp of the same shell",
		{O("s:1", 10, M, 1), O("s:1", 11, M, 2), O("s:1", 10, V, 1), O("s:1", 11, V, 2)}},
	{"a process that opens a file again gets the same bytes",
		{O("s:1", 10, M, 1), C(1), O("s:1", 10, M, 1)}},
	{"not for ever", {O("s:1", 10, M, 1), C(1), W(31), S(0), O("s:1", 10, M, 2)}},
	{"nor when nothing swept yet", {O("s:1", 10, M, 1), C(1), W(31), O("s:1", 10, M, 2)}},
	{"a child that maps memory.bin for an hour makes nobody's next snapshot stale",
		{O("s:1", 10, M, 1), O("s:1", 10, V, 1), C(1), W(3600), O("s:1", 11, M, 2),
			O("s:1", 12, V, 2)}},
	{"the child that has it open still gets its own vmstate",
		{O("s:1", 10, M, 1), W(3600), O("s:1", 10, V, 1)}},
	{"torn: the lease ended before vmstate was read, said once",
		{O("s:1", 10, M, 1), C(1), W(31), O("s:1", 11, V, TORN), O("s:1", 12, V, 2),
			O("s:1", 13, M, 2)}},
	{"torn the other way round",
		{O("s:1", 10, V, 1), C(1), W(31), O("s:1", 11, M, TORN), O("s:1", 12, M, 2)}},
	{"torn is remembered after the sweep",
		{O("s:1", 10, M, 1), C(1), W(31), S(0), W(3600), O("s:1", 11, V, TORN), O("s:1", 12, V, 2)}},
	{"a new memory.bin begins a new pair: nothing is owed",
		{O("s:1", 10, M, 1), C(1), W(31), O("s:1", 11, M, 2), O("s:1", 12, V, 2)}},
	{"a manifest in between does not hide the tear", {O("s:1", 10, M, 1), C(1), W(31), O("s:1", 11, J, 2),
								 O("s:1", 12, V, TORN), O("s:1", 13, V, 2)}},
	{"nor does one of a generation that replaced a living one",
		{O("s:1", 10, M, 1), O("s:1", 11, J, 1), O("s:1", 12, J, 2), O("s:1", 13, V, TORN)}},
	{"a manifest alone owes nothing",
		{O("s:1", 10, J, 1), C(1), W(31), O("s:1", 11, V, 2), O("s:1", 12, M, 2)}},
	{"both read: nothing is torn", {O("s:1", 10, M, 1), O("s:1", 11, V, 1), C(1), C(1), W(31),
					       O("s:1", 12, V, 2), O("s:1", 13, M, 2)}},
	{"a tear is the key's own affair",
		{O("s:1", 10, M, 1), C(1), W(31), O("s:2", 20, V, 2), O("s:1", 11, V, TORN)}},
	{"a mapped memory.bin past its lease: vmstate of another process is torn, of its own is not",
		{O("s:1", 10, M, 1), W(31), O("s:1", 11, V, TORN), O("s:1", 10, V, 1)}},
	{"a crashed reader closes: its generation lives on for the lease",
		{O("s:1", 10, M, 1), C(1), {.what = EXIT, .pid = 10}, S(1), O("s:1", 11, V, 1)}},
	{"a payload goes where memory.bin was not opened yet",
		{O("s:1", 10, X, 1), {.what = STAGE, .want = 1}, O("s:1", 11, X, 1), O("s:1", 12, M, 1),
			O("s:1", 10, X, 2)}},
	{"a payload and vmstate first, memory.bin joins",
		{O("s:1", 10, X, 1), {.what = STAGE, .want = 1}, O("s:1", 11, V, 1), O("s:1", 12, M, 1)}},
	{"a payload that nobody has read is owed memory.bin",
		{O("s:1", 10, X, 1), {.what = STAGE, .want = 1}, C(1), W(31), O("s:1", 11, M, TORN),
			O("s:1", 11, M, 2)}},
	{"also when another payload comes later",
		{O("s:1", 10, X, 1), {.what = STAGE, .want = 1}, C(1), W(31), S(0), O("s:1", 10, X, 2),
			O("s:1", 11, M, TORN)}},
	{"a write that staged nothing owes nothing", {O("s:1", 10, X, 1), C(1), W(31), O("s:1", 11, M, 2)}},
	{"who wrote a payload, and takes the next one back, reads what is now",
		{O("s:1", 10, X, 1), {.what = STAGE, .want = 1}, C(1), O("s:1", 11, M, 1), C(1),
			O("s:1", 10, X, 2), {.what = FAIL, .want = 2}, C(2), O("s:1", 10, M, 3)}},
	{"a payload is its session's own",
		{O("s:1", 10, X, 1), {.what = STAGE, .want = 1}, O("s:2", 20, M, 2), O("k:x", 21, M, 3),
			O("s:1", 11, M, 1)}},
	{"a failed branch is over",
		{O("s:1", 10, M, 1), {.what = FAIL, .want = 1}, O("s:1", 11, V, TORN), O("s:1", 11, V, 2)}},
	{"a failed branch, the same file again: a new pair",
		{O("s:1", 10, M, 1), {.what = FAIL, .want = 1}, O("s:1", 10, M, 2), O("s:1", 11, V, 2)}},
	{"a take that failed never was",
		{O("s:1", 10, M, 1), {.what = ABORT, .want = 1}, O("s:1", 11, V, 2), O("s:1", 12, M, 2)}},
	{"nor did it end the one before", {O("s:1", 10, M, 1), C(1), O("s:1", 11, M, 2),
						  {.what = ABORT, .want = 2}, O("s:1", 12, V, 1)}},
	{"nor forgive what was owed", {O("s:1", 10, M, 1), C(1), W(31), S(0), O("s:1", 11, M, 2),
					      {.what = ABORT, .want = 2}, O("s:1", 12, V, TORN)}},
	{"the VM was let go: who read half is told",
		{O("k:x", 10, M, 1), {.what = END_ALL}, O("k:x", 11, V, TORN), O("k:x", 11, V, 2)}},
	{"the VM was let go: the newest decides", {O("k:x", 10, M, 1), O("k:x", 11, M, 2), O("k:x", 12, V, 2),
							  {.what = END_ALL}, O("k:x", 13, V, 3)}},
	{"a superseded generation goes when its processes are gone, whatever the lease",
		{O("s:1", 10, M, 1), C(1), O("s:1", 11, M, 2), C(2), S(2), {.what = EXIT, .pid = 10}, S(1)}},
	{"and the newest stays for its lease",
		{O("s:1", 10, M, 1), C(1), {.what = EXIT, .pid = 10}, S(1), W(31), S(0)}},
	{"an open file keeps a generation",
		{O("s:1", 10, M, 1), {.what = EXIT, .pid = 10}, W(3600), S(1), C(1), S(1), W(31), S(0)}},
	{"a caller that can't be seen is nobody's same thread group",
		{O("k:x", 0, M, 1), O("k:x", 0, V, 1), O("k:x", 0, M, 2), O("k:x", 0, V, 2),
			O("k:x", 0, V, 3)}},
	{"a recycled pid is another process",
		{O("s:1", 10, M, 1), C(1), {.what = EXIT, .pid = 10}, O("s:1", 10, M, 2)}},
};

/* ---- the world of a case ---- */

static struct world {
	struct ffs_gen_table *table;
	struct ffs_gen *gens[16];
	int begun;
	uint64_t now_ns;
	uint64_t start[64]; /* of each pid; a process that ended starts again later */
} w;

static struct ffs_gen_who who(int pid)
{
	return (struct ffs_gen_who){.tgid = pid, .start = pid ? w.start[pid] : 0};
}

static bool alive(struct ffs_gen_who p)
{
	return p.tgid && w.start[p.tgid] == p.start;
}

/* data is the generation's place in the table above */
static void ended(void *data, void *arg)
{
	*(struct ffs_gen **)data = NULL;
}

static int number_of(const struct ffs_gen *g)
{
	for (size_t i = 1; i < FFS_ARRAY_LEN(w.gens); i++)
		if (w.gens[i] == g)
			return (int)i;
	return 0;
}

static int open_step(const struct step *s)
{
	struct ffs_gen *g = NULL, *peeked = ffs_gen_peek(w.table, s->key, s->file, who(s->pid), w.now_ns);
	int verdict = ffs_gen_open(w.table, s->key, s->file, who(s->pid), w.now_ns, &g);

	/* what LOOKUP promises is what OPEN does */
	assert_ptr_equal(peeked, verdict == FFS_GEN_JOIN ? g : NULL);
	switch (verdict) {
	case FFS_GEN_JOIN:
		return number_of(g);
	case FFS_GEN_BEGIN:
		w.gens[++w.begun] = g;
		g->data = &w.gens[w.begun];
		return w.begun;
	case FFS_GEN_TORN:
		return TORN;
	default:
		return verdict == FFS_GEN_LIMITED ? LIMITED : -100;
	}
}

static void run_step(const char *name, size_t at, const struct step *s)
{
	int got = s->want;

	switch (s->what) {
	case OPEN:
		got = open_step(s);
		break;
	case CLOSE:
		ffs_gen_close(w.gens[s->want], w.now_ns);
		break;
	case READ:
		ffs_gen_touch(w.gens[s->want], w.now_ns);
		break;
	case WAIT:
		w.now_ns += (uint64_t)s->want * FFS_NS_PER_S;
		break;
	case SWEEP:
		ffs_gen_sweep(w.table, w.now_ns, alive, ended, NULL);
		got = (int)ffs_gen_count(w.table);
		break;
	case FAIL:
		ffs_gen_fail(w.gens[s->want]);
		break;
	case STAGE:
		ffs_gen_staged(w.gens[s->want], true);
		break;
	case ABORT:
		ffs_gen_abort(w.table, w.gens[s->want]);
		w.gens[s->want] = NULL;
		break;
	case END_ALL:
		ffs_gen_end_all(w.table, ended, NULL);
		break;
	case EXIT:
		w.start[s->pid] += 1000;
		break;
	case END:
		break;
	}
	if (got != s->want)
		fail_msg("%s: step %zu: %d instead of %d", name, at + 1, got, s->want);
}

static void set_up(unsigned rate)
{
	memset(&w, 0, sizeof(w));
	w.now_ns = 1000 * FFS_NS_PER_S;
	w.table = ffs_gen_table_new((struct ffs_gen_rules){.lease_ns = LEASE_S * FFS_NS_PER_S, .rate = rate});
	assert_non_null(w.table);
}

static void tear_down(void)
{
	ffs_gen_end_all(w.table, ended, NULL);
	assert_int_equal(ffs_gen_count(w.table), 0);
	ffs_gen_table_free(w.table);
}

static void test_cases(void **state)
{
	for (size_t i = 0; i < FFS_ARRAY_LEN(cases); i++) {
		set_up(0);
		for (size_t at = 0; cases[i].steps[at].what != END; at++)
			run_step(cases[i].name, at, &cases[i].steps[at]);
		tear_down();
	}
}

/* ---- what a table of cases does not show ---- */

static int open_new(int n)
{
	struct ffs_gen *g = NULL;
	char key[32];

	snprintf(key, sizeof(key), "k:%d", n);
	int verdict = ffs_gen_open(w.table, key, FFS_GEN_MEMORY, who(0), w.now_ns, &g);

	if (verdict == FFS_GEN_BEGIN)
		ffs_gen_close(g, w.now_ns);
	return verdict;
}

static void test_rate(void **state)
{
	int n = 0;

	set_up(10);
	for (int i = 0; i < 10; i++)
		assert_int_equal(open_new(n++), FFS_GEN_BEGIN);
	assert_int_equal(open_new(n++), FFS_GEN_LIMITED);
	w.now_ns += 100 * FFS_NS_PER_MS;
	assert_int_equal(open_new(n++), FFS_GEN_BEGIN);
	assert_int_equal(open_new(n++), FFS_GEN_LIMITED);
	/* credit does not pile up beyond a second */
	w.now_ns += 3600 * FFS_NS_PER_S;
	for (int i = 0; i < 10; i++)
		assert_int_equal(open_new(n++), FFS_GEN_BEGIN);
	assert_int_equal(open_new(n++), FFS_GEN_LIMITED);
	tear_down();
}

/* A refused open of the same file must not forgive the pair. */
static void test_limited_keeps_debt(void **state)
{
	struct ffs_gen *g = NULL;

	set_up(1);
	assert_int_equal(ffs_gen_open(w.table, "s:1", FFS_GEN_MEMORY, who(1), w.now_ns, &g), FFS_GEN_BEGIN);
	ffs_gen_close(g, w.now_ns);
	w.now_ns += 31 * FFS_NS_PER_S;
	assert_int_equal(open_new(1), FFS_GEN_BEGIN);
	assert_int_equal(ffs_gen_open(w.table, "s:1", FFS_GEN_MEMORY, who(2), w.now_ns, &g), FFS_GEN_LIMITED);
	assert_int_equal(ffs_gen_open(w.table, "s:1", FFS_GEN_VMSTATE, who(3), w.now_ns, &g), FFS_GEN_TORN);
	tear_down();
}

/* A client that makes up keys does not make the table grow without bound. */
static void test_many_keys(void **state)
{
	set_up(0);
	for (int i = 0; i < 20000; i++) {
		assert_int_equal(open_new(i), FFS_GEN_BEGIN);
		if (i % 100 == 99) {
			w.now_ns += 31 * FFS_NS_PER_S;
			ffs_gen_sweep(w.table, w.now_ns, alive, ended, NULL);
			assert_int_equal(ffs_gen_count(w.table), 0);
		}
	}
	tear_down();
}

/* The sweep says when it has something to do next. */
static void test_sweep_deadline(void **state)
{
	struct ffs_gen *g = NULL;

	set_up(0);
	assert_true(ffs_gen_sweep(w.table, w.now_ns, alive, ended, NULL) == 0);
	assert_int_equal(ffs_gen_open(w.table, "s:1", FFS_GEN_MEMORY, who(1), w.now_ns, &g), FFS_GEN_BEGIN);
	assert_true(ffs_gen_sweep(w.table, w.now_ns, alive, ended, NULL) == 0);
	ffs_gen_close(g, w.now_ns);
	assert_true(
		ffs_gen_sweep(w.table, w.now_ns, alive, ended, NULL) == w.now_ns + LEASE_S * FFS_NS_PER_S);
	w.now_ns += LEASE_S * FFS_NS_PER_S;
	assert_true(ffs_gen_sweep(w.table, w.now_ns, alive, ended, NULL) == 0);
	assert_int_equal(ffs_gen_count(w.table), 0);
	tear_down();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_cases),
		cmocka_unit_test(test_rate),
		cmocka_unit_test(test_limited_keeps_debt),
		cmocka_unit_test(test_many_keys),
		cmocka_unit_test(test_sweep_deadline),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
