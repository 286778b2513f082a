/* Forks beside a branch: what is written comes back, whatever else lies there is refused by name, and a crash leaves the
 * old one or the new one. */
#include "store-record.h"
#include "store-scenarios.h"

#include "mailbox/ack.h"
#include "store/forks.h"

#define PAGES 64u
#define AT 8192u
#define BRANCH "11111111-2222-4333-8444-555555555555"
#define TEXT " {\"task\":7,\"n\":9007199254740993,\"a\":\"\\u00e4\xc3\xa4\"}\n\n"

static uint8_t memory[PAGES * FFS_MAILBOX_PAGE];

static ssize_t read_memory(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	assert_true(off <= sizeof(memory) && len <= sizeof(memory) - off);
	memcpy(buf, memory + off, len);
	return (ssize_t)len;
}

static const struct ffs_mailbox_memory mem = {.size = sizeof(memory), .fd = -1, .read = read_memory};

/* A frame in memory, and a record of a fork that has a payload for it. */
static void make(struct ffs_fork_record *r, const char *name, const char *text, bool wants_ack)
{
	struct ffs_fork_box *b = calloc(1, sizeof(*b));

	*r = (struct ffs_fork_record){
		.made_ns = 1700000000123456789, .ack_port = wants_ack ? 54321 : 0, .n = 1, .box = b};
	snprintf(r->name, sizeof(r->name), "%s", name);
	snprintf(r->branch, sizeof(r->branch), BRANCH);
	memset(r->epoch, 0xe5, sizeof(r->epoch));
	b->frame = (struct ffs_mailbox_frame){
		.offset = AT, .id = {.kind = FFS_MAILBOX_FORK, .name = "config", .token_len = 3}};
	memcpy(b->frame.id.token, "t\xff\x01", 4);
	memset(memory, 0, sizeof(memory));
	assert_true(ffs_mailbox_marker(&b->frame.id, memory + AT, NULL) > 0);
	b->text = strdup(text);
	b->text_len = strlen(text);
	assert_int_equal(ffs_json_object(b->text, b->text_len, &b->payload, NULL), 0);
	b->wants_ack = wants_ack;
	b->ack_timeout_ms = wants_ack ? 700 : 0;
	memcpy(b->page, memory + AT, sizeof(b->page));
	assert_int_equal(ffs_mailbox_lay(FFS_MAILBOX_FORK, b->payload, r->epoch, wants_ack, r->ack_port,
				 b->page, NULL),
		0);
}

static void test_round(void **state)
{
	for (int ack = 0; ack < 2; ack++) {
		struct ffs_fork_record r, back;
		struct ffs_error err = {0};
		char *text, *again;
		size_t len, again_len;

		make(&r, "c1", TEXT, ack);
		assert_ok(ffs_fork_record_text(&r, &text, &len, &err), err);
		assert_ok(ffs_fork_record_parse(text, len, "c1", BRANCH, &back, &err), err);
		assert_ok(ffs_fork_record_check(&back, &mem, &err), err);
		assert_ok(ffs_fork_record_text(&back, &again, &again_len, &err), err);
		assert_string_equal(text, again);
		assert_int_equal(back.box[0].text_len, strlen(TEXT));
		assert_memory_equal(back.box[0].text, TEXT, strlen(TEXT));
		assert_memory_equal(&back.box[0].frame.id, &r.box[0].frame.id, sizeof(r.box[0].frame.id));
		assert_memory_equal(back.box[0].page, r.box[0].page, FFS_MAILBOX_PAGE);
		assert_true(back.made_ns == r.made_ns && back.ack_port == r.ack_port);
		ffs_fork_record_clear(&back);
		assert_int_equal(ffs_fork_record_parse(text, len, "c2", BRANCH, &back, &err), -EBADMSG);
		assert_non_null(strstr(err.text, "another fork's"));
		assert_int_equal(ffs_fork_record_parse(text, len, "c1",
					 "11111111-2222-4333-8444-555555555556", &back, &err),
			-EBADMSG);
		assert_non_null(strstr(err.text, "another branch"));
		ffs_fork_record_clear(&r);
		free(text);
		free(again);
	}
}

/* Every byte changed, every length: not one is taken for a fork. */
static void test_flips(void **state)
{
	struct ffs_fork_record r, back;
	struct ffs_error err = {0};
	char *text;
	size_t len;

	make(&r, "c1", TEXT, true);
	assert_ok(ffs_fork_record_text(&r, &text, &len, &err), err);
	for (size_t i = 0; i < len; i++) {
		text[i] ^= (char)(1 << i % 7);
		err = (struct ffs_error){0};
		if (ffs_fork_record_parse(text, len, "c1", BRANCH, &back, &err) >= 0)
			fail_msg("byte %zu was changed, and nobody saw it", i);
		assert_non_null(strstr(err.text, "forks/c1.json"));
		text[i] ^= (char)(1 << i % 7);
		/* exactly that long: so that a sanitizer sees a read beyond it */
		char *cut = malloc(i + 1);

		memcpy(cut, text, i);
		assert_true(ffs_fork_record_parse(cut, i, "c1", BRANCH, &back, &err) < 0);
		free(cut);
	}
	free(text);
	ffs_fork_record_clear(&r);
}

/* The text of a record with a member (of its mailbox, where the key begins with '.') changed, sealed anew. */
static char *changed(const char *key, const char *value, size_t *len)
{
	const struct ffs_seal seal = {.file = "test", .key = "fork_xxh3_128", .max = FFS_FORK_FILE_MAX};
	struct json_object *o, *boxes, *at;
	struct ffs_fork_record r;
	char *text = NULL;
	bool sealed;

	make(&r, "c1", TEXT, true);
	assert_int_equal(ffs_fork_record_text(&r, &text, len, NULL), 0);
	assert_int_equal(ffs_seal_parse(&seal, text, *len, &o, &sealed, NULL), 0);
	free(text);
	ffs_fork_record_clear(&r);
	assert_true(json_object_object_get_ex(o, "mailboxes", &boxes));
	at = *key == '.' ? json_object_array_get_idx(boxes, 0) : o;
	json_object_object_del(at, key + (*key == '.'));
	if (value)
		json_object_object_add(at, key + (*key == '.'), json_tokener_parse(value));
	assert_int_equal(ffs_seal_text(&seal, o, &text, len, NULL), 0);
	json_object_put(o);
	return text;
}

/* Sealed as it should be, by a stranger: numbers and names of all sorts. */
static void test_hostile(void **state)
{
	static const struct {
		const char *key, *value;
	} bad[] = {
		{"format", "2"},
		{"format", "0"},
		{"format", "\"1\""},
		{"format", NULL},
		{"name", "\"../c1\""},
		{"name", "7"},
		{"name", NULL},
		{"branch", "\"\""},
		{"branch", NULL},
		{"epoch", "\"\""},
		{"epoch", "\"zz\""},
		{"epoch", NULL},
		{"made_ns", "-1"},
		{"made_ns", "1e99"},
		{"made_ns", "\"now\""},
		{"ack_port", "65536"},
		{"ack_port", "-1"},
		{"ack_port", "18446744073709551615"},
		{"ack_port", "1.5"},
		{"mailboxes", NULL},
		{"mailboxes", "{}"},
		{"mailboxes", "[7]"},
		{"mailboxes", "[{}]"},
		{"mailboxes", "[[]]"},
		{".name", "\"\""},
		{".name", "\"a b\""},
		{".name", NULL},
		{".kind", "\"forks\""},
		{".kind", NULL},
		{".token", "\"\""},
		{".token", "\"2020\""},
		{".token", "\"00\""},
		{".token", "\"4\""},
		{".token", "\"4G\""},
		{".token", "\"AB\""},
		{".token", NULL},
		{".offset", "-4096"},
		{".offset", "1"},
		{".offset", "8193"},
		{".offset", "\"8192\""},
		{".offset", NULL},
		{".offset", "1e300"},
		{".payload", "\"\""},
		{".payload", "\"[]\""},
		{".payload", "\"{}{}\""},
		{".payload", "\"{\\u0000}\""},
		{".payload", "{}"},
		{".payload", NULL},
		{".wait_for_ack", "1"},
		{".wait_for_ack", "false"},
		{".wait_for_ack", NULL},
		{".ack_timeout_ms", "0"},
		{".ack_timeout_ms", "30001"},
		{".ack_timeout_ms", "-1"},
		{".ack_timeout_ms", NULL},
		{".page", "\"\""},
		{".page", "\"00\""},
		{".page", NULL},
	};
	struct ffs_fork_record back;
	struct ffs_error err;
	char *text;
	size_t len;

	for (size_t i = 0; i < FFS_ARRAY_LEN(bad); i++) {
		text = changed(bad[i].key, bad[i].value, &len);
		err = (struct ffs_error){0};
		int r = ffs_fork_record_parse(text, len, "c1", BRANCH, &back, &err);

		if (r != -EBADMSG && r != -ENOTSUP)
			fail_msg("%s: %s: %d %s", bad[i].key, bad[i].value, r, err.text);
		assert_non_null(strstr(err.text, "forks/c1.json"));
		free(text);
	}
	/* what the text alone cannot tell */
	static const struct {
		const char *key, *value;
	} wrong[] = {{".offset", "0"}, {".offset", "4096"}, {".offset", "12288"}, {".offset", "262144"},
		{".offset", "9223372036854771712"}, {".offset", "9223372036854775807"},
		{".name", "\"other\""}, {".token", "\"7478\""}, {".kind", "\"resume-network\""},
		{".payload", "\"{\\\"task\\\":8}\""},
		{".payload", "\"{\\\"ack_port\\\":1,\\\"ack_port\\\":2}\""}, {"ack_port", "0"},
		{"ack_port", "54322"}, {"epoch", "\"00000000-0000-4000-8000-000000000000\""}};

	for (size_t i = 0; i < FFS_ARRAY_LEN(wrong); i++) {
		text = changed(wrong[i].key, wrong[i].value, &len);
		err = (struct ffs_error){0};
		int r = ffs_fork_record_parse(text, len, "c1", BRANCH, &back, &err);

		if (!r) {
			r = ffs_fork_record_check(&back, &mem, &err);
			ffs_fork_record_clear(&back);
		}
		if (r != -EBADMSG)
			fail_msg("%s: %s: %d %s", wrong[i].key, wrong[i].value, r, err.text);
		free(text);
	}
}

/* Seventeen mailboxes, or one twice. */
static void test_many(void **state)
{
	struct ffs_fork_record r, back;
	struct ffs_error err = {0};
	char *text;
	size_t len;

	for (unsigned n = 2; n <= FFS_MAILBOX_MAX + 1; n += FFS_MAILBOX_MAX - 1) {
		make(&r, "c1", TEXT, false);
		struct ffs_fork_box *boxes = calloc(n, sizeof(*boxes));

		for (unsigned i = 0; i < n; i++) {
			boxes[i] = r.box[0];
			boxes[i].text = strdup(TEXT);
			boxes[i].frame.offset += n > 2 ? i * FFS_MAILBOX_PAGE : 0;
		}
		ffs_fork_record_clear(&r);
		make(&r, "c1", TEXT, false);
		free(r.box[0].text);
		free(r.box);
		r.box = boxes;
		r.n = n;
		assert_ok(ffs_fork_record_text(&r, &text, &len, &err), err);
		assert_int_equal(ffs_fork_record_parse(text, len, "c1", BRANCH, &back, &err), -EBADMSG);
		ffs_fork_record_clear(&r);
		free(text);
	}
}

/* ---- crashes ---- */

/* One without payloads, told by its number. */
static void put_fork(struct ffs_store *st, const char *branch, const char *name, unsigned number, bool fresh)
{
	int dir = ffs_store_branch_dir(st, "sbx1", branch);
	struct ffs_fork_record r = {.made_ns = number};
	struct ffs_stored *s = NULL;
	char *text;
	size_t len;
	bool there;

	assert_true(dir >= 0);
	assert_int_equal(ffs_stored_open(st, "sbx1", branch, &s, NULL), 0);
	snprintf(r.name, sizeof(r.name), "%s", name);
	snprintf(r.branch, sizeof(r.branch), "%s", ffs_stored_id(s));
	ffs_stored_unref(s);
	assert_int_equal(ffs_fork_record_text(&r, &text, &len, NULL), 0);
	assert_int_equal(ffs_fork_file_write(dir, name, text, len), 0);
	assert_int_equal(ffs_fork_file_publish(dir, name, fresh, &there), 0);
	free(text);
	close(dir);
}

static void do_first(struct ffs_store *st)
{
	put_fork(st, "b1", "c1", 2, true);
}

static void do_new(struct ffs_store *st)
{
	put_fork(st, "b0", "c2", 2, true);
}

static void do_change(struct ffs_store *st)
{
	put_fork(st, "b0", "c1", 2, false);
}

static void do_remove(struct ffs_store *st)
{
	int dir = ffs_store_branch_dir(st, "sbx1", "b0");

	assert_int_equal(ffs_fork_file_remove(dir, "c1"), 0);
	close(dir);
}

static void do_convert(struct ffs_store *st)
{
	assert_int_equal(ffs_store_convert(st, "sbx1", "b0", FFS_STORE_PACKED, NULL, NULL, NULL), 1);
}

/* Of a fork; 0: there is no such fork. Whatever is there is whole. */
static unsigned number_of(struct ffs_store *st, const char *branch, const char *name)
{
	int dir = ffs_store_branch_dir(st, "sbx1", branch);
	struct ffs_fork_record r;
	struct ffs_error err = {0};
	char *text = NULL;
	size_t len;

	assert_true(dir >= 0);
	assert_int_equal(ffs_fork_files_sweep(dir), 0);
	int got = ffs_fork_file_read(dir, name, &text, &len, &err);

	close(dir);
	if (got == -ENOENT)
		return 0;
	assert_ok(got, err);
	assert_ok(ffs_fork_record_parse(text, len, name, NULL, &r, &err), err);
	unsigned n = (unsigned)r.made_ns;

	ffs_fork_record_clear(&r);
	free(text);
	return n;
}

static void test_crashes(void **state)
{
	static const struct {
		void (*run)(struct ffs_store *st);
		const char *branch, *name;
		unsigned before, after;
	} changes[] = {{do_first, "b1", "c1", 0, 2}, {do_new, "b0", "c2", 0, 2},
		{do_change, "b0", "c1", 1, 2}, {do_remove, "b0", "c1", 1, 0}, {do_convert, "b0", "c1", 1, 1}};
	unsigned replays = 0;

	for (unsigned i = 0; i < FFS_ARRAY_LEN(changes); i++) {
		struct kit k;

		set_up(&k);
		put_fork(k.st, "b0", "c1", 1, true);
		save_before(&k);
		record_begin(&k);
		changes[i].run(k.st);
		ffs_store_ops = &ffs_store_ops_real;
		for (unsigned n = 0; n <= n_ops; n++)
			for (unsigned v = 0; v < VARIANTS; v++) {
				bool fresh = replay(n, v);
				struct ffs_store *st = NULL;
				char path[100];

				if (fresh) {
					snprintf(path, sizeof(path), "%s/st", replay_dir);
					recover_and_look(path);
					assert_int_equal(ffs_store_open(path, &st, NULL), 0);
					unsigned is = number_of(st, changes[i].branch, changes[i].name);

					if (is != changes[i].before && is != changes[i].after)
						fail_msg("change %u: after %u of %u operations the fork has "
							 "%u",
							i, n, n_ops, is);
					if (n == n_ops && is != changes[i].after)
						fail_msg("change %u: done, and a crash brings the old fork "
							 "back",
							i);
					if (strcmp(changes[i].branch, "b0") || strcmp(changes[i].name, "c1"))
						assert_int_equal(number_of(st, "b0", "c1"), 1);
					ffs_store_close(st);
					replays++;
				} else {
					v = VARIANTS;
				}
				drop_replay();
			}
		forget();
		drop_before();
		kit_close(&k);
	}
	print_message("%u crashes\n", replays);
	assert_true(replays > 100);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round),
		cmocka_unit_test(test_flips),
		cmocka_unit_test(test_hostile),
		cmocka_unit_test(test_many),
		cmocka_unit_test(test_crashes),
	};

	return cmocka_run_group_tests(tests, make_memories, NULL);
}
