/* Children of a fork: they map the image of its branch, which all children of all its forks share, and the pages in
 * which the fork differs are written into each between load and run.
 *
 * ffs_restore_fork_read() is of the main thread, before any child is started; what it read does not change afterwards.
 * ffs_restore_fork_write() is of the child's thread; the child is ours and not reaped, so its number is no other's. The
 * child is not trusted: what it has mapped is checked, written with its own rights (never by force), and read back. No
 * locks; what waits is the reading of a page that is still being captured. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "guest/maps.h"
#include "mailbox/mailbox.h"
#include "restore.h"

struct ffs_restore_page {
	uint64_t offset; /* in the branch's memory */
	uint8_t byte[FFS_MAILBOX_PAGE];
};

static int read_page(const struct ffs_restore *r, int memory, struct json_object *offset,
	struct ffs_restore_page *p, struct ffs_error *err)
{
	ssize_t n;

	p->offset = json_object_is_type(offset, json_type_int) ? json_object_get_uint64(offset) : UINT64_MAX;
	if (p->offset % FFS_MAILBOX_PAGE || p->offset >= r->memory_size ||
		r->memory_size - p->offset < FFS_MAILBOX_PAGE)
		return ffs_error_set(err, EPROTO,
			"the status of fork %s names a page outside the branch's memory", r->target.fork);
	n = ffs_pread_full(memory, p->byte, FFS_MAILBOX_PAGE, p->offset);
	if (n != FFS_MAILBOX_PAGE)
		return ffs_error_errno(err, n < 0 ? (int)-n : EIO, "page 0x%" PRIx64 " of fork %s", p->offset,
			r->target.fork);
	return 0;
}

int ffs_restore_fork_read(struct ffs_restore *r, struct ffs_error *err)
{
	_cleanup_close_ int memory = -1;
	struct json_object *status = NULL, *pages;
	char file[100], path[260];
	size_t n;
	int got = 0;

	snprintf(file, sizeof(file), "forks/%s/memory.bin", r->target.fork);
	snprintf(path, sizeof(path), "%s/branches/%s/forks/%s/status", r->target.sandbox, r->target.branch,
		r->target.fork);
	/* from this open on the fork never changes: its pages are asked for afterwards */
	memory = ffs_restore_open(r, file, err);
	if (memory < 0)
		return memory;
	got = ffs_tree_json(r->tree, path, &status, err);
	if (got < 0)
		return got;
	pages = ffs_json_get(status, "overlay_pages");
	n = json_object_is_type(pages, json_type_array) ? json_object_array_length(pages) : 0;
	/* another branch may have got the name since its status was read */
	if (strcmp(ffs_json_string(status, "branch_id"), ffs_json_string(r->status, "id")))
		got = ffs_error_set(err, ESTALE,
			"branch %s was removed, and another made in its place: try again", r->target.branch);
	else if (!json_object_is_type(pages, json_type_array) || n > FFS_MAILBOX_MAX)
		got = ffs_error_set(err, EPROTO, "the status of fork %s does not say which pages are its own",
			r->target.fork);
	if (!got)
		got = ffs_restore_ack_read(r, status, err);
	if (!got) {
		r->page = calloc(n ? n : 1, sizeof(*r->page));
		if (!r->page)
			got = ffs_error_set(
				err, ENOMEM, "no memory for the pages of fork %s", r->target.fork);
	}
	for (size_t i = 0; !got && i < n; i++)
		got = read_page(r, memory, json_object_array_get_idx(pages, i), &r->page[r->n_pages++], err);
	json_object_put(status);
	return got;
}

/* Where the child has the page: in one private mapping of the image that it may write, and in no other. */
static int find_page(const struct ffs_vma *vma, unsigned n, const struct stat *image, uint64_t offset,
	uint64_t *at, struct ffs_error *err)
{
	unsigned found = 0;

	for (unsigned i = 0; i < n; i++) {
		const struct ffs_vma *v = &vma[i];

		if (v->dev != image->st_dev || v->ino != image->st_ino || offset < v->offset ||
			offset - v->offset >= v->end - v->start)
			continue;
		if (v->shared || !v->write)
			return ffs_error_set(err, EPERM,
				"the VMM has not mapped the branch privately and for writing, so a fork's "
				"payload cannot go there");
		*at = v->start + (offset - v->offset);
		found++;
	}
	if (found == 1)
		return 0;
	return ffs_error_set(err, found ? ENOTUNIQ : ENOENT,
		"the VMM has mapped page 0x%" PRIx64
		" of the branch %s: a fork's payload cannot be put there "
		"(start such a VM by hand, from the fork's memory.bin)",
		offset, found ? "more than once" : "nowhere");
}

static int put_page(const struct ffs_restore *r, const struct ffs_child *c, const struct ffs_restore_page *p,
	uint64_t at, struct ffs_error *err)
{
	uint8_t own[FFS_MAILBOX_PAGE];
	uint8_t back[FFS_MAILBOX_PAGE];
	struct iovec ours = {own, FFS_MAILBOX_PAGE}, read = {back, FFS_MAILBOX_PAGE},
		     theirs = {(void *)(uintptr_t)at, FFS_MAILBOX_PAGE}; /* NOLINT: an address of the child */
	ssize_t n;

	memcpy(own, p->byte, sizeof(own));
	int got = ffs_restore_ack_page(r, c, p->offset, at, own, err);

	if (got < 0)
		return got;
	n = process_vm_writev(c->pid, &ours, 1, &theirs, 1, 0);

	if (n == FFS_MAILBOX_PAGE)
		n = process_vm_readv(c->pid, &read, 1, &theirs, 1, 0);
	if (n != FFS_MAILBOX_PAGE)
		return ffs_error_errno(err, n < 0 ? errno : EFAULT,
			"page 0x%" PRIx64 " cannot be written into the VM", p->offset);
	if (memcmp(back, own, sizeof(back)))
		return ffs_error_set(err, EIO,
			"page 0x%" PRIx64 " was written into the VM, and is not what was written", p->offset);
	return 0;
}

int ffs_restore_fork_write(const struct ffs_restore *r, const struct ffs_child *c, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_vma *vma = NULL;
	struct stat image;
	unsigned n = 0;
	int got = 0;

	if (!r->n_pages)
		return 0;
	if (fstat(r->memory_fd, &image) < 0)
		return ffs_error_errno(err, errno, "the branch's image");
	got = ffs_maps_read(c->pid, &vma, &n);
	if (got < 0)
		return ffs_error_errno(err, -got, "the mappings of process %d", (int)c->pid);
	for (unsigned i = 0; !got && i < r->n_pages; i++) {
		uint64_t at = 0;

		got = find_page(vma, n, &image, r->page[i].offset, &at, err);
		if (!got)
			got = put_page(r, c, &r->page[i], at, err);
	}
	if (!got && ffs_child_ended(c))
		got = ffs_error_set(err, ECONNRESET, "process %d has ended", (int)c->pid);
	return got;
}
