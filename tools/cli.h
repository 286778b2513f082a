/* What the subcommands of `forkfs` share. A front of the tree: everything it knows about sandboxes it reads
 * from files of the mount, everything it wants it writes into them. One process, one thread, no state of its
 * own. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct json_object;

enum { FFS_EXIT_OK = 0, FFS_EXIT_FAILURE = 1, FFS_EXIT_USAGE = 2 };

/* ---- the commands ---- */

struct ffs_command {
	const char *name;
	const char *synopsis; /* what follows the name in a usage line */
	const char *help;     /* one line */
	/* argv[0] is the subcommand's name; returns an exit code. */
	int (*run)(const struct ffs_command *self, int argc, char **argv);
};

extern const struct ffs_command ffs_commands[]; /* ends with a NULL name */

int ffs_cmd_mount(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_umount(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_attach(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_detach(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_ls(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_status(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_branch(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_fork(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_wait(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_rm(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_restore(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_verify(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_export(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_import(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_convert(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_inspect(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_pager(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_doctor(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_health(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_exec(const struct ffs_command *self, int argc, char **argv);
int ffs_cmd_pool(const struct ffs_command *self, int argc, char **argv);
/* The process that ends what a killed pool leaves: the same binary called as forkfs-pool-guard. */
int ffs_pool_guard_main(int argc, char **argv);
/* The process that has the connection to a guest's agent: the same binary called as forkfs-agent-link. */
int ffs_agent_link_main(int argc, char **argv);
/* The mount(8) helper: the same binary called as mount.fuse.forkfs. Exit codes are mount(8)'s. */
int ffs_mount_helper(int argc, char **argv);

/* Set by main() from a --mount in front of the subcommand; NULL: none. */
extern const char *ffs_global_mount;

/* ---- what is printed ---- */

/* "forkfs CMD: sentence" and the usage line on stderr; returns FFS_EXIT_USAGE. */
int ffs_usage_error(const struct ffs_command *self, const char *fmt, ...) FFS_PRINTF(2, 3);
/* Usage and one line of help on stdout; returns FFS_EXIT_OK. */
int ffs_usage_help(const struct ffs_command *self);
/* "forkfs CMD: sentence" on stderr, and nothing else: also from a thread of a command. */
void ffs_print_failure(const struct ffs_command *self, const struct ffs_error *err);
/* "forkfs CMD: sentence" on stderr; returns FFS_EXIT_FAILURE. When a signal asked us to end, ends by that
 * signal instead. */
int ffs_failure(const struct ffs_command *self, const struct ffs_error *err);
/* Flush stdout; FFS_EXIT_FAILURE with a sentence when what was printed did not get out (a full disk, a closed
 * pipe). */
int ffs_finish_output(const struct ffs_command *self);
/* Print text that a VMM or a guest may have had a hand in: control bytes become '?', so no terminal obeys
 * them. */
void ffs_print_safe(const char *text);
/* One line of JSON on stdout; releases the object. */
void ffs_print_json(struct json_object *obj);

/* "1.3 ms", "512 MiB": into a buffer of the caller, which is returned. */
const char *ffs_format_ns(char buf[32], uint64_t ns);
const char *ffs_format_bytes(char buf[32], uint64_t bytes);

/* ---- signals ---- */

/* From now on SIGINT, SIGTERM and SIGHUP interrupt what waits (EINTR) instead of ending the process. */
void ffs_interrupt_install(void);
bool ffs_interrupted(void);
/* End as the signal would have ended us, so that the shell sees it; does not return. */
void ffs_interrupt_exit(void) __attribute__((noreturn));
/* From now on these signals, but for what was ignored before (nohup), come out of a descriptor that does not block
 * (signalfd(2)), which is the caller's; -1 with errno. For the main thread, before others are started. */
int ffs_signals_take(const int *signals, unsigned n);
