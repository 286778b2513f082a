/* /proc/PID/maps and smaps as the engine needs them. Any thread. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

struct ffs_vma {
	uint64_t start, end, offset, dev, ino; /* dev as makedev(major, minor) */
	bool read, write, shared;
	char name[128]; /* path or [name], truncated; "" for anonymous */
};

/* All mappings of a process, in order; *out is a malloc'ed array the caller frees. -ESRCH when the process is
 * gone. */
int ffs_maps_read(pid_t pid, struct ffs_vma **out, unsigned *n);

/* VmFlags of the mapping that contains addr (smaps), as the string of two-letter flags ("rd wr mr mw me dd
 * mg"); and its kernel page size in bytes. Slow (the kernel walks the mapping): outside any pause. */
int ffs_smaps_flags(pid_t pid, uint64_t addr, char flags[128], uint64_t *kernel_page_size);
