/* Owns the decoder of a store's files for people. Reads only.
 *
 * Threads: the caller's. */
#include "store/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "store/forks.h"

static const char *const kind_names[] = {"zero", "raw", "lz4"};

static void add_u64(struct json_object *o, const char *key, uint64_t v)
{
	json_object_object_add(o, key, json_object_new_uint64(v));
}

static void add_hash(struct json_object *o, const char *key, const struct ffs_hash *h)
{
	char hex[33];

	ffs_hash_hex(h, hex);
	json_object_object_add(o, key, json_object_new_string(hex));
}

static struct json_object *packs_of(const struct ffs_stored *s)
{
	struct json_object *list = json_object_new_array();

	for (uint32_t i = 0; i < s->index.n_packs; i++) {
		const struct ffs_pack_entry *e = &s->index.packs[i];
		struct json_object *o = json_object_new_object();
		struct ffs_hash id;
		char name[40];
		struct stat st;
		uint64_t used = 0;

		snprintf(name, sizeof(name), FFS_MEMORY_PACK "%u", i);
		json_object_object_add(o, "file", json_object_new_string(name));
		memcpy(id.b, e->id, sizeof(id.b));
		add_hash(o, "id", &id);
		add_u64(o, "size", e->size);
		add_hash(o, "xxh3_128", &e->hash);
		for (uint64_t c = 0; c < s->index.n_chunks; c++)
			used += s->index.kind[c] != FFS_CHUNK_ZERO && s->index.pack[c] == i
					? s->index.stored[c]
					: 0;
		/* a chunk that occurs twice counts twice */
		add_u64(o, "referenced", used);
		if (fstatat(s->dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0)
			add_u64(o, "holders", st.st_nlink);
		json_object_array_add(list, o);
	}
	return list;
}

static struct json_object *chunks_of(const struct ffs_index *x)
{
	struct json_object *list = json_object_new_array();

	for (uint64_t i = 0; i < x->n_chunks; i++) {
		struct json_object *o = json_object_new_object();

		add_u64(o, "at", i * FFS_STORE_CHUNK);
		json_object_object_add(o, "kind", json_object_new_string(kind_names[x->kind[i]]));
		if (x->kind[i] != FFS_CHUNK_ZERO) {
			add_u64(o, "pack", x->pack[i]);
			add_u64(o, "offset", x->offset[i]);
			add_u64(o, "stored", x->stored[i]);
		}
		add_hash(o, "xxh3_128", &x->hash[i]);
		json_object_array_add(list, o);
	}
	return list;
}

static struct json_object *index_of(const struct ffs_stored *s, bool chunks)
{
	struct json_object *o = json_object_new_object(), *counts = json_object_new_object();
	uint64_t n[FFS_CHUNK_KINDS] = {0};

	add_u64(o, "memory_size", s->index.memory_size);
	add_u64(o, "chunk_size", FFS_STORE_CHUNK);
	add_u64(o, "chunks", s->index.n_chunks);
	for (uint64_t i = 0; i < s->index.n_chunks; i++)
		n[s->index.kind[i]]++;
	for (unsigned k = 0; k < FFS_CHUNK_KINDS; k++)
		add_u64(counts, kind_names[k], n[k]);
	json_object_object_add(o, "kinds", counts);
	json_object_object_add(o, "packs", packs_of(s));
	if (chunks)
		json_object_object_add(o, "chunk_list", chunks_of(&s->index));
	return o;
}

static struct json_object *boxes_of(const struct ffs_fork_record *r)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < r->n; i++) {
		const struct ffs_fork_box *b = &r->box[i];
		struct json_object *o = json_object_new_object();

		json_object_object_add(o, "name", json_object_new_string(b->frame.id.name));
		json_object_object_add(
			o, "kind", json_object_new_string(ffs_mailbox_layout(b->frame.id.kind)->title));
		add_u64(o, "offset", b->frame.offset);
		add_u64(o, "payload_bytes", b->payload.len);
		if (b->wants_ack)
			add_u64(o, "ack_timeout_ms", b->ack_timeout_ms);
		json_object_array_add(list, o);
	}
	return list;
}

struct forks {
	struct ffs_stored *s;
	struct json_object *list;
};

static int add_fork(void *arg, const char *name)
{
	struct forks *f = arg;
	struct json_object *o = json_object_new_object();
	struct ffs_fork_record r = {0};
	struct ffs_error why = {0};
	char epoch[37];

	json_object_object_add(o, "name", json_object_new_string(name));
	if (ffs_stored_fork(f->s, name, &r, &why) < 0) {
		json_object_object_add(o, "error", json_object_new_string(why.text));
	} else {
		ffs_uuid_text(r.epoch, epoch);
		json_object_object_add(o, "epoch", json_object_new_string(epoch));
		add_u64(o, "made_ns", r.made_ns);
		if (r.ack_port)
			add_u64(o, "ack_port", r.ack_port);
		json_object_object_add(o, "mailboxes", boxes_of(&r));
	}
	ffs_fork_record_clear(&r);
	json_object_array_add(f->list, o);
	return 0;
}

int ffs_store_inspect(const char *path, bool chunks, struct json_object **out, struct ffs_error *err)
{
	struct ffs_stored *s = NULL;
	struct json_object *o, *manifest = NULL;
	struct ffs_error why = {0};
	uint64_t all, shared;
	int r = ffs_stored_open_dir(path, &s, err);

	if (!r)
		r = ffs_stored_manifest(s, &manifest, err);
	if (r < 0) {
		ffs_stored_unref(s);
		return r;
	}
	o = json_object_new_object();
	ffs_stored_sizes(s, &all, &shared);
	json_object_object_add(o, "path", json_object_new_string(path));
	json_object_object_add(o, "kind", json_object_new_string(ffs_store_kind_name(s->kind)));
	json_object_object_add(o, "sealed", json_object_new_boolean(s->sealed));
	add_u64(o, "disk_bytes", all);
	add_u64(o, "disk_shared_bytes", shared);
	json_object_object_add(o, "manifest", manifest);
	if (s->kind == FFS_STORE_PACKED && ffs_packed_open(s, &why) == 0)
		json_object_object_add(o, "index", index_of(s, chunks));
	else if (s->kind == FFS_STORE_PACKED)
		json_object_object_add(o, "index_error", json_object_new_string(why.text));
	struct forks forks = {.s = s, .list = json_object_new_array()};

	json_object_object_add(o, "forks", forks.list);
	r = ffs_fork_files_each(s->dir, add_fork, &forks);
	if (r < 0)
		json_object_object_add(o, "forks_error", json_object_new_string(strerror(-r)));
	ffs_stored_unref(s);
	*out = o;
	return 0;
}
