/* Owns the offsets of the kernel's structures, read once from its type information (BTF), constant from then
 * on. Any thread. A program is some 40 instructions, made for the inodes that are looked for, loaded, and
 * gone with the iterator. Sources of the formats: the kernel's Documentation/bpf/btf.rst, bpf_iterators.rst,
 * include/uapi/linux/bpf.h. */
#include "guest/foreign-bpf.h"

#include <errno.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"

#define BTF_MAX (64u << 20)
#define INODES_MAX 16u
#define FIRST_PID_NAMESPACE 0xEFFFFFFCu /* PROC_PID_INIT_INO: elsewhere the kernel's numbers are not ours */

/* ---- type information ---- */

static struct {
	int error;
	uint32_t file_iter, vma_iter; /* type ids of the two iterators */
	uint32_t f_inode, f_mode, i_ino, i_sb, s_dev, i_mapping, i_mmap_writable, tgid, vm_file, vm_flags,
		vm_start, vm_end, vm_pgoff;
} kernel;
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

static int find_all(const struct btf *b)
{
	const struct {
		const char *in, *name;
		uint32_t *to;
	} want[] = {
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
	unsigned found = 0;

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
		for (unsigned i = 0; kind == BTF_KIND_STRUCT && i < FFS_ARRAY_LEN(want); i++) {
			long o = strcmp(want[i].in, name) == 0 ? member(b, t, want[i].name, 0) : -1;

			/* offsets are 16 bits of an instruction */
			if (o < 0 || o > INT16_MAX || found & 1u << i)
				continue;
			*want[i].to = (uint32_t)o;
			found |= 1u << i;
		}
	}
	return kernel.file_iter && kernel.vma_iter && found == (1u << FFS_ARRAY_LEN(want)) - 1 ? 0 : -ENOTSUP;
}

static void learn_kernel(void)
{
	struct btf b = {0};
	struct stat st;

	kernel.error = -ENOTSUP;
	if (stat("/proc/self/ns/pid", &st) < 0 || st.st_ino != FIRST_PID_NAMESPACE)
		return;
	kernel.error = ffs_read_file("/sys/kernel/btf/vmlinux", BTF_MAX, &b.data, &b.len);
	if (kernel.error >= 0)
		kernel.error = btf_index(&b);
	if (kernel.error == 0)
		kernel.error = find_all(&b);
	free(b.at);
	free(b.data);
}

/* ---- programs ---- */

struct program {
	struct bpf_insn insn[64 + 4 * INODES_MAX];
	unsigned n;
};

static struct bpf_insn *emit(struct program *p, uint8_t code, uint8_t dst, uint8_t src, int off, int32_t imm)
{
	struct bpf_insn *i = &p->insn[p->n++];

	*i = (struct bpf_insn){.code = code, .dst_reg = dst, .src_reg = src, .off = (int16_t)off, .imm = imm};
	return i;
}

static void load(struct program *p, uint8_t size, uint8_t dst, uint8_t src, uint32_t off)
{
	emit(p, BPF_LDX | BPF_MEM | size, dst, src, (int)off, 0);
}

/* A field of the record, which lies at the end of the stack frame. */
static void store(struct program *p, uint8_t size, size_t field, uint8_t src)
{
	emit(p, BPF_STX | BPF_MEM | size, 10, src, (int)field - (int)sizeof(struct ffs_bpf_record), 0);
}

static uint32_t kernel_dev(uint64_t dev)
{
	return (uint32_t)major(dev) << 20 | (uint32_t)minor(dev); /* MKDEV of include/linux/kdev_t.h */
}

/* r6 iter's meta, r7 task, r8 file or vma, r9 file, later inode; r1 ino, r2 dev. The context is an array of
 * pointers (struct bpf_iter__task_file, bpf_iter__task_vma). Jumps to the end are filled in last. */
static void build(struct program *p, const struct ffs_geometry *geo, bool mappings)
{
	unsigned out[8], n_out = 0, hit[INODES_MAX], n_hit = 0;
	enum { EQ = BPF_JMP | BPF_JEQ | BPF_K, NE = BPF_JMP | BPF_JNE | BPF_K };

	load(p, BPF_DW, 6, 1, 0);
	load(p, BPF_DW, 7, 1, 8);
	load(p, BPF_DW, 8, 1, mappings ? 16 : 24);
	out[n_out++] = p->n, emit(p, EQ, 7, 0, 0, 0);
	out[n_out++] = p->n, emit(p, EQ, 8, 0, 0, 0);
	if (mappings) {
		load(p, BPF_DW, 1, 8, kernel.vm_flags);
		emit(p, BPF_ALU64 | BPF_AND | BPF_K, 1, 0, 0, 0x2 | 0x8); /* VM_WRITE, VM_SHARED */
		out[n_out++] = p->n, emit(p, NE, 1, 0, 0, 0x2 | 0x8);
		load(p, BPF_DW, 9, 8, kernel.vm_file);
		out[n_out++] = p->n, emit(p, EQ, 9, 0, 0, 0);
	} else
		emit(p, BPF_ALU64 | BPF_MOV | BPF_X, 9, 8, 0, 0);
	load(p, BPF_DW, 9, 9, kernel.f_inode);
	out[n_out++] = p->n, emit(p, EQ, 9, 0, 0, 0);
	load(p, BPF_DW, 1, 9, kernel.i_ino);
	load(p, BPF_DW, 2, 9, kernel.i_sb);
	out[n_out++] = p->n, emit(p, EQ, 2, 0, 0, 0);
	load(p, BPF_W, 2, 2, kernel.s_dev);
	for (unsigned i = 0; i < geo->n_regions && n_hit < INODES_MAX; i++) {
		const struct ffs_region *r = &geo->regions[i];

		if (!r->ino)
			continue;
		emit(p, BPF_LD | BPF_DW | BPF_IMM, 3, 0, 0, (int32_t)r->ino);
		emit(p, 0, 0, 0, 0, (int32_t)(r->ino >> 32));
		emit(p, BPF_JMP | BPF_JNE | BPF_X, 1, 3, 1, 0);
		hit[n_hit++] = p->n, emit(p, EQ, 2, 0, 0, (int32_t)kernel_dev(r->dev));
	}
	out[n_out++] = p->n, emit(p, BPF_JMP | BPF_JA, 0, 0, 0, 0);
	for (unsigned i = 0; i < n_hit; i++)
		p->insn[hit[i]].off = (int16_t)(p->n - hit[i] - 1);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, ino), 1);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, dev), 2);
	load(p, BPF_W, 1, 7, kernel.tgid);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, tgid), 1);
	const struct {
		uint32_t from;
		size_t to;
	} fields[] = {{kernel.vm_start, offsetof(struct ffs_bpf_record, start)},
		{kernel.vm_end, offsetof(struct ffs_bpf_record, end)},
		{kernel.vm_pgoff, offsetof(struct ffs_bpf_record, offset)}};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(fields); i++) {
		if (mappings)
			load(p, BPF_DW, 1, 8, fields[i].from);
		else
			emit(p, BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, 0);
		store(p, BPF_DW, fields[i].to, 1);
	}
	if (mappings)
		emit(p, BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, 0);
	else
		load(p, BPF_W, 1, 8, kernel.f_mode);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, flags), 1);
	load(p, BPF_DW, 1, 9, kernel.i_mapping);
	load(p, BPF_W, 1, 1, kernel.i_mmap_writable);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, shared), 1);
	load(p, BPF_DW, 1, 6, 0); /* meta->seq */
	emit(p, BPF_ALU64 | BPF_MOV | BPF_X, 2, 10, 0, 0);
	emit(p, BPF_ALU64 | BPF_ADD | BPF_K, 2, 0, 0, -(int32_t)sizeof(struct ffs_bpf_record));
	emit(p, BPF_ALU64 | BPF_MOV | BPF_K, 3, 0, 0, (int32_t)sizeof(struct ffs_bpf_record));
	emit(p, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_seq_write);
	for (unsigned i = 0; i < n_out; i++)
		p->insn[out[i]].off = (int16_t)(p->n - out[i] - 1);
	emit(p, BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0);
	emit(p, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
}

static int bpf(int cmd, union bpf_attr *attr)
{
	int r = (int)syscall(SYS_bpf, cmd, attr, sizeof(*attr));

	return r < 0 ? -errno : r;
}

int ffs_bpf_iter_open(const struct ffs_geometry *geo, bool mappings)
{
	struct program p = {.n = 0};
	union bpf_attr a;
	unsigned inodes = 0;

	pthread_once(&kernel_once, learn_kernel);
	if (kernel.error < 0 || FFS_FAULT("bpf-iter") < 0 || FFS_ALTERNATIVE("look-in-proc"))
		return -ENOTSUP;
	for (unsigned i = 0; i < geo->n_regions; i++)
		inodes += geo->regions[i].ino != 0;
	if (inodes > INODES_MAX)
		return -ENOTSUP;
	build(&p, geo, mappings);
	memset(&a, 0, sizeof(a));
	a.prog_type = BPF_PROG_TYPE_TRACING;
	a.expected_attach_type = BPF_TRACE_ITER;
	a.attach_btf_id = mappings ? kernel.vma_iter : kernel.file_iter;
	a.insns = (uintptr_t)p.insn;
	a.insn_cnt = p.n;
	a.license = (uintptr_t) "Dual MIT/GPL"; /* of these instructions; the kernel asks for it */
	_cleanup_close_ int prog = bpf(BPF_PROG_LOAD, &a);

	if (prog < 0)
		return prog;
	memset(&a, 0, sizeof(a));
	a.link_create.prog_fd = (uint32_t)prog;
	a.link_create.attach_type = BPF_TRACE_ITER;
	_cleanup_close_ int link = bpf(BPF_LINK_CREATE, &a);

	if (link < 0)
		return link;
	memset(&a, 0, sizeof(a));
	a.iter_create.link_fd = (uint32_t)link;
	return bpf(BPF_ITER_CREATE, &a);
}

int ffs_bpf_iter_read(int fd, struct ffs_bpf_record *out, unsigned max)
{
	ssize_t n;

	/* EAGAIN: a million objects and none of them ours; it goes on behind them */
	do
		n = read(fd, out, max * sizeof(*out));
	while (n < 0 && (errno == EAGAIN || errno == EINTR));
	if (n < 0 || n % (ssize_t)sizeof(*out))
		return n < 0 ? -errno : -EPROTO;
	for (ssize_t i = 0; i < n / (ssize_t)sizeof(*out); i++) {
		out[i].dev = makedev(out[i].dev >> 20, out[i].dev & 0xfffff);
		out[i].offset *= (uint64_t)sysconf(_SC_PAGESIZE);
	}
	return (int)(n / (ssize_t)sizeof(*out));
}
