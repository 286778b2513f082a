/* The list of `forkfs fork --each`: which forks to make, with which payloads (fork-request.h).
 *
 * One thread, no locks. What waits is the reading, for the list may be a pipe. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "fork-request.h"
#include "lines.h"
#include "restore.h"

#define LIST_MAX (64u << 20)

struct ffs_fork_order *ffs_fork_list_add(struct ffs_fork_list *l, const char *name, struct ffs_error *err)
{
	struct ffs_fork_order *o;

	if (ffs_check_name("fork", name, err) < 0)
		return NULL;
	for (unsigned i = 0; i < l->n; i++)
		if (!strcmp(l->fork[i].name, name)) {
			ffs_error_set(err, EINVAL,
				"fork %s was named further above: the lines of a fork follow each other",
				name);
			return NULL;
		}
	if (l->n == FFS_CHILDREN_MAX) { /* more would not be started by one command */
		ffs_error_set(
			err, EINVAL, "more than %d forks are too many for one command", FFS_CHILDREN_MAX);
		return NULL;
	}
	o = realloc(l->fork, (l->n + 1) * sizeof(*o));
	if (!o) {
		ffs_error_set(err, ENOMEM, "no memory for a list of forks");
		return NULL;
	}
	l->fork = o;
	o = &l->fork[l->n++];
	*o = (struct ffs_fork_order){0};
	snprintf(o->name, sizeof(o->name), "%s", name);
	return o;
}

int ffs_fork_order_box(struct ffs_fork_order *o, const char *arg, struct ffs_error *err)
{
	char **more;
	int r;

	more = realloc(o->box, (o->n + 1) * sizeof(*more));
	if (!more)
		return ffs_error_set(err, ENOMEM, "no memory for a payload");
	o->box = more;
	r = ffs_fork_box(arg, &o->box[o->n], err);
	o->n += !r;
	return r;
}

/* "FORK" or "FORK --mailbox's word". */
static int read_line(struct ffs_fork_list *l, char *line, struct ffs_error *err)
{
	struct ffs_fork_order *o = l->n ? &l->fork[l->n - 1] : NULL;
	char *space = strchr(line, ' ');

	if (space)
		*space = 0;
	if (!o || strcmp(o->name, line) || !space)
		o = ffs_fork_list_add(l, line, err);
	if (!o)
		return -err->code;
	return space ? ffs_fork_order_box(o, space + 1, err) : 0;
}

int ffs_fork_list_read(struct ffs_fork_list *l, const char *file, struct ffs_error *err)
{
	_cleanup_(ffs_lines_free) struct ffs_lines list = {0};
	int r = ffs_lines_read(&list, file, LIST_MAX, err);

	for (char *line; !r && (line = ffs_lines_next(&list));) {
		r = read_line(l, line, err);
		if (r < 0)
			ffs_lines_blame(&list, err);
	}
	if (!r && !l->n)
		r = ffs_error_set(err, EINVAL,
			"%.200s names no fork: a line each is wanted, FORK MAILBOX=JSON", list.shown);
	return r;
}

void ffs_fork_list_free(struct ffs_fork_list *l)
{
	for (unsigned i = 0; i < l->n; i++) {
		for (unsigned k = 0; k < l->fork[i].n; k++)
			free(l->fork[i].box[k]);
		free(l->fork[i].box);
		free(l->fork[i].request);
	}
	free(l->fork);
	*l = (struct ffs_fork_list){0};
}
