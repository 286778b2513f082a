/* Forks: branches/NAME/forks/FORK, a branch and the payloads that lie over it. */
#pragma once

#include "mailbox/mailbox.h"
#include "nodes.h"
#include "store/forks.h"

struct json_object;

/* A payload that is ready to be written: its frame was found, and everything about it checked. Owned by one;
 * ffs_staged_free(). */
struct ffs_staged {
	struct ffs_list link;
	struct ffs_fork_box box;
	struct ffs_gen_who who; /* whose write it was */
};

/* Tree lock. */
struct ffs_fork {
	unsigned refs;
	uint64_t serial;
	char name[80];
	struct ffs_named *named; /* referenced; NULL: the payloads of a generation of branch/ */
	char id[37];             /* UUID: the epoch that its guest sees */
	uint8_t epoch[16];
	struct ffs_overlay *overlay; /* changed under the lock until `fixed` */
	struct ffs_list staged;      /* struct ffs_staged */
	unsigned n_staged;
	struct ffs_list tokens; /* box.c */
	bool fixed; /* somebody has opened its memory, or an earlier daemon made it: it never changes again */
	bool changing; /* its file in the store is being written: nobody opens its memory meanwhile */
	struct ffs_fork_ack *ack; /* ack.c; NULL: nothing of it is to be acknowledged */
	struct ffs_error failure; /* code 0: it is good; else why it can't be used */
	bool removed;
	uint64_t time_ns;
	struct ffs_list link; /* in named->forks */
};

/* One of a branch; named NULL: of a generation. The caller's reference; in no list. NULL: no memory. */
struct ffs_fork *ffs_fork_new(struct ffs_fs *fs, struct ffs_named *named, const char *name);
struct ffs_fork *ffs_fork_ref(struct ffs_fork *f);
void ffs_fork_unref(struct ffs_fork *f);
struct ffs_fork *ffs_fork_find(struct ffs_named *named, const char *name);
/* Into its branch's list: -EEXIST, -ENOENT (the branch is gone), -EIO (it failed), with the sentence; would it be? */
int ffs_fork_add(struct ffs_fork *f, struct ffs_error *err);
int ffs_fork_may_add(const struct ffs_fork *f, struct ffs_error *err);
void ffs_fork_remove(struct ffs_fork *f);
/* All of a branch that is removed. */
void ffs_forks_drop(struct ffs_named *named);

/* Would this payload be taken now? -E2BIG: too many; -EBUSY: it was read. The write that completes a payload
 * asks, and who publishes it asks again. `who`: whose names may be replaced, NULL: anybody's. */
int ffs_fork_may_stage(const struct ffs_fork *f, const struct ffs_mailbox_frame *frame,
	const struct ffs_gen_who *who, struct ffs_error *err);
/* Publish: takes the staged payload over, in place of what was staged for its frame. 0, or an error as above,
 * or -ENOMEM, and the caller keeps it. */
int ffs_fork_stage(struct ffs_fork *f, struct ffs_staged *s, bool own_only, struct ffs_error *err);
/* What is staged under NAME or NAME:TOKEN, or NULL. */
struct ffs_staged *ffs_fork_staged(const struct ffs_fork *f, const char *text);
/* Take a payload back: -ENOENT, -EBUSY; could it be? */
int ffs_fork_unstage(struct ffs_fork *f, const char *text, struct ffs_error *err);
int ffs_fork_may_unstage(const struct ffs_fork *f, const char *text, struct ffs_error *err);
void ffs_staged_free(struct ffs_staged *s);

/* ---- fork-store.c: the same changes, in the store first where the branch is kept there: what these say is done is
 * there after a crash. Without the tree lock; pool threads ---- */

int ffs_fork_keep_new(struct ffs_fork *f, struct ffs_error *err);
int ffs_fork_keep_staged(struct ffs_fork *f, struct ffs_staged *s, struct ffs_error *err);
int ffs_fork_keep_unstaged(struct ffs_fork *f, const char *text, struct ffs_error *err);
int ffs_fork_keep_removed(struct ffs_fork *f, struct ffs_error *err);
/* The forks of a stored branch, linked in `out`, of no branch yet: what can't be used has its reason. Without the tree lock. */
void ffs_forks_load(struct ffs_fs *fs, struct ffs_stored *stored, struct ffs_list *out);
/* Tree lock held: give them to their branch; or let them go. */
void ffs_forks_adopt(struct ffs_named *named, struct ffs_list *loaded);
void ffs_forks_forget(struct ffs_list *loaded);
/* The text of its file, which the caller frees. Without the tree lock. */
int ffs_fork_record(struct ffs_fs *fs, struct ffs_fork *f, char **text, size_t *len, struct ffs_error *err);

/* ---- without the tree lock; pool threads, for these read guest memory ---- */

/* The frames in a branch's memory: looked for once, then remembered with it. *out is the caller's. */
int ffs_shot_frames(struct ffs_shot *shot, struct ffs_mailbox_frames *out, struct ffs_error *err);
struct ffs_stage_request {
	const char *name;  /* NAME or NAME:TOKEN */
	const char *token; /* NULL: none given */
	size_t token_len;
	const char *text; /* a checked JSON object, white space around it */
	size_t text_len;
	bool wants_ack;
	unsigned ack_timeout_ms;
	unsigned ack_port; /* where the daemon listens for it */
};
/* What a running guest publishes just now: its memory is searched, it is not stopped. *out is the caller's.
 */
int ffs_sbx_frames(struct ffs_sbx *sbx, struct ffs_mailbox_frames *out, struct ffs_error *err);
/* Does it publish the mailbox that a payload is for? A guess that costs little, for what is asked before a
 * branch is taken: the branch is searched all the same. */
int ffs_sbx_find_frame(struct ffs_sbx *sbx, const struct ffs_stage_request *req, struct ffs_error *err);
/* Find the frame of one payload in a branch, check it, and make the page. */
int ffs_stage_prepare(struct ffs_shot *shot, const struct ffs_stage_request *req, const uint8_t epoch[16],
	struct ffs_staged **out, struct ffs_error *err);

/* Tree lock held: what it says of itself, in `status` and in the manifest ("fork"). */
struct json_object *ffs_fork_json(const struct ffs_fork *f);
/* The branch's manifest with the fork in it: a new text. Without the tree lock. NULL: no memory, or none. */
char *ffs_fork_manifest(struct ffs_fs *fs, struct ffs_fork *f, struct ffs_shot *shot, size_t *len);

/* FUSE: in branches/NAME/forks. */
void ffs_fork_mkdir(struct ffs_call *call, struct ffs_node *dir, const char *name);
void ffs_fork_rmdir(struct ffs_call *call, struct ffs_node *dir, const char *name);
