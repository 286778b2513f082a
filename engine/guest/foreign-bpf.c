/* Owns nothing. Any thread. A program is some 50 instructions, made for the inodes that are looked for,
 * loaded, and gone with the iterator. Sources of the formats: the kernel's
 * Documentation/bpf/bpf_iterators.rst, include/uapi/linux/bpf.h. */
#include "guest/foreign-bpf.h"

#include <errno.h>
#include <linux/bpf.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "guest/foreign-btf.h"

#define INODES_MAX 16u

/* ---- programs ---- */

struct program {
	struct bpf_insn insn[96 + 4 * INODES_MAX];
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

/* What foreign-count.c asks for, of the registers that build() has. */
static void store_counts(struct program *p, const struct ffs_btf_kernel *k)
{
	const struct {
		uint8_t size, base;
		uint32_t via, from; /* from the base's own member, or (via) from what that points to */
		size_t to;
	} fields[] = {
		{BPF_DW, 5, 0, k->f_ref, offsetof(struct ffs_bpf_record, refs)},
		{BPF_W, 9, 0, k->i_writecount, offsetof(struct ffs_bpf_record, writers)},
		{BPF_W, 9, 0, k->i_nlink, offsetof(struct ffs_bpf_record, links)},
		{BPF_W, 7, k->task_files, k->files_count, offsetof(struct ffs_bpf_record, sharers)},
		{BPF_W, 7, 0, k->task_pid, offsetof(struct ffs_bpf_record, tid)},
	};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(fields); i++) {
		uint8_t base = fields[i].base;

		if (!k->counts) {
			emit(p, BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, 0);
		} else {
			if (fields[i].via)
				load(p, BPF_DW, 1, base, fields[i].via), base = 1;
			load(p, fields[i].size, 1, base, fields[i].from);
		}
		store(p, BPF_DW, fields[i].to, 1);
	}
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, file), 5);
}

/* r6 iter's meta, r7 task, r8 file or vma, r9 file, later inode; r1 ino, r2 dev, r5 file. The context is an
 * array of pointers (struct bpf_iter__task_file, bpf_iter__task_vma). Jumps to the end are filled in last. */
static void build(struct program *p, const struct ffs_btf_kernel *k, const struct ffs_geometry *geo,
	enum ffs_bpf_what what)
{
	bool mappings = what != FFS_BPF_FILES;
	unsigned out[8], n_out = 0, hit[INODES_MAX], n_hit = 0;
	enum { EQ = BPF_JMP | BPF_JEQ | BPF_K, NE = BPF_JMP | BPF_JNE | BPF_K };

	load(p, BPF_DW, 6, 1, 0);
	load(p, BPF_DW, 7, 1, 8);
	load(p, BPF_DW, 8, 1, mappings ? 16 : 24);
	out[n_out++] = p->n, emit(p, EQ, 7, 0, 0, 0);
	out[n_out++] = p->n, emit(p, EQ, 8, 0, 0, 0);
	if (what == FFS_BPF_WRITABLE) {
		load(p, BPF_DW, 1, 8, k->vm_flags);
		emit(p, BPF_ALU64 | BPF_AND | BPF_K, 1, 0, 0, FFS_VM_WRITE | FFS_VM_SHARED);
		out[n_out++] = p->n, emit(p, NE, 1, 0, 0, FFS_VM_WRITE | FFS_VM_SHARED);
	}
	if (mappings) {
		load(p, BPF_DW, 9, 8, k->vm_file);
		out[n_out++] = p->n, emit(p, EQ, 9, 0, 0, 0);
	} else
		emit(p, BPF_ALU64 | BPF_MOV | BPF_X, 9, 8, 0, 0);
	emit(p, BPF_ALU64 | BPF_MOV | BPF_X, 5, 9, 0, 0);
	load(p, BPF_DW, 9, 9, k->f_inode);
	out[n_out++] = p->n, emit(p, EQ, 9, 0, 0, 0);
	load(p, BPF_DW, 1, 9, k->i_ino);
	load(p, BPF_DW, 2, 9, k->i_sb);
	out[n_out++] = p->n, emit(p, EQ, 2, 0, 0, 0);
	load(p, BPF_W, 2, 2, k->s_dev);
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
	load(p, BPF_W, 1, 7, k->tgid);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, tgid), 1);
	const struct {
		uint32_t from;
		size_t to;
	} fields[] = {{k->vm_start, offsetof(struct ffs_bpf_record, start)},
		{k->vm_end, offsetof(struct ffs_bpf_record, end)},
		{k->vm_pgoff, offsetof(struct ffs_bpf_record, offset)},
		{k->vm_flags, offsetof(struct ffs_bpf_record, vm_flags)}};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(fields); i++) {
		if (mappings)
			load(p, BPF_DW, 1, 8, fields[i].from);
		else
			emit(p, BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, 0);
		store(p, BPF_DW, fields[i].to, 1);
	}
	load(p, BPF_W, 1, 5, k->f_mode);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, mode), 1);
	load(p, BPF_DW, 1, 9, k->i_mapping);
	load(p, BPF_W, 1, 1, k->i_mmap_writable);
	store(p, BPF_DW, offsetof(struct ffs_bpf_record, shared), 1);
	store_counts(p, k);
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

int ffs_bpf_iter_open(const struct ffs_geometry *geo, enum ffs_bpf_what what, pid_t pid)
{
	struct program p = {.n = 0};
	union bpf_iter_link_info one = {.task = {0}};
	const struct ffs_btf_kernel *k;
	union bpf_attr a;
	unsigned inodes = 0;

	if (FFS_FAULT("bpf-iter") < 0 || FFS_ALTERNATIVE("look-in-proc"))
		return -ENOTSUP;
	int e = ffs_btf_kernel(&k);

	if (e < 0)
		return e;
	for (unsigned i = 0; i < geo->n_regions; i++)
		inodes += geo->regions[i].ino != 0;
	if (inodes > INODES_MAX)
		return -ENOTSUP;
	build(&p, k, geo, what);
	memset(&a, 0, sizeof(a));
	a.prog_type = BPF_PROG_TYPE_TRACING;
	a.expected_attach_type = BPF_TRACE_ITER;
	a.attach_btf_id = what == FFS_BPF_FILES ? k->file_iter : k->vma_iter;
	a.insns = (uintptr_t)p.insn;
	a.insn_cnt = p.n;
	a.license = (uintptr_t) "Dual MIT/GPL"; /* of these instructions; the kernel asks for it */
	_cleanup_close_ int prog = bpf(BPF_PROG_LOAD, &a);

	if (prog < 0)
		return prog;
	memset(&a, 0, sizeof(a));
	a.link_create.prog_fd = (uint32_t)prog;
	a.link_create.attach_type = BPF_TRACE_ITER;
	if (pid) {
		one.task.pid = (uint32_t)pid;
		a.link_create.iter_info = (uintptr_t)&one;
		a.link_create.iter_info_len = sizeof(one);
	}
	_cleanup_close_ int link = bpf(BPF_LINK_CREATE, &a);

	if (link < 0)
		return link;
	memset(&a, 0, sizeof(a));
	a.iter_create.link_fd = (uint32_t)link;
	return bpf(BPF_ITER_CREATE, &a);
}

bool ffs_bpf_counts(void)
{
	const struct ffs_btf_kernel *k;

	return ffs_btf_kernel(&k) == 0 && k->counts;
}

int ffs_bpf_iter_read(int fd, struct ffs_bpf_record *out, unsigned max)
{
	const struct ffs_btf_kernel *k;
	uint64_t from_0 = ffs_btf_kernel(&k) == 0 && k->counts && k->f_ref_from_0;
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
		out[i].writers = (int32_t)out[i].writers;
		out[i].refs += from_0;
	}
	return (int)(n / (ssize_t)sizeof(*out));
}
