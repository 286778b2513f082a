/* Every open file, or every mapping, of every process, filtered by inode inside the kernel: BPF iterators
 * (Linux 5.8 / 5.12). Where there are none (no CAP_BPF and CAP_PERFMON, no type information in the kernel, a
 * pid namespace of our own) the caller reads /proc. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmm/vmm.h"

struct ffs_bpf_record {
	uint32_t tgid, pad;
	uint64_t ino, dev;           /* dev as in stat(2) once it was read */
	uint64_t start, end, offset; /* of a mapping, bytes */
	uint64_t vm_flags;           /* of a mapping: FFS_VM_… */
	uint64_t mode;               /* of the file: FFS_FMODE_… */
	uint64_t shared; /* how many mappings of its inode there are that are shared and may write */
	/* where the kernel has the counts (ffs_bpf_counts()), else 0 */
	uint64_t file;   /* which open file this descriptor or mapping is of: an identity, nothing else */
	uint64_t refs;   /* who holds that: descriptors, mappings, whatever else; of a descriptor the iterator
			    too */
	int64_t writers; /* opens for writing of its inode by a name */
	uint64_t links;  /* names of its inode */
	uint64_t sharers; /* how many tasks share the table of descriptors */
	uint64_t tid; /* of the thread that it was found with; tgid, but for one with a table of its own */
};

/* include/linux/fs.h: FMODE_WRITE, FMODE_WRITER (counted in `writers`); include/linux/mm.h */
#define FFS_FMODE_WRITE 0x2u
#define FFS_FMODE_WRITER 0x10000u
#define FFS_VM_WRITE 0x2u
#define FFS_VM_SHARED 0x8u
#define FFS_VM_MAYWRITE 0x20u

enum ffs_bpf_what {
	FFS_BPF_FILES,    /* descriptors */
	FFS_BPF_WRITABLE, /* mappings that are shared and writable */
	FFS_BPF_MAPPINGS, /* all mappings */
};

/* An iterator over what there is of the regions' inodes in process `pid`, or in all of them (0), read with
 * ffs_bpf_iter_read(). A descriptor owned by the caller, or -errno. Any thread; the first call of the process
 * takes some 10 ms more. Of one process: Linux 6.1. */
int ffs_bpf_iter_open(const struct ffs_geometry *geo, enum ffs_bpf_what what, pid_t pid);
/* Up to max records; 0 at the end, -errno. */
int ffs_bpf_iter_read(int fd, struct ffs_bpf_record *out, unsigned max);
/* Do records have the counts? Any thread, as ffs_bpf_iter_open(). */
bool ffs_bpf_counts(void);
