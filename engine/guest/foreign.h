/* What could change guest memory behind the back of userfaultfd's write protection.
 *
 * The protection belongs to one address space, the VMM's. Looked for from outside, in /proc: other processes
 * and other mappings of the same memory, devices that write it by DMA, buffers pinned for io_uring, KSM. A
 * look sees one moment: who gets the memory afterwards (a descriptor passed on, a mapping made writable) is
 * seen by the next one. Not seen at all: processes of other pid namespaces, descriptors in flight in a socket
 * or held by a thread whose table is its own, rings without a descriptor (IORING_SETUP_REGISTERED_FD_ONLY);
 * where an earlier look is built upon, what a process that has not run since got through another one that
 * shares its table or memory (CLONE_FILES, CLONE_VM) and has ended. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "base/util.h"
#include "vmm/vmm.h"

enum ffs_foreign_kind {
	/* these refuse a branch */
	FFS_FOREIGN_MAPPING,        /* another process maps guest memory shared and writable */
	FFS_FOREIGN_DESCRIPTOR,     /* another process holds its file open for writing */
	FFS_FOREIGN_SECOND_MAPPING, /* the VMM maps it a second time, shared and writable */
	FFS_FOREIGN_DEVICE,         /* VFIO, iommufd, vDPA or RDMA of the VMM: DMA */
	FFS_FOREIGN_IO_URING,       /* buffers of guest memory registered with io_uring: pinned pages */
	FFS_FOREIGN_KSM,            /* private memory that KSM may merge: it drops the protection */
	FFS_FOREIGN_STUCK,          /* a process that the kernel would not let us look at in time */
	/* these are worth knowing */
	FFS_FOREIGN_VHOST,      /* in-kernel vhost: writes through the VMM's page tables, so it is trapped */
	FFS_FOREIGN_UNREADABLE, /* processes that we may not look at */
};
#define FFS_FOREIGN_FIRST_HARMLESS FFS_FOREIGN_VHOST
#define FFS_FOREIGN_MAX 16

struct ffs_foreign_finding {
	enum ffs_foreign_kind kind;
	pid_t pid;
	char comm[16];  /* printable */
	char text[420]; /* one sentence: who, why, what to do about it */
};

/* Refusing findings first, by pid; then the others, by kind. */
struct ffs_foreign {
	unsigned n, refusing; /* entries of list; those of them that refuse a branch */
	unsigned dropped;     /* findings that found no room */
	unsigned processes;   /* others that were looked at one by one; 0: the kernel did it */
	unsigned quiet;       /* those of them that have not run since an earlier look */
	struct ffs_foreign_finding list[FFS_FOREIGN_MAX];
};

/* "mapping", "descriptor", … */
const char *ffs_foreign_kind_name(enum ffs_foreign_kind kind);

/* What earlier looks at the same VMM found harmless and can be built upon. One thread at a time. */
struct ffs_foreign_known;
void ffs_foreign_known_free(struct ffs_foreign_known *known);

/* Look for all of it, once. *out is filled in any case (empty at worst), *took_ns (may be NULL) is what it
 * took. 0: nothing that refuses a branch. -EBUSY with out->refusing > 0: the sentence of the first of them;
 * who insists goes on all the same. Else the look itself failed: -ESRCH (the VMM is gone), -EACCES (may not
 * look at it), -ENOMEM, … with out->refusing 0.
 *
 * `known` (may be NULL) points to what an earlier look left, NULL at first, and is replaced; the caller frees
 * it. A process that has not run since is not gone through again: its own doing is what would change it.
 *
 * The calling process is not looked at: it must itself hold guest memory for reading only. Processes are read
 * by up to four threads that live for this call; one that hangs in the kernel (on another process's mmap
 * lock) for a second is left behind. Never waits for a file system or for a process. Any thread; outside any
 * pause. */
int ffs_foreign_scan(struct ffs_proc_id vmm, const struct ffs_geometry *geo, struct ffs_foreign_known **known,
	struct ffs_foreign *out, uint64_t *took_ns, struct ffs_error *err);
