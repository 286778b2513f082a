/* Owns the reading of a stream that export has made, and that anybody may have touched since: every length is bounded
 * before it is believed, every hash compared, and nothing is published before the stream's own hash at its end.
 *
 * Threads: the caller's. Reads from a pipe wait as long as its writer likes; a signal ends that. */
#include "store/stream.h"

#include <errno.h>
#include <json-c/json.h>
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store/forks.h"

struct in {
	int fd;
	struct ffs_store_progress *p;
	XXH3_state_t *state;
	unsigned char *packed;
	struct ffs_manifest m;
	uint64_t next; /* block */
	struct ffs_record_head head;
};

static int torn(struct ffs_error *err, const char *what)
{
	return ffs_error_set(err, EBADMSG, "the stream is damaged: %s", what);
}

static int get(struct in *in, void *bytes, size_t len, struct ffs_error *err)
{
	char *at = bytes;
	size_t left = len;

	while (left) {
		ssize_t n = ffs_progress_cancelled(in->p) ? 0 : ffs_store_ops->read(in->fd, at, left);

		if (ffs_progress_cancelled(in->p))
			return ffs_error_set(err, EINTR, "interrupted");
		if (n == 0)
			return torn(err, "it ends too early");
		if (n < 0 && n != -EINTR)
			return ffs_error_errno(err, (int)-n, "the stream cannot be read");
		at += n > 0 ? n : 0;
		left -= n > 0 ? (size_t)n : 0;
	}
	XXH3_128bits_update(in->state, bytes, len);
	return 0;
}

static int get_head(struct in *in, struct ffs_error *err)
{
	unsigned char bytes[FFS_RECORD_HEAD];
	int r = get(in, bytes, sizeof(bytes), err);

	if (!r)
		ffs_record_decode(bytes, &in->head);
	return r;
}

/* The bytes of a record whose head was read: exactly `len` of them, into buf. */
static int get_data(struct in *in, void *buf, size_t len, struct ffs_error *err)
{
	const struct ffs_record_head *h = &in->head;
	int r;

	if (h->length != len || h->name || h->kind >= FFS_CHUNK_KINDS ||
		(h->kind == FFS_CHUNK_ZERO         ? h->stored != 0
			: h->kind == FFS_CHUNK_RAW ? h->stored != len
						   : !h->stored || h->stored >= len))
		return torn(err, "a record makes no sense");
	if (h->kind == FFS_CHUNK_ZERO) {
		memset(buf, 0, len);
		return 0;
	}
	if (h->kind == FFS_CHUNK_RAW)
		return get(in, buf, len, err);
	r = get(in, in->packed, h->stored, err);
	if (!r && LZ4_decompress_safe((const char *)in->packed, buf, (int)h->stored, (int)len) != (int)len)
		r = torn(err, "what is compressed in it cannot be read");
	return r;
}

static int read_block(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err)
{
	struct in *in = arg;
	struct ffs_hash h;
	int r = get_head(in, err);

	if (!r && in->head.type != FFS_RECORD_BLOCK)
		r = torn(err, "a block of memory is missing");
	if (!r)
		r = get_data(in, buf, len, err);
	if (r < 0)
		return r;
	h = ffs_hash_of(buf, len);
	if (!ffs_hash_equal(&h, &in->m.blocks[in->next++]))
		return ffs_error_set(err, EBADMSG,
			"the stream is damaged: memory at offset %llu has another hash than its manifest "
			"says",
			(unsigned long long)off);
	return 0;
}

static int get_manifest(struct in *in, struct json_object **out, struct ffs_error *err)
{
	unsigned char header[FFS_STREAM_HEADER];
	_cleanup_free_ char *text = NULL;
	struct json_object *o = NULL;
	bool sealed = false;
	int r = get(in, header, sizeof(header), err);

	if (!r && memcmp(header, FFS_STREAM_MAGIC, 8) != 0)
		r = ffs_error_set(err, EBADMSG, "this is no stream of forkfs export");
	if (!r && (header[8] > FFS_STORE_FORMAT || header[9] || header[10] || header[11]))
		r = ffs_error_set(err, ENOTSUP, "the stream was written by a newer forkfs: use that version");
	if (!r)
		r = get_head(in, err);
	if (!r && (in->head.type != FFS_RECORD_MANIFEST || in->head.kind != FFS_CHUNK_RAW || in->head.name ||
			  in->head.length != in->head.stored || in->head.length > FFS_MANIFEST_MAX))
		r = torn(err, "it does not begin with a manifest");
	if (r < 0)
		return r;
	text = malloc(in->head.length + 1);
	if (!text)
		return ffs_error_set(err, ENOMEM, "no memory for a manifest");
	r = get(in, text, in->head.length, err);
	text[in->head.length] = '\0';
	if (!r)
		r = ffs_manifest_parse(text, in->head.length, &o, &sealed, err);
	if (!r)
		r = ffs_manifest_load(o, true, &in->m, err);
	if (!r && (!sealed || !in->m.has_hashes))
		r = torn(err, "its manifest has no hashes");
	if (r < 0)
		json_object_put(o);
	else
		*out = o;
	return r;
}

static const struct ffs_file_entry *entry_of(const struct ffs_manifest *m, const char *name)
{
	for (unsigned i = 0; i < m->n_files; i++)
		if (strcmp(m->files[i].name, name) == 0)
			return &m->files[i];
	return NULL;
}

/* Where the file goes: `vmstate` or a disk; nothing else is written in a name that came from outside. */
static int create(struct ffs_draft *d, const char *name, struct ffs_error *err)
{
	_cleanup_close_ int dir = -1;
	int fd, r;

	if (strcmp(name, FFS_VMSTATE) == 0) {
		fd = ffs_store_ops->create(d->fd, name);
	} else {
		if (strncmp(name, FFS_DISKS, strlen(FFS_DISKS)) != 0 ||
			ffs_check_name("disk", name + strlen(FFS_DISKS), NULL) < 0)
			return ffs_error_set(
				err, EBADMSG, "the stream has a file '%.64s' that no branch has", name);
		r = ffs_store_ops->mkdir(d->fd, "disks");
		dir = r && r != -EEXIST ? r : ffs_store_open_subdir(d->fd, "disks");
		fd = dir < 0 ? dir : ffs_store_ops->create(dir, name + strlen(FFS_DISKS));
	}
	return fd < 0 ? ffs_store_errno(d->st, -fd, err, "%s of branch %s cannot be written", name, d->label)
		      : fd;
}

/* A file whose head was read. */
static int get_file(struct in *in, struct ffs_draft *d, unsigned char *buf, struct ffs_error *err)
{
	char name[FFS_STREAM_NAME_MAX + 1] = "";
	uint64_t size = in->head.length;
	const struct ffs_file_entry *e;
	_cleanup_close_ int fd = -1;
	XXH3_state_t *state;
	int r;

	if (in->head.name > FFS_STREAM_NAME_MAX || in->head.stored)
		return torn(err, "a file makes no sense");
	r = get(in, name, in->head.name, err);
	if (r < 0)
		return r;
	e = entry_of(&in->m, name);
	if (!e || e->size != size || strlen(name) != in->head.name)
		return torn(err, "it has a file that its manifest does not name");
	fd = create(d, name, err);
	state = fd < 0 ? NULL : XXH3_createState();
	if (!state)
		return fd < 0 ? fd : ffs_error_set(err, ENOMEM, "no memory");
	XXH3_128bits_reset(state);
	for (uint64_t off = 0; !r && off < size;) {
		size_t len = size - off < FFS_STORE_BLOCK ? (size_t)(size - off) : FFS_STORE_BLOCK;

		r = get_head(in, err);
		if (!r && in->head.type != FFS_RECORD_DATA)
			r = torn(err, "a piece of a file is missing");
		if (!r)
			r = get_data(in, buf, len, err);
		if (r < 0)
			break;
		XXH3_128bits_update(state, buf, len);
		r = ffs_store_ops->write(fd, buf, len, off);
		if (r < 0)
			ffs_store_errno(d->st, -r, err, "%s of branch %s cannot be written", name, d->label);
		off += len;
		ffs_progress_add(in->p, len);
	}
	struct ffs_hash h = ffs_hash_digest(state);

	XXH3_freeState(state);
	if (!r && !ffs_hash_equal(&h, &e->hash))
		r = ffs_error_set(err, EBADMSG,
			"the stream is damaged: %s has another hash than its manifest says", name);
	return r ? r : ffs_draft_add_file(d, name, size, &h);
}

/* A fork whose head was read; its text is checked with its branch when that is read. */
static int get_fork(struct in *in, struct ffs_draft *d, struct ffs_error *err)
{
	char name[FFS_STREAM_NAME_MAX + 1] = "";
	const struct ffs_record_head h = in->head;
	struct ffs_fork_record fork = {0};
	_cleanup_free_ char *text = NULL;
	bool there;
	int r;

	if (h.name > FFS_STREAM_NAME_MAX || h.stored > FFS_FORK_FILE_MAX || h.length != h.stored ||
		h.kind != FFS_CHUNK_RAW)
		return torn(err, "a fork makes no sense");
	text = malloc((size_t)h.stored + 1);
	if (!text)
		return ffs_error_set(err, ENOMEM, "no memory for a fork");
	r = get(in, name, h.name, err);
	if (!r)
		r = get(in, text, h.stored, err);
	if (!r && (strlen(name) != h.name || ffs_check_name("fork", name, NULL) < 0))
		r = torn(err, "a fork has no name");
	if (!r)
		r = ffs_fork_record_parse(text, h.stored, name, in->m.id, &fork, err);
	ffs_fork_record_clear(&fork);
	if (r < 0)
		return r;
	r = ffs_fork_file_write(d->fd, name, text, h.stored);
	if (!r)
		r = ffs_fork_file_publish(d->fd, name, true, &there);
	if (r == -EEXIST)
		return torn(err, "a fork is there twice");
	return r < 0 ? ffs_store_errno(
			       d->st, -r, err, "fork %s of branch %s cannot be written", name, d->label)
		     : 0;
}

/* Files, forks, then the end. */
static int get_rest(struct in *in, struct ffs_draft *d, struct ffs_error *err)
{
	_cleanup_free_ unsigned char *buf = malloc(FFS_STORE_BLOCK);
	unsigned files = 0, want = 0;
	struct ffs_hash is, said;
	int r = buf ? 0 : ffs_error_set(err, ENOMEM, "no memory");

	for (unsigned i = 0; i < in->m.n_files; i++)
		want += !ffs_stored_is_memory_file(&in->m.files[i]);
	while (!r && !(r = get_head(in, err)) && in->head.type == FFS_RECORD_FILE) {
		r = get_file(in, d, buf, err);
		files++;
	}
	while (!r && in->head.type == FFS_RECORD_FORK) {
		r = get_fork(in, d, err);
		if (!r)
			r = get_head(in, err);
	}
	if (r < 0)
		return r;
	if (in->head.type != FFS_RECORD_END || in->head.length != sizeof(said) || in->head.stored ||
		in->head.name || in->head.kind != FFS_CHUNK_RAW)
		return torn(err, "its end makes no sense");
	if (files != want)
		return torn(err, "a file is missing");
	is = ffs_hash_digest(in->state);
	r = get(in, &said, sizeof(said), err);
	return r || ffs_hash_equal(&is, &said) ? r : torn(err, "its checksum is wrong");
}

/* All is written but the branch is not there yet: its forks must fit its memory. */
struct last_look {
	struct ffs_draft *d;
	struct ffs_error why;
};

static int look_at_forks(void *arg)
{
	struct last_look *l = arg;
	struct ffs_stored *s = NULL;
	int r = ffs_stored_open_draft(l->d, &s, &l->why);

	if (!r)
		r = ffs_stored_check_forks(s, &l->why);
	ffs_stored_unref(s);
	return r;
}

static void looked(void *arg, int result)
{
}

static int publish(struct ffs_draft *d, struct json_object *manifest, struct ffs_error *err)
{
	struct last_look l = {.d = d};
	struct ffs_publish_gate gate = {.enter = look_at_forks, .leave = looked, .arg = &l};
	int r = ffs_store_publish(d, manifest, &gate, err);

	return l.why.code ? ffs_error_set(err, l.why.code, "the stream is damaged: %.480s", l.why.text) : r;
}

static enum ffs_store_kind kind_of(struct json_object *o)
{
	struct json_object *store = NULL, *kind = NULL;
	enum ffs_store_kind k;

	if (json_object_object_get_ex(o, "store", &store) && json_object_is_type(store, json_type_object) &&
		json_object_object_get_ex(store, "kind", &kind) &&
		json_object_is_type(kind, json_type_string) &&
		ffs_store_kind_parse(json_object_get_string(kind), &k) && k != FFS_STORE_MEMORY)
		return k;
	return FFS_STORE_DENSE;
}

int ffs_store_import(struct ffs_store *st, int fd, const char *sandbox, const char *name,
	enum ffs_store_kind kind, struct ffs_store_progress *p, struct ffs_error *err)
{
	struct in in = {.fd = fd, .p = p, .state = XXH3_createState(), .packed = malloc(FFS_STORE_BLOCK)};
	struct ffs_store_source src = {.read = read_block, .arg = &in};
	struct ffs_stored *share = NULL;
	struct json_object *manifest = NULL;
	struct ffs_draft *d = NULL;
	int r = in.state && in.packed ? 0 : ffs_error_set(err, ENOMEM, "no memory");

	if (!r) {
		XXH3_128bits_reset(in.state);
		r = get_manifest(&in, &manifest, err);
	}
	if (!r)
		r = ffs_draft_begin(st, sandbox, name, &d, err);
	if (!r) {
		kind = kind == FFS_STORE_MEMORY ? kind_of(manifest) : kind;
		share = kind == FFS_STORE_PACKED ? ffs_store_find_share(st, sandbox, &in.m) : NULL;
		r = ffs_draft_memory_from(d, &src, in.m.memory_size, kind, share, p, err);
		ffs_stored_unref(share);
	}
	if (!r && !ffs_hash_equal(&d->memory_hash, &in.m.memory_hash))
		r = torn(err, "memory as a whole has another hash than its manifest says");
	if (!r)
		r = get_rest(&in, d, err);
	if (!r) {
		/* it has a name of its user's, and is no entry of a cache any more */
		json_object_object_del(manifest, "key");
		/* by a stranger: what it says is not run without being asked for */
		json_object_object_add(manifest, "imported", json_object_new_boolean(true));
		r = publish(d, manifest, err);
	}
	ffs_draft_end(d);
	json_object_put(manifest);
	ffs_manifest_clear(&in.m);
	XXH3_freeState(in.state);
	free(in.packed);
	return r;
}
