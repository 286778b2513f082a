/* Branches of memory that somebody else can write: refused with a sentence, taken with force and then marked,
 * at attach and at each branch. */
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>
#include <json-c/json.h>

#include "branch/internal.h"
#include "branch/sandbox.h"
#include "fake-vmm.h"

#define MIB (1ull << 20)

static struct ffs_engine *engine;
static struct fake_vmm vm;

/* A process with a writable descriptor of the guest's memory: a copy of this one. */
static pid_t start_holder(void)
{
	pid_t pid = fork();

	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	assert_true(pid > 0);
	return pid;
}

static void end_holder(pid_t pid)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static int attach(bool force, struct ffs_sandbox **sb, struct ffs_error *err)
{
	struct ffs_attach_options opt = {.name = "vm", .pid = vm.pid, .force = force};

	fake_vmm_select(&vm);
	return ffs_sandbox_attach_driver(engine, &fake_vmm_ops, &opt, NULL, sb, err);
}

static int take(struct ffs_sandbox *sb, bool force, struct ffs_branch **b, struct ffs_error *err)
{
	struct ffs_branch_options opt = {.name = "b", .force = force};

	return ffs_branch_take(sb, &opt, NULL, b, err);
}

/* Status and manifest of a branch, then its end: marked or not, and always with the time of the scan. */
static void check(struct ffs_branch *b, pid_t holder)
{
	int (*const get[])(struct ffs_branch *, struct json_object **) = {
		ffs_branch_status, ffs_branch_manifest};
	char who[32];

	snprintf(who, sizeof(who), "process %d (", holder);
	assert_int_equal(ffs_branch_wait(b, NULL, NULL), 0);
	for (unsigned i = 0; i < 2; i++) {
		struct json_object *o = NULL, *torn = NULL, *v = NULL;

		assert_int_equal(get[i](b, &o), 0);
		assert_int_equal(json_object_object_get_ex(o, "torn_possible", &torn), holder != 0);
		if (holder) {
			assert_int_equal(json_object_array_length(torn), 1);
			assert_non_null(
				strstr(json_object_get_string(json_object_array_get_idx(torn, 0)), who));
		}
		assert_true(json_object_object_get_ex(o, "phases", &v));
		assert_true(json_object_object_get_ex(v, "scan_ns", &v));
		assert_true(json_object_get_uint64(v) > 0);
		json_object_put(o);
	}
	ffs_branch_unref(b);
}

static void test_branch(void **s)
{
	struct ffs_sandbox *sb = NULL;
	struct ffs_branch *b = NULL;
	struct ffs_error err = {0};

	assert_int_equal(attach(false, &sb, &err), 0);
	assert_int_equal(take(sb, false, &b, &err), 0);
	check(b, 0);
	unsigned stops = vm.stops;
	pid_t holder = start_holder();

	assert_int_equal(take(sb, false, &b, &err), -EBUSY);
	print_message("%s\n", err.text);
	assert_non_null(strstr(err.text, "insist (force, --force)"));
	assert_int_equal(vm.stops, stops); /* outside the pause: there was none */
	assert_true(fake_vmm_runs(&vm, 1000));
	assert_int_equal(take(sb, true, &b, &err), 0);
	check(b, holder);
	struct json_object *o = NULL, *f = NULL;

	assert_int_equal(ffs_sandbox_status(sb, &o), 0);
	assert_true(json_object_object_get_ex(o, "findings", &f));
	assert_true(json_object_array_length(f) >= 1);
	print_message("%s\n", json_object_to_json_string(f));
	json_object_put(o);
	end_holder(holder);
	assert_int_equal(take(sb, false, &b, &err), 0);
	check(b, 0);
	ffs_sandbox_detach(sb);
	ffs_sandbox_unref(sb);
}

/* One that is just about to run a program, or to end, is not somebody who writes. */
static void test_in_passing(void **s)
{
	struct ffs_sandbox *sb = NULL;
	struct ffs_branch *b = NULL;
	struct ffs_error err = {0};

	assert_int_equal(attach(false, &sb, &err), 0);
	pid_t holder = fork();

	if (holder == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		poll(NULL, 0, 60);
		_exit(0);
	}
	if (take(sb, false, &b, &err) < 0)
		fail_msg("%s", err.text);
	check(b, 0);
	waitpid(holder, NULL, 0);
	ffs_sandbox_detach(sb);
	ffs_sandbox_unref(sb);
}

static void test_attach(void **s)
{
	struct ffs_sandbox *sb = NULL;
	struct ffs_branch *b = NULL;
	struct ffs_error err = {0};
	pid_t holder = start_holder();

	assert_int_equal(attach(false, &sb, &err), -EBUSY);
	assert_false(fake_vmm_protected(&vm));
	assert_int_equal(attach(false, &sb, NULL), -EBUSY);
	assert_int_equal(attach(true, &sb, &err), 0);
	assert_int_equal(take(sb, false, &b, &err), 0); /* who attached it so means every branch */
	check(b, holder);
	end_holder(holder);
	ffs_sandbox_unref(sb);
	assert_int_equal(attach(false, &sb, &err), 0);
	ffs_sandbox_unref(sb);
	assert_true(fake_vmm_runs(&vm, 1000));
}

static int setup(void **s)
{
	return ffs_engine_new(&engine, NULL) < 0 || !fake_vmm_start(&vm, FAKE_MEMFD, 32 * MIB, 1);
}

static int teardown(void **s)
{
	fake_vmm_stop(&vm);
	ffs_engine_unref(engine);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_branch), cmocka_unit_test(test_in_passing),
		cmocka_unit_test(test_attach)};

	return cmocka_run_group_tests(tests, setup, teardown);
}
