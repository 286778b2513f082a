/* Owns the writing of a branch as one stream: from a store's directory, from a copy of one, or from the tree.
 *
 * Threads: the caller's. Writes to a pipe may block for as long as its reader likes; a signal ends that (EINTR with
 * progress->cancel set). */
#include "store/stream.h"

#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store/forks.h"

void ffs_record_encode(const struct ffs_record_head *h, unsigned char out[FFS_RECORD_HEAD])
{
	uint32_t words[6] = {htole32(h->type), htole32(h->kind), htole32((uint32_t)h->length),
		htole32((uint32_t)(h->length >> 32)), htole32(h->stored), htole32(h->name)};

	memcpy(out, words, sizeof(words));
}

void ffs_record_decode(const unsigned char in[FFS_RECORD_HEAD], struct ffs_record_head *h)
{
	uint32_t w[6];

	memcpy(w, in, sizeof(w));
	*h = (struct ffs_record_head){.type = le32toh(w[0]),
		.kind = le32toh(w[1]),
		.length = le32toh(w[2]) | (uint64_t)le32toh(w[3]) << 32,
		.stored = le32toh(w[4]),
		.name = le32toh(w[5])};
}

struct out {
	struct ffs_stored *s;
	int fd;
	struct ffs_store_progress *p;
	XXH3_state_t *state;
	unsigned char *buf, *packed; /* a block, and its compressed form */
	struct ffs_error why;        /* of a fork */
};

static int put(struct out *o, const void *bytes, size_t len)
{
	const char *at = bytes;

	XXH3_128bits_update(o->state, bytes, len);
	while (len) {
		ssize_t n = ffs_progress_cancelled(o->p) ? -1 : write(o->fd, at, len);

		if (ffs_progress_cancelled(o->p))
			return -EINTR;
		if (n < 0 && errno != EINTR)
			return -errno;
		at += n > 0 ? n : 0;
		len -= n > 0 ? (size_t)n : 0;
	}
	return 0;
}

static int put_record(struct out *o, enum ffs_record type, enum ffs_chunk_kind kind, const char *name,
	uint64_t length, const void *bytes, uint32_t stored)
{
	struct ffs_record_head h = {.type = type,
		.kind = kind,
		.length = length,
		.stored = stored,
		.name = (uint32_t)strlen(name)};
	unsigned char head[FFS_RECORD_HEAD];
	int r;

	ffs_record_encode(&h, head);
	r = put(o, head, sizeof(head));
	if (!r && h.name)
		r = put(o, name, h.name);
	return r || !stored ? r : put(o, bytes, stored);
}

/* What is in o->buf, as small as it gets. */
static int put_data(struct out *o, enum ffs_record type, uint32_t len)
{
	int n;

	if (ffs_is_zero(o->buf, len))
		return put_record(o, type, FFS_CHUNK_ZERO, "", len, NULL, 0);
	n = LZ4_compress_default((const char *)o->buf, (char *)o->packed, (int)len, (int)len - 1);
	if (n > 0)
		return put_record(o, type, FFS_CHUNK_LZ4, "", len, o->packed, (uint32_t)n);
	return put_record(o, type, FFS_CHUNK_RAW, "", len, o->buf, len);
}

static int put_memory(struct out *o, uint64_t size, struct ffs_error *err)
{
	for (uint64_t off = 0; off < size;) {
		size_t len = size - off < FFS_STORE_BLOCK ? (size_t)(size - off) : FFS_STORE_BLOCK;
		struct ffs_error why = {0};
		ssize_t n = ffs_stored_read_memory(o->s, o->buf, len, off, &why);
		int r;

		if (n != (ssize_t)len)
			return ffs_error_set(
				err, EIO, "%s", why.code ? why.text : "memory is shorter than its size");
		r = put_data(o, FFS_RECORD_BLOCK, (uint32_t)len);
		if (r < 0)
			return r;
		off += len;
		ffs_progress_add(o->p, len);
	}
	return 0;
}

static int put_file(struct out *o, const struct ffs_file_entry *f, struct ffs_error *err)
{
	_cleanup_close_ int fd = openat(o->s->dir, f->name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	int r;

	if (fd < 0)
		return ffs_error_errno(err, errno, "%s/%s", o->s->path, f->name);
	r = put_record(o, FFS_RECORD_FILE, FFS_CHUNK_RAW, f->name, f->size, NULL, 0);
	for (uint64_t off = 0; !r && off < f->size;) {
		size_t len = f->size - off < FFS_STORE_BLOCK ? (size_t)(f->size - off) : FFS_STORE_BLOCK;
		ssize_t n = ffs_store_ops->pread(fd, o->buf, len, off);

		if (n != (ssize_t)len)
			return ffs_error_set(err, EIO, "%s/%s is shorter than its size", o->s->path, f->name);
		r = put_data(o, FFS_RECORD_DATA, (uint32_t)len);
		off += len;
		ffs_progress_add(o->p, len);
	}
	return r;
}

/* ---- a branch that is in memory only: its hashes are made first ---- */

static int add_hashed(struct ffs_draft *d, int dir, const char *name, struct ffs_store_progress *p)
{
	_cleanup_close_ int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	struct ffs_hash h;
	uint64_t size = 0;
	int r = fd < 0 ? -errno : ffs_hash_file(fd, &h, &size, p);

	return r < 0 ? r : ffs_draft_add_file(d, name, size, &h);
}

static int add_disks(struct ffs_draft *d, int dir, struct ffs_store_progress *p)
{
	int fd = ffs_store_open_subdir(dir, "disks"), r = 0;
	DIR *list = fd < 0 ? NULL : fdopendir(fd);

	if (!list) {
		ffs_close_fd(&fd);
		return fd == -1 || fd == -ENOENT ? 0 : -EIO;
	}
	for (struct dirent *e; !r && (e = readdir(list));) {
		char name[256];

		if (e->d_name[0] == '.')
			continue;
		if (snprintf(name, sizeof(name), FFS_DISKS "%s", e->d_name) >= (int)sizeof(name))
			r = -ENAMETOOLONG;
		else
			r = add_hashed(d, dir, name, p);
	}
	closedir(list);
	return r;
}

static int hash_memory(struct out *o, struct ffs_draft *d, struct ffs_error *err)
{
	XXH3_state_t *state = XXH3_createState();
	int r = state && d->blocks ? 0 : -ENOMEM;

	if (state)
		XXH3_128bits_reset(state);
	for (uint64_t i = 0; !r && i < d->n_blocks; i++) {
		uint64_t off = i * FFS_STORE_BLOCK, left = d->memory_size - off;
		size_t len = left < FFS_STORE_BLOCK ? (size_t)left : FFS_STORE_BLOCK;

		if (ffs_progress_cancelled(o->p))
			r = -EINTR;
		else if (ffs_stored_read_memory(o->s, o->buf, len, off, err) != (ssize_t)len)
			r = -EIO;
		else
			d->blocks[i] = ffs_hash_of(o->buf, len);
		XXH3_128bits_update(state, o->buf, len);
		ffs_progress_add(o->p, len);
	}
	if (!r)
		d->memory_hash = ffs_hash_digest(state);
	XXH3_freeState(state);
	return r;
}

/* The manifest of a branch of the tree, with what the store would have added. */
static int complete(struct out *o, char **text, size_t *len, struct ffs_error *err)
{
	struct ffs_draft d = {.kind = FFS_STORE_DENSE, .memory_size = o->s->m.memory_size};
	struct json_object *manifest = NULL;
	int r = ffs_stored_manifest(o->s, &manifest, err);

	d.n_blocks = d.memory_size / FFS_STORE_BLOCK + (d.memory_size % FFS_STORE_BLOCK != 0);
	d.blocks = calloc(d.n_blocks ? d.n_blocks : 1, sizeof(*d.blocks));
	snprintf(d.sandbox, sizeof(d.sandbox), "%s", o->s->m.sandbox);
	snprintf(d.name, sizeof(d.name), "%s", o->s->m.name);
	if (!r)
		r = hash_memory(o, &d, err);
	if (!r)
		r = add_hashed(&d, o->s->dir, FFS_VMSTATE, o->p);
	if (!r)
		r = add_disks(&d, o->s->dir, o->p);
	if (!r)
		r = ffs_manifest_fill(manifest, &d, d.files, d.n_files, 0);
	if (!r)
		r = ffs_manifest_text(manifest, text, len, err);
	json_object_put(manifest);
	free(d.blocks);
	free(d.files);
	return r;
}

/* ---- all of it ---- */

static int read_text(struct out *o, char **text, size_t *len)
{
	*len = (size_t)ffs_stored_manifest_size(o->s);
	*text = malloc(*len + 1);
	if (!*text)
		return -ENOMEM;
	(*text)[*len] = '\0';
	return ffs_stored_read_manifest(o->s, *text, *len, 0) == (ssize_t)*len ? 0 : -EIO;
}

/* What is handed on is right: whoever reads the stream has no other way to tell. */
static int put_fork(void *arg, const char *name)
{
	struct out *o = arg;
	struct ffs_fork_record r = {0};
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	int got = ffs_stored_fork(o->s, name, &r, &o->why);

	if (!got)
		got = ffs_fork_record_text(&r, &text, &len, &o->why);
	if (!got)
		got = put_record(o, FFS_RECORD_FORK, FFS_CHUNK_RAW, name, len, text, (uint32_t)len);
	ffs_fork_record_clear(&r);
	return got;
}

static int put_forks(struct out *o, struct ffs_error *err)
{
	int r = ffs_fork_files_each(o->s->dir, put_fork, o);

	return r < 0 && o->why.code ? ffs_error_set(err, o->why.code, "%s", o->why.text) : r;
}

static int put_all(struct out *o, const char *text, size_t len, struct ffs_error *err)
{
	unsigned char header[FFS_STREAM_HEADER] = FFS_STREAM_MAGIC;
	struct json_object *manifest = NULL;
	struct ffs_manifest m = {0};
	struct ffs_hash h;
	bool sealed;
	int r = ffs_manifest_parse(text, len, &manifest, &sealed, err);

	if (!r)
		r = ffs_manifest_load(manifest, false, &m, err);
	json_object_put(manifest);
	if (r < 0)
		return r;
	header[8] = FFS_STORE_FORMAT;
	r = put(o, header, sizeof(header));
	if (!r)
		r = put_record(o, FFS_RECORD_MANIFEST, FFS_CHUNK_RAW, "", len, text, (uint32_t)len);
	if (!r)
		r = put_memory(o, m.memory_size, err);
	for (unsigned i = 0; !r && i < m.n_files; i++)
		if (!ffs_stored_is_memory_file(&m.files[i]))
			r = put_file(o, &m.files[i], err);
	ffs_manifest_clear(&m);
	if (!r)
		r = put_forks(o, err);
	if (r < 0)
		return r;
	r = put_record(o, FFS_RECORD_END, FFS_CHUNK_RAW, "", sizeof(h), NULL, 0);
	h = ffs_hash_digest(o->state);
	return r ? r : put(o, h.b, sizeof(h.b));
}

int ffs_stored_export(struct ffs_stored *s, int fd, struct ffs_store_progress *p, struct ffs_error *err)
{
	struct out o = {.s = s, .fd = fd, .p = p, .state = XXH3_createState()};
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	int r = 0;

	o.buf = malloc(FFS_STORE_BLOCK);
	o.packed = malloc(FFS_STORE_BLOCK);
	if (!o.buf || !o.packed || !o.state)
		r = -ENOMEM;
	else
		XXH3_128bits_reset(o.state);
	if (p)
		atomic_store(&p->total, s->m.memory_size * (s->sealed ? 1 : 2));
	if (!r)
		r = s->sealed ? read_text(&o, &text, &len) : complete(&o, &text, &len, err);
	if (!r)
		r = put_all(&o, text, len, err);
	XXH3_freeState(o.state);
	free(o.buf);
	free(o.packed);
	if (r == -EINTR)
		return ffs_error_set(err, EINTR, "interrupted");
	return r < 0 && !(err && err->code) ? ffs_error_errno(err, -r, "%s cannot be exported", s->path) : r;
}
