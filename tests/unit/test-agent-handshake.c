/* The handshake with a guest's agent as the host sees it: every edge late, missing or out of order (tools/agent-handshake.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#include <cmocka.h>
#include <errno.h>

#include "agent-handshake.h"

#define SECOND 1000000000ull
#define READY (60 * SECOND)

static const uint64_t waits[FFS_EDGES] = {
	READY, READY, FFS_REBIND_NS, FFS_ACK_NS, FFS_OUTPUT_NS, FFS_HEALTH_NS};

/* Through to before an edge, one second each; the time then. */
static uint64_t until(struct ffs_handshake *h, enum ffs_edge edge)
{
	uint64_t now = 7 * SECOND;

	ffs_handshake_begin(h, now, READY);
	for (enum ffs_edge e = 0; e < edge; e++)
		assert_int_equal(ffs_handshake_edge(h, e, now += SECOND, NULL), 0);
	return now;
}

static void test_whole(void **s)
{
	struct ffs_handshake h;
	uint64_t now = until(&h, FFS_EDGES);

	assert_int_equal(h.next, FFS_EDGES);
	assert_true(ffs_handshake_deadline(&h) == UINT64_MAX);
	assert_int_equal(ffs_handshake_check(&h, now + 1000 * SECOND, NULL), 0);
	for (enum ffs_edge e = 1; e < FFS_EDGES; e++)
		assert_int_equal(h.at_ns[e] - h.at_ns[e - 1], SECOND);
}

/* An edge that does not come ends the wait at its own bound, and the sentence names it; what comes afterwards is nothing. */
static void test_missing(void **s)
{
	for (enum ffs_edge e = 0; e < FFS_EDGES; e++) {
		struct ffs_error err = {0}, again = {0};
		struct ffs_handshake h;
		uint64_t now = until(&h, e), from = e <= FFS_EDGE_BEGUN ? 7 * SECOND : now;
		char edge[40] = "edge '";

		assert_true(ffs_handshake_deadline(&h) == from + waits[e]);
		assert_int_equal(ffs_handshake_check(&h, from + waits[e] - 1, &err), 0);
		assert_int_equal(ffs_handshake_check(&h, from + waits[e], &err), -ETIMEDOUT);
		strcat(edge, ffs_edge_name(e));
		assert_non_null(strstr(err.text, edge));
		assert_int_equal(ffs_handshake_edge(&h, e, from + waits[e] + 1, &again), -ETIMEDOUT);
		assert_string_equal(again.text, err.text);
		assert_true(ffs_handshake_deadline(&h) == UINT64_MAX);
		assert_true(h.next == e); /* health has not begun */
	}
}

static void test_late(void **s)
{
	for (enum ffs_edge e = 0; e < FFS_EDGES; e++) {
		struct ffs_error err = {0};
		struct ffs_handshake h;
		uint64_t now = until(&h, e), from = e <= FFS_EDGE_BEGUN ? 7 * SECOND : now;

		assert_int_equal(ffs_handshake_edge(&h, e, from + waits[e], &err), -ETIMEDOUT);
	}
}

static void test_order(void **s)
{
	for (enum ffs_edge due = 0; due <= FFS_EDGES; due++)
		for (enum ffs_edge e = 0; e < FFS_EDGES; e++) {
			struct ffs_error err = {0};
			struct ffs_handshake h;
			uint64_t now = until(&h, due);

			if (e == due)
				continue;
			assert_int_equal(ffs_handshake_edge(&h, e, now, &err), -EPROTO);
			assert_non_null(strstr(err.text, ffs_edge_name(e)));
			assert_true(h.failed);
		}
}

static void test_first_reason(void **s)
{
	struct ffs_error err = {0};
	struct ffs_handshake h;

	ffs_handshake_begin(&h, 0, READY);
	assert_int_equal(ffs_handshake_fail(&h, ECONNRESET, "the VM has ended", &err), -ECONNRESET);
	assert_int_equal(ffs_handshake_fail(&h, EIO, "another reason", &err), -ECONNRESET);
	assert_string_equal(err.text, "the VM has ended");
}

static void test_health(void **s)
{
	struct ffs_health h;
	uint64_t now = SECOND, pause = FFS_HEALTH_FAST_NS;

	ffs_health_begin(&h, now);
	assert_false(h.healthy);
	assert_true(ffs_health_ask(&h, now));
	assert_false(ffs_health_ask(&h, now + FFS_HEALTH_TIMEOUT_NS - 1));
	ffs_health_answer(&h, now);
	assert_true(h.healthy && h.due_ns == now + FFS_HEALTH_INTERVAL_NS);
	now = h.due_ns;
	assert_true(ffs_health_ask(&h, now));
	/* no answers: asked again soon, then ever less often, never less than every few seconds */
	for (unsigned missed = 1; missed < 12; missed++) {
		now += FFS_HEALTH_TIMEOUT_NS;
		assert_false(ffs_health_ask(&h, now));
		assert_false(h.healthy);
		assert_int_equal(h.missed, missed);
		assert_true(h.due_ns == now + pause);
		now = h.due_ns;
		assert_true(ffs_health_ask(&h, now));
		pause = 2 * pause < FFS_HEALTH_TIMEOUT_NS ? 2 * pause : FFS_HEALTH_TIMEOUT_NS;
	}
	ffs_health_answer(&h, now);
	assert_true(h.healthy && !h.missed);
	/* somebody asks: at once, but never a second time while an answer is waited for */
	ffs_health_now(&h, now + SECOND);
	assert_true(ffs_health_ask(&h, now + SECOND));
	ffs_health_now(&h, now + 2 * SECOND);
	assert_true(h.due_ns == now + SECOND + FFS_HEALTH_TIMEOUT_NS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_whole),
		cmocka_unit_test(test_missing),
		cmocka_unit_test(test_late),
		cmocka_unit_test(test_order),
		cmocka_unit_test(test_first_reason),
		cmocka_unit_test(test_health),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
