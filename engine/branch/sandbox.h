/* What take.c needs of a sandbox. */
#pragma once

#include "branch/internal.h"

/* Become the one who uses the driver and the tracker (busy), waiting for another at most until the deadline.
 * EINTR, EAGAIN, ESRCH (detached). */
int ffs_sandbox_begin(
	struct ffs_sandbox *sb, struct ffs_cancel *cancel, uint64_t deadline_ns, struct ffs_error *err);
void ffs_sandbox_end(struct ffs_sandbox *sb);
/* While busy: a tracker that is not revoked and whose geometry is the VMM's of now, replacing the old one
 * where needed; a reference. */
int ffs_sandbox_ready_tracker(struct ffs_sandbox *sb, struct ffs_tracker **out, struct ffs_error *err);
/* While busy, with a tracker: look for other writers of the guest's memory (guest/foreign.h). -EBUSY with the
 * sentence when there is one, unless `force` or the sandbox's own: then 0, and *torn (may be NULL) is a new
 * array of sentences. *took_ns may be NULL. */
int ffs_sandbox_scan(struct ffs_sandbox *sb, bool force, uint64_t *took_ns, struct json_object **torn,
	struct ffs_error *err);
/* The VMM process is no more. */
bool ffs_sandbox_gone(struct ffs_sandbox *sb);
/* A branch was taken: counters of status. */
void ffs_sandbox_count(struct ffs_sandbox *sb, struct ffs_branch *b);
/* A reference, unless the last one is already gone (engine's list holds none). */
bool ffs_sandbox_tryref(struct ffs_sandbox *sb);
/* ffs_sandbox_attach() with a driver given by the caller instead of chosen by the options. */
int ffs_sandbox_attach_driver(struct ffs_engine *engine, const struct ffs_vmm_ops *ops,
	const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_sandbox **out,
	struct ffs_error *err);
