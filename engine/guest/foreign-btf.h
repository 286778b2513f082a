/* Where the running kernel has the fields that the BPF iterators of foreign-bpf.c read. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Type ids of the two iterators; byte offsets of members, of the structure that their name begins with. */
struct ffs_btf_kernel {
	uint32_t file_iter, vma_iter;
	uint32_t f_inode, f_mode, i_ino, i_sb, s_dev, i_mapping, i_mmap_writable, tgid, vm_file, vm_flags,
		vm_start, vm_end, vm_pgoff;
	/* who else has a file (foreign-count.c); `counts`: the kernel has all of them, as they are read */
	bool counts, f_ref_from_0; /* a file with one holder: f_ref is 0 (Linux 6.13), or 1 */
	uint32_t f_ref, i_writecount, i_nlink, task_files, files_count, task_pid;
};

/* *out is constant and lives for ever. 0; -ENOTSUP: the kernel says nothing of its types, or we are in a pid
 * namespace whose numbers are not the kernel's; -ENOMEM, … Any thread; the first call takes some 10 ms. */
int ffs_btf_kernel(const struct ffs_btf_kernel **out);
