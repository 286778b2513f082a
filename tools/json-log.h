/* A log in files of JSON lines, as Docker's json-file has them:
 * {"log":"text\n","stream":"stdout","time":"…Z"}. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define FFS_JSON_LOG_BYTES (10u << 20) /* of one file */
#define FFS_JSON_LOG_FILES 3u          /* PATH, PATH.1, PATH.2: what is older is gone */
#define FFS_JSON_LOG_LINE 16384u       /* of a longer one, pieces without a newline */

struct ffs_json_log;

/* Go on with the log at `path`, or begin it. -EBUSY: another process writes it. */
int ffs_json_log_open(
	const char *path, uint64_t bytes, unsigned files, struct ffs_json_log **out, struct ffs_error *err);
/* What came on a stream at a time (CLOCK_REALTIME). Whole lines are in the file when it comes back. Nothing
 * fails: what can't be written is counted, and said in the log as soon as that is possible again. */
void ffs_json_log_put(
	struct ffs_json_log *l, bool is_stderr, const void *bytes, size_t len, uint64_t wall_ns);
/* What is left of a line is written too, and all of it is on the disk. *lost (may be NULL; the caller frees):
 * what is missing, as a sentence; NULL: nothing. */
void ffs_json_log_close(struct ffs_json_log *l, uint64_t wall_ns, char **lost);
