/* What one command of `forkfs restore` starts children of: a branch, a fork, or several forks of one branch, which are
 * named one after the other or a line each in a file.
 *
 * One thread, before anything is started; no locks. What waits is the reading of that file, which may be a pipe. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "lines.h"
#include "restore.h"

#define FILE_MAX (FFS_CHILDREN_MAX * 66u) /* a name and a newline each */

static struct ffs_target *add(struct ffs_restore_targets *t, struct ffs_error *err)
{
	struct ffs_target *more;

	if (t->n == FFS_CHILDREN_MAX) {
		ffs_error_set(
			err, EINVAL, "more than %d forks are too many for one command", FFS_CHILDREN_MAX);
		return NULL;
	}
	more = realloc(t->target, (t->n + 1) * sizeof(*more));
	if (!more) {
		ffs_error_set(err, ENOMEM, "no memory for the names of forks");
		return NULL;
	}
	t->target = more;
	return &t->target[t->n++];
}

/* ---- a file of names ---- */

static int read_names(struct ffs_restore_targets *t, const struct ffs_target *branch, const char *file,
	struct ffs_error *err)
{
	_cleanup_(ffs_lines_free) struct ffs_lines list = {0};
	int got = ffs_lines_read(&list, file, FILE_MAX, err);

	for (char *line; !got && (line = ffs_lines_next(&list));) {
		struct ffs_target *one = add(t, err);

		if (!one)
			return -err->code;
		got = ffs_check_name("fork", line, err);
		if (got < 0) {
			ffs_lines_blame(&list, err);
			return -EINVAL;
		}
		*one = *branch;
		snprintf(one->fork, sizeof(one->fork), "%s", line);
	}
	if (!got && !t->n)
		got = ffs_error_set(err, EINVAL, "%.200s names no fork: a line each is wanted", list.shown);
	return got;
}

/* ---- what they have to be together ---- */

static int by_name(const void *a, const void *b)
{
	const struct ffs_target *const *one = a, *const *other = b;

	return strcmp((*one)->fork, (*other)->fork);
}

static int check_twice(const struct ffs_restore_targets *t, struct ffs_error *err)
{
	_cleanup_free_ const struct ffs_target **sorted = calloc(t->n, sizeof(*sorted));

	if (!sorted)
		return ffs_error_set(err, ENOMEM, "no memory for the names of forks");
	for (unsigned i = 0; i < t->n; i++)
		sorted[i] = &t->target[i];
	qsort(sorted, t->n, sizeof(*sorted), by_name);
	for (unsigned i = 1; i < t->n; i++)
		if (!strcmp(sorted[i - 1]->fork, sorted[i]->fork))
			return ffs_error_set(err, EINVAL,
				"fork %s is named twice: -n COUNT starts so many children of each fork",
				sorted[i]->fork);
	return 0;
}

static int check_together(const struct ffs_restore_targets *t, struct ffs_error *err)
{
	const struct ffs_target *first = t->target;

	for (unsigned i = 0; t->n > 1 && i < t->n; i++) {
		const struct ffs_target *one = &t->target[i];

		if (strcmp(one->sandbox, first->sandbox) || strcmp(one->branch, first->branch))
			return ffs_error_set(err, EINVAL,
				"%s/%s and %s/%s are two branches: the children of a command are of one, "
				"whose memory they share",
				first->sandbox, first->branch, one->sandbox, one->branch);
		if (!one->fork[0])
			return ffs_error_set(err, EINVAL,
				"several targets are forks of one branch, NAME/BRANCH/FORK each; -n COUNT "
				"starts many children of one");
	}
	return t->n > 1 ? check_twice(t, err) : 0;
}

int ffs_restore_targets_read(struct ffs_restore_targets *t, char *const *word, unsigned n, const char *forks,
	struct ffs_error *err)
{
	struct ffs_target branch;
	int got = 0;

	if (!n || (forks && n > 1))
		return ffs_error_set(err, EINVAL,
			forks ? "--forks goes with one NAME/BRANCH: its lines name forks of that"
			      : "a NAME/BRANCH[/FORK] is wanted; the VMM's own options go after --");
	if (forks) {
		got = ffs_target_parse(word[0], FFS_TARGET_BRANCH, &branch, err);
		if (!got)
			got = read_names(t, &branch, forks, err);
	}
	for (unsigned i = 0; !forks && !got && i < n; i++) {
		struct ffs_target *one = add(t, err);

		got = one ? ffs_target_parse(word[i], FFS_TARGET_BRANCH | FFS_TARGET_FORK, one, err)
			  : -err->code;
	}
	return got ? got : check_together(t, err);
}

void ffs_restore_targets_free(struct ffs_restore_targets *t)
{
	free(t->target);
	*t = (struct ffs_restore_targets){0};
}
