/* The command line of `forkfs`: options, names and owners as people type them, and what mountinfo says of a
 * directory. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "../../tools/mountpoint.h"
#include "../../tools/options.h"

struct parsed {
	bool flag;
	const char *value, *choice;
	char *list;
	int n, result;
	char *argv[10];
	struct ffs_error err;
};

/* Parse the words after the command's name; ends with NULL. */
static void parse(struct parsed *p, ...)
{
	const struct ffs_opt opts[] = {
		{"flag", 'f', FFS_OPT_FLAG, &p->flag},
		{"value", 'v', FFS_OPT_VALUE, &p->value},
		{"list", 'o', FFS_OPT_LIST, &p->list},
		{"live", 0, FFS_OPT_CHOICE, &p->choice},
		{"diff", 0, FFS_OPT_CHOICE, &p->choice},
		{0},
	};
	int argc = 1;
	va_list ap;

	free(p->list);
	memset(p, 0, sizeof(*p));
	p->argv[0] = (char *)"command";
	va_start(ap, p);
	while ((p->argv[argc] = va_arg(ap, char *)))
		argc++;
	va_end(ap);
	p->n = -1;
	p->result = ffs_opts_parse(opts, argc, p->argv, &p->n, &p->err);
}

static void test_disks(void **state)
{
	struct ffs_words words = {0};
	const struct ffs_opt opts[] = {{"disk", 0, FFS_OPT_EACH, &words}, {0}};
	char *argv[] = {(char *)"command", (char *)"--disk", (char *)"a=/x", (char *)"--disk=b=/y=z", NULL};
	struct ffs_error err = {0};
	const char *path;
	char id[65];
	int n;

	assert_int_equal(ffs_opts_parse(opts, 4, argv, &n, &err), 0);
	assert_int_equal(n, 0);
	assert_int_equal(words.n, 2);
	assert_int_equal(ffs_disk_parse(words.word[0], id, &path, &err), 0);
	assert_string_equal(id, "a");
	assert_string_equal(path, "/x");
	assert_int_equal(ffs_disk_parse(words.word[1], id, &path, &err), 0);
	assert_string_equal(id, "b");
	assert_string_equal(path, "/y=z");
	ffs_words_free(&words);
	assert_int_equal(ffs_disk_parse("a", id, &path, &err), -EINVAL);
	assert_int_equal(ffs_disk_parse("a=", id, &path, &err), -EINVAL);
	assert_int_equal(ffs_disk_parse("=/x", id, &path, &err), -EINVAL);
	assert_int_equal(ffs_disk_parse("a/b=/x", id, &path, &err), -EINVAL);
}

static void test_options(void **state)
{
	struct parsed p = {0};

	parse(&p, NULL);
	assert_int_equal(p.result, 0);
	assert_int_equal(p.n, 0);

	/* options before, between and after other words */
	parse(&p, "--flag", "a", "--value", "x", "b", "--live", NULL);
	assert_int_equal(p.result, 0);
	assert_int_equal(p.n, 2);
	assert_string_equal(p.argv[0], "a");
	assert_string_equal(p.argv[1], "b");
	assert_true(p.flag);
	assert_string_equal(p.value, "x");
	assert_string_equal(p.choice, "live");

	/* the four ways to give a value; a value may look like an option, or be empty */
	parse(&p, "--value=x=y", NULL);
	assert_string_equal(p.value, "x=y");
	parse(&p, "-vx", NULL);
	assert_string_equal(p.value, "x");
	parse(&p, "-v", "--flag", NULL);
	assert_string_equal(p.value, "--flag");
	assert_false(p.flag);
	parse(&p, "--value=", NULL);
	assert_string_equal(p.value, "");

	/* letters together, the last with its value; repeated lists join */
	parse(&p, "-fo", "a,b", "-oc", "--list=d", NULL);
	assert_true(p.flag);
	assert_string_equal(p.list, "a,b,c,d");

	/* after -- nothing is an option; a single dash never is */
	parse(&p, "-", "--", "--flag", "-v", NULL);
	assert_int_equal(p.result, 0);
	assert_int_equal(p.n, 3);
	assert_string_equal(p.argv[0], "-");
	assert_string_equal(p.argv[1], "--flag");
	assert_false(p.flag);

	/* the same choice twice is one choice */
	parse(&p, "--diff", "--diff", NULL);
	assert_int_equal(p.result, 0);
	free(p.list);
}

static void assert_refused(struct parsed *p, const char *part)
{
	assert_int_equal(p->result, -EINVAL);
	assert_int_equal(p->err.code, EINVAL);
	if (!strstr(p->err.text, part))
		fail_msg("'%s' does not say '%s'", p->err.text, part);
}

static void test_options_refused(void **state)
{
	struct parsed p = {0};

	parse(&p, "--bogus", NULL);
	assert_refused(&p, "--bogus");
	parse(&p, "--fla", NULL); /* no abbreviations */
	assert_refused(&p, "--fla");
	parse(&p, "--flagged", NULL);
	assert_refused(&p, "--flagged");
	parse(&p, "-x", NULL);
	assert_refused(&p, "-x");
	parse(&p, "-fx", NULL);
	assert_refused(&p, "-x");
	parse(&p, "--flag=yes", NULL);
	assert_refused(&p, "takes no value");
	parse(&p, "--value", NULL);
	assert_refused(&p, "needs a value");
	parse(&p, "a", "-v", NULL);
	assert_refused(&p, "needs a value");
	parse(&p, "--value", "x", "--value=y", NULL);
	assert_refused(&p, "twice");
	parse(&p, "--live", "--diff", NULL);
	assert_refused(&p, "exclude");
	parse(&p, "--=x", NULL);
	assert_refused(&p, "no option");
	free(p.list);
}

static void test_targets(void **state)
{
	static const struct {
		const char *text;
		enum ffs_target_kind allowed;
		const char *sandbox, *branch; /* NULL: refused */
	} rows[] = {
		{"sbx1", FFS_TARGET_ANY, "sbx1", ""},
		{"sbx1", FFS_TARGET_SANDBOX, "sbx1", ""},
		{"sbx1/b1", FFS_TARGET_ANY, "sbx1", "b1"},
		{"sbx1/b1", FFS_TARGET_BRANCH, "sbx1", "b1"},
		{"sbx1/b1/", FFS_TARGET_BRANCH, "sbx1", "b1"},
		{"sbx1/", FFS_TARGET_SANDBOX, "sbx1", ""},
		{"A.b_c:d-9/x.y", FFS_TARGET_ANY, "A.b_c:d-9", "x.y"},
		{"sbx1", FFS_TARGET_BRANCH, NULL, NULL},
		{"sbx1/b1", FFS_TARGET_SANDBOX, NULL, NULL},
		{"sbx1/b1/c1", FFS_TARGET_ANY, NULL, NULL},
		{"sbx1//", FFS_TARGET_ANY, NULL, NULL},
		{"sbx1//b1", FFS_TARGET_ANY, NULL, NULL},
		{"", FFS_TARGET_ANY, NULL, NULL},
		{"/", FFS_TARGET_ANY, NULL, NULL},
		{"/b1", FFS_TARGET_ANY, NULL, NULL},
		{"..", FFS_TARGET_ANY, NULL, NULL},
		{"sbx1/..", FFS_TARGET_ANY, NULL, NULL},
		{".forkfs/ctl", FFS_TARGET_ANY, NULL, NULL},
		{"a b", FFS_TARGET_ANY, NULL, NULL},
		{"sbx1/b\n1", FFS_TARGET_ANY, NULL, NULL},
	};

	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
		struct ffs_target t = {"untouched", "untouched"};
		struct ffs_error err = {0};
		int r = ffs_target_parse(rows[i].text, rows[i].allowed, &t, &err);

		if ((r == 0) != (rows[i].sandbox != NULL))
			fail_msg("'%s': %d %s", rows[i].text, r, err.text);
		if (rows[i].sandbox) {
			assert_string_equal(t.sandbox, rows[i].sandbox);
			assert_string_equal(t.branch, rows[i].branch);
		} else {
			assert_int_equal(r, -EINVAL);
			assert_true(err.text[0]);
			assert_string_equal(t.sandbox, "untouched");
		}
	}
}

static void test_target_lengths(void **state)
{
	struct ffs_error err = {0};
	struct ffs_target t;
	char text[400];

	memset(text, 'a', sizeof(text));
	text[64] = '/';
	text[129] = 0;
	assert_int_equal(ffs_target_parse(text, FFS_TARGET_ANY, &t, &err), 0);
	assert_int_equal(strlen(t.sandbox), 64);
	assert_int_equal(strlen(t.branch), 64);
	text[129] = 'a';
	text[130] = 0; /* a branch of 65 */
	assert_int_equal(ffs_target_parse(text, FFS_TARGET_ANY, &t, &err), -EINVAL);
	memset(text, 'a', sizeof(text) - 1);
	text[sizeof(text) - 1] = 0;
	assert_int_equal(ffs_target_parse(text, FFS_TARGET_ANY, &t, &err), -EINVAL);
	text[65] = 0;
	assert_int_equal(ffs_target_parse(text, FFS_TARGET_ANY, &t, &err), -EINVAL);
}

static void test_owners(void **state)
{
	static const struct {
		const char *text, *expected; /* NULL: refused */
	} rows[] = {
		{"1000:1000", "1000:1000"},
		{"0:0:rw", "0:0:rw"},
		{"root:root", "0:0"},
		{"root:0:rw", "0:0:rw"},
		{"4294967294:1", "4294967294:1"},
		{"4294967295:1", NULL}, /* (uid_t)-1 */
		{"1:4294967295", NULL},
		{"99999999999999999999:1", NULL},
		{"-1:1", NULL},
		{" 1:1", NULL},
		{"1:1:ro", NULL},
		{"1:1:rw:", NULL},
		{"1:1rw", NULL},
		{"1", NULL},
		{"1:", NULL},
		{":1", NULL},
		{"", NULL},
		{"1::rw", NULL},
		{"no-such-user-here:1", NULL},
		{"0x10:1", NULL},
	};

	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
		struct ffs_error err = {0};
		char out[64] = "";
		int r = ffs_owner_parse(rows[i].text, out, &err);

		if ((r == 0) != (rows[i].expected != NULL))
			fail_msg("'%s': %d %s", rows[i].text, r, err.text);
		if (rows[i].expected)
			assert_string_equal(out, rows[i].expected);
		else
			assert_true(err.text[0]);
	}
}

static void test_pids(void **state)
{
	static const char *const bad[] = {
		"", "0", "-1", "+1", " 1", "1 ", "1x", "0x1", "2147483647", "99999999999999999999"};
	struct ffs_error err = {0};
	int pid = 0;

	assert_int_equal(ffs_pid_parse("1", &pid, &err), 0);
	assert_int_equal(pid, 1);
	assert_int_equal(ffs_pid_parse("4194304", &pid, &err), 0);
	assert_int_equal(pid, 4194304);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
		assert_int_equal(ffs_pid_parse(bad[i], &pid, &err), -EINVAL);
}

static void test_mountpoints(void **state)
{
	char dir[] = "/tmp/forkfs-test-cli-XXXXXX", type[80], *real = NULL;
	struct ffs_error err = {0};
	bool dead;

	assert_int_equal(ffs_mountpoint_type("/proc", type, sizeof(type)), 0);
	assert_string_equal(type, "proc");
	assert_int_equal(ffs_mountpoint_type("/proc/self", type, sizeof(type)), -ENOENT);
	assert_int_equal(ffs_mountpoint_check("/proc", &dead, &err), -EBUSY);
	assert_non_null(strstr(err.text, "mount point"));

	assert_non_null(mkdtemp(dir));
	assert_int_equal(ffs_mountpoint_check(dir, &dead, &err), 0);
	assert_int_equal(ffs_mountpoint_resolve(dir, &real, &err), 0);
	free(real);
	assert_int_equal(rmdir(dir), 0);
	assert_int_equal(ffs_mountpoint_resolve(dir, &real, &err), -ENOENT);
	assert_non_null(strstr(err.text, "mkdir"));
	assert_int_equal(ffs_mountpoint_check("/etc/passwd", &dead, &err), -ENOTDIR);
	assert_int_equal(ffs_mountpoint_check("/etc", &dead, &err), -ENOTEMPTY);
}

static void test_sizes(void **state)
{
	static const struct {
		const char *text;
		uint64_t bytes; /* 0: refused */
	} sizes[] = {{"1", 1}, {"4096", 4096}, {"100M", 100ull << 20}, {"1K", 1024}, {"3G", 3ull << 30},
		{"2T", 2ull << 40}, {"", 0}, {"K", 0}, {"0", 0}, {"-1", 0}, {"1.5G", 0}, {"1MB", 0},
		{"1m", 0}, {"9999999T", 0}, {"0x10", 0}, {"123456789012345678901234567890123", 0}};

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct ffs_error err = {0};
		uint64_t v = 0;
		int r = ffs_size_parse("--max-rate", sizes[i].text, &v, &err);

		assert_int_equal(v, sizes[i].bytes);
		assert_int_equal(r, sizes[i].bytes ? 0 : -EINVAL);
		assert_true(!r == !err.text[0]);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_options),
		cmocka_unit_test(test_disks),
		cmocka_unit_test(test_options_refused),
		cmocka_unit_test(test_targets),
		cmocka_unit_test(test_target_lengths),
		cmocka_unit_test(test_owners),
		cmocka_unit_test(test_pids),
		cmocka_unit_test(test_mountpoints),
		cmocka_unit_test(test_sizes),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
