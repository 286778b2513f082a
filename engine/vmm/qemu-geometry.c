/* Guest memory of a QEMU: what it says (qemu-blocks.c) against what the kernel says (/proc/PID/maps, smaps).
 * Either both agree on address, size and file of each RAM block, or there is no geometry.
 *
 * memory.bin is the concatenation of the guest's RAM blocks in the order of their offset in QEMU's RAM
 * address space, so that it equals the backend's file where there is one backend. Called by the driver's
 * caller; no locks; slow (smaps): never in a pause. */
#include "vmm/qemu.h"

#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "guest/maps.h"

#define FUSE_MAGIC 0x65735546 /* include/uapi/linux/magic.h FUSE_SUPER_MAGIC, newer than these headers */

/* Whether the base of DIMMs and the machine's own memory adds up to what we found. */
static int check_total(struct ffs_qemu *d, const struct ffs_qemu_blocks *b, struct ffs_error *err)
{
	struct json_object *ret = NULL;
	uint64_t sum = 0;
	int r = ffs_qemu_call(
		d, "query-memory-size-summary", NULL, -1, ffs_now_ns() + FFS_QEMU_CALL_NS, &ret, err);

	if (r)
		return r;
	int64_t base = ffs_json_int(ret, "base-memory", -1), plugged = ffs_json_int(ret, "plugged-memory", 0);

	json_object_put(ret);
	for (unsigned i = 0; i < b->n; i++)
		if (b->block[i].guest && ffs_add_overflow(sum, b->block[i].size, &sum))
			return ffs_error_set(err, EPROTO, "QEMU's memory sizes overflow");
	if (base < 0 || plugged < 0 || (uint64_t)base + (uint64_t)plugged != sum)
		return ffs_error_set(err, ENOTSUP,
			"the guest has %lld + %lld MiB of memory and its memory backends %" PRIu64
			" MiB: virtio-mem, nvdimm and ivshmem are not supported, start the VM without them",
			(long long)base >> 20, (long long)plugged >> 20, sum >> 20);
	return 0;
}

/* ---- one region against the kernel's mappings ---- */

static int mismatch(const struct ffs_qemu_block *b, const char *what, struct ffs_error *err)
{
	return ffs_error_set(err, ENOTSUP, "RAM block %.64s (0x%" PRIx64 " + %" PRIu64 " MiB): %s", b->name,
		b->hva, b->size >> 20, what);
}

/* The file behind a mapping: write protection works on some file systems only (measured: tmpfs, memfd,
 * hugetlbfs; FUSE where it passes through to those, which only registering finds out). */
static int check_file(
	pid_t pid, const struct ffs_qemu_block *b, const struct ffs_vma *v, struct ffs_error *err)
{
	char path[96];
	struct statfs fs;
	struct stat st;

	snprintf(path, sizeof(path), "/proc/%d/map_files/%" PRIx64 "-%" PRIx64, (int)pid, v->start, v->end);
	if (statfs(path, &fs) < 0 || stat(path, &st) < 0) {
		int e = errno;

		return ffs_error_errno(
			err, e, "look at the file behind RAM block %.64s (CAP_SYS_ADMIN is needed)", b->name);
	}
	if (fs.f_type != TMPFS_MAGIC && fs.f_type != HUGETLBFS_MAGIC &&
		(v->shared || fs.f_type != FUSE_MAGIC))
		return mismatch(b,
			"its file is on a file system without write-protect faults: use "
			"memory-backend-memfd, or a mem-path in /dev/shm",
			err);
	uint64_t end;

	if (ffs_add_overflow(v->offset + (b->hva - v->start), b->size, &end) || (uint64_t)st.st_size < end)
		return mismatch(b, "its file is shorter than the block", err);
	return 0;
}

static bool continues(const struct ffs_vma *a, const struct ffs_vma *b)
{
	return a->end == b->start && a->shared == b->shared && a->dev == b->dev && a->ino == b->ino &&
	       (!a->ino || a->offset + (a->end - a->start) == b->offset);
}

static int map_region(pid_t pid, const struct ffs_qemu_block *b, const struct ffs_vma *vma, unsigned n,
	struct ffs_region *reg, struct ffs_error *err)
{
	uint64_t end;
	unsigned i = 0;

	if (!b->hva || ffs_add_overflow(b->hva, b->size, &end))
		return mismatch(b, "QEMU does not say where it is: is it mapped for the guest?", err);
	while (i < n && vma[i].end <= b->hva)
		i++;
	if (i == n || vma[i].start > b->hva)
		return mismatch(b, "nothing is mapped there in the VMM", err);
	const struct ffs_vma *first = &vma[i];

	*reg = (struct ffs_region){.hva = b->hva, .size = b->size, .dev = first->dev, .ino = first->ino};
	snprintf(reg->name, sizeof(reg->name), "%s", b->name);
	reg->file_offset = first->ino ? first->offset + (b->hva - first->start) : 0;
	reg->kind = !first->ino     ? FFS_REGION_ANONYMOUS
		    : first->shared ? FFS_REGION_SHARED
				    : FFS_REGION_PRIVATE;
	if (first->shared != b->shared)
		return mismatch(b,
			b->shared ? "share=on, but the mapping is private"
				  : "share=off, but the mapping is shared",
			err);
	for (uint64_t at = b->hva; at < end; at = vma[i++].end) {
		char flags[128];
		uint64_t page_size;

		if (i == n || (&vma[i] != first && !continues(&vma[i - 1], &vma[i])))
			return mismatch(b, "the VMM's mappings do not cover it in one piece", err);
		if (!vma[i].read || !vma[i].write)
			return mismatch(b, "part of it is not writable by the VMM", err);
		int r = ffs_smaps_flags(pid, at, flags, &page_size);

		if (r)
			return ffs_error_errno(err, -r, "smaps of process %d", (int)pid);
		if (&vma[i] == first)
			reg->page_size = page_size;
		if (page_size != reg->page_size || (page_size & (page_size - 1)) || b->hva % page_size ||
			b->size % page_size)
			return mismatch(b, "its size and address are not whole pages of its mapping", err);
		for (const char *f = flags; (f = strstr(f, "mg")) != NULL; f += 2)
			reg->mergeable |= (f == flags || f[-1] == ' ') && (f[2] == ' ' || !f[2]);
	}
	if (reg->page_size != b->page_size)
		return mismatch(b, "QEMU and the kernel disagree on its page size", err);
	return first->ino ? check_file(pid, b, first, err) : 0;
}

static int check_overlaps(const struct ffs_geometry *geo, struct ffs_error *err)
{
	for (unsigned i = 0; i < geo->n_regions; i++)
		for (unsigned j = 0; j < i; j++) {
			const struct ffs_region *a = &geo->regions[i], *b = &geo->regions[j];

			if (a->hva < b->hva + b->size && b->hva < a->hva + a->size)
				return ffs_error_set(err, EPROTO,
					"RAM blocks %.64s and %.64s overlap in the VMM", b->name, a->name);
			if (a->ino && a->kind == FFS_REGION_SHARED && a->dev == b->dev && a->ino == b->ino &&
				a->file_offset < b->file_offset + b->size &&
				b->file_offset < a->file_offset + a->size)
				return ffs_error_set(err, ENOTSUP,
					"RAM blocks %.64s and %.64s are the same bytes of one file: give "
					"each its own",
					b->name, a->name);
		}
	return 0;
}

/* A write through another mapping of the same file is seen by no write protection of ours. */
static int check_aliases(
	const struct ffs_geometry *geo, const struct ffs_vma *vma, unsigned n, struct ffs_error *err)
{
	for (unsigned i = 0; i < n; i++)
		for (unsigned j = 0; j < geo->n_regions; j++) {
			const struct ffs_region *r = &geo->regions[j];
			const struct ffs_vma *v = &vma[i];
			bool own = false;

			if (r->kind != FFS_REGION_SHARED || !v->shared || !v->write || v->dev != r->dev ||
				v->ino != r->ino || v->offset >= r->file_offset + r->size ||
				r->file_offset >= v->offset + (v->end - v->start))
				continue;
			for (unsigned k = 0; k < geo->n_regions; k++)
				own |= v->start >= geo->regions[k].hva &&
				       v->end <= geo->regions[k].hva + geo->regions[k].size;
			if (!own)
				return ffs_error_set(err, ENOTSUP,
					"the VMM maps the file of RAM block %.64s a second time, writable, "
					"at 0x%" PRIx64 ": writes through it would be missed; start the VM "
					"without the device that does that",
					r->name, v->start);
		}
	return 0;
}

static int read_regions(
	struct ffs_qemu *d, const struct ffs_qemu_blocks *b, struct ffs_geometry *geo, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_vma *vma = NULL;
	pid_t pid = d->vmm.proc.pid;
	unsigned n = 0;
	int r = ffs_maps_read(pid, &vma, &n);

	if (r)
		return ffs_error_errno(err, -r, "the mappings of QEMU %d", (int)pid);
	for (unsigned i = 0; i < b->n; i++) {
		if (!b->block[i].guest)
			continue;
		if (geo->n_regions == FFS_MAX_REGIONS)
			return ffs_error_set(
				err, ENOTSUP, "the guest has more than %d memory backends", FFS_MAX_REGIONS);
		struct ffs_region *reg = &geo->regions[geo->n_regions];

		r = map_region(pid, &b->block[i], vma, n, reg, err);
		if (r)
			return r;
		reg->offset = geo->memory_size;
		geo->memory_size += reg->size;
		geo->n_regions++;
	}
	r = check_overlaps(geo, err);
	return r ? r : check_aliases(geo, vma, n, err);
}

int ffs_qemu_geometry(struct ffs_vmm *vmm, struct ffs_geometry *out, struct ffs_error *err)
{
	struct ffs_qemu *d = ffs_qemu_of(vmm);
	_cleanup_free_ struct ffs_qemu_blocks *b = malloc(sizeof(*b));
	_cleanup_free_ struct ffs_geometry *geo = calloc(1, sizeof(*geo));
	int r = FFS_FAULT("vmm-geometry");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-geometry");
	if (!b || !geo)
		return ffs_error_set(err, ENOMEM, "no memory for a geometry");
	r = ffs_qemu_ensure(d, err);
	if (r)
		return r;
	ffs_qmp_claim(d->q);
	r = ffs_qemu_read_blocks(d, b, err);
	if (!r)
		r = check_total(d, b, err);
	if (!r)
		r = ffs_qemu_read_ranges(d, b, geo, err);
	ffs_qmp_release(d->q);
	if (!r)
		r = read_regions(d, b, geo, err);
	if (!r && !ffs_proc_alive(vmm->proc))
		r = ffs_error_set(err, ESRCH, "QEMU %d has exited", (int)vmm->proc.pid);
	if (!r)
		*out = *geo;
	return r;
}
