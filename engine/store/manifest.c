/* Owns the language of manifest.json: the store's members, the checksum, the version. No I/O, no state; any thread.
 *
 * A manifest comes from disk or from a stream and is checked before anything of it is believed. Members that are not
 * known are kept. The last member, manifest_xxh3_128, is the xxh3-128 of the whole text with its own 32 digits taken
 * as zeros: so a byte that was changed anywhere in the file is found. */
#include "store/internal.h"

#include <errno.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SEAL_KEY "manifest_xxh3_128"
#define SEAL_TAIL "\"\n}\n"
#define SEAL_ZEROS "00000000000000000000000000000000"
#define MAX_DEPTH 32

static const char seal_head[] = "\"" SEAL_KEY "\":\"";

/* ---- writing
 * ----------------------------------------------------------------------------------------------------------- */

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
	json_object_object_del(o, SEAL_KEY);
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
	struct ffs_hash h;
	char *text = NULL;
	char hex[33];

	json_object_object_del(o, SEAL_KEY);
	json_object_object_add(o, SEAL_KEY, json_object_new_string(SEAL_ZEROS));
	int n = asprintf(&text, "%s\n",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));

	if (n < 0)
		return ffs_error_set(err, ENOMEM, "no memory for a manifest");
	h = ffs_hash_of(text, (size_t)n);
	ffs_hash_hex(&h, hex);
	memcpy(text + (size_t)n - strlen(SEAL_TAIL) - 32, hex, 32);
	*out = text;
	*len = (size_t)n;
	return 0;
}

/* ---- reading
 * ----------------------------------------------------------------------------------------------------------- */

/* 1: sealed and whole; 0: has no seal; -EBADMSG. */
static int check_seal(const char *text, size_t len)
{
	size_t tail = strlen(SEAL_TAIL), head = strlen(seal_head), need = tail + 32 + head;
	_cleanup_free_ char *copy = NULL;
	struct ffs_hash want, is;
	char hex[33];

	if (!memmem(text, len, "\"" SEAL_KEY "\"", strlen(SEAL_KEY) + 2))
		return 0;
	if (len < need || memcmp(text + len - tail, SEAL_TAIL, tail) != 0 ||
		memcmp(text + len - need, seal_head, head) != 0)
		return -EBADMSG;
	memcpy(hex, text + len - tail - 32, 32);
	hex[32] = '\0';
	copy = malloc(len);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, text, len);
	memcpy(copy + len - tail - 32, SEAL_ZEROS, 32);
	is = ffs_hash_of(copy, len);
	return ffs_hash_parse(hex, &want) && ffs_hash_equal(&want, &is) ? 1 : -EBADMSG;
}

static int check_format(struct json_object *o, struct ffs_error *err)
{
	struct json_object *v = NULL;
	int64_t format = json_object_object_get_ex(o, "format", &v) && json_object_is_type(v, json_type_int)
				 ? json_object_get_int64(v)
				 : 0;

	if (format > FFS_STORE_FORMAT)
		return ffs_error_set(err, ENOTSUP,
			FFS_MANIFEST " is of format %" PRId64 ", written by a newer forkfs: this one reads format %u "
				     "at most, use that version",
			format, FFS_STORE_FORMAT);
	if (format < 1)
		return ffs_error_set(err, EBADMSG, FFS_MANIFEST " does not say its format");
	return 0;
}

static bool only_space(const char *text, size_t len)
{
	while (len && strchr(" \t\r\n", *text) && *text) {
		text++;
		len--;
	}
	return !len;
}

int ffs_manifest_parse(const char *text, size_t len, struct json_object **out, bool *sealed, struct ffs_error *err)
{
	struct json_tokener *tok = len <= FFS_MANIFEST_MAX ? json_tokener_new_ex(MAX_DEPTH) : NULL;
	struct json_object *o;
	int r, seal;

	if (!tok)
		return ffs_error_set(err, len > FFS_MANIFEST_MAX ? EFBIG : ENOMEM, FFS_MANIFEST " has %zu bytes", len);
	json_tokener_set_flags(tok, JSON_TOKENER_STRICT | JSON_TOKENER_ALLOW_TRAILING_CHARS);
	o = json_tokener_parse_ex(tok, text, (int)len);
	size_t used = json_tokener_get_parse_end(tok);
	enum json_tokener_error bad = json_tokener_get_error(tok);

	json_tokener_free(tok);
	if (!o || bad != json_tokener_success || !json_object_is_type(o, json_type_object) ||
		!only_space(text + used, len - used)) {
		json_object_put(o);
		return ffs_error_set(err, EBADMSG, FFS_MANIFEST " is no JSON object (near byte %zu)", used);
	}
	/* the version first: a newer one may be sealed in another way */
	r = check_format(o, err);
	seal = r ? 0 : check_seal(text, len);
	if (!r && seal < 0)
		r = ffs_error_set(err, -seal, seal == -ENOMEM ? "no memory" : FFS_MANIFEST " is damaged: its checksum is wrong");
	if (r < 0) {
		json_object_put(o);
		return r;
	}
	*out = o;
	*sealed = seal == 1;
	return 0;
}

static const char *string_at(struct json_object *o, const char *key)
{
	struct json_object *v = NULL;

	return o && json_object_object_get_ex(o, key, &v) && json_object_is_type(v, json_type_string)
		       ? json_object_get_string(v)
		       : "";
}

/* False: it is there and no size. */
static bool size_at(struct json_object *o, const char *key, uint64_t *out)
{
	struct json_object *v = NULL;

	if (!o || !json_object_object_get_ex(o, key, &v))
		return false;
	if (!json_object_is_type(v, json_type_int) || json_object_get_int64(v) < 0)
		return false;
	*out = (uint64_t)json_object_get_int64(v);
	return true;
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

	if (n < 1 || n >= sizeof(((struct ffs_file_entry *)NULL)->name) || name[0] == '/' || name[n - 1] == '/')
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

		if (!json_object_is_type(f, json_type_object) || !good_path(string_at(f, "name")) ||
			!size_at(f, "size", &e->size) || !ffs_hash_parse(string_at(f, "xxh3_128"), &e->hash))
			return -EBADMSG;
		snprintf(e->name, sizeof(e->name), "%s", string_at(f, "name"));
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
	if (!size_at(memory, "block_size", &unit) || unit != FFS_STORE_BLOCK ||
		!json_object_is_type(list, json_type_array) || json_object_array_length(list) != m->n_blocks ||
		!ffs_hash_parse(string_at(memory, "xxh3_128"), &m->memory_hash))
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
		!size_at(owner, "uid", &uid) || !size_at(owner, "gid", &gid) || uid >= UINT32_MAX || gid >= UINT32_MAX)
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
	snprintf(m.id, sizeof(m.id), "%.36s", string_at(o, "id"));
	snprintf(m.parent, sizeof(m.parent), "%.36s", string_at(o, "parent"));
	snprintf(m.name, sizeof(m.name), "%.64s", string_at(o, "name"));
	snprintf(m.sandbox, sizeof(m.sandbox), "%.64s", string_at(o, "sandbox"));
	m.time_ns = parse_time(string_at(o, "instant"));
	load_owner(o, &m);
	if (!json_object_is_type(memory, json_type_object) || !json_object_is_type(vmstate, json_type_object) ||
		!size_at(memory, "size", &m.memory_size) || !size_at(vmstate, "size", &m.vmstate_size) ||
		m.memory_size > INT64_MAX - FFS_STORE_BLOCK)
		r = -EBADMSG;
	if (!r && blocks)
		r = load_blocks(memory, &m);
	if (!r)
		r = load_files(o, &m);
	if (r < 0) {
		ffs_manifest_clear(&m);
		return ffs_error_set(err, -r, r == -ENOMEM ? "no memory" : FFS_MANIFEST " has members that make no sense");
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
