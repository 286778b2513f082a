/* Who may capture (base/permits.h) and how much memory images may take (branch/budget.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/permits.h"
#include "base/util.h"
#include "branch/budget.h"
#include "forkfs-engine.h"

#define FOREVER (ffs_now_ns() + 60 * FFS_NS_PER_S)

struct asker {
	struct ffs_permits *p;
	struct ffs_permit_owner *owner;
	struct ffs_cancel *cancel;
	const char *name;
	pthread_t thread;
	int result;
};

static char served[64];
static pthread_mutex_t served_lock = PTHREAD_MUTEX_INITIALIZER;

/* Take, note who it was, give: the next in turn comes then. */
static void *ask(void *arg)
{
	struct asker *a = arg;

	a->result = ffs_permits_take(a->p, a->owner, a->name, a->cancel, FOREVER);
	if (a->result == 0) {
		pthread_mutex_lock(&served_lock);
		strcat(strcat(served, a->name), " ");
		pthread_mutex_unlock(&served_lock);
		ffs_permits_give(a->p);
	}
	return NULL;
}

static void wait_for_waiters(struct ffs_permits *p, unsigned want)
{
	unsigned n;

	do {
		poll(NULL, 0, 1);
		ffs_permits_count(p, NULL, NULL, &n);
	} while (n != want);
}

static void start(struct asker *a, unsigned already)
{
	assert_int_equal(pthread_create(&a->thread, NULL, ask, a), 0);
	wait_for_waiters(a->p, already + 1);
}

static void note_place(void *arg, const char *name, unsigned place)
{
	char text[16];

	snprintf(text, sizeof(text), "%s=%u ", name, place);
	strcat(arg, text);
}

/* Four of one owner have come before one each of two others: each owner gets its turn. */
static void test_fair(void **state)
{
	struct ffs_permits *p = ffs_permits_new(1);
	struct ffs_permit_owner a = {0}, b = {0}, c = {0};
	struct asker askers[] = {{p, &a, NULL, "a1"}, {p, &a, NULL, "a2"}, {p, &a, NULL, "a3"},
		{p, &b, NULL, "b1"}, {p, &c, NULL, "c1"}, {p, &b, NULL, "b2"}};
	char places[96] = "";
	unsigned limit, taken, waiting;

	served[0] = '\0';
	assert_int_equal(ffs_permits_take(p, &a, "first", NULL, FOREVER), 0);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(askers); i++)
		start(&askers[i], i);
	ffs_permits_count(p, &limit, &taken, &waiting);
	assert_int_equal(limit, 1);
	assert_int_equal(taken, 1);
	assert_int_equal(waiting, 6);
	ffs_permits_queue(p, &a, note_place, places);
	ffs_permits_queue(p, &b, note_place, places);
	ffs_permits_queue(p, &c, note_place, places);
	assert_string_equal(places, "a1=1 a2=4 a3=6 b1=2 b2=5 c1=3 ");
	ffs_permits_give(p);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(askers); i++)
		pthread_join(askers[i].thread, NULL);
	assert_string_equal(served, "a1 b1 c1 a2 b2 a3 ");
	ffs_permits_count(p, NULL, &taken, &waiting);
	assert_int_equal(taken, 0);
	assert_int_equal(waiting, 0);
	ffs_permits_unref(p);
}

/* Who gives up leaves the queue whole, wherever it stood. */
static void test_leaving(void **state)
{
	struct ffs_permits *p = ffs_permits_new(1);
	struct ffs_permit_owner a = {0}, b = {0};
	struct asker askers[] = {{p, &a, ffs_cancel_new(), "a1"}, {p, &a, NULL, "a2"},
		{p, &b, ffs_cancel_new(), "b1"}, {p, &a, ffs_cancel_new(), "a3"}};

	served[0] = '\0';
	assert_int_equal(ffs_permits_take(p, &a, "first", NULL, FOREVER), 0);
	assert_int_equal(ffs_permits_take(p, &b, "late", NULL, ffs_now_ns()), -EAGAIN);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(askers); i++)
		start(&askers[i], i);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(askers); i++)
		if (askers[i].cancel) {
			ffs_cancel_set(askers[i].cancel);
			pthread_join(askers[i].thread, NULL);
			assert_int_equal(askers[i].result, -EINTR);
			ffs_cancel_unref(askers[i].cancel);
		}
	wait_for_waiters(p, 1);
	ffs_permits_give(p);
	pthread_join(askers[1].thread, NULL);
	assert_string_equal(served, "a2 ");
	ffs_permits_unref(p);
}

/* More at once for those who wait already; none to wait for. */
static void test_limits(void **state)
{
	struct ffs_permits *p = ffs_permits_new(1);
	struct ffs_permit_owner a = {0};
	struct asker one = {p, &a, NULL, "a1"};

	served[0] = '\0';
	assert_int_equal(ffs_permits_take(p, &a, "first", NULL, FOREVER), 0);
	start(&one, 0);
	ffs_permits_set_limit(p, 2);
	pthread_join(one.thread, NULL);
	assert_string_equal(served, "a1 ");
	ffs_permits_set_limit(p, 0);
	for (unsigned i = 0; i < 100; i++)
		assert_int_equal(ffs_permits_take(p, &a, NULL, NULL, ffs_now_ns()), 0);
	ffs_permits_unref(p);
}

static void test_budget(void **state)
{
	struct ffs_budget *b = ffs_budget_new();
	struct ffs_error err = {0};
	uint64_t limit, taken, reserved;
	const uint64_t mib = 1 << 20;

	assert_int_equal(ffs_budget_reserve(b, "vm", 1ull << 60, &err), 0);
	ffs_budget_release(b, 1ull << 60, 0);
	ffs_budget_set_limit(b, 100 * mib);
	assert_int_equal(ffs_budget_reserve(b, "vm", 60 * mib, &err), 0);
	assert_int_equal(ffs_budget_reserve(b, "vm", 41 * mib, &err), -ENOSPC);
	/* asked for, left, and of how much */
	assert_non_null(strstr(err.text, "41 MiB"));
	assert_non_null(strstr(err.text, "40 MiB"));
	assert_non_null(strstr(err.text, "100 MiB"));
	/* its zero pages cost nothing */
	ffs_budget_settle(b, 60 * mib, 10 * mib);
	assert_int_equal(ffs_budget_reserve(b, "vm", 90 * mib, &err), 0);
	ffs_budget_usage(b, &limit, &taken, &reserved);
	assert_int_equal(limit, 100 * mib);
	assert_int_equal(taken, 10 * mib);
	assert_int_equal(reserved, 90 * mib);
	/* a limit that is lowered takes nothing away */
	ffs_budget_set_limit(b, 5 * mib);
	assert_int_equal(ffs_budget_reserve(b, "vm", 1, &err), -ENOSPC);
	ffs_budget_release(b, 90 * mib, 0);
	ffs_budget_release(b, 0, 10 * mib);
	assert_int_equal(ffs_budget_reserve(b, "vm", 5 * mib, &err), 0);
	ffs_budget_release(b, 5 * mib, 0);
	/* no machine has that much, each has a page */
	ffs_budget_set_limit(b, FFS_MEMORY_AUTO);
	assert_int_equal(ffs_budget_reserve(b, "vm", 1ull << 60, &err), -ENOSPC);
	assert_int_equal(ffs_budget_reserve(b, "vm", 4096, &err), 0);
	ffs_budget_release(b, 4096, 0);
	ffs_budget_unref(b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_fair),
		cmocka_unit_test(test_leaving),
		cmocka_unit_test(test_limits),
		cmocka_unit_test(test_budget),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
