/* The words of mount -o: what each sets, and what is refused by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "base/util.h"
#include "forkfs-engine.h"
#include "../../fs/fs.h"

static struct ffs_mount_options parsed(const char *list)
{
	struct ffs_mount_options opt;
	struct ffs_error err = {0};

	ffs_mount_options_init(&opt);
	if (ffs_mount_options_parse(&opt, list, &err) < 0)
		fail_msg("'%s' was refused: %s", list, err.text);
	return opt;
}

static void test_defaults(void **state)
{
	struct ffs_mount_options opt = parsed("");

	assert_false(opt.allow_other);
	assert_false(opt.branch_off);
	assert_false(opt.reattach_off);
	assert_int_equal(opt.lease_ns, 30 * FFS_NS_PER_S);
	assert_int_equal(opt.branch_rate, 10);
	assert_true(opt.memory == FFS_MEMORY_AUTO);
	assert_true(opt.captures >= 8);
	assert_int_equal(opt.passthrough, FFS_PASSTHROUGH_AUTO);
	assert_int_equal(opt.max_read, 1 << 20);
	assert_int_equal(opt.log, FFS_LOG_INFO);
}

static void test_values(void **state)
{
	struct ffs_mount_options opt = parsed(
		"allow_other,branch=off,branch-rate=3,lease=5,passthrough=off,max_read=65536,log=debug");

	assert_true(opt.allow_other);
	assert_true(opt.branch_off);
	assert_int_equal(opt.lease_ns, 5 * FFS_NS_PER_S);
	assert_int_equal(opt.branch_rate, 3);
	assert_int_equal(opt.passthrough, FFS_PASSTHROUGH_OFF);
	assert_int_equal(opt.max_read, 65536);
	assert_int_equal(opt.log, FFS_LOG_DEBUG);
	assert_false(parsed("branch=off,branch=on").branch_off);
	assert_true(parsed("reattach=off").reattach_off);
	assert_false(parsed("reattach=off,reattach=on").reattach_off);
	assert_true(parsed("memory=unlimited").memory == FFS_MEMORY_UNLIMITED);
	assert_true(parsed("memory=1G,memory=auto").memory == FFS_MEMORY_AUTO);
	assert_int_equal(parsed("memory=0").memory, 0);
	assert_int_equal(parsed("memory=1000").memory, 1000);
	assert_int_equal(parsed("memory=3K").memory, 3 << 10);
	assert_int_equal(parsed("memory=512M").memory, 512 << 20);
	assert_true(parsed("memory=8T").memory == 8ull << 40);
	assert_int_equal(parsed("captures=0").captures, 0);
	assert_true(parsed("").cache_size == UINT64_MAX);
	assert_int_equal(parsed("cache-size=2G").cache_size >> 30, 2);
	assert_int_equal(parsed("cache-store=1T").cache_store >> 40, 1);
	assert_int_equal(parsed("").cache_age_ns, 86400 * FFS_NS_PER_S);
	assert_int_equal(parsed("cache-age=0").cache_age_ns, 0);
	assert_int_equal(parsed("captures=3").captures, 3);
	assert_string_equal(parsed("").ack_address, "127.0.0.1");
	assert_string_equal(parsed("ack-address=::1").ack_address, "::1");
	assert_string_equal(parsed("store=/var/lib/forkfs").store, "/var/lib/forkfs");
	assert_int_equal(parsed("").default_store, FFS_STORE_MEMORY);
	assert_int_equal(parsed("default-store=packed").default_store, FFS_STORE_PACKED);
}

static void test_of_mount(void **state)
{
	/* as mount(8) and systemd pass them on from fstab */
	parsed("rw,nodev,nosuid,noexec,relatime,user,_netdev,nofail,x-systemd.automount,defaults");
}

static void test_refused(void **state)
{
	static const char *const lists[] = {"nonsense", "lease", "lease=", "store",
		"store=", "default-store=tape", "lease=-1", "lease=x", "lease=99999999999999999999",
		"lease=5s", "branch", "branch=maybe", "branch-rate=1e3", "passthrough=on", "max_read=1",
		"max_read=5000", "max_read=2097152", "ack-address=", "ack-address=localhost",
		"ack-address=1.2.3", "log=loud", "memory", "memory=", "memory=1X", "memory=1MB", "memory=-1",
		"memory=M", "memory=17179869184G", "memory=18446744073709551615", "captures=x", "cache-age=x",
		"cache-size=", "cache-size=auto", "captures=", "allow_other=1", "rw,nonsense=3",
		"allow_others"};

	for (size_t i = 0; i < FFS_ARRAY_LEN(lists); i++) {
		struct ffs_mount_options opt;
		struct ffs_error err = {0};

		ffs_mount_options_init(&opt);
		if (ffs_mount_options_parse(&opt, lists[i], &err) != -EINVAL)
			fail_msg("'%s' was accepted", lists[i]);
		assert_int_equal(err.code, EINVAL);
		/* the sentence names the culprit */
		const char *name = strchr(lists[i], ',') ? "nonsense" : lists[i];
		size_t len = strcspn(name, "=");
		char word[32] = "";

		memcpy(word, name, len);
		if (!strstr(err.text, word))
			fail_msg("'%s': %s", lists[i], err.text);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_defaults),
		cmocka_unit_test(test_values),
		cmocka_unit_test(test_of_mount),
		cmocka_unit_test(test_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
