/* Owns the check of a branch against its manifest: every byte of every file is read. Changes nothing.
 *
 * Threads: the caller's. Waits for the disk. */
#include "store/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#include "store/forks.h"

static int damaged(
	const struct ffs_stored *s, const char *file, uint64_t off, const char *what, struct ffs_error *err)
{
	return ffs_error_set(err, EBADMSG, "%s/%s is damaged at offset %llu: %s", s->path, file,
		(unsigned long long)off, what);
}

int ffs_stored_load_hashes(struct ffs_stored *s, struct ffs_manifest *m, struct ffs_error *err)
{
	struct json_object *o = NULL;
	int r = ffs_stored_manifest(s, &o, err);

	if (!r) {
		r = ffs_manifest_load(o, true, m, err);
		if (r < 0)
			ffs_error_prefix(err, "%s", s->path);
	}
	json_object_put(o);
	if (r < 0)
		return r;
	if (m->has_hashes && !s->sealed)
		r = ffs_error_set(
			err, EBADMSG, "%s/" FFS_MANIFEST " is damaged: its checksum is missing", s->path);
	else if (!m->has_hashes)
		r = ffs_error_set(err, ENODATA,
			"%s is in memory only: its manifest has no hashes to compare with (forkfs branch "
			"--store dense "
			"makes a durable one)",
			s->path);
	if (r < 0)
		ffs_manifest_clear(m);
	return r;
}

static int check_memory(struct ffs_stored *s, const struct ffs_manifest *m, struct ffs_store_progress *p,
	struct ffs_error *err)
{
	_cleanup_free_ unsigned char *buf = malloc(FFS_STORE_BLOCK);
	XXH3_state_t *state = XXH3_createState();
	int r = buf && state ? 0 : ffs_error_set(err, ENOMEM, "no memory");
	const char *file = s->kind == FFS_STORE_DENSE ? FFS_MEMORY_DENSE : "memory";

	if (!r)
		XXH3_128bits_reset(state);
	for (uint64_t i = 0; !r && i < m->n_blocks; i++) {
		uint64_t off = i * FFS_STORE_BLOCK, left = m->memory_size - off;
		size_t len = left < FFS_STORE_BLOCK ? (size_t)left : FFS_STORE_BLOCK;
		struct ffs_error why = {0};
		ssize_t n = ffs_stored_read_memory(s, buf, len, off, &why);

		if (ffs_progress_cancelled(p)) {
			r = ffs_error_set(err, EINTR, "interrupted");
		} else if (n != (ssize_t)len) {
			r = ffs_error_set(
				err, EBADMSG, "%s", why.code ? why.text : "memory is shorter than its size");
		} else {
			struct ffs_hash h = ffs_hash_of(buf, len);

			XXH3_128bits_update(state, buf, len);
			if (!ffs_hash_equal(&h, &m->blocks[i]))
				r = damaged(s, file, off,
					"this block has another hash than " FFS_MANIFEST " says", err);
		}
		ffs_progress_add(p, len);
	}
	if (!r) {
		struct ffs_hash h = ffs_hash_digest(state);

		if (!ffs_hash_equal(&h, &m->memory_hash))
			r = damaged(
				s, file, 0, "as a whole it has another hash than " FFS_MANIFEST " says", err);
	}
	XXH3_freeState(state);
	return r;
}

static int check_file(struct ffs_stored *s, const struct ffs_file_entry *f, struct ffs_store_progress *p,
	struct ffs_error *err)
{
	_cleanup_close_ int fd = openat(s->dir, f->name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	struct ffs_hash h;
	uint64_t size = 0;
	int r;

	if (fd < 0)
		return ffs_error_set(
			err, EBADMSG, "%s/%s is not there: %s", s->path, f->name, strerror(errno));
	r = ffs_hash_file(fd, &h, &size, p);
	if (r == -EINTR)
		return ffs_error_set(err, EINTR, "interrupted");
	if (r < 0)
		return ffs_error_set(
			err, EBADMSG, "%s/%s cannot be read: %s", s->path, f->name, strerror(-r));
	if (size != f->size)
		return damaged(s, f->name, size < f->size ? size : f->size,
			"it has another size than its manifest says", err);
	return ffs_hash_equal(&h, &f->hash) ? 0
					    : damaged(s, f->name, 0, "its hash is not the manifest's", err);
}

/* Through a mount a packed branch looks dense. */
static bool is_packing(const struct ffs_file_entry *f)
{
	return strcmp(f->name, FFS_MEMORY_INDEX) == 0 ||
	       strncmp(f->name, FFS_MEMORY_PACK, strlen(FFS_MEMORY_PACK)) == 0;
}

bool ffs_stored_is_memory_file(const struct ffs_file_entry *f)
{
	return strcmp(f->name, FFS_MEMORY_DENSE) == 0 || is_packing(f);
}

int ffs_stored_verify(struct ffs_stored *s, struct ffs_store_progress *p, struct ffs_error *err)
{
	struct ffs_manifest m = {0};
	uint64_t total;
	int r = ffs_stored_load_hashes(s, &m, err);

	if (r < 0)
		return r;
	total = m.memory_size;
	for (unsigned i = 0; i < m.n_files; i++)
		total += strcmp(m.files[i].name, FFS_MEMORY_DENSE) ? m.files[i].size : 0;
	if (p)
		atomic_store(&p->total, total);
	r = check_memory(s, &m, p, err);
	for (unsigned i = 0; !r && i < m.n_files; i++)
		if (strcmp(m.files[i].name, FFS_MEMORY_DENSE) != 0 &&
			!(s->kind == FFS_STORE_DENSE && is_packing(&m.files[i])))
			r = check_file(s, &m.files[i], p, err);
	if (!r)
		r = ffs_stored_check_forks(s, err);
	ffs_manifest_clear(&m);
	return r;
}
