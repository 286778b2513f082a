/* The one error out-parameter of the project.
 *
 * A function that can fail returns 0 (or a count) or -errno, and puts the sentence a user needs into the
 * struct ffs_error its caller passed: what failed, who is at fault, what to do. It is untouched on success,
 * so a caller initialises one with {0} and reads it only after a negative return. `err` may be NULL
 * everywhere. */
#pragma once

#include <errno.h>

#define FFS_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

struct ffs_error {
	int code;       /* positive errno; 0: nothing was set */
	char text[508]; /* one sentence, no trailing newline, truncated on a UTF-8-safe boundary */
};

/* Set *err (when not NULL) and return -code. `code` is a positive errno. errno itself is left alone. Any
 * thread; allocates nothing. */
int ffs_error_set(struct ffs_error *err, int code, const char *fmt, ...) FFS_PRINTF(3, 4);

/* Like ffs_error_set, and ends the sentence with ": " and strerror(code). */
int ffs_error_errno(struct ffs_error *err, int code, const char *fmt, ...) FFS_PRINTF(3, 4);

/* Put "prefix: " in front of a sentence that a callee set. No-op when err is NULL or unset. */
void ffs_error_prefix(struct ffs_error *err, const char *fmt, ...) FFS_PRINTF(2, 3);
