/* Logs in files of JSON lines: what a line looks like, rotation and its bounds, a disk that is full
 * (tools/json-log.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "json-log.h"

#define AT (1790000000ull * FFS_NS_PER_S + 7)
#define TIME "2026-09-21T14:13:20.000000007Z"

static char dir[] = "/dev/shm/json-log-XXXXXX", path[64];

static int setup(void **s)
{
	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	if (!mkdtemp(dir))
		return -1;
	snprintf(path, sizeof(path), "%s/log", dir);
	return 0;
}

static int teardown(void **s)
{
	DIR *d = opendir(dir);

	for (struct dirent *e; d && (e = readdir(d));)
		if (e->d_name[0] != '.')
			unlinkat(dirfd(d), e->d_name, 0);
	if (d)
		closedir(d);
	return rmdir(dir);
}

static struct ffs_json_log *begin(uint64_t bytes)
{
	struct ffs_json_log *l = NULL;
	struct ffs_error err = {0};

	if (ffs_json_log_open(path, bytes, 3, &l, &err) < 0)
		fail_msg("%s", err.text);
	return l;
}

static void end(struct ffs_json_log *l, uint64_t wall_ns, const char *want)
{
	_cleanup_free_ char *lost = NULL;

	ffs_json_log_close(l, wall_ns, &lost);
	assert_string_equal(lost ? lost : "nothing", want ? want : "nothing");
}

static char *content(const char *suffix)
{
	char name[80], *text = NULL;
	size_t len;

	snprintf(name, sizeof(name), "%s%s", path, suffix);
	return ffs_read_file(name, 16 << 20, &text, &len) < 0 ? NULL : text;
}

static void put(struct ffs_json_log *l, const char *text)
{
	ffs_json_log_put(l, false, text, strlen(text), AT);
}

static void test_lines(void **s)
{
	static const char bytes[] =
		"a\"b\\c\t\x1b\x7f\0d \xc3\xa4 \xff \xc3( \xed\xa0\x80 \xf0\x9f\x98\x80\n";
	struct ffs_json_log *l = begin(1 << 20);

	put(l, "one\ntw");
	ffs_json_log_put(l, true, "error\n", 6, AT + 1);
	put(l, "o\nleft");
	ffs_json_log_put(l, false, bytes, sizeof(bytes) - 1, AT);
	put(l, "the last");
	end(l, AT + 2, NULL);
	_cleanup_free_ char *text = content("");

	assert_string_equal(text,
		"{\"log\":\"one\\n\",\"stream\":\"stdout\",\"time\":\"" TIME "\"}\n"
		"{\"log\":\"error\\n\",\"stream\":\"stderr\",\"time\":\"2026-09-21T14:13:20.000000008Z\"}\n"
		"{\"log\":\"two\\n\",\"stream\":\"stdout\",\"time\":\"" TIME "\"}\n"
		"{\"log\":\"lefta\\\"b\\\\c\\u0009\\u001b\\u007f\\u0000d \xc3\xa4 \xef\xbf\xbd \xef\xbf\xbd( "
		"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd "
		"\xf0\x9f\x98\x80\\n\",\"stream\":\"stdout\",\"time\":\"" TIME "\"}\n"
		"{\"log\":\"the last\",\"stream\":\"stdout\",\"time\":\"2026-09-21T14:13:20.000000009Z\"}\n");
}

/* A line of any length, cut where no character is; and the same bytes when they come one at a time. */
static void test_long(void **s)
{
	size_t n = 3 * FFS_JSON_LOG_LINE / 2, len = 0;
	_cleanup_free_ char *line = calloc(2 * n + 2, 1), *joined = calloc(2 * n + 2, 1);
	struct ffs_json_log *l = begin(1 << 20);
	unsigned pieces = 0;

	line[0] = 'x'; /* so that a character lies across the cut */
	for (size_t i = 0; i < n; i++)
		memcpy(line + 1 + 2 * i, "\xc3\xa4", 2);
	ffs_json_log_put(l, false, line, 2 * n + 1, AT);
	for (size_t i = 0; i < 2 * n + 1; i++)
		ffs_json_log_put(l, true, line + i, 1, AT);
	end(l, AT, NULL);
	_cleanup_free_ char *text = content("");

	for (char *save = NULL, *one = strtok_r(text, "\n", &save); one; one = strtok_r(NULL, "\n", &save)) {
		struct json_object *o = json_tokener_parse(one);
		const char *log = json_object_get_string(json_object_object_get(o, "log"));

		assert_non_null(log);
		assert_true(strlen(log) <= FFS_JSON_LOG_LINE);
		assert_null(strstr(log, "\xef\xbf\xbd"));
		if (!strcmp(json_object_get_string(json_object_object_get(o, "stream")), "stdout")) {
			memcpy(joined + len, log, strlen(log));
			len += strlen(log);
		}
		pieces++;
		json_object_put(o);
	}
	assert_int_equal(len, 2 * n + 1);
	assert_memory_equal(joined, line, len);
	assert_int_equal(pieces, 8);
}

static off_t size_of(const char *suffix)
{
	char name[80];
	struct stat st;

	snprintf(name, sizeof(name), "%s%s", path, suffix);
	return stat(name, &st) < 0 ? -1 : st.st_size;
}

/* Three files, none larger than it may be, whole lines, the last of them in order and without a gap. */
static void test_rotation(void **s)
{
	struct ffs_json_log *l = begin(4096);
	char line[40];
	unsigned next = 0;

	for (unsigned i = 0; i < 1000; i++) {
		if (i == 500) { /* another process goes on */
			end(l, AT, NULL);
			l = begin(4096);
		}
		snprintf(line, sizeof(line), "line %u\n", i);
		put(l, line);
		assert_true(size_of("") >= 0 && size_of("") <= 4096);
	}
	end(l, AT, NULL);
	for (unsigned i = 3; i-- > 0;) {
		const char *const suffix[] = {"", ".1", ".2"};
		_cleanup_free_ char *text = content(suffix[i]);

		assert_non_null(text);
		assert_true(size_of(suffix[i]) > 2048 && size_of(suffix[i]) <= 4096);
		for (char *save = NULL, *one = strtok_r(text, "\n", &save); one;
			one = strtok_r(NULL, "\n", &save)) {
			unsigned number;

			assert_int_equal(sscanf(one, "{\"log\":\"line %u", &number), 1);
			assert_true(!next || number == next);
			next = number + 1;
		}
	}
	assert_int_equal(next, 1000);
	assert_int_equal(size_of(".3"), -1);
	assert_int_equal(size_of(".new"), -1);
}

/* Cut off before its last step, a rotation leaves one file with two names; a new log begins without it. */
static void test_cut_off(void **s)
{
	char other[80];

	snprintf(other, sizeof(other), "%s.1", path);
	end(begin(4096), AT, NULL);
	assert_int_equal(link(path, other), 0);
	struct ffs_json_log *l = begin(4096);

	put(l, "there\n");
	end(l, AT, NULL);
	assert_int_equal(size_of(".1"), -1);
	assert_true(size_of("") > 0);
}

static void limit(rlim_t bytes)
{
	struct rlimit r = {bytes, RLIM_INFINITY};

	assert_int_equal(setrlimit(RLIMIT_FSIZE, &r), 0);
}

/* Nothing can be written: the loss is counted, no half line stays, and the log says it once it goes on. */
static void test_full(void **s)
{
	struct ffs_json_log *l = begin(1 << 20);

	signal(SIGXFSZ, SIG_IGN);
	put(l, "before\n");
	off_t whole = size_of("");

	limit((rlim_t)whole + 30);
	put(l, "a\nbc\n");
	put(l, "def\n");
	assert_int_equal(size_of(""), whole);
	limit(RLIM_INFINITY);
	put(l, "after\n");
	end(l, AT, "3 lines (9 bytes) are missing: File too large");
	_cleanup_free_ char *text = content("");

	assert_string_equal(text, "{\"log\":\"before\\n\",\"stream\":\"stdout\",\"time\":\"" TIME "\"}\n"
				  "{\"log\":\"forkfs: 3 lines (9 bytes) are missing here: File too "
				  "large\\n\",\"stream\":\"stderr\",\"time\":\"" TIME "\"}\n"
				  "{\"log\":\"after\\n\",\"stream\":\"stdout\",\"time\":\"" TIME "\"}\n");
}

/* One writer; a regular file. */
static void test_refused(void **s)
{
	struct ffs_json_log *l = begin(4096), *second = NULL;
	struct ffs_error err = {0};

	assert_int_equal(ffs_json_log_open(path, 4096, 3, &second, &err), -EBUSY);
	assert_non_null(strstr(err.text, path));
	end(l, AT, NULL);
	assert_int_equal(ffs_json_log_open(path, 4096, 3, &second, &err), 0);
	end(second, AT, NULL);
	assert_int_equal(ffs_json_log_open("/dev/null", 4096, 3, &second, &err), -EINVAL);
	assert_int_equal(ffs_json_log_open(dir, 4096, 3, &second, &err), -EISDIR);
	assert_int_equal(ffs_json_log_open("/nowhere/log", 4096, 3, &second, &err), -ENOENT);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_lines, setup, teardown),
		cmocka_unit_test_setup_teardown(test_long, setup, teardown),
		cmocka_unit_test_setup_teardown(test_rotation, setup, teardown),
		cmocka_unit_test_setup_teardown(test_cut_off, setup, teardown),
		cmocka_unit_test_setup_teardown(test_full, setup, teardown),
		cmocka_unit_test_setup_teardown(test_refused, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
