/* What a branch shares with its parent, where the sandbox is tracked.
 *
 * With tracking on, a page that was not written since a branch's instant is still that branch's page. So the
 * next branch takes it from its parent's image instead of the guest: its own image has what was written since
 * the parent's instant, and a mask per cluster says which pages are the parent's.
 *
 * Which pages were written is known from the sweeps: a page that was writable when a sweep protected it may
 * have been written. Two maps of the tracker (pages.h) collect that: `changed` since the instant of the
 * parent, `since` since the instant of the heir, the branch that becomes the parent once it is ready. Sweeps
 * run in the thread that takes a branch only, so the maps need no lock.
 *
 * A parent is valid within one tracker, and as long as somebody holds it, the branch or what the store has of it: one
 * that was removed is no parent any more. What its children share with it lives on in its layer (layer.h). */
#pragma once

#include "base/error.h"

struct ffs_branch;
struct ffs_tracker;

/* Every so many generations one is whole: reading a page passes through all layers above the one that has it,
 * and what a child shares is held as long as the child. */
#define FFS_LINEAGE_DEPTH 16u

/* All of these but ffs_lineage_end(): the thread that takes a branch. Without tracking they do nothing. */

int ffs_lineage_init(struct ffs_tracker *t, struct ffs_error *err);
/* Give a new branch its layer, with the parent of now if there is one. -ENOMEM. */
int ffs_lineage_begin(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_error *err);
/* After the instant: what the branch still needs and was not written since the parent's instant is the
 * parent's. Guest running, with the branch in its slot; or stopped, before anything is copied. */
void ffs_lineage_inherit(struct ffs_tracker *t, struct ffs_branch *b);
/* The branch was taken: it is the next parent, unless an earlier one that is still being captured is. */
void ffs_lineage_taken(struct ffs_tracker *t, struct ffs_branch *b);
/* The tracker ends: nobody is a parent any more. */
void ffs_lineage_end(struct ffs_tracker *t);
