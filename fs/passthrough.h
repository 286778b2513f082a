/* FUSE passthrough on a libfuse that has no API for it (3.14), and the raw answer to OPEN. The only file of
 * fs/ that knows the kernel's structures; source: include/uapi/linux/fuse.h of Linux 6.9. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <fuse_lowlevel.h>

struct ffs_passthrough {
	bool wanted;    /* by the mount options; fixed before the session starts */
	int device;     /* /dev/fuse of the session */
	atomic_bool on; /* settled after INIT, before the first other request */
	atomic_bool init_done;
	char why_off[160]; /* fixed with `on` */
	unsigned kernel_minor;
	uint64_t init_unique;     /* of the INIT request; its answer is patched */
	uint32_t kernel_flags2;   /* what the kernel offers, bits 32..63 of the INIT flags */
	void (*ready)(void *arg); /* called once INIT is answered */
	void *ready_arg;
};

/* Make the session read and write the device through us. p must outlive the session. 0 or -errno. */
int ffs_passthrough_install(struct ffs_passthrough *p, struct fuse_session *se, int device);

/* Register a backing file: a positive id, or -errno. */
int ffs_passthrough_open(struct ffs_passthrough *p, int fd);
void ffs_passthrough_close(struct ffs_passthrough *p, uint32_t id);

enum ffs_open_how {
	FFS_OPEN_CACHED, /* page cache, kept from earlier opens: content never changes */
	FFS_OPEN_DIRECT,
	FFS_OPEN_FLUSHED, /* direct, and told of each close: the only ones that FLUSH is sent for */
	FFS_OPEN_STREAM,  /* direct, no file position */
	FFS_OPEN_PASS,
};
/* Answer OPEN. Non-zero: the client is gone, no RELEASE will come. */
int ffs_reply_open(fuse_req_t req, uint64_t fh, enum ffs_open_how how, uint32_t backing_id);
