/* Owns the language of manifest.json: the store's members. No I/O, no state; any thread.
 *
 * A manifest comes from disk or from a stream and is checked before anything of it is believed. Members that are not
 * known are kept. Its checksum and its version: seal.c. */
#include "store/internal.h"

#include <errno.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct ffs_seal seal = {
	.file = FFS_MANIFEST, .key = "manifest_xxh3_128", .max = FFS_MANIFEST_MAX};

/* ---- writing ---- */

static void add_hash(struct json_object *o, const char *key, const struct ffs_hash *h)
{
	char hex[33];

	ffs_hash_hex(h, hex);
	json_object_object_add(o, key, json_object_new_string(hex));
}

static void add_u64(struct json_object *o, const char *key, uint64_t v)
{
	json_object_object_add(o, key, json_object_new_uint64(v));
}

/* The object at key, made when there is none. */
static struct json_object *object_at(struct json_object *o, const char *key)
{
	struct json_object *v = NULL;

	if (json_object_object_get_ex(o, key, &v) && json_object_is_type(v, json_type_object))
		return v;
	v = json_object_new_object();
	json_object_object_add(o, key, v);
	return v;
}

int ffs_manifest_fill(struct json_object *o, const struct ffs_draft *d, const struct ffs_file_entry *files,
	unsigned n, uint64_t publish_ns)
{
	struct json_object *memory = object_at(o, "memory"), *vmstate = object_at(o, "vmstate"),
			   *store = object_at(o, "store"), *list = json_object_new_array(),
			   *blocks = json_object_new_array(), *shared = NULL;
	char hex[33];

	if (!memory || !vmstate || !store || !list || !blocks)
		return -ENOMEM;
	json_object_object_del(o, seal.key);
	add_u64(o, "format", FFS_STORE_FORMAT);
	json_object_object_add(o, "sandbox", json_object_new_string(d->sandbox));
	json_object_object_add(o, "name", json_object_new_string(d->name));
	add_u64(memory, "size", d->memory_size);
	add_hash(memory, "xxh3_128", &d->memory_hash);
	add_u64(memory, "block_size", FFS_STORE_BLOCK);
	for (uint64_t i = 0; i < d->n_blocks; i++) {
		ffs_hash_hex(&d->blocks[i], hex);
		json_object_array_add(blocks, json_object_new_string(hex));
	}
	json_object_object_add(memory, "blocks_xxh3_128", blocks);
	json_object_object_add(store, "kind", json_object_new_string(ffs_store_kind_name(d->kind)));
	add_u64(store, "write_ns", publish_ns);
	if (d->shared_id[0]) {
		shared = json_object_new_object();
		json_object_object_add(shared, "id", json_object_new_string(d->shared_id));
		json_object_object_add(shared, "name", json_object_new_string(d->shared_name));
	}
	json_object_object_add(store, "shared_with", shared);
	for (unsigned i = 0; i < n; i++) {
		struct json_object *f = json_object_new_object();

		json_object_object_add(f, "name", json_object_new_string(files[i].name));
		add_u64(f, "size", files[i].size);
		add_hash(f, "xxh3_128", &files[i].hash);
		json_object_array_add(list, f);
		if (strcmp(files[i].name, FFS_VMSTATE) == 0)
			add_u64(vmstate, "size", files[i].size);
	}
	json_object_object_add(o, "files", list);
	return 0;
}

int ffs_manifest_text(struct json_object *o, char **out, size_t *len, struct ffs_error *err)
{
	return ffs_seal_text(&seal, o, out, len, err);
}

/* ---- reading ---- */

int ffs_manifest_parse(
	const char *text, size_t len, struct json_object **out, bool *sealed, struct ffs_error *err)
{
	return ffs_seal_parse(&seal, text, len, out, sealed, err);
}

/* RFC 3339 in UTC; 0 for anything else. */
static uint64_t parse_time(const char *s)
{
	struct tm tm = {0};
	char frac[16] = "";
	uint64_t ns = 0;
	time_t t;

	if (sscanf(s, "%4d-%2d-%2dT%2d:%2d:%2d.%15[0-9]", &tm.tm_year, &tm.tm_mon, &tm.tm_mday, &tm.tm_hour,
		    &tm.tm_min, &tm.tm_sec, frac) < 6)
		return 0;
	tm.tm_year -= 1900;
	tm.tm_mon -= 1;
	t = timegm(&tm);
	for (unsigned i = 0; i < 9; i++)
		ns = ns * 10 + (i < strlen(frac) ? (uint64_t)(frac[i] - '0') : 0);
	return t < 0 ? 0 : (uint64_t)t * FFS_NS_PER_S + ns;
}

/* A file's name within the branch: no way out of it. */
static bool good_path(const char *name)
{
	size_t n = strlen(name);

	if (n < 1 || n >= sizeof(((struct ffs_file_entry *)NULL)->name) || name[0] == '/' ||
		name[n - 1] == '/')
		return false;
	for (const char *p = name; p; p = strchr(p, '/')) {
		p += *p == '/';
		if (*p == '/' || *p == '.')
			return false;
	}
	return strcmp(name, FFS_MANIFEST) != 0;
}

static int load_files(struct json_object *o, struct ffs_manifest *m)
{
	struct json_object *list = NULL;
	size_t n;

	if (!json_object_object_get_ex(o, "files", &list))
		return 0;
	if (!json_object_is_type(list, json_type_array))
		return -EBADMSG;
	n = json_object_array_length(list);
	m->files = calloc(n ? n : 1, sizeof(*m->files));
	if (!m->files)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++) {
		struct json_object *f = json_object_array_get_idx(list, i);
		struct ffs_file_entry *e = &m->files[i];

		if (!json_object_is_type(f, json_type_object) || !good_path(ffs_object_string(f, "name")) ||
			!ffs_object_size(f, "size", &e->size) ||
			!ffs_hash_parse(ffs_object_string(f, "xxh3_128"), &e->hash))
			return -EBADMSG;
		snprintf(e->name, sizeof(e->name), "%s", ffs_object_string(f, "name"));
		m->n_files++;
	}
	return 0;
}

static int load_blocks(struct json_object *memory, struct ffs_manifest *m)
{
	struct json_object *list = NULL;
	uint64_t unit = 0;

	if (!json_object_object_get_ex(memory, "blocks_xxh3_128", &list))
		return 0;
	m->n_blocks = m->memory_size / FFS_STORE_BLOCK + (m->memory_size % FFS_STORE_BLOCK != 0);
	if (!ffs_object_size(memory, "block_size", &unit) || unit != FFS_STORE_BLOCK ||
		!json_object_is_type(list, json_type_array) ||
		json_object_array_length(list) != m->n_blocks ||
		!ffs_hash_parse(ffs_object_string(memory, "xxh3_128"), &m->memory_hash))
		return -EBADMSG;
	m->blocks = calloc(m->n_blocks ? m->n_blocks : 1, sizeof(*m->blocks));
	if (!m->blocks)
		return -ENOMEM;
	for (uint64_t i = 0; i < m->n_blocks; i++) {
		struct json_object *v = json_object_array_get_idx(list, i);

		if (!json_object_is_type(v, json_type_string) ||
			!ffs_hash_parse(json_object_get_string(v), &m->blocks[i]))
			return -EBADMSG;
	}
	m->has_hashes = true;
	return 0;
}

static void load_owner(struct json_object *o, struct ffs_manifest *m)
{
	struct json_object *owner = NULL, *w = NULL;
	uint64_t uid, gid;

	if (!json_object_object_get_ex(o, "owner", &owner) || !json_object_is_type(owner, json_type_object) ||
		!ffs_object_size(owner, "uid", &uid) || !ffs_object_size(owner, "gid", &gid) ||
		uid >= UINT32_MAX || gid >= UINT32_MAX)
		return;
	m->has_owner = true;
	m->uid = (uid_t)uid;
	m->gid = (gid_t)gid;
	m->owner_writes = json_object_object_get_ex(owner, "writable", &w) && json_object_get_boolean(w);
}

int ffs_manifest_load(struct json_object *o, bool blocks, struct ffs_manifest *out, struct ffs_error *err)
{
	struct ffs_manifest m = {0};
	struct json_object *memory = NULL, *vmstate = NULL;
	int r = 0;

	json_object_object_get_ex(o, "memory", &memory);
	json_object_object_get_ex(o, "vmstate", &vmstate);
	snprintf(m.id, sizeof(m.id), "%.36s", ffs_object_string(o, "id"));
	snprintf(m.parent, sizeof(m.parent), "%.36s", ffs_object_string(o, "parent"));
	snprintf(m.name, sizeof(m.name), "%.64s", ffs_object_string(o, "name"));
	snprintf(m.sandbox, sizeof(m.sandbox), "%.64s", ffs_object_string(o, "sandbox"));
	m.time_ns = parse_time(ffs_object_string(o, "instant"));
	load_owner(o, &m);
	if (!json_object_is_type(memory, json_type_object) ||
		!json_object_is_type(vmstate, json_type_object) ||
		!ffs_object_size(memory, "size", &m.memory_size) ||
		!ffs_object_size(vmstate, "size", &m.vmstate_size) ||
		m.memory_size > INT64_MAX - FFS_STORE_BLOCK)
		r = -EBADMSG;
	if (!r && blocks)
		r = load_blocks(memory, &m);
	if (!r)
		r = load_files(o, &m);
	if (r < 0) {
		ffs_manifest_clear(&m);
		return ffs_error_set(
			err, -r, r == -ENOMEM ? "no memory" : FFS_MANIFEST " has members that make no sense");
	}
	*out = m;
	return 0;
}

void ffs_manifest_clear(struct ffs_manifest *m)
{
	free(m->blocks);
	free(m->files);
	*m = (struct ffs_manifest){0};
}
