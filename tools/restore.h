/* Starting VMs from a branch: what `forkfs restore` and its kinds of VMM share.
 *   cmd-restore.c        the command: the children side by side, what is printed
 *   restore-targets.c    what they are children of
 *   restore-begin.c      what the branch is, and what its children have in common
 *   restore-start.c      one child: loaded, running, awaited
 *   restore-child.c      one process: its directory, its descriptors, its life
 *   restore-image.c      what its children map
 *   restore-prefetch.c   the working set: what the first of them touches is read ahead for later ones
 *   restore-fork.c       a fork's own pages, written into its children
 *   restore-ack.c        what is handed over: the acknowledgements of a fork's mailboxes
 *   restore-ack-vsock.c  those that come by vsock
 *   restore-agent.c      the wait until the agent in its guest is healthy
 *   restore-conf.c       which program, with which options of the host (/etc/forkfs/vmm.d)
 *   restore-qemu*.c      kind qemu            restore-api.c   kind coop, and what VMMs with an HTTP API share
 *   restore-firecracker.c, restore-drives.c, restore-jail*.c   kind firecracker
 *
 * A kind is a table of operations (struct ffs_restore_ops), a line in ffs_restore_kinds[]. Nothing that a branch's
 * manifest says is believed: it was written by a VMM, or by a stranger. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "mailbox/ack.h"
#include "options.h"
#include "tree.h"

struct json_object;

/* ---- words of a command line: owned strings, ended by NULL for exec ---- */

struct ffs_argv {
	char **word; /* n of them and a NULL; NULL while n is 0 */
	unsigned n;
	bool failed; /* no memory for one of them: asked for once, at the end */
};
void ffs_argv_add(struct ffs_argv *a, const char *word);
void ffs_argv_addf(struct ffs_argv *a, const char *fmt, ...) FFS_PRINTF(2, 3);
void ffs_argv_free(struct ffs_argv *a);
struct json_object *ffs_argv_json(const struct ffs_argv *a);

/* ---- restore-conf.c ---- */

/* What the host says about a kind of VMM: a file of vmm.d, and the command line, which goes before it. */
struct ffs_restore_conf {
	char *binary;        /* NULL: not said */
	char *jailer;        /* of Firecracker; NULL: its children are in no jail */
	struct ffs_argv arg; /* in front of the caller's own */
	struct ffs_argv env; /* NAME=VALUE */
};
#define FFS_VMM_DIR "/etc/forkfs/vmm.d"
/* Read the file `path`, or (NULL) the first of FFS_VMM_DIR in the order of names whose `kind` is the one wanted;
 * none there is no failure. A file that others than root and the caller can write is refused. */
int ffs_restore_conf_read(
	const char *path, const char *kind, struct ffs_restore_conf *out, struct ffs_error *err);
void ffs_restore_conf_free(struct ffs_restore_conf *c);
/* Replace {NAME} in text by its value; other braces stay. The caller frees it; NULL: no memory. */
struct ffs_restore_word {
	const char *name, *value;
};
char *ffs_restore_expand(const char *text, const struct ffs_restore_word *words, unsigned n);

/* ---- restore-targets.c ---- */

#define FFS_CHILDREN_MAX 4096 /* of one command */

/* A branch or a fork; or, more than one, different forks of one branch, in the order in which they were named. */
struct ffs_restore_targets {
	struct ffs_target *target;
	unsigned n;
};
/* From the n words of a command line, or (forks is not NULL: --forks) the lines of a file, "-" is standard input, which name
 * forks of the branch that is the only word. -EINVAL: they are not as they should be; else the file can't be read. What is
 * there is the caller's to free in any case. */
int ffs_restore_targets_read(struct ffs_restore_targets *t, char *const *word, unsigned n, const char *forks,
	struct ffs_error *err);
void ffs_restore_targets_free(struct ffs_restore_targets *t);

/* ---- one call of the command ---- */

struct ffs_restore_ops;
struct ffs_restore_page;
struct ffs_restore_set;

struct ffs_restore {
	const struct ffs_tree *tree;
	struct ffs_target target;
	int branch_fd;              /* its directory: whatever is read of it is of this one */
	struct json_object *status; /* of the branch */
	struct json_object *vmm;    /* in it: kind, version, command_line, … ; untrusted */
	uint64_t memory_size;
	bool writing; /* its capture is still going on */
	bool trust, paused, imported, no_prefetch;
	const char *backend; /* --backend: "file", "uffd"; NULL: not said. Of the kind firecracker only */
	struct ffs_words drives,
		nets; /* --drive, --net: ID=VALUE each, borrowed. Of the kind firecracker only */
	struct ffs_restore_conf conf;
	const char *const *user_arg; /* what came after -- */
	unsigned n_user_args;
	int memory_fd; /* of the branch: read-only, shared by all children */
	bool loaded;   /* it is a copy in memory, made for them */
	struct ffs_restore_set
		*set; /* of restore-prefetch.c; NULL: nothing is recorded, nothing read ahead */
	struct ffs_restore_page
		*page; /* what the fork target.fork has over its branch, n_pages of them; owned */
	unsigned n_pages;
	/* what of its mailboxes is to be acknowledged by each child, and where their frames are; n is 0: nothing */
	struct ffs_ack_wait ack;
	uint64_t ack_offset[FFS_MAILBOX_MAX];
	bool ack_all, ack_none; /* --ack: all of them, for ack_ms; --no-ack */
	unsigned ack_ms;
	const char *ack_address; /* --ack-address; NULL: not said */
	bool healthy;            /* --healthy: a child is there when its guest's agent is */
	unsigned ready_s;        /* --ready-timeout: how long that guest may take to answer */
	uint64_t began_ns;
	const struct ffs_restore_ops *ops;
	void *plan; /* of the kind */
	/* what was replaced or left out of the command line, a sentence each; JSON array */
	struct json_object *notes;
};

/* ---- restore-begin.c ---- */

/* What is said on a command line of how children are started. */
struct ffs_restore_args {
	const char *vmm, *jailer, *conf, *dir, *mount, *backend, *ack_address, *ready;
	struct ffs_words drives, nets;
	bool trust, torn, as_served, no_prefetch, healthy;
	unsigned ready_s;            /* of ready, when it has been checked */
	const char *const *user_arg; /* what came after -- */
	unsigned n_user_args;
};
#define FFS_RESTORE_OPTS 15
void ffs_restore_opts(struct ffs_restore_args *a, struct ffs_opt out[FFS_RESTORE_OPTS]);
int ffs_restore_check_args(struct ffs_restore_args *a, struct ffs_error *err);
bool ffs_restore_is_uffd(const struct ffs_restore_args *a);
/* Where the directories of the children are made. */
const char *ffs_restore_dir(const struct ffs_restore_args *a);
void ffs_restore_args_free(struct ffs_restore_args *a);

/* `a` must live as long as r does. */
void ffs_restore_init(struct ffs_restore *r, const struct ffs_tree *t, const struct ffs_target *target,
	const struct ffs_restore_args *a);
/* Look at the branch, and make the plan of its kind: all that can be refused is refused here. */
int ffs_restore_plan(struct ffs_restore *r, const struct ffs_restore_args *a, struct ffs_error *err);
/* Open what the children share; of a fork, read its pages too. */
int ffs_restore_begin(struct ffs_restore *r, const struct ffs_restore_args *a, struct ffs_error *err);
/* Also after a failure, when no child is being started any more. */
void ffs_restore_end(struct ffs_restore *r);

/* The same for the children of one target of that branch, when what all of them share is there: with the pages, the
 * acknowledgements and the notes of its own, if it is a fork. `r` must live as long; ffs_restore_view_end() in any case. */
int ffs_restore_view(const struct ffs_restore *r, const struct ffs_target *target, struct ffs_restore *out,
	struct ffs_error *err);
void ffs_restore_view_end(struct ffs_restore *view);

/* ---- restore-image.c ---- */

/* Open what the children are to map into r->memory_fd: memory.bin where the kernel serves it from the branch's image, or
 * while it is still being written; else (from the store, shared with a parent, no passthrough) its content in a sealed
 * file in memory, which takes as long as reading it. as_served: memory.bin in any case. -EINTR by a signal. */
int ffs_restore_image(struct ffs_restore *r, bool as_served, struct ffs_error *err);
/* Does the kernel serve memory.bin from the branch's image, which is one file in memory? */
bool ffs_restore_is_image(const struct ffs_restore *r);

/* What is said when a copy fails: its file can't be made, the original read, the copy written. */
struct ffs_sparse_words {
	const char *file, *read, *write;
};
/* All of `from` into the empty file `to`, with a hole for each `step` bytes that are zero. Any thread. -EINTR by a signal. */
int ffs_copy_sparse(int from, int to, uint64_t size, size_t step, const struct ffs_sparse_words *words,
	struct ffs_error *err);

struct ffs_child;

/* ---- restore-prefetch.c ---- */

/* Find the working set of a branch in the store, if one was recorded, and where it is to be. Main thread, when r->memory_fd
 * is there. Nothing depends on it: what fails is only said. */
void ffs_restore_set_open(struct ffs_restore *r);
/* Have it read ahead for the children that are being started, as long as nothing is to be read from `fd`: no more of them
 * will be then. Main thread; waits for no child and no disk. */
void ffs_restore_set_prefetch(struct ffs_restore *r, int fd);
/* A child is ready: what the first one has touched until now, or will have when its start is over. Its thread, no lock held. */
void ffs_restore_set_ready(struct ffs_restore *r, const struct ffs_child *c);
/* All have started: record it where it says more than what was there. Main thread; waits for the end of the first child's
 * start, a tenth of a second, if none was known; frees r->set. */
void ffs_restore_set_end(struct ffs_restore *r);

/* ---- restore-fork.c ---- */

/* The pages in which the fork r->target.fork differs from its branch, into r->page: it never changes from then on. Main
 * thread, when r->status is there. Waits for those pages while the branch is being captured. -ESTALE: another branch has
 * got its name meanwhile. */
int ffs_restore_fork_read(struct ffs_restore *r, struct ffs_error *err);
/* Write them into a child that has loaded the branch (r->memory_fd) and does not run, and read them back. The thread of
 * the child. -ENOENT, -ENOTUNIQ, -EPERM: it has not mapped the branch's image once, privately, for writing. */
int ffs_restore_fork_write(const struct ffs_restore *r, const struct ffs_child *c, struct ffs_error *err);

/* ---- restore-ack.c: what is handed over between a child and its starter ---- */

/* Which mailboxes of the fork are to be acknowledged, by its status, into r->ack. Main thread. */
int ffs_restore_ack_read(struct ffs_restore *r, struct json_object *status, struct ffs_error *err);
/* A page of the fork goes to this address of the child: where its payload is to be acknowledged, it names our port. */
int ffs_restore_ack_page(const struct ffs_restore *r, const struct ffs_child *c, uint64_t offset, uint64_t at,
	void *page, struct ffs_error *err);
/* The hooks of a child, in their order; nothing where nothing is to be acknowledged. before: there is no process yet.
 * loaded: it is where the branch was taken, and does not run; its pages are not written yet. resuming: it will run, time begins. after_resume: it runs; -ETIMEDOUT: it has not acknowledged, -ECONNRESET: it has
 * ended. close: in any case, once. */
int ffs_restore_hooks_before(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
int ffs_restore_hooks_loaded(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
void ffs_restore_hooks_resuming(struct ffs_child *c);
int ffs_restore_hooks_after_resume(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
void ffs_restore_hooks_close(struct ffs_restore *r, struct ffs_child *c);
/* For the child's line, while c->ack is there: the mailboxes, and what was ignored. */
struct json_object *ffs_restore_ack_json(const struct ffs_child *c);
struct json_object *ffs_restore_ack_ignored_json(const struct ffs_child *c);

/* ---- restore-agent.c ---- */

/* Where the agent of a child will be, by the words of its command line, into c->agent and the child's sockets. -ENOENT with
 * a sentence: the VM has none. Before it is started. */
int ffs_restore_agent_find(struct ffs_child *c, const struct ffs_argv *argv, struct ffs_error *err);
/* Wait until the agent in a child that runs is healthy, each edge of the handshake within its own time and the end of the
 * VM at once; sets c->healthy_ns and writes timing.json into its directory. -errno with a sentence that names the edge. The
 * thread of the child; nothing else is waited for, and nothing of other children. */
int ffs_restore_agent_await(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);

/* ---- restore-child.c: one VM ---- */

/* Descriptors that a child inherits, by their number there. */
enum { FFS_CHILD_MEMORY = 3, FFS_CHILD_VMSTATE = 4, FFS_CHILD_CONTROL = 5, FFS_CHILD_FIRST_DISK = 6 };
#define FFS_CHILD_FDS 24 /* from 3 on */
#define FFS_CHILD_VSOCK "vsock"

struct ffs_child {
	unsigned number;   /* from 1 */
	char name[65];     /* of the sandbox it becomes; "": none */
	char dir[100];     /* its own, 0700: sockets, console, what it says on stderr */
	char jail[100];    /* the root directory of its jail, where its sockets are then; "": it is in none */
	char cgroup[160];  /* that its jailer makes, below the root of a hierarchy; "": none */
	unsigned uid, gid; /* in the jail */
	int inherit[FFS_CHILD_FDS]; /* [i] becomes descriptor 3 + i; -1: none. Owned */
	int *watch;                 /* an inotify of the worker's, made when needed: closing one takes long */
	int control;                /* our end of what the kind talks over; -1: none */
	void *talk;                 /* of the kind, from load to let_go */
	struct ffs_restore_ack *ack; /* of the hooks; NULL: nothing is to be acknowledged */
	bool vsock; /* FFS_CHILD_VSOCK beside its other sockets is the host's end of its vsock, as Firecracker has it; from load on */
	char *agent; /* the socket of its guest's agent; NULL: not looked for */
	pid_t pid;
	int pidfd;
	uint64_t began_ns, started_ns, loaded_ns, running_ns, acknowledged_ns,
		healthy_ns;          /* since the command began */
	struct json_object *sockets; /* {"qmp":PATH} and the like, for the user */
	char attach_socket[160];     /* what `attach` is given */
	bool ready;                  /* under the command's lock: no signal ends it any more */
};

void ffs_child_init(struct ffs_child *c, unsigned number);
/* A directory of its own below `base`. */
int ffs_child_make_dir(struct ffs_child *c, const char *base, const char *label, struct ffs_error *err);
/* Give it a descriptor under that number; `fd` is duplicated. */
int ffs_child_give(struct ffs_child *c, int number, int fd, struct ffs_error *err);
/* Start it: in a session of its own, in its directory, with nothing of ours open but what it inherits; stdout and
 * stderr are files there. */
int ffs_child_spawn(
	struct ffs_child *c, const struct ffs_argv *argv, const struct ffs_argv *env, struct ffs_error *err);
/* SIGKILL, also from another thread while the caller's lock keeps c->pidfd. */
void ffs_child_kill(const struct ffs_child *c);
/* True when the process has ended. */
bool ffs_child_ended(const struct ffs_child *c);
/* Wait until it has ended or something is to be read from fd (-1: nothing is), at most ms (-1: for ever). */
void ffs_child_poll(const struct ffs_child *c, int fd, int ms);
/* A failure while it was starting: *err with what it said last on stderr, and how it ended. `code` is negative;
 * returned. */
int ffs_child_explain(struct ffs_child *c, int code, struct ffs_error *err);
/* End it, reap it, remove its directory. */
void ffs_child_destroy(struct ffs_child *c);
/* Forget it: it lives on. */
void ffs_child_release(struct ffs_child *c);
/* Add a socket below its directory (its jail) to what the user is told; path gets it. */
void ffs_child_socket(struct ffs_child *c, const char *what, const char *name, char path[160]);
/* A file of that directory as the VM itself names it. */
void ffs_child_name(const struct ffs_child *c, const char *name, char path[160]);
/* A directory with all that is in it: 0, or errno is set. */
int ffs_remove_tree(const char *dir);
/* restore-jail-life.c: end who runs in its jail, and remove that; nothing for a child that is in none. */
void ffs_jail_remove(struct ffs_child *c);
/* Run a program for what it prints on stdout (at most 256 KiB), which the caller frees. -EIO when it cannot be run. */
int ffs_ask_program(const char *const argv[], char **out, struct ffs_error *err);

/* ---- restore-start.c ---- */

/* Under `lock`: once `closed`, no process is started any more. */
struct ffs_restore_gate {
	pthread_mutex_t *lock;
	const bool *closed;
};
/* Start a child that has its directory, and load the branch. Its thread. A failure is explained; the caller destroys it. */
int ffs_restore_load(struct ffs_restore *r, struct ffs_child *c, const struct ffs_restore_gate *gate,
	struct ffs_error *err);
/* Go on from there until it runs (r->paused: not); ffs_restore_hooks_before() has been called. */
int ffs_restore_run(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
/* Wait for what its guest has to say. */
int ffs_restore_await(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
/* What is printed of it. */
struct json_object *ffs_restore_line(struct ffs_restore *r, const struct ffs_child *c);
const struct ffs_argv *ffs_restore_environment(const struct ffs_restore *r);

/* ---- kinds ---- */

struct ffs_restore_ops {
	const char *kind; /* as the manifest's vmm.kind, and key of an attach request */
	/* Once, before anything is started: all that can be refused is refused here. */
	int (*plan)(struct ffs_restore *r, struct ffs_error *err);
	/* Once, by the main thread, when children will be started: what they share. `dir` is where their directories
	 * are made. NULL: nothing. */
	int (*begin)(struct ffs_restore *r, const char *dir, struct ffs_error *err);
	/* The command line of one child, which has its directory and its descriptors. Any thread from here on. */
	int (*command)(
		struct ffs_restore *r, struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err);
	/* Further variables of its environment. NULL: those of the host's configuration. */
	const struct ffs_argv *(*environment)(const struct ffs_restore *r);
	/* From started to stopped at the branch's instant; then to running. They wait for the VM's answers and for its
	 * end, never for a time. */
	int (*load)(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
	int (*run)(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err);
	/* Nothing of it goes on after this; c->control is closed. Also after a failure. */
	void (*let_go)(struct ffs_restore *r, struct ffs_child *c);
	/* The children have started, or have not; free r->plan. NULL: nothing. */
	void (*end)(struct ffs_restore *r);
};

extern const struct ffs_restore_ops ffs_restore_qemu, ffs_restore_coop, ffs_restore_firecracker;
extern const struct ffs_restore_ops *const ffs_restore_kinds[]; /* ends with NULL */

/* A file of the branch, read-only; the caller's. -errno with the tree's own sentence. */
int ffs_restore_open(const struct ffs_restore *r, const char *file, struct ffs_error *err);
/* A sentence for r->notes. Before the children are started only. */
void ffs_restore_note(struct ffs_restore *r, const char *fmt, ...) FFS_PRINTF(2, 3);
