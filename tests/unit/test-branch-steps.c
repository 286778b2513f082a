/* The branch engine when something happens while a take or a capture stands at a step: the VMM dies, the
 * sandbox is detached, the watchdog revokes, the VMM does not obey. Needs a build with fault points. */
#include <errno.h>

#include "branch-kit.h"
#include "fault-kit.h"

/* ---- something happens while a take, or its capture, stands at a step ---- */

static const char *const steps[] = {"memory-check", "vmm-prepare", "register", "uffd-register",
	"uffd-protect", "protect", "vmm-pause", "vmm-save", "pause-armed", "vmm-resume", "guest-read",
	"image-write", "settle", "image-seal"};

struct taker {
	pthread_t thread;
	struct ffs_sandbox *sb;
	struct ffs_branch *b;
	int result;
	struct ffs_error err;
};

static void *taker_main(void *arg)
{
	struct taker *t = arg;

	struct ffs_branch_options opt = {.name = "b"};

	t->b = NULL;
	t->result = ffs_branch_take(t->sb, &opt, NULL, &t->b, &t->err);
	return NULL;
}

/* A take in a thread of its own, standing at the step. */
static void take_and_hold(struct taker *t, struct ffs_sandbox *sb, const char *step)
{
	char text[200];

	snprintf(text, sizeof(text), "%s@1 hold:step\n", step);
	rules_none();
	rules(text);
	*t = (struct taker){.sb = sb};
	assert_int_equal(pthread_create(&t->thread, NULL, taker_main, t), 0);
	if (!wait_held("step", 5000))
		fail_msg("nobody came by %s", step);
}

static void vmm_dies(enum fake_memory kind)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(steps); i++) {
		struct fake_vmm f;
		struct taker t;

		assert_true(fake_vmm_start(&f, kind, 16 * MIB, 2));
		struct ffs_sandbox *sb = attach(&f, false);

		take_and_hold(&t, sb, steps[i]);
		kill(f.pid, SIGKILL);
		while (ffs_proc_alive(sb->proc))
			poll(NULL, 0, 1);
		let_go("step");
		pthread_join(t.thread, NULL);
		if (t.result == 0)
			right_or_failed(t.b, f.truth, f.size);
		ffs_branch_unref(t.b);
		assert_int_equal(ffs_sandbox_state(sb), FFS_RUN_EXITED);
		struct ffs_branch *no;

		assert_int_equal(try_take(sb, &no), -ESRCH);
		ffs_sandbox_unref(sb);
		fake_vmm_stop(&f);
		rules_none();
	}
}

static void test_vmm_dies_memfd(void **s)
{
	vmm_dies(FAKE_MEMFD);
}

static void test_vmm_dies_anonymous(void **s)
{
	vmm_dies(FAKE_ANONYMOUS);
}

static void *detacher(void *sb)
{
	ffs_sandbox_detach(sb);
	return NULL;
}

static void test_detach_at_each_step(void **s)
{
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 16 * MIB, 2));
	for (unsigned i = 0; i < FFS_ARRAY_LEN(steps); i++) {
		struct ffs_sandbox *sb = attach(&f, i % 3 == 2);
		struct taker t;
		pthread_t d;

		take_and_hold(&t, sb, steps[i]);
		assert_int_equal(pthread_create(&d, NULL, detacher, sb), 0);
		poll(NULL, 0, 20);
		let_go("step");
		pthread_join(t.thread, NULL);
		pthread_join(d, NULL);
		assert_false(fake_vmm_protected(&f));
		assert_true(fake_vmm_runs(&f, 2000));
		if (t.result == 0) {
			assert_int_not_equal(ffs_branch_state(t.b), FFS_BRANCH_WRITING);
			right_or_failed(t.b, f.truth, f.size);
		}
		ffs_branch_unref(t.b);
		struct ffs_branch *no;

		assert_int_equal(try_take(sb, &no), -ESRCH);
		ffs_sandbox_unref(sb);
		rules_none();
		sb = attach(&f, false); /* again */
		good_branch(sb, &f);
		ffs_sandbox_unref(sb);
	}
	fake_vmm_stop(&f);
}

/* ---- the watchdog ---- */

/* The fault handler does not move: the guest is let go, what is in flight fails, and the next is right. */
static void handler_hangs(bool track)
{
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 32 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, track);

	for (unsigned round = 0; round < 2; round++) {
		rules("guest-read delay:4\n");
		struct ffs_branch *b = take(sb);

		rules("guest-read delay:4\nhandler-hang@1 hold:h\n");
		assert_true(wait_held("h", 5000));
		if (!fake_vmm_runs(&f, 3000))
			fail_msg("the guest hangs with the handler");
		assert_true(ffs_tracker_revoked(sb->tracker));
		assert_false(right_or_failed(b, f.truth, f.size));
		struct ffs_error why = {0};

		ffs_branch_failure(b, &why);
		assert_int_equal(why.code, ETIMEDOUT);
		ffs_branch_unref(b);
		if (round == 0 && !becomes_idle(sb, &f, 2000))
			fail_msg("the watchdog goes on watching what it has let go");
		let_go("h");
		rules_none();
		good_branch(sb, &f);
		assert_true(track || becomes_idle(sb, &f, 2000));
	}
	ffs_sandbox_unref(sb);
	assert_false(fake_vmm_protected(&f));
	fake_vmm_stop(&f);
}

static void test_handler_hangs(void **s)
{
	handler_hangs(false);
}

static void test_handler_hangs_tracking(void **s)
{
	handler_hangs(true);
}

/* The thread that takes the branch does not move during the pause. A branch that was in flight before must
 * notice that the protection is gone, also when the driver has connected anew since. */
static void hang_in_pause(const char *step, bool reconnect)
{
	struct fake_vmm f;
	struct taker t;
	char text[200];

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 32 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	f.reconnect_on_resume = reconnect;
	rules("guest-read delay:4\n");
	struct ffs_branch *a = take(sb);
	uint8_t *truth = keep_truth(&f);

	rules_none();
	snprintf(text, sizeof(text), "guest-read delay:4\n%s@1 hold:step\n", step);
	rules(text);
	t = (struct taker){.sb = sb};
	assert_int_equal(pthread_create(&t.thread, NULL, taker_main, &t), 0);
	assert_true(wait_held("step", 5000));
	for (unsigned i = 0; i < 3000 && !ffs_tracker_revoked(sb->tracker); i++)
		poll(NULL, 0, 1);
	assert_true(ffs_tracker_revoked(sb->tracker));
	assert_true(fake_vmm_runs(&f, 3000));
	let_go("step");
	pthread_join(t.thread, NULL);
	/* whatever it met first: memory without protection, a VM that somebody has resumed or that does not stop */
	if (t.result != -ETIMEDOUT)
		fail_msg("%s: %d, %s", step, t.result, t.err.text);
	assert_true(fake_vmm_runs(&f, 3000));
	rules("");
	assert_false(right_or_failed(a, truth, f.size));
	ffs_branch_unref(a);
	munmap(truth, f.size);
	f.reconnect_on_resume = false;
	rules_none();
	good_branch(sb, &f);
	assert_true(becomes_idle(sb, &f, 2000));
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void test_hang_in_pause(void **s)
{
	hang_in_pause("vmm-pause", false);
	hang_in_pause("vmm-save", false);
	hang_in_pause("pause-armed", false);
	hang_in_pause("vmm-resume", false);
	hang_in_pause("pause-armed", true);
}

/* The VMM refuses to resume for longer than we try. Whatever comes next must not take the stopped guest for
 * one that its owner has paused. */
static void test_resume_owed(void **s)
{
	struct fake_vmm f;
	struct ffs_branch *b;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 2));
	for (unsigned round = 0; round < 3; round++) {
		struct ffs_sandbox *sb = attach(&f, false);

		f.fail_resumes = 5;
		assert_int_equal(try_take(sb, &b), -EIO);
		if (round == 0) /* the next branch comes before the watchdog is sure */
			good_branch(sb, &f);
		else if (round == 1) /* a detach */
			ffs_sandbox_detach(sb);
		if (!fake_vmm_runs(&f, 3000)) /* else the watchdog */
			fail_msg("the guest stays paused, round %u", round);
		if (round != 1)
			good_branch(sb, &f);
		ffs_sandbox_unref(sb);
	}
	fake_vmm_stop(&f);
}

static void test_does_not_stop(void **s)
{
	struct fake_vmm f;
	struct ffs_branch *b;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	f.ignore_stop = true;
	assert_int_equal(try_take(sb, &b), -ETIMEDOUT);
	f.ignore_stop = false;
	assert_true(fake_vmm_runs(&f, 2000));
	assert_true(becomes_idle(sb, &f, 2000));
	good_branch(sb, &f);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

int main(void)
{
	if (!fault_points_built())
		return 77;
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(test_hang_in_pause, faults_after),
		cmocka_unit_test_teardown(test_handler_hangs, faults_after),
		cmocka_unit_test_teardown(test_handler_hangs_tracking, faults_after),
		cmocka_unit_test_teardown(test_resume_owed, faults_after),
		cmocka_unit_test_teardown(test_does_not_stop, faults_after),
		cmocka_unit_test_teardown(test_detach_at_each_step, faults_after),
		cmocka_unit_test_teardown(test_vmm_dies_memfd, faults_after),
		cmocka_unit_test_teardown(test_vmm_dies_anonymous, faults_after),
	};

	return cmocka_run_group_tests(tests, kit_setup, kit_teardown);
}
