/* Whether the VMM has its guest memory for itself, told from how often the kernel counts it as held. */
#pragma once

#include "vmm/vmm.h"

/* 1: no other process has a region's file open for writing, maps it shared and writable, or could be given it
 * by anybody but the VMM, and the VMM's table of descriptors is its own. 0: that cannot be told so, and all
 * processes have to be looked at. -errno: the kernel does not count, or will not tell. Takes about a
 * millisecond, however many processes there are. Any thread. May hang in the kernel on the VMM's mmap lock.
 */
int ffs_foreign_alone(struct ffs_proc_id vmm, const struct ffs_geometry *geo);
