/* Forks as the store keeps them: a file beside the branch (docs/format.md), forks/NAME.json, with the payloads and the
 * pages that lie over its memory. Public, as store.h is; what holds there for threads and errors holds here. */
#pragma once

#include "mailbox/mailbox.h"
#include "store/store.h"

#define FFS_FORK_FILE_MAX (1u << 20)
/* A payload with the white space around it. */
#define FFS_FORK_TEXT_MAX 8192u

/* A mailbox that has a payload. */
struct ffs_fork_box {
	struct ffs_mailbox_frame frame;
	char *text; /* as it was written, text_len bytes; `payload` is a part of it */
	size_t text_len;
	struct ffs_span payload;
	bool wants_ack;
	unsigned ack_timeout_ms;
	uint8_t page[FFS_MAILBOX_PAGE]; /* the frame's, with the payload */
};

struct ffs_fork_record {
	char name[80];
	char branch[40]; /* id of the branch that it lies over */
	uint8_t epoch[16];
	uint64_t made_ns;  /* wall clock */
	unsigned ack_port; /* in the payloads that want an ACK; 0: in none */
	unsigned n;
	struct ffs_fork_box *box; /* owned, and the texts */
};
void ffs_fork_record_clear(struct ffs_fork_record *r);

/* ---- the text: no I/O ---- */

/* The caller frees it. */
int ffs_fork_record_text(const struct ffs_fork_record *r, char **out, size_t *len, struct ffs_error *err);
/* From bytes that nobody vouches for: checksum, names, sizes, payloads are checked; not what the pages are worth.
 * `name`: whose file it is (NULL: whoever's the text says); `branch`: id of its branch (NULL: any). -EBADMSG (-ENOTSUP: a newer
 * format) with a sentence that names the file. *out is the caller's then. */
int ffs_fork_record_parse(const char *text, size_t len, const char *name, const char *branch,
	struct ffs_fork_record *out, struct ffs_error *err);
/* Is each page what this very branch has there, with that payload? -EBADMSG, or what `read` says. */
int ffs_fork_record_check(
	const struct ffs_fork_record *r, const struct ffs_mailbox_memory *mem, struct ffs_error *err);

/* ---- files: `dir` is a branch's directory, or its draft's. Whoever changes one is the only one who does ---- */

/* Write the text beside the file that it will be: synced, and nobody finds it yet. */
int ffs_fork_file_write(int dir, const char *name, const char *text, size_t len);
/* Now it is there, durably, in place of the one before; `fresh`: there must be none (-EEXIST). *there, after a failure: it
 * is, but whether it would be after a crash nobody knows. */
int ffs_fork_file_publish(int dir, const char *name, bool fresh, bool *there);
/* Gone for good when this returns; -ENOENT. */
int ffs_fork_file_remove(int dir, const char *name);
/* Give another form of the branch the same forks. */
int ffs_fork_files_carry(int from, int to);
/* Remove what a writer left that was killed. */
int ffs_fork_files_sweep(int dir);
/* fn for each fork's name, in no order; through a mount too, where a fork is a directory. A negative return of fn ends it
 * and is returned. */
int ffs_fork_files_each(int dir, int (*fn)(void *arg, const char *name), void *arg);
/* The bytes; the caller frees them. -EFBIG, -EBADMSG (no file), -errno, with a sentence that names it. */
int ffs_fork_file_read(int dir, const char *name, char **text, size_t *len, struct ffs_error *err);
/* Read, parsed, and checked with the memory of its branch. */
int ffs_stored_fork(
	struct ffs_stored *s, const char *name, struct ffs_fork_record *out, struct ffs_error *err);
/* Every fork of it. */
int ffs_stored_check_forks(struct ffs_stored *s, struct ffs_error *err);
