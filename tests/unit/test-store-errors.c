/* Each operation on a store fails in turn, each read, and the disk is too small by every amount: what was
 * there stays whole, what could not be done is said, and no read ever gives wrong bytes. */
#include "store-record.h"
#include "store-scenarios.h"

#include <sys/mount.h>

/* ---- changes ---- */

/* A scenario with one failure in it; false: it has fewer steps. */
static bool run_failing(const struct scenario *sc, int at, int code, bool reads)
{
	struct kit k;

	set_up(&k);
	record_begin(&k);
	if (reads)
		fail_read_at(at, code);
	else
		fail_at(at, code);
	int r = sc->run(k.st);
	bool reached = has_failed();

	fail_at(-1, 0);
	ffs_store_ops = &ffs_store_ops_real;
	forget();
	struct seen seen = recover_and_look(k.path);
	bool done = seen.branches == sc->after && (sc->dense < 0 || seen.dense == (unsigned)sc->dense);

	if (seen.branches != sc->before && seen.branches != sc->after)
		fail_msg("%s: step %d failed: %u branches", sc->name, at, seen.branches);
	if (!r && !done)
		fail_msg("%s: step %d failed, nothing was said", sc->name, at);
	if (r && sc->after > sc->before && seen.branches == sc->after)
		fail_msg("%s: step %d failed, and it was published", sc->name, at);
	kit_close(&k);
	return reached;
}

static void test_every_operation(void **state)
{
	static const int codes[] = {EIO, ENOSPC};
	unsigned failures = 0;

	for (unsigned i = 0; i < n_scenarios; i++)
		for (unsigned c = 0; c < FFS_ARRAY_LEN(codes); c++)
			for (int at = 0; run_failing(&scenarios[i], at, codes[c], false); at++)
				failures++;
	print_message("%u failures\n", failures);
}

static void test_every_read_of_a_change(void **state)
{
	unsigned failures = 0;

	for (unsigned i = 0; i < n_scenarios; i++)
		for (int at = 0; run_failing(&scenarios[i], at, EIO, true); at++)
			failures++;
	print_message("%u failures\n", failures);
}

/* ---- reading ---- */

static struct kit kit;
static int stream;

/* What is read from the store; each gives 0 and whatever it read is right, or an error. */
static int do_open(const char *name, struct ffs_stored **s, struct ffs_error *err)
{
	return ffs_stored_open(kit.st, "sbx1", name, s, err);
}

static int read_all(const char *name, unsigned which, size_t piece)
{
	unsigned char *buf = malloc(SIZE);
	struct ffs_stored *s = NULL;
	struct ffs_error err = {0};
	int r = do_open(name, &s, &err), errors = 0;

	for (size_t off = 0; !r && off < SIZE; off += piece) {
		ssize_t want = SIZE - off < piece ? (ssize_t)(SIZE - off) : (ssize_t)piece;
		ssize_t n = ffs_stored_read_memory(s, buf, piece, off, &err);

		/* a read that fails is no reason for the next to fail */
		if (n < 0)
			errors++;
		else if (n != want || memcmp(buf, memories[which] + off, (size_t)n) != 0)
			fail_msg("%s: wrong bytes at %zu", name, off);
	}
	if (!r && errors > 1)
		fail_msg("%s: %d reads failed after one", name, errors);
	char state[16];

	if (!r && !errors && ffs_stored_read_vmstate(s, state, sizeof(state), 0) != 12)
		errors++;
	ffs_stored_unref(s);
	free(buf);
	return r ? r : -errors;
}

static int serve_dense(void)
{
	return read_all("b0", 0, 100000);
}

static int serve_packed(void)
{
	return read_all("b1", 2, 65536);
}

static int serve_packed_pieces(void)
{
	return read_all("b1", 2, 4096);
}

static int verify(const char *name)
{
	struct ffs_stored *s = NULL;
	struct ffs_error err = {0};
	int r = do_open(name, &s, &err);

	if (!r)
		r = ffs_stored_verify(s, NULL, &err);
	if (r && !err.text[0])
		fail_msg("verify of %s failed without a sentence", name);
	ffs_stored_unref(s);
	return r;
}

static int verify_dense(void)
{
	return verify("b0");
}

static int verify_packed(void)
{
	return verify("b1");
}

static int export_packed(void)
{
	int out = memfd_create("out", MFD_CLOEXEC);
	struct ffs_stored *s = NULL;
	struct ffs_error err = {0};
	int r = do_open("b1", &s, &err);

	if (!r)
		r = ffs_stored_export(s, out, NULL, &err);
	ffs_stored_unref(s);
	close(out);
	return r;
}

static int import(void)
{
	struct ffs_stored *s = NULL;
	struct ffs_error err = {0};

	assert_int_equal(lseek(stream, 0, SEEK_SET), 0);
	int r = ffs_store_import(kit.st, stream, "sbx1", "b9", FFS_STORE_PACKED, NULL, &err);

	if (!r) {
		/* a parent that could not be read is not shared with; what was written is right */
		fail_at(-1, 0);
		assert_ok(do_open("b9", &s, &err), err);
		check_memory(s, memories[2], SIZE);
		ffs_stored_unref(s);
		assert_ok(ffs_store_remove(kit.st, "sbx1", "b9", &err), err);
		assert_ok(ffs_store_reap(kit.st, "sbx1", &err), err);
		return has_failed() ? 1 : 0;
	}
	assert_int_equal(faccessat(ffs_store_fd(kit.st), "sbx1/b9", F_OK, 0), -1);
	return r;
}

/* As a daemon that starts: what is there, and why a branch failed. */
static int adopt_entry(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry)
{
	struct ffs_stored *s = NULL;
	struct ffs_error why = {0};
	int *errors = arg, r;

	if (entry == FFS_STORE_ENTRY_FAILED)
		r = ffs_store_failure(kit.st, sandbox, name, &why);
	else
		r = ffs_stored_open(kit.st, sandbox, name, &s, &why);
	*errors += r < 0;
	ffs_stored_unref(s);
	return 0;
}

static int adopt(void)
{
	int errors = 0;
	struct ffs_error err = {0};

	assert_ok(ffs_store_each(kit.st, NULL, adopt_entry, &errors, &err), err);
	assert_true(errors <= 1);
	return -errors;
}

static const struct reading {
	const char *name;
	int (*run)(void);
	bool may_do; /* although a read failed */
} readings[] = {
	{"serving dense memory", serve_dense, false},
	{"serving packed memory", serve_packed, false},
	{"serving packed memory in pieces", serve_packed_pieces, false},
	{"verifying a dense branch", verify_dense, false},
	{"verifying a packed branch", verify_packed, false},
	{"exporting", export_packed, false},
	{"importing", import, true},
	{"finding branches again", adopt, false},
};

static void test_every_read(void **state)
{
	struct ffs_error why = {.code = EIO, .text = "why"}, err = {0};
	unsigned failures = 0;

	set_up(&kit);
	assert_ok(ffs_store_record_failure(kit.st, "sbx1", "bad", &why, &err), err);
	stream = memfd_create("stream", MFD_CLOEXEC);
	struct ffs_stored *s = NULL;

	assert_ok(do_open("b1", &s, &err), err);
	assert_ok(ffs_stored_export(s, stream, NULL, &err), err);
	ffs_stored_unref(s);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(readings); i++)
		for (int at = 0;; at++) {
			record_begin(&kit);
			fail_read_at(at, EIO);
			int r = readings[i].run();
			bool reached = has_failed();

			fail_at(-1, 0);
			ffs_store_ops = &ffs_store_ops_real;
			forget();
			if (!reached) {
				assert_int_equal(r, 0);
				assert_true(at > 0);
				break;
			}
			failures++;
			if (!r && !readings[i].may_do)
				fail_msg("%s: read %d failed, nothing was said", readings[i].name, at);
			/* it was the disk's, not ours for good */
			assert_int_equal(readings[i].run(), 0);
		}
	print_message("%u reads failed\n", failures);
	close(stream);
	recover_and_look(kit.path);
	kit_close(&kit);
}

/* ---- room ---- */

/* A file system that is too small, by every amount. */
static void test_every_size(void **state)
{
	bool fits = false;
	char data[32];
	struct kit k;

	kit_open(&k);
	ffs_store_close(k.st);
	for (unsigned kib = 1400; !fits; kib += 68) {
		snprintf(data, sizeof(data), "size=%uk", kib);
		if (mount("none", k.path, "tmpfs", 0, data) < 0) {
			print_message("a tmpfs cannot be mounted here\n");
			break;
		}
		assert_int_equal(ffs_store_open(k.path, &k.st, NULL), 0);
		int b0 = put(k.st, "b0", 0, FFS_STORE_DENSE, NULL);
		int b1 = b0 ? b0 : put(k.st, "b1", 2, FFS_STORE_PACKED, NULL);
		int b2 = b1 ? b1 : put(k.st, "b2", 1, FFS_STORE_PACKED, "b1");
		/* one more form of each, of which the old one stays when there is no room */
		int c = b2 ? b2 : ffs_store_convert(k.st, "sbx1", "b1", FFS_STORE_DENSE, NULL, NULL, NULL);

		assert_true(c == 1 || c == -ENOSPC);
		ffs_store_close(k.st);
		assert_true(!b2 || b2 == -ENOSPC);
		if (!b0) {
			struct seen seen = recover_and_look(k.path);

			assert_int_equal(seen.branches, !b1 + !b2);
			assert_int_equal(seen.failed, 0);
		}
		fits = c == 1;
		assert_int_equal(umount(k.path), 0);
	}
	assert_int_equal(ffs_store_open(k.path, &k.st, NULL), 0);
	kit_close(&k);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_operation),
		cmocka_unit_test(test_every_read_of_a_change),
		cmocka_unit_test(test_every_read),
		cmocka_unit_test(test_every_size),
	};

	return cmocka_run_group_tests(tests, make_memories, NULL);
}
