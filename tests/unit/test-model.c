/* All interleavings of a small model of the page state machine (model.h): none is wrong, and each way to
 * break it is found in one of them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "base/util.h"
#include "model.h"

#define LIMIT (2u << 20)

static const struct model_config configs[] = {
	{.name = "two pages, two branches", .pages = 2, .branches = 2, .writes = 2},
	{.name = "cancel and a reader", .pages = 1, .branches = 2, .writes = 2, .reads = 1, .cancel = true},
	{.name = "three branches", .pages = 1, .branches = 3, .writes = 2},
	{.name = "device state", .pages = 1, .branches = 2, .writes = 2, .vmstate_writes = true},
	{.name = "two pages, a reader", .pages = 2, .branches = 1, .writes = 2, .reads = 2},
	{.name = "watchdog", .pages = 1, .branches = 1, .writes = 2, .reads = 1, .watchdog = true},
	{.name = "tracked", .pages = 1, .branches = 3, .writes = 2, .track = true},
	{.name = "tracked, two pages", .pages = 2, .branches = 2, .writes = 2, .track = true},
	{.name = "tracked, cancel", .pages = 1, .branches = 3, .writes = 2, .track = true, .cancel = true},
};

static void test_protocol(void **state)
{
	static struct model_result r;

	for (unsigned i = 0; i < FFS_ARRAY_LEN(configs); i++) {
		uint64_t start = ffs_now_ns();

		model_explore(&configs[i], LIMIT, &r);
		print_message("%s: %llu states, %llu ends, %llu ms\n", configs[i].name,
			(unsigned long long)r.states, (unsigned long long)r.ends,
			(unsigned long long)((ffs_now_ns() - start) / FFS_NS_PER_MS));
		if (r.violation)
			fail_msg("%s: %s\n%s", configs[i].name, r.violation, r.trace);
		assert_true(r.ends > 0);
	}
}

/* Each mutant is wrong in at least one of the configurations, for a reason other than their size. */
static void test_mutants(void **state)
{
	static struct model_result r;

	for (unsigned m = MUTANT_NONE + 1; m < MUTANTS; m++) {
		bool found = false;

		for (unsigned i = 0; i < FFS_ARRAY_LEN(configs) && !found; i++) {
			struct model_config c = configs[i];

			c.mutant = (enum model_mutant)m;
			model_explore(&c, LIMIT, &r);
			found = r.violation != NULL;
			if (found)
				print_message("%s: %s (%s, %llu states)\n", model_mutant_name[m], r.violation,
					c.name, (unsigned long long)r.states);
		}
		if (!found)
			fail_msg("no interleaving shows what is wrong with %s", model_mutant_name[m]);
		assert_string_not_equal(r.violation, "too many states");
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_protocol),
		cmocka_unit_test(test_mutants),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
