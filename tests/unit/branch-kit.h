/* What the tests of the branch engine share: an engine for the whole program, a fake VM attached, branches
 * compared with the truth. Included by one .c per program. */
#pragma once

#include <dirent.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
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

#include "branch/internal.h"
#include "branch/sandbox.h"
#include "fake-vmm.h"

#define MIB (1ull << 20)

static struct ffs_engine *engine;

/* ---- VMs and branches ---- */

static inline struct ffs_sandbox *try_attach(struct fake_vmm *f, bool track, struct ffs_error *err)
{
	static atomic_uint number; /* a test that failed leaves its sandbox behind */
	char name[32];
	struct ffs_attach_options opt = {.name = name, .pid = f->pid, .track = track};
	struct ffs_sandbox *sb = NULL;

	snprintf(name, sizeof(name), "vm%u", atomic_fetch_add(&number, 1));
	fake_vmm_select(f);
	return ffs_sandbox_attach_driver(engine, &fake_vmm_ops, &opt, NULL, &sb, err) < 0 ? NULL : sb;
}

static inline struct ffs_sandbox *attach(struct fake_vmm *f, bool track)
{
	struct ffs_error err = {0};
	struct ffs_sandbox *sb = try_attach(f, track, &err);

	if (!sb)
		fail_msg("attach: %s", err.text);
	return sb;
}

static inline int try_take(struct ffs_sandbox *sb, struct ffs_branch **b)
{
	struct ffs_branch_options opt = {.name = "b"};
	struct ffs_error err = {0};

	*b = NULL;
	return ffs_branch_take(sb, &opt, NULL, b, &err);
}

/* On a machine with ten times more to do than it has CPUs the daemon, or the fake, may get none for 500 ms;
 * what the watchdog then does is right, and the next try is another matter. */
static inline struct ffs_branch *take(struct ffs_sandbox *sb)
{
	struct ffs_branch_options opt = {.name = "b"};
	struct ffs_branch *b = NULL;
	struct ffs_error err = {0};

	for (unsigned i = 0; i < 3; i++) {
		int e = ffs_branch_take(sb, &opt, NULL, &b, &err);

		if (e == 0)
			return b;
		if (!sb->tracker || !ffs_tracker_revoked(sb->tracker))
			break;
		print_message("revoked, once more: %s\n", err.text);
	}
	fail_msg("take: %s", err.text);
	return NULL;
}

/* Pages of the branch that differ from the truth; ~0: it cannot be read. */
static inline uint64_t wrong_pages(struct ffs_branch *b, const uint8_t *truth, uint64_t size)
{
	uint64_t bad = 0, step = 1 << 20;
	uint8_t *buf = malloc(step);

	for (uint64_t off = 0; off < size; off += step) {
		size_t want = size - off < step ? size - off : step;

		if (ffs_branch_read_memory(b, buf, step, off) != (ssize_t)want) {
			bad = ~0ull;
			break;
		}
		for (uint64_t p = 0; p < want; p += 4096)
			bad += memcmp(buf + p, truth + off + p, 4096) != 0;
	}
	free(buf);
	return bad;
}

static inline void wait_ready(struct ffs_branch *b)
{
	struct ffs_error err = {0};

	if (ffs_branch_wait(b, NULL, &err) < 0)
		fail_msg("wait: %s", err.text);
}

static inline int wait_end(struct ffs_branch *b, struct ffs_error *err)
{
	*err = (struct ffs_error){0};
	return ffs_branch_wait(b, NULL, err);
}

static inline void *map_truth(uint64_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_true(p != MAP_FAILED);
	return p;
}

/* The truth of the branch just taken, to keep; the next one gets a new buffer. */
static inline uint8_t *keep_truth(struct fake_vmm *f)
{
	uint8_t *old = f->truth;

	f->truth = map_truth(f->size);
	return old;
}

/* True: READY and right; false: FAILED with a reason, and unreadable. Else the test fails. */
static inline bool right_or_failed(struct ffs_branch *b, const uint8_t *truth, uint64_t size)
{
	struct ffs_error err;
	char c;

	if (wait_end(b, &err) == 0) {
		assert_int_equal(wrong_pages(b, truth, size), 0);
		return true;
	}
	assert_int_not_equal(err.code, 0);
	assert_true(err.text[0] != '\0');
	assert_int_equal(ffs_branch_read_memory(b, &c, 1, 0), -EIO);
	assert_int_equal(ffs_branch_memory_fd(b), -EIO);
	return false;
}

/* The next branch is right, and the guest runs. */
static inline void good_branch(struct ffs_sandbox *sb, struct fake_vmm *f)
{
	struct ffs_error err = {0};

	for (unsigned i = 0; i < 3; i++) {
		struct ffs_branch *b = take(sb);

		assert_true(fake_vmm_runs(f, 3000));
		uint64_t bad = wrong_pages(b, f->truth, f->size);
		bool slow = wait_end(b, &err) < 0 && ffs_tracker_revoked(sb->tracker);

		if (!slow) {
			if (err.code)
				fail_msg("wait: %s", err.text);
			assert_int_equal(bad, 0);
			assert_int_equal(wrong_pages(b, f->truth, f->size), 0);
		}
		ffs_branch_unref(b);
		assert_true(fake_vmm_runs(f, 3000));
		if (!slow)
			return;
		print_message("revoked, once more: %s\n", err.text);
	}
	fail_msg("wait: %s", err.text);
}

/* Nothing in flight, no tracking: the protection goes and the watchdog has nothing to watch. */
static inline bool becomes_idle(struct ffs_sandbox *sb, struct fake_vmm *f, unsigned ms)
{
	uint64_t end = ffs_now_ns() + ms * FFS_NS_PER_MS;

	do {
		if (!fake_vmm_protected(f) && !atomic_load(&sb->tracker->wd->active) &&
			!atomic_load(&sb->tracker->wd->pausing))
			return true;
		poll(NULL, 0, 1);
	} while (ffs_now_ns() < end);
	return false;
}

/* In a directory of /proc/PID. */
static inline unsigned count_entries(pid_t pid, const char *what)
{
	char path[64];
	unsigned n = 0;

	snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, what);
	DIR *d = opendir(path);

	while (d && readdir(d))
		n++;
	if (d)
		closedir(d);
	return n;
}

static inline unsigned count_fds(pid_t pid)
{
	return count_entries(pid, "fd");
}

static inline int kit_setup(void **s)
{
	struct ffs_error err = {0};

	if (ffs_engine_new(&engine, &err) < 0) {
		print_message("engine: %s\n", err.text);
		return -1;
	}
	return 0;
}

static inline int kit_teardown(void **s)
{
	ffs_engine_unref(engine);
	return 0;
}
