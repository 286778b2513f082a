/* Who makes a request: the thread that FUSE names, its thread group, session and user. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include <fuse_lowlevel.h>

#include "generation.h"

struct ffs_caller {
	pid_t tid; /* 0: a process of a pid namespace that we can't see into */
	pid_t tgid;
	pid_t sid;      /* 0: not known */
	uint64_t start; /* of the thread group; 0: not known */
	uid_t uid;
	gid_t gid;
};

/* Reads /proc (of the caller, never of our mount). Any thread, no locks needed. */
void ffs_caller_of(fuse_req_t req, struct ffs_caller *out);
struct ffs_gen_who ffs_caller_who(const struct ffs_caller *c);
/* Is that thread group still there? (ffs_gen_sweep) */
bool ffs_caller_alive(struct ffs_gen_who who);
