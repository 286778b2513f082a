/* ctl files: one handle is one transaction. A JSON object accumulates over writes, is checked and admitted by
 * the write that completes it, carried out in the pool, and answered to reads. */
#pragma once

#include "daemon.h"

#define FFS_CTL_MAX (256u * 1024)

struct ffs_txn;
struct json_object;

enum ffs_request_kind {
	FFS_REQ_ATTACH,
	FFS_REQ_DETACH,
	FFS_REQ_SHUTDOWN,
	FFS_REQ_ADOPT,
	FFS_REQ_BRANCH,
	FFS_REQ_CONVERT,
	FFS_REQ_FORK,
};

/* A payload of a fork. Strings are owned. */
struct ffs_box_request {
	char *name, *token; /* token NULL: none */
	size_t token_len;
	char *payload; /* as it stands in the request */
	size_t payload_len;
	bool wants_ack;
	unsigned ack_timeout_ms;
};

/* What was asked for, checked. Strings are owned. */
struct ffs_request {
	enum ffs_request_kind kind;
	char name[80];                   /* of the sandbox, or of the branch */
	char branch[80];                 /* to adopt, to fork */
	char origin[37];                 /* to attach: the id of the branch that it is a child of; "": none */
	char *qemu, *coop, *firecracker; /* control sockets; at most one is given */
	char *said;                      /* an attach, as its client wrote it */
	char *key;                       /* of a cached branch, which has no name given */
	bool cached;                     /* the branch of the key was there */
	pid_t pid;
	bool track, force, wait, without_disks;
	enum ffs_branch_mode mode;
	uint64_t max_rate;
	struct ffs_disk_name *disks; /* n_disks, their strings owned */
	unsigned n_disks;
	bool has_owner, owner_writes;
	bool has_store;
	enum ffs_store_kind store;
	uid_t uid;
	gid_t gid;
	struct ffs_sbx *sbx;     /* referenced: reserved for attach, target of the others */
	struct ffs_named *named; /* referenced: the reserved name */
	struct ffs_box_request *boxes;
	unsigned n_boxes;
	struct ffs_fork *fork; /* referenced: complete, to be shown */
};

/* ---- ctl.c: transactions ---- */

/* Tree lock held. sbx NULL: .forkfs/ctl. */
struct ffs_txn *ffs_txn_new(
	struct ffs_fs *fs, struct ffs_sbx *sbx, int open_flags, const struct ffs_caller *who);
struct ffs_txn *ffs_txn_ref(struct ffs_txn *t);
void ffs_txn_unref(struct ffs_txn *t);
/* Tree lock held: the handle is gone. What nobody can be told of any more is undone, unless it was opened
 * write-only: then nobody wanted an answer. */
void ffs_txn_released(struct ffs_txn *t);
unsigned ffs_txn_revents(const struct ffs_txn *t);

/* FUSE handlers; without the tree lock. */
void ffs_ctl_write(
	struct ffs_call *call, struct ffs_node *node, struct ffs_handle *h, const char *buf, size_t size);
void ffs_ctl_read(struct ffs_call *call, struct ffs_handle *h, size_t size, int flags);

/* For requests.c, on pool threads. */
struct ffs_request *ffs_txn_request(struct ffs_txn *t);
struct ffs_fs *ffs_txn_fs(struct ffs_txn *t);
const struct ffs_caller *ffs_txn_who(struct ffs_txn *t);
struct ffs_cancel *ffs_txn_cancel(struct ffs_txn *t);
/* Tree lock held: the client is gone and wanted the answer. */
bool ffs_txn_abandoned(const struct ffs_txn *t);
/* The answer; takes over `o`. Without the tree lock, once. */
void ffs_txn_done(struct ffs_txn *t, struct json_object *o);
void ffs_txn_failed(struct ffs_txn *t, int code, const struct ffs_error *err);

/* ---- request-parse.c: the language ---- */

/* What an object asks for; root: of .forkfs/ctl; raw: the object as it was written (of a
 * fork only). -EINVAL or -EOPNOTSUPP with the sentence, and nothing is owned by *req then but its strings, which the caller frees either way. */
int ffs_request_parse(struct json_object *o, bool root, struct ffs_span raw, struct ffs_request *req,
	struct ffs_error *err);

/* ---- request-fork.c ---- */

int ffs_request_parse_fork(
	struct json_object *o, struct ffs_span raw, struct ffs_request *req, struct ffs_error *err);
/* Find and check everything, write nothing that could be seen: all payloads or none. Without the tree lock; reads
 * guest memory. */
int ffs_request_admit_fork(
	struct ffs_sbx *sbx, const struct ffs_caller *who, struct ffs_request *req, struct ffs_error *err);
void ffs_request_run_fork(struct ffs_txn *t, struct ffs_request *req);
/* Members of an untrusted object (request-parse.c); `what` is the verb. *out is NULL where there is none. */
int ffs_request_known_keys(
	struct json_object *o, const char *what, const char *const *keys, struct ffs_error *err);
int ffs_request_string(struct json_object *o, const char *what, const char *key, size_t max, const char **out,
	struct ffs_error *err);
int ffs_request_bool(
	struct json_object *o, const char *what, const char *key, bool *out, struct ffs_error *err);

/* ---- requests.c: what can be asked for ---- */

/* Check an object and reserve what it names. sbx: of sbx/ctl, NULL for .forkfs/ctl. 0, or -errno and the
 * sentence. Without the tree lock. */
int ffs_request_admit(struct ffs_fs *fs, struct ffs_sbx *sbx, const struct ffs_caller *who,
	struct json_object *o, struct ffs_span raw, struct ffs_request *out, struct ffs_error *err);
/* Carry it out: pool thread. Ends in ffs_txn_done or ffs_txn_failed, maybe later. */
void ffs_request_run(struct ffs_txn *t);
void ffs_request_clear(struct ffs_fs *fs, struct ffs_request *req);
/* What ffs_request_parse() has allocated. */
void ffs_request_free_strings(struct ffs_request *req);
