/* The request for a fork with payloads, as text: a payload goes into it byte by byte as it was given. Pure, but for the file
 * of a payload. */
#pragma once

#include "base/error.h"
#include "options.h"

/* One --mailbox, "NAME[:TOKEN]=JSON" or "…=@FILE", checked, with the content of its file; *out is the caller's. */
int ffs_fork_box(const char *arg, char **out, struct ffs_error *err);
/* The request to the ctl of target->sandbox for the fork `fork` of target->branch; box: words of ffs_fork_box(), n of them.
 * ack_ms: all are to be acknowledged, NULL: as none says. *out is the caller's. */
int ffs_fork_request(const struct ffs_target *target, const char *fork, char *const *box, unsigned n, const unsigned *ack_ms,
	char **out, struct ffs_error *err);
