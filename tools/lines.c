/* Lists, an entry each line (lines.h).
 *
 * One thread, no locks. What waits is the reading, for the file may be a pipe. */
#include "lines.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

int ffs_lines_read(struct ffs_lines *l, const char *file, size_t max, struct ffs_error *err)
{
	const bool input = !strcmp(file, "-");
	size_t len = 0;
	int r;

	*l = (struct ffs_lines){.shown = input ? "standard input" : file};
	r = ffs_read_file(input ? "/dev/stdin" : file, max, &l->text, &len);
	if (r < 0)
		return ffs_error_errno(err, r == -EINVAL ? EIO : -r, "%.200s can't be read", l->shown);
	if (strlen(l->text) != len)
		return ffs_error_set(err, EINVAL, "%.200s has a NUL in it, and is no list", l->shown);
	l->rest = l->text;
	return 0;
}

char *ffs_lines_next(struct ffs_lines *l)
{
	while (l->rest && *l->rest) {
		char *line = l->rest, *end = strchr(line, '\n');

		l->rest = end ? end + 1 : NULL;
		if (end)
			*end = 0;
		l->number++;
		if (*line)
			return line;
	}
	return NULL;
}

void ffs_lines_blame(const struct ffs_lines *l, struct ffs_error *err)
{
	ffs_error_prefix(err, "%.200s, line %u", l->shown, l->number);
}

void ffs_lines_free(struct ffs_lines *l)
{
	free(l->text);
	*l = (struct ffs_lines){0};
}
