/* Conversion of a branch of the store from one form to the other, on request. */
#pragma once

#include "ctl.h"

struct ffs_conversion;

/* May it be converted? Tree lock held; -errno and the sentence. */
int ffs_convert_admit(struct ffs_named *n, struct ffs_error *err);
/* Carry out a request, in a writer's turn; ends in ffs_txn_done() or ffs_txn_failed(), later. Without the
 * tree lock. */
void ffs_convert_run(struct ffs_txn *t, struct ffs_request *req);
/* What a branch's status says of it. Tree lock held. */
void ffs_convert_status(const struct ffs_named *n, struct json_object *o);
