/* Guest memory of one VMM, read from outside without disturbing it.
 *
 * Reading never populates a page that the guest never touched: shared memory is read through its file with
 * pread(2), which returns zeros for holes; anonymous memory with process_vm_readv(2) after pagemap said that
 * a page is there. Any thread. */
#pragma once

#include "base/error.h"
#include "vmm/vmm.h"

struct ffs_memory;

/* Open what is needed to read the regions of `geo` of process `proc`: the files behind shared regions
 * (read-only, checked to be the same dev:ino), /proc/PID/pagemap. The geometry is copied. */
int ffs_memory_open(struct ffs_proc_id proc, const struct ffs_geometry *geo, struct ffs_memory **out,
	struct ffs_error *err);
void ffs_memory_close(struct ffs_memory *m);

/* Read len bytes of region `r` at `off` (within the region) as they are now; 0 or -errno (-ESRCH: VMM gone;
 * -EFAULT: the mapping is not what it was). *zero is set when all of it is known to be zero; buf is then NOT
 * filled. Allocates nothing, takes no lock. */
int ffs_memory_read(struct ffs_memory *m, unsigned r, uint64_t off, void *buf, size_t len, bool *zero);

/* Read the first 8 bytes of each of n pages (4096 bytes) of region `r` from `off`, which is at a page, as they are now: a
 * tenth of the time that reading all of them takes. Never-touched pages are not touched; 0 in their place. Returns what
 * ffs_memory_read() does. About 16 KiB of stack. */
int ffs_memory_read_heads(struct ffs_memory *m, unsigned r, uint64_t off, uint64_t *head, size_t n);

/* Compare the mappings with the geometry: 0, or -ESTALE with a sentence that names the region and what
 * changed; -ESRCH. */
int ffs_memory_check(struct ffs_memory *m, struct ffs_error *err);
