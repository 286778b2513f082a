/* The bookkeeping of a warm pool (tools/pool-book.h): places, the queue, age, failures; no VM. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include <cmocka.h>
#include <errno.h>

#include "pool-book.h"

#define SECOND 1000000000ull

static const struct ffs_error broken = {EIO, "it is broken"};

static struct ffs_pool_book make(unsigned min, unsigned max, unsigned at_once, uint64_t ttl_s)
{
	struct ffs_pool_book b;

	assert_int_equal(ffs_pool_book_init(&b, min, max, at_once, ttl_s * SECOND), 0);
	return b;
}

static unsigned expect(struct ffs_pool_book *b, enum ffs_pool_todo todo, uint64_t now)
{
	struct ffs_pool_action a = ffs_pool_next(b, now);

	assert_int_equal(a.todo, todo);
	return a.at;
}

/* All that can be started is, and succeeds; how many. */
static unsigned fill(struct ffs_pool_book *b, uint64_t now)
{
	struct ffs_pool_action a;
	unsigned n = 0;

	while ((a = ffs_pool_next(b, now)).todo == FFS_POOL_START) {
		ffs_pool_started(b, a.at, now);
		n++;
	}
	assert_int_equal(a.todo, FFS_POOL_NOTHING);
	return n;
}

static unsigned in_use(const struct ffs_pool_book *b)
{
	return b->max - b->count[FFS_POOL_FREE];
}

/* Idle ones are kept ready, so many are started side by side; a hit is replaced, as long as there is a place. */
static void test_keeps_ready(void **s)
{
	struct ffs_pool_book b = make(3, 4, 2, 0);
	struct ffs_pool_waiter w[3];
	unsigned at[2];

	at[0] = expect(&b, FFS_POOL_START, 1);
	at[1] = expect(&b, FFS_POOL_START, 1);
	expect(&b, FFS_POOL_NOTHING, 1);
	ffs_pool_started(&b, at[1], 2);
	ffs_pool_started(&b, at[0], 3);
	assert_int_equal(fill(&b, 4), 1);
	assert_int_equal(b.count[FFS_POOL_IDLE], 3);
	/* the one that has waited longest goes first */
	assert_int_equal(ffs_pool_ask(&b, &w[0], 5, SECOND), 0);
	assert_int_equal(expect(&b, FFS_POOL_HAND, 5), at[1]);
	assert_true(b.place[at[1]].hit && b.place[at[1]].waiter == &w[0] && !w[0].queued);
	ffs_pool_taken(&b, at[1], 9);
	assert_int_equal(b.hits, 1);
	assert_int_equal(ffs_pool_median(&b.hit), 4);
	assert_int_equal(fill(&b, 10), 1);
	assert_int_equal(in_use(&b), 4);
	ffs_pool_ask(&b, &w[1], 11, SECOND);
	ffs_pool_taken(&b, expect(&b, FFS_POOL_HAND, 11), 12);
	expect(&b, FFS_POOL_NOTHING, 12); /* no place */
	ffs_pool_ending(&b, at[1], 13);
	expect(&b, FFS_POOL_NOTHING, 13); /* its process is still there */
	ffs_pool_gone(&b, at[1]);
	assert_int_equal(fill(&b, 14), 1);
	ffs_pool_book_free(&b);
}

/* With nothing ready, one is started for each who asks; they are served in the order of their coming, whoever leaves meanwhile. */
static void test_queue(void **s)
{
	struct ffs_pool_book b = make(0, 2, 4, 0);
	struct ffs_pool_waiter w[5];
	struct ffs_pool_action a;
	unsigned first;

	for (unsigned i = 0; i < 5; i++)
		assert_int_equal(ffs_pool_ask(&b, &w[i], 10 + i, 100 * SECOND), 0);
	first = expect(&b, FFS_POOL_START, 20);
	assert_int_not_equal(expect(&b, FFS_POOL_START, 20), first);
	expect(&b, FFS_POOL_NOTHING, 20);
	ffs_pool_forget(&b, &w[0]);
	ffs_pool_forget(&b, &w[2]);
	ffs_pool_forget(&b, &w[2]); /* once is enough */
	assert_int_equal(b.waiting, 3);
	ffs_pool_started(&b, first, 30);
	a = ffs_pool_next(&b, 30);
	assert_true(a.todo == FFS_POOL_HAND && a.waiter == &w[1] && !b.place[a.at].hit);
	ffs_pool_taken(&b, a.at, 31);
	assert_true(b.misses == 1 && b.hits == 0);
	ffs_pool_started(&b, 1 - first, 32);
	assert_ptr_equal((a = ffs_pool_next(&b, 32)).waiter, &w[3]);
	/* nothing was done for them yet: the next one gets it */
	ffs_pool_back(&b, a.at, 33);
	assert_ptr_equal((a = ffs_pool_next(&b, 33)).waiter, &w[4]);
	assert_int_equal(b.waiting, 0);
	ffs_pool_forget(&b, &w[4]); /* it has left the queue already */
	assert_int_equal(b.waiting, 0);
	ffs_pool_book_free(&b);
}

/* Too late is too late, in the queue too; and it is full some time. */
static void test_deadline(void **s)
{
	struct ffs_pool_book b = make(0, 1, 1, 0), ready = make(1, 1, 1, 0);
	struct ffs_pool_waiter w[2], many[FFS_POOL_WAITING];
	struct ffs_pool_action a;
	unsigned at;

	fill(&ready, 0);
	ffs_pool_ask(&b, &w[0], 0, 5 * SECOND);
	at = expect(&b, FFS_POOL_START, 0);
	ffs_pool_started(&b, at, 1);
	ffs_pool_taken(&b, expect(&b, FFS_POOL_HAND, 1), 2);
	ffs_pool_ask(&b, &w[0], 3, 9 * SECOND);
	ffs_pool_ask(&b, &w[1], 4, 7 * SECOND);
	assert_true(ffs_pool_due(&b, 5) == 7 * SECOND);
	expect(&b, FFS_POOL_NOTHING, 7 * SECOND - 1);
	a = ffs_pool_next(&b, 7 * SECOND);
	assert_true(a.todo == FFS_POOL_TIMEOUT && a.waiter == &w[1] && b.timed_out == 1);
	/* who does not wait gets what is there */
	ffs_pool_ask(&ready, &w[1], 9, 9);
	expect(&ready, FFS_POOL_HAND, 9);
	ffs_pool_ask(&ready, &w[1], 9, 9);
	expect(&ready, FFS_POOL_TIMEOUT, 9);
	ffs_pool_book_free(&ready);
	assert_true(ffs_pool_due(&b, 7 * SECOND) == 9 * SECOND);
	ffs_pool_forget(&b, &w[0]);
	for (unsigned i = 0; i < FFS_POOL_WAITING; i++)
		assert_int_equal(ffs_pool_ask(&b, &many[i], 0, UINT64_MAX), 0);
	assert_int_equal(ffs_pool_ask(&b, &w[0], 0, UINT64_MAX), -EAGAIN);
	ffs_pool_book_free(&b);
}

/* An old one goes when its replacement is ready; where there is no place for that, before. */
static void test_age(void **s)
{
	struct ffs_pool_book b = make(1, 2, 2, 10), full = make(2, 2, 2, 10);
	struct ffs_pool_waiter w;
	unsigned old, fresh;

	old = expect(&b, FFS_POOL_START, 0);
	ffs_pool_started(&b, old, 0);
	assert_true(ffs_pool_due(&b, 1) == 10 * SECOND);
	expect(&b, FFS_POOL_NOTHING, 10 * SECOND - 1);
	fresh = expect(&b, FFS_POOL_START, 10 * SECOND);
	expect(&b, FFS_POOL_NOTHING, 11 * SECOND);
	assert_int_equal(b.count[FFS_POOL_IDLE], 1);
	assert_true(ffs_pool_due(&b, 11 * SECOND) == UINT64_MAX);
	ffs_pool_started(&b, fresh, 12 * SECOND);
	assert_int_equal(expect(&b, FFS_POOL_END, 12 * SECOND), old);
	assert_int_equal(b.expired, 1);
	ffs_pool_gone(&b, old);
	expect(&b, FFS_POOL_NOTHING, 13 * SECOND);
	/* it is handed out meanwhile, rather than none */
	old = fresh;
	fresh = expect(&b, FFS_POOL_START, 22 * SECOND);
	ffs_pool_ask(&b, &w, 22 * SECOND, UINT64_MAX);
	assert_int_equal(expect(&b, FFS_POOL_HAND, 22 * SECOND), old);
	assert_true(b.place[old].hit);

	assert_int_equal(fill(&full, 0), 2);
	old = expect(&full, FFS_POOL_END, 10 * SECOND);
	/* one at a time: the other one is still there */
	expect(&full, FFS_POOL_NOTHING, 10 * SECOND);
	ffs_pool_gone(&full, old);
	fresh = expect(&full, FFS_POOL_START, 11 * SECOND);
	expect(&full, FFS_POOL_NOTHING, 11 * SECOND);
	assert_int_equal(full.count[FFS_POOL_IDLE], 1);
	ffs_pool_started(&full, fresh, 12 * SECOND);
	assert_int_equal(expect(&full, FFS_POOL_END, 12 * SECOND), 1 - old);
	ffs_pool_book_free(&b);
	ffs_pool_book_free(&full);
}

/* Three failures in a row are told to all who ask, and to nobody else; then ever longer waits, one attempt at a time; a success ends it. */
static void test_failures(void **s)
{
	struct ffs_pool_book b = make(2, 4, 4, 0);
	struct ffs_pool_waiter w;
	uint64_t now = SECOND, wait = FFS_POOL_BACKOFF_NS;
	unsigned at, other;

	for (unsigned i = 0; i < FFS_POOL_FAILURES; i++) {
		assert_false(ffs_pool_backs_off(&b, now));
		at = expect(&b, FFS_POOL_START, now);
		if (i == 1) {
			ffs_pool_ask(&b, &w, now, UINT64_MAX);
			expect(&b, FFS_POOL_START, now);
			ffs_pool_start_failed(&b, 1 - at, &(struct ffs_error){0}, now); /* ended on purpose */
			ffs_pool_forget(&b, &w);
		}
		ffs_pool_start_failed(&b, at, &broken, now);
	}
	assert_int_equal(b.failures, FFS_POOL_FAILURES);
	for (unsigned i = 0; i < 12; i++) {
		assert_true(ffs_pool_backs_off(&b, now) && ffs_pool_due(&b, now) == now + wait);
		ffs_pool_ask(&b, &w, now, UINT64_MAX);
		expect(&b, FFS_POOL_REFUSE, now);
		assert_string_equal(b.why.text, broken.text);
		expect(&b, FFS_POOL_NOTHING, now + wait - 1);
		now += wait;
		/* who asks now waits for what comes of the attempt */
		ffs_pool_ask(&b, &w, now, UINT64_MAX);
		at = expect(&b, FFS_POOL_START, now);
		expect(&b, FFS_POOL_NOTHING, now);
		ffs_pool_start_failed(&b, at, &broken, now);
		expect(&b, FFS_POOL_REFUSE, now);
		wait = 2 * wait < FFS_POOL_BACKOFF_MOST_NS ? 2 * wait : FFS_POOL_BACKOFF_MOST_NS;
	}
	now += wait;
	at = expect(&b, FFS_POOL_START, now);
	ffs_pool_started(&b, at, now);
	assert_true(b.in_a_row == 0 && !ffs_pool_backs_off(&b, now));
	other = expect(&b, FFS_POOL_START, now);
	ffs_pool_start_failed(&b, other, &broken, now); /* the first of a new row */
	assert_false(ffs_pool_backs_off(&b, now));
	ffs_pool_book_free(&b);
}

/* With a min of 0 nobody tries but for who asks: so who asks when the wait is over makes it try. */
static void test_failures_without_min(void **s)
{
	struct ffs_pool_book b = make(0, 1, 1, 0);
	struct ffs_pool_waiter w;

	ffs_pool_ask(&b, &w, 0, UINT64_MAX);
	for (unsigned i = 0; i < FFS_POOL_FAILURES; i++)
		ffs_pool_start_failed(&b, expect(&b, FFS_POOL_START, 0), &broken, 0);
	expect(&b, FFS_POOL_REFUSE, 0);
	expect(&b, FFS_POOL_NOTHING, FFS_POOL_BACKOFF_NS);
	ffs_pool_ask(&b, &w, FFS_POOL_BACKOFF_NS, UINT64_MAX);
	ffs_pool_started(&b, expect(&b, FFS_POOL_START, FFS_POOL_BACKOFF_NS), FFS_POOL_BACKOFF_NS);
	expect(&b, FFS_POOL_HAND, FFS_POOL_BACKOFF_NS);
	ffs_pool_book_free(&b);
}

/* Children that start and end at once are failures too; one that has been there for long is none. */
static void test_deaths(void **s)
{
	struct ffs_pool_book b = make(1, 2, 1, 0);
	uint64_t now = 0;
	unsigned at;

	for (unsigned i = 0; i < FFS_POOL_FAILURES; i++) {
		at = expect(&b, FFS_POOL_START, now);
		ffs_pool_started(&b, at, now);
		ffs_pool_died(&b, at, &broken, now + 1);
		ffs_pool_gone(&b, at);
	}
	assert_true(ffs_pool_backs_off(&b, 2));
	expect(&b, FFS_POOL_NOTHING, 2);
	now = b.retry_ns;
	at = expect(&b, FFS_POOL_START, now);
	ffs_pool_started(&b, at, now);
	b.in_a_row = b.deaths = 0;
	ffs_pool_died(&b, at, &broken, now + FFS_POOL_YOUNG_NS);
	assert_true(b.in_a_row == 0 && b.died == FFS_POOL_FAILURES + 1);
	ffs_pool_book_free(&b);
}

/* What is of a branch that is gone ends at once, and who was about to get it is the next. */
static void test_stale(void **s)
{
	struct ffs_pool_book b = make(2, 3, 1, 0);
	struct ffs_pool_waiter w[2];
	struct ffs_pool_action a;

	fill(&b, 0);
	ffs_pool_ask(&b, &w[0], 1, UINT64_MAX);
	a = ffs_pool_next(&b, 1);
	ffs_pool_ask(&b, &w[1], 2, UINT64_MAX);
	b.place[1 - a.at].stale = true;
	ffs_pool_was_stale(&b, a.at, 3);
	assert_true(b.first == &w[0] && w[0].next == &w[1] && b.waiting == 2);
	assert_int_equal(expect(&b, FFS_POOL_END, 3), 1 - a.at);
	ffs_pool_started(&b, expect(&b, FFS_POOL_START, 3), 4);
	assert_ptr_equal(ffs_pool_next(&b, 4).waiter, &w[0]);
	ffs_pool_book_free(&b);
}

/* Who asks is refused, what is idle ends, what is out stays; nothing new begins. */
static void test_drain(void **s)
{
	struct ffs_pool_book b = make(2, 3, 1, 0);
	struct ffs_pool_waiter w;
	unsigned out;

	fill(&b, 0);
	ffs_pool_ask(&b, &w, 1, UINT64_MAX);
	out = expect(&b, FFS_POOL_HAND, 1);
	ffs_pool_taken(&b, out, 2);
	ffs_pool_ask(&b, &w, 3, UINT64_MAX);
	b.draining = true;
	expect(&b, FFS_POOL_END, 3);
	expect(&b, FFS_POOL_REFUSE, 3);
	expect(&b, FFS_POOL_NOTHING, 3);
	assert_int_equal(b.count[FFS_POOL_OUT], 1);
	assert_int_equal(ffs_pool_find(&b, b.place[out].id), (int)out);
	assert_int_equal(ffs_pool_find(&b, 0), -1);
	ffs_pool_book_free(&b);
}

/* Whatever happens in whatever order: never more than max, every place counted, everybody who asks is answered once. */
static void test_random(void **s)
{
	static struct ffs_pool_waiter w[40];
	static bool asks[40];
	struct ffs_pool_book b = make(3, 7, 3, 2);
	uint64_t now = 0, asked = 0, answered = 0;

	b.ttl_ns = SECOND / 8;

	srandom(7);
	for (unsigned step = 0; step < 200000; step++) {
		unsigned i = (unsigned)random() % 40, at = (unsigned)random() % 7, sum = 0;
		struct ffs_pool_action a;

		now += (uint64_t)random() % (SECOND / 20);
		/* times of rush, and of quiet */
		if (step / 500 % 2 && !asks[i] && b.waiting < 30 &&
			ffs_pool_ask(&b, &w[i], now, now + (uint64_t)random() % SECOND) == 0)
			asked += asks[i] = true;
		while ((a = ffs_pool_next(&b, now)).todo != FFS_POOL_NOTHING)
			if (a.waiter) {
				assert_true(asks[a.waiter - w]);
				if (a.todo != FFS_POOL_HAND) {
					asks[a.waiter - w] = false;
					answered++;
				}
			}
		switch (b.place[at].state) {
		case FFS_POOL_STARTING:
			if (random() % 4)
				ffs_pool_started(&b, at, now);
			else
				ffs_pool_start_failed(&b, at, &broken, now);
			break;
		case FFS_POOL_IDLE:
			if (random() % 16 == 0)
				ffs_pool_died(&b, at, &broken, now);
			break;
		case FFS_POOL_HANDING:
			i = (unsigned)(b.place[at].waiter - w);
			if (random() % 8 == 0) {
				ffs_pool_was_stale(&b, at, now);
				break;
			}
			asks[i] = false;
			answered++;
			if (random() % 2)
				ffs_pool_taken(&b, at, now);
			else
				ffs_pool_back(&b, at, now);
			break;
		case FFS_POOL_OUT:
			ffs_pool_ending(&b, at, now);
			break;
		case FFS_POOL_ENDING:
			ffs_pool_gone(&b, at);
			break;
		default:
			break;
		}
		for (enum ffs_pool_state k = 0; k < FFS_POOL_STATES; k++)
			sum += b.count[k];
		assert_true(sum == 7 && b.most <= 7);
		assert_true(b.count[FFS_POOL_STARTING] <= 3);
	}
	for (unsigned i = 0; i < 40; i++)
		answered += asks[i];
	assert_int_equal(asked, answered);
	assert_true(b.hits && b.misses);
	assert_true(b.expired && b.failures);
	assert_true(b.timed_out && b.refused);
	ffs_pool_book_free(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_keeps_ready),
		cmocka_unit_test(test_queue),
		cmocka_unit_test(test_deadline),
		cmocka_unit_test(test_age),
		cmocka_unit_test(test_failures),
		cmocka_unit_test(test_failures_without_min),
		cmocka_unit_test(test_deaths),
		cmocka_unit_test(test_stale),
		cmocka_unit_test(test_drain),
		cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
