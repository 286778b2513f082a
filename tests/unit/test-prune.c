/* What a cache lets go (fs/prune.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/error.h"
#include "base/util.h"
#include "../../fs/prune.h"

/* How many go of entries that are used at 10, 20, … and have 100 bytes each; `in_use` is a mask. */
static unsigned prune(struct ffs_prune_entry *e, unsigned n, unsigned in_use, uint64_t age, uint64_t size)
{
	struct ffs_prune_limits limits = {.age_ns = age, .size = size};

	for (unsigned i = 0; i < n; i++)
		e[i] = (struct ffs_prune_entry){
			.size = 100, .last_use_ns = (i + 1) * 10, .in_use = in_use >> i & 1};
	return ffs_prune(e, n, &limits, 100);
}

static unsigned gone(const struct ffs_prune_entry *e, unsigned n)
{
	unsigned mask = 0;

	for (unsigned i = 0; i < n; i++)
		mask |= (unsigned)e[i].goes << i;
	return mask;
}

static void test_age(void **state)
{
	struct ffs_prune_entry e[4];

	assert_int_equal(prune(e, 4, 0, 0, FFS_PRUNE_NO_LIMIT), 0);
	assert_int_equal(prune(e, 4, 0, 80, FFS_PRUNE_NO_LIMIT), 2);
	assert_int_equal(gone(e, 4), 0x3);
	/* what is in use stays, however old */
	assert_int_equal(prune(e, 4, 0x1, 80, FFS_PRUNE_NO_LIMIT), 1);
	assert_int_equal(gone(e, 4), 0x2);
	assert_int_equal(prune(e, 4, 0, 1, FFS_PRUNE_NO_LIMIT), 4);
	/* used after the clock was read */
	e[0] = (struct ffs_prune_entry){.size = 1, .last_use_ns = 200};
	struct ffs_prune_limits limits = {.age_ns = 1, .size = FFS_PRUNE_NO_LIMIT};

	assert_int_equal(ffs_prune(e, 1, &limits, 100), 0);
}

static void test_size(void **state)
{
	struct ffs_prune_entry e[4];

	assert_int_equal(prune(e, 4, 0, 0, 400), 0);
	/* the least recently used go first */
	assert_int_equal(prune(e, 4, 0, 0, 399), 1);
	assert_int_equal(gone(e, 4), 0x1);
	assert_int_equal(prune(e, 4, 0x1, 0, 250), 2);
	assert_int_equal(gone(e, 4), 0x6);
	assert_int_equal(prune(e, 4, 0xf, 0, 0), 0);
	assert_int_equal(prune(e, 4, 0x8, 0, 0), 3);
	/* age first: what is gone by it counts no longer */
	assert_int_equal(prune(e, 4, 0, 80, 200), 2);
	assert_int_equal(gone(e, 4), 0x3);
	assert_int_equal(prune(e, 0, 0, 80, 200), 0);
}

static void test_names(void **state)
{
	char a[40], b[40];
	struct ffs_error err = {0};

	ffs_key_name("a", a);
	ffs_key_name("a", b);
	assert_string_equal(a, b);
	ffs_key_name("b", b);
	assert_string_not_equal(a, b);
	ffs_key_name("/any text: \xc3\xa9\n", b);
	assert_int_equal(strlen(b), 36);
	assert_int_equal(ffs_check_name("branch", b, &err), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_age),
		cmocka_unit_test(test_size),
		cmocka_unit_test(test_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
