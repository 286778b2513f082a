/* Mailboxes as files: forks/NAME/mailboxes/BOX, and for what is read from branch/ next (not in the tree yet).
 * Written, checked while the bytes come, published when the
 * handle is closed; read back as they were written; removed by unlink. */
#pragma once

#include "nodes.h"

/* The node of a name that could be a mailbox's: nothing is looked for by a lookup. -ENOENT: no such name can
 * be. Tree lock held. */
int ffs_box_lookup(struct ffs_fs *fs, struct ffs_node *dir, const char *name, struct ffs_node **out);

/* What an open handle holds; freed with it. */
struct ffs_box;
void ffs_box_free(struct ffs_box *b);

/* All tokens that a fork was told (struct ffs_fork.tokens). Tree lock held. */
void ffs_tokens_free(struct ffs_list *tokens);

/* FUSE handlers; without the tree lock. */
void ffs_box_open(struct ffs_call *call, struct ffs_node *node, int flags);
void ffs_box_read(struct ffs_call *call, struct ffs_handle *h, size_t size, uint64_t off);
void ffs_box_write(struct ffs_call *call, struct ffs_node *node, struct ffs_handle *h, const char *buf,
	size_t size, uint64_t off);
void ffs_box_flush(struct ffs_call *call, struct ffs_node *node, struct ffs_handle *h);
void ffs_box_unlink(struct ffs_call *call, struct ffs_node *dir, const char *name);
/* What the guest publishes, and what is staged: OPENDIR, which searches memory and therefore waits. */
void ffs_box_opendir(struct ffs_call *call, struct ffs_node *dir, int flags);

/* The xattr user.forkfs.token. 0 or a positive errno with the sentence. Takes the tree lock. */
int ffs_box_set_token(
	struct ffs_call *call, struct ffs_node *node, const char *token, size_t len, struct ffs_error *err);
int ffs_box_remove_token(struct ffs_call *call, struct ffs_node *node);
/* Bytes copied, or -ENODATA. */
ssize_t ffs_box_get_token(struct ffs_call *call, struct ffs_node *node, char out[FFS_MAILBOX_TOKEN_MAX]);
