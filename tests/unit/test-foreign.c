/* Who else could write guest memory, inside the VMM: second mappings, rings, devices, KSM, and things that
 * only look like it. */
#include "foreign-kit.h"

#include <linux/io_uring.h>

static void map_twice(void)
{
	map_at(second, writable, PROT_READ | PROT_WRITE, MAP_SHARED, (off_t)(4 * MIB));
}

static void map_twice_readonly(void)
{
	map_at(second, writable, PROT_READ, MAP_SHARED, 0);
}

/* A hole in the mapping, and the memory mapped where the region says, in several mappings. */
static void map_in_pieces(void)
{
	if (mprotect(ram + MIB, MIB, PROT_READ) < 0 || munmap(ram + 4 * MIB, MIB) < 0)
		_exit(3);
	if (mmap(ram + 4 * MIB, MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, writable,
		    (off_t)(4 * MIB)) == MAP_FAILED)
		_exit(3);
}

static void test_second_mapping(void **s)
{
	struct ffs_proc_id v = start_vmm(map_twice);

	expect(v, FFS_FOREIGN_SECOND_MAPPING, v.pid, "second time");
	target_end(v);
	v = start_vmm(map_twice_readonly);
	nothing(v);
	target_end(v);
	v = start_vmm(map_in_pieces);
	nothing(v);
	target_end(v);
}

/* ---- io_uring ---- */

static uint8_t *ring_buffer;

static void make_ring(void)
{
	struct io_uring_params p = {0};
	struct iovec v[2] = {
		{.iov_base = second, .iov_len = 8192}, {.iov_base = ring_buffer, .iov_len = 8192}};
	int ring = (int)syscall(SYS_io_uring_setup, 8, &p);

	if (mmap(second, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
		second)
		_exit(3);
	if (ring < 0 ||
		(ring_buffer && syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, v, 2) < 0))
		_exit(3);
}

static void test_io_uring(void **s)
{
	struct io_uring_params p = {0};
	int ring = (int)syscall(SYS_io_uring_setup, 8, &p);

	if (ring < 0) {
		print_message("SKIP: io_uring: %s\n", strerror(errno));
		skip();
	}
	close(ring);
	ring_buffer = ram + MIB;
	struct ffs_proc_id v = start_vmm(make_ring);

	expect(v, FFS_FOREIGN_IO_URING, v.pid, "io_uring");
	target_end(v);
	ring_buffer = ram + SIZE - 4096; /* half of it */
	v = start_vmm(make_ring);
	expect(v, FFS_FOREIGN_IO_URING, v.pid, "io_uring");
	target_end(v);
	ring_buffer = second; /* nothing of the guest's */
	v = start_vmm(make_ring);
	nothing(v);
	target_end(v);
	ring_buffer = NULL; /* no buffers */
	v = start_vmm(make_ring);
	nothing(v);
	target_end(v);
}

/* ---- devices ---- */

static char device[128];

static void open_device(void)
{
	if (open(device, O_RDWR | O_CLOEXEC) < 0)
		_exit(3);
}

static void test_devices(void **s)
{
	static const struct {
		const char *dir, *name;
		int kind;
	} cases[] = {
		{"vfio", "12", FFS_FOREIGN_DEVICE},
		{"vfio", "vfio", FFS_FOREIGN_DEVICE},
		{"dev", "iommu", FFS_FOREIGN_DEVICE},
		{"dev", "vhost-vdpa-0", FFS_FOREIGN_DEVICE},
		{"dev", "vhost-net", FFS_FOREIGN_VHOST},
		{"dev", "vhost-vsock", FFS_FOREIGN_VHOST},
		{"vfio", "disk.img", -1}, /* a regular file */
		{"dev", "null", -1},
	};
	char dir[100];

	for (unsigned i = 0; i < FFS_ARRAY_LEN(cases); i++) {
		bool file = strchr(cases[i].name, '.') != NULL;

		snprintf(dir, sizeof(dir), "%s/%s", scratch, cases[i].dir);
		assert_int_equal(mkdir(dir, 0700), 0);
		snprintf(device, sizeof(device), "%.100s/%s", dir, cases[i].name);
		/* what it is named is what counts, so /dev/null will do */
		if (mknod(device, (file ? S_IFREG : S_IFCHR) | 0600, file ? 0 : makedev(1, 3)) < 0) {
			rmdir(dir);
			print_message("SKIP: mknod: %s\n", strerror(errno));
			skip();
		}
		struct ffs_proc_id v = start_vmm(open_device);

		if (cases[i].kind < 0) {
			nothing(v);
		} else
			expect(v, (enum ffs_foreign_kind)cases[i].kind, v.pid, cases[i].name);
		target_end(v);
		unlink(device);
		rmdir(dir);
	}
}

/* ---- KSM ---- */

static void mergeable(void)
{
	if (madvise(anon, SIZE, MADV_MERGEABLE) < 0)
		_exit(3);
}

static void test_ksm(void **s)
{
#ifndef FFS_FAULTS
	skip();
#endif
	struct ffs_geometry geo = geometry(-1);

	if (access("/sys/kernel/mm/ksm/run", R_OK) < 0) {
		print_message("SKIP: no KSM in this kernel\n");
		skip();
	}
	/* as if it were switched on: what it merges is other tests' memory too */
	set_faults(mode, "ksm-run error:EIO\n");
	struct ffs_proc_id v = start_vmm(mergeable);

	err = (struct ffs_error){0};
	assert_int_equal(ffs_foreign_scan(v, &geo, NULL, &f, &took, &err), -EBUSY);
	print_message("%s\n", err.text);
	assert_non_null(found(FFS_FOREIGN_KSM, v.pid));
	assert_non_null(strstr(err.text, "mem-merge=off"));
	/* shared memory is never merged */
	nothing(v);
	target_end(v);
	v = start_vmm(NULL);
	assert_int_equal(ffs_foreign_scan(v, &geo, NULL, &f, &took, &err), 0);
	assert_int_equal(f.processes, 0); /* memory without a file has no other writers */
	set_faults(mode, "");
	target_end(v);
}

static void test_gone(void **s)
{
	struct ffs_proc_id v = start_vmm(NULL);

	target_end(v);
	assert_int_equal(look(v), -ESRCH);
	assert_int_equal(f.refusing, 0);
	assert_non_null(strstr(err.text, "VMM"));
	/* another process with its number */
	v = start_vmm(NULL);
	v.start++;
	assert_int_equal(look(v), -ESRCH);
	v.start--;
	target_end(v);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_second_mapping),
		cmocka_unit_test(test_io_uring),
		cmocka_unit_test(test_devices),
		cmocka_unit_test(test_ksm),
		cmocka_unit_test(test_gone),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
