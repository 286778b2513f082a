/* What the children of one call map as their memory: the branch's own image, or a copy of it in memory.
 *
 * Main thread, before any child is started; no locks. A signal ends the loading. */
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/util.h"
#include "cli.h"
#include "restore.h"

#define STEP (1u << 20)
/* FUTURE_WRITE: nothing has it mapped, and WRITE waits, at last in vain (EBUSY), for whoever reads a page just now. */
#define SEALS (F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

bool ffs_restore_is_image(const struct ffs_restore *r)
{
	struct json_object *capabilities = NULL;
	bool is = false;

	if (strcmp(ffs_json_string(r->status, "store"), "memory") || ffs_json_u64(r->status, "shared_bytes"))
		return false;
	if (!ffs_tree_json(r->tree, ".forkfs/capabilities", &capabilities, NULL))
		is = ffs_cli_json_bool(capabilities, "passthrough");
	json_object_put(capabilities);
	return is;
}

int ffs_copy_sparse(int from, int to, uint64_t size, size_t step, const struct ffs_sparse_words *words,
	struct ffs_error *err)
{
	_cleanup_free_ char *buf = malloc(step);

	if (!buf || ftruncate(to, (off_t)size) < 0)
		return ffs_error_errno(err, buf ? errno : ENOMEM, "%s", words->file);
	for (uint64_t at = 0; at < size; at += step) {
		size_t len = size - at < step ? (size_t)(size - at) : step;
		ssize_t n = ffs_pread_full(from, buf, len, at);

		if (ffs_interrupted())
			return ffs_error_set(err, EINTR, "interrupted");
		if (n != (ssize_t)len)
			return ffs_error_errno(err, n < 0 ? (int)-n : EIO, "%s", words->read);
		if (!ffs_is_zero(buf, len) && (n = ffs_pwrite_full(to, buf, len, at)) != (ssize_t)len)
			return ffs_error_errno(err, n < 0 ? (int)-n : EIO, "%s", words->write);
	}
	return 0;
}

/* All of `from`, with holes where it is zero, in a file that nobody can change. */
static int load(int from, uint64_t size, int *out, struct ffs_error *err)
{
	_cleanup_close_ int fd =
		memfd_create("forkfs-children", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
	static const struct ffs_sparse_words words = {.file = "a file in memory for the branch",
		.read = "the branch's memory cannot be read",
		.write = "the branch cannot be loaded into memory"};
	char path[40];
	int got;

	if (fd < 0)
		return ffs_error_errno(err, errno, "%s", words.file);
	got = ffs_copy_sparse(from, fd, size, STEP, &words, err);
	if (got < 0)
		return got;
	if (fcntl(fd, F_ADD_SEALS, SEALS) < 0)
		return ffs_error_errno(err, errno, "the branch's memory cannot be sealed");
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	*out = open(path, O_RDONLY | O_CLOEXEC);
	return *out < 0 ? ffs_error_errno(err, errno, "the branch's memory cannot be opened") : 0;
}

int ffs_restore_image(struct ffs_restore *r, bool as_served, struct ffs_error *err)
{
	_cleanup_close_ int fd = ffs_restore_open(r, "memory.bin", err);

	if (fd < 0)
		return fd;
	if (!as_served && !r->writing && !ffs_restore_is_image(r)) {
		char dir[160];
		int got = load(fd, r->memory_size, &r->memory_fd, err);

		snprintf(dir, sizeof(dir), "%s/branches/%s", r->target.sandbox, r->target.branch);
		r->loaded = !got;
		if (got == -EIO)
			ffs_tree_explain(r->tree, dir, err);
		return got;
	}
	r->memory_fd = ffs_steal_fd(&fd);
	return 0;
}
