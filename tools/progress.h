/* Waiting for a branch, with a bar on a terminal and silence on a pipe. */
#pragma once

#include <stdbool.h>

#include "tree.h"

/* Wait until the branch is complete (0) or failed (-EIO and its reason); -EINTR when a signal came: the
 * branch goes on. With `bar`, and when stderr is a terminal, its progress is drawn there. */
int ffs_wait_branch(
	const struct ffs_tree *t, const struct ffs_target *target, bool bar, struct ffs_error *err);
