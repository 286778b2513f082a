/* Live, diff and full branches of sandboxes with and without tracking, against the truth: what a branch
 * shares with its parent is as right as what it copied, whatever becomes of the parent. */
#include <errno.h>

#include "branch-kit.h"

static int try_mode(struct ffs_sandbox *sb, enum ffs_branch_mode mode, const char *name,
	struct ffs_branch **b, struct ffs_error *err)
{
	struct ffs_branch_options opt = {.name = name, .mode = mode};

	*b = NULL;
	return ffs_branch_take(sb, &opt, NULL, b, err);
}

static struct ffs_branch *take_mode(struct ffs_sandbox *sb, enum ffs_branch_mode mode)
{
	struct ffs_branch *b = NULL;
	struct ffs_error err = {0};

	for (unsigned i = 0; i < 3; i++) {
		if (try_mode(sb, mode, "b", &b, &err) == 0)
			return b;
		if (!ffs_tracker_revoked(sb->tracker))
			break;
		print_message("revoked, once more: %s\n", err.text);
	}
	fail_msg("take %s: %s", ffs_branch_mode_name(mode), err.text);
	return NULL;
}

static void is_right(struct ffs_branch *b, const struct fake_vmm *f, const uint8_t *truth)
{
	assert_int_equal(wrong_pages(b, truth, f->size), 0);
	wait_ready(b);
	assert_int_equal(wrong_pages(b, truth, f->size), 0);
}

static uint64_t image_bytes(const struct ffs_branch *b)
{
	struct stat st;

	assert_int_equal(fstat(b->image.fd, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

static void full(enum fake_memory kind, bool track)
{
	struct fake_vmm f;

	if (!fake_vmm_start(&f, kind, 32 * MIB, 2)) {
		print_message("SKIP: no such memory here\n");
		skip();
	}
	struct ffs_sandbox *sb = attach(&f, track);

	for (unsigned i = 0; i < 8; i++) {
		struct ffs_branch *b = take_mode(sb, FFS_BRANCH_FULL);

		/* complete before the guest ran again: nothing of it depends on protection */
		assert_int_equal(ffs_branch_state(b), FFS_BRANCH_READY);
		assert_true(track || !fake_vmm_protected(&f));
		assert_true(ffs_branch_memory_fd(b) >= 0);
		assert_int_equal(b->shared_bytes, 0);
		is_right(b, &f, f.truth);
		ffs_branch_unref(b);
		assert_true(fake_vmm_runs(&f, 2000));
	}
	assert_int_equal(f.stops, f.resumes);
	ffs_sandbox_unref(sb);
	assert_false(fake_vmm_protected(&f));
	fake_vmm_stop(&f);
}

static void test_full(void **s)
{
	full(FAKE_MEMFD, false);
}

static void test_full_anonymous(void **s)
{
	full(FAKE_ANONYMOUS, false);
}

static void test_full_tracked(void **s)
{
	full(FAKE_MEMFD, true);
}

static void test_diff_refused(void **s)
{
	struct fake_vmm f;
	struct ffs_branch *b, *parent;
	struct ffs_error err = {0};

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 1));
	struct ffs_sandbox *sb = attach(&f, false);

	assert_int_equal(try_mode(sb, FFS_BRANCH_DIFF, "b", &b, &err), -ENOTSUP);
	ffs_sandbox_unref(sb);
	sb = attach(&f, true);
	assert_int_equal(try_mode(sb, FFS_BRANCH_DIFF, "b", &b, &err), -ENOENT);
	/* one without a name goes when its reader goes: no parent */
	assert_int_equal(try_mode(sb, FFS_BRANCH_LIVE, NULL, &parent, &err), 0);
	wait_ready(parent);
	assert_int_equal(try_mode(sb, FFS_BRANCH_DIFF, "b", &b, &err), -ENOENT);
	ffs_branch_unref(parent);
	parent = take_mode(sb, FFS_BRANCH_FULL);
	b = take_mode(sb, FFS_BRANCH_DIFF);
	is_right(b, &f, f.truth);
	assert_string_equal(ffs_layer_parent(b->layer), ffs_branch_id(parent));
	ffs_branch_unref(b);
	ffs_branch_unref(parent);
	assert_int_equal(try_mode(sb, FFS_BRANCH_DIFF, "b", &b, &err), -ENOENT); /* both were removed */
	parent = take_mode(sb, FFS_BRANCH_LIVE);
	wait_ready(parent);
	/* another attachment of the same VM knows nothing of what happened before it */
	ffs_sandbox_detach(sb);
	ffs_sandbox_unref(sb);
	sb = attach(&f, true);
	assert_int_equal(try_mode(sb, FFS_BRANCH_DIFF, "b", &b, &err), -ENOENT);
	ffs_branch_unref(parent);
	assert_int_equal(f.stops, f.resumes);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* A second branch of a guest that wrote next to nothing costs next to nothing. */
static void test_shares(void **s)
{
	static const enum ffs_branch_mode modes[] = {FFS_BRANCH_LIVE, FFS_BRANCH_DIFF};
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 64 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, true);

	assert_true(fake_vmm_tell(&f, 'p'));
	struct ffs_branch *first = take_mode(sb, FFS_BRANCH_LIVE);

	wait_ready(first);
	assert_true(fake_vmm_read_truth(&f, NULL, NULL));
	for (unsigned i = 0; i < FFS_ARRAY_LEN(modes); i++) {
		struct ffs_branch *b = take_mode(sb, modes[i]);

		is_right(b, &f, f.truth);
		assert_true(b->shared_bytes >= f.size / 100 * 95);
		assert_true(image_bytes(b) <= image_bytes(first) / 100 * 5);
		assert_int_equal(ffs_branch_memory_fd(b), -ENODATA);
		ffs_branch_unref(b);
	}
	ffs_branch_unref(first);
	struct ffs_branch *b = take_mode(sb, FFS_BRANCH_LIVE);

	wait_ready(b);
	assert_int_equal(b->shared_bytes, 0); /* with nobody: its parent was removed */
	is_right(b, &f, f.truth);
	ffs_branch_unref(b);
	assert_true(fake_vmm_tell(&f, 'c'));
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* Children are what they were when all their ancestors are gone, and however many these were. */
static void test_generations(void **s)
{
	enum { N = FFS_LINEAGE_DEPTH + 4 };
	struct fake_vmm f;
	struct ffs_branch *b[N];
	uint8_t *truth[N];
	unsigned whole = 0;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 16 * MIB, 1));
	struct ffs_sandbox *sb = attach(&f, true);

	for (unsigned i = 0; i < N; i++) {
		b[i] = take_mode(sb, i % 3 == 2 ? FFS_BRANCH_DIFF : FFS_BRANCH_LIVE);
		truth[i] = keep_truth(&f);
		wait_ready(b[i]);
		whole += !ffs_layer_parent(b[i]->layer);
	}
	assert_int_equal(whole, 2); /* the first, and one where the line became too long */
	for (unsigned i = 0; i < N; i++) {
		is_right(b[N - 1], &f, truth[N - 1]);
		is_right(b[i], &f, truth[i]);
		if (i == N - 1)
			break;
		ffs_branch_unref(b[i]);
		munmap(truth[i], f.size);
	}
	ffs_branch_unref(b[N - 1]);
	munmap(truth[N - 1], f.size);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* ---- parents that are in the store */

struct copy {
	const uint8_t *truth;
	_Atomic unsigned reads, released;
	_Atomic int error;
};

static ssize_t read_copy(void *arg, void *buf, size_t len, uint64_t off)
{
	struct copy *c = arg;

	if (atomic_load(&c->error))
		return atomic_load(&c->error);
	atomic_fetch_add(&c->reads, 1);
	memcpy(buf, c->truth + off, len);
	return (ssize_t)len;
}

static void release_copy(void *arg)
{
	struct copy *c = arg;

	atomic_fetch_add(&c->released, 1);
}

/* The last reference of a branch may be a copier's. */
static void await_released(struct copy *c)
{
	while (!atomic_load(&c->released))
		sched_yield();
	assert_int_equal(atomic_load(&c->released), 1);
}

static struct ffs_layer *hand_over(struct ffs_branch *b, struct copy *c)
{
	struct ffs_branch_copy copy = {.read = read_copy, .release = release_copy, .arg = c};

	return ffs_branch_copied(b, &copy);
}

static uint64_t taken(struct ffs_budget *b)
{
	uint64_t limit, taken, reserved;

	ffs_budget_usage(b, &limit, &taken, &reserved);
	return taken;
}

struct reader {
	pthread_t thread;
	struct ffs_branch *b;
	const uint8_t *truth;
	size_t size;
	_Atomic unsigned rounds, wrong;
	_Atomic bool stop;
};

static void *read_on(void *arg)
{
	struct reader *r = arg;

	while (!atomic_load(&r->stop)) {
		atomic_fetch_add(&r->wrong, (unsigned)wrong_pages(r->b, r->truth, r->size));
		atomic_fetch_add(&r->rounds, 1);
	}
	return NULL;
}

static void await_rounds(struct reader *r, unsigned more)
{
	unsigned goal = atomic_load(&r->rounds) + more;

	while (atomic_load(&r->rounds) < goal)
		sched_yield();
}

/* A branch that is in the store stays the parent of the next without any memory; children that had its image, and are
 * read meanwhile, go on with the copy; who is no parent any more gives the copy back. */
static void test_parent_in_the_store(void **s)
{
	struct fake_vmm f;
	struct copy first = {0}, moved = {0};

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 16 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, true);
	struct ffs_budget *budget = sb->engine->budget;
	uint64_t before = taken(budget);
	struct ffs_branch *parent = take_mode(sb, FFS_BRANCH_FULL);

	first.truth = moved.truth = keep_truth(&f);
	assert_true(ffs_branch_is_parent(parent));
	struct reader r = {.b = take_mode(sb, FFS_BRANCH_LIVE), .truth = keep_truth(&f), .size = f.size};

	is_right(r.b, &f, r.truth);
	assert_true(r.b->shared_bytes > 0);
	assert_int_equal(pthread_create(&r.thread, NULL, read_on, &r), 0);
	await_rounds(&r, 2);
	uint64_t with_parent = taken(budget);
	struct ffs_layer *kin = hand_over(parent, &first);

	assert_non_null(kin);
	assert_int_equal(
		wrong_pages(parent, first.truth, f.size), 0); /* its own reader has its image still */
	ffs_branch_unref(parent);
	while (taken(budget) >= with_parent)
		sched_yield();
	await_rounds(&r, 2);
	assert_true(atomic_load(&first.reads) > 0);
	assert_true(ffs_layer_moved(kin, &(struct ffs_branch_copy){read_copy, release_copy, &moved}));
	assert_int_equal(atomic_load(&first.released), 1);
	await_rounds(&r, 2);
	assert_true(atomic_load(&moved.reads) > 0);

	/* the child is the next parent, and in the store too: nothing is in memory then */
	struct copy second = {.truth = r.truth};

	atomic_store(&r.stop, true);
	pthread_join(r.thread, NULL);
	assert_int_equal(atomic_load(&r.wrong), 0);
	struct ffs_layer *younger = hand_over(r.b, &second);

	assert_non_null(younger);
	assert_int_equal(wrong_pages(r.b, r.truth, f.size), 0);
	ffs_branch_unref(r.b);
	while (taken(budget) != before)
		sched_yield(); /* as above */
	assert_int_equal(
		atomic_load(&moved.released), 0); /* it is the parent until another branch is taken */
	struct ffs_branch *b = take_mode(sb, FFS_BRANCH_DIFF);

	assert_int_equal(atomic_load(&moved.released), 1);
	assert_false(ffs_layer_moved(kin, &(struct ffs_branch_copy){read_copy, release_copy, &first}));
	assert_true(b->shared_bytes > 0);
	is_right(b, &f, f.truth);
	/* removed: a child that has it goes on, and is nobody's child when it is gone */
	ffs_layer_release(younger);
	ffs_layer_release(kin);
	assert_int_equal(atomic_load(&second.released), 0);
	is_right(b, &f, f.truth);
	ffs_branch_unref(b);
	await_released(&second);
	b = take_mode(sb, FFS_BRANCH_LIVE);
	assert_int_equal(b->shared_bytes, 0);
	is_right(b, &f, f.truth);
	ffs_branch_unref(b);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
	munmap((void *)first.truth, f.size);
	munmap((void *)r.truth, f.size);
}

/* A copy that is damaged is the parent of one branch at most, which fails; never a wrong byte. */
static void test_parent_damaged_in_the_store(void **s)
{
	struct fake_vmm f;
	struct copy c = {.error = -EIO};
	char page[4096];
	struct ffs_error err = {0};
	struct ffs_branch *b;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 8 * MIB, 1));
	struct ffs_sandbox *sb = attach(&f, true);

	assert_true(fake_vmm_tell(&f, 'p'));
	struct ffs_branch *parent = take_mode(sb, FFS_BRANCH_LIVE);

	wait_ready(parent);
	struct ffs_layer *kin = hand_over(parent, &c);

	ffs_branch_unref(parent);
	b = take_mode(sb, FFS_BRANCH_LIVE);
	wait_ready(b);
	assert_true(b->shared_bytes > f.size / 2);
	bool failed = false;

	for (uint64_t off = 0; off < f.size; off += sizeof(page))
		failed |= ffs_branch_read_memory(b, page, sizeof(page), off) == -EIO;
	assert_true(failed);
	ffs_branch_unref(b);
	await_released(&c);
	assert_int_equal(try_mode(sb, FFS_BRANCH_DIFF, "b", &b, &err), -ENOENT);
	b = take_mode(sb, FFS_BRANCH_LIVE);
	assert_int_equal(b->shared_bytes, 0);
	wait_ready(b);
	assert_true(fake_vmm_read_truth(&f, NULL, NULL));
	is_right(b, &f, f.truth);
	ffs_branch_unref(b);
	ffs_layer_release(kin);
	assert_true(fake_vmm_tell(&f, 'c'));
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* Any order of taking, giving up, removing; several in flight. */
static void any_order(enum fake_memory kind, uint64_t seed, unsigned steps)
{
	enum { N = 5 };
	struct fake_vmm f;
	struct ffs_branch *b[N] = {0};
	uint8_t *truth[N];
	uint64_t rnd = seed;

	print_message("seed %llu\n", (unsigned long long)seed);
	assert_true(fake_vmm_start(&f, kind, 24 * MIB + 5 * 4096, 2));
	struct ffs_sandbox *sb = attach(&f, true);

	for (unsigned i = 0; i < steps; i++) {
		rnd = rnd * 6364136223846793005ull + 1442695040888963407ull;
		unsigned at = (unsigned)(rnd >> 33) % N, what = (unsigned)(rnd >> 45) % 8;

		if (b[at]) { /* read it, or not, and let it go, perhaps in flight */
			if (what & 1)
				assert_int_equal(wrong_pages(b[at], truth[at], f.size), 0);
			if (what & 2)
				is_right(b[at], &f, truth[at]);
			ffs_branch_unref(b[at]);
			munmap(truth[at], f.size);
			b[at] = NULL;
			continue;
		}
		enum ffs_branch_mode mode = what < 4   ? FFS_BRANCH_LIVE
					    : what < 6 ? FFS_BRANCH_DIFF
						       : FFS_BRANCH_FULL;
		struct ffs_error err = {0};

		if (try_mode(sb, mode, "b", &b[at], &err) == 0)
			truth[at] = keep_truth(&f);
		else if (mode != FFS_BRANCH_DIFF || (err.code != ENOENT && err.code != EAGAIN))
			fail_msg("take %s: %s", ffs_branch_mode_name(mode), err.text);
		if (b[at] && what == 0)
			wait_ready(b[at]); /* so that there are parents */
	}
	for (unsigned i = 0; i < N; i++) {
		if (!b[i])
			continue;
		is_right(b[i], &f, truth[i]);
		ffs_branch_unref(b[i]);
		munmap(truth[i], f.size);
	}
	assert_true(fake_vmm_runs(&f, 2000));
	ffs_sandbox_unref(sb);
	assert_false(fake_vmm_protected(&f));
	fake_vmm_stop(&f);
}

static void test_any_order(void **s)
{
	for (unsigned i = 0; i < 4; i++)
		any_order(FAKE_MEMFD, ffs_now_ns() + i, 60);
}

static void test_any_order_anonymous(void **s)
{
	any_order(FAKE_ANONYMOUS, ffs_now_ns(), 60);
}

static int after(void **s)
{
	fake_vmm_stop_left_over();
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(test_full, after),
		cmocka_unit_test_teardown(test_full_anonymous, after),
		cmocka_unit_test_teardown(test_full_tracked, after),
		cmocka_unit_test_teardown(test_diff_refused, after),
		cmocka_unit_test_teardown(test_shares, after),
		cmocka_unit_test_teardown(test_generations, after),
		cmocka_unit_test_teardown(test_parent_in_the_store, after),
		cmocka_unit_test_teardown(test_parent_damaged_in_the_store, after),
		cmocka_unit_test_teardown(test_any_order, after),
		cmocka_unit_test_teardown(test_any_order_anonymous, after),
	};

	return cmocka_run_group_tests(tests, kit_setup, kit_teardown);
}
