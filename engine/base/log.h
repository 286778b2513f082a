/* The daemon's log: one line a message, to stderr (foreground) or syslog (background). Never guest memory,
 * never a payload. Must not be called on the fault path (it does I/O). Any thread. */
#pragma once

#include "base/error.h"

enum ffs_log_level { FFS_LOG_ERROR = 3, FFS_LOG_WARN = 4, FFS_LOG_INFO = 6, FFS_LOG_DEBUG = 7 };

/* Where lines go from now on: `to_syslog` or stderr, and the highest level that is written (FFS_LOG_INFO at
 * start). */
void ffs_log_setup(int to_syslog, enum ffs_log_level max);
void ffs_log(enum ffs_log_level level, const char *fmt, ...) FFS_PRINTF(2, 3);
