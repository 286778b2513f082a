/* Copying a branch while its guest stands still: modes full and diff. */
#pragma once

#include "branch/internal.h"

/* Copy what the branch needs of guest memory into its image; all of it is there when this returns 0. The
 * guest is stopped and stays so. -EINTR (cancelled), -EAGAIN (deadline), or what reading and writing say. */
int ffs_stopped_capture(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_cancel *cancel,
	uint64_t deadline_ns, struct ffs_error *err);
/* Guest running again: the branch becomes READY, unless the memory turns out to have changed shape. */
int ffs_stopped_settle(struct ffs_tracker *t, struct ffs_branch *b, struct ffs_error *err);
