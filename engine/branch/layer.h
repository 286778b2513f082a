/* The bytes of one branch of a tracked sandbox: its own, and the layer of its parent for the rest.
 *
 * A layer outlives its branch where others need it: children share its pages, and the tracker takes it for the
 * next parent. Two counts. `refs` keep the object. `uses` keep the bytes: the branch has one, every child one, and
 * one says that it may become a parent still. When the last use is gone, memory and files are given back at once,
 * whoever has a reference.
 *
 * A branch that is in the store has its bytes there as well (struct ffs_branch_copy). From then on its children
 * read them from there, its memory is given back, and it stays a parent without any.
 *
 * Threads: any, but what fills a new layer (lineage.c). Locks: each layer's own, held for reading around a read
 * of it and of the layers below it, in that order; for writing by who changes where its bytes are, for a moment. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "branch/pages.h"
#include "forkfs-engine.h"

struct ffs_budget;
struct ffs_layer;

/* A new layer over `base` (NULL: all pages will be its own), with one use and one reference, both the branch's. Takes
 * over the use and the reference of base, also on failure. NULL: no memory. */
struct ffs_layer *ffs_layer_new(const struct ffs_pages *p, const char *id, struct ffs_layer *base);
struct ffs_layer *ffs_layer_ref(struct ffs_layer *l);
void ffs_layer_unref(struct ffs_layer *l);

/* Id of the branch whose pages are shared; NULL: all are its own. */
const char *ffs_layer_parent(const struct ffs_layer *l);
unsigned ffs_layer_depth(struct ffs_layer *l);
/* Before anybody reads it: these pages of a cluster are the parent's. */
void ffs_layer_set_shared(struct ffs_layer *l, unsigned region, uint64_t cluster, ffs_mask shared);

/* It may become a parent: keep `image`, of which a duplicate is made. -errno. */
int ffs_layer_propose(struct ffs_layer *l, int image);
/* The capture is over, or bound to be. */
void ffs_layer_settle(struct ffs_layer *l, enum ffs_branch_state state);
/* WRITING; READY when its branch is complete; FAILED also when it can't be a parent any more. */
enum ffs_branch_state ffs_layer_state(struct ffs_layer *l);
/* It is no parent any more, for children to come: also ffs_layer_release(), which takes a reference too. */
void ffs_layer_retire(struct ffs_layer *l);
/* The branch is not held by anybody: the same, unless the store has it. */
void ffs_layer_forget(struct ffs_layer *l);
/* A use and a reference for a child; NULL when it is no parent any more. */
struct ffs_layer *ffs_layer_share(struct ffs_layer *l);

/* The branch is gone, which held so many bytes of the budget; takes its use and its reference. True: they stay
 * taken for the image, which children need, and are given back with it. */
bool ffs_layer_leave(struct ffs_layer *l, struct ffs_budget *budget, uint64_t bytes);
/* ffs_layer_moved() and ffs_layer_release(): forkfs-engine.h. */

/* Read a branch's memory; `own` is its image, or -1: who is not the branch. Bytes read or -errno. */
ssize_t ffs_layer_read(struct ffs_layer *l, int own, void *buf, size_t len, uint64_t off);
