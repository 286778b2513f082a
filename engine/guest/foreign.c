/* Looks for writers of guest memory that write protection does not trap: here those inside the VMM; the other
 * processes are foreign-walk.c's.
 *
 * Owns nothing. Any thread, no locks. Must not touch a file that the VMM has open (its file system may be
 * ours, or hang): only its name and what the kernel has cached of it. */
#include "guest/foreign.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "guest/foreign-walk.h"
#include "guest/maps.h"

#define RING_TRIES 200u
#define RING_INFO_MAX (16u << 20) /* fdinfo lists every pending entry of the ring */

const char *ffs_foreign_kind_name(enum ffs_foreign_kind kind)
{
	static const char *const names[] = {"mapping", "descriptor", "second-mapping", "device", "io_uring",
		"ksm", "stuck", "vhost", "unreadable"};

	return (unsigned)kind < FFS_ARRAY_LEN(names) ? names[kind] : "unknown";
}

static void read_comm(pid_t pid, char comm[16])
{
	char path[64];
	_cleanup_free_ char *text = NULL;

	snprintf(path, sizeof(path), "/proc/%d/comm", (int)pid);
	if (ffs_read_file(path, 64, &text, NULL) < 0)
		snprintf(comm, 16, "?");
	else
		snprintf(comm, 16, "%.*s", (int)strcspn(text, "\n"), text);
	/* whoever named the process must not write the log's lines or break its JSON */
	for (char *c = comm; *c; c++)
		if (*c < ' ' || *c > '~')
			*c = '?';
}

void ffs_foreign_add(struct ffs_foreign *f, enum ffs_foreign_kind kind, pid_t pid, const char *fmt, ...)
{
	bool refuses = kind < FFS_FOREIGN_FIRST_HARMLESS;
	va_list ap;

	for (unsigned i = 0; i < f->n; i++)
		if (f->list[i].kind == kind && f->list[i].pid == pid)
			return;
	if (f->n == FFS_FOREIGN_MAX) {
		f->dropped++;
		if (!refuses || f->refusing)
			return;
		f->n--; /* the one that refuses must not be the one that found no room */
	}
	struct ffs_foreign_finding *o = &f->list[f->n++];

	f->refusing += refuses;
	o->kind = kind;
	o->pid = pid;
	char comm[16];

	read_comm(pid, comm);
	memcpy(o->comm, comm, sizeof(comm));
	int at = snprintf(o->text, sizeof(o->text), "process %d (%s) ", (int)pid, comm);

	va_start(ap, fmt);
	vsnprintf(o->text + at, sizeof(o->text) - (size_t)at, fmt, ap);
	va_end(ap);
}

const struct ffs_region *ffs_foreign_region(const struct ffs_geometry *geo, uint64_t dev, uint64_t ino,
	uint64_t start, uint64_t end, uint64_t offset, bool hva)
{
	for (unsigned i = 0; ino && i < geo->n_regions; i++) {
		const struct ffs_region *r = &geo->regions[i];
		uint64_t last = offset + (end - start - 1), r_last = r->file_offset + (r->size - 1);

		if (r->ino != ino || r->dev != dev || !r->size || end <= start || last < r->file_offset ||
			r_last < offset)
			continue;
		/* the address of file offset 0, were it mapped: the same for the region and its own mapping
		 */
		if (hva && start - offset == r->hva - r->file_offset)
			continue;
		return r;
	}
	return NULL;
}

/* ---- the VMM's mappings ---- */

static int check_mappings(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign *out,
	struct ffs_error *err)
{
	_cleanup_free_ struct ffs_vma *list = NULL;
	unsigned n = 0;
	int e = ffs_maps_read(vmm.pid, &list, &n);

	if (e < 0)
		return ffs_error_errno(err, -e, "cannot read the mappings of the VMM (pid %d)", (int)vmm.pid);
	for (unsigned i = 0; i < n; i++) {
		const struct ffs_vma *v = &list[i];
		const struct ffs_region *r;

		if (!v->shared || !v->write ||
			!(r = ffs_foreign_region(geo, v->dev, v->ino, v->start, v->end, v->offset, true)))
			continue;
		ffs_foreign_add(out, FFS_FOREIGN_SECOND_MAPPING, vmm.pid,
			"is the VMM and maps its guest memory %s a second time, writable, at %#" PRIx64
			": what it writes there is not trapped; start it without the device or option that "
			"needs "
			"this mapping",
			r->name, v->start);
	}
	return 0;
}

/* ---- the VMM's descriptors ---- */

struct fds {
	struct ffs_proc_id vmm;
	const struct ffs_geometry *geo;
	struct ffs_foreign *out;
};

/* "%5u: 0x%llx/%u", one line a buffer after "UserBufs:" (the kernel's io_uring/fdinfo.c). */
static bool ring_hits(const char *line, const struct ffs_geometry *geo, uint64_t *addr)
{
	unsigned index;
	uint64_t len;

	for (; (line = strchr(line, '\n')) != NULL; line++) {
		if (sscanf(line + 1, "%u: 0x%" SCNx64 "/%" SCNu64, &index, addr, &len) != 3) {
			if (sscanf(line + 1, "%u: <none", &index) == 1)
				continue;
			return false;
		}
		for (unsigned i = 0; i < geo->n_regions; i++) {
			const struct ffs_region *r = &geo->regions[i];

			if (len && (*addr < r->hva ? r->hva - *addr < len : *addr - r->hva < r->size))
				return true;
		}
	}
	return false;
}

static void check_ring(const struct fds *f, const char *number)
{
	char path[80];
	uint64_t addr;

	snprintf(path, sizeof(path), "/proc/%d/fdinfo/%s", (int)f->vmm.pid, number);
	for (unsigned i = 0; i < RING_TRIES; i++) {
		_cleanup_free_ char *text = NULL;
		int e = ffs_read_file(path, RING_INFO_MAX, &text, NULL);
		unsigned n;

		if (e == -ENOENT || e == -ESRCH)
			return;
		const char *bufs = e < 0 ? NULL : strstr(text, "UserBufs:");
		const char *list = bufs ? strchr(bufs, '\n') : NULL;

		/* while somebody works with the ring the kernel leaves out the list, or all of it */
		if (list && sscanf(bufs, "UserBufs: %u", &n) == 1 &&
			(!n || isblank((unsigned char)list[1]) || isdigit((unsigned char)list[1]))) {
			if (n && ring_hits(list, f->geo, &addr))
				ffs_foreign_add(f->out, FFS_FOREIGN_IO_URING, f->vmm.pid,
					"is the VMM and has guest memory at %#" PRIx64
					" registered with io_uring: the pages are pinned and writes into "
					"them "
					"are not trapped; use another aio back end for its disks "
					"(aio=threads)",
					addr);
			return;
		}
		if (e == -EACCES || e == -EPERM)
			break;
		sched_yield();
	}
	ffs_foreign_add(f->out, FFS_FOREIGN_IO_URING, f->vmm.pid,
		"is the VMM and has an io_uring (fd %s) that was too busy to tell whether guest memory is "
		"registered with it: try again, or use another aio back end for its disks (aio=threads)",
		number);
}

static bool is_char_device(int dir, const char *number)
{
	struct statx st;

	return statx(dir, number, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, STATX_TYPE, &st) == 0 &&
	       S_ISCHR(st.stx_mode);
}

static bool starts(const char *s, const char *prefix)
{
	return strncmp(s, prefix, strlen(prefix)) == 0;
}

static int check_fd(void *arg, int dir, const char *number)
{
	/* by the names below their directory: a jailed VMM has its devices under another root */
	static const struct {
		const char *dir, *name;
		bool dma;
	} devices[] = {
		{"/vfio/", "", true},
		{"/devices/", "vfio", true},
		{"/", "iommu", true},
		{"/", "vhost-vdpa", true},
		{"/infiniband/", "uverbs", true},
		{"/", "vhost-net", false},
		{"/", "vhost-vsock", false},
		{"/", "vhost-scsi", false},
	};
	const struct fds *f = arg;
	char link[512];
	ssize_t n = readlinkat(dir, number, link, sizeof(link) - 1);
	bool dma = false, found = false;

	if (n < 0)
		return 0; /* closed meanwhile */
	link[n] = '\0';
	if (strcmp(link, "anon_inode:[io_uring]") == 0) {
		check_ring(f, number);
		return 0;
	}
	if (starts(link, "anon_inode:"))
		found = dma = starts(link + 11, "[vfio") || starts(link + 11, "vfio") ||
			      starts(link + 11, "[kvm-vfio") || starts(link + 11, "kvm-vfio");
	char *base = link[0] == '/' ? strrchr(link, '/') + 1 : NULL;

	for (unsigned i = 0; base && !found && i < FFS_ARRAY_LEN(devices); i++) {
		size_t len = strlen(devices[i].dir);

		if (!starts(base, devices[i].name) || (size_t)(base - link) < len ||
			memcmp(base - len, devices[i].dir, len) != 0)
			continue;
		found = is_char_device(dir, number);
		dma = devices[i].dma;
	}
	for (char *c = link; *c; c++)
		if (*c < ' ' || *c > '~')
			*c = '?';
	if (found && dma)
		ffs_foreign_add(f->out, FFS_FOREIGN_DEVICE, f->vmm.pid,
			"is the VMM and passes a host device through (%.100s): its DMA into guest memory is "
			"not "
			"trapped; remove the device from the VM (device_del) first",
			link);
	else if (found)
		ffs_foreign_add(f->out, FFS_FOREIGN_VHOST, f->vmm.pid,
			"is the VMM and uses in-kernel vhost (%.100s): it writes through the VMM's page "
			"tables and "
			"is stopped with the VM, so branches stay right",
			link);
	return 0;
}

static int check_fds(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign *out,
	struct ffs_error *err)
{
	struct fds f = {.vmm = vmm, .geo = geo, .out = out};
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/fd", (int)vmm.pid);
	_cleanup_close_ int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int e = dir < 0 ? -errno : ffs_foreign_each(dir, check_fd, &f);

	return e == 0 ? 0
		      : ffs_error_errno(
				err, -e, "cannot look at the descriptors of the VMM (pid %d)", (int)vmm.pid);
}

/* ---- KSM ---- */

/* Cheap answers first: KSM is off or not built in; the kernel (6.16) says that this process has no such
 * mapping. */
static bool ksm_may_merge(pid_t pid)
{
	_cleanup_free_ char *run = NULL, *stat = NULL;
	char path[64];
	int e = ffs_read_file("/sys/kernel/mm/ksm/run", 64, &run, NULL);

	/* what is merged already keeps its protection; it is the merging that drops it */
	if (!FFS_FAULT("ksm-run") && (e == -ENOENT || (e == 0 && run[0] != '1')))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/ksm_stat", (int)pid);
	return ffs_read_file(path, 4096, &stat, NULL) < 0 || !strstr(stat, "ksm_mergeable: no");
}

static bool has_flag(const char *flags, const char *flag)
{
	for (const char *f = flags; (f = strstr(f, flag)) != NULL; f++)
		if (f[-1] == ' ' && (f[2] == ' ' || f[2] == '\n' || !f[2]))
			return true;
	return false;
}

static int check_ksm(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign *out,
	struct ffs_error *err)
{
	const struct ffs_region *in = NULL;
	_cleanup_free_ char *line = NULL;
	size_t cap = 0;
	char path[64];
	bool private = false;

	for (unsigned i = 0; i < geo->n_regions; i++)
	private |= geo->regions[i].kind != FFS_REGION_SHARED;
	if (!private || !ksm_may_merge(vmm.pid))
		return 0;
	snprintf(path, sizeof(path), "/proc/%d/smaps", (int)vmm.pid);
	_cleanup_fclose_ FILE *s = fopen(path, "re");

	if (!s)
		return ffs_error_errno(
			err, errno, "cannot read the mappings of the VMM (pid %d)", (int)vmm.pid);
	while (getline(&line, &cap, s) > 0) {
		uint64_t start, end;

		if (!isupper((unsigned char)line[0]) &&
			sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &start, &end) == 2) {
			in = NULL;
			for (unsigned i = 0; i < geo->n_regions; i++) {
				const struct ffs_region *r = &geo->regions[i];

				if (r->kind != FFS_REGION_SHARED && start < r->hva + r->size && end > r->hva)
					in = r;
			}
		} else if (in && starts(line, "VmFlags:") && has_flag(line + 8, "mg"))
			ffs_foreign_add(out, FFS_FOREIGN_KSM, vmm.pid,
				"is the VMM and lets KSM merge its guest memory %s, which drops the "
				"protection "
				"silently: start it with mem-merge=off, or detach and attach it again",
				in->name);
	}
	return 0;
}

/* ---- all of it ---- */

static int by_weight(const void *a, const void *b)
{
	const struct ffs_foreign_finding *x = a, *y = b;
	bool refuses = x->kind < FFS_FOREIGN_FIRST_HARMLESS;

	if (refuses != (y->kind < FFS_FOREIGN_FIRST_HARMLESS))
		return refuses ? -1 : 1;
	if (!refuses && x->kind != y->kind)
		return x->kind < y->kind ? -1 : 1;
	return x->pid != y->pid ? (x->pid > y->pid) - (x->pid < y->pid) : (int)x->kind - (int)y->kind;
}

int ffs_foreign_scan(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign_known **known,
	struct ffs_foreign *out, uint64_t *took_ns, struct ffs_error *err)
{
	uint64_t start = ffs_now_ns();

	memset(out, 0, sizeof(*out));
	int e = FFS_FAULT("foreign-scan");

	if (e < 0)
		ffs_error_errno(err, -e, "cannot look for other writers of the memory of the VMM (pid %d)",
			(int)vmm.pid);
	if (e == 0)
		e = check_mappings(vmm, geo, out, err);
	if (e == 0)
		e = check_fds(vmm, geo, out, err);
	if (e == 0)
		e = check_ksm(vmm, geo, out, err);
	if (e == 0)
		e = ffs_foreign_walk(vmm, geo, known, out, err);
	/* what was read was that process's only if it is still there */
	if (!ffs_proc_alive(vmm))
		e = ffs_error_set(err, ESRCH, "the VMM (pid %d) has exited", (int)vmm.pid);
	qsort(out->list, out->n, sizeof(out->list[0]), by_weight);
	if (took_ns)
		*took_ns = ffs_now_ns() - start;
	if (e < 0)
		out->refusing = 0;
	else if (out->refusing)
		e = ffs_error_set(err, EBUSY, "%s", out->list[0].text);
	return e;
}
