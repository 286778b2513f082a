/* Command lines and names, pure logic: nothing here opens or prints anything. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "base/error.h"

enum ffs_opt_kind {
	FFS_OPT_FLAG,   /* bool *: becomes true */
	FFS_OPT_VALUE,  /* const char **: the argument; given twice is an error */
	FFS_OPT_LIST,   /* char **: arguments joined by commas, freed by the caller */
	FFS_OPT_EACH,   /* struct ffs_words *: every argument, in order; ffs_words_free() */
	FFS_OPT_CHOICE, /* const char **: the option's own name; two different ones exclude each other */
};

struct ffs_words {
	const char **word; /* the arguments themselves */
	unsigned n;
};
static inline void ffs_words_free(struct ffs_words *w)
{
	free(w->word);
}

struct ffs_opt {
	const char *name; /* without dashes; NULL ends the table (or: only a letter, when letter is set) */
	char letter;      /* 0: none */
	enum ffs_opt_kind kind;
	void *out;
};

/* Parse argv[1…]. Options may stand before or after other words; "--" ends them; "--name=value", "--name
 * value", "-nvalue" and
 * "-n value" are understood, abbreviations are not (a script that uses one would break with the next option).
 * What is no option is moved to the front: argv[0 … *n-1]. 0, or -EINVAL with a sentence that names the word.
 */
int ffs_opts_parse(const struct ffs_opt *opts, int argc, char **argv, int *n, struct ffs_error *err);

/* NAME or NAME/BRANCH: which of them a command takes. */
enum ffs_target_kind {
	FFS_TARGET_SANDBOX = 1,
	FFS_TARGET_BRANCH = 2,
	FFS_TARGET_ANY = 3,
	FFS_TARGET_FORK = 4, /* with FFS_TARGET_BRANCH: NAME/BRANCH/FORK too */
};

struct ffs_target {
	char sandbox[65];
	char branch[65]; /* "": none */
	char fork[65];   /* "": none */
};

/* Split "NAME[/BRANCH[/FORK]]" and check the names (ffs_check_name). One slash at the end is forgiven. -EINVAL with
 * a sentence. */
int ffs_target_parse(
	const char *text, enum ffs_target_kind allowed, struct ffs_target *out, struct ffs_error *err);

/* "UID:GID[:rw]", numbers or names, as the numeric string that the tree understands (at most 63 bytes).
 * -EINVAL. */
int ffs_owner_parse(const char *text, char out[64], struct ffs_error *err);

/* "ID=PATH" into the ID (ffs_check_name) and the PATH, which may have further equals signs. -EINVAL. */
int ffs_disk_parse(const char *text, char id[65], const char **path, struct ffs_error *err);

/* A number of bytes above 0, with a suffix K, M, G or T (powers of 1024) or without. -EINVAL, with a sentence
 * that begins with `what`. */
int ffs_size_parse(const char *what, const char *text, uint64_t *out, struct ffs_error *err);

/* A process id, in whole and positive. -EINVAL. */
int ffs_pid_parse(const char *text, int *pid, struct ffs_error *err);
/* The value of the option `name`: a number of seconds, a day at most. 0 or -EINVAL with a sentence. */
int ffs_seconds_option(const char *name, const char *text, unsigned *seconds, struct ffs_error *err);
/* A time-out for acknowledgements (--ack): milliseconds, 0 the default. 0 or -EINVAL with a sentence. */
int ffs_ack_option(const char *text, unsigned *ms, struct ffs_error *err);
