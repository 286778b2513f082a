/* Owns the session's device I/O (fuse_session_custom_io) and the patch of the INIT answer.
 *
 * Threads: the FUSE workers; INIT is handled by one alone, before any other request exists. No locks. Nothing
 * here waits but the read of the device itself. */
#include "passthrough.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/log.h"

/* struct fuse_init_out as of Linux 6.9: the 6.1 header has max_stack_depth as the first of its unused words
 */
struct init_out {
	uint32_t major, minor, max_readahead, flags;
	uint16_t max_background, congestion_threshold;
	uint32_t max_write, time_gran;
	uint16_t max_pages, map_alignment;
	uint32_t flags2, max_stack_depth, unused[6];
};
_Static_assert(sizeof(struct init_out) == sizeof(struct fuse_init_out), "the INIT answer has 64 bytes");

static struct ffs_passthrough *self_; /* libfuse hands custom I/O the session's userdata, which is not ours */

static ssize_t device_read(int fd, void *buf, size_t len, void *userdata)
{
	struct ffs_passthrough *p = self_;
	ssize_t n = read(fd, buf, len);
	const struct fuse_in_header *in = buf;

	if (n >= (ssize_t)(sizeof(*in) + sizeof(struct fuse_init_in)) && in->opcode == FUSE_INIT) {
		const struct fuse_init_in *init = (const void *)(in + 1);

		p->init_unique = in->unique;
		p->kernel_minor = init->minor;
		if (init->flags & FFS_FUSE_INIT_EXT)
			p->kernel_flags2 = init->flags2;
	}
	return n;
}

/* A real registration tells what flags can't: whether we may (CAP_SYS_ADMIN). */
static void probe(struct ffs_passthrough *p)
{
	_cleanup_close_ int fd = memfd_create("forkfs-probe", MFD_CLOEXEC);
	int id = fd < 0 ? -errno : ffs_passthrough_open(p, fd);

	if (id > 0) {
		ffs_passthrough_close(p, (uint32_t)id);
		atomic_store(&p->on, true);
	} else {
		snprintf(p->why_off, sizeof(p->why_off), "%s",
			id == -EPERM ? "the daemon lacks CAP_SYS_ADMIN" : strerror(-id));
	}
}

static ssize_t answer_init(struct ffs_passthrough *p, int fd, struct iovec *iov, int count)
{
	struct init_out *out = iov[1].iov_base;
	bool ask = p->wanted && (p->kernel_flags2 & FFS_FUSE_PASSTHROUGH_FLAGS2);

	if (ask) {
		out->flags |= FFS_FUSE_INIT_EXT;
		out->flags2 |= FFS_FUSE_PASSTHROUGH_FLAGS2;
		out->max_stack_depth = 1;
	} else {
		snprintf(p->why_off, sizeof(p->why_off), "%s",
			p->wanted ? "the kernel has none (6.9 is the first)"
				  : "switched off by the mount option");
	}
	ssize_t n = writev(fd, iov, count);

	if (n < 0)
		return n;
	if (ask)
		probe(p);
	atomic_store(&p->init_done, true);
	if (p->ready)
		p->ready(p->ready_arg);
	return n;
}

static ssize_t device_writev(int fd, struct iovec *iov, int count, void *userdata)
{
	struct ffs_passthrough *p = self_;
	const struct fuse_out_header *out = iov[0].iov_base;

	if (!atomic_load_explicit(&p->init_done, memory_order_relaxed) && out->unique == p->init_unique &&
		!out->error && count == 2 && iov[1].iov_len == sizeof(struct init_out))
		return answer_init(p, fd, iov, count);
	return writev(fd, iov, count);
}

int ffs_passthrough_install(struct ffs_passthrough *p, struct fuse_session *se, int device)
{
	static const struct fuse_custom_io io = {.read = device_read, .writev = device_writev};

	self_ = p;
	p->device = device;
	return fuse_session_custom_io(se, &io, device);
}

int ffs_passthrough_open(struct ffs_passthrough *p, int fd)
{
	struct ffs_fuse_backing_map map = {.fd = fd};
	int id = ioctl(p->device, FFS_FUSE_DEV_IOC_BACKING_OPEN, &map);

	return id < 0 ? -errno : id;
}

void ffs_passthrough_close(struct ffs_passthrough *p, uint32_t id)
{
	if (ioctl(p->device, FFS_FUSE_DEV_IOC_BACKING_CLOSE, &id) < 0)
		ffs_log(FFS_LOG_WARN, "backing file %u was not released: %s", id, strerror(errno));
}

int ffs_reply_open(fuse_req_t req, uint64_t fh, enum ffs_open_how how, uint32_t backing_id)
{
	/* the last word is backing_id since 6.9, padding before */
	struct fuse_open_out out = {.fh = fh};
	uint32_t id = 0;

	switch (how) {
	case FFS_OPEN_CACHED:
		out.open_flags = FOPEN_KEEP_CACHE;
		break;
	case FFS_OPEN_DIRECT:
	case FFS_OPEN_FLUSHED:
		out.open_flags = FOPEN_DIRECT_IO;
		break;
	case FFS_OPEN_STREAM:
		out.open_flags = FOPEN_DIRECT_IO | FOPEN_STREAM;
		break;
	case FFS_OPEN_PASS:
		out.open_flags = FFS_FOPEN_PASSTHROUGH;
		id = backing_id;
		break;
	}
	/* the other closes have nothing to tell us, and must not fail for a file that outlives the daemon */
	if (how != FFS_OPEN_FLUSHED)
		out.open_flags |= FOPEN_NOFLUSH;
	memcpy((char *)&out + sizeof(out) - sizeof(id), &id, sizeof(id));
	return fuse_reply_buf(req, (const char *)&out, sizeof(out));
}
