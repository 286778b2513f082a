/* Every open file, or every mapping, of every process, filtered by inode inside the kernel: BPF iterators
 * (Linux 5.8 / 5.12). Where there are none (no CAP_BPF and CAP_PERFMON, no type information in the kernel, a
 * pid namespace of our own) the caller reads /proc. */
#pragma once

#include <stdint.h>

#include "vmm/vmm.h"

struct ffs_bpf_record {
	uint32_t tgid, pad;
	uint64_t ino, dev;           /* dev as in stat(2) once it was read */
	uint64_t start, end, offset; /* of a mapping, bytes */
	uint64_t flags;              /* of a file: FMODE_WRITE is 2 */
	uint64_t shared; /* of a file: how many mappings of its inode there are that are shared and may write
			  */
};

/* An iterator over the files of the regions' inodes (open, or mapped shared and writable), read with
 * ffs_bpf_iter_next(). A descriptor owned by the caller, or -errno. Any thread; the first call of the process
 * takes some 10 ms more. */
int ffs_bpf_iter_open(const struct ffs_geometry *geo, bool mappings);
/* Up to max records; 0 at the end, -errno. */
int ffs_bpf_iter_read(int fd, struct ffs_bpf_record *out, unsigned max);
