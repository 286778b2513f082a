/* Children that are talked to over HTTP on a unix socket: what the kinds coop and firecracker share. The functions are
 * of one child's thread; every wait ends with the child's process, none by a time. */
#pragma once

#include "restore.h"
#include "vmm/http.h"

struct json_object;

/* c->talk of both kinds. */
struct ffs_restore_talk {
	struct ffs_http http;
	bool running; /* it runs by itself */
};

/* Where the child shall make its API socket, once it has a directory; until then path is left alone. */
void ffs_restore_api_socket(struct ffs_child *c, char path[160]);
/* The branch's device state becomes the child's descriptor FFS_CHILD_VMSTATE; nothing for one that is only shown. */
int ffs_restore_api_give_vmstate(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
/* Make c->talk, and connect to that socket as soon as it is there. */
int ffs_restore_api_connect(struct ffs_child *c, struct ffs_error *err);
/* One request. 0 when it is answered 2xx, with the answer's JSON object in *answer (NULL when it has none; the caller's;
 * `answer` may be NULL), else -EREMOTEIO with the VMM's own words. */
int ffs_restore_api_call(struct ffs_child *c, const char *method, const char *path, const char *body,
	struct json_object **answer, struct ffs_error *err);
/* `run` and `let_go` of both kinds. */
int ffs_restore_api_run(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
void ffs_restore_api_let_go(struct ffs_restore *r, struct ffs_child *c);
