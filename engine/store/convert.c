/* Owns the way of a published branch from one form to the other: a draft beside it, with everything of it,
 * that takes its place when it is whole.
 *
 * Every block and file is compared with the manifest on the way: damage is not carried over. Who reads the
 * old form goes on, if its files were open before (ffs_stored_hold()).
 *
 * Threads: the caller's. Waits for the disk. */
#include "store/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct source {
	struct ffs_stored *s;
	const struct ffs_manifest *m;
};

static int read_block(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	struct source *src = arg;
	ssize_t n = ffs_stored_read_memory(src->s, buf, len, off, err);
	struct ffs_hash h;

	if (n != (ssize_t)len)
		return n < 0 ? (int)n
			     : ffs_error_set(err, EIO, "%s: memory is shorter than its size", src->s->path);
	h = ffs_hash_of(buf, len);
	if (!ffs_hash_equal(&h, &src->m->blocks[off / FFS_STORE_BLOCK]))
		return ffs_error_set(err, EBADMSG,
			"%s is damaged: memory at offset %llu has another hash than " FFS_MANIFEST
			" says (forkfs verify)",
			src->s->path, (unsigned long long)off);
	return 0;
}

/* vmstate and disks are the same files: by another name of them, or by a copy where there are no links. */
static int take_file(struct ffs_draft *d, struct ffs_stored *s, const char *name,
	struct ffs_store_progress *p, struct ffs_error *err)
{
	const char *base = strncmp(name, FFS_DISKS, strlen(FFS_DISKS)) == 0 ? name + strlen(FFS_DISKS) : NULL;
	_cleanup_close_ int from = -1, to = -1, fd = -1;
	int r;

	if (base) {
		r = ffs_store_ops->mkdir(d->fd, "disks");
		if (r < 0 && r != -EEXIST)
			return ffs_store_errno(
				d->st, -r, err, "%s of branch %s cannot be written", name, d->label);
		from = ffs_store_open_subdir(s->dir, "disks");
		to = ffs_store_open_subdir(d->fd, "disks");
		if (from < 0 || to < 0)
			return ffs_error_errno(err, EIO, "%s/disks", s->path);
	}
	r = ffs_store_ops->link(
		base ? from : s->dir, base ? base : name, base ? to : d->fd, base ? base : name);
	if (r != -EMLINK && r != -EPERM && r != -ENOTSUP)
		return r < 0 ? ffs_store_errno(
				       d->st, -r, err, "%s of branch %s cannot be linked", name, d->label)
			     : 0;
	fd = openat(s->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return ffs_error_errno(err, errno, "%s/%s", s->path, name);
	return base ? ffs_draft_disk(d, base, fd, p, err) : ffs_draft_file(d, name, fd, err);
}

static int take_files(
	struct ffs_draft *d, const struct source *src, struct ffs_store_progress *p, struct ffs_error *err)
{
	for (unsigned i = 0; i < src->m->n_files; i++) {
		const struct ffs_file_entry *f = &src->m->files[i];
		_cleanup_close_ int fd = -1;
		struct ffs_hash h;
		uint64_t size = 0;
		int r;

		if (ffs_stored_is_memory_file(f))
			continue;
		r = take_file(d, src->s, f->name, p, err);
		if (r < 0)
			return r;
		fd = openat(d->fd, f->name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
		r = fd < 0 ? -errno : ffs_hash_file(fd, &h, &size, p);
		if (r < 0)
			return ffs_error_errno(err, -r, "%s of branch %s", f->name, d->label);
		if (size != f->size || !ffs_hash_equal(&h, &f->hash))
			return ffs_error_set(err, EBADMSG,
				"%s/%s is damaged: its hash is not the manifest's (forkfs verify)",
				src->s->path, f->name);
	}
	return 0;
}

static uint64_t other_bytes(const struct ffs_manifest *m)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < m->n_files; i++)
		n += ffs_stored_is_memory_file(&m->files[i]) ? 0 : m->files[i].size;
	return n;
}

static int write_other(struct ffs_draft *d, struct source *src, enum ffs_store_kind kind,
	const struct ffs_publish_gate *gate, struct ffs_store_progress *p, struct ffs_error *err)
{
	struct ffs_store_source memory = {.read = read_block, .arg = src};
	struct ffs_stored *share =
		kind == FFS_STORE_PACKED ? ffs_store_find_share(d->st, d->sandbox, src->m) : NULL;
	struct json_object *manifest = NULL;
	int r = ffs_draft_memory_from(d, &memory, src->m->memory_size, kind, share, p, err);

	ffs_stored_unref(share);
	if (!r && !ffs_hash_equal(&d->memory_hash, &src->m->memory_hash))
		r = ffs_error_set(err, EBADMSG,
			"%s is damaged: memory as a whole has another hash than " FFS_MANIFEST " says",
			src->s->path);
	if (!r && p)
		atomic_fetch_add(&p->total, other_bytes(src->m));
	if (!r)
		r = take_files(d, src, p, err);
	if (!r)
		r = ffs_stored_manifest(src->s, &manifest, err);
	if (!r)
		r = ffs_store_publish(d, manifest, gate, err);
	json_object_put(manifest);
	return r;
}

int ffs_store_convert(struct ffs_store *st, const char *sandbox, const char *name, enum ffs_store_kind kind,
	const struct ffs_publish_gate *gate, struct ffs_store_progress *p, struct ffs_error *err)
{
	struct ffs_manifest m = {0};
	struct source src = {.m = &m};
	struct ffs_draft *d = NULL;
	int r = ffs_stored_open(st, sandbox, name, &src.s, err);

	if (!r && src.s->kind != kind) {
		r = ffs_stored_load_hashes(src.s, &m, err);
		if (!r)
			r = ffs_draft_begin_other(st, sandbox, name, src.s, &d, err);
		if (!r)
			r = write_other(d, &src, kind, gate, p, err);
		ffs_draft_end(d);
		ffs_manifest_clear(&m);
		r = r ? r : 1;
	}
	ffs_stored_unref(src.s);
	return r;
}
