/* The request for a fork with payloads, as text: a payload goes into it byte by byte as it was given. Pure, but for the file
 * of a payload, or of a list of forks. */
#pragma once

#include "base/error.h"
#include "options.h"

/* One --mailbox, "NAME[:TOKEN]=JSON" or "…=@FILE", checked, with the content of its file; *out is the caller's. */
int ffs_fork_box(const char *arg, char **out, struct ffs_error *err);
/* The request to the ctl of target->sandbox for the fork `fork` of target->branch; box: words of ffs_fork_box(), n of them.
 * ack_ms: all are to be acknowledged, NULL: as none says. *out is the caller's. */
int ffs_fork_request(const struct ffs_target *target, const char *fork, char *const *box, unsigned n,
	const unsigned *ack_ms, char **out, struct ffs_error *err);

/* ---- fork-list.c: forks that are to be made ---- */

struct ffs_fork_order {
	char name[65];
	char **box; /* words of ffs_fork_box(), n of them; owned */
	unsigned n;
	char *request; /* the caller's to make; owned */
};
/* Zero-initialised. */
struct ffs_fork_list {
	struct ffs_fork_order *fork;
	unsigned n;
};
/* One more, without payloads. NULL with -EINVAL: not a name, or there already. It lives until the next one comes. */
struct ffs_fork_order *ffs_fork_list_add(struct ffs_fork_list *l, const char *name, struct ffs_error *err);
int ffs_fork_order_box(struct ffs_fork_order *o, const char *arg, struct ffs_error *err);
/* The lines of a file ("-": standard input): "FORK MAILBOX=JSON", as --mailbox has it, or "FORK" alone; further lines of a fork
 * follow its first one. -EINVAL names the line. */
int ffs_fork_list_read(struct ffs_fork_list *l, const char *file, struct ffs_error *err);
void ffs_fork_list_free(struct ffs_fork_list *l);
