/* The branch engine against a VM whose vCPUs write from inside KVM and judge their memory themselves: every
 * byte equal to what others read while it stood still, and children that go on where their registers are. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <json-c/json.h>
#include <cmocka.h>

#include "base/fault.h"
#include "base/util.h"
#include "branch/internal.h"
#include "branch/sandbox.h"
#include "microvm-driver.h"

#define SWEEPS(mib) (3 * (uint64_t)(mib)*256) /* steps of three visits to every page */

static struct ffs_engine *engine;
static struct ffs_sandbox *attached; /* for what a failed test leaves */

/* ---- what the branches of a run cost ---- */

enum { PAUSE, STOP, VMSTATE, ARM, RESUME, DIRTY, CAPTURE, N_FIGURES };
static const char *const figure_names[] = {
	"pause", "stop", "vmstate", "arm", "resume", "dirty pages", "capture"};

struct figures {
	unsigned n, let_go;
	uint64_t v[N_FIGURES][1024], faults, fault_max_ns;
};

static void add_figures(struct figures *f, struct microvm *v, struct ffs_branch *b)
{
	struct json_object *o = NULL, *ph;

	assert_int_equal(ffs_branch_status(b, &o), 0);
	ph = json_object_object_get(o, "phases");
#define NUMBER(from, key) json_object_get_uint64(json_object_object_get(from, key))
	uint64_t truth = v->keep_truth ? v->truth_ns : 0; /* the test's own part */
	uint64_t all[N_FIGURES] = {NUMBER(o, "pause_ns") - truth, NUMBER(ph, "stop_ns"),
		NUMBER(ph, "vmstate_ns"), NUMBER(ph, "arm_ns"), NUMBER(ph, "resume_ns") - truth,
		NUMBER(o, "dirty_at_pause_pages") * 1000, NUMBER(ph, "capture_ns")};

	for (unsigned i = 0; i < N_FIGURES; i++)
		f->v[i][f->n] = all[i];
	f->n++;
	f->faults += NUMBER(o, "faults");
	if (NUMBER(o, "fault_max_ns") > f->fault_max_ns)
		f->fault_max_ns = NUMBER(o, "fault_max_ns");
#undef NUMBER
	json_object_put(o);
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void print_figures(struct figures *f, const char *what)
{
	print_message("%s: %u branches, %u let go by the watchdog, %llu faults (longest %.0f us); us p50 / "
		      "p99 / max:\n",
		what, f->n, f->let_go, (unsigned long long)f->faults, (double)f->fault_max_ns / 1000);
	for (unsigned i = 0; i < N_FIGURES; i++) {
		qsort(f->v[i], f->n, sizeof(uint64_t), ascending);
		print_message("    %-12s%8.0f /%8.0f /%8.0f\n", figure_names[i],
			(double)f->v[i][f->n / 2] / 1000, (double)f->v[i][(f->n * 99 + 99) / 100 - 1] / 1000,
			(double)f->v[i][f->n - 1] / 1000);
	}
	free(f);
}

/* ---- steps ---- */

static void start(struct microvm *v, const struct microvm_options *opt)
{
	struct ffs_error why = {0};
	int e = microvm_start(v, opt, &why);

	if (e == -ENOTSUP) {
		print_message("%s\n", why.text);
		skip();
	}
	if (e < 0)
		fail_msg("%s", why.text);
}

static struct ffs_sandbox *attach(struct microvm *v, bool track)
{
	struct ffs_attach_options opt = {.name = "vm", .pid = v->pid, .track = track};
	struct ffs_sandbox *sb = NULL;
	struct ffs_error err = {0};

	microvm_select(v);
	if (ffs_sandbox_attach_driver(engine, &microvm_ops, &opt, NULL, &sb, &err) < 0)
		fail_msg("attach: %s", err.text);
	attached = sb;
	return sb;
}

static void let_go(struct ffs_sandbox *sb)
{
	attached = NULL;
	ffs_sandbox_unref(sb);
}

/* NULL: see let_go_by_watchdog(). */
static struct ffs_branch *take(struct ffs_sandbox *sb)
{
	struct ffs_branch_options opt = {.name = "b"};
	struct ffs_branch *b = NULL;
	struct ffs_error err = {0};

	if (ffs_branch_take(sb, &opt, NULL, &b, &err) < 0 && err.code != ETIMEDOUT)
		fail_msg("take: %s", err.text);
	return b;
}

/* A branch that the watchdog had to let go, as it does when the machine starves the engine for 500 ms: no
 * branch, and no harm. Everything else that fails is a fault. */
static bool let_go_by_watchdog(struct ffs_branch *b)
{
	struct ffs_error why = {0};

	if (ffs_branch_state(b) != FFS_BRANCH_FAILED)
		return false;
	ffs_branch_failure(b, &why);
	if (why.code != ETIMEDOUT)
		fail_msg("%s", why.text);
	return true;
}

/* The branch once it is ready; false when the watchdog let it go. */
static bool is_ready(struct ffs_branch *b)
{
	struct ffs_error err = {0};

	return ffs_branch_wait(b, NULL, &err) == 0 || !let_go_by_watchdog(b);
}

/* True when it is the truth in every byte that can be read. */
static bool is_true(struct ffs_branch *b, const struct microvm *v)
{
	static uint8_t buf[1 << 20];
	uint64_t bad = 0;

	for (uint64_t off = 0; off < v->size; off += sizeof(buf)) {
		if (ffs_branch_read_memory(b, buf, sizeof(buf), off) != (ssize_t)sizeof(buf)) {
			assert_false(is_ready(b)); /* and why is allowed: checked there */
			break;
		}
		for (uint64_t p = 0; p < sizeof(buf); p += 4096)
			bad += memcmp(buf + p, v->truth + off + p, 4096) != 0;
	}
	if (bad)
		print_message("%llu wrong pages\n", (unsigned long long)bad);
	return bad == 0;
}

static void restore(struct ffs_branch *b, struct microvm *child, bool paused)
{
	start(child, &(struct microvm_options){.memory_fd = ffs_branch_memory_fd(b),
			     .vmstate_fd = ffs_branch_vmstate_fd(b),
			     .paused = paused});
}

/* 0, or -EILSEQ: its guest found its memory wrong. */
static int child_runs(struct ffs_branch *b, uint64_t steps)
{
	struct microvm child;

	restore(b, &child, false);
	int e = microvm_runs(&child, steps, 60000);

	microvm_stop(&child);
	return e;
}

/* ---- tests ---- */

/* `rounds` branches: where the truth is kept half are compared while they are captured and all once they are
 * ready; every fourth has a child; the parent goes on. */
static void branches(
	struct ffs_sandbox *sb, struct microvm *v, struct figures *f, unsigned rounds, uint64_t child_steps)
{
	for (unsigned tries = 0; f->n < rounds; tries++) {
		struct ffs_branch *b = take(sb);

		assert_true(tries < 3 * rounds);
		if (b && v->keep_truth && tries % 2)
			assert_true(is_true(b, v));
		if (b && is_ready(b)) {
			if (v->keep_truth)
				assert_true(is_true(b, v));
			if (f->n % 4 == 0)
				assert_int_equal(child_runs(b, child_steps), 0);
			add_figures(f, v, b);
		} else {
			f->let_go++;
		}
		ffs_branch_unref(b);
		assert_int_equal(microvm_runs(v, 1000, 10000), 0);
	}
}

static void identity(const struct microvm_options *opt, bool track, unsigned rounds, const char *what)
{
	struct figures *f = calloc(1, sizeof(*f));
	struct microvm v;

	start(&v, opt);
	assert_int_equal(microvm_runs(&v, SWEEPS(opt->mib), 60000), 0);
	struct ffs_sandbox *sb = attach(&v, track);

	branches(sb, &v, f, rounds, SWEEPS(opt->mib));
	assert_int_equal(v.stops, v.resumes);
	assert_true(f->faults > 0); /* what a vCPU writes traps */
	print_figures(f, what);
	ffs_sandbox_detach(sb);
	assert_false(microvm_protected(&v));
	let_go(sb);
	assert_int_equal(microvm_runs(&v, SWEEPS(opt->mib), 60000), 0);
	microvm_stop(&v);
}

static void test_memfd(void **s)
{
	identity(&(struct microvm_options){.kind = "memfd", .mib = 64, .vcpus = 2}, false, 100,
		"memfd, 64 MiB, 2 vCPUs");
}

static void test_anonymous(void **s)
{
	identity(&(struct microvm_options){.kind = "anonymous", .mib = 64, .vcpus = 2}, false, 100,
		"anonymous, 64 MiB, 2 vCPUs");
}

static void test_huge_anonymous(void **s)
{
	identity(&(struct microvm_options){.kind = "thp", .mib = 64, .vcpus = 2}, false, 30,
		"anonymous, transparent huge pages, 64 MiB, 2 vCPUs");
}

static void test_hugetlb(void **s)
{
	identity(&(struct microvm_options){.kind = "hugetlb", .mib = 64, .vcpus = 2}, false, 100,
		"hugetlb, 64 MiB, 2 vCPUs");
}

static void test_tracking(void **s)
{
	identity(
		&(struct microvm_options){
			.kind = "memfd", .mib = 64, .vcpus = 2, .work_mib = 8, .fill = true},
		true, 50, "memfd, tracked, 64 MiB of which 8 are written, 2 vCPUs");
}

/* The pause as it is when nobody reads the memory in it. No assertion on time. */
static void test_pause(void **s)
{
	const char *given = getenv("MICROVM_MIB");
	unsigned mib = given ? (unsigned)atoi(given) : 256;

	for (unsigned vcpus = 1; vcpus <= 2; vcpus++) {
		struct figures *f = calloc(1, sizeof(*f));
		char what[96];
		struct microvm v;

		start(&v, &(struct microvm_options){
				  .kind = "memfd", .mib = mib, .vcpus = vcpus, .work_mib = 32, .fill = true});
		v.keep_truth = false;
		assert_int_equal(microvm_runs(&v, SWEEPS(32), 60000), 0);
		struct ffs_sandbox *sb = attach(&v, false);

		branches(sb, &v, f, 100, SWEEPS(32));
		assert_int_equal(microvm_runs(&v, SWEEPS(32), 60000), 0);
		snprintf(what, sizeof(what), "memfd, %u MiB resident, 32 written, %u vCPU", mib, vcpus);
		print_figures(f, what);
		let_go(sb);
		microvm_stop(&v);
	}
}

/* A child maps its branch privately, and is a source of branches itself. */
static void test_branch_of_child(void **s)
{
	struct figures *f = calloc(1, sizeof(*f));
	struct microvm v, child;

	start(&v, &(struct microvm_options){.kind = "memfd", .mib = 32, .vcpus = 2});
	assert_int_equal(microvm_runs(&v, SWEEPS(32), 60000), 0);
	struct ffs_sandbox *sb = attach(&v, false);
	struct ffs_branch *parent = take(sb);

	assert_true(parent && is_ready(parent));
	let_go(sb);
	restore(parent, &child, true);
	struct microvm_status st;

	/* mostly not its own pages yet: the first branches are of the file's */
	assert_int_equal(microvm_command(&child, "resume", &st), 0);
	sb = attach(&child, false);
	branches(sb, &child, f, 20, SWEEPS(32));
	print_figures(f, "a child, private mapping of its branch, 32 MiB, 2 vCPUs");
	let_go(sb);
	assert_int_equal(microvm_runs(&child, SWEEPS(32), 60000), 0);
	microvm_stop(&child);
	ffs_branch_unref(parent);
	assert_int_equal(microvm_runs(&v, SWEEPS(32), 60000), 0);
	microvm_stop(&v);
}

static void test_found_paused(void **s)
{
	struct microvm_status st, later;
	struct microvm v;

	start(&v, &(struct microvm_options){.kind = "memfd", .mib = 32, .vcpus = 2});
	assert_int_equal(microvm_runs(&v, SWEEPS(32), 60000), 0);
	struct ffs_sandbox *sb = attach(&v, false);

	assert_int_equal(microvm_command(&v, "pause", &st), 0);
	struct ffs_branch *b = take(sb);

	assert_non_null(b);
	assert_int_equal(v.stops + v.resumes, 0);
	assert_int_equal(microvm_command(&v, "status", &later), 0);
	assert_true(later.paused);
	assert_int_equal(later.steps, st.steps);
	assert_int_equal(microvm_command(&v, "resume", &st), 0);
	assert_true(is_true(b, &v));
	assert_true(is_ready(b));
	assert_int_equal(child_runs(b, SWEEPS(32)), 0);
	ffs_branch_unref(b);
	let_go(sb);
	microvm_stop(&v);
}

#ifdef FFS_FAULTS
/* A protocol in the wrong order: the guests of its branches must say so, or this program proves nothing. */
static void test_mutants(void **s)
{
	static const char *const mutants[] = {"arm-before-pause", "arm-after-resume"};
	char path[] = "/tmp/microvm-mutant-XXXXXX";
	struct microvm v;

	start(&v, &(struct microvm_options){.kind = "memfd", .mib = 32, .vcpus = 2});
	assert_int_equal(microvm_runs(&v, SWEEPS(32), 60000), 0);
	int fd = mkstemp(path);
	struct ffs_sandbox *sb = attach(&v, false);

	assert_true(fd >= 0);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(mutants); i++) {
		unsigned found = 0;

		assert_int_equal(ftruncate(fd, 0), 0);
		lseek(fd, 0, SEEK_SET);
		dprintf(fd, "mutant:%s on\n", mutants[i]);
		for (unsigned round = 0; round < 10; round++) {
			setenv("FORKFS_FAULT_FILE", path, 1);
			struct ffs_branch *b = take(sb);

			unsetenv("FORKFS_FAULT_FILE");
			found += b && is_ready(b) && child_runs(b, SWEEPS(32)) == -EILSEQ;
			ffs_branch_unref(b);
		}
		print_message("%s: the children of %u of 10 branches noticed\n", mutants[i], found);
		assert_true(found > 0);
	}
	unlink(path);
	close(fd);
	let_go(sb);
	microvm_stop(&v);
}
#endif

static int clear_away(void **s)
{
	if (attached)
		let_go(attached);
	microvm_stop_all();
	return 0;
}

static int setup(void **s)
{
	struct ffs_error err = {0};

	if (ffs_engine_new(&engine, &err) < 0) {
		print_message("engine: %s\n", err.text);
		return -1;
	}
	return 0;
}

static int teardown(void **s)
{
	ffs_engine_unref(engine);
	return 0;
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(test_memfd, clear_away),
		cmocka_unit_test_teardown(test_anonymous, clear_away),
		cmocka_unit_test_teardown(test_huge_anonymous, clear_away),
		cmocka_unit_test_teardown(test_hugetlb, clear_away),
		cmocka_unit_test_teardown(test_tracking, clear_away),
		cmocka_unit_test_teardown(test_pause, clear_away),
		cmocka_unit_test_teardown(test_branch_of_child, clear_away),
		cmocka_unit_test_teardown(test_found_paused, clear_away),
#ifdef FFS_FAULTS
		cmocka_unit_test_teardown(test_mutants, clear_away),
#endif
	};
	struct ffs_error why = {0};
	struct microvm v;
	int e = microvm_start(&v, &(struct microvm_options){.kind = "memfd", .mib = 8, .vcpus = 1}, &why);

	if (e == 0) {
		e = microvm_runs(&v, 1000, 20000);
		microvm_stop(&v);
		if (e < 0)
			ffs_error_set(&why, ENOTSUP, "SKIP: /dev/kvm does not run the guest");
	}
	if (e == -ENOTSUP || (e < 0 && why.code == ENOTSUP)) {
		print_message("%s\n", why.text);
		return 77;
	}
	if (e < 0) {
		print_message("%s\n", why.text);
		return 1;
	}
	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, setup, teardown);
}
