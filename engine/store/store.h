/* The store: branches on disk. The second public header of engine/ (forkfs-engine.h is the first); no FUSE in it.
 *
 * A store is a directory: <store>/<sandbox>/<branch>/ holds one published branch, and every file that it needs. A branch is written as a *draft* (the directory
 * <branch>.partial) and becomes one by ffs_store_publish(), the only function that publishes. From then on it
 * never changes; ffs_store_remove() and ffs_store_rename() are all that can be done to it.
 *
 * Any thread may use a struct ffs_store; a draft belongs to one thread at a time, except where it says otherwise; a
 * struct ffs_stored may be read by any number of threads. Everything here does file I/O and may take long: nothing
 * is to be called with a lock held that a guest, or the kernel, waits for. Functions return 0 (or a count) or -errno
 * and describe a failure in struct ffs_error. Sizes are bytes. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

struct json_object;
struct ffs_cancel;
struct ffs_store;
struct ffs_draft;
struct ffs_stored;

/* The major version of what is written; a newer one is refused by its name. */
#define FFS_STORE_FORMAT 1u
/* Unit of the manifest's hashes of memory. */
#define FFS_STORE_BLOCK (2u << 20)
/* Unit of compression and sharing of a packed memory. */
#define FFS_STORE_CHUNK (64u << 10)

enum ffs_store_kind { FFS_STORE_MEMORY, FFS_STORE_DENSE, FFS_STORE_PACKED };
/* "memory" | "dense" | "packed" */
const char *ffs_store_kind_name(enum ffs_store_kind k);
/* False: there is no such kind. */
bool ffs_store_kind_parse(const char *name, enum ffs_store_kind *out);

/* What a long action has done, and the wish to end it: then it returns -EINTR. The caller's; any thread. */
struct ffs_store_progress {
	atomic_ullong done, total; /* bytes */
	atomic_bool cancel;
	struct ffs_cancel *also; /* the same wish, of somebody who has such a thing; borrowed, NULL: none */
};

/* ---- the store ---- */

/* Open a store, making the directory (0700) when its parent exists. */
int ffs_store_open(const char *path, struct ffs_store **out, struct ffs_error *err);
void ffs_store_close(struct ffs_store *st);
/* Absolute, as messages show it. */
const char *ffs_store_path(const struct ffs_store *st);
/* Of the directory, owned by the store. */
int ffs_store_fd(const struct ffs_store *st);
/* What its file system has free for us. */
int ffs_store_free_bytes(const struct ffs_store *st, uint64_t *out, struct ffs_error *err);

/* For who serves the store or changes what it has: be the only one (a lock that goes with the process; EBUSY names the
 * remedy), finish what was being removed, and turn each draft that nobody is writing any more into the record of a failed
 * branch. */
int ffs_store_recover(struct ffs_store *st, struct ffs_error *err);

/* Call fn for each branch, and for each record of a failed one, of all sandboxes (or of one, when `sandbox` is
 * given), in no particular order. A negative return of fn ends the walk and is returned. */
enum ffs_store_entry { FFS_STORE_ENTRY_BRANCH, FFS_STORE_ENTRY_FAILED };
int ffs_store_each(struct ffs_store *st, const char *sandbox,
	int (*fn)(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry), void *arg,
	struct ffs_error *err);
/* The sentence of a failed branch's record. */
int ffs_store_failure(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_error *why);
/* Leave a record that the branch failed; `why` is its reason. Replaces an earlier one. */
int ffs_store_record_failure(struct ffs_store *st, const char *sandbox, const char *name,
	const struct ffs_error *why, struct ffs_error *err);

/* Branch names that the store needs for itself: -EINVAL with the sentence. */
int ffs_store_check_name(const char *name, struct ffs_error *err);

/* Remove a branch or the record of a failed one: when this returns it is gone for good, also after a crash; the
 * space is given back by ffs_store_reap() (or the next ffs_store_recover()). -ENOENT: there is none. */
int ffs_store_remove(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_error *err);
/* Delete the files of what was removed in a sandbox. */
int ffs_store_reap(struct ffs_store *st, const char *sandbox, struct ffs_error *err);
/* Durable when it returns; -EEXIST. */
int ffs_store_rename(
	struct ffs_store *st, const char *sandbox, const char *from, const char *to, struct ffs_error *err);
/* A branch's directory, for the files of its forks (forks.h): a descriptor that the caller closes, or -errno. */
int ffs_store_branch_dir(struct ffs_store *st, const char *sandbox, const char *name);

/* ---- writing a branch ---- */

/* Begin one: makes <sandbox>/<name>.partial/. -EEXIST when there is such a branch, -EBUSY when somebody is
 * writing it. */
int ffs_draft_begin(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_draft **out,
	struct ffs_error *err);
/* The draft's directory, for files that others put there (disks/…): plain files and directories, nothing else.
 * They are hashed and made durable by publishing. Owned by the draft. */
int ffs_draft_dirfd(const struct ffs_draft *d);
/* Another thread may call these two while the draft is being written, one at a time and never while the gate of its
 * publishing is held: it is published under another name; or not at all (its space is given back when it ends). */
int ffs_draft_rename(struct ffs_draft *d, const char *name, struct ffs_error *err);
void ffs_draft_discard(struct ffs_draft *d);

/* Write memory from a file descriptor that is read with pread(2) at dense offsets (its holes are zeros). Once.
 * `share`: for FFS_STORE_PACKED, a packed branch of the same store whose chunks are used again where they hold the
 * same bytes (they are compared, not only their hashes); NULL: none. `p` may be NULL. */
int ffs_draft_memory(struct ffs_draft *d, int fd, uint64_t size, enum ffs_store_kind kind,
	struct ffs_stored *share, struct ffs_store_progress *p, struct ffs_error *err);
/* The same from whoever has the bytes: `read` fills exactly len bytes, or returns -errno. It is called with rising
 * offsets, a block (FFS_STORE_BLOCK) at a time. */
struct ffs_store_source {
	int (*read)(void *arg, void *buf, size_t len, uint64_t off, struct ffs_error *err);
	/* The length of the hole (zeros) at off, a multiple of the block; 0: none. May be NULL. */
	uint64_t (*hole)(void *arg, uint64_t off);
	void *arg;
};
int ffs_draft_memory_from(struct ffs_draft *d, const struct ffs_store_source *src, uint64_t size,
	enum ffs_store_kind kind, struct ffs_stored *share, struct ffs_store_progress *p,
	struct ffs_error *err);
/* Write a file, `vmstate` say, from a descriptor (from its offset 0 to its end). */
int ffs_draft_file(struct ffs_draft *d, const char *name, int fd, struct ffs_error *err);

/* Write a disk as disks/ID: cloned where the file system can, else copied with its holes. */
int ffs_draft_disk(
	struct ffs_draft *d, const char *id, int fd, struct ffs_store_progress *p, struct ffs_error *err);

/* Held around the one step after which the branch exists, so that its name does not change meanwhile. `enter`
 * returns 0, or -errno to give the branch up. */
struct ffs_publish_gate {
	int (*enter)(void *arg);
	void (*leave)(void *arg, int result);
	void *arg;
};
/* Make the draft a branch, durably: every file synced, the manifest last, the directory synced, renamed with
 * RENAME_NOREPLACE (a conversion: exchanged with what it replaces), the parent synced. `manifest`: what the engine says of the branch (not consumed); the store adds
 * its own members. On failure nothing has been published. The draft is to be ended in any case. `gate` may be NULL.
 */
int ffs_store_publish(struct ffs_draft *d, struct json_object *manifest, const struct ffs_publish_gate *gate,
	struct ffs_error *err);
/* Frees it; what was not published is deleted. NULL: nothing. */
void ffs_draft_end(struct ffs_draft *d);

/* ---- reading a branch ---- */

/* Open a published branch: reads and checks its manifest, not its bytes (a packed one's index is read and checked by
 * the first read). */
int ffs_stored_open(struct ffs_store *st, const char *sandbox, const char *name, struct ffs_stored **out,
	struct ffs_error *err);
/* The same for any directory that looks like one: a copy of a branch's directory, or a branch in the tree of a
 * mount, whose manifest may lack what the store adds. */
int ffs_stored_open_dir(const char *path, struct ffs_stored **out, struct ffs_error *err);
struct ffs_stored *ffs_stored_ref(struct ffs_stored *s);
void ffs_stored_unref(struct ffs_stored *s);

/* Open every file that can be read of it, so that it can be read to its end although its directory goes. */
int ffs_stored_hold(struct ffs_stored *s, struct ffs_error *err);

const char *ffs_stored_id(const struct ffs_stored *s);
/* FFS_STORE_DENSE or FFS_STORE_PACKED. */
enum ffs_store_kind ffs_stored_kind(const struct ffs_stored *s);
uint64_t ffs_stored_memory_size(const struct ffs_stored *s);
uint64_t ffs_stored_vmstate_size(const struct ffs_stored *s);
/* The instant of the branch, nanoseconds since the epoch; 0: the manifest does not say. */
uint64_t ffs_stored_time_ns(const struct ffs_stored *s);
/* Who the branch was lent to (member `owner`); false: the manifest does not say. */
bool ffs_stored_owner(const struct ffs_stored *s, uid_t *uid, gid_t *gid, bool *writable);
/* Bytes of its files on disk: in all, and those of them that other branches hold as well. */
void ffs_stored_sizes(const struct ffs_stored *s, uint64_t *all, uint64_t *shared);
/* A new object, read from the file again; owned by the caller. */
int ffs_stored_manifest(const struct ffs_stored *s, struct json_object **out, struct ffs_error *err);
/* The file as it is, and its length. */
uint64_t ffs_stored_manifest_size(const struct ffs_stored *s);
ssize_t ffs_stored_read_manifest(struct ffs_stored *s, void *buf, size_t len, uint64_t off);

/* Bytes read (short at the end only) or -errno. A packed chunk that is damaged gives -EIO, never wrong bytes. */
ssize_t ffs_stored_read_memory(
	struct ffs_stored *s, void *buf, size_t len, uint64_t off, struct ffs_error *err);
ssize_t ffs_stored_read_vmstate(struct ffs_stored *s, void *buf, size_t len, uint64_t off);
/* Memory for who makes other branches of it: a block of a dense one is compared with the manifest's hash before anything
 * of it is given out, so that damage is not handed on (-EIO). It has descriptors of its own, all open, and can be read to
 * its end although its directory goes. Any number of readers. */
struct ffs_checked;
int ffs_checked_new(struct ffs_stored *s, struct ffs_checked **out, struct ffs_error *err);
void ffs_checked_free(struct ffs_checked *c);
ssize_t ffs_checked_read(struct ffs_checked *c, void *buf, size_t len, uint64_t off);
/* Read-only descriptors owned by `s`, for passthrough. Of memory of a dense branch only; -ENOTSUP else. */
int ffs_stored_memory_fd(struct ffs_stored *s);
int ffs_stored_vmstate_fd(struct ffs_stored *s);
/* Its disks, as the manifest lists them: numbered from 0 to ffs_stored_disks() - 1; named by their ID. */
unsigned ffs_stored_disks(const struct ffs_stored *s);
const char *ffs_stored_disk_id(const struct ffs_stored *s, unsigned i);
uint64_t ffs_stored_disk_size(const struct ffs_stored *s, unsigned i);
ssize_t ffs_stored_read_disk(struct ffs_stored *s, const char *id, void *buf, size_t len, uint64_t off);
int ffs_stored_disk_fd(struct ffs_stored *s, const char *id);
/* Of its directory (forks.h), owned by `s`. */
int ffs_stored_dirfd(const struct ffs_stored *s);
/* ---- checking, moving, decoding ---- */

/* Read every byte of the branch and compare it with the manifest's hashes. -EBADMSG and a sentence that names the
 * first wrong file and offset; -ENODATA when there are no hashes to compare with (a branch that is in memory only).
 */
int ffs_stored_verify(struct ffs_stored *s, struct ffs_store_progress *p, struct ffs_error *err);
/* One stream of everything (docs/format.md), to a pipe or a file. */
int ffs_stored_export(struct ffs_stored *s, int fd, struct ffs_store_progress *p, struct ffs_error *err);
/* Read such a stream, check every hash on the way, publish what it holds as <sandbox>/<name>. `kind`:
 * FFS_STORE_MEMORY keeps the stream's. */
int ffs_store_import(struct ffs_store *st, int fd, const char *sandbox, const char *name,
	enum ffs_store_kind kind, struct ffs_store_progress *p, struct ffs_error *err);
/* Give a branch the other form, FFS_STORE_DENSE or FFS_STORE_PACKED: 1, or 0 when it has that. Everything is compared
 * with the manifest's hashes; the two forms change places in one step, with the gate held (NULL: none), and the old one
 * is deleted. On failure the old one is as it was. Only after ffs_store_recover(), which locks the store. */
int ffs_store_convert(struct ffs_store *st, const char *sandbox, const char *name, enum ffs_store_kind kind,
	const struct ffs_publish_gate *gate, struct ffs_store_progress *p, struct ffs_error *err);
/* What the files of a branch's directory hold, as JSON: the packed index decoded, every file with its size;
 * `chunks`: each chunk too. The forks too. Opens damaged ones as far as they make sense. Owned by the caller. */
int ffs_store_inspect(const char *path, bool chunks, struct json_object **out, struct ffs_error *err);
