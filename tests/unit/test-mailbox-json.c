/* Payloads are checked byte by byte and never made anew (engine/mailbox/json.c). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <json-c/json.h>

#include "base/util.h"
#include "mailbox/mailbox.h"

static const char *const good[] = {"{}", " {\t} \r\n", "{\"task\":7}\n",
	"{\"a\":[],\"b\":{},\"c\":[1,-0,0.5,1e9,-1.5E-3]}", "{\"\":null,\"t\":true,\"f\":false}",
	"{\"n\":9007199254740993,\"z\":1,\"a\":2}",
	"{\"e\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e4\\uD83D\\uDE00\"}",
	"{\"u\":\"\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80\"}", "{\"a\":[[[[[{\"b\":[null]}]]]]]}",
	"{\"big\":123456789012345678901234567890.25}"};
static const char *const bad[] = {"[]", "null", "7", "\"a\"", "{}{}", "{} x", "{\"a\"}", "{\"a\":}",
	"{\"a\":1,}", "{,}", "{a:1}", "{'a':1}", "{\"a\":01}", "{\"a\":1.}", "{\"a\":.5}", "{\"a\":+1}",
	"{\"a\":1e}", "{\"a\":-}", "{\"a\":NaN}", "{\"a\":Infinity}", "{\"a\":tru}", "{\"a\":nulll}",
	"{\"a\":[1,]}", "{\"a\":[1}", "{\"a\":1]", "{\"a\":\"\t\"}", "{\"a\":\"\\x\"}", "{\"a\":\"\\u12g4\"}",
	"{\"a\":\"\\ud800\"}", "{\"a\":\"\\udc00\"}", "{\"a\":\"\\ud800\\u0041\"}", "{\"a\":\"\xff\"}",
	"{\"a\":\"\xc0\x80\"}", "{\"a\":\"\xed\xa0\x80\"}", "{\"a\":\"\xf4\x90\x80\x80\"}", "{\"a\" 1}",
	"{\"a\":1 2}", "{\"a\":/**/1}", "{\"a\":1}\v"};
static const char *const half[] = {
	"", " ", "{", "{\"", "{\"a", "{\"a\"", "{\"a\":", "{\"a\":1", "{\"a\":[", "{\"a\":\"\\u00"};

/* In one piece, byte by byte, and in two pieces at every place: the same. */
static int feed_all_ways(const char *text, size_t len)
{
	struct ffs_json j = {0};
	int r = ffs_json_feed(&j, text, len, NULL);

	for (size_t cut = 0; cut <= len; cut++) {
		struct ffs_json k = {0};
		int s = ffs_json_feed(&k, text, cut, NULL);

		if (s >= 0)
			s = ffs_json_feed(&k, text + cut, len - cut, NULL);
		assert_int_equal(s, r);
		assert_true(r < 1 || (k.begin == j.begin && k.end == j.end));
	}
	struct ffs_json k = {0};
	int s = 0;

	for (size_t i = 0; i < len && s >= 0; i++)
		s = ffs_json_feed(&k, text + i, 1, NULL);
	assert_int_equal(s, r);
	return r;
}

static void test_grammar(void **state)
{
	for (size_t i = 0; i < FFS_ARRAY_LEN(good); i++)
		assert_int_equal(feed_all_ways(good[i], strlen(good[i])), 1);
	for (size_t i = 0; i < FFS_ARRAY_LEN(bad); i++)
		assert_int_equal(feed_all_ways(bad[i], strlen(bad[i])), -EINVAL);
	for (size_t i = 0; i < FFS_ARRAY_LEN(half); i++)
		assert_int_equal(feed_all_ways(half[i], strlen(half[i])), 0);
	assert_int_equal(feed_all_ways("{\"a\":\"\0\"}", 9), -EINVAL);
}

static void test_depth(void **state)
{
	char text[8 + 2 * FFS_JSON_DEPTH + 8];
	size_t n = (size_t)sprintf(text, "{\"a\":");

	for (unsigned depth = FFS_JSON_DEPTH - 1; depth <= FFS_JSON_DEPTH; depth++) {
		memset(text + n, '[', depth);
		memset(text + n + depth, ']', depth);
		strcpy(text + n + 2 * depth, "}");
		assert_int_equal(feed_all_ways(text, strlen(text)), depth < FFS_JSON_DEPTH ? 1 : -EINVAL);
	}
}

static void test_object(void **state)
{
	struct ffs_span o;
	struct ffs_error err = {0};

	assert_int_equal(ffs_json_object(" {\"a\":1}\n", 9, &o, &err), 0);
	assert_int_equal(o.len, 7);
	assert_memory_equal(o.at, "{\"a\":1}", 7);
	assert_int_equal(ffs_json_object("{\"a\":1", 6, &o, &err), -EINVAL);
	assert_non_null(strstr(err.text, "not a whole JSON object"));
}

/* Whatever random bytes of JSON's own alphabet are an object for us is one for json-c, which is laxer. */
static void test_fuzz(void **state)
{
	static const char *const pieces[] = {"{", "}", "[", "]", ",", ":", "\"a\"", "\"\\u0041\"", "1",
		"-0.5e3", "true", "null", " ", "\"", "\\", "{\"a\":", "{}", "[]", "\xc3\xa4", "0"};
	unsigned seed = 4711, objects = 0;
	char text[400];

	for (unsigned i = 0; i < 300000; i++) {
		size_t n = 0;

		/* most begin like an object */
		if (i % 4)
			n = (size_t)sprintf(text, "{\"k\":");
		for (unsigned k = 0; k < 1 + i % 12; k++) {
			seed = seed * 1103515245 + 12345;
			n += (size_t)sprintf(text + n, "%s", pieces[seed / 65536 % FFS_ARRAY_LEN(pieces)]);
		}
		struct ffs_json j = {0};
		int r = ffs_json_feed(&j, text, n, NULL);

		if (i % 64 == 0)
			assert_int_equal(feed_all_ways(text, n), r);
		if (r != 1)
			continue;
		enum json_tokener_error e;
		struct json_object *o = json_tokener_parse_verbose(text, &e);
		struct ffs_span span, v;

		assert_true(o && json_object_is_type(o, json_type_object));
		json_object_put(o);
		objects++;
		/* the walks stay within the text */
		assert_int_equal(ffs_json_object(text, n, &span, NULL), 0);
		if (ffs_json_member(span, "k", &v)) {
			assert_true(v.at > text && v.len && v.at + v.len < text + n);
			for (unsigned el = 0; ffs_json_element(v, el, &(struct ffs_span){0}); el++)
				assert_true(el < n);
		}
	}
	assert_true(objects > 1000);
}

static void check_port(const char *in, const char *want)
{
	char out[256];
	struct ffs_span o;

	assert_int_equal(ffs_json_object(in, strlen(in), &o, NULL), 0);
	ssize_t n = ffs_json_add_port(o, FFS_ACK_PORT_KEY, 4711, out, sizeof(out), NULL);

	assert_int_equal(n, strlen(want));
	assert_memory_equal(out, want, (size_t)n);
	assert_int_equal(ffs_json_object(out, (size_t)n, &o, NULL), 0);
	assert_int_equal(ffs_json_add_port(o, FFS_ACK_PORT_KEY, 4711, out, (size_t)n - 1, NULL), -EFBIG);
}

/* Big integers, the order of keys, white space and escapes survive: an edit of bytes. */
static void test_ack_port(void **state)
{
	struct ffs_span o;
	char out[64];
	static const char two[] = "{\"ack_port\":1,\"ack_port\":2}";

	check_port("{}", "{\"ack_port\":4711}");
	check_port("{ }", "{\"ack_port\":4711 }");
	check_port("{\"z\":9007199254740993, \"a\" : \"\\u00e4\"}",
		"{\"ack_port\":4711,\"z\":9007199254740993, \"a\" : \"\\u00e4\"}");
	check_port("{\"z\":1,\"ack_port\" : 0 ,\"a\":2}", "{\"z\":1,\"ack_port\" : 4711 ,\"a\":2}");
	check_port("{\"ack\\u005fport\":{\"x\":[\"}\"]},\"a\":2}", "{\"ack\\u005fport\":4711,\"a\":2}");
	check_port("{\"in\":{\"ack_port\":1}}", "{\"ack_port\":4711,\"in\":{\"ack_port\":1}}");
	assert_int_equal(ffs_json_object(two, strlen(two), &o, NULL), 0);
	assert_int_equal(ffs_json_add_port(o, FFS_ACK_PORT_KEY, 1, out, sizeof(out), NULL), -EINVAL);
	/* the other port is another member */
	assert_int_equal(ffs_json_object("{\"ack_port\":1}", 14, &o, NULL), 0);
	assert_int_equal(ffs_json_add_port(o, FFS_ACK_VSOCK_PORT_KEY, 5242, out, sizeof(out), NULL), 36);
	assert_memory_equal(out, "{\"ack_vsock_port\":5242,\"ack_port\":1}", 36);
}

static void test_walks(void **state)
{
	static const char text[] = "{\"fork\":{\"mailboxes\":[{\"payload\": "
				   "{\"n\":18446744073709551617,\"]\":\"}\\\"\"} },[1,2],{}]}}";
	struct ffs_span o, fork, boxes, one, payload;

	assert_int_equal(ffs_json_object(text, strlen(text), &o, NULL), 0);
	assert_int_equal(ffs_json_member(o, "fork", &fork), 1);
	assert_int_equal(ffs_json_member(fork, "mailboxes", &boxes), 1);
	assert_true(ffs_json_element(boxes, 0, &one));
	assert_int_equal(ffs_json_member(one, "payload", &payload), 1);
	assert_int_equal(payload.len, strlen("{\"n\":18446744073709551617,\"]\":\"}\\\"\"}"));
	assert_true(ffs_json_element(boxes, 2, &one) && one.len == 2);
	assert_false(ffs_json_element(boxes, 3, &one));
	assert_int_equal(ffs_json_member(boxes, "a", &one), 0);
	assert_int_equal(ffs_json_member(o, "for", &one), 0);
	assert_int_equal(ffs_json_member(o, "forks", &one), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_grammar),
		cmocka_unit_test(test_depth),
		cmocka_unit_test(test_object),
		cmocka_unit_test(test_fuzz),
		cmocka_unit_test(test_ack_port),
		cmocka_unit_test(test_walks),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
