/* The inside of engine/store: what its files share. Every change to a store's directory goes through the table of
 * operations, so that tests can record a publish, replay each prefix of it, and fail each step; and so does every read
 * of what the store does not trust to be there. */
#pragma once

#include <pthread.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "base/cancel.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "store/store.h"

#define FFS_NAME_MAX 160 /* a branch's name, a suffix and a number */
#define FFS_SUFFIX_PARTIAL ".partial"
#define FFS_SUFFIX_FAILED ".failed"
#define FFS_SUFFIX_REMOVING ".removing"
#define FFS_MANIFEST "manifest.json"
#define FFS_MEMORY_DENSE "memory.bin"
#define FFS_MEMORY_INDEX "memory.idx"
#define FFS_MEMORY_PACK "memory.pack."
#define FFS_VMSTATE "vmstate"
#define FFS_DISKS "disks/"
#define FFS_FORKS "forks"
#define FFS_FORK_SUFFIX ".json"
#define FFS_FORK_RECORD "record.json" /* the same file through a mount: forks/NAME/record.json */
#define FFS_MANIFEST_MAX (256u << 20)

/* ---- ops.c: 0 (or bytes, or a descriptor) or -errno; EINTR is retried, but not by read ---- */

/* What is done with `to`: it must not be there; it is replaced; the two change places. */
enum ffs_rename { FFS_RENAME_NEW, FFS_RENAME_OVER, FFS_RENAME_EXCHANGE };

struct ffs_store_ops {
	int (*mkdir)(int dir, const char *name);                         /* mode 0700 */
	int (*create)(int dir, const char *name);                        /* a new file, 0600, read-write */
	int (*write)(int fd, const void *buf, size_t len, uint64_t off); /* all of it */
	int (*allocate)(int fd, uint64_t size); /* -ENOTSUP: the file system cannot */
	int (*fsync)(int fd);
	int (*rename)(int dir, const char *from, const char *to, enum ffs_rename how);
	int (*link)(int from_dir, const char *from, int dir, const char *to);
	int (*unlink)(int dir, const char *name, bool directory);
	ssize_t (*pread)(
		int fd, void *buf, size_t len, uint64_t off); /* all of it, but at the end of the file */
	ssize_t (*read)(int fd, void *buf, size_t len);       /* what there is */
};
extern const struct ffs_store_ops ffs_store_ops_real;
/* What is used; tests put a table of their own here. */
extern const struct ffs_store_ops *ffs_store_ops;

/* Open a subdirectory (not through a symlink). */
int ffs_store_open_subdir(int dir, const char *name);
/* Delete a directory with all that is in it; -ENOENT is no error. */
int ffs_store_remove_tree(int dir, const char *name);
/* Write a small file and sync it; the directory is the caller's to sync. */
int ffs_store_write_file(int dir, const char *name, const void *buf, size_t len);
/* Does name end in suffix? */
bool ffs_has_suffix(const char *name, const char *suffix);

/* ---- hashes ---- */

/* xxh3-128 as it is stored: the canonical (big-endian) form. */
struct ffs_hash {
	unsigned char b[16];
};
struct ffs_hash ffs_hash_of(const void *buf, size_t len);
struct ffs_hash ffs_hash_digest(const XXH3_state_t *state);
void ffs_hash_hex(const struct ffs_hash *h, char out[33]);
/* 32 lower-case digits and nothing else. */
bool ffs_hash_parse(const char *hex, struct ffs_hash *out);
bool ffs_hash_equal(const struct ffs_hash *a, const struct ffs_hash *b);
/* Of a file from its offset 0 to its end. */
int ffs_hash_file(int fd, struct ffs_hash *out, uint64_t *size, struct ffs_store_progress *p);

/* ---- store.c ---- */

struct ffs_store {
	char *path;
	int fd;
	int lock; /* held by the daemon that serves it; -1 */
};
/* "what: strerror" with the remedy where it is the disk that is full. */
int ffs_store_errno(const struct ffs_store *st, int code, struct ffs_error *err, const char *fmt, ...)
	FFS_PRINTF(4, 5);

/* ---- draft.c, publish.c ---- */

struct ffs_file_entry {
	char name[256]; /* relative to the branch, with slashes */
	uint64_t size;
	struct ffs_hash hash;
};

struct ffs_draft {
	struct ffs_store *st;
	int parent, fd;
	char sandbox[80], label[FFS_NAME_MAX]; /* sandbox/name as it began, for messages; fixed */
	pthread_mutex_t lock;                  /* of what follows: rename, discard and publish meet there */
	char name[80];
	char dir[FFS_NAME_MAX]; /* its directory's name today */
	atomic_bool discarded;
	bool published;
	struct ffs_stored
		*replaces; /* referenced: the branch whose place it takes; NULL: none has the name */
	/* the writer's own: */
	enum ffs_store_kind kind;
	uint64_t memory_size, began_ns;
	struct ffs_hash memory_hash, *blocks;
	uint64_t n_blocks;
	char shared_id[40], shared_name[80]; /* the branch whose packs it has links to */
	struct ffs_file_entry *files;        /* whose hashes are known from writing them */
	unsigned n_files, room_files;
};
int ffs_draft_add_file(struct ffs_draft *d, const char *name, uint64_t size, const struct ffs_hash *hash);
/* Begin another form of a published branch: publishing makes the two change places, and deletes the old one. */
int ffs_draft_begin_other(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_stored *old,
	struct ffs_draft **out, struct ffs_error *err);

/* ---- seal.c: JSON files with a version and a checksum, no I/O ---- */

struct ffs_seal {
	const char *file, *key; /* for messages; the member of the checksum */
	size_t max;             /* bytes of a text; more are refused (EFBIG) */
};
/* The text of an object, with its checksum as the last member; the caller frees it. */
int ffs_seal_text(
	const struct ffs_seal *s, struct json_object *o, char **out, size_t *len, struct ffs_error *err);
/* Parse and check a text (len bytes; no NUL need follow): the format's version, its own checksum where it has one
 * (*sealed). */
int ffs_seal_parse(const struct ffs_seal *s, const char *text, size_t len, struct json_object **out,
	bool *sealed, struct ffs_error *err);
/* A member; "" where there is no such string. */
const char *ffs_object_string(struct json_object *o, const char *key);
/* False: there is none, or it is no size. */
bool ffs_object_size(struct json_object *o, const char *key, uint64_t *out);

/* ---- manifest.c: text and members, no I/O ---- */

/* ffs_seal_parse() and ffs_seal_text() of a manifest. */
int ffs_manifest_parse(
	const char *text, size_t len, struct json_object **out, bool *sealed, struct ffs_error *err);
int ffs_manifest_text(struct json_object *o, char **out, size_t *len, struct ffs_error *err);
/* Replace the store's own members. */
int ffs_manifest_fill(struct json_object *o, const struct ffs_draft *d, const struct ffs_file_entry *files,
	unsigned n, uint64_t publish_ns);

struct ffs_manifest {
	char id[40], parent[40], name[80], sandbox[80];
	uint64_t memory_size, vmstate_size, time_ns;
	bool has_owner, owner_writes;
	uid_t uid;
	gid_t gid;
	bool has_hashes;
	struct ffs_hash memory_hash, *blocks;
	uint64_t n_blocks;
	struct ffs_file_entry *files;
	unsigned n_files;
};
/* Take the checked members out; free with ffs_manifest_clear(). `blocks`: the hashes of memory too. */
int ffs_manifest_load(struct json_object *o, bool blocks, struct ffs_manifest *out, struct ffs_error *err);
void ffs_manifest_clear(struct ffs_manifest *m);

/* ---- index.c: memory.idx ---- */

enum ffs_chunk_kind { FFS_CHUNK_ZERO, FFS_CHUNK_RAW, FFS_CHUNK_LZ4, FFS_CHUNK_KINDS };
#define FFS_PACK_MAX (64u << 20)
#define FFS_PACK_HEADER 64u
#define FFS_MAX_PACKS 65535u

struct ffs_pack_entry {
	unsigned char id[16];
	uint64_t size;
	struct ffs_hash hash;
};

struct ffs_index {
	uint64_t memory_size, n_chunks;
	struct ffs_pack_entry *packs;
	uint32_t n_packs;
	/* a column an attribute, n_chunks each */
	uint16_t *pack;
	uint32_t *offset, *stored;
	uint8_t *kind;
	struct ffs_hash *hash;
};
int ffs_index_new(struct ffs_index *x, uint64_t memory_size);
void ffs_index_clear(struct ffs_index *x);
/* The bytes of memory.idx; the caller frees them. */
int ffs_index_encode(const struct ffs_index *x, unsigned char **out, size_t *len);
/* From bytes that nobody vouches for; -EBADMSG with the sentence. */
int ffs_index_decode(const unsigned char *buf, size_t len, struct ffs_index *out, struct ffs_error *err);
uint32_t ffs_index_chunk_len(const struct ffs_index *x, uint64_t chunk);
void ffs_pack_header(unsigned char out[FFS_PACK_HEADER], const unsigned char id[16]);

/* ---- pack.c: packed memory ---- */

struct ffs_packer;
int ffs_packer_new(struct ffs_draft *d, uint64_t memory_size, struct ffs_stored *share,
	struct ffs_packer **out, struct ffs_error *err);
/* Chunks in order; len is a multiple of the chunk but at the end. `zero`: all zeros, known without looking. */
int ffs_packer_put(
	struct ffs_packer *p, const unsigned char *buf, size_t len, bool zero, struct ffs_error *err);
int ffs_packer_finish(struct ffs_packer *p, struct ffs_error *err);
void ffs_packer_free(struct ffs_packer *p);

/* Decode one chunk: `stored` bytes of `in` into `len` bytes of `out`, and compare its hash (NULL: whoever called
 * compares the bytes). False: damaged. */
bool ffs_chunk_decode(enum ffs_chunk_kind kind, const void *in, uint32_t stored, void *out, uint32_t len,
	const struct ffs_hash *hash);

/* ---- stored.c, packed.c ---- */

#define FFS_CHUNK_SLOTS 32u

struct ffs_chunk_slot {
	pthread_mutex_t lock;
	uint64_t chunk; /* UINT64_MAX: none */
	unsigned char *buf;
};

struct ffs_stored {
	atomic_uint refs;
	char *path; /* as messages show it */
	int dir;
	enum ffs_store_kind kind;
	struct ffs_manifest m; /* without the hashes of memory */
	bool sealed;
	uint64_t manifest_size, all, shared;
	pthread_mutex_t lock; /* of opening what follows; readers need none once it is there */
	atomic_int memory, vmstate, manifest;
	atomic_int *disks; /* of each file of the manifest: its descriptor, or -1 */
	struct ffs_index index;
	int *pack_fds;
	atomic_bool packed_open;
	int packed_error; /* damaged: why it can never be opened */
	struct ffs_error packed_why;
	struct ffs_chunk_slot slots[FFS_CHUNK_SLOTS];
};
/* Open index and packs; idempotent. */
int ffs_packed_open(struct ffs_stored *s, struct ffs_error *err);
ssize_t ffs_packed_read(struct ffs_stored *s, void *buf, size_t len, uint64_t off, struct ffs_error *err);
/* One whole chunk into `out`; checked: against its hash. */
int ffs_packed_chunk(struct ffs_stored *s, uint64_t chunk, bool checked, void *out, struct ffs_error *err);
void ffs_packed_close(struct ffs_stored *s);

/* ---- share.c ---- */

/* The packed branch whose chunks one with this manifest most likely has: its parent, wherever it is in the store, else
 * the sandbox's youngest. A reference, or NULL. */
struct ffs_stored *ffs_store_find_share(
	struct ffs_store *st, const char *sandbox, const struct ffs_manifest *m);

/* ---- verify.c ---- */

/* The same branch with descriptors of its own. */
/* A draft whose manifest is written, as the branch that it will be. */
int ffs_stored_open_draft(const struct ffs_draft *d, struct ffs_stored **out, struct ffs_error *err);
int ffs_stored_again(struct ffs_stored *s, struct ffs_stored **out, struct ffs_error *err);
/* The manifest with all its hashes: -ENODATA when there are none, -EBADMSG when it is not whole. */
int ffs_stored_load_hashes(struct ffs_stored *s, struct ffs_manifest *m, struct ffs_error *err);
/* memory.bin, memory.idx or a pack: memory in one of its forms. */
bool ffs_stored_is_memory_file(const struct ffs_file_entry *f);

static inline bool ffs_progress_cancelled(const struct ffs_store_progress *p)
{
	return p && (atomic_load_explicit(&p->cancel, memory_order_relaxed) || ffs_cancel_is_set(p->also));
}
static inline void ffs_progress_add(struct ffs_store_progress *p, uint64_t n)
{
	if (p)
		atomic_fetch_add_explicit(&p->done, n, memory_order_relaxed);
}
