/* The server of doctor's FUSE test: raw /dev/fuse, because the passthrough of Linux 6.9 has no API in
 * libfuse 3.14.
 *
 * One thread in a process of its own; it waits for requests only. Protocol: include/uapi/linux/fuse.h. */
#include "doctor-fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/compat.h"
#include "base/util.h"

#define FFS_REQUEST_BYTES (128 * 1024)

enum { NODE_ROOT = FUSE_ROOT_ID, NODE_PLAIN = 2, NODE_WRITER = 3 };

/* ---- the server ---- */

struct server {
	int dev, file;
	struct ffs_fuse_findings *f;
	bool writer_next; /* an O_RDWR open was sent back: the next lookups give the other node */
};

/* A reply; a request that was interrupted or aborted meanwhile (ENOENT) needs none. */
static bool reply(struct server *s, const struct fuse_in_header *in, int error, const void *data, size_t len)
{
	struct fuse_out_header out = {
		.len = (uint32_t)(sizeof(out) + len), .error = -error, .unique = in->unique};
	struct iovec iov[2] = {{&out, sizeof(out)}, {(void *)data, len}};

	return writev(s->dev, iov, len ? 2 : 1) >= 0 || errno == ENOENT;
}

static void fill_attr(uint64_t node, struct fuse_attr *a)
{
	memset(a, 0, sizeof(*a));
	a->ino = node == NODE_ROOT ? 1 : 2; /* both nodes of the file are one file to stat(2) */
	a->mode = node == NODE_ROOT ? S_IFDIR | 0755 : S_IFREG | 0600;
	a->size = node == NODE_ROOT ? 0 : FFS_TEST_BYTES;
	a->nlink = 1;
	a->blksize = 4096;
}

static bool on_init(struct server *s, const struct fuse_in_header *in, const struct fuse_init_in *arg)
{
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_write = 4096};
	bool ext = arg->flags & FFS_FUSE_INIT_EXT;

	s->f->offered = ext && (arg->flags2 & FFS_FUSE_PASSTHROUGH_FLAGS2);
	if (s->f->offered) {
		out.flags = FFS_FUSE_INIT_EXT;
		out.flags2 = FFS_FUSE_PASSTHROUGH_FLAGS2;
		out.unused[0] = 1; /* max_stack_depth since 7.40 */
	}
	return reply(s, in, 0, &out, sizeof(out));
}

static bool on_open(struct server *s, const struct fuse_in_header *in, const struct fuse_open_in *arg)
{
	struct ffs_fuse_backing_map map = {.fd = s->file};
	struct fuse_open_out out = {0};
	int id;

	if (in->nodeid == NODE_WRITER) {
		s->writer_next = false;
		s->f->writer_opens = 1;
		out.open_flags = FOPEN_DIRECT_IO;
		return reply(s, in, 0, &out, sizeof(out));
	}
	if ((arg->flags & O_ACCMODE) != O_RDONLY) {
		s->writer_next = true;
		return reply(s, in, ESTALE, NULL, 0);
	}
	if (s->f->offered) {
		id = ioctl(s->dev, FFS_FUSE_DEV_IOC_BACKING_OPEN, &map);
		if (id > 0) {
			out.open_flags = FFS_FOPEN_PASSTHROUGH;
			memcpy(&out.padding, &id, sizeof(id)); /* backing_id since 7.40 */
		} else {
			s->f->backing_errno = errno;
		}
	}
	return reply(s, in, 0, &out, sizeof(out));
}

static bool on_read(struct server *s, const struct fuse_in_header *in, const struct fuse_read_in *arg)
{
	unsigned char buf[FFS_TEST_BYTES];
	size_t want = arg->size < sizeof(buf) ? arg->size : sizeof(buf);
	ssize_t n = ffs_pread_full(s->file, buf, want, arg->offset);

	atomic_fetch_add(&s->f->reads, 1);
	return n < 0 ? reply(s, in, (int)-n, NULL, 0) : reply(s, in, 0, buf, (size_t)n);
}

/* False when the session is over. */
static bool serve_one(struct server *s, const char *buf)
{
	const struct fuse_in_header *in = (const void *)buf;
	const void *arg = in + 1;
	struct fuse_entry_out entry = {0};
	struct fuse_attr_out attr = {0};

	switch (in->opcode) {
	case FUSE_INIT:
		return on_init(s, in, arg);
	case FUSE_LOOKUP:
		if (strcmp(arg, strrchr(FFS_TEST_FILE, '/') + 1))
			return reply(s, in, ENOENT, NULL, 0);
		entry.nodeid = s->writer_next ? NODE_WRITER : NODE_PLAIN;
		fill_attr(entry.nodeid, &entry.attr);
		return reply(s, in, 0, &entry, sizeof(entry));
	case FUSE_GETATTR:
		fill_attr(in->nodeid, &attr.attr);
		return reply(s, in, 0, &attr, sizeof(attr));
	case FUSE_OPEN:
		return on_open(s, in, arg);
	case FUSE_READ:
		return on_read(s, in, arg);
	case FUSE_WRITE:
	case FUSE_SETATTR:
		return reply(s, in, EPERM, NULL, 0);
	case FUSE_RELEASE:
	case FUSE_FLUSH:
		return reply(s, in, 0, NULL, 0);
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		return true;
	case FUSE_DESTROY:
		return false;
	default:
		return reply(s, in, ENOSYS, NULL, 0);
	}
}

void ffs_doctor_fuse_serve(int dev, int file, struct ffs_fuse_findings *f, pid_t parent)
{
	static char buf[FFS_REQUEST_BYTES];
	struct server s = {.dev = dev, .file = file, .f = f};

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
		_exit(1);
	for (;;) {
		ssize_t n = read(dev, buf, sizeof(buf) - 1);

		if (n < 0 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))
			continue;
		if (n < (ssize_t)sizeof(struct fuse_in_header))
			_exit(0);
		buf[n] = 0;
		if (!serve_one(&s, buf))
			_exit(0);
	}
}
