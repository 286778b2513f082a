/* Owns the offsets of the kernel's structures, read once from its type information (BTF), constant from then
 * on. Any thread. Source of the format: the kernel's Documentation/bpf/btf.rst. */
#include "guest/foreign-btf.h"

#include <errno.h>
#include <linux/btf.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/util.h"

#define BTF_MAX (64u << 20)
#define FIRST_PID_NAMESPACE 0xEFFFFFFCu /* PROC_PID_INIT_INO: elsewhere the kernel's numbers are not ours */

static struct ffs_btf_kernel kernel;
static int kernel_error;
static pthread_once_t kernel_once = PTHREAD_ONCE_INIT;

struct btf {
	char *data;
	size_t len;
	const char *types, *strings;
	uint32_t types_len, strings_len, n;
	uint32_t *at; /* offset of each type id; [0] is void */
};

/* Bytes of a type, its tail included; 0 for a kind that we do not know. */
static size_t type_size(const struct btf_type *t)
{
	static const unsigned char tail[][2] = {/* once, per member */
		[BTF_KIND_INT] = {4, 0},
		[BTF_KIND_PTR] = {0, 0},
		[BTF_KIND_ARRAY] = {12, 0},
		[BTF_KIND_STRUCT] = {0, 12},
		[BTF_KIND_UNION] = {0, 12},
		[BTF_KIND_ENUM] = {0, 8},
		[BTF_KIND_FWD] = {0, 0},
		[BTF_KIND_TYPEDEF] = {0, 0},
		[BTF_KIND_VOLATILE] = {0, 0},
		[BTF_KIND_CONST] = {0, 0},
		[BTF_KIND_RESTRICT] = {0, 0},
		[BTF_KIND_FUNC] = {0, 0},
		[BTF_KIND_FUNC_PROTO] = {0, 8},
		[BTF_KIND_VAR] = {4, 0},
		[BTF_KIND_DATASEC] = {0, 12},
		[BTF_KIND_FLOAT] = {0, 0},
		[BTF_KIND_DECL_TAG] = {4, 0},
		[BTF_KIND_TYPE_TAG] = {0, 0},
		[BTF_KIND_ENUM64] = {0, 12}};
	unsigned kind = BTF_INFO_KIND(t->info);

	if (!kind || kind >= FFS_ARRAY_LEN(tail))
		return 0;
	return sizeof(*t) + tail[kind][0] + (size_t)tail[kind][1] * BTF_INFO_VLEN(t->info);
}

static const struct btf_type *type_of(const struct btf *b, uint32_t id)
{
	return id && id <= b->n ? (const struct btf_type *)(b->types + b->at[id]) : NULL;
}

static const char *name_of(const struct btf *b, uint32_t off)
{
	return off < b->strings_len ? b->strings + off : "";
}

static int btf_index(struct btf *b)
{
	const struct btf_header *h = (const struct btf_header *)b->data;

	if (b->len < sizeof(*h) || h->magic != BTF_MAGIC || h->hdr_len > b->len ||
		h->type_off > b->len - h->hdr_len || h->type_len > b->len - h->hdr_len - h->type_off ||
		h->str_off > b->len - h->hdr_len || h->str_len > b->len - h->hdr_len - h->str_off ||
		!h->str_len || b->data[h->hdr_len + h->str_off + h->str_len - 1])
		return -EPROTO;
	b->types = b->data + h->hdr_len + h->type_off;
	b->types_len = h->type_len;
	b->strings = b->data + h->hdr_len + h->str_off;
	b->strings_len = h->str_len;
	b->at = malloc(sizeof(*b->at) * (h->type_len / sizeof(struct btf_type) + 1));
	if (!b->at)
		return -ENOMEM;
	for (uint32_t off = 0; off < b->types_len;) {
		if (b->types_len - off < sizeof(struct btf_type))
			return -EPROTO;
		size_t n = type_size((const struct btf_type *)(b->types + off));

		if (!n || n > b->types_len - off)
			return -EPROTO;
		b->at[++b->n] = off;
		off += (uint32_t)n;
	}
	return 0;
}

/* Byte offset of a member, in unnamed structures and unions inside too; -1. */
static long member(const struct btf *b, const struct btf_type *t, const char *name, unsigned depth)
{
	const struct btf_member *m = (const struct btf_member *)(t + 1);

	for (unsigned i = 0; i < BTF_INFO_VLEN(t->info); i++) {
		uint32_t bits = BTF_INFO_KFLAG(t->info) ? BTF_MEMBER_BIT_OFFSET(m[i].offset) : m[i].offset;
		const struct btf_type *in = type_of(b, m[i].type);

		if (strcmp(name_of(b, m[i].name_off), name) == 0)
			return bits % 8 ? -1 : (long)(bits / 8);
		if (m[i].name_off || !in || depth > 4)
			continue;
		unsigned kind = BTF_INFO_KIND(in->info);
		long o = kind == BTF_KIND_STRUCT || kind == BTF_KIND_UNION ? member(b, in, name, depth + 1)
									   : -1;

		if (o >= 0)
			return o + (long)(bits / 8);
	}
	return -1;
}

/* A member that is wanted, and where its offset goes. */
struct wanted {
	const char *in, *name;
	uint32_t *to;
};

/* A bit for each of `want` that the structure has, in its order. */
static unsigned find_members(
	const struct btf *b, const struct btf_type *t, const struct wanted *want, unsigned n, unsigned found)
{
	const char *name = name_of(b, t->name_off);

	for (unsigned i = 0; i < n; i++) {
		long o = strcmp(want[i].in, name) == 0 ? member(b, t, want[i].name, 0) : -1;

		/* offsets are 16 bits of an instruction */
		if (o < 0 || o > INT16_MAX || found & 1u << i)
			continue;
		*want[i].to = (uint32_t)o;
		found |= 1u << i;
	}
	return found;
}

static int find_all(const struct btf *b)
{
	uint32_t f_count = 0;
	const struct wanted want[] = {
		{"file", "f_inode", &kernel.f_inode},
		{"file", "f_mode", &kernel.f_mode},
		{"inode", "i_ino", &kernel.i_ino},
		{"inode", "i_sb", &kernel.i_sb},
		{"super_block", "s_dev", &kernel.s_dev},
		{"inode", "i_mapping", &kernel.i_mapping},
		{"address_space", "i_mmap_writable", &kernel.i_mmap_writable},
		{"task_struct", "tgid", &kernel.tgid},
		{"vm_area_struct", "vm_file", &kernel.vm_file},
		{"vm_area_struct", "vm_flags", &kernel.vm_flags},
		{"vm_area_struct", "vm_start", &kernel.vm_start},
		{"vm_area_struct", "vm_end", &kernel.vm_end},
		{"vm_area_struct", "vm_pgoff", &kernel.vm_pgoff},
	};
	/* one of the last two */
	const struct wanted counts[] = {
		{"inode", "i_writecount", &kernel.i_writecount},
		{"inode", "i_nlink", &kernel.i_nlink},
		{"task_struct", "files", &kernel.task_files},
		{"files_struct", "count", &kernel.files_count},
		{"task_struct", "pid", &kernel.task_pid},
		{"file", "f_ref", &kernel.f_ref},
		{"file", "f_count", &f_count},
	};
	const unsigned n_counts = FFS_ARRAY_LEN(counts), before = (1u << (n_counts - 2)) - 1;
	unsigned found = 0, counted = 0;

	for (uint32_t id = 1; id <= b->n; id++) {
		const struct btf_type *t = type_of(b, id);
		unsigned kind = BTF_INFO_KIND(t->info);
		const char *name = name_of(b, t->name_off);

		if (kind == BTF_KIND_FUNC && strncmp(name, "bpf_iter_task_", 14) == 0) {
			if (strcmp(name + 14, "file") == 0)
				kernel.file_iter = id;
			else if (strcmp(name + 14, "vma") == 0)
				kernel.vma_iter = id;
		}
		if (kind == BTF_KIND_STRUCT) {
			found = find_members(b, t, want, FFS_ARRAY_LEN(want), found);
			counted = find_members(b, t, counts, n_counts, counted);
		}
	}
	kernel.f_ref_from_0 = counted & 1u << (n_counts - 2);
	if (!kernel.f_ref_from_0)
		kernel.f_ref = f_count;
	kernel.counts = (counted & before) == before && counted >> (n_counts - 2);
	return kernel.file_iter && kernel.vma_iter && found == (1u << FFS_ARRAY_LEN(want)) - 1 ? 0 : -ENOTSUP;
}

static void learn_kernel(void)
{
	struct btf b = {0};
	struct stat st;

	kernel_error = -ENOTSUP;
	if (stat("/proc/self/ns/pid", &st) < 0 || st.st_ino != FIRST_PID_NAMESPACE)
		return;
	kernel_error = ffs_read_file("/sys/kernel/btf/vmlinux", BTF_MAX, &b.data, &b.len);
	if (kernel_error >= 0)
		kernel_error = btf_index(&b);
	if (kernel_error == 0)
		kernel_error = find_all(&b);
	free(b.at);
	free(b.data);
}

int ffs_btf_kernel(const struct ffs_btf_kernel **out)
{
	pthread_once(&kernel_once, learn_kernel);
	*out = &kernel;
	return kernel_error;
}
