/* The tree as its clients see it: the mount found, its small files read, requests made through ctl files.
 *
 * One thread. A function that waits ends with -EINTR when a signal came (ffs_interrupt_install). Sentences
 * are those of the tree where it gave one (the answer's `error`, the xattr user.forkfs.error), and say which
 * file failed otherwise. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "options.h"

struct json_object;

struct ffs_tree {
	char *mount; /* absolute, as messages show it */
	int fd;      /* of the mount's root directory */
};

/* Find and open the mount: `given` (--mount DIR, may be NULL), else $FORKFS, else /forkfs; checks that a
 * forkfs daemon answers. */
int ffs_tree_open(struct ffs_tree *t, const char *given, struct ffs_error *err);
/* A mount by its directory and nothing else; the same checks. */
int ffs_tree_open_dir(struct ffs_tree *t, const char *dir, struct ffs_error *err);
void ffs_tree_close(struct ffs_tree *t);
#define FFS_TREE_INIT                                                                                        \
	{                                                                                                    \
		.mount = NULL, .fd = -1                                                                      \
	}

/* A whole small file (at most 4 MiB) as a NUL-terminated string that the caller frees. Waits as long as the
 * file does. */
int ffs_tree_read(const struct ffs_tree *t, const char *path, char **out, struct ffs_error *err);
/* The same, without the newline at the end, into a buffer. */
int ffs_tree_word(const struct ffs_tree *t, const char *path, char *buf, size_t size, struct ffs_error *err);
/* The same as a JSON object, which the caller puts; anything but an object is -EPROTO. */
int ffs_tree_json(
	const struct ffs_tree *t, const char *path, struct json_object **out, struct ffs_error *err);
/* Names of the subdirectories of a directory, sorted, without those that begin with a dot. Free with
 * ffs_tree_names_free(). Lists only: nothing is opened, no branch is taken. */
int ffs_tree_names(
	const struct ffs_tree *t, const char *path, char ***names, size_t *n, struct ffs_error *err);
void ffs_tree_names_free(char **names, size_t n);

/* Make a request: write `request` (not consumed) to the ctl file at `path`, wait for the answer. 0 and the
 * answer (which the caller puts; `answer` may be NULL), or -errno and the sentence. */
int ffs_tree_request(const struct ffs_tree *t, const char *path, struct json_object *request,
	struct json_object **answer, struct ffs_error *err);

/* Let go of a VM; as the command detach. */
int ffs_detach(const struct ffs_tree *t, const char *name, struct ffs_error *err);

/* The same with a request that is text already: one JSON object. */
int ffs_tree_request_text(const struct ffs_tree *t, const char *path, const char *text,
	struct json_object **answer, struct ffs_error *err);

/* Replace the sentence of a failed call by the tree's own for the directory `path`, when it has one. */
void ffs_tree_explain(const struct ffs_tree *t, const char *path, struct ffs_error *err);

/* -ENOENT with a sentence that lists what there is, when the sandbox (or branch, or fork) of the target does
 * not exist. */
int ffs_tree_check_target(const struct ffs_tree *t, const struct ffs_target *target, struct ffs_error *err);

/* Members of an untrusted object: 0, "" or false where they are missing or of another type. The string lives
 * as long as the object. */
uint64_t ffs_json_u64(struct json_object *obj, const char *key);
const char *ffs_json_string(struct json_object *obj, const char *key);
bool ffs_cli_json_bool(struct json_object *obj, const char *key);
struct json_object *ffs_json_get(struct json_object *obj, const char *key);
