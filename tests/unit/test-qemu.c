/* What the QEMU driver does to a VM: the operations around a pause, refusals, death, rescue, every step
 * failing once. Machines without a kernel: firmware that finds nothing to boot runs well enough. */
#include "qemu-kit.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "vmm/qmp.h"

/* ---- around a pause ---- */

static void check_vmstate(unsigned char kind)
{
	unsigned char head[9];

	assert_int_equal(ffs_pread_full(vmstate, head, 9, 0), 9);
	assert_memory_equal(head, "QEVM\0\0\0\3", 8);
	if (kind)
		assert_int_equal(head[8], kind);
	assert_int_equal(ftruncate(vmstate, 0), 0);
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void cycles(void **state)
{
	enum { N = 40 };
	uint64_t t[4][N];
	bool was;

	BOOT(false, MICROVM);
	OK(attach(qmp, 0));
	for (unsigned i = 0; i < N; i++) {
		OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
		assert_true(was);
		uint64_t a = ffs_now_ns();

		OK(vmm->ops->pause(vmm, in(2000), &err));
		uint64_t b = ffs_now_ns();

		assert_int_equal(vmm->ops->run_state(vmm), FFS_RUN_PAUSED);
		OK(vmm->ops->save(vmm, in(2000), &err));
		uint64_t c = ffs_now_ns();

		OK(vmm->ops->resume(vmm, in(2000), &err));
		uint64_t d = ffs_now_ns();

		assert_false(vmm->resumed_by_others);
		OK(vmm->ops->resume(vmm, in(2000), &err));
		assert_int_equal(vmm->ops->run_state(vmm), FFS_RUN_RUNNING);
		vmm->ops->finish(vmm);
		check_vmstate(0);
		t[0][i] = b - a;
		t[1][i] = c - b;
		t[2][i] = d - c;
		t[3][i] = d - a;
	}
	struct json_object *sets = ask("query-fdsets", NULL);

	assert_int_equal(json_object_array_length(sets), 0);
	json_object_put(sets);
	ffs_qmp_claim(second);
	ffs_qmp_drain(second);
	ffs_qmp_release(second);
	assert_int_equal(stops, N);
	assert_int_equal(resumes, N);
	for (unsigned k = 0; k < 4; k++) {
		qsort(t[k], N, sizeof(t[k][0]), by_value);
		print_message("%s: p50 %.2f ms, max %.2f ms\n",
			(const char *[]){"stop", "save", "cont", "all"}[k], (double)t[k][N / 2] / 1e6,
			(double)t[k][N - 1] / 1e6);
	}
}

static void found_paused(void **state)
{
	bool was = true;

	BOOT(false, MICROVM);
	OK(attach(qmp, qemu));
	tell("stop", NULL);
	for (unsigned i = 0; i < 3; i++) {
		OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
		assert_false(was);
		OK(vmm->ops->pause(vmm, in(2000), &err));
		OK(vmm->ops->save(vmm, in(2000), &err));
		OK(vmm->ops->resume(vmm, in(2000), &err));
		vmm->ops->finish(vmm);
		check_vmstate(0);
		assert_true(status_is("paused"));
	}
	assert_int_equal(vmm->ops->run_state(vmm), FFS_RUN_PAUSED);
	/* events reach it while nobody calls */
	tell("cont", NULL);
	for (unsigned i = 0; i < 200 && vmm->ops->run_state(vmm) != FFS_RUN_RUNNING; i++)
		poll(NULL, 0, 10);
	assert_int_equal(vmm->ops->run_state(vmm), FFS_RUN_RUNNING);
	/* somebody else's cont in the middle */
	OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
	OK(vmm->ops->pause(vmm, in(2000), &err));
	tell("cont", NULL);
	FAILS(vmm->ops->save(vmm, in(2000), &err), EAGAIN, "somebody else");
	OK(vmm->ops->resume(vmm, in(2000), &err));
	assert_true(vmm->resumed_by_others);
	vmm->ops->finish(vmm);
	assert_true(status_is("running"));
	/* found paused, and let run by its owner behind the save */
	tell("stop", NULL);
	OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
	assert_false(vmm->resumed_by_others);
	OK(vmm->ops->save(vmm, in(2000), &err));
	tell("cont", NULL);
	OK(vmm->ops->resume(vmm, in(2000), &err));
	assert_true(vmm->resumed_by_others);
	vmm->ops->finish(vmm);
}

static bool capability(const char *name)
{
	struct json_object *list = ask("query-migrate-capabilities", NULL), *v;
	bool on = false;

	for (size_t i = 0; i < json_object_array_length(list); i++) {
		struct json_object *c = json_object_array_get_idx(list, i);

		if (json_object_object_get_ex(c, "capability", &v) &&
			strcmp(json_object_get_string(v), name) == 0 &&
			json_object_object_get_ex(c, "state", &v))
			on = json_object_get_boolean(v);
	}
	json_object_put(list);
	return on;
}

#define PC_VGA                                                                                               \
	"-M", "pc,memory-backend=ram0", "-m", "128M", "-nodefaults", "-vga", "std", "-object",               \
		"memory-backend-memfd,id=ram0,size=128M,share=on"

static void with_vga(void **state)
{
	bool was;
	struct stat st;

	BOOT(false, PC_VGA);
	OK(attach(qmp, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	for (unsigned i = 0; i < 5; i++) {
		OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
		OK(vmm->ops->pause(vmm, in(2000), &err));
		OK(vmm->ops->save(vmm, in(2000), &err));
		OK(vmm->ops->resume(vmm, in(2000), &err));
		vmm->ops->finish(vmm);
		assert_true(status_is("running"));
		assert_int_equal(fstat(vmstate, &st), 0);
		assert_true(st.st_size > 10000 && st.st_size < (off_t)(64 * MIB));
		check_vmstate(7);
		assert_false(capability("x-ignore-shared"));
		assert_false(capability("events"));
	}
	struct json_object *o = json_object_new_object(), *v;

	vmm->ops->describe(vmm, o);
	assert_true(json_object_object_get_ex(o, "vmstate_kind", &v));
	assert_string_equal(json_object_get_string(v), "migration");
	json_object_put(o);
	/* given up between prepare and save */
	OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
	OK(vmm->ops->pause(vmm, in(2000), &err));
	OK(vmm->ops->resume(vmm, in(2000), &err));
	vmm->ops->finish(vmm);
	assert_false(capability("x-ignore-shared"));
	tell("stop", NULL);
	FAILS(vmm->ops->prepare(vmm, vmstate, &was, &err), ENOTSUP, "only once");
}

static void with_vga_and_disk(void **state)
{
	char path[96], arg[160];
	bool was;

	snprintf(path, sizeof(path), "%s/disk", dir);
	_cleanup_close_ int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);

	assert_int_equal(ftruncate(fd, (off_t)MIB), 0);
	snprintf(arg, sizeof(arg), "file=%s,if=virtio,format=raw,id=d0", path);
	BOOT(false, PC_VGA, "-drive", arg);
	OK(attach(qmp, qemu));
	FAILS(vmm->ops->prepare(vmm, vmstate, &was, &err), ENOTSUP, "d0");
}

/* ---- death and rescue ---- */

static void exits(void **state)
{
	bool was;

	BOOT(false, MICROVM);
	OK(attach(qmp, qemu));
	OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
	OK(vmm->ops->pause(vmm, in(2000), &err));
	kill_vm();
	FAILS(vmm->ops->save(vmm, in(2000), &err), ESRCH, "has exited");
	FAILS(vmm->ops->resume(vmm, in(2000), &err), ESRCH, "has exited");
	vmm->ops->finish(vmm);
	for (unsigned i = 0; i < 200 && vmm->ops->run_state(vmm) != FFS_RUN_EXITED; i++)
		poll(NULL, 0, 10);
	assert_int_equal(vmm->ops->run_state(vmm), FFS_RUN_EXITED);
	FAILS(vmm->ops->prepare(vmm, vmstate, &was, &err), ESRCH, "has exited");
	FAILS(vmm->ops->geometry(vmm, &geo, &err), ESRCH, "has exited");
}

static void rescued(void **state)
{
	static const char half[] =
		"{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"in";
	bool was;

	BOOT(false, MICROVM);
	OK(attach(qmp, qemu));
	for (unsigned i = 0; i < 6; i++) {
		_cleanup_close_ int dup = fcntl(vmm->ops->socket(vmm), F_DUPFD_CLOEXEC, 3);
		unsigned generation = vmm->socket_generation;

		OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
		assert_true(was);
		OK(vmm->ops->pause(vmm, in(2000), &err));
		assert_true(status_is("paused"));
		if (i & 1) /* the daemon died in the middle of a command */
			assert_int_equal(
				send(dup, half, sizeof(half) - 1, MSG_NOSIGNAL), (ssize_t)sizeof(half) - 1);
		if (i >= 4) /* or in the middle of a reconnection */
			assert_int_equal(shutdown(dup, SHUT_RDWR), 0);
		assert_int_equal(vmm->ops->rescue(dup, in(2000)), 0);
		assert_true(status_is("running"));
		assert_int_equal(vmm->ops->rescue(dup, in(2000)), 0);
		/* the daemon was only slow, and does not know of the rescue */
		vmm->suspect = true;
		OK(vmm->ops->resume(vmm, in(3000), &err));
		assert_true(vmm->resumed_by_others);
		vmm->ops->finish(vmm);
		assert_true(status_is("running"));
		OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
		assert_true(vmm->socket_generation > generation);
		vmm->ops->finish(vmm);
	}
}

/* Every step fails once: the guest runs afterwards, and the next branch works. */
static void every_fault(void **state)
{
#ifndef FFS_FAULTS
	skip();
#endif
	bool was;
	unsigned failed = 0, in_a_row = 0;

	BOOT(false, MICROVM);
	OK(attach(qmp, qemu));
	for (unsigned n = 1; n < 200 && in_a_row < 3; n++) {
		FILE *f = fopen(fault_file, "w");

		assert_non_null(f);
		fprintf(f, "*@%u error:EIO\n", n);
		assert_int_equal(fclose(f), 0);
		memset(&err, 0, sizeof(err));
		int r = vmm->ops->prepare(vmm, vmstate, &was, &err);
		bool prepared = r == 0;

		if (!r)
			r = vmm->ops->pause(vmm, in(2000), &err);
		if (!r)
			r = vmm->ops->save(vmm, in(2000), &err);
		if (prepared) {
			struct ffs_error e2 = {0};
			int r2 = vmm->ops->resume(vmm, in(2000), &e2);

			if (r2)
				fail_msg("step %u: resume: %d %s (after %s)", n, r2, e2.text, err.text);
			vmm->ops->finish(vmm);
		}
		assert_int_equal(unlink(fault_file), 0);
		if (!status_is("running"))
			fail_msg("step %u left the VM stopped: %s", n, err.text);
		assert_int_equal(ftruncate(vmstate, 0), 0);
		if (r)
			assert_true(err.code && err.text[0]);
		failed += r != 0;
		in_a_row = r ? 0 : in_a_row + 1;
	}
	assert_true(failed >= 15);
	print_message("%u steps failed once each\n", failed);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
		T(cycles),
		T(found_paused),
		T(with_vga),
		T(with_vga_and_disk),
		T(exits),
		T(rescued),
		T(every_fault),
	};

	return run(tests, FFS_ARRAY_LEN(tests));
}
