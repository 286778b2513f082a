/* What a crash leaves of a publish, a rename, a removal, a conversion: the old state or the new one, whole.
 *
 * The store's operations are recorded through its table of operations, and replayed into fresh directories:
 * every prefix, and prefixes from which those operations are missing (or half done) that no sync had made
 * durable by then. */
#include "store-record.h"
#include "store-scenarios.h"

static void check_replay(const struct scenario *sc, unsigned n)
{
	char path[100];

	snprintf(path, sizeof(path), "%s/st", replay_dir);
	struct seen seen = recover_and_look(path);

	if (seen.branches != sc->before && seen.branches != sc->after)
		fail_msg("%s: after %u of %u operations there are %u branches", sc->name, n, n_ops,
			seen.branches);
	if (n == n_ops &&
		(seen.branches != sc->after || (sc->dense >= 0 && seen.dense != (unsigned)sc->dense)))
		fail_msg("%s: done, and a crash brings the old state back", sc->name);
}

/* The recorded operations of a scenario; the state before is saved. */
static void record(struct kit *k, int (*run)(struct ffs_store *st))
{
	set_up(k);
	save_before(k);
	record_begin(k);
	assert_int_equal(run(k->st), 0);
	ffs_store_ops = &ffs_store_ops_real;
	assert_true(n_ops > 1);
}

static void end(struct kit *k)
{
	forget();
	drop_before();
	kit_close(k);
}

static void test_every_crash(void **state)
{
	unsigned replays = 0;

	for (unsigned i = 0; i < n_scenarios; i++) {
		struct kit k;

		record(&k, scenarios[i].run);
		for (unsigned n = 0; n <= n_ops; n++)
			for (unsigned v = 0; v < VARIANTS; v++) {
				if (replay(n, v)) {
					check_replay(&scenarios[i], n);
					replays++;
				} else {
					v = VARIANTS;
				}
				drop_replay();
			}
		end(&k);
	}
	print_message("%u crashes\n", replays);
	assert_true(replays > 1000);
}

/* A control: the order is what keeps it whole. A publish whose files were never synced is torn by some crash.
 */
static void test_replay_can_tell(void **state)
{
	bool torn = false;
	char path[100];
	struct kit k;

	record(&k, scenarios[0].run);
	for (unsigned i = 0; i < n_ops; i++)
		if (ops[i].what == FSYNC && strstr(ops[i].path, "memory.bin"))
			snprintf(ops[i].path, sizeof(ops[i].path), "nothing");
	for (unsigned v = 0; v < VARIANTS && !torn; v++) {
		struct ffs_store *st = NULL;
		struct ffs_stored *s = NULL;

		replay(n_ops, v);
		snprintf(path, sizeof(path), "%s/st", replay_dir);
		assert_int_equal(ffs_store_open(path, &st, NULL), 0);
		if (ffs_stored_open(st, "sbx1", "b2", &s, NULL) < 0 || ffs_stored_verify(s, NULL, NULL) < 0)
			torn = true;
		ffs_stored_unref(s);
		ffs_store_close(st);
		drop_replay();
	}
	assert_true(torn);
	end(&k);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_crash),
		cmocka_unit_test(test_replay_can_tell),
	};

	return cmocka_run_group_tests(tests, make_memories, NULL);
}
