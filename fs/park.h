/* Requests that outlive their handler. A parked request is answered exactly once by whoever claims it: the
 * one that has its answer, or the reaper when the client was interrupted (EINTR, at once). */
#pragma once

#include "daemon.h"

struct ffs_parked {
	struct ffs_fs *fs;
	fuse_req_t req;
	atomic_uint refs;
	atomic_bool interrupt_seen;
	struct ffs_work interrupted;
	struct ffs_caller who;
	struct ffs_list link; /* tree lock; in the list of whom it waits for */
	bool claimed;         /* tree lock */
	/* Tree lock held, after an interrupt claimed it; may be NULL. */
	void (*gone)(struct ffs_parked *p);
	struct ffs_cancel *cancel; /* set after an interrupt claimed it; owned; may be NULL */
	struct ffs_node *node;     /* referenced, may be NULL */
	struct ffs_handle *handle; /* referenced, may be NULL */
	size_t size;
	uint64_t offset;
	int flags;
	void *data; /* the waiter's own */
};

/* From here on the request belongs to the parked object. NULL: no memory, and the request was answered
 * ENOMEM. Without the tree lock. `cancellable`: with a cancel object. */
struct ffs_parked *ffs_park(struct ffs_call *call, bool cancellable);
struct ffs_parked *ffs_parked_ref(struct ffs_parked *p);
/* Without the tree lock. */
void ffs_parked_unref(struct ffs_parked *p);
/* Tree lock held. True: the caller, and nobody else, acts for it and answers; it is in no list any more. */
bool ffs_parked_claim(struct ffs_parked *p);
/* Tree lock held: add it to a list, unless it was answered already (false). The list has its own reference.
 */
bool ffs_parked_wait(struct ffs_parked *p, struct ffs_list *list);
/* Tree lock held: claim all of a list into `out` (linked there, each with the list's reference). */
void ffs_parked_claim_all(struct ffs_list *list, struct ffs_list *out);
/* After a claim, without the tree lock: the request, which no interrupt touches any more. The caller replies
 * once. */
fuse_req_t ffs_parked_req(struct ffs_parked *p);
/* Claimed: answer with an error and drop the reference. */
void ffs_parked_fail(struct ffs_parked *p, uint64_t dir_ino, int code, const struct ffs_error *err);

/* A parked request whose work runs in the pool. */
struct ffs_task {
	struct ffs_work work;
	struct ffs_parked *p; /* referenced by the task */
	struct ffs_call call; /* call.req is valid until the request is claimed */
	struct ffs_node *node, *node2;
	struct ffs_handle *handle;
	char name[256], name2[256];
	unsigned flags;
	char *buf;
	size_t size;
	uint64_t offset;
	void (*run)(struct ffs_task *t);
};

/* Park the request: NULL when there is no memory (answered). The caller sets what the task needs; node, node2
 * and handle are references that the task gives back, buf is freed. */
struct ffs_task *ffs_task_new(struct ffs_call *call, bool cancellable);
/* The same for a write of a handle: with its node, the handle, and a copy of the bytes, a NUL after them. */
struct ffs_task *ffs_task_new_write(struct ffs_call *call, bool cancellable, struct ffs_node *node,
	struct ffs_handle *h, const char *buf, size_t size);
/* Answer it, once claimed: all of it was written, or r < 0 and why. */
void ffs_task_answer_write(struct ffs_task *t, int r, const struct ffs_error *err);
/* Run it in the pool. */
void ffs_task_start(struct ffs_task *t, void (*run)(struct ffs_task *t));
/* Instead of starting it, after its request was answered. */
void ffs_task_drop(struct ffs_task *t);
/* Claim for the task: true, and the caller answers ffs_parked_req(t->p); false: interrupted, somebody
 * answered. Takes the tree lock. */
bool ffs_task_claim(struct ffs_task *t);
