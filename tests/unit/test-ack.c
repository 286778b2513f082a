/* Acknowledgements of mailboxes (engine/mailbox/ack.c): which texts are one, and the waiter: whose, when, how often. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "../../tools/agent/mailbox.h"
#include "base/util.h"
#include "mailbox/ack.h"

#define MS FFS_NS_PER_MS
#define EPOCH "00112233-4455-6677-8899-aabbccddeeff"
#define HEX "00112233445566778899aabbccddeeff"
#define BEGAN (5 * FFS_NS_PER_S)

static const uint8_t epoch[16] = {
	0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff};

static struct ffs_ack_wait waiter(void)
{
	struct ffs_ack_wait w = {0};

	memcpy(w.epoch, epoch, 16);
	assert_int_equal(ffs_ack_add(&w, FFS_MAILBOX_FORK, "v1", 5000), 0);
	assert_int_equal(ffs_ack_add(&w, FFS_MAILBOX_FORK, "other", 1000), 0);
	assert_int_equal(ffs_ack_add(&w, FFS_MAILBOX_NETWORK, "resume-network", 100), 0);
	ffs_ack_begin(&w, BEGAN);
	return w;
}

static enum ffs_ack_verdict say(struct ffs_ack_wait *w, const char *text, uint64_t after_ms)
{
	return ffs_ack_offer(w, text, strlen(text), BEGAN + after_ms * MS);
}

static void test_texts(void **state)
{
	static const struct {
		const char *text;
		enum ffs_ack_verdict v;
	} row[] = {
		{"stage=applied mailbox=v1 epoch=" EPOCH, FFS_ACK_TAKEN},
		{"epoch=" HEX "\n\tmailbox=v1\r\n stage=applied\n", FFS_ACK_TAKEN},
		{"mac=02:00:00:00:00:01 stage=applied ms=12 mailbox=v1 "
		 "epoch=00112233445566778899AABBCCDDEEFF",
			FFS_ACK_TAKEN},
		{"stage=applied mailbox=v10 epoch=" EPOCH, FFS_ACK_OTHER},
		{"stage=applied mailbox=v epoch=" EPOCH, FFS_ACK_OTHER},
		{"stage=applied mailbox=V1 epoch=" EPOCH, FFS_ACK_OTHER},
		{"stage=appliedx mailbox=v1 epoch=" EPOCH, FFS_ACK_OTHER},
		{"stage=received mailbox=v1 epoch=" EPOCH, FFS_ACK_OTHER},
		{"stage=applied mailbox=v1 epoch=10112233-4455-6677-8899-aabbccddeeff", FFS_ACK_FORGED},
		{"stage=applied mailbox=v1", FFS_ACK_FORGED},
		{"xstage=applied mailbox=v1 epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage=applied,mailbox=v1 epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage=applied mailbox=v1 epoch=" HEX "0", FFS_ACK_MALFORMED},
		{"stage=applied mailbox=v1 epoch=0011223344556677-8899-aabb-ccddeeff", FFS_ACK_MALFORMED},
		{"stage=applied mailbox=v1 mailbox=v1 epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage=applied stage=applied mailbox=v1 epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage=applied mailbox=v1 epoch=" EPOCH " epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage=applied mailbox= epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage=applied mailbox=a/b epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage= mailbox=v1 epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"stage=applied mailbox=v1 epoch=" EPOCH " hello", FFS_ACK_MALFORMED},
		{"stage=applied epoch=" EPOCH, FFS_ACK_MALFORMED},
		{"", FFS_ACK_MALFORMED},
		{"=", FFS_ACK_MALFORMED},
	};

	for (size_t i = 0; i < FFS_ARRAY_LEN(row); i++) {
		struct ffs_ack_wait w = waiter();
		enum ffs_ack_verdict v = say(&w, row[i].text, 1);

		if (v != row[i].v)
			fail_msg("'%s' is %s", row[i].text, ffs_ack_verdict_name(v));
		assert_int_equal(w.count[v], 1);
		assert_int_equal(ffs_ack_ignored(&w), v != FFS_ACK_TAKEN);
		assert_int_equal(w.box[0].state, v == FFS_ACK_TAKEN ? FFS_ACK_APPLIED : FFS_ACK_PENDING);
		assert_int_equal(w.box[1].state, FFS_ACK_PENDING);
	}
}

static void test_bytes(void **state)
{
	static const char nul[] = "stage=applied mailbox=v1\0 epoch=" EPOCH;
	char big[FFS_ACK_TEXT_MAX + 1];
	struct ffs_ack_wait w = waiter();

	assert_int_equal(ffs_ack_offer(&w, nul, sizeof(nul) - 1, BEGAN), FFS_ACK_MALFORMED);
	memset(big, ' ', sizeof(big));
	memcpy(big, "stage=applied mailbox=v1 epoch=" EPOCH, 67);
	assert_int_equal(ffs_ack_offer(&w, big, sizeof(big), BEGAN), FFS_ACK_MALFORMED);
	assert_int_equal(ffs_ack_offer(&w, big, sizeof(big) - 1, BEGAN), FFS_ACK_TAKEN);
	/* no prefix of a right text is one */
	for (size_t len = 0; len < 67; len++) {
		w = waiter();
		assert_int_not_equal(ffs_ack_offer(&w, big, len, BEGAN), FFS_ACK_TAKEN);
	}
}

/* What comes in pieces, of any length: the same verdicts, and what has no end is none. */
static void test_stream(void **state)
{
	static const char said[] = "stage=applied mailbox=v10\nepoch=" HEX
				   " mailbox=v1 stage=applied\n\nstage=applied mailbox=other epoch=" HEX;
	char big[3 * FFS_ACK_TEXT_MAX];

	for (size_t piece = 1; piece <= sizeof(said); piece++) {
		struct ffs_ack_wait w = waiter();
		struct ffs_ack_stream s = {0};
		unsigned n = 0;

		for (size_t at = 0; at < sizeof(said) - 1; at += piece)
			n += ffs_ack_feed(&w, &s, said + at,
				sizeof(said) - 1 - at < piece ? sizeof(said) - 1 - at : piece, BEGAN);
		assert_int_equal(n, 3);
		assert_int_equal(w.count[FFS_ACK_TAKEN], 1);
		assert_int_equal(w.count[FFS_ACK_OTHER], 1);
		assert_int_equal(w.count[FFS_ACK_MALFORMED], 1);
		assert_int_equal(w.box[0].state, FFS_ACK_APPLIED);
		assert_int_equal(w.box[1].state, FFS_ACK_PENDING);
		ffs_ack_feed_end(&w, &s);
		ffs_ack_feed_end(&w, &s);
		assert_int_equal(w.count[FFS_ACK_MALFORMED], 2);
		assert_int_equal(w.box[1].state, FFS_ACK_PENDING);
	}
	/* 512 bytes and the newline are a text, one more is none, and neither is what is cut from it */
	for (size_t len = FFS_ACK_TEXT_MAX; len < sizeof(big); len += len < FFS_ACK_TEXT_MAX + 3 ? 1 : 97) {
		struct ffs_ack_wait w = waiter();
		struct ffs_ack_stream s = {0};

		memset(big, ' ', len);
		memcpy(big, "stage=applied mailbox=v1 epoch=" EPOCH, 67);
		assert_int_equal(ffs_ack_feed(&w, &s, big, len, BEGAN), 0);
		assert_int_equal(ffs_ack_feed(&w, &s, "\n", 1, BEGAN), 1);
		assert_int_equal(w.count[FFS_ACK_TAKEN], len == FFS_ACK_TEXT_MAX);
		assert_int_equal(w.count[FFS_ACK_MALFORMED], len > FFS_ACK_TEXT_MAX);
	}
}

static void test_network(void **state)
{
	struct ffs_ack_wait w = waiter();

	/* its frame has no epoch; one that is given must be right all the same */
	assert_int_equal(say(&w, "stage=applied mailbox=resume-network epoch=" HEX "\n", 1), FFS_ACK_TAKEN);
	w = waiter();
	assert_int_equal(say(&w, "stage=applied mailbox=resume-network epoch=ff" HEX, 1), FFS_ACK_MALFORMED);
	assert_int_equal(say(&w, "mailbox=resume-network stage=applied", 1), FFS_ACK_TAKEN);
	assert_true(ffs_ack_over(&w, FFS_MAILBOX_NETWORK));
	assert_false(ffs_ack_over(&w, FFS_MAILBOX_FORK));
}

static void test_times(void **state)
{
	struct ffs_ack_wait w = waiter();
	static const char right[] = "stage=applied mailbox=v1 epoch=" HEX,
			  other[] = "stage=applied mailbox=other epoch=" HEX;

	/* deadlines run side by side */
	assert_int_equal(ffs_ack_expire(&w, BEGAN), BEGAN + 100 * MS);
	assert_int_equal(ffs_ack_expire(&w, BEGAN + 100 * MS), BEGAN + 1000 * MS);
	assert_int_equal(w.box[2].state, FFS_ACK_TIMEOUT);
	assert_int_equal(ffs_ack_result(&w), FFS_ACK_TIMEOUT);
	assert_int_equal(say(&w, other, 999), FFS_ACK_TAKEN);
	assert_int_equal(w.box[1].after_ns, 999 * MS);
	assert_int_equal(say(&w, other, 999), FFS_ACK_DUPLICATE);
	assert_int_equal(say(&w, right, 5000), FFS_ACK_LATE);
	assert_int_equal(w.box[0].state, FFS_ACK_TIMEOUT);
	assert_int_equal(say(&w, right, 1), FFS_ACK_LATE);
	assert_int_equal(say(&w, other, 6000), FFS_ACK_DUPLICATE);
	assert_int_equal(ffs_ack_expire(&w, BEGAN + 5000 * MS), 0);
	assert_true(ffs_ack_over(&w, FFS_MAILBOX_KINDS));
	assert_int_equal(ffs_ack_ignored(&w), 4);
}

static void test_not_begun(void **state)
{
	struct ffs_ack_wait w = {0};

	memcpy(w.epoch, epoch, 16);
	assert_int_equal(ffs_ack_add(&w, FFS_MAILBOX_FORK, "v1", 1), 0);
	assert_int_equal(ffs_ack_expire(&w, 1000 * FFS_NS_PER_S), 0);
	assert_int_equal(ffs_ack_result(&w), FFS_ACK_PENDING);
	assert_int_equal(say(&w, "stage=applied mailbox=v1 epoch=" HEX, 1000), FFS_ACK_TAKEN);
	assert_int_equal(ffs_ack_result(&w), FFS_ACK_APPLIED);
}

static void test_same_name(void **state)
{
	struct ffs_ack_wait w = {0};
	uint8_t word[8];

	memcpy(w.epoch, epoch, 16);
	for (unsigned i = 0; i < FFS_MAILBOX_MAX; i++)
		assert_int_equal(ffs_ack_add(&w, FFS_MAILBOX_FORK, i < 2 ? "v1" : "v2", 100), 0);
	assert_int_equal(ffs_ack_add(&w, FFS_MAILBOX_FORK, "v3", 100), -E2BIG);
	w.n = 3;
	assert_int_equal(say(&w, "stage=applied mailbox=v1 epoch=" HEX, 1), FFS_ACK_OTHER);
	ffs_ack_word("v1", epoch, word);
	assert_int_equal(ffs_ack_offer_word(&w, 1, word, BEGAN), FFS_ACK_TAKEN);
	assert_int_equal(w.box[0].state, FFS_ACK_PENDING);
}

/* The word of the page, as tools/agent/mailbox.h writes it. */
static void test_word(void **state)
{
	struct ffs_ack_wait w = waiter();
	struct guest_mailbox m;
	uint8_t wrong[16], torn[8];
	char text[140];

	assert_int_equal(guest_mailbox_publish(&m, "v1", "token"), 0);
	assert_int_equal(ffs_ack_offer_word(&w, 0, m.page + FFS_ACK_WORD_AT, BEGAN), FFS_ACK_OTHER);
	memcpy(wrong, epoch, 16);
	wrong[0] ^= 0x80;
	guest_mailbox_ack(&m, wrong);
	assert_int_equal(ffs_ack_offer_word(&w, 0, m.page + FFS_ACK_WORD_AT, BEGAN), FFS_ACK_FORGED);
	/* looked at again and again, and counted once */
	assert_int_equal(ffs_ack_offer_word(&w, 0, m.page + FFS_ACK_WORD_AT, BEGAN), FFS_ACK_OTHER);
	assert_int_equal(w.count[FFS_ACK_FORGED], 1);
	guest_mailbox_ack(&m, epoch);
	memcpy(torn, m.page + FFS_ACK_WORD_AT, 8);
	memset(torn, 0, 4);
	assert_int_equal(ffs_ack_offer_word(&w, 0, torn, BEGAN), FFS_ACK_OTHER);
	assert_int_equal(ffs_ack_offer_word(&w, 1, m.page + FFS_ACK_WORD_AT, BEGAN), FFS_ACK_FORGED);
	assert_int_equal(ffs_ack_offer_word(&w, 0, m.page + FFS_ACK_WORD_AT, BEGAN + 7 * MS), FFS_ACK_TAKEN);
	assert_int_equal(w.box[0].after_ns, 7 * MS);
	size_t len = guest_mailbox_ack_text(&m, epoch, text);

	assert_int_equal(len, strlen(text));
	assert_string_equal(text, "stage=applied mailbox=v1 epoch=" HEX "\n");
	assert_int_equal(say(&w, text, 1), FFS_ACK_DUPLICATE);
	guest_mailbox_withdraw(&m);
}

static void test_timeout(void **state)
{
	struct ffs_error err = {0};
	unsigned ms = 7;

	assert_int_equal(ffs_ack_timeout(-1, "ack_timeout_ms", &ms, &err), -EINVAL);
	assert_string_equal(err.text, "ack_timeout_ms must not be negative");
	assert_int_equal(ffs_ack_timeout(30001, "ack_timeout_ms", &ms, &err), -EINVAL);
	assert_string_equal(err.text, "ack_timeout_ms must be 30000 or less");
	assert_int_equal(ffs_ack_timeout(INT64_MIN, "x", &ms, NULL), -EINVAL);
	assert_int_equal(ffs_ack_timeout(INT64_MAX, "x", &ms, NULL), -EINVAL);
	assert_int_equal(ms, 7);
	assert_int_equal(ffs_ack_timeout(0, "x", &ms, NULL), 0);
	assert_int_equal(ms, 5000);
	assert_int_equal(ffs_ack_timeout(30000, "x", &ms, NULL), 0);
	assert_int_equal(ms, 30000);
	assert_int_equal(ffs_ack_timeout(1, "x", &ms, NULL), 0);
	assert_int_equal(ms, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_texts),
		cmocka_unit_test(test_bytes),
		cmocka_unit_test(test_stream),
		cmocka_unit_test(test_network),
		cmocka_unit_test(test_times),
		cmocka_unit_test(test_not_begun),
		cmocka_unit_test(test_same_name),
		cmocka_unit_test(test_word),
		cmocka_unit_test(test_timeout),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
