/* Owns the tokens that were given by the xattr user.forkfs.token, for writes to come: by name, of a fork or,
 * for branch/, of a session.
 *
 * Threads: any; the tree lock guards the lists. Nothing here waits. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "box.h"
#include "fork.h"

/* For one fork or sandbox; the oldest goes first. */
#define TOKENS_MAX 64u

struct token {
	struct ffs_list link;
	char *name;
	pid_t sid; /* of branch/ */
	size_t len;
	char bytes[FFS_MAILBOX_TOKEN_MAX];
};

/* A fork has its own; those for branch/ are the session's. */
static struct ffs_list *tokens_of(const struct ffs_node *node)
{
	return node->fork ? &node->fork->tokens : &node->sbx->tokens;
}

static struct token *find_token(const struct ffs_node *node, const struct ffs_caller *who)
{
	struct ffs_list *tokens = tokens_of(node);

	for (struct ffs_list *e = tokens->next; e != tokens; e = e->next) {
		struct token *t = ffs_container(e, struct token, link);

		if (strcmp(t->name, node->key.key) == 0 && (node->fork || t->sid == who->sid))
			return t;
	}
	return NULL;
}

static void drop_token(struct token *t)
{
	ffs_list_del(&t->link);
	free(t->name);
	free(t);
}

void ffs_tokens_free(struct ffs_list *tokens)
{
	while (!ffs_list_empty(tokens))
		drop_token(ffs_container(tokens->next, struct token, link));
}

static int set_token(const struct ffs_node *node, const struct ffs_caller *who, const char *bytes, size_t len,
	struct ffs_error *err)
{
	struct ffs_list *tokens = tokens_of(node);
	struct token *t = find_token(node, who);
	unsigned n = 0;

	if (!t) {
		for (struct ffs_list *e = tokens->next; e != tokens; e = e->next)
			n++;
		if (n == TOKENS_MAX)
			drop_token(ffs_container(tokens->next, struct token, link));
		t = calloc(1, sizeof(*t));
		if (t)
			t->name = strdup(node->key.key);
		if (!t || !t->name) {
			free(t);
			return ffs_error_set(err, ENOMEM, "no memory for a token");
		}
		t->sid = who->sid;
		ffs_list_add(tokens, &t->link);
	}
	memcpy(t->bytes, bytes, len);
	t->len = len;
	return 0;
}

int ffs_box_set_token(
	struct ffs_call *call, struct ffs_node *node, const char *bytes, size_t len, struct ffs_error *err)
{
	int r = ffs_mailbox_check_token(FFS_MAILBOX_FORK, bytes, len, err);

	if (r < 0)
		return -r;
	pthread_mutex_lock(&call->fs->lock);
	r = set_token(node, &call->who, bytes, len, err);
	pthread_mutex_unlock(&call->fs->lock);
	return -r;
}

int ffs_box_remove_token(struct ffs_call *call, struct ffs_node *node)
{
	pthread_mutex_lock(&call->fs->lock);
	struct token *t = find_token(node, &call->who);

	if (t)
		drop_token(t);
	pthread_mutex_unlock(&call->fs->lock);
	return t ? 0 : ENODATA;
}

ssize_t ffs_box_get_token(struct ffs_call *call, struct ffs_node *node, char out[FFS_MAILBOX_TOKEN_MAX])
{
	ssize_t n = -ENODATA;

	pthread_mutex_lock(&call->fs->lock);
	struct token *t = find_token(node, &call->who);

	if (t) {
		memcpy(out, t->bytes, t->len);
		n = (ssize_t)t->len;
	}
	pthread_mutex_unlock(&call->fs->lock);
	return n;
}
