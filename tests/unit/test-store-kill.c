/* kill -9 at random moments of everything that changes a store, recovery too: whatever is there afterwards is
 * whole.
 *
 * A process of its own writes, renames, removes and converts branches in a loop, and is killed; then the
 * store is recovered, by us or by the next one, which may be killed in it. STORE_KILLS says how often (120).
 */
#include "store-scenarios.h"

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>

#include "base/log.h"

#define LONGEST_US 15000

static uint32_t chance;

static unsigned roll(unsigned n)
{
	chance = chance * 1664525 + 1013904223;
	return (chance >> 16) % n;
}

/* One thing after the other until it is killed. What fails is what the one before left, or was interrupted
 * in. */
static void work(const char *path, int ready)
{
	struct ffs_store *st = NULL;
	char name[8], other[8];

	if (ffs_store_open(path, &st, NULL) < 0)
		_exit(1);
	if (write(ready, "x", 1) != 1 || ffs_store_recover(st, NULL) < 0)
		_exit(1);
	for (;;) {
		snprintf(name, sizeof(name), "b%u", 1 + roll(4));
		snprintf(other, sizeof(other), "b%u", 1 + roll(4));
		switch (roll(6)) {
		case 0:
		case 1:
			put(st, name, 1 + roll(2), roll(2) ? FFS_STORE_DENSE : FFS_STORE_PACKED,
				roll(2) ? "b0" : NULL);
			break;
		case 2:
			ffs_store_rename(st, "sbx1", name, other, NULL);
			break;
		case 3:
			ffs_store_remove(st, "sbx1", name, NULL);
			ffs_store_reap(st, "sbx1", NULL);
			break;
		default:
			ffs_store_convert(st, "sbx1", roll(2) ? name : "b0",
				roll(2) ? FFS_STORE_DENSE : FFS_STORE_PACKED, NULL, NULL, NULL);
		}
	}
}

/* Start a worker, and kill it some time after it has begun to recover the store. */
static void run_and_kill(const char *path)
{
	int ends[2], status;
	char byte;

	assert_int_equal(pipe(ends), 0);
	pid_t pid = fork();

	assert_true(pid >= 0);
	if (!pid)
		work(path, ends[1]);
	close(ends[1]);
	assert_int_equal(read(ends[0], &byte, 1), 1);
	/* the moment itself, not an event that is waited for */
	struct timespec moment = {.tv_nsec = (long)roll(LONGEST_US) * 1000};

	assert_int_equal(ppoll(NULL, 0, &moment, NULL), 0);
	assert_int_equal(kill(pid, SIGKILL), 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	/* it was at work until then */
	assert_true(WIFSIGNALED(status));
	close(ends[0]);
}

static void test_killed(void **state)
{
	const char *how_often = getenv("STORE_KILLS");
	unsigned kills = how_often ? (unsigned)atoi(how_often) : 120, partials = 0, branches = 0;
	struct kit k;

	chance = (uint32_t)ffs_now_ns();
	print_message("seed %u\n", chance);
	ffs_log_setup(0, FFS_LOG_ERROR);
	set_up(&k);
	for (unsigned i = 0; i < kills; i++) {
		run_and_kill(k.path);
		/* every other time it is for the next one to recover, and to be killed in it */
		if (roll(2))
			continue;
		struct seen seen = recover_and_look(k.path);

		partials += seen.failed;
		branches += seen.branches;
		/* what was recovered is what there is: nothing half done comes up the next time */
		struct seen again = recover_and_look(k.path);

		assert_int_equal(again.branches, seen.branches);
		assert_int_equal(again.failed, seen.failed);
	}
	recover_and_look(k.path);
	print_message(
		"%u kills, %u branches looked at, %u records of failed ones\n", kills, branches, partials);
	assert_true(branches > 0);
	kit_close(&k);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_killed),
	};

	return cmocka_run_group_tests(tests, make_memories, NULL);
}
