/* The record of what is attached, so that a later daemon finds it again: a file per sandbox in the store's
 * directory
 * `.attached`, or, without a store, in a directory of the mount's own below the runtime directory.
 *
 * Does file I/O: without the tree lock. Any thread, but one at a time for one name (who attaches or detaches
 * it has reserved it). */
#pragma once

#include <stdbool.h>

#include "base/util.h"
#include "fs.h"

struct json_object;
struct ffs_attached;

/* Where the records of this mount are (mount_dir: absolute); nothing is made or read yet. NULL: no memory, or
 * no directory for it, and the log says so. */
struct ffs_attached *ffs_attached_new(const struct ffs_mount_options *opt, const char *mount_dir);
/* NULL: nothing. A directory that holds no record is removed. */
void ffs_attached_free(struct ffs_attached *a);

/* Record an attachment, durably when it returns, in place of an earlier one of that name: the VMM, and the
 * request (JSON, the object that is the value of "attach") by which it is attached again. */
int ffs_attached_remember(struct ffs_attached *a, const char *name, struct ffs_proc_id vmm,
	const char *request, struct ffs_error *err);
/* Forget one; that there is none is no failure. What cannot be removed the log names. */
void ffs_attached_forget(struct ffs_attached *a, const char *name);
void ffs_attached_forget_all(struct ffs_attached *a);

/* Call fn for each record; it may forget it. `this_boot`: it is of this boot of the machine, so that the
 * process can be the one that is meant. Records that cannot be read are forgotten, with a line in the log. */
typedef void (*ffs_attached_fn)(
	void *arg, const char *name, struct ffs_proc_id vmm, bool this_boot, struct json_object *request);
void ffs_attached_each(struct ffs_attached *a, ffs_attached_fn fn, void *arg);
