/* Owns nothing: checked wrappers of the UFFDIO ioctls (Documentation/admin-guide/mm/userfaultfd.rst,
 * include/uapi/linux/userfaultfd.h).
 *
 * Threads: any, the watchdog process and the fault handler included: no locks, no allocation, no logging, no
 * file I/O. Each ioctl is bounded to a slice, so that the VMM's mmap lock is held about a millisecond at a
 * time. */
#include "uffd/uffd.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/utsname.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/util.h"

#define SLICE (64ull << 20)

static const uint64_t need = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
			     UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_EVENT_REMOVE |
			     UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP;

int ffs_uffd_api(int uffd, struct ffs_error *err)
{
	struct uffdio_api api = {.api = UFFD_API, .features = need};
	int r = FFS_FAULT("uffd-api");

	if (r == 0 && ioctl(uffd, UFFDIO_API, &api) < 0)
		r = -errno;
	/* EINVAL is the kernel's answer to a feature bit that it does not know (or to a second negotiation).
	 */
	if (r == -EINVAL || (r == 0 && (api.features & need) != need)) {
		struct utsname u = {0};

		if (uname(&u) < 0)
			u.release[0] = '\0';
		return ffs_error_set(err, ENOTSUP,
			"the kernel (%s %s) has no write-protect userfaultfd for shared and never-touched "
			"memory: "
			"Linux 6.4 or later is needed",
			u.sysname, u.release);
	}
	return r ? ffs_error_errno(err, -r, "cannot set up the userfaultfd") : 0;
}

int ffs_uffd_features(int uffd, uint64_t *features)
{
	char path[64];
	_cleanup_free_ char *text = NULL;
	unsigned long long found;
	const char *line;

	/* fs/userfaultfd.c, userfaultfd_show_fdinfo(): version, features in force, features known */
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", uffd);
	int r = ffs_read_file(path, 65536, &text, NULL);

	if (r < 0)
		return r;
	line = strstr(text, "API:");
	if (!line || sscanf(line, "API: %*x:%llx:", &found) != 1)
		return -EPROTO;
	*features = found;
	return 0;
}

int ffs_uffd_api_given(int uffd, struct ffs_error *err)
{
	struct uffdio_api api = {.api = UFFD_API, .features = need};
	uint64_t features;

	if (ioctl(uffd, UFFDIO_API, &api) == 0 && (api.features & need) == need)
		return 0;
	if (ffs_uffd_features(uffd, &features) < 0)
		return ffs_error_set(err, ENOTSUP,
			"the VMM's userfaultfd cannot be used, and the kernel does not say which features it "
			"has");
	if ((features & need) == need)
		return 0;
	return ffs_error_set(err, ENOTSUP,
		"the VMM's userfaultfd was set up with the features %#llx and lacks %#llx (write protection "
		"of "
		"never-touched and shared memory, events of discarded memory): it has to ask UFFDIO_API for "
		"them, "
		"or to leave UFFDIO_API to forkfs",
		(unsigned long long)features, (unsigned long long)(need & ~features));
}

/* Of a process that is gone, REGISTER and UNREGISTER say ENOMEM, which has other meanings, and WRITEPROTECT
 * says ESRCH. Only for ranges that are not, or not to be, protected. */
static bool is_gone(int uffd, uint64_t hva)
{
	struct uffdio_writeprotect wp = {.range = {.start = hva & ~4095ull, .len = 4096}};

	return ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) < 0 && errno == ESRCH;
}

int ffs_uffd_register(int uffd, uint64_t hva, uint64_t len, struct ffs_error *err)
{
	struct uffdio_register reg = {.range = {.start = hva, .len = len}, .mode = UFFDIO_REGISTER_MODE_WP};
	int r = FFS_FAULT("uffd-register");

	uint64_t deadline = ffs_now_ns() + FFS_HELD_NS / 4; /* mkdir waits for it, and has a second */

	/* that of a daemon that was killed goes with the last reference to it */
	while (r == 0 && ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
		if (errno != EBUSY || !ffs_held_again(deadline))
			r = -errno;
	const char *why = "";

	if (r == -ENOMEM && is_gone(uffd, hva))
		r = -ESRCH;
	switch (-r) {
	case 0:
		if (reg.ioctls & (1ull << _UFFDIO_WRITEPROTECT))
			return 0;
		if (ffs_uffd_unregister(uffd, hva, len) == -ESRCH)
			return ffs_error_set(err, ESRCH, "the VM is gone");
		return ffs_error_set(err, ENOTSUP,
			"the kernel cannot write-protect the guest memory at %#llx (%llu bytes): back it "
			"with a memfd or "
			"anonymous memory",
			(unsigned long long)hva, (unsigned long long)len);
	case ESRCH:
		return ffs_error_set(err, ESRCH, "the VM is gone");
	case EBUSY:
		why = " (another userfaultfd has it: a post-copy migration, a snapshot or another forkfs of "
		      "the same VM; end that "
		      "first)";
		break;
	case EINVAL:
		why = " (not mapped any more, or backed by a file system that userfaultfd does not support: "
		      "use a memfd, "
		      "tmpfs or anonymous memory)";
		break;
	case EPERM:
		why = " (the mapping cannot be made writable)";
		break;
	case ENOMEM:
		why = " (part of it is not mapped, or the VMM has too many mappings: vm.max_map_count)";
		break;
	}
	return ffs_error_errno(err, -r,
		"cannot register the guest memory at %#llx (%llu bytes) for write protection%s",
		(unsigned long long)hva, (unsigned long long)len, why);
}

int ffs_uffd_wake(int uffd, uint64_t hva, uint64_t len)
{
	struct uffdio_range range = {.start = hva, .len = len};

	return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

static int unregister_one(int uffd, uint64_t hva, uint64_t len)
{
	struct uffdio_range range = {.start = hva, .len = len};
	int r = ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
	/* The kernel wakes waiters of its own accord for missing-page registrations only. */
	int w = ffs_uffd_wake(uffd, hva, len);

	if (r == -ENOMEM && is_gone(uffd, hva))
		r = -ESRCH;
	return r ? r : w;
}

int ffs_uffd_unregister(int uffd, uint64_t hva, uint64_t len)
{
	int first = 0, r;

	for (uint64_t off = 0; off < len; off += SLICE) {
		uint64_t n = len - off < SLICE ? len - off : SLICE;

		r = unregister_one(uffd, hva + off, n);
		if (r == -ESRCH)
			return r;
		/* One bad slice (a hole that the VMM made) must not keep the others protected. */
		if (r && !first)
			first = r;
	}
	/* Slices of a mapping with 1 GiB pages are misaligned, and splitting one may exceed max_map_count: as
	 * a whole then. */
	if (first && unregister_one(uffd, hva, len) == 0)
		first = 0;
	return first ? first
		     : FFS_FAULT("uffd-unregister"); /* released all the same: the watchdog calls this too */
}

/* One ioctl. EAGAIN means that the VMM is changing its mappings, until the event about it is read: by the
 * fault handler thread, which may be the caller or may wait for a lock of the caller. So it is never retried
 * here. */
static int writeprotect_one(int uffd, uint64_t hva, uint64_t len, uint64_t mode)
{
	struct uffdio_writeprotect wp = {.range = {.start = hva, .len = len}, .mode = mode};

	while (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

static int writeprotect(int uffd, uint64_t hva, uint64_t len, uint64_t mode)
{
	uint64_t off = 0;

	while (off < len) {
		uint64_t n = len - off < SLICE ? len - off : SLICE;
		int r = writeprotect_one(uffd, hva + off, n, mode);

		/* 1 GiB pages: the rest in one piece */
		if (r == -EINVAL && n < len - off) {
			n = len - off;
			r = writeprotect_one(uffd, hva + off, n, mode);
		}
		if (r)
			return r;
		off += n;
	}
	return 0;
}

int ffs_uffd_protect(int uffd, uint64_t hva, uint64_t len)
{
	int r = FFS_FAULT("uffd-protect");

	return r ? r : writeprotect(uffd, hva, len, UFFDIO_WRITEPROTECT_MODE_WP);
}

int ffs_uffd_unprotect(int uffd, uint64_t hva, uint64_t len)
{
	int r = FFS_FAULT("uffd-unprotect");

	return r ? r : writeprotect(uffd, hva, len, 0);
}
