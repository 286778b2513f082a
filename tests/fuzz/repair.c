/* Makes the checksums of a fuzzer's input right: it would never guess one, and nothing behind them would be
 * looked at.
 *
 * Nothing here is of the product: what is tested still compares every hash. */
#include "fuzz-store.h"

#include <json-c/json.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>

#include "store/stream.h"

#define MAX_BLOCKS 8u
#define AT_INDEX_HASH 112u

static unsigned char *copy_of(const unsigned char *in, size_t len)
{
	unsigned char *copy = malloc(len + 1);

	if (!copy)
		abort();
	memcpy(copy, in, len);
	copy[len] = '\0';
	return copy;
}

static unsigned char *repair_seal(const unsigned char *in, size_t *len, const char *head)
{
	static const char tail[] = "\"\n}\n";
	size_t h = strlen(head), t = sizeof(tail) - 1;
	unsigned char *copy, *digits;
	char hex[33];

	if (*len < h + 32 + t || memcmp(in + *len - t, tail, t) != 0 ||
		memcmp(in + *len - t - 32 - h, head, h) != 0)
		return NULL;
	copy = copy_of(in, *len);
	digits = copy + *len - t - 32;
	memset(digits, '0', 32);
	struct ffs_hash is = ffs_hash_of(copy, *len);

	ffs_hash_hex(&is, hex);
	memcpy(digits, hex, 32);
	return copy;
}

unsigned char *repair_manifest(const unsigned char *in, size_t *len)
{
	return repair_seal(in, len, "\"manifest_xxh3_128\":\"");
}

unsigned char *repair_fork(const unsigned char *in, size_t *len)
{
	return repair_seal(in, len, "\"fork_xxh3_128\":\"");
}

unsigned char *repair_index(const unsigned char *in, size_t *len)
{
	unsigned char *copy;

	if (*len < AT_INDEX_HASH + 16)
		return NULL;
	copy = copy_of(in, *len);
	memset(copy + AT_INDEX_HASH, 0, 16);
	struct ffs_hash is = ffs_hash_of(copy, *len);

	memcpy(copy + AT_INDEX_HASH, is.b, 16);
	return copy;
}

/* ---- the stream ---- */

/* Its records are walked as far as they make sense, and what they hold is hashed. */
struct walk {
	const unsigned char *at, *end;
	struct ffs_hash blocks[MAX_BLOCKS];
	unsigned n_blocks;
	XXH3_state_t *memory, *file;
	struct json_object *manifest;
	char name[FFS_STREAM_NAME_MAX + 1];
	unsigned char *buf;
};

static void set_hash(struct json_object *o, const char *key, const struct ffs_hash *h)
{
	char hex[33];

	ffs_hash_hex(h, hex);
	json_object_object_add(o, key, json_object_new_string(hex));
}

/* The data of a record into buf; false: they make no sense. */
static bool data_of(struct walk *w, const struct ffs_record_head *h)
{
	if (h->length > FFS_STORE_BLOCK || h->kind >= FFS_CHUNK_KINDS ||
		(h->kind == FFS_CHUNK_RAW && h->stored != h->length))
		return false;
	if (h->kind == FFS_CHUNK_LZ4)
		return LZ4_decompress_safe((const char *)w->at, (char *)w->buf, (int)h->stored,
			       (int)h->length) == (int)h->length;
	if (h->kind == FFS_CHUNK_ZERO)
		memset(w->buf, 0, h->length);
	else
		memcpy(w->buf, w->at, h->stored);
	return true;
}

static void end_file(struct walk *w)
{
	struct ffs_hash h = ffs_hash_digest(w->file);
	struct json_object *list = NULL, *name = NULL;

	if (!w->name[0] || !json_object_object_get_ex(w->manifest, "files", &list) ||
		!json_object_is_type(list, json_type_array))
		return;
	for (size_t i = 0; i < json_object_array_length(list); i++) {
		struct json_object *f = json_object_array_get_idx(list, i);

		if (json_object_is_type(f, json_type_object) && json_object_object_get_ex(f, "name", &name) &&
			json_object_is_type(name, json_type_string) &&
			strcmp(json_object_get_string(name), w->name) == 0)
			set_hash(f, "xxh3_128", &h);
	}
}

/* One record; false: the last that makes sense. */
static bool step(struct walk *w)
{
	struct ffs_record_head h;

	if ((size_t)(w->end - w->at) < FFS_RECORD_HEAD)
		return false;
	ffs_record_decode(w->at, &h);
	w->at += FFS_RECORD_HEAD;
	if (h.name > FFS_STREAM_NAME_MAX || (size_t)(w->end - w->at) < (size_t)h.name + h.stored)
		return false;
	if (h.type == FFS_RECORD_FILE) {
		end_file(w);
		memcpy(w->name, w->at, h.name);
		w->name[h.name] = '\0';
		XXH3_128bits_reset(w->file);
		w->at += h.name;
		return true;
	}
	if ((h.type != FFS_RECORD_BLOCK && h.type != FFS_RECORD_DATA) || h.name || !data_of(w, &h))
		return false;
	w->at += h.stored;
	XXH3_128bits_update(h.type == FFS_RECORD_BLOCK ? w->memory : w->file, w->buf, h.length);
	if (h.type == FFS_RECORD_BLOCK && w->n_blocks < MAX_BLOCKS)
		w->blocks[w->n_blocks++] = ffs_hash_of(w->buf, h.length);
	return true;
}

static void fill_manifest(struct walk *w)
{
	struct ffs_hash h = ffs_hash_digest(w->memory);
	struct json_object *memory = NULL, *list = NULL;
	char hex[33];

	end_file(w);
	if (!json_object_object_get_ex(w->manifest, "memory", &memory) ||
		!json_object_is_type(memory, json_type_object))
		return;
	set_hash(memory, "xxh3_128", &h);
	if (!json_object_object_get_ex(memory, "blocks_xxh3_128", &list) ||
		!json_object_is_type(list, json_type_array))
		return;
	for (unsigned i = 0; i < w->n_blocks && i < json_object_array_length(list); i++) {
		ffs_hash_hex(&w->blocks[i], hex);
		json_object_array_put_idx(list, i, json_object_new_string(hex));
	}
}

/* Header, the manifest anew, the records as they are, their hash at the end where one belongs. */
static unsigned char *assemble(
	const struct walk *w, const unsigned char *in, const unsigned char *records, size_t *len)
{
	size_t text_len = 0, rest = (size_t)(w->end - records);
	unsigned char *out = NULL;
	char *text = NULL;

	if (ffs_manifest_text(w->manifest, &text, &text_len, NULL) < 0)
		return NULL;
	struct ffs_record_head h = {.type = FFS_RECORD_MANIFEST,
		.kind = FFS_CHUNK_RAW,
		.length = text_len,
		.stored = (uint32_t)text_len};
	size_t head = FFS_STREAM_HEADER + FFS_RECORD_HEAD, all = head + text_len + rest;

	out = malloc(all + 1);
	if (!out)
		abort();
	memcpy(out, in, FFS_STREAM_HEADER);
	ffs_record_encode(&h, out + FFS_STREAM_HEADER);
	memcpy(out + head, text, text_len);
	memcpy(out + head + text_len, records, rest);
	free(text);
	if (rest >= 16) {
		struct ffs_hash is = ffs_hash_of(out, all - 16);

		memcpy(out + all - 16, is.b, 16);
	}
	*len = all;
	return out;
}

unsigned char *repair_stream(const unsigned char *in, size_t *len)
{
	struct walk w = {.end = in + *len};
	const unsigned char *records, *text = in + FFS_STREAM_HEADER + FFS_RECORD_HEAD;
	struct ffs_record_head h;
	unsigned char *copy, *out = NULL;

	if (*len < FFS_STREAM_HEADER + FFS_RECORD_HEAD)
		return NULL;
	ffs_record_decode(in + FFS_STREAM_HEADER, &h);
	if (h.stored > (size_t)(w.end - text))
		return NULL;
	copy = copy_of(text, h.stored);
	w.manifest = json_tokener_parse((const char *)copy);
	free(copy);
	if (!json_object_is_type(w.manifest, json_type_object)) {
		json_object_put(w.manifest);
		return NULL;
	}
	w.memory = XXH3_createState();
	w.file = XXH3_createState();
	w.buf = malloc(FFS_STORE_BLOCK);
	if (!w.memory || !w.file || !w.buf)
		abort();
	XXH3_128bits_reset(w.memory);
	XXH3_128bits_reset(w.file);
	w.at = records = text + h.stored;
	while (step(&w))
		;
	fill_manifest(&w);
	out = assemble(&w, in, records, len);
	json_object_put(w.manifest);
	XXH3_freeState(w.memory);
	XXH3_freeState(w.file);
	free(w.buf);
	return out;
}
