/* The tiny file system of doctor's FUSE test: its one file, its server, and what was found. */
#pragma once

#include <stdatomic.h>
#include <sys/types.h>

#define FFS_TEST_DIR "/tmp" /* covered in the private namespace only */
#define FFS_TEST_FILE FFS_TEST_DIR "/sealed"
#define FFS_TEST_BYTES 65536

/* What server and client found, in memory shared with the doctor. */
struct ffs_fuse_findings {
	_Atomic int mount_errno;   /* -1: not tried yet */
	_Atomic int offered;       /* the kernel knows passthrough */
	_Atomic int backing_errno; /* of making the file a backing file */
	_Atomic unsigned reads;    /* that reached the server */
	_Atomic int writer_opens;  /* that reached the node for writers */
	_Atomic int passed;        /* reads did not, and their bytes were right */
	_Atomic int second_node;   /* an O_RDWR open got the other node, with the same inode number */
	_Atomic int private_map;   /* and could be mapped privately */
	_Atomic int changed;       /* some writer changed the sealed file: must stay 0 */
	_Atomic int client_errno;
	_Atomic int done;
};

/* Serve the mount behind `dev` until it ends: one file whose bytes are those of `file`. Runs in a process of
 * its own, which dies with `parent`. */
void ffs_doctor_fuse_serve(int dev, int file, struct ffs_fuse_findings *f, pid_t parent)
	__attribute__((noreturn));
