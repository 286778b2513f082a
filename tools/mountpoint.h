/* What lies at a directory before and after forkfs is mounted there, and who uses a mount. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"

/* The absolute path of a directory without links, also when a dead FUSE mount is on it (then only its parent
 * is resolved). The caller frees it. -errno with the sentence. */
int ffs_mountpoint_resolve(const char *dir, char **out, struct ffs_error *err);

/* May forkfs be mounted on `dir` (resolved)? 0, or -errno with the sentence: nothing there, no directory, not
 * empty, something mounted there that is alive. *dead: a forkfs mount whose daemon is gone is there, to be
 * detached first. */
int ffs_mountpoint_check(const char *dir, bool *dead, struct ffs_error *err);

/* The file system type mounted on exactly `dir` (resolved): the topmost, from /proc/self/mountinfo, so no
 * hung mount hangs us. 0, or -ENOENT when none is. */
int ffs_mountpoint_type(const char *dir, char *type, size_t size);

/* Who has something below `dir` open, mapped, or as its working directory: "qemu-system-x86 (1234), bash
 * (77)"; "" when nobody that we may see does. Looks at /proc only. True: and so has the process `apart`, which
 * is not in the list. */
bool ffs_mountpoint_users(const char *dir, int apart, char *out, size_t size);
