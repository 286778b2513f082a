/* Children that are talked to over HTTP on a unix socket: what the kinds coop and firecracker share. The functions are
 * of one child's thread; every wait ends with the child's process, none by a time. */
#pragma once

#include "restore.h"
#include "vmm/http.h"

struct json_object;

/* Connect to the socket that the child makes in its own directory under that name: as soon as it is there. */
int ffs_restore_api_connect(struct ffs_child *c, const char *name, struct ffs_http *http, struct ffs_error *err);
/* One request. 0 when it is answered 2xx, with the answer's JSON object in *answer (NULL when it has none; the caller's;
 * `answer` may be NULL), else -EREMOTEIO with the VMM's own words. */
int ffs_restore_api_call(struct ffs_child *c, struct ffs_http *http, const char *method, const char *path,
	const char *body, struct json_object **answer, struct ffs_error *err);
