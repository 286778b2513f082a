/* Attaching a VM: because a client asks for it, and again when a daemon starts. */
#pragma once

#include "daemon.h"

struct ffs_request;
struct ffs_txn;

/* Tree lock held: reserve the sandbox's name (req->sbx, referenced). */
int ffs_attach_admit(struct ffs_fs *fs, struct ffs_request *req, struct ffs_error *err);
/* Pool thread, without the tree lock. Ends in ffs_txn_done or ffs_txn_failed. */
void ffs_attach_run(struct ffs_txn *t, struct ffs_request *req);

/* At the start, by the main thread, once there are pool and reaper: reserve the names of all that an earlier
 * daemon had attached, and attach it in the pool, one VM independent of the other. What is gone is dropped
 * with a line in the log and an event. Never fails: a mount does not depend on its VMs. */
void ffs_attach_again(struct ffs_fs *fs);
/* At the end: give up what is still being attached again. */
void ffs_attach_give_up(struct ffs_fs *fs);
