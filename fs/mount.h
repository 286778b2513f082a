/* Mounting by hand and what /proc/self/mountinfo says. */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

#include "fs.h"

struct fuse_session;

struct ffs_mount {
	char *dir;    /* absolute */
	int device;   /* /dev/fuse; owned by the session once it has it */
	bool by_hand; /* else libfuse and fusermount3 did it */
	int id;       /* as mountinfo and fdinfo have it; 0: not found */
	dev_t dev;
};

/* Detach what is dead on the directory, refuse what is alive. Before the daemon forks off. 0 or -errno. */
int ffs_mount_prepare(const char *dir, struct ffs_error *err);
/* mount(2) with a device of our own, or fusermount3 by way of libfuse without the right to. */
int ffs_mount_session(struct ffs_mount *m, const struct ffs_mount_options *opt, struct fuse_session *se,
	struct ffs_error *err);
/* Detach our own mount, if it is still there, and end every request that waits. Never another's. */
void ffs_mount_end(struct ffs_mount *m, struct fuse_session *se);
/* Let the kernel read ahead further in files that are not passed through. Best effort. */
void ffs_mount_read_ahead(const struct ffs_mount *m);
