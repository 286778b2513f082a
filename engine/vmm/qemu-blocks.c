/* What QEMU says about its memory: RAM blocks, memory backends, the flat view, host addresses. Text of the
 * human monitor, parsed strictly; qemu-geometry.c believes none of it before /proc agrees.
 *
 * Called by the driver's caller. No locks. Formats: QEMU's softmmu/physmem.c (ram_block_format),
 * softmmu/memory.c (mtree_print_flatview), monitor/misc.c (hmp_gpa2hva). */
#include "vmm/qemu.h"

#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"

/* ---- RAM blocks ---- */

/* Take the last word off a line: a pointer to it, or NULL. */
static char *last_word(char *line)
{
	size_t n = strlen(line);

	while (n && (line[n - 1] == ' ' || line[n - 1] == '\r'))
		line[--n] = '\0';
	char *sp = strrchr(line, ' ');

	if (!n)
		return NULL;
	if (sp)
		*sp = '\0';
	return sp ? sp + 1 : line;
}

static bool take_hex(char *line, uint64_t *out)
{
	char *w = last_word(line), *end;

	if (!w || strncmp(w, "0x", 2) != 0)
		return false;
	errno = 0;
	*out = strtoull(w + 2, &end, 16);
	return !*end && !errno;
}

static bool take_page_size(char *line, uint64_t *out)
{
	char *unit = last_word(line);
	char *number = unit ? last_word(line) : NULL;
	char *end;

	if (!number)
		return false;
	errno = 0;
	*out = strtoull(number, &end, 10);
	uint64_t mult = strcmp(unit, "KiB") == 0   ? 1ull << 10
			: strcmp(unit, "MiB") == 0 ? 1ull << 20
			: strcmp(unit, "GiB") == 0 ? 1ull << 30
			: strcmp(unit, "B") == 0   ? 1
						   : 0;

	return !*end && !errno && *out < 4096 && mult && !ffs_mul_overflow(*out, mult, out) && *out >= 4096;
}

static bool parse_block(char *line, bool has_hva, bool has_ro, struct ffs_qemu_block *b)
{
	if ((has_ro && !last_word(line)) || (has_hva && !take_hex(line, &b->hva)) ||
		!take_hex(line, &b->max_size) || !take_hex(line, &b->size) || !take_hex(line, &b->offset) ||
		!take_page_size(line, &b->page_size))
		return false;
	line += strspn(line, " ");
	size_t n = strlen(line);

	while (n && line[n - 1] == ' ')
		line[--n] = '\0';
	/* a name that is cut could be taken for another */
	if (!n || n >= sizeof(b->name))
		return false;
	memcpy(b->name, line, n + 1);
	return true;
}

static int by_offset(const void *a, const void *b)
{
	const struct ffs_qemu_block *x = a, *y = b;

	return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int parse_blocks(struct ffs_qemu *d, char *text, struct ffs_qemu_blocks *out, struct ffs_error *err)
{
	char *save = NULL;
	char *line = strtok_r(text, "\n", &save);

	if (!line || !strstr(line, "Block Name"))
		return ffs_error_set(err, ENOTSUP,
			"QEMU %d does not know \"info ramblock\": version 2.10 or later is needed",
			(int)d->vmm.proc.pid);
	bool has_hva = strstr(line, "HVA") != NULL, has_ro = strstr(line, " RO") != NULL;

	out->n = 0;
	while ((line = strtok_r(NULL, "\n", &save)) != NULL) {
		if (!line[strspn(line, " \r")])
			continue;
		if (out->n == FFS_QEMU_MAX_BLOCKS)
			return ffs_error_set(err, ENOTSUP, "QEMU %d has more than %d RAM blocks",
				(int)d->vmm.proc.pid, FFS_QEMU_MAX_BLOCKS);
		struct ffs_qemu_block *b = &out->block[out->n];

		*b = (struct ffs_qemu_block){0};
		if (!parse_block(line, has_hva, has_ro, b))
			return ffs_error_set(err, EPROTO,
				"QEMU %d: \"info ramblock\" has a line that is not understood: %.80s",
				(int)d->vmm.proc.pid, line);
		out->n++;
	}
	qsort(out->block, out->n, sizeof(out->block[0]), by_offset);
	for (unsigned i = 0; i < out->n; i++)
		for (unsigned j = 0; j < i; j++)
			if (strcmp(out->block[i].name, out->block[j].name) == 0)
				return ffs_error_set(err, EPROTO, "QEMU %d names two RAM blocks %.64s",
					(int)d->vmm.proc.pid, out->block[i].name);
	return 0;
}

/* The block of a backend: named by its id, or by its path where the machine type is old. */
static struct ffs_qemu_block *block_of(struct ffs_qemu_blocks *b, const char *id)
{
	for (unsigned i = 0; i < b->n; i++) {
		const char *name = b->block[i].name;

		if (strcmp(name, id) == 0 ||
			(strncmp(name, "/objects/", 9) == 0 && strcmp(name + 9, id) == 0))
			return &b->block[i];
	}
	return NULL;
}

static int mark_guest(struct ffs_qemu *d, struct ffs_qemu_blocks *out, struct ffs_error *err)
{
	struct json_object *ret = NULL;
	int r = ffs_qemu_call(d, "query-memdev", NULL, -1, ffs_now_ns() + FFS_QEMU_CALL_NS, &ret, err);

	if (r)
		return r;
	unsigned n = 0;

	for (size_t i = 0; json_object_is_type(ret, json_type_array) && i < json_object_array_length(ret);
		i++) {
		struct json_object *dev = json_object_array_get_idx(ret, i);
		const char *id = ffs_json_str(dev, "id");
		struct ffs_qemu_block *b = id ? block_of(out, id) : NULL;

		/* a backend without a block is used by nobody */
		if (!b)
			continue;
		if (b->size != b->max_size || b->size != (uint64_t)ffs_json_int(dev, "size", -1))
			r = ffs_error_set(err, ENOTSUP,
				"the memory backend %.64s has %lld bytes and its RAM block %" PRIu64
				" of %" PRIu64 ": memory that is resized cannot be branched",
				id, (long long)ffs_json_int(dev, "size", -1), b->size, b->max_size);
		b->guest = true;
		b->shared = ffs_json_bool(dev, "share", false);
		n++;
	}
	json_object_put(ret);
	if (!r && !n)
		r = ffs_error_set(err, ENOTSUP,
			"QEMU %d has no memory backend: version 5.0 or later is needed",
			(int)d->vmm.proc.pid);
	return r;
}

int ffs_qemu_read_blocks(struct ffs_qemu *d, struct ffs_qemu_blocks *out, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	int r = ffs_qemu_hmp(d, "info ramblock", &text, err);

	if (!r)
		r = parse_blocks(d, text, out, err);
	if (!r)
		r = mark_guest(d, out, err);
	return r;
}

/* ---- the flat view ---- */

struct view_line {
	uint64_t start, last, offset;
	char name[64];
	bool ram; /* writable now; else rom (or a shadow of RAM that is read-only now) */
};

/* "  0000000000100000-00000000bfffffff (prio 0, ram): m0 @0000000000100000 KVM" */
static bool parse_view_line(const char *line, struct view_line *v)
{
	char kind[24];
	int at = 0;

	if (sscanf(line, " %" SCNx64 "-%" SCNx64 " (prio %*d, %23[^)]): %n", &v->start, &v->last, kind, &at) <
			3 ||
		!at)
		return false;
	v->ram = strcmp(kind, "ram") == 0;
	if (!v->ram && strcmp(kind, "rom") != 0)
		return false;
	const char *name = line + at;
	const char *mark = strstr(name, " @");
	size_t n = mark ? (size_t)(mark - name) : strlen(name);

	v->offset = 0;
	if (mark && sscanf(mark, " @%" SCNx64, &v->offset) != 1)
		return false;
	if (!mark && n > 4 && strcmp(name + n - 4, " KVM") == 0)
		n -= 4;
	while (n && (name[n - 1] == ' ' || name[n - 1] == '\r'))
		n--;
	if (!n || n >= sizeof(v->name) || v->last < v->start)
		return false;
	memcpy(v->name, name, n);
	v->name[n] = '\0';
	return true;
}

/* "Host virtual address for 0x0 (ram0) is 0x7f6423fff000" */
static int ask_hva(
	struct ffs_qemu *d, const struct view_line *v, struct ffs_qemu_block *b, struct ffs_error *err)
{
	char line[64];
	_cleanup_free_ char *text = NULL;
	uint64_t hva;

	snprintf(line, sizeof(line), "gpa2hva 0x%" PRIx64, v->start);
	int r = ffs_qemu_hmp(d, line, &text, err);

	if (r)
		return r;
	const char *is = strstr(text, ") is 0x");

	if (!is || sscanf(is, ") is 0x%" SCNx64, &hva) != 1 || hva < v->offset)
		return ffs_error_set(err, EAGAIN,
			"QEMU %d does not say where %s is in its memory (%.100s): try again",
			(int)d->vmm.proc.pid, v->name, text);
	hva -= v->offset;
	if (b->hva && b->hva != hva)
		return ffs_error_set(err, EPROTO,
			"QEMU %d says that RAM block %.64s is at 0x%" PRIx64 " and at 0x%" PRIx64
			" of its memory",
			(int)d->vmm.proc.pid, b->name, b->hva, hva);
	b->hva = hva;
	return 0;
}

/* Offset in memory.bin of a guest block. */
static uint64_t memory_offset(const struct ffs_qemu_blocks *b, const struct ffs_qemu_block *of)
{
	uint64_t sum = 0;

	for (const struct ffs_qemu_block *i = b->block; i < of; i++)
		if (i->guest)
			sum += i->size;
	return sum;
}

static int add_range(struct ffs_qemu *d, struct ffs_qemu_blocks *b, const struct view_line *v,
	struct ffs_geometry *geo, struct ffs_error *err)
{
	struct ffs_qemu_block *block = block_of(b, v->name);
	uint64_t size = v->last - v->start + 1, end;

	if (!block && strncmp(v->name, "/objects/", 9) == 0)
		block = block_of(b, v->name + 9);
	if (!block || !block->guest)
		return 0;
	if (!size || ffs_add_overflow(v->offset, size, &end) || end > block->size)
		return ffs_error_set(err, EPROTO, "QEMU %d maps more of RAM block %.64s than it has",
			(int)d->vmm.proc.pid, block->name);
	if (geo->n_ranges == FFS_MAX_GPA_RANGES)
		return ffs_error_set(err, ENOTSUP, "the guest's memory lies in more than %d physical ranges",
			FFS_MAX_GPA_RANGES);
	geo->ranges[geo->n_ranges++] = (struct ffs_gpa_range){
		.gpa = v->start, .size = size, .offset = memory_offset(b, block) + v->offset};
	/* the large pieces: what firmware maps and unmaps below 1 MiB may have moved since */
	if (v->ram && (size >= 1 << 20 || size == block->size))
		return ask_hva(d, v, block, err);
	return 0;
}

int ffs_qemu_read_ranges(
	struct ffs_qemu *d, struct ffs_qemu_blocks *b, struct ffs_geometry *geo, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	int r = ffs_qemu_hmp(d, "info mtree -f", &text, err);
	char *save = NULL;
	bool found = false, in_view = false;

	geo->n_ranges = 0;
	for (char *line = r ? NULL : strtok_r(text, "\n", &save); line && !r;
		line = strtok_r(NULL, "\n", &save)) {
		struct view_line v;

		if (strncmp(line, "FlatView #", 10) == 0)
			in_view = false;
		else if (strncmp(line, " AS \"memory\",", 13) == 0)
			in_view = found = true;
		else if (in_view && parse_view_line(line, &v))
			r = add_range(d, b, &v, geo, err);
	}
	if (!r && !found)
		r = ffs_error_set(err, ENOTSUP,
			"QEMU %d shows no address space \"memory\": version 2.10 or later is needed",
			(int)d->vmm.proc.pid);
	return r;
}
