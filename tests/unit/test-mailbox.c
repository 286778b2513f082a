/* The frames of mailboxes (engine/mailbox): golden bytes, limits from both sides, finding, overlays. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/util.h"
#include "mailbox/mailbox.h"

#define PAGE FFS_MAILBOX_PAGE

static struct ffs_mailbox_id id_of(enum ffs_mailbox_kind kind, const char *name, const char *token)
{
	struct ffs_mailbox_id id = {.kind = kind, .token_len = (unsigned)strlen(token)};

	snprintf(id.name, sizeof(id.name), "%s", name);
	memcpy(id.token, token, id.token_len < sizeof(id.token) ? id.token_len : sizeof(id.token));
	return id;
}

/* As many of a character. */
static const char *many(char *buf, char c, size_t n)
{
	memset(buf, c, n);
	buf[n] = '\0';
	return buf;
}

/* What a guest publishes. */
static void publish(uint8_t *page, enum ffs_mailbox_kind kind, const char *name, const char *token)
{
	struct ffs_mailbox_id id = id_of(kind, name, token);

	memset(page, 0, PAGE);
	assert_true(ffs_mailbox_marker(&id, page, NULL) > 0);
}

static int put_into(void *arg, const void *bytes, size_t len, unsigned at)
{
	memcpy((uint8_t *)arg + at, bytes, len);
	return 0;
}

/* ---- golden bytes ---- */

static void parse_uuid(const char *text, uint8_t out[16])
{
	unsigned n = 0;

	for (; *text && n < 32; text++) {
		if (*text == '-')
			continue;
		unsigned v = *text <= '9' ? (unsigned)(*text - '0') : (unsigned)(*text - 'a') + 10;

		out[n / 2] = (uint8_t)(n % 2 ? out[n / 2] | v : v << 4);
		n++;
	}
}

static void golden_line(const char *line, uint8_t *want)
{
	unsigned at = (unsigned)atoi(line);
	const char *hex = strchr(line, ' ') + 1;

	for (unsigned byte; sscanf(hex, "%2x", &byte) == 1; hex += 2)
		want[at++] = (uint8_t)byte;
}

struct golden {
	enum ffs_mailbox_kind kind;
	char name[80], token[160], epoch[64];
	unsigned flags;
	char payload[8192];
	uint8_t want[PAGE];
};

static void check_golden(const struct golden *g)
{
	uint8_t page[PAGE], epoch[16], seen[16];
	const void *payload;
	uint32_t flags;
	size_t len;

	publish(page, g->kind, g->name, g->token);
	assert_int_equal(ffs_mailbox_read(g->kind, page, &payload, &len, seen, &flags), 0);
	parse_uuid(g->epoch, epoch);
	assert_int_equal(
		ffs_mailbox_write(g->kind, g->payload, strlen(g->payload), epoch, g->flags, put_into, page),
		0);
	assert_memory_equal(page, g->want, PAGE);
	assert_int_equal(ffs_mailbox_read(g->kind, page, &payload, &len, seen, &flags), 1);
	assert_int_equal(len, strlen(g->payload));
	assert_memory_equal(payload, g->payload, len);
	if (g->kind == FFS_MAILBOX_FORK) {
		assert_memory_equal(seen, epoch, 16);
		assert_int_equal(flags, g->flags | FFS_MAILBOX_PRESENT);
		for (size_t i = 0; i < len; i++) {
			((uint8_t *)page)[264 + i] ^= 4;
			assert_int_equal(
				ffs_mailbox_read(g->kind, page, &payload, &len, seen, &flags), -EBADMSG);
			((uint8_t *)page)[264 + i] ^= 4;
		}
	}
}

static void test_golden(void **state)
{
	FILE *f = fopen(getenv("MAILBOX_VECTORS"), "r");
	static struct golden g;
	char line[8300], kind[32];
	unsigned checked = 0;
	bool have = false;

	assert_non_null(f);
	while (fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\n")] = '\0';
		if (*line == '#' || !*line)
			continue;
		if (strncmp(line, "frame ", 6) == 0) {
			if (have)
				check_golden(&g);
			checked += have;
			memset(&g, 0, sizeof(g));
			have = true;
			assert_int_equal(sscanf(line, "frame %31s %79s %159s %63s %u", kind, g.name, g.token,
						 g.epoch, &g.flags),
				5);
			g.kind = strcmp(kind, "fork") == 0 ? FFS_MAILBOX_FORK : FFS_MAILBOX_NETWORK;
		} else if (strncmp(line, "payload ", 8) == 0) {
			snprintf(g.payload, sizeof(g.payload), "%.8000s", line + 8);
		} else {
			golden_line(line, g.want);
		}
	}
	check_golden(&g);
	assert_int_equal(checked + 1, 5);
	fclose(f);
}

static void test_crc32c(void **state)
{
	assert_int_equal(ffs_crc32c(0, "123456789", 9), 0xe3069283u);
	assert_int_equal(ffs_crc32c(ffs_crc32c(0, "1234", 4), "56789", 5), 0xe3069283u);
}

/* ---- limits ---- */

static bool published(enum ffs_mailbox_kind kind, const char *name, const char *token)
{
	struct ffs_mailbox_id id = id_of(kind, name, token), found;
	uint8_t page[PAGE] = {0};
	bool marked = strlen(token) <= FFS_MAILBOX_TOKEN_MAX && strlen(name) <= FFS_MAILBOX_NAME_MAX &&
		      ffs_mailbox_marker(&id, page, NULL) > 0;

	if (!marked) {
		/* a guest writes it all the same */
		const struct ffs_mailbox_layout *l = ffs_mailbox_layout(kind);
		uint8_t *p = page;

		memset(page, 0, sizeof(page));
		memcpy(p, l->magic, l->magic_len);
		p += l->magic_len;
		if (l->named)
			p += sprintf((char *)p, "%s", name) + 1;
		strcpy((char *)p, token);
	}
	assert_int_equal(ffs_mailbox_parse(page, &found), marked);
	if (marked) {
		assert_string_equal(found.token, token);
		assert_string_equal(found.name, kind == FFS_MAILBOX_FORK ? name : "resume-network");
	}
	return marked;
}

static void test_tokens(void **state)
{
	char t[256];

	assert_true(published(FFS_MAILBOX_NETWORK, "", many(t, 'n', 30)));
	assert_false(published(FFS_MAILBOX_NETWORK, "", many(t, 'n', 31)));
	assert_true(published(FFS_MAILBOX_FORK, "a", many(t, 'n', 128)));
	assert_false(published(FFS_MAILBOX_FORK, "a", many(t, 'n', 129)));
	assert_true(published(FFS_MAILBOX_FORK, "a", "n"));
	assert_false(published(FFS_MAILBOX_FORK, "a", ""));
	assert_false(published(FFS_MAILBOX_FORK, "a", " \t\n"));
	assert_true(published(FFS_MAILBOX_FORK, "a", " t"));
	assert_int_equal(ffs_mailbox_check_token(FFS_MAILBOX_FORK, "a\0b", 3, NULL), -EINVAL);
}

static void test_names(void **state)
{
	char n[256];

	assert_true(published(FFS_MAILBOX_FORK, many(n, 'a', 64), "t"));
	assert_false(published(FFS_MAILBOX_FORK, many(n, 'a', 65), "t"));
	assert_true(published(FFS_MAILBOX_FORK, "AZaz09._:-", "t"));
	for (const char *const *bad = (const char *const[]){"", " a", "a ", "a b", "a/b", "\xc3\xa4", NULL};
		*bad; bad++)
		assert_false(published(FFS_MAILBOX_FORK, *bad, "t"));
}

static void test_fits(void **state)
{
	assert_int_equal(ffs_mailbox_fits(FFS_MAILBOX_FORK, 3832, 0, PAGE, NULL), 0);
	assert_int_equal(ffs_mailbox_fits(FFS_MAILBOX_FORK, 3833, 0, PAGE, NULL), -EFBIG);
	assert_int_equal(ffs_mailbox_fits(FFS_MAILBOX_NETWORK, 4024, 0, PAGE, NULL), 0);
	assert_int_equal(ffs_mailbox_fits(FFS_MAILBOX_NETWORK, 4025, 0, PAGE, NULL), -EFBIG);
	assert_int_equal(ffs_mailbox_fits(FFS_MAILBOX_FORK, 2, PAGE, 2 * PAGE, NULL), 0);
	assert_int_equal(ffs_mailbox_fits(FFS_MAILBOX_FORK, 2, PAGE, 2 * PAGE - 1, NULL), -ERANGE);
	assert_int_equal(ffs_mailbox_fits(FFS_MAILBOX_FORK, 2, 0, PAGE - 1, NULL), -ERANGE);
}

/* ---- the order of writing ---- */

struct steps {
	unsigned at[8], n, fail_at;
};

static int note_step(void *arg, const void *bytes, size_t len, unsigned at)
{
	struct steps *s = arg;

	s->at[s->n++] = at;
	return s->n == s->fail_at ? -EIO : 0;
}

static void test_order(void **state)
{
	uint8_t epoch[16] = {0};
	struct steps s = {0};

	assert_int_equal(ffs_mailbox_write(FFS_MAILBOX_FORK, "{}", 2, epoch, 0, note_step, &s), 0);
	assert_int_equal(s.n, 4);
	assert_true(s.at[0] == 264 && s.at[1] == 224 && s.at[2] == 260 && s.at[3] == 256);
	s = (struct steps){0};
	assert_int_equal(ffs_mailbox_write(FFS_MAILBOX_NETWORK, "{}", 2, epoch, 0, note_step, &s), 0);
	assert_int_equal(s.n, 3);
	assert_true(s.at[0] == 72 && s.at[1] == 68 && s.at[2] == 64);
	for (unsigned fail = 1; fail < 5; fail++) {
		s = (struct steps){.fail_at = fail};
		assert_int_equal(ffs_mailbox_write(FFS_MAILBOX_FORK, "{}", 2, epoch, 0, note_step, &s), -EIO);
		assert_int_equal(s.n, fail);
	}
}

/* ---- finding ---- */

static ssize_t read_memory(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	return ffs_pread_full(*(int *)arg, buf, len, off);
}

/* Of memory that runs: between the two looks the guest may have written anything. */
static int read_heads(void *arg, uint64_t *head, size_t pages, uint64_t off, struct ffs_error *err)
{
	for (size_t i = 0; i < pages; i++) {
		head[i] = 0;
		if (ffs_pread_full(*(int *)arg, &head[i], sizeof(*head), off + i * PAGE) < 0)
			return -errno;
	}
	return 0;
}

static int heads_fail(void *arg, uint64_t *head, size_t pages, uint64_t off, struct ffs_error *err)
{
	return -ESRCH;
}

static const struct ffs_mailbox_frame *find(const struct ffs_mailbox_frames *in, const char *name,
	const char *token, int want, struct ffs_error *err)
{
	const struct ffs_mailbox_frame *f = NULL;

	assert_int_equal(ffs_mailbox_find(in, name, token, token ? strlen(token) : 0, &f, err), want);
	return f;
}

static void check_finding(struct ffs_mailbox_memory *mem)
{
	struct ffs_mailbox_frames in;
	struct ffs_error err = {0};

	assert_int_equal(ffs_mailbox_scan(mem, &in, &err), 0);
	/* config, config of another token, twin twice, net, last; neither the unaligned nor the one cut off
	 */
	assert_int_equal(in.n, 7);
	assert_int_equal(find(&in, "config", "abc", 0, NULL)->offset, 3 * PAGE);
	assert_int_equal(find(&in, "config:abcd", NULL, 0, NULL)->offset, 5 * PAGE);
	assert_int_equal(find(&in, "a:b:c", NULL, 0, NULL)->offset, 8 * PAGE);
	assert_int_equal(find(&in, "resume-network", NULL, 0, NULL)->offset, 9000 * PAGE);
	assert_int_equal(find(&in, "last", NULL, 0, NULL)->offset, mem->size - PAGE - mem->size % PAGE);
	find(&in, "config", "ab", -ENOENT, NULL);
	find(&in, "unaligned", NULL, -ENOENT, NULL);
	find(&in, "config", NULL, -ENOTUNIQ, &err);
	assert_non_null(strstr(err.text, "0x3000 0x5000"));
	find(&in, "twin", "t", -ENOTUNIQ, &err);
	assert_non_null(strstr(err.text, "0x6000 0x7000"));
	ffs_mailbox_frames_free(&in);
}

/* Decoys: a prefix of a token, an unaligned frame, one that straddles pages, stale copies, one at the very
 * end. */
static void test_find(void **state)
{
	uint64_t pages = 17000; /* more than two pieces of a file */
	int fd = memfd_create("memory", MFD_CLOEXEC);
	struct ffs_mailbox_memory mem = {pages * PAGE, fd, read_memory, &fd};
	uint8_t page[PAGE];
	struct stat before, after;
	const struct {
		enum ffs_mailbox_kind kind;
		const char *name, *token;
		uint64_t at;
	} frames[] = {{FFS_MAILBOX_FORK, "config", "abc", 3 * PAGE},
		{FFS_MAILBOX_FORK, "config", "abcd", 5 * PAGE}, {FFS_MAILBOX_FORK, "twin", "t", 6 * PAGE},
		{FFS_MAILBOX_FORK, "twin", "t", 7 * PAGE}, {FFS_MAILBOX_FORK, "a:b", "c", 8 * PAGE},
		{FFS_MAILBOX_NETWORK, "", "tok", 9000 * PAGE},
		{FFS_MAILBOX_FORK, "unaligned", "t", 20 * PAGE + 8},
		{FFS_MAILBOX_FORK, "straddles", "t", 31 * PAGE - 100},
		{FFS_MAILBOX_FORK, "last", "t", (pages - 1) * PAGE}};

	assert_int_equal(ftruncate(fd, (off_t)(pages * PAGE)), 0);
	for (size_t i = 0; i < FFS_ARRAY_LEN(frames); i++) {
		publish(page, frames[i].kind, frames[i].name, frames[i].token);
		assert_int_equal(ffs_pwrite_full(fd, page, PAGE, frames[i].at), PAGE);
	}
	assert_int_equal(fstat(fd, &before), 0);
	check_finding(&mem);
	/* holes were not looked at: they would have got pages */
	assert_int_equal(fstat(fd, &after), 0);
	assert_int_equal(before.st_blocks, after.st_blocks);
	mem.fd = -1;
	check_finding(&mem);
	mem.heads = read_heads;
	check_finding(&mem);
	mem.heads = NULL;
	/* memory that ends within a page has no frame there */
	mem.size += 100;
	check_finding(&mem);
	close(fd);
}

static void test_verify(void **state)
{
	int fd = memfd_create("memory", MFD_CLOEXEC);
	struct ffs_mailbox_memory mem = {16 * PAGE, fd, read_memory, &fd};
	struct ffs_mailbox_frames in, copy;
	uint8_t page[PAGE];

	assert_int_equal(ftruncate(fd, 16 * PAGE), 0);
	publish(page, FFS_MAILBOX_FORK, "a", "t");
	assert_int_equal(ffs_pwrite_full(fd, page, PAGE, 2 * PAGE), PAGE);
	publish(page, FFS_MAILBOX_FORK, "b", "t");
	assert_int_equal(ffs_pwrite_full(fd, page, PAGE, 4 * PAGE), PAGE);
	assert_int_equal(ffs_mailbox_scan(&mem, &in, NULL), 0);
	assert_int_equal(ffs_mailbox_frames_copy(&copy, &in), 0);
	assert_int_equal(ffs_mailbox_verify(&mem, &copy, NULL), 0);
	assert_int_equal(copy.n, 2);
	publish(page, FFS_MAILBOX_FORK, "a", "u");
	assert_int_equal(ffs_pwrite_full(fd, page, PAGE, 2 * PAGE), PAGE);
	assert_int_equal(ffs_mailbox_verify(&mem, &copy, NULL), 0);
	assert_int_equal(copy.n, 1);
	assert_string_equal(copy.frame[0].id.name, "b");
	ffs_mailbox_frames_free(&in);
	ffs_mailbox_frames_free(&copy);
	close(fd);
}

/* A guest that fills its memory with frames costs no more memory of ours than that. */
static void test_too_many(void **state)
{
	int fd = memfd_create("memory", MFD_CLOEXEC);
	struct ffs_mailbox_memory mem = {(FFS_MAILBOX_FRAMES_MAX + 1ull) * PAGE, fd, read_memory, &fd};
	struct ffs_mailbox_frames in;
	uint8_t page[PAGE];

	publish(page, FFS_MAILBOX_FORK, "a", "t");
	for (uint64_t i = 0; i <= FFS_MAILBOX_FRAMES_MAX; i++)
		assert_int_equal(ffs_pwrite_full(fd, page, PAGE, i * PAGE), PAGE);
	assert_int_equal(ffs_mailbox_scan(&mem, &in, NULL), -EOVERFLOW);
	mem.size -= PAGE;
	assert_int_equal(ffs_mailbox_scan(&mem, &in, NULL), 0);
	assert_int_equal(in.n, FFS_MAILBOX_FRAMES_MAX);
	ffs_mailbox_frames_free(&in);
	close(fd);
}

static ssize_t read_fails(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	return off < 4 << 20 ? (ssize_t)len : ffs_error_set(err, EIO, "the branch failed");
}

static void test_scan_fails(void **state)
{
	struct ffs_mailbox_memory mem = {16 << 20, -1, read_fails, NULL};
	struct ffs_mailbox_frames in = {0};
	struct ffs_error err = {0};

	assert_int_equal(ffs_mailbox_scan(&mem, &in, &err), -EIO);
	assert_string_equal(err.text, "the branch failed");
	assert_null(in.frame);
	mem.heads = heads_fail;
	assert_int_equal(ffs_mailbox_scan(&mem, &in, &err), -ESRCH);
	assert_null(in.frame);
}

/* ---- overlays ---- */

static void test_overlay(void **state)
{
	struct ffs_overlay *o = ffs_overlay_new(), *copy;
	uint8_t base[8 * PAGE], want[8 * PAGE], got[8 * PAGE], page[PAGE];
	uint64_t at;

	for (size_t i = 0; i < sizeof(base); i++)
		base[i] = (uint8_t)(i * 7 + i / PAGE);
	memcpy(want, base, sizeof(base));
	for (const unsigned *p = (const unsigned[]){5, 1, 7, 2, 0}; *p; p++) {
		memset(page, (int)*p, PAGE);
		assert_int_equal(ffs_overlay_set(o, *p * PAGE, page), 0);
		memcpy(want + *p * PAGE, page, PAGE);
	}
	assert_int_equal(ffs_overlay_set(o, 17, page), -EINVAL);
	assert_int_equal(ffs_overlay_pages(o), 4);
	assert_int_equal(*(const uint8_t *)ffs_overlay_page(o, 1, &at), 2);
	assert_int_equal(at, 2 * PAGE);
	unsigned seed = 1;

	for (unsigned i = 0; i < 20000; i++) {
		seed = seed * 1103515245 + 12345;
		size_t off = seed / 8 % sizeof(base), len = seed / 64 % (sizeof(base) - off + 1);

		memcpy(got, base + off, len);
		ffs_overlay_apply(o, got, len, off);
		assert_memory_equal(got, want + off, len);
	}
	copy = ffs_overlay_copy(o);
	ffs_overlay_remove(o, 5 * PAGE);
	ffs_overlay_remove(o, 6 * PAGE);
	assert_int_equal(ffs_overlay_pages(o), 3);
	assert_int_equal(ffs_overlay_pages(copy), 4);
	ffs_overlay_apply(NULL, got, 1, 0);
	ffs_overlay_unref(o);
	ffs_overlay_unref(copy);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_golden),
		cmocka_unit_test(test_crc32c),
		cmocka_unit_test(test_tokens),
		cmocka_unit_test(test_names),
		cmocka_unit_test(test_fits),
		cmocka_unit_test(test_order),
		cmocka_unit_test(test_find),
		cmocka_unit_test(test_verify),
		cmocka_unit_test(test_too_many),
		cmocka_unit_test(test_scan_fails),
		cmocka_unit_test(test_overlay),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
