/* A failure at the n-th step of a branch, for n = 1 until none is left: in each mode, with and without
 * tracking. Whichever step it is, the guest runs on, what can be read is right, the next branch is right, and
 * nothing leaks: descriptors, mappings, threads, protection. Needs a build with fault points. */
#include <errno.h>
#include <malloc.h>

#include "branch-explain.h"
#include "branch-kit.h"
#include "fault-kit.h"

/* Small, so that all steps can be tried: two slices, neither of them whole, with a short cluster in each. */
static const uint64_t sizes[] = {12 * 65536 + 5 * 4096, 3 * 4096};
/* What the C library keeps for later: stacks of threads, heaps. A leak comes with every step. */
#define SLACK 6u

static unsigned count_mappings(pid_t pid)
{
	char path[64], line[512];
	unsigned n = 0;

	snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	FILE *f = fopen(path, "re");

	while (f && fgets(line, sizeof(line), f))
		n++;
	if (f)
		fclose(f);
	return n;
}

struct holdings {
	unsigned fds, mappings, threads;
};

static struct holdings holdings(pid_t pid)
{
	return (struct holdings){.fds = count_fds(pid),
		.mappings = count_mappings(pid),
		.threads = count_entries(pid, "task")};
}

/* What ends does so in threads of its own: wait for it. */
static void assert_nothing_leaked(pid_t pid, const char *whose, struct holdings before)
{
	struct holdings now = holdings(pid);

	for (unsigned i = 0; i < 2000 && (now.fds > before.fds || now.threads > before.threads); i++) {
		poll(NULL, 0, 2);
		now = holdings(pid);
	}
	if (now.fds > before.fds || now.threads > before.threads || now.mappings > before.mappings + SLACK)
		fail_msg("%s: %u descriptors, %u threads, %u mappings; before: %u, %u, %u", whose, now.fds,
			now.threads, now.mappings, before.fds, before.threads, before.mappings);
}

static int take_mode(
	struct ffs_sandbox *sb, enum ffs_branch_mode mode, struct ffs_branch **b, struct ffs_error *err)
{
	struct ffs_branch_options opt = {.name = "b", .mode = mode};

	*b = NULL;
	return ffs_branch_take(sb, &opt, NULL, b, err);
}

/* A parent for a diff: ready, and held while it is one. */
static struct ffs_branch *parent_for(struct ffs_sandbox *sb, struct fake_vmm *f)
{
	for (unsigned i = 0; i < 5; i++) {
		struct ffs_branch *p = take(sb);
		struct ffs_error err = {0};

		if (wait_end(p, &err) == 0)
			return p;
		ffs_branch_unref(p); /* revoked, on a machine with too much to do */
	}
	fail_msg("no branch becomes ready");
	return NULL;
}

/* One branch with an error at its n-th step. True: there is such a step. */
static bool error_at(struct ffs_sandbox *sb, struct fake_vmm *f, enum ffs_branch_mode mode, bool track,
	unsigned n, unsigned *failed)
{
	struct ffs_branch *parent = mode == FFS_BRANCH_DIFF ? parent_for(sb, f) : NULL, *b;
	struct ffs_error err = {0};
	char text[40];

	assert_true(fake_vmm_runs(f, 3000));
	snprintf(text, sizeof(text), "*@%u error:EIO\n", n);
	rules(text);
	int e = take_mode(sb, mode, &b, &err);

	if (e < 0)
		assert_true(err.code == -e && err.text[0]);
	bool struck = rule_struck(), stopped = mode != FFS_BRANCH_LIVE;

	/* a stopped one is complete now: what comes are the guest's own writes, and they have the steps of a
	 * live one */
	if (stopped)
		rules_none();
	bool good = e == 0 && right_or_failed(b, f->truth, f->size);

	if (!fake_vmm_runs(f, 3000))
		fail_msg("%s: the guest hangs after an error at step %u", ffs_branch_mode_name(mode), n);
	/* also in what is let go after the branch */
	bool idle = track || !sb->tracker || becomes_idle(sb, f, 1000);

	if (!stopped)
		struck = rule_struck();
	rules_none();
	if (good)
		assert_identical(b, f, f->truth, n, "an error that did not fail it");
	*failed += !good;
	ffs_branch_unref(b);
	ffs_branch_unref(parent);
	assert_int_equal(ffs_sandbox_state(sb), FFS_RUN_RUNNING);
	good_branch(sb, f);
	/* what could not be unregistered stays protected, served and watched until the next time */
	if (!track && !becomes_idle(sb, f, 3000))
		fail_msg("%s: protected or watched after step %u (%s before the next branch)",
			ffs_branch_mode_name(mode), n, idle ? "not" : "too");
	return struck;
}

static void error_everywhere(enum fake_memory kind, enum ffs_branch_mode mode, bool track)
{
	struct holdings ours = {0}, theirs = {0};
	unsigned n = 0, failed = 0;
	struct fake_vmm f;
	bool struck = true;

	assert_true(fake_vmm_start_regions(&f, kind, sizes, FFS_ARRAY_LEN(sizes), 2));
	while (struck) {
		/* attached anew now and then: what a detach does not give back would never be seen else */
		struct ffs_sandbox *sb = attach(&f, track);

		for (unsigned i = 0; i < 16 && struck; i++)
			struck = error_at(sb, &f, mode, track, ++n, &failed);
		ffs_sandbox_detach(sb);
		assert_false(fake_vmm_protected(&f));
		ffs_sandbox_unref(sb);
		assert_true(fake_vmm_runs(&f, 3000));
		if (!ours.fds) {
			ours = holdings(getpid());
			theirs = holdings(f.pid);
		}
		assert_nothing_leaked(getpid(), "the engine", ours);
		assert_nothing_leaked(f.pid, "the VMM", theirs);
	}
	print_message("%s%s: %u steps, %u of them failed a branch\n", ffs_branch_mode_name(mode),
		track ? ", tracked" : "", n - 1, failed);
	assert_true(n > 20 && failed > 10);
	fake_vmm_stop(&f);
}

static void test_live(void **s)
{
	error_everywhere(FAKE_MEMFD, FFS_BRANCH_LIVE, false);
}

static void test_live_tracked(void **s)
{
	error_everywhere(FAKE_MEMFD, FFS_BRANCH_LIVE, true);
}

static void test_full(void **s)
{
	error_everywhere(FAKE_ANONYMOUS, FFS_BRANCH_FULL, false);
}

static void test_full_tracked(void **s)
{
	error_everywhere(FAKE_MEMFD, FFS_BRANCH_FULL, true);
}

static void test_diff(void **s)
{
	error_everywhere(FAKE_MEMFD, FFS_BRANCH_DIFF, true);
}

int main(void)
{
	if (!fault_points_built())
		return 77;
	mallopt(M_ARENA_MAX, 1); /* mappings are counted */
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(test_live, faults_after),
		cmocka_unit_test_teardown(test_live_tracked, faults_after),
		cmocka_unit_test_teardown(test_full, faults_after),
		cmocka_unit_test_teardown(test_full_tracked, faults_after),
		cmocka_unit_test_teardown(test_diff, faults_after),
	};

	cmocka_set_test_filter(getenv("FORKFS_TEST_FILTER"));
	return cmocka_run_group_tests(tests, kit_setup, kit_teardown);
}
