/* Which pieces of a file a process has touched through its mappings of it. Any thread. */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

/* Set a bit in `map` for each `unit` bytes (a power of two, of whole pages) of the file's first `size` in which a page is in the
 * process's page tables, the file's own or a private copy. The file is what has these numbers in /proc/PID/maps. What the
 * kernel mapped around a page that was touched counts as touched. -ESRCH: the process is gone; -ENOENT: it has not mapped
 * the file. */
int ffs_touched_read(pid_t pid, uint64_t dev, uint64_t ino, uint64_t size, uint64_t unit, uint64_t *map,
	struct ffs_error *err);
