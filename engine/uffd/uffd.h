/* A userfaultfd of another process's address space, in write-protect mode: the ioctls, checked and split in
 * slices.
 *
 * Addresses are the VMM's. All calls are thread-safe (the kernel's), none allocates. -ESRCH means that the
 * VMM is gone. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

/* Negotiate features (UFFDIO_API) on a fresh descriptor: write-protect of shmem, hugetlb and unpopulated
 * pages and the REMOVE/UNMAP/REMAP events must be there (Linux 6.4), or ENOTSUP with the kernel's name in the
 * sentence. */
int ffs_uffd_api(int uffd, struct ffs_error *err);
/* The same for a descriptor that somebody else may have negotiated already: then its features are looked at,
 * in /proc/self/fdinfo, and ENOTSUP names what is missing. */
int ffs_uffd_api_given(int uffd, struct ffs_error *err);

/* The features that are in force for it; -errno. */
int ffs_uffd_features(int uffd, uint64_t *features);

/* Register [hva, hva+len) for write-protect faults. */
int ffs_uffd_register(int uffd, uint64_t hva, uint64_t len, struct ffs_error *err);
/* Unregister; clears protection and wakes waiters. Done in slices that keep the VMM's mmap lock short; an
 * error in one slice does not keep the others protected: the first error is returned after all were tried
 * (-ESRCH at once). */
int ffs_uffd_unregister(int uffd, uint64_t hva, uint64_t len);
/* Write-protect / release (and wake) a range. 0 or -errno. While the VMM changes its mappings the kernel
 * answers EAGAIN until the event is read, and so do these (nothing was done to that slice; earlier slices of
 * the range are done): let go of what the thread that reads events may wait for, and call again. */
int ffs_uffd_protect(int uffd, uint64_t hva, uint64_t len);
int ffs_uffd_unprotect(int uffd, uint64_t hva, uint64_t len);
/* Wake the threads that wait on a fault in the range without changing its protection. */
int ffs_uffd_wake(int uffd, uint64_t hva, uint64_t len);
