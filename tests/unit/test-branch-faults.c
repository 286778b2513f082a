/* The branch engine when things go wrong at every step: errors, a VMM that dies, a detach, a revocation by
 * the watchdog. After each the guest runs, nothing stays protected, nothing leaks and the next branch is
 * right. Needs a build with fault points. */
#include <errno.h>

#include "branch-kit.h"
#include "fault-kit.h"

static bool fds_become(pid_t pid, unsigned n)
{
	for (unsigned i = 0; i < 1000; i++) {
		if (count_fds(pid) <= n)
			return true;
		poll(NULL, 0, 2);
	}
	print_message("%u descriptors, %u expected\n", count_fds(pid), n);
	return false;
}

/* ---- an error at the n-th step of a take, whichever that is ---- */

static void error_everywhere(enum fake_memory kind, bool track, bool new_tracker, unsigned upto)
{
	struct fake_vmm f;
	unsigned failed = 0;

	assert_true(fake_vmm_start(&f, kind, 6 * MIB + 4096 * 5, 2));
	struct ffs_sandbox *sb = attach(&f, track);

	good_branch(sb, &f);
	assert_true(track || becomes_idle(sb, &f, 2000));
	unsigned ours = count_fds(getpid()), theirs = count_fds(f.pid);

	for (unsigned n = 1; n <= upto; n += n < 60 ? 1 : 9) {
		struct ffs_branch *b;
		char text[80];

		snprintf(text, sizeof(text), "%s*@%u error:EIO\n",
			new_tracker ? "memory-check error:EIO\n" : "", n);
		rules(text);
		int e = try_take(sb, &b);
		bool ok = e == 0 && right_or_failed(b, f.truth, f.size);

		failed += !ok;
		rules_none();
		ffs_branch_unref(b);
		if (!fake_vmm_runs(&f, 3000))
			fail_msg("the guest hangs after an error at step %u", n);
		assert_int_equal(ffs_sandbox_state(sb), FFS_RUN_RUNNING);
		if (!track && sb->tracker && !becomes_idle(sb, &f, 2000))
			fail_msg("protected or watched after an error at step %u", n);
		good_branch(sb, &f);
	}
	print_message("%u takes or captures failed\n", failed);
	assert_true(failed > 5);
	assert_true(track || becomes_idle(sb, &f, 2000));
	assert_true(fds_become(getpid(), ours));
	assert_true(fds_become(f.pid, theirs));
	ffs_sandbox_detach(sb);
	assert_false(fake_vmm_protected(&f));
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void test_error_memfd(void **s)
{
	error_everywhere(FAKE_MEMFD, false, false, 300);
}

static void test_error_anonymous(void **s)
{
	error_everywhere(FAKE_ANONYMOUS, false, false, 90);
}

static void test_error_tracking(void **s)
{
	error_everywhere(FAKE_MEMFD, true, false, 120);
}

static void test_error_new_tracker(void **s)
{
	error_everywhere(FAKE_MEMFD, false, true, 60);
}

static void test_error_attach(void **s)
{
	struct fake_vmm f;
	unsigned n = 1, failed = 0;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 1));
	ffs_sandbox_unref(attach(&f, false));
	unsigned ours = count_fds(getpid()), theirs = count_fds(f.pid);

	for (; n < 40; n++) {
		struct ffs_error err = {0};
		char text[40];

		snprintf(text, sizeof(text), "*@%u error:EIO\n", n);
		rules(text);
		struct ffs_sandbox *sb = try_attach(&f, false, &err);

		rules_none();
		if (sb)
			ffs_sandbox_unref(sb);
		else
			assert_true(err.code != 0 && err.text[0]);
		failed += !sb;
		assert_true(fake_vmm_runs(&f, 2000));
		assert_false(fake_vmm_protected(&f));
	}
	assert_true(failed > 4);
	assert_true(fds_become(getpid(), ours));
	assert_true(fds_become(f.pid, theirs));
	fake_vmm_stop(&f);
}

/* A sweep that fails in the middle leaves pages protected that it had counted as writable. With another
 * branch in flight nothing unregisters them: a write to one must be served all the same. */
static void test_sweep_fails_beside_a_branch(void **s)
{
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	for (unsigned n = 2; n < 40; n += 3) {
		char text[80];

		rules("guest-read delay:2\n");
		struct ffs_branch *a = take(sb), *b;
		uint8_t *truth = keep_truth(&f);

		snprintf(text, sizeof(text), "guest-read delay:2\nuffd-protect@%u error:EIO\n", n);
		rules(text);
		int e = try_take(sb, &b);

		if (!fake_vmm_runs(&f, 3000))
			fail_msg("the guest hangs after a sweep failed at its ioctl %u", n);
		rules_none();
		assert_int_equal(wrong_pages(a, truth, f.size), 0);
		if (e == 0)
			right_or_failed(b, f.truth, f.size);
		ffs_branch_unref(b);
		assert_true(right_or_failed(a, truth, f.size));
		ffs_branch_unref(a);
		munmap(truth, f.size);
	}
	assert_true(becomes_idle(sb, &f, 2000));
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void test_image_full(void **s)
{
	static const unsigned nth[] = {1, 2, 7, 33, 90, 160};
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 16 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	good_branch(sb, &f);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(nth); i++) {
		char text[80];
		struct ffs_branch *b;
		struct ffs_error why = {0};

		rules("guest-read delay:1\n");
		struct ffs_branch *a = take(sb);
		uint8_t *truth = keep_truth(&f);

		snprintf(
			text, sizeof(text), "image-write@%u error:%s\n", nth[i], i % 2 ? "ENOMEM" : "ENOSPC");
		rules(text);
		assert_int_equal(try_take(sb, &b), 0);
		assert_true(fake_vmm_runs(&f, 2000));
		bool a_ok = right_or_failed(a, truth, f.size), b_ok = right_or_failed(b, f.truth, f.size);

		assert_int_equal(a_ok + b_ok, 1); /* that image only */
		ffs_branch_failure(a_ok ? b : a, &why);
		assert_int_equal(why.code, i % 2 ? ENOMEM : ENOSPC);
		rules_none();
		ffs_branch_unref(a);
		ffs_branch_unref(b);
		munmap(truth, f.size);
		good_branch(sb, &f);
	}
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void test_slots_full(void **s)
{
	struct fake_vmm f;
	struct ffs_branch *b[FFS_SLOTS], *late = NULL;
	uint8_t *truth[FFS_SLOTS];
	struct ffs_branch_options opt = {.timeout_ns = 50 * FFS_NS_PER_MS};
	struct ffs_error err = {0};

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 32 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	rules("guest-read delay:5\n");
	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		b[i] = take(sb);
		truth[i] = keep_truth(&f);
	}
	unsigned stops = f.stops;

	assert_int_equal(ffs_branch_take(sb, &opt, NULL, &late, &err), -EAGAIN);
	assert_null(late);
	assert_int_equal(f.stops, stops);
	assert_true(fake_vmm_runs(&f, 2000));
	rules_none();
	ffs_branch_unref(b[3]); /* makes room */
	munmap(truth[3], f.size);
	late = take(sb);
	assert_int_equal(wrong_pages(late, f.truth, f.size), 0);
	for (unsigned i = 0; i < FFS_SLOTS; i++) {
		if (i == 3)
			continue;
		assert_int_equal(wrong_pages(b[i], truth[i], f.size), 0);
		wait_ready(b[i]);
		assert_int_equal(wrong_pages(b[i], truth[i], f.size), 0);
		ffs_branch_unref(b[i]);
		munmap(truth[i], f.size);
	}
	ffs_branch_unref(late);
	assert_true(becomes_idle(sb, &f, 5000));
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* ---- races, held open ---- */

static void *let_go_later(void *name)
{
	poll(NULL, 0, 300);
	let_go(name);
	return NULL;
}

/* A copier that gives a slice back to the guest is preempted at the point (its second pass); a whole take
 * goes by, or waits for it. */
static void late_release(const char *point)
{
	char rule[80];
	struct fake_vmm f;
	pthread_t later;
	char name[] = "slice";

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 16 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	assert_true(fake_vmm_runs(&f, 2000));
	assert_true(fake_vmm_tell(&f, 'p')); /* without faults the copier comes first */
	rules("guest-read@1 hold:start\n");
	struct ffs_branch *a = take(sb);
	uint8_t *truth = keep_truth(&f);

	/* its second slice: the first one has pages that saving the device state writes */
	assert_true(wait_held("start", 5000));
	snprintf(rule, sizeof(rule), "%s@2 hold:slice\n", point);
	rules(rule);
	let_go("start");
	assert_true(wait_held("slice", 5000));
	rules("guest-read delay:3\n");
	assert_int_equal(pthread_create(&later, NULL, let_go_later, name), 0);
	struct ffs_branch *b = take(sb);

	pthread_join(later, NULL);
	assert_true(fake_vmm_tell(&f, 'c'));
	assert_true(fake_vmm_runs(&f, 2000));
	wait_ready(a);
	wait_ready(b);
	assert_int_equal(wrong_pages(a, truth, f.size), 0);
	assert_int_equal(wrong_pages(b, f.truth, f.size), 0);
	rules_none();
	ffs_branch_unref(a);
	ffs_branch_unref(b);
	munmap(truth, f.size);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void test_late_release(void **s)
{
	late_release("open-slice");     /* it has seen that no branch needs the slice */
	late_release("uffd-unprotect"); /* just before the ioctl */
}

struct range {
	struct ffs_branch *b;
	const uint8_t *truth;
	size_t len;
	uint64_t off;
	bool right;
};

static void *read_range(void *arg)
{
	struct range *r = arg;
	uint8_t *buf = malloc(r->len);

	r->right = buf && ffs_branch_read_memory(r->b, buf, r->len, r->off) == (ssize_t)r->len &&
		   memcmp(buf, r->truth + r->off, r->len) == 0;
	free(buf);
	return NULL;
}

/* A reader finds a cluster missing, and somebody else captures it before the reader looks what else is: the
 * rest of what it reads is still missing. */
static void test_captured_meanwhile(void **s)
{
	struct fake_vmm f;
	pthread_t thread;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	/* until no page is zero, which reads right without having been captured */
	assert_true(fake_vmm_runs(&f, 2000));
	while (fake_vmm_progress(&f) < 400000)
		poll(NULL, 0, 1);
	assert_true(fake_vmm_tell(&f, 'p')); /* no faults: nobody captures but these */
	rules("guest-read@1 hold:start\n");
	struct ffs_branch *b = take(sb);
	struct range all = {.b = b, .truth = f.truth, .len = MIB, .off = MIB};
	struct range first = {.b = b, .truth = f.truth, .len = 65536, .off = MIB};

	assert_true(fake_vmm_read_truth(&f, NULL, NULL));
	assert_true(wait_held("start", 5000)); /* the copier, at the first clusters */
	rules("needed@1 hold:reader\n");
	assert_int_equal(pthread_create(&thread, NULL, read_range, &all), 0);
	assert_true(wait_held("reader", 5000));
	read_range(&first);
	let_go("reader");
	pthread_join(thread, NULL);
	rules_none();
	let_go("start");
	assert_true(first.right);
	assert_true(all.right);
	wait_ready(b);
	assert_int_equal(wrong_pages(b, f.truth, f.size), 0);
	assert_true(fake_vmm_tell(&f, 'c'));
	ffs_branch_unref(b);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* QEMU punches the page out of the memfd first, and the event comes with its madvise. What is copied in
 * between is no memory of the branch's instant. */
static void test_hole_before_event(void **s)
{
	struct fake_vmm f;
	char page[4096];
	static const char zero[4096];

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	do
		assert_true(fake_vmm_runs(&f, 2000));
	while (fake_vmm_progress(&f) < 100000);
	assert_true(fake_vmm_tell(&f, 'p'));
	rules("guest-read@1 hold:copier\n");
	struct ffs_branch *b = take(sb);

	assert_true(wait_held("copier", 5000));
	assert_memory_not_equal(f.truth + FAKE_DISCARD_PAGE, zero, 4096);
	assert_true(fake_vmm_tell(&f, 'h'));
	assert_int_equal(ffs_branch_read_memory(b, page, 4096, FAKE_DISCARD_PAGE), 4096);
	assert_memory_equal(page, zero, 4096); /* nobody can know yet */
	assert_true(fake_vmm_tell(&f, 'D'));
	let_go("copier");
	assert_false(right_or_failed(b, f.truth, f.size));
	ffs_branch_unref(b);
	assert_true(fake_vmm_tell(&f, 'c'));
	rules_none();
	good_branch(sb, &f);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* One page of a cluster is discarded: its neighbours are still protected. */
static void test_discard_one_page(void **s)
{
	static const enum fake_memory kinds[] = {FAKE_MEMFD, FAKE_ANONYMOUS};

	for (unsigned i = 0; i < 4; i++) {
		struct fake_vmm f;

		assert_true(fake_vmm_start(&f, kinds[i % 2], 2 * MIB, 3));
		struct ffs_sandbox *sb = attach(&f, i / 2 == 0);

		for (unsigned round = 0; round < 5; round++) {
			rules(i / 2 ? "guest-read delay:10\n" : "");
			struct ffs_branch *b = take(sb);

			if (i / 2 == 0)
				wait_ready(b);
			assert_true(fake_vmm_tell(&f, 'D'));
			if (!fake_vmm_runs(&f, 3000))
				fail_msg("the guest hangs on a neighbour of a discarded page");
			rules_none();
			if (i / 2)
				right_or_failed(b, f.truth, f.size);
			ffs_branch_unref(b);
		}
		good_branch(sb, &f);
		ffs_sandbox_unref(sb);
		fake_vmm_stop(&f);
	}
}

struct give_up {
	struct ffs_branch *other;
	atomic_int called;
};

static void give_up_fn(void *arg)
{
	struct give_up *g = arg;

	ffs_branch_unref(g->other);
	atomic_fetch_add(&g->called, 1);
}

/* The last reference to a branch that is being captured goes in the callback of another, and its own in its
 * own. */
static void test_unref_in_callback(void **s)
{
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 16 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	for (unsigned i = 0; i < 5; i++) {
		rules("guest-read delay:1\n");
		struct ffs_branch *a = take(sb), *b = take(sb);
		struct give_up first = {.other = b}, own = {.other = ffs_branch_ref(a)};
		struct ffs_branch_watch w1 = {.fn = give_up_fn, .arg = &first},
					w2 = {.fn = give_up_fn, .arg = &own};

		ffs_branch_watch(a, &w2);
		ffs_branch_watch(a, &w1);
		if (i % 2)
			ffs_branch_unref(a); /* the watch holds the last one */
		else
			wait_ready(a);
		while (!atomic_load(&first.called) || !atomic_load(&own.called))
			poll(NULL, 0, 1);
		if (i % 2 == 0)
			ffs_branch_unref(a);
		rules_none();
		good_branch(sb, &f);
	}
	assert_true(becomes_idle(sb, &f, 2000));
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

int main(void)
{
	if (!fault_points_built())
		return 77;
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(test_late_release, faults_after),
		cmocka_unit_test_teardown(test_captured_meanwhile, faults_after),
		cmocka_unit_test_teardown(test_hole_before_event, faults_after),
		cmocka_unit_test_teardown(test_discard_one_page, faults_after),
		cmocka_unit_test_teardown(test_sweep_fails_beside_a_branch, faults_after),
		cmocka_unit_test_teardown(test_image_full, faults_after),
		cmocka_unit_test_teardown(test_slots_full, faults_after),
		cmocka_unit_test_teardown(test_unref_in_callback, faults_after),
		cmocka_unit_test_teardown(test_error_attach, faults_after),
		cmocka_unit_test_teardown(test_error_memfd, faults_after),
		cmocka_unit_test_teardown(test_error_anonymous, faults_after),
		cmocka_unit_test_teardown(test_error_tracking, faults_after),
		cmocka_unit_test_teardown(test_error_new_tracker, faults_after),
	};

	cmocka_set_test_filter(getenv("FORKFS_TEST_FILTER"));
	return cmocka_run_group_tests(tests, kit_setup, kit_teardown);
}
