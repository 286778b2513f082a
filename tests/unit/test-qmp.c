/* The QMP client against a scripted server on a socket pair: everything a hostile or torn monitor can send.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <json-c/json.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/util.h"
#include "vmm/qmp-frame.h"
#include "vmm/qmp.h"
#include "vmm/vmm.h"

#define GREETING                                                                                             \
	"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 2, \"major\": 7}, \"package\": "       \
	"\"\"}, \"capabilities\": []}}\r\n"
#define STOP "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n"

/* ---- the server: answers each command with what `script` makes of it ---- */

struct server {
	int sock;
	const char *greeting;
	/* text for a command; %I is replaced by its id; NULL: stay silent; "": close */
	const char *(*script)(const char *command);
	char big; /* fill a line with this many KiB before the answer, when set */
	pthread_t thread;
	atomic_uint commands;
};

static void put(int sock, const char *text, size_t len)
{
	while (len) {
		ssize_t n = send(sock, text, len, MSG_NOSIGNAL);

		if (n <= 0)
			return;
		text += n;
		len -= (size_t)n;
	}
}

static void put_answer(int sock, const char *text, const char *id)
{
	for (const char *p = text; *p; p++) {
		if (p[0] == '%' && p[1] == 'I') {
			put(sock, id, strlen(id));
			p++;
		} else if (p[0] == '%' && p[1] == 'B') { /* 2 MiB without a newline */
			static char block[1 << 16];

			memset(block, 'x', sizeof(block));
			for (unsigned i = 0; i < 32; i++)
				put(sock, block, sizeof(block));
			p++;
		} else {
			put(sock, p, 1); /* byte by byte: every line is torn everywhere */
		}
	}
}

static void *serve(void *arg)
{
	struct server *s = arg;
	char buf[65536];
	size_t len = 0;

	if (s->greeting)
		put(s->sock, s->greeting, strlen(s->greeting));
	for (;;) {
		ssize_t n = recv(s->sock, buf + len, sizeof(buf) - len - 1, 0);

		if (n <= 0)
			break;
		len += (size_t)n;
		buf[len] = '\0';
		char *nl;

		while ((nl = strchr(buf, '\n')) != NULL) {
			*nl = '\0';
			struct json_object *msg = json_tokener_parse(buf), *v;
			const char *text = "";

			if (msg && json_object_object_get_ex(msg, "execute", &v)) {
				const char *command = json_object_get_string(v);

				atomic_fetch_add(&s->commands, 1);
				text = strcmp(command, "qmp_capabilities") == 0
					       ? "{\"return\": {}, \"id\": \"%I\"}\r\n"
					       : s->script(command);
				json_object_object_get_ex(msg, "id", &v);
				if (text && !*text) {
					json_object_put(msg);
					goto out;
				}
				if (text)
					put_answer(s->sock, text, json_object_get_string(v));
			}
			json_object_put(msg);
			memmove(buf, nl + 1, len - (size_t)(nl + 1 - buf) + 1);
			len -= (size_t)(nl + 1 - buf);
		}
	}
out:
	shutdown(s->sock, SHUT_RDWR);
	return NULL;
}

struct events {
	atomic_uint stop, other, gone, beats;
};

static void on_event(void *arg, const char *name, struct json_object *data)
{
	struct events *e = arg;

	atomic_fetch_add(strcmp(name, "STOP") == 0 ? &e->stop : &e->other, 1);
}
static void on_gone(void *arg)
{
	atomic_fetch_add(&((struct events *)arg)->gone, 1);
}
static void on_beat(void *arg)
{
	atomic_fetch_add(&((struct events *)arg)->beats, 1);
}

static struct events ev;
static struct server srv;

static int start(const char *greeting, const char *(*script)(const char *), uint64_t wait_ns,
	struct ffs_qmp **q, struct ffs_error *err)
{
	int pair[2];
	struct ffs_qmp_hooks hooks = {.event = on_event, .gone = on_gone, .beat = on_beat, .arg = &ev};

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	memset(&ev, 0, sizeof(ev));
	srv = (struct server){.sock = pair[1], .greeting = greeting, .script = script};
	assert_int_equal(pthread_create(&srv.thread, NULL, serve, &srv), 0);
	return ffs_qmp_open(pair[0], -1, &hooks, ffs_now_ns() + wait_ns, NULL, q, NULL, err);
}

static void end(struct ffs_qmp *q)
{
	ffs_qmp_close(q);
	pthread_join(srv.thread, NULL);
	close(srv.sock);
}

/* ---- scripts ---- */

static const char *script_mixed(const char *command)
{
	if (strcmp(command, "stop") == 0)
		return "\r\n" STOP "{\"return\": {\"old\": 1}, \"id\": \"somebody-else\"}\r\n{\"event\": "
		       "\"NOVEL\", \"data\": 7}\r\n"
		       "{\"return\": {\"n\": 5}, \"id\": \"%I\"}\r\n" STOP;
	if (strcmp(command, "refuse") == 0)
		return "{\"error\": {\"class\": \"GenericError\", \"desc\": \"it is \\\"cold\\\"\"}, \"id\": "
		       "\"%I\"}\r\n";
	if (strcmp(command, "pretty") == 0)
		return "{\r\n    \"return\": {\r\n        \"n\": 6\r\n    },\r\n    \"id\": \"%I\"\r\n}\r\n";
	if (strcmp(command, "garbage") == 0)
		return "turn\": {}}\r\n\xff\xfe\r\n[1,2]\r\n{\"return\": {\"n\": 7}, \"id\": \"%I\"}\r\n";
	if (strcmp(command, "torn-pretty") == 0)
		return "{\r\n    \"event\": \"LOST\",\r\n{\"return\": {\"n\": 8}, \"id\": \"%I\"}\r\n";
	if (strcmp(command, "huge") == 0)
		return "%B\r\n{\"return\": {}, \"id\": \"%I\"}\r\n";
	if (strcmp(command, "deep") == 0)
		return "{\"return\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]"
		       "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]"
		       "]]]]]]]]]]]]],\"id\":\"%I\"}\r\n{\"return\": {\"n\": 9}, \"id\": \"%I\"}\r\n";
	if (strcmp(command, "close") == 0)
		return "";
	if (strcmp(command, "types") == 0)
		return "{\"event\": 5}\r\n{\"error\": 3, \"id\": \"x\"}\r\n{\"error\": \"none\", \"id\": "
		       "\"%I\"}\r\n";
	return NULL; /* silence */
}

static int call_n(struct ffs_qmp *q, const char *command, struct ffs_error *err)
{
	struct json_object *ret = NULL, *v;
	int r = ffs_qmp_call(q, command, NULL, -1, ffs_now_ns() + 10 * FFS_NS_PER_S, &ret, err);

	if (!r)
		r = json_object_object_get_ex(ret, "n", &v) ? json_object_get_int(v) : 0;
	json_object_put(ret);
	return r;
}

static void interleaved(void **state)
{
	struct ffs_qmp *q;
	struct ffs_error err = {0};

	assert_int_equal(start(GREETING, script_mixed, FFS_NS_PER_S, &q, &err), 0);
	assert_int_equal(call_n(q, "stop", &err), 5);
	/* the event behind the reply is read by the client's own thread */
	for (unsigned i = 0; i < 200 && atomic_load(&ev.stop) < 2; i++)
		poll(NULL, 0, 10);
	assert_int_equal(atomic_load(&ev.stop), 2);
	assert_int_equal(atomic_load(&ev.other), 1);
	assert_int_equal(call_n(q, "refuse", &err), -EREMOTEIO);
	assert_non_null(strstr(err.text, "refused refuse: it is \"cold\""));
	assert_int_equal(call_n(q, "pretty", &err), 6);
	assert_int_equal(call_n(q, "types", &err), -EREMOTEIO);
	end(q);
	assert_int_equal(atomic_load(&ev.gone), 0);
}

static void garbage(void **state)
{
	struct ffs_qmp *q;
	struct ffs_error err = {0};

	assert_int_equal(start(GREETING, script_mixed, FFS_NS_PER_S, &q, &err), 0);
	assert_false(ffs_qmp_is_suspect(q));
	assert_int_equal(call_n(q, "garbage", &err), 7);
	assert_true(ffs_qmp_is_suspect(q));
	assert_int_equal(call_n(q, "torn-pretty", &err), 8);
	assert_int_equal(call_n(q, "deep", &err), 9);
	assert_false(ffs_qmp_is_dead(q));
	assert_int_equal(call_n(q, "huge", &err), -EPROTO);
	assert_true(ffs_qmp_is_dead(q));
	assert_int_equal(call_n(q, "stop", &err), -EPROTO);
	end(q);
	assert_int_equal(atomic_load(&ev.gone), 1);
}

static void silence(void **state)
{
	struct ffs_qmp *q;
	struct ffs_error err = {0};

	assert_int_equal(start(GREETING, script_mixed, FFS_NS_PER_S, &q, &err), 0);
	uint64_t t = ffs_now_ns();

	atomic_store(&ev.beats, 0);
	assert_int_equal(
		ffs_qmp_call(q, "nothing", NULL, -1, t + 400 * FFS_NS_PER_MS, NULL, &err), -ETIMEDOUT);
	t = ffs_now_ns() - t;
	assert_true(t >= 400 * FFS_NS_PER_MS && t < 2 * FFS_NS_PER_S);
	assert_true(atomic_load(&ev.beats) >= 4);
	assert_true(ffs_qmp_is_suspect(q));
	/* the next command has its own reply */
	assert_int_equal(call_n(q, "stop", &err), 5);
	end(q);
}

static void end_of_file(void **state)
{
	struct ffs_qmp *q;
	struct ffs_error err = {0};

	assert_int_equal(start(GREETING, script_mixed, FFS_NS_PER_S, &q, &err), 0);
	assert_int_equal(call_n(q, "close", &err), -ECONNRESET);
	assert_true(ffs_qmp_is_dead(q));
	assert_int_equal(call_n(q, "stop", &err), -ECONNRESET);
	end(q);
	assert_int_equal(atomic_load(&ev.gone), 1);

	/* and while nobody calls */
	assert_int_equal(start(GREETING, script_mixed, FFS_NS_PER_S, &q, &err), 0);
	shutdown(srv.sock, SHUT_RDWR);
	for (unsigned i = 0; i < 200 && !atomic_load(&ev.gone); i++)
		poll(NULL, 0, 10);
	assert_int_equal(atomic_load(&ev.gone), 1);
	end(q);
}

static void greetings(void **state)
{
	struct ffs_qmp *q = NULL;
	struct ffs_error err = {0};

	assert_int_equal(start(NULL, script_mixed, 200 * FFS_NS_PER_MS, &q, &err), -EBUSY);
	pthread_join(srv.thread, NULL);
	close(srv.sock);
	assert_int_equal(start("QEMU 7.2.0 monitor - type 'help' for more information\r\n(qemu) ",
				 script_mixed, FFS_NS_PER_S, &q, &err),
		-ENOTSUP);
	pthread_join(srv.thread, NULL);
	close(srv.sock);
	assert_int_equal(start("{\"QMP\": 1}\r\n" GREETING, script_mixed, FFS_NS_PER_S, &q, &err), 0);
	end(q);
}

static void claimed(void **state)
{
	struct ffs_qmp *q;
	struct ffs_error err = {0};

	assert_int_equal(start(GREETING, script_mixed, FFS_NS_PER_S, &q, &err), 0);
	for (unsigned i = 0; i < 300; i++) {
		ffs_qmp_claim(q);
		assert_int_equal(call_n(q, "stop", &err), 5);
		if (i % 3)
			assert_int_equal(call_n(q, "stop", &err), 5);
		ffs_qmp_release(q);
		if (i % 2)
			assert_int_equal(call_n(q, "stop", &err), 5);
	}
	unsigned want = 2 * (300 + 200 + 150);

	for (unsigned i = 0; i < 200 && atomic_load(&ev.stop) < want; i++)
		poll(NULL, 0, 10);
	assert_int_equal(atomic_load(&ev.stop), want);
	end(q);
}

/* Any way of cutting a stream gives the same messages. */
static void framing(void **state)
{
	static const char text[] = "a\r\n\n{\n  \"x\": 1\n}\n{\"y\"}\r\n{\n lost\n{\n z\n}\nb\n";
	static const char *const want[] = {"a", "{\n  \"x\": 1\n}", "{\"y\"}", "{\n z\n}", "b"};

	for (size_t step = 1; step < sizeof(text); step++) {
		struct ffs_qmp_framer f;
		unsigned n = 0;

		ffs_qmp_framer_init(&f, 100);
		for (size_t at = 0; at < sizeof(text) - 1; at += step) {
			size_t room, len = step < sizeof(text) - 1 - at ? step : sizeof(text) - 1 - at;
			char *buf = ffs_qmp_framer_room(&f, &room), *frame;

			memcpy(buf, text + at, len);
			ffs_qmp_framer_added(&f, len);
			while (ffs_qmp_framer_next(&f, &frame, &len) == 1) {
				assert_true(n < FFS_ARRAY_LEN(want));
				assert_int_equal(len, strlen(want[n]));
				assert_memory_equal(frame, want[n], len);
				n++;
			}
		}
		assert_int_equal(n, FFS_ARRAY_LEN(want));
		ffs_qmp_framer_free(&f);
	}
}

static void framing_limit(void **state)
{
	struct ffs_qmp_framer f;
	size_t room, len;
	char *frame;
	int r = 0;

	ffs_qmp_framer_init(&f, 100000);
	for (unsigned i = 0; i < 1000 && !r; i++) {
		memset(ffs_qmp_framer_room(&f, &room), 'x', 1000);
		ffs_qmp_framer_added(&f, 1000);
		r = ffs_qmp_framer_next(&f, &frame, &len);
	}
	assert_int_equal(r, -EMSGSIZE);
	assert_true(f.cap < 300000);
	ffs_qmp_framer_drop(&f);
	memcpy(ffs_qmp_framer_room(&f, &room), "rest\nok\n", 8);
	ffs_qmp_framer_added(&f, 8);
	assert_int_equal(ffs_qmp_framer_next(&f, &frame, &len), 1);
	assert_memory_equal(frame, "ok", 2);
	ffs_qmp_framer_free(&f);
}

/* ---- the watchdog's rescue ---- */

static atomic_uint conts, queries;
static const char *rescue_state;

static const char *script_rescue(const char *command)
{
	if (strcmp(command, "cont") == 0) {
		if (atomic_fetch_add(&conts, 1) == 0)
			return "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Migration is not "
			       "finalized yet\"}, \"id\": \"%I\"}\r\n";
		return "{\"event\": \"RESUME\"}\r\n{\"return\": {}, \"id\": \"%I\"}\r\n";
	}
	if (atomic_fetch_add(&queries, 1) == 0) /* the first answer never comes: the hung daemon read it */
		return "half a line of the daemon's\": {}}\r\n{\"return\": {\"status\": \"running\"}, "
		       "\"id\": \"ffs-1-1\"}\r\n";
	if (atomic_load(&conts) >= 2)
		return "{\"return\": {\"status\": \"running\"}, \"id\": \"%I\"}\r\n";
	return rescue_state;
}

static int rescue(const char *now)
{
	int pair[2];

	rescue_state = now;
	atomic_store(&conts, 0);
	atomic_store(&queries, 0);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	srv = (struct server){
		.sock = pair[1], .greeting = "turn\": {}, \"id\": \"ffs-1-0\"}\r\n", .script = script_rescue};
	assert_int_equal(pthread_create(&srv.thread, NULL, serve, &srv), 0);
	int r = ffs_qemu_ops.rescue(pair[0], ffs_now_ns() + 5 * FFS_NS_PER_S);

	close(pair[0]);
	pthread_join(srv.thread, NULL);
	close(srv.sock);
	return r;
}

static void rescues(void **state)
{
	assert_int_equal(rescue("{\"return\": {\"status\": \"paused\"}, \"id\": \"%I\"}\r\n"), 0);
	assert_int_equal(atomic_load(&conts), 2);
	assert_int_equal(rescue("{\n    \"return\": {\n        \"status\": \"postmigrate\"\n    },\n    "
				"\"id\": \"%I\"\n}\n"),
		0);
	assert_int_equal(atomic_load(&conts), 2);
	/* not ours to resume */
	assert_int_equal(rescue("{\"return\": {\"status\": \"io-error\"}, \"id\": \"%I\"}\r\n"), 0);
	assert_int_equal(atomic_load(&conts), 0);
	assert_int_equal(rescue("%B\n{\"return\": {\"status\": \"running\"}, \"id\": \"%I\"}\r\n"), 0);
	assert_int_equal(atomic_load(&conts), 0);
	uint64_t t = ffs_now_ns();

	assert_int_equal(rescue(NULL), -ETIMEDOUT);
	assert_true(ffs_now_ns() - t < 7 * FFS_NS_PER_S);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(framing),
		cmocka_unit_test(framing_limit),
		cmocka_unit_test(interleaved),
		cmocka_unit_test(garbage),
		cmocka_unit_test(silence),
		cmocka_unit_test(end_of_file),
		cmocka_unit_test(greetings),
		cmocka_unit_test(claimed),
		cmocka_unit_test(rescues),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
