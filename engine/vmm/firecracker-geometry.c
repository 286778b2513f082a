/* Where the memory of a Firecracker's guest is: its API gives the size and no address. Owns nothing. Called
 * by the driver's caller, outside any pause.
 *
 * Regions by size (arch/x86_64 arch_memory_regions): [0, 3 GiB), [4 GiB, 256 GiB), [512 GiB, …), packed in
 * that order in a memory file; the low one was [0, 3.25 GiB) before 1.13, and still is in a VM that was restored
 * from such a snapshot. A mapping need not be a region: the kernel merges neighbours, also a region
 * with the allocator's arena behind it, and the high region may lie below the low one. So the low region is
 * found by what Firecracker puts into it, the ACPI RSDP at 0xe0000 (since 1.8) or the MP table at 0x9fc00, in
 * mappings that are large enough; a region is aligned to 2 MiB (HEAD), or begins with its mapping (guard
 * pages on both sides, up to 1.10). A guest that was restored from a file maps it: there the offset tells. A
 * place that is not the only one possible is refused. */
#include "vmm/api.h"

#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "guest/maps.h"

#define GIB (1ull << 30)
#define STEP (2ull << 20)
#define LOW (3 * GIB)
#define EARLY_LOW (4 * GIB - (768ull << 20))
#define MAX_SPANS 256
#define MAX_MIB (1022ull << 10) /* Firecracker's own limit */
#define RSDP 0xe0000ull
#define MP_TABLE 0x9fc00ull

/* Neighbouring mappings of the same kind: what the kernel may have split. */
struct span {
	uint64_t start, end, dev, ino, offset;
	bool huge, shared;
};

struct search {
	struct ffs_api *d;
	struct span span[MAX_SPANS];
	unsigned n;
};

static bool follows(const struct span *s, const struct ffs_vma *v, bool huge)
{
	return s->end == v->start && s->dev == v->dev && s->ino == v->ino && s->huge == huge &&
	       s->shared == v->shared && (!v->ino || s->offset + (s->end - s->start) == v->offset);
}

static int read_spans(struct search *k, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_vma *vma = NULL;
	pid_t pid = k->d->vmm.proc.pid;
	unsigned n = 0;
	int r = ffs_maps_read(pid, &vma, &n);

	if (r < 0)
		return ffs_error_errno(err, -r, "the mappings of Firecracker %d", (int)pid);
	for (unsigned i = 0; i < n; i++) {
		const struct ffs_vma *v = &vma[i];
		bool huge = strncmp(v->name, "/anon_hugepage", 14) == 0;

		if (!v->read || !v->write)
			continue;
		if (k->n && follows(&k->span[k->n - 1], v, huge)) {
			k->span[k->n - 1].end = v->end;
			continue;
		}
		/* small ones make room: no region is smaller than a MiB */
		if (k->n && k->span[k->n - 1].end - k->span[k->n - 1].start < 1u << 20)
			k->n--;
		if (k->n == MAX_SPANS)
			return ffs_error_set(err, ENOTSUP, "process %d has more than %d large mappings",
				(int)pid, MAX_SPANS);
		k->span[k->n++] = (struct span){v->start, v->end, v->dev, v->ino, v->offset, huge, v->shared};
	}
	return 0;
}

static bool holds(pid_t pid, uint64_t at, const char *what, size_t len)
{
	char buf[8];
	struct iovec l = {buf, len}, r = {(void *)(uintptr_t)at, len};

	return process_vm_readv(pid, &l, 1, &r, 1, 0) == (ssize_t)len && memcmp(buf, what, len) == 0;
}

static bool is_low(pid_t pid, uint64_t at)
{
	return holds(pid, at + RSDP, "RSD PTR ", 8) || holds(pid, at + MP_TABLE, "_MP_", 4);
}

struct place {
	const struct span *span;
	uint64_t at;
	unsigned found;  /* how many there are */
	uint64_t beside; /* the last of them that touches the low region */
	unsigned n_beside;
};

/* low: by content; else the only one that is free. `taken` is the low region, for which that place is no
 * choice. */
static void try_span(const struct search *k, const struct span *s, uint64_t size, bool low,
	const struct ffs_region *taken, struct place *p)
{
	uint64_t last = s->end - size;

	/* each aligned address, and the very start, which may not be aligned */
	for (uint64_t at = s->start; at <= last; at = at % STEP ? (at + STEP - 1) & ~(STEP - 1) : at + STEP) {
		if (low ? !is_low(k->d->vmm.proc.pid, at)
			: at < taken->hva + taken->size && taken->hva < at + size)
			continue;
		/* an unaligned start is a region of its own mapping, or none */
		if (!low && at % STEP && s->end - s->start != size)
			continue;
		p->span = s;
		p->at = at;
		p->found++;
		if (taken && (at + size == taken->hva || at == taken->hva + taken->size)) {
			p->beside = at;
			p->n_beside++;
		}
	}
}

static int say_not_one(
	const struct search *k, const char *what, uint64_t size, unsigned found, struct ffs_error *err)
{
	return ffs_error_set(err, ENOTSUP,
		"the guest memory of Firecracker %d cannot be told from its other mappings: %u places are "
		"possible for "
		"its %s %" PRIu64 " MiB",
		(int)k->d->vmm.proc.pid, found, what, size >> 20);
}

static int find_region(const struct search *k, uint64_t size, uint64_t offset, const struct ffs_region *taken,
	struct place *p, struct ffs_error *err)
{
	const char *what = taken ? "high" : "low";

	*p = (struct place){0};
	/* a mapping of a file says itself which part it is */
	for (unsigned i = 0; i < k->n; i++) {
		const struct span *s = &k->span[i];

		if (s->ino && !s->huge && s->end - s->start == size && s->offset == offset &&
			(taken ? s->ino == taken->ino && s->dev == taken->dev
			       : is_low(k->d->vmm.proc.pid, s->start))) {
			p->span = s;
			p->at = s->start;
			p->found++;
		}
	}
	if (p->found)
		return p->found == 1 ? 0 : say_not_one(k, what, size, p->found, err);
	for (unsigned i = 0; i < k->n; i++)
		if (k->span[i].end - k->span[i].start >= size && (!k->span[i].ino || k->span[i].huge))
			try_span(k, &k->span[i], size, !taken, taken, p);
	/* Firecracker maps its regions one right after the other, and the kernel then puts the second against
	 * the first: other candidates are that one moved into a thread's stack that was merged with it. */
	if (p->found > 1 && p->n_beside == 1) {
		p->found = 1;
		p->at = p->beside;
		for (unsigned i = 0; i < k->n; i++)
			if (p->at >= k->span[i].start && p->at < k->span[i].end)
				p->span = &k->span[i];
	}
	return p->found == 1 ? 0 : say_not_one(k, what, size, p->found, err);
}

static int check_region(struct search *k, const struct place *p, struct ffs_region *r, struct ffs_error *err)
{
	pid_t pid = k->d->vmm.proc.pid;
	char flags[128];
	int e = ffs_smaps_flags(pid, p->at, flags, &r->page_size);

	if (e < 0)
		return ffs_error_errno(err, -e, "the mappings of Firecracker %d", (int)pid);
	if (strstr(flags, "um") || strstr(flags, "uw"))
		return ffs_error_set(err, EBUSY,
			"the guest memory of Firecracker %d has a userfaultfd already (restored with the "
			"Uffd backend, or "
			"attached by another forkfs): a mapping can have one; restore it with the File "
			"backend from a "
			"tmpfs or from a settled branch",
			(int)pid);
	if (p->span->ino && !p->span->huge && k->d->balloon)
		return ffs_error_set(err, ENOTSUP,
			"Firecracker %d was restored from a file and has a balloon, which replaces parts of "
			"the mapping: "
			"its memory cannot be branched",
			(int)pid);
	r->hva = p->at;
	r->dev = p->span->dev;
	r->ino = p->span->ino;
	r->file_offset = r->ino ? p->span->offset + (p->at - p->span->start) : 0;
	r->kind = p->span->shared                  ? FFS_REGION_SHARED
		  : p->span->ino && !p->span->huge ? FFS_REGION_PRIVATE
						   : FFS_REGION_ANONYMOUS;
	r->mergeable = strstr(flags, "mg") != NULL;
	return 0;
}

static int memory_size(struct ffs_api *d, uint64_t *out, struct ffs_error *err)
{
	struct json_object *config = NULL, *v;
	int r = ffs_api_get(d, "/machine-config", ffs_now_ns() + FFS_API_CALL_NS, &config, err);
	int64_t mib = 0;

	if (r)
		return r;
	if (config && json_object_object_get_ex(config, "mem_size_mib", &v) &&
		json_object_is_type(v, json_type_int))
		mib = json_object_get_int64(v);
	json_object_put(config);
	if (mib < 2 || (uint64_t)mib > MAX_MIB)
		return ffs_error_set(err, EPROTO, "Firecracker %d does not say how much memory its guest has",
			(int)d->vmm.proc.pid);
	*out = (uint64_t)mib << 20;
	return 0;
}

/* Memory that is plugged in later is a region of its own, of which the API does not say which parts are
 * there. */
static int check_devices(struct ffs_api *d, struct ffs_error *err)
{
	struct json_object *config = NULL, *v;
	int r = ffs_api_get(d, "/vm/config", ffs_now_ns() + FFS_API_CALL_NS, &config, err);

	if (r)
		return r;
	if (config && json_object_object_get_ex(config, "memory-hotplug", &v) && v)
		r = ffs_error_set(err, ENOTSUP,
			"Firecracker %d has a memory-hotplug device, whose memory cannot be branched: start "
			"the VM without "
			"it",
			(int)d->vmm.proc.pid);
	json_object_put(config);
	return r;
}

static int fill(
	struct search *k, struct ffs_geometry *geo, uint64_t size, uint64_t low_size, struct ffs_error *err)
{
	const struct {
		uint64_t gpa, size;
		const char *name;
	} parts[] = {{0, low_size, "low"}, {4 * GIB, 252 * GIB, "high"}};
	struct place p;

	memset(geo, 0, sizeof(*geo));
	for (unsigned i = 0; size; i++) {
		if (i == FFS_ARRAY_LEN(parts))
			return ffs_error_set(err, ENOTSUP,
				"a Firecracker guest with more than 255 GiB cannot be branched");
		struct ffs_region *r = &geo->regions[i];

		r->size = size < parts[i].size ? size : parts[i].size;
		r->offset = geo->memory_size;
		snprintf(r->name, sizeof(r->name), "%s", parts[i].name);
		int e = find_region(k, r->size, r->offset, i ? &geo->regions[0] : NULL, &p, err);

		if (!e)
			e = check_region(k, &p, r, err);
		if (e)
			return e;
		geo->ranges[i] =
			(struct ffs_gpa_range){.gpa = parts[i].gpa, .size = r->size, .offset = r->offset};
		geo->n_regions = geo->n_ranges = i + 1;
		geo->memory_size += r->size;
		size -= r->size;
	}
	return 0;
}

/* As its version has it, else as the other versions do. */
static int fill_by_version(struct search *k, struct ffs_geometry *geo, uint64_t size, struct ffs_error *err)
{
	unsigned major = 0, minor = 0;
	bool early = sscanf(k->d->version, "%u.%u", &major, &minor) == 2 && major == 1 && minor < 13;
	uint64_t low = early ? EARLY_LOW : LOW, other = early ? LOW : EARLY_LOW;
	struct ffs_error first = {0};
	int r = fill(k, geo, size, low, &first);

	if (r == -ENOTSUP && size > LOW && fill(k, geo, size, other, NULL) == 0)
		return 0;
	return r < 0 ? ffs_error_set(err, first.code, "%s", first.text) : 0;
}

int ffs_fc_geometry(struct ffs_vmm *vmm, struct ffs_geometry *out, struct ffs_error *err)
{
	struct ffs_api *d = ffs_api_of(vmm);
	_cleanup_free_ struct ffs_geometry *geo = calloc(1, sizeof(*geo));
	_cleanup_free_ struct search *k = calloc(1, sizeof(*k));
	uint64_t size = 0;
	int r = FFS_FAULT("vmm-geometry");

	if (r)
		return ffs_error_set(err, -r, "fault point vmm-geometry");
	if (!geo || !k)
		return ffs_error_set(err, ENOMEM, "no memory for a geometry");
	k->d = d;
	r = ffs_api_ensure(d, ffs_now_ns() + FFS_API_CALL_NS, err);
	if (!r)
		r = memory_size(d, &size, err);
	if (!r)
		r = check_devices(d, err);
	if (!r)
		r = read_spans(k, err);
	if (!r)
		r = fill_by_version(k, geo, size, err);
	if (!r && !ffs_proc_alive(vmm->proc))
		r = ffs_error_set(err, ESRCH, "Firecracker %d has exited", (int)vmm->proc.pid);
	if (!r)
		*out = *geo;
	return r;
}
