/* The branch engine against the truth: every byte of every branch, under write load, with readers, several in
 * flight, cancelled, detached, revoked. */
#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "branch-explain.h"
#include "branch-kit.h"

static void identity(enum fake_memory kind, bool track, unsigned rounds)
{
	struct fake_vmm f;

	if (!fake_vmm_start(&f, kind, 64 * MIB, 2)) {
		print_message("SKIP: no such memory here\n");
		skip();
	}
	struct ffs_sandbox *sb = attach(&f, track);

	for (unsigned i = 0; i < rounds; i++) {
		struct ffs_branch *b = take(sb);

		if (i % 2)
			wait_ready(b); /* the image; otherwise while it is being captured */
		assert_identical(b, &f, f.truth, i, i % 2 ? "ready" : "in flight");
		wait_ready(b);
		assert_identical(b, &f, f.truth, i, "ready, once more");
		ffs_branch_unref(b);
		assert_true(fake_vmm_runs(&f, 1000));
	}
	assert_int_equal(f.stops, f.resumes);
	if (kind == FAKE_MEMFD) {
		struct stat st;

		/* the last eighth was never touched by the guest, and must not be by us */
		fstat(f.memfd, &st);
		assert_true((uint64_t)st.st_blocks * 512 <= f.size - f.size / 8);
	}
	ffs_sandbox_detach(sb);
	assert_false(fake_vmm_protected(&f));
	ffs_sandbox_unref(sb);
	assert_true(fake_vmm_runs(&f, 1000));
	fake_vmm_stop(&f);
}

static void test_identity_memfd(void **s)
{
	identity(FAKE_MEMFD, false, 40);
}

static void test_identity_anonymous(void **s)
{
	identity(FAKE_ANONYMOUS, false, 20);
}

static void test_identity_hugetlb(void **s)
{
	identity(FAKE_HUGETLB, false, 10);
}

static void test_identity_tracking(void **s)
{
	identity(FAKE_MEMFD, true, 30);
}

/* Several branches of one sandbox in flight, each with its own instant. */
static void test_many_in_flight(void **s)
{
	struct fake_vmm f;
	enum { N = 6 };
	struct ffs_branch *b[N];
	uint8_t *truth[N];

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 64 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	for (unsigned round = 0; round < 5; round++) {
		for (unsigned i = 0; i < N; i++) {
			b[i] = take(sb);
			truth[i] = f.truth;
			f.truth = mmap(
				NULL, f.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		}
		for (unsigned i = 0; i < N; i++) {
			if (i == round) { /* one is given up on the way: the others must not notice */
				ffs_branch_unref(b[i]);
				munmap(truth[i], f.size);
				continue;
			}
			assert_identical(b[i], &f, truth[i], round, "several in flight");
			wait_ready(b[i]);
			assert_identical(b[i], &f, truth[i], round, "several, ready");
			ffs_branch_unref(b[i]);
			munmap(truth[i], f.size);
		}
	}
	ffs_sandbox_unref(sb);
	assert_false(fake_vmm_protected(&f));
	fake_vmm_stop(&f);
}

struct reader {
	pthread_t thread;
	struct ffs_branch *b;
	const uint8_t *truth;
	uint64_t size, seed, bad;
};

static void *reader_main(void *arg)
{
	struct reader *r = arg;
	uint8_t *buf = malloc(256 * 1024);

	for (unsigned i = 0; i < 300; i++) {
		r->seed = r->seed * 6364136223846793005ull + 1442695040888963407ull;
		uint64_t off = (r->seed >> 20) % (r->size - 1), len = 1 + (r->seed >> 8) % (256 * 1024);

		if (len > r->size - off)
			len = r->size - off;
		ssize_t n = ffs_branch_read_memory(r->b, buf, len, off);

		r->bad += n != (ssize_t)len || memcmp(buf, r->truth + off, len) != 0;
	}
	free(buf);
	return NULL;
}

static void test_readers_in_flight(void **s)
{
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 64 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);

	for (unsigned round = 0; round < 10; round++) {
		struct ffs_branch *b = take(sb);
		struct reader r[4];

		for (unsigned i = 0; i < 4; i++) {
			r[i] = (struct reader){
				.b = b, .truth = f.truth, .size = f.size, .seed = round * 4 + i};
			pthread_create(&r[i].thread, NULL, reader_main, &r[i]);
		}
		for (unsigned i = 0; i < 4; i++) {
			pthread_join(r[i].thread, NULL);
			assert_int_equal(r[i].bad, 0);
		}
		ffs_branch_unref(b);
	}
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void watch_fn(void *arg)
{
	atomic_fetch_add((atomic_int *)arg, 1);
}

static void test_detach_in_flight(void **s)
{
	struct fake_vmm f;
	struct ffs_error why = {0};
	atomic_int called = 0;
	struct ffs_branch_watch w = {.fn = watch_fn, .arg = &called};

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 512 * MIB, 2));
	f.keep_truth = false;
	struct ffs_sandbox *sb = attach(&f, false);
	struct ffs_branch *b = take(sb);

	ffs_branch_watch(b, &w);
	ffs_sandbox_detach(sb);
	assert_int_not_equal(ffs_branch_state(b), FFS_BRANCH_WRITING);
	assert_int_equal(atomic_load(&called), 1);
	assert_false(fake_vmm_protected(&f));
	assert_true(fake_vmm_runs(&f, 1000));
	if (ffs_branch_state(b) == FFS_BRANCH_FAILED) {
		char c;

		ffs_branch_failure(b, &why);
		assert_int_equal(why.code, ECANCELED);
		assert_int_equal(ffs_branch_read_memory(b, &c, 1, 0), -EIO);
	}
	ffs_branch_unref(b);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* A VM that is found paused stays paused, and its branch is right. */
static void test_found_paused(void **s)
{
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 32 * MIB, 1));
	struct ffs_sandbox *sb = attach(&f, false);

	assert_true(fake_vmm_tell(&f, 'p'));
	struct ffs_branch *b = take(sb);

	assert_int_equal(f.stops, 0);
	assert_int_equal(f.resumes, 0);
	assert_false(fake_vmm_runs(&f, 50));
	assert_true(fake_vmm_read_truth(&f, NULL, NULL));
	assert_true(fake_vmm_tell(&f, 'c'));
	assert_int_equal(wrong_pages(b, f.truth, f.size), 0);
	ffs_branch_unref(b);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void test_vmm_exits(void **s)
{
	struct fake_vmm f;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 256 * MIB, 2));
	struct ffs_sandbox *sb = attach(&f, false);
	struct ffs_branch *b = take(sb);
	struct ffs_branch_options opt = {0};
	struct ffs_error err = {0};
	struct ffs_branch *no = NULL;

	kill(f.pid, SIGKILL);
	if (ffs_branch_wait(b, NULL, &err) ==
		0) /* a memfd outlives its VMM: what was captured must be right */
		assert_int_equal(wrong_pages(b, f.truth, f.size), 0);
	ffs_branch_unref(b);
	assert_int_equal(ffs_branch_take(sb, &opt, NULL, &no, &err), -ESRCH);
	assert_int_equal(ffs_sandbox_state(sb), FFS_RUN_EXITED);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

static void test_cancel(void **s)
{
	struct fake_vmm f;
	struct ffs_cancel *c = ffs_cancel_new();
	struct ffs_branch_options opt = {0};
	struct ffs_error err = {0};
	struct ffs_branch *b = NULL;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 32 * MIB, 1));
	struct ffs_sandbox *sb = attach(&f, false);

	ffs_cancel_set(c);
	assert_int_equal(ffs_branch_take(sb, &opt, c, &b, &err), -EINTR);
	assert_null(b);
	assert_int_equal(f.stops, 0);
	assert_true(fake_vmm_runs(&f, 1000));
	opt.timeout_ns = 1;
	assert_int_equal(ffs_branch_take(sb, &opt, NULL, &b, &err), -EAGAIN);
	assert_int_equal(f.stops, 0);
	assert_false(fake_vmm_protected(&f));
	ffs_cancel_unref(c);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* Memory that the VMM punches out in flight: its old bytes are gone, so the branch fails; the guest does not
 * notice. */
static void test_hole_punched(void **s)
{
	struct fake_vmm f;
	struct ffs_error err = {0};
	unsigned failed = 0;

	assert_true(fake_vmm_start(&f, FAKE_MEMFD, 256 * MIB, 2));
	f.keep_truth = false;
	struct ffs_sandbox *sb = attach(&f, false);

	for (unsigned i = 0; i < 5; i++) {
		struct ffs_branch *b = take(sb);

		assert_true(fake_vmm_tell(&f, 'd'));
		failed += ffs_branch_wait(b, NULL, &err) < 0;
		ffs_branch_unref(b);
		assert_true(fake_vmm_runs(&f, 1000));
	}
	print_message("%u of 5 failed (the others had captured the page before): %s\n", failed, err.text);
	f.keep_truth = true;
	struct ffs_branch *b = take(sb);

	wait_ready(b);
	assert_int_equal(wrong_pages(b, f.truth, f.size), 0);
	ffs_branch_unref(b);
	ffs_sandbox_unref(sb);
	fake_vmm_stop(&f);
}

/* Several regions, none a multiple of a cluster or a slice, with offsets in the file that are no multiples
 * either. */
static void regions(enum fake_memory kind, bool track)
{
	static const uint64_t sizes[] = {
		40 * 4096, 4096, 2 * MIB + 3 * 4096, 65536 * 7 + 2 * 4096, 16 * MIB, 2 * MIB, 5 * MIB - 4096};
	struct fake_vmm f;

	assert_true(fake_vmm_start_regions(&f, kind, sizes, FFS_ARRAY_LEN(sizes), 2));
	struct ffs_sandbox *sb = attach(&f, track);

	for (unsigned i = 0; i < 10; i++) {
		struct ffs_branch *b = take(sb);
		char buf[3 * 4096];
		/* across the border of each two regions, unaligned */
		uint64_t border = 0;

		for (unsigned k = 0; k + 1 < FFS_ARRAY_LEN(sizes); k++) {
			border += sizes[k];
			uint64_t from = border - (border > 5000 ? 5000 : border);

			assert_int_equal(ffs_branch_read_memory(b, buf, sizeof(buf), from), (int)sizeof(buf));
			assert_memory_equal(buf, f.truth + from, sizeof(buf));
		}
		assert_int_equal(ffs_branch_read_memory(b, buf, sizeof(buf), f.size - 100), 100);
		assert_int_equal(ffs_branch_read_memory(b, buf, sizeof(buf), f.size), 0);
		if (i % 2)
			wait_ready(b);
		assert_identical(b, &f, f.truth, i, i % 2 ? "ready" : "in flight");
		wait_ready(b);
		assert_identical(b, &f, f.truth, i, "ready, once more");
		ffs_branch_unref(b);
		assert_true(fake_vmm_runs(&f, 2000));
	}
	assert_true(track || becomes_idle(sb, &f, 2000));
	ffs_sandbox_unref(sb);
	assert_false(fake_vmm_protected(&f));
	fake_vmm_stop(&f);
}

static void test_regions(void **s)
{
	regions(FAKE_MEMFD, false);
	regions(FAKE_ANONYMOUS, false);
	regions(FAKE_MEMFD, true);
}

/* ---- whatever comes, in any order, against an oracle ---- */

#define STRESS_BRANCHES 10
#define STRESS_NS (12 * FFS_NS_PER_S)

struct stress_entry {
	struct ffs_branch *b;
	uint8_t *truth;
	unsigned users; /* under lock; the truth goes with the last */
};

struct stress {
	struct fake_vmm f;
	bool track;
	pthread_mutex_t vm;   /* one take, detach or attach at a time: whose truth is it? */
	pthread_mutex_t lock; /* below */
	struct stress_entry *list[STRESS_BRANCHES];
	struct ffs_cancel *cancel; /* of the take under way */
	struct ffs_sandbox *sb;    /* under vm */
	uint64_t end_ns;
	atomic_uint taken, read, ready, failed, detached, wrong, blind, cancelled;
};

static uint64_t next_random(uint64_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed;
}

static struct stress_entry *stress_get(struct stress *x, uint64_t r)
{
	pthread_mutex_lock(&x->lock);
	struct stress_entry *e = x->list[r % STRESS_BRANCHES];

	if (e)
		e->users++;
	pthread_mutex_unlock(&x->lock);
	return e;
}

static void stress_put(struct stress *x, struct stress_entry *e)
{
	pthread_mutex_lock(&x->lock);
	bool last = --e->users == 0;

	pthread_mutex_unlock(&x->lock);
	if (!last)
		return;
	ffs_branch_unref(e->b);
	munmap(e->truth, x->f.size);
	free(e);
}

static void stress_replace(struct stress *x, uint64_t r, struct stress_entry *e)
{
	pthread_mutex_lock(&x->lock);
	struct stress_entry *old = x->list[r % STRESS_BRANCHES];

	x->list[r % STRESS_BRANCHES] = e;
	pthread_mutex_unlock(&x->lock);
	if (old)
		stress_put(x, old);
}

static void stress_take(struct stress *x, uint64_t r)
{
	struct ffs_branch_options opt = {.timeout_ns = r % 7 ? 0 : (r >> 8) % 8 * FFS_NS_PER_MS + 1};
	struct ffs_cancel *c = ffs_cancel_new();
	struct ffs_branch *b = NULL;
	struct ffs_error err = {0};

	pthread_mutex_lock(&x->vm);
	pthread_mutex_lock(&x->lock);
	x->cancel = c;
	pthread_mutex_unlock(&x->lock);
	int n = ffs_branch_take(x->sb, &opt, c, &b, &err);

	pthread_mutex_lock(&x->lock);
	x->cancel = NULL;
	pthread_mutex_unlock(&x->lock);
	if (n == 0) {
		struct stress_entry *e = calloc(1, sizeof(*e));

		*e = (struct stress_entry){.b = b, .truth = x->f.truth, .users = 1};
		x->f.truth =
			mmap(NULL, x->f.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		/* a guest that is protected and not watched hangs with us */
		bool watched = atomic_load(&x->sb->tracker->wd->active);

		if (!watched && ffs_branch_state(b) == FFS_BRANCH_WRITING)
			atomic_fetch_add(&x->blind, 1);
		atomic_fetch_add(&x->taken, 1);
		stress_replace(x, r >> 16, e);
	} else {
		atomic_fetch_add(&x->cancelled, 1);
	}
	pthread_mutex_unlock(&x->vm);
	ffs_cancel_unref(c);
}

static void stress_read(struct stress *x, uint64_t r)
{
	struct stress_entry *e = stress_get(x, r);

	if (!e)
		return;
	uint64_t off = (r >> 12) % x->f.size, len = 1 + (r >> 40) % (128 * 1024);
	char *buf = malloc(len);

	if (len > x->f.size - off)
		len = x->f.size - off;
	ssize_t n = ffs_branch_read_memory(e->b, buf, len, off);

	if (n < 0)
		assert_int_equal(n, -EIO);
	else if (n != (ssize_t)len || memcmp(buf, e->truth + off, len) != 0)
		atomic_fetch_add(&x->wrong, 1);
	atomic_fetch_add(&x->read, 1);
	free(buf);
	stress_put(x, e);
}

static void stress_check(struct stress *x, uint64_t r)
{
	struct stress_entry *e = stress_get(x, r);
	struct ffs_error err = {0};

	if (!e)
		return;
	if (ffs_branch_wait(e->b, NULL, &err) == 0) {
		atomic_fetch_add(&x->wrong, wrong_pages(e->b, e->truth, x->f.size) != 0);
		atomic_fetch_add(&x->ready, 1);
	} else {
		atomic_fetch_add(&x->failed, 1);
	}
	stress_put(x, e);
}

static void stress_detach(struct stress *x)
{
	pthread_mutex_lock(&x->vm);
	ffs_sandbox_detach(x->sb);
	atomic_fetch_add(&x->wrong, fake_vmm_protected(&x->f));
	ffs_sandbox_unref(x->sb);
	x->sb = attach(&x->f, x->track);
	pthread_mutex_unlock(&x->vm);
	atomic_fetch_add(&x->detached, 1);
}

struct stress_thread {
	pthread_t thread;
	struct stress *x;
	uint64_t seed;
};

static void *stress_main(void *arg)
{
	struct stress_thread *t = arg;
	struct stress *x = t->x;

	while (ffs_now_ns() < x->end_ns) {
		uint64_t r = next_random(&t->seed), op = r % 100;

		r = next_random(&t->seed);
		if (op < 35) {
			stress_take(x, r);
		} else if (op < 80) {
			stress_read(x, r);
		} else if (op < 86) {
			stress_check(x, r);
		} else if (op < 94) {
			stress_replace(x, r, NULL);
		} else if (op < 98) {
			pthread_mutex_lock(&x->lock);
			struct ffs_cancel *c = x->cancel ? ffs_cancel_ref(x->cancel) : NULL;

			pthread_mutex_unlock(&x->lock);
			ffs_cancel_set(c);
			ffs_cancel_unref(c);
		} else if (op == 98) {
			stress_detach(x);
		}
	}
	return NULL;
}

static void stress(enum fake_memory kind, bool track)
{
	static struct stress x;
	struct stress_thread t[4];
	const char *given = getenv("FORKFS_TEST_SEED");
	uint64_t seed = given ? strtoull(given, NULL, 0) : ffs_now_ns();
	static const uint64_t sizes[] = {5 * MIB + 3 * 4096, 11 * MIB - 4096};

	memset(&x, 0, sizeof(x));
	print_message("seed: FORKFS_TEST_SEED=%llu\n", (unsigned long long)seed);
	assert_true(fake_vmm_start_regions(&x.f, kind, sizes, 2, 2));
	x.track = track;
	x.sb = attach(&x.f, track);
	unsigned ours = count_fds(getpid());

	pthread_mutex_init(&x.vm, NULL);
	pthread_mutex_init(&x.lock, NULL);
	x.end_ns = ffs_now_ns() + STRESS_NS / 2;
	for (unsigned i = 0; i < 4; i++) {
		t[i] = (struct stress_thread){.x = &x, .seed = (seed + i) * 0x9e3779b97f4a7c15ull | 1};
		assert_int_equal(pthread_create(&t[i].thread, NULL, stress_main, &t[i]), 0);
	}
	for (unsigned i = 0; i < 4; i++)
		pthread_join(t[i].thread, NULL);
	for (unsigned i = 0; i < STRESS_BRANCHES; i++) {
		stress_check(&x, i);
		stress_replace(&x, i, NULL);
	}
	print_message("%u taken, %u not (timeout, cancel), %u reads, %u ready, %u failed, %u detached\n",
		x.taken, x.cancelled, x.read, x.ready, x.failed, x.detached);
	assert_int_equal(x.wrong, 0);
	assert_int_equal(x.blind, 0);
	assert_true(fake_vmm_runs(&x.f, 2000));
	assert_true(track || becomes_idle(x.sb, &x.f, 2000));
	for (unsigned i = 0; i < 1000 && count_fds(getpid()) > ours; i++)
		poll(NULL, 0, 2);
	assert_true(count_fds(getpid()) <= ours);
	ffs_sandbox_unref(x.sb);
	assert_false(fake_vmm_protected(&x.f));
	fake_vmm_stop(&x.f);
}

static void test_stress(void **s)
{
	stress(FAKE_MEMFD, false);
	stress(FAKE_ANONYMOUS, true);
}

static int after(void **s)
{
	fake_vmm_stop_left_over();
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(test_identity_memfd, after),
		cmocka_unit_test_teardown(test_identity_anonymous, after),
		cmocka_unit_test_teardown(test_identity_hugetlb, after),
		cmocka_unit_test_teardown(test_identity_tracking, after),
		cmocka_unit_test_teardown(test_many_in_flight, after),
		cmocka_unit_test_teardown(test_readers_in_flight, after),
		cmocka_unit_test_teardown(test_detach_in_flight, after),
		cmocka_unit_test_teardown(test_found_paused, after),
		cmocka_unit_test_teardown(test_vmm_exits, after),
		cmocka_unit_test_teardown(test_cancel, after),
		cmocka_unit_test_teardown(test_hole_punched, after),
		cmocka_unit_test_teardown(test_regions, after),
		cmocka_unit_test_teardown(test_stress, after),
	};

	cmocka_set_test_filter(getenv("FORKFS_TEST_FILTER")); /* a pattern; NULL: all */
	return cmocka_run_group_tests(tests, kit_setup, kit_teardown);
}
