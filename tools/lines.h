/* A list that is given to a command as a file, an entry each line; "-" is standard input. */
#pragma once

#include <stddef.h>

#include "base/error.h"

struct ffs_lines {
	char *text, *rest; /* all of it; what has not been given out */
	const char *shown; /* its name in messages */
	unsigned number;   /* of the line that was given out last, from 1 */
};

/* Read all of `file`, at most `max` bytes. -EINVAL: it is no text; any other: it cannot be read. ffs_lines_free() in any case. */
int ffs_lines_read(struct ffs_lines *l, const char *file, size_t max, struct ffs_error *err);
/* The next line that is not empty, without its end; NULL: there is none. It lives as long as the list. */
char *ffs_lines_next(struct ffs_lines *l);
/* Put the file and the number of the line before the sentence. */
void ffs_lines_blame(const struct ffs_lines *l, struct ffs_error *err);
void ffs_lines_free(struct ffs_lines *l);
