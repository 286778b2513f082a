/* What the QEMU driver finds of a VM: guest memory of every kind, against what QEMU itself reads; the
 * monitor; the process. */
#include "qemu-kit.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "guest/memory.h"

/* ---- geometry ---- */

static void check_shape(uint64_t size)
{
	uint64_t sum = 0;

	assert_int_equal(geo.memory_size, size);
	for (unsigned i = 0; i < geo.n_regions; i++) {
		assert_int_equal(geo.regions[i].offset, sum);
		sum += geo.regions[i].size;
	}
	assert_int_equal(sum, size);
	assert_true(geo.n_ranges > 0);
	for (unsigned i = 0; i < geo.n_ranges; i++)
		assert_true(geo.ranges[i].offset + geo.ranges[i].size <= size);
}

/* What QEMU reads at a guest-physical address is what memory.bin has at its offset. */
static void compare_at(struct ffs_memory *m, uint64_t gpa, uint64_t len)
{
	char args[256], path[128], *want = malloc(len), *have = calloc(1, len);
	bool zero;

	snprintf(path, sizeof(path), "%s/mem", dir);
	snprintf(args, sizeof(args), "{\"val\":%llu,\"size\":%llu,\"filename\":\"%s\"}",
		(unsigned long long)gpa, (unsigned long long)len, path);
	tell("pmemsave", args);
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);

	assert_int_equal(ffs_pread_full(fd, want, len, 0), (ssize_t)len);
	for (unsigned i = 0; i < geo.n_ranges; i++) {
		const struct ffs_gpa_range *g = &geo.ranges[i];

		if (gpa < g->gpa || gpa + len > g->gpa + g->size)
			continue;
		uint64_t off = g->offset + (gpa - g->gpa);

		for (unsigned r = 0; r < geo.n_regions; r++)
			if (off >= geo.regions[r].offset &&
				off + len <= geo.regions[r].offset + geo.regions[r].size) {
				OK(ffs_memory_read(m, r, off - geo.regions[r].offset, have, len, &zero));
				if (zero)
					memset(have, 0, len);
				assert_memory_equal(want, have, len);
				free(want);
				free(have);
				return;
			}
	}
	fail_msg("no range for 0x%llx", (unsigned long long)gpa);
}

static void microvm(void **state)
{
	BOOT(false, MICROVM, "-S");
	OK(attach(qmp, 0));
	assert_int_equal(vmm->proc.pid, qemu);
	assert_int_equal(vmm->ops->run_state(vmm), FFS_RUN_PAUSED);
	OK(vmm->ops->geometry(vmm, &geo, &err));
	check_shape(128 * MIB);
	assert_int_equal(geo.n_regions, 1);
	assert_int_equal(geo.regions[0].kind, FFS_REGION_SHARED);
	assert_string_equal(geo.regions[0].name, "ram0");
	assert_false(geo.regions[0].mergeable && geo.regions[0].kind != FFS_REGION_SHARED);

	struct json_object *o = json_object_new_object(), *v;

	vmm->ops->describe(vmm, o);
	assert_true(json_object_object_get_ex(o, "command_line", &v));
	assert_string_equal(json_object_get_string(json_object_array_get_idx(v, 0)), QEMU);
	assert_true(json_object_object_get_ex(o, "accelerator", &v));
	assert_string_equal(json_object_get_string(v), "tcg");
	assert_true(json_object_object_get_ex(o, "vmstate_kind", &v));
	assert_string_equal(json_object_get_string(v), "xen-save");
	assert_true(json_object_object_get_ex(o, "version", &v));
	json_object_put(o);
}

static void q35_sparse(void **state)
{
	static char buf[MIB];
	struct stat a, b;
	bool zero;
	unsigned high = 0;

	BOOT(false, "-M", "q35,memory-backend=ram0", "-nodefaults", "-m", "5G", "-object",
		"memory-backend-memfd,id=ram0,size=5G,share=on");
	OK(attach(qmp, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	check_shape(5 * GIB);
	assert_int_equal(geo.n_regions, 1);
	for (unsigned i = 0; i < geo.n_ranges; i++)
		if (geo.ranges[i].gpa >= 4 * GIB) {
			high++;
			assert_int_equal(geo.ranges[i].gpa, 4 * GIB);
			assert_int_equal(geo.ranges[i].offset + geo.ranges[i].size, 5 * GIB);
		}
	assert_int_equal(high, 1);
	tell("stop", NULL);

	struct ffs_memory *m;
	char path[64];

	OK(ffs_memory_open(vmm->proc, &geo, &m, &err));
	/* a mark above the hole, by the file */
	_cleanup_close_ int fd = -1;

	for (int i = 0; i < 256 && fd < 0; i++) {
		snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)qemu, i);
		if (stat(path, &a) == 0 && a.st_ino == geo.regions[0].ino && a.st_dev == geo.regions[0].dev)
			fd = open(path, O_RDWR | O_CLOEXEC);
	}
	assert_true(fd >= 0);
	assert_int_equal(a.st_size, (off_t)(5 * GIB));
	assert_int_equal(
		pwrite(fd, "above the hole", 14, (off_t)(geo.ranges[geo.n_ranges - 1].offset + 12345)), 14);
	compare_at(m, geo.ranges[geo.n_ranges - 1].gpa, 65536);
	compare_at(m, 0, 640 << 10);
	compare_at(m, MIB, 4 * MIB);
	assert_int_equal(fstat(fd, &a), 0);
	for (uint64_t off = 0; off < 5 * GIB; off += MIB)
		OK(ffs_memory_read(m, 0, off, buf, MIB, &zero));
	assert_int_equal(fstat(fd, &b), 0);
	assert_int_equal(a.st_blocks, b.st_blocks);
	assert_true(b.st_blocks < 2 * 65536); /* 64 MiB */
	OK(ffs_memory_check(m, &err));
	ffs_memory_close(m);
}

static void pc_numa(void **state)
{
	BOOT(false, "-M", "pc", "-nodefaults", "-m", "4G", "-smp", "2", "-object",
		"memory-backend-ram,id=m0,size=2G", "-object", "memory-backend-memfd,id=m1,size=2G,share=on",
		"-numa", "node,memdev=m0,cpus=0", "-numa", "node,memdev=m1,cpus=1");
	OK(attach(NULL, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	check_shape(4 * GIB);
	assert_int_equal(geo.n_regions, 2);
	assert_string_equal(geo.regions[0].name, "m0");
	assert_int_equal(geo.regions[0].kind, FFS_REGION_ANONYMOUS);
	assert_int_equal(geo.regions[1].kind, FFS_REGION_SHARED);
	tell("stop", NULL);
	struct ffs_memory *m;

	OK(ffs_memory_open(vmm->proc, &geo, &m, &err));
	compare_at(m, 0, 640 << 10);
	compare_at(m, 2 * GIB, MIB);
	compare_at(m, geo.ranges[geo.n_ranges - 1].gpa, MIB);
	ffs_memory_close(m);
}

static void plain_with_vga(void **state)
{
	bool was;

	BOOT(false, "-M", "pc", "-m", "512M");
	OK(attach(NULL, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	check_shape(512 * MIB);
	assert_int_equal(geo.n_regions, 1);
	assert_int_equal(geo.regions[0].kind, FFS_REGION_ANONYMOUS);
	assert_string_equal(geo.regions[0].name, "pc.ram");
	/* QEMU asks for KSM on its memory, and the kernel may be built without it */
	assert_int_equal(geo.regions[0].mergeable, access("/sys/kernel/mm/ksm/run", F_OK) == 0);
	tell("stop", NULL);
	struct ffs_memory *m;

	OK(ffs_memory_open(vmm->proc, &geo, &m, &err));
	compare_at(m, 0, 640 << 10);
	compare_at(m, MIB, 4 * MIB);
	compare_at(m, 508 * MIB, 4 * MIB);
	ffs_memory_close(m);
	tell("cont", NULL);
	FAILS(vmm->ops->prepare(vmm, vmstate, &was, &err), ENOTSUP, "-vga none");
	assert_non_null(strstr(err.text, "vga.vram"));
	assert_true(status_is("running"));
}

static void private_file(void **state)
{
	char path[96] = "/dev/shm/ffs-test-qemu.XXXXXX", arg[200];
	int fd = mkstemp(path);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)(128 * MIB)), 0);
	assert_int_equal(pwrite(fd, "from the file", 13, (off_t)(64 * MIB)), 13);
	close(fd);
	snprintf(arg, sizeof(arg), "memory-backend-file,id=ram0,size=128M,mem-path=%s,share=off", path);
	BOOT(false, "-M", "pc,memory-backend=ram0,mem-merge=off", "-nodefaults", "-m", "128M", "-object",
		arg);
	unlink(path);
	OK(attach(qmp, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	check_shape(128 * MIB);
	assert_int_equal(geo.regions[0].kind, FFS_REGION_PRIVATE);
	assert_false(geo.regions[0].mergeable);
	tell("stop", NULL);
	struct ffs_memory *m;
	char buf[64];
	bool zero;

	OK(ffs_memory_open(vmm->proc, &geo, &m, &err));
	OK(ffs_memory_read(m, 0, 64 * MIB, buf, sizeof(buf), &zero));
	assert_false(zero);
	assert_memory_equal(buf, "from the file", 13);
	compare_at(m, 0, 640 << 10);
	compare_at(m, 64 * MIB, MIB);
	compare_at(m, 127 * MIB, MIB);
	ffs_memory_close(m);
}

static void huge_pages(void **state)
{
	char *text = NULL;
	unsigned long free_pages = 0;

	assert_int_equal(ffs_read_file("/proc/meminfo", 65536, &text, NULL), 0);
	char *at = strstr(text, "HugePages_Free:");

	if (at)
		free_pages = strtoul(at + 15, NULL, 10);
	free(text);
	if (free_pages < 64)
		skip();
	BOOT(false, "-M", "pc,memory-backend=ram0", "-nodefaults", "-m", "128M", "-object",
		"memory-backend-memfd,id=ram0,size=128M,share=on,hugetlb=on,hugetlbsize=2M");
	OK(attach(qmp, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	check_shape(128 * MIB);
	assert_int_equal(geo.regions[0].page_size, 2 * MIB);
	assert_int_equal(geo.regions[0].kind, FFS_REGION_SHARED);
	tell("stop", NULL);
	struct ffs_memory *m;

	OK(ffs_memory_open(vmm->proc, &geo, &m, &err));
	compare_at(m, 0, 640 << 10);
	compare_at(m, 126 * MIB, 2 * MIB);
	ffs_memory_close(m);
}

static void file_on_disk(void **state)
{
	char arg[200];
	struct statfs fs;

	assert_int_equal(statfs(dir, &fs), 0);
	if (fs.f_type == 0x01021994)
		skip();
	snprintf(arg, sizeof(arg), "memory-backend-file,id=ram0,size=128M,mem-path=%s/mem,share=on", dir);
	BOOT(false, "-M", "pc,memory-backend=ram0", "-nodefaults", "-m", "128M", "-object", arg, "-S");
	OK(attach(qmp, qemu));
	FAILS(vmm->ops->geometry(vmm, &geo, &err), ENOTSUP, "memory-backend-memfd");
}

/* ---- which monitor, which process ---- */

static void by_pid(void **state)
{
	bool was;

	/* a relative name, pretty printing, and a comma in a name that is another option's */
	BOOT(true, MICROVM, "-name", "a,,b=-qmp", "-qmp-pretty", "unix:pretty,server=on,wait=off");
	OK(attach(NULL, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	OK(vmm->ops->prepare(vmm, vmstate, &was, &err));
	OK(vmm->ops->pause(vmm, in(2000), &err));
	OK(vmm->ops->save(vmm, in(2000), &err));
	OK(vmm->ops->resume(vmm, in(2000), &err));
	vmm->ops->finish(vmm);
}

static void by_pid_chardev(void **state)
{
	BOOT(true, MICROVM, "-chardev", "socket,id=hm,path=hmp,server=on,wait=off", "-mon", "chardev=hm",
		"-chardev", "socket,id=mon0,path=mon,server=on,wait=off", "-mon", "mon0,mode=control");
	OK(attach(NULL, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
	vmm->ops->close(vmm);
	vmm = NULL;
	/* a human monitor is no QMP */
	char path[96];

	snprintf(path, sizeof(path), "%s/hmp", dir);
	FAILS(attach(path, 0), ENOTSUP, "human monitor");
}

static void by_pid_abstract(void **state)
{
	char arg[128];

	snprintf(arg, sizeof(arg), "socket,id=mon0,path=%s-abstract,abstract=on,server=on,wait=off", dir);
	BOOT(true, MICROVM, "-chardev", arg, "-mon", "chardev=mon0,mode=control");
	OK(attach(NULL, qemu));
	OK(vmm->ops->geometry(vmm, &geo, &err));
}

static void busy(void **state)
{
	char want[64];

	BOOT(true, MICROVM);
	uint64_t t = ffs_now_ns();

	snprintf(want, sizeof(want), "process %d", (int)getpid());
	FAILS(attach(qmp2, 0), EBUSY, want);
	assert_non_null(strstr(err.text, "-qmp unix:"));
	assert_true(ffs_now_ns() - t < 4 * FFS_NS_PER_S);
	FAILS(attach(NULL, qemu), EBUSY, want);
}

static void no_vmm(void **state)
{
	char path[96];

	extra = spawn((const char *const[]){"sleep", "1000", NULL});
	/* until it is sleep and no copy of us */
	for (unsigned i = 0; i < 200; i++) {
		char *text = NULL;

		snprintf(path, sizeof(path), "/proc/%d/comm", (int)extra);
		if (ffs_read_file(path, 100, &text, NULL) == 0 && strncmp(text, "sleep", 5) == 0)
			i = 200;
		free(text);
		poll(NULL, 0, 10);
	}
	FAILS(attach(NULL, extra), ENOTSUP, "(sleep) is no VMM");
	FAILS(attach(NULL, 0x3ffffff), ESRCH, "no process");
	snprintf(path, sizeof(path), "%s/none", dir);
	FAILS(attach(path, 0), ENOENT, "no socket");
	FAILS(attach(NULL, 0), EINVAL, "pid or its QMP socket");
	BOOT(false, MICROVM, "-S");
	FAILS(attach(qmp, extra), EINVAL, "not to process");
	kill(extra, SIGKILL);
	FAILS(attach(qmp, 0x3ffffff), ESRCH, "no process");
	kill_vm();
	FAILS(attach(qmp, 0), ECONNREFUSED, "nobody serves");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
		T(microvm),
		T(q35_sparse),
		T(pc_numa),
		T(plain_with_vga),
		T(private_file),
		T(huge_pages),
		T(file_on_disk),
		T(by_pid),
		T(by_pid_chardev),
		T(by_pid_abstract),
		T(busy),
		T(no_vmm),
	};

	return run(tests, FFS_ARRAY_LEN(tests));
}
