/* Private to engine/uffd: the short-lived process that does one injection, and the messages it is asked with.
 */
#pragma once

#include <stdint.h>

#include "base/error.h"

enum ffs_inject_op { FFS_INJECT_USERFAULTFD = 1, FFS_INJECT_MADVISE = 2 };

struct ffs_inject_request {
	uint32_t op;
	int32_t pid;
	uint64_t start;       /* of the process, see struct ffs_proc_id */
	uint64_t deadline_ns; /* of ffs_now_ns(), the same clock in all processes */
	uint64_t addr, len;   /* madvise */
	int32_t advice;
	uint32_t reserved;
};

struct ffs_inject_reply {
	int32_t code; /* 0 or -errno; with FFS_INJECT_USERFAULTFD and 0 the message carries the userfaultfd */
	struct ffs_error err;
};

/* The whole life of the injector process, in a child of the spawner: does the request, answers on `sock`,
 * closes every copy. */
void ffs_injector_run(const struct ffs_inject_request *req, int sock);

/* The spawner process: one injector for each request, until the daemon's end of `sock` is closed. */
void ffs_spawner_body(int sock, void *unused);
