/* What a Firecracker has of its host: drives, networks, the vsock's socket. Its device state names the parent's; each
 * child gets its own. */
#pragma once

#include "restore-jail.h"
#include "restore.h"

#define FFS_DRIVES_MAX 16

/* A drive that is not the parent's in the child. */
struct ffs_drive {
	char id[65];
	char disk[65];       /* the branch's disk with its content; "": the caller's own */
	const char *pattern; /* the caller's own: words in braces are the child's. Borrowed; NULL */
	const char *path;    /* its name in the device state. Borrowed */
	bool read_only;
};

struct ffs_drives {
	bool jailed; /* the children are: then each drive is, for the parent's files are not there. Set before the plan */
	struct ffs_drive drive[FFS_DRIVES_MAX];
	unsigned n;
};

/* Which drives the children need, by the branch's manifest and r->drives. Every writable one of the parent's is among
 * them, or it is refused: -ENOTSUP with the remedy. -EINVAL: r->drives or r->nets make no sense. */
int ffs_drives_plan(struct ffs_restore *r, struct ffs_drives *d, struct ffs_error *err);
/* Copies of the branch's disks in the child's directory (in its jail, by the names in the device state), as large as their
 * data; before its process is started. -EINTR by a signal; -ENOSPC. */
int ffs_drives_copy(
	struct ffs_restore *r, const struct ffs_drives *d, struct ffs_child *c, struct ffs_error *err);
/* Those that the caller has named, to be seen in the child's jail before it loads the branch. bind[].file of
 * those that were added are the caller's to free. */
int ffs_drives_bind(const struct ffs_drives *d, const struct ffs_child *c, struct ffs_jail_bind *bind,
	unsigned *n, struct ffs_error *err);
/* The child has loaded the branch and does not run: its drives become its own. In a jail they are already. */
int ffs_drives_patch(
	struct ffs_restore *r, const struct ffs_drives *d, struct ffs_child *c, struct ffs_error *err);
/* Add network_overrides to the body of PUT /snapshot/load. */
int ffs_nets_add(const struct ffs_restore *r, const struct ffs_child *c, struct json_object *body,
	struct ffs_error *err);
