/* doctor: the kernel, our rights, KVM, KSM, huge pages, limits and memory (doctor.h). One thread; reads /proc
 * and /sys, opens devices. */
#include "doctor.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"

/* ---- kernel ---- */

void ffs_doctor_kernel(struct ffs_doctor *d)
{
	unsigned major = 0, minor = 0;
	struct utsname u;

	if (uname(&u) || sscanf(u.release, "%u.%u", &major, &minor) != 2) {
		ffs_doctor_line(d, FFS_FINDING_WARN, "kernel", NULL,
			"its version is not to be read from '%s'", u.release);
		return;
	}
	if (major < 6 || (major == 6 && minor < 4))
		ffs_doctor_line(d, FFS_FINDING_FAIL, "kernel",
			"boot Linux 6.4 or later: older ones do not write-protect pages that were never "
			"touched",
			"Linux %s", u.release);
	else if (major == 6 && minor < 9)
		ffs_doctor_line(d, FFS_FINDING_WARN, "kernel",
			"Linux 6.9 or later serves complete branches by passthrough, at the speed of memory",
			"Linux %s: branches are read through the page cache", u.release);
	else
		ffs_doctor_line(d, FFS_FINDING_OK, "kernel", NULL, "Linux %s", u.release);
}

/* ---- rights ---- */

static bool have_capability(unsigned cap)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {0};

	if (syscall(SYS_capget, &head, data))
		return false;
	return data[cap / 32].effective & (1u << (cap % 32));
}

void ffs_doctor_privileges(struct ffs_doctor *d)
{
	bool admin = have_capability(CAP_SYS_ADMIN), ptrace = have_capability(CAP_SYS_PTRACE);
	long long v;

	if (admin)
		ffs_doctor_line(
			d, FFS_FINDING_OK, "CAP_SYS_ADMIN", NULL, "held: passthrough, seccomp-filtered VMMs");
	else
		ffs_doctor_line(d, FFS_FINDING_WARN, "CAP_SYS_ADMIN",
			"run forkfs mount as root, or with that capability",
			"missing: no passthrough, and a VMM with a seccomp filter (Firecracker, -sandbox on) "
			"cannot be attached");
	if (ptrace)
		ffs_doctor_line(d, FFS_FINDING_OK, "CAP_SYS_PTRACE", NULL, "held: VMMs of any user");
	else
		ffs_doctor_line(d, FFS_FINDING_INFO, "CAP_SYS_PTRACE",
			"run forkfs mount as root for VMMs of other users",
			"missing: only VMMs of this user can be attached");

	v = ffs_doctor_number("/proc/sys/kernel/yama/ptrace_scope");
	if (v <= 0)
		ffs_doctor_line(d, FFS_FINDING_OK, "ptrace scope", NULL,
			v < 0 ? "no Yama in this kernel" : "kernel.yama.ptrace_scope is 0");
	else if (v == 3)
		ffs_doctor_line(d, FFS_FINDING_FAIL, "ptrace scope",
			"boot with kernel.yama.ptrace_scope below 3",
			"kernel.yama.ptrace_scope is 3: nobody may trace, so no VMM can be attached");
	else if (ptrace)
		ffs_doctor_line(d, FFS_FINDING_OK, "ptrace scope", NULL,
			"kernel.yama.ptrace_scope is %lld; CAP_SYS_PTRACE passes it", v);
	else
		ffs_doctor_line(d, FFS_FINDING_FAIL, "ptrace scope",
			"sysctl kernel.yama.ptrace_scope=0, or run forkfs mount as root",
			"kernel.yama.ptrace_scope is %lld: a process may not trace one it did not start", v);

	v = ffs_doctor_number("/proc/sys/vm/unprivileged_userfaultfd");
	if (v == 1)
		ffs_doctor_line(d, FFS_FINDING_OK, "userfaultfd rights", NULL,
			"vm.unprivileged_userfaultfd is 1: every VMM");
	else
		ffs_doctor_line(d, FFS_FINDING_INFO, "userfaultfd rights",
			"for VMMs that do not run as root: give them /dev/userfaultfd, or sysctl "
			"vm.unprivileged_userfaultfd=1",
			"vm.unprivileged_userfaultfd is %lld: a VMM without CAP_SYS_PTRACE needs "
			"/dev/userfaultfd (%s)",
			v, access("/dev/userfaultfd", F_OK) ? "which is missing" : "which is there");
}

/* ---- KVM ---- */

/* The vendor module below kvm: "kvm_intel", "kvm_amd", "kvm_…"; "" when none is loaded. */
static void kvm_module(char *out, size_t size)
{
	DIR *dir = opendir("/sys/module");
	struct dirent *e;

	out[0] = 0;
	while (dir && (e = readdir(dir))) {
		bool known = !strcmp(e->d_name, "kvm_intel") || !strcmp(e->d_name, "kvm_amd");

		if (!known && strncmp(e->d_name, "kvm_", 4))
			continue;
		snprintf(out, size, "%.60s", e->d_name);
		if (known)
			break;
	}
	if (dir)
		closedir(dir);
}

void ffs_doctor_kvm(struct ffs_doctor *d)
{
	_cleanup_close_ int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int code = errno, version = fd >= 0 ? ioctl(fd, KVM_GET_API_VERSION, 0) : -1;
	char module[64];

	kvm_module(module, sizeof(module));
	if (fd < 0)
		ffs_doctor_line(d, FFS_FINDING_WARN, "KVM",
			code == EACCES ? "join the group of /dev/kvm"
				       : "load kvm_intel or kvm_amd, or allow nested virtualisation",
			"/dev/kvm: %s; guests run under TCG, far slower", strerror(code));
	else if (version != KVM_API_VERSION)
		ffs_doctor_line(d, FFS_FINDING_WARN, "KVM", NULL, "/dev/kvm speaks version %d, not %d",
			version, KVM_API_VERSION);
	else if (!strcmp(module, "kvm_intel") || !strcmp(module, "kvm_amd"))
		ffs_doctor_line(d, FFS_FINDING_OK, "KVM", NULL,
			"%s: tests and examples run guests with -accel kvm", module);
	else
		ffs_doctor_line(d, FFS_FINDING_WARN, "KVM",
			"a stock Linux guest may hang in it: give QEMU -accel tcg unless you know that yours "
			"runs",
			"%s: neither kvm_intel nor kvm_amd; tests and examples run guests with -accel tcg",
			module[0] ? module : "built in, of unknown kind");
}

/* ---- memory ---- */

static uint64_t meminfo_bytes(const char *key)
{
	_cleanup_free_ char *text = NULL;
	const char *p;

	if (ffs_read_file("/proc/meminfo", 65536, &text, NULL) < 0)
		return 0;
	p = strstr(text, key);
	return p ? strtoull(p + strlen(key), NULL, 10) * 1024 : 0;
}

static void hugetlb_pools(struct ffs_doctor *d)
{
	DIR *dir = opendir("/sys/kernel/mm/hugepages");
	struct dirent *e;
	bool any = false;

	while (dir && (e = readdir(dir))) {
		char path[360];
		long long all, unused, kib;

		if (sscanf(e->d_name, "hugepages-%lldkB", &kib) != 1)
			continue;
		snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/%s/nr_hugepages", e->d_name);
		all = ffs_doctor_number(path);
		snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/%s/free_hugepages", e->d_name);
		unused = ffs_doctor_number(path);
		if (all <= 0)
			continue;
		any = true;
		ffs_doctor_line(d, FFS_FINDING_OK, "hugetlb pool", NULL, "%lld pages of %lld MiB, %lld free",
			all, kib / 1024, unused);
	}
	if (dir)
		closedir(dir);
	if (!any)
		ffs_doctor_line(d, FFS_FINDING_INFO, "hugetlb pool",
			"sysctl vm.nr_hugepages=N, if guests are to have memory of huge pages",
			"empty: no guest here has its memory in hugetlb pages");
}

void ffs_doctor_memory(struct ffs_doctor *d)
{
	uint64_t available = meminfo_bytes("MemAvailable:"), total = meminfo_bytes("MemTotal:");
	long long ksm = ffs_doctor_number("/sys/kernel/mm/ksm/run");
	char a[32], b[32];
	struct statvfs fs;

	hugetlb_pools(d);
	if (ksm == 1)
		ffs_doctor_line(d, FFS_FINDING_WARN, "KSM",
			"echo 2 >/sys/kernel/mm/ksm/run, or start QEMU with -machine mem-merge=off",
			"is merging: it drops the write protection of private guest memory, so attach takes "
			"that out of KSM's hands");
	else
		ffs_doctor_line(d, FFS_FINDING_OK, "KSM", NULL,
			ksm < 0 ? "not in this kernel" : "does not merge (run is %lld)", ksm);

	ffs_doctor_line(d, available < 512ull << 20 ? FFS_FINDING_WARN : FFS_FINDING_OK, "memory",
		available < 512ull << 20 ? "free some: a branch in memory takes up to what its guest has"
					 : NULL,
		"%s of %s available", ffs_format_bytes(a, available), ffs_format_bytes(b, total));
	if (statvfs("/dev/shm", &fs))
		ffs_doctor_line(d, FFS_FINDING_INFO, "/dev/shm", NULL,
			"%s (branches do not need it: they are memfds)", strerror(errno));
	else
		ffs_doctor_line(d, FFS_FINDING_INFO, "/dev/shm", NULL,
			"%s of %s free (branches do not count: they are memfds)",
			ffs_format_bytes(a, (uint64_t)fs.f_bavail * fs.f_frsize),
			ffs_format_bytes(b, (uint64_t)fs.f_blocks * fs.f_frsize));
}

/* ---- limits ---- */

void ffs_doctor_limits(struct ffs_doctor *d)
{
	long long maps = ffs_doctor_number("/proc/sys/vm/max_map_count");
	bool lock_any = have_capability(CAP_IPC_LOCK);
	struct rlimit lock, files;
	char a[32];

	if (!getrlimit(RLIMIT_MEMLOCK, &lock)) {
		bool enough = lock_any || lock.rlim_cur == RLIM_INFINITY || lock.rlim_cur >= 8u << 20;

		ffs_doctor_line(d, enough ? FFS_FINDING_OK : FFS_FINDING_WARN, "locked memory",
			enough ? NULL : "ulimit -l 65536, or LimitMEMLOCK= of the service",
			"RLIMIT_MEMLOCK is %s%s",
			lock.rlim_cur == RLIM_INFINITY ? "unlimited" : ffs_format_bytes(a, lock.rlim_cur),
			lock_any ? "; CAP_IPC_LOCK passes it" : "");
	}
	if (!getrlimit(RLIMIT_NOFILE, &files))
		ffs_doctor_line(d, files.rlim_max < 4096 ? FFS_FINDING_WARN : FFS_FINDING_OK, "open files",
			files.rlim_max < 4096 ? "ulimit -Hn 65536, or LimitNOFILE= of the service" : NULL,
			"RLIMIT_NOFILE is %llu, at most %llu", (unsigned long long)files.rlim_cur,
			(unsigned long long)files.rlim_max);
	if (maps >= 0)
		ffs_doctor_line(d, maps < 65530 ? FFS_FINDING_WARN : FFS_FINDING_OK, "mappings",
			maps < 65530 ? "sysctl vm.max_map_count=262144: write protection of parts of a VM "
				       "splits its mappings"
				     : NULL,
			"vm.max_map_count is %lld", maps);
}
