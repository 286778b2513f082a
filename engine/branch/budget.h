/* The memory that images may take: reserved before a branch's pause for as much as it can need, settled to
 * what it took, given back when the image is gone with its last opener. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "forkfs-engine.h"

struct ffs_budget;

/* One reference; without a limit. NULL: no memory. */
struct ffs_budget *ffs_budget_new(void);
struct ffs_budget *ffs_budget_ref(struct ffs_budget *b);
void ffs_budget_unref(struct ffs_budget *b);
/* Bytes, or FFS_MEMORY_UNLIMITED or FFS_MEMORY_AUTO. */
void ffs_budget_set_limit(struct ffs_budget *b, uint64_t limit);
/* 0, or -ENOSPC with both figures. `sandbox` is for the sentence. */
int ffs_budget_reserve(struct ffs_budget *b, const char *sandbox, uint64_t bytes, struct ffs_error *err);
/* Of what was reserved so much was taken; the rest is free again. */
void ffs_budget_settle(struct ffs_budget *b, uint64_t reserved, uint64_t taken);
/* What was taken, or (0) what is still reserved, is free again. */
void ffs_budget_release(struct ffs_budget *b, uint64_t reserved, uint64_t taken);
/* Whether so much could be reserved now. */
bool ffs_budget_fits(struct ffs_budget *b, uint64_t bytes);
/* See ffs_engine_frees(). */
uint64_t ffs_budget_frees(struct ffs_budget *b);
void ffs_budget_await_free(struct ffs_budget *b, uint64_t seen, uint64_t deadline_ns);
void ffs_budget_usage(struct ffs_budget *b, uint64_t *limit, uint64_t *taken, uint64_t *reserved);
