/* Refuses to attach a VM that could wait for us while we hold it. */
#pragma once

#include "daemon.h"

/* -EDEADLK and a sentence when the process has a file of our mount open or mapped that we serve ourselves: a
 * fault of its would wait for the daemon, which waits for its pause. Files served by passthrough are fine.
 * Pool thread, without the tree lock. Reads /proc, never the mount. */
int ffs_guard_check(struct ffs_fs *fs, pid_t pid, struct ffs_error *err);
