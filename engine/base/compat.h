/* Kernel constants that the headers of Debian 12 (6.1) lack, and only those. Each with its source. */
#pragma once

#include <linux/types.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

/* include/uapi/linux/userfaultfd.h: 6.4 / 6.7 */
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* include/uapi/linux/mman.h, 6.3 (vm.memfd_noexec): a memfd that is data only */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

/* include/uapi/linux/ptrace.h via glibc */
#ifndef PTRACE_O_SUSPEND_SECCOMP
#define PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#endif

/* include/uapi/asm-generic/socket.h, 6.5: a pidfd of who connected */
#define FFS_SO_PEERPIDFD 77

/* include/uapi/linux/fuse.h, 6.9: passthrough of a file's reads to a backing file */
#define FFS_FUSE_INIT_EXT (1u << 30)
#define FFS_FUSE_PASSTHROUGH_FLAGS2 (1u << (37 - 32))
#define FFS_FOPEN_PASSTHROUGH (1u << 7)
struct ffs_fuse_backing_map {
	__s32 fd;
	__u32 flags;
	__u64 padding;
};
#define FFS_FUSE_DEV_IOC_BACKING_OPEN _IOW(229, 1, struct ffs_fuse_backing_map)
#define FFS_FUSE_DEV_IOC_BACKING_CLOSE _IOW(229, 2, __u32)

/* include/uapi/linux/fs.h, 6.7: PAGEMAP_SCAN */
struct ffs_page_region {
	__u64 start;
	__u64 end;
	__u64 categories;
};
struct ffs_pm_scan_arg {
	__u64 size;
	__u64 flags;
	__u64 start;
	__u64 end;
	__u64 walk_end;
	__u64 vec;
	__u64 vec_len;
	__u64 max_pages;
	__u64 category_inverted;
	__u64 category_mask;
	__u64 category_anyof_mask;
	__u64 return_mask;
};
#define FFS_PAGEMAP_SCAN _IOWR('f', 16, struct ffs_pm_scan_arg)
#define FFS_PAGE_IS_WPALLOWED (1 << 0)
#define FFS_PAGE_IS_WRITTEN (1 << 1)
#define FFS_PAGE_IS_FILE (1 << 2)
#define FFS_PAGE_IS_PRESENT (1 << 3)
#define FFS_PAGE_IS_SWAPPED (1 << 4)
#define FFS_PAGE_IS_PFNZERO (1 << 5)

/* include/uapi/linux/fs.h, 6.11: PROCMAP_QUERY on /proc/PID/maps */
struct ffs_procmap_query {
	__u64 size;
	__u64 query_flags;
	__u64 query_addr;
	__u64 vma_start;
	__u64 vma_end;
	__u64 vma_flags;
	__u64 vma_page_size;
	__u64 vma_offset;
	__u64 inode;
	__u32 dev_major;
	__u32 dev_minor;
	__u32 vma_name_size;
	__u32 build_id_size;
	__u64 vma_name_addr;
	__u64 build_id_addr;
};
#define FFS_PROCMAP_QUERY _IOWR('f', 17, struct ffs_procmap_query)
#define FFS_PROCMAP_QUERY_VMA_WRITABLE 0x02
#define FFS_PROCMAP_QUERY_VMA_SHARED 0x08
#define FFS_PROCMAP_QUERY_COVERING_OR_NEXT_VMA 0x10
#define FFS_PROCMAP_QUERY_FILE_BACKED_VMA 0x20

/* include/uapi/linux/mman.h, 6.5: cachestat(2), how much of a file's page cache is dirty */
#define FFS_SYS_CACHESTAT 451
struct ffs_cachestat_range {
	__u64 off;
	__u64 len; /* 0: to the end */
};
struct ffs_cachestat {
	__u64 nr_cache;
	__u64 nr_dirty;
	__u64 nr_writeback;
	__u64 nr_evicted;
	__u64 nr_recently_evicted;
};
