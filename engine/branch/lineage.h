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
 * A parent is valid within one tracker, and as long as somebody holds it: a branch that was removed is no
 * parent any more. What its children share with it lives on in its layer. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "branch/pages.h"

struct ffs_branch;
struct ffs_budget;
struct ffs_tracker;

/* Every so many generations one is whole: reading a page passes through all layers above the one that has it,
 * and what a child shares is held as long as the child. */
#define FFS_LINEAGE_DEPTH 16u

/* The bytes of one branch: its own, and the layer of its parent for the rest. Shared by the branch and its
 * children; nothing changes once a child has it. */
struct ffs_layer;

struct ffs_layer *ffs_layer_ref(struct ffs_layer *l);
void ffs_layer_unref(struct ffs_layer *l);
/* The branch is gone, which held so many bytes of the budget: true when its image is the layer's now, which
 * gives them back when its last child is gone. */
bool ffs_layer_charge(struct ffs_layer *l, struct ffs_budget *budget, uint64_t bytes);
/* Id of the branch whose pages are shared; NULL: all are its own. */
const char *ffs_layer_parent(const struct ffs_layer *l);
/* Read a branch's memory; `own` is its image. Bytes read or -errno. Any thread. */
ssize_t ffs_layer_read(const struct ffs_layer *l, int own, void *buf, size_t len, uint64_t off);

/* All of these but ffs_lineage_forget(): the thread that takes a branch. Without tracking they do nothing. */

int ffs_lineage_init(struct ffs_tracker *t, struct ffs_error *err);
/* Give a new branch its layer, with the parent of now if there is one. -ENOMEM. */
int ffs_lineage_begin(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_error *err);
/* After the instant: what the branch still needs and was not written since the parent's instant is the
 * parent's. Guest running, with the branch in its slot; or stopped, before anything is copied. */
void ffs_lineage_inherit(struct ffs_tracker *t, struct ffs_branch *b);
/* The branch was taken: it is the next parent, unless an earlier one that is still being captured is. */
void ffs_lineage_taken(struct ffs_tracker *t, struct ffs_branch *b);
/* Nobody holds the branch any more. Any thread, without locks. */
void ffs_lineage_forget(struct ffs_tracker *t, struct ffs_branch *b);
