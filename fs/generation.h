/* The pair rule of branch/ as pure logic: no FUSE, no engine, no clock of its own.
 *
 * A *generation* is one live branch that several opens share. It belongs to a key: a caller's session, or the
 * KEY of branch@KEY/. An open joins a generation of its key when the same thread group already opened a file
 * of it, or when it is the key's newest, this file has not been opened in it yet, and it is alive: within a
 * lease of its last open, read or close. Otherwise a new one begins. A key that read one of memory.bin and
 * vmstate and lost the generation before it read the other is told so, once; so is one that staged a payload and
 * lost the generation before it read memory.bin. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum ffs_gen_file {
	FFS_GEN_MEMORY = 1,
	FFS_GEN_VMSTATE = 2,
	FFS_GEN_MANIFEST = 4,
	FFS_GEN_MAILBOX = 8, /* a payload for the memory that will be read: joins until that was opened */
};

/* A thread group; tgid 0 (a caller of a foreign pid namespace) is never "the same" as another. */
struct ffs_gen_who {
	pid_t tgid;
	uint64_t start; /* clock ticks since boot: tells a recycled pid apart */
};

enum ffs_gen_verdict {
	FFS_GEN_JOIN,    /* *out is the generation to read */
	FFS_GEN_BEGIN,   /* *out is a new one: take a branch for it, or ffs_gen_abort() */
	FFS_GEN_TORN,    /* the pair can't be completed; said once */
	FFS_GEN_LIMITED, /* too many new generations a second */
};

struct ffs_gen_table;

/* Fields are read-only outside generation.c, except `data`. */
struct ffs_gen {
	uint64_t serial;
	void *data;       /* the caller's: what the generation reads from */
	unsigned opened;  /* FFS_GEN_* bits; of a mailbox: a payload is staged */
	unsigned handles; /* open now */
	uint64_t last_use_ns;
	bool retired; /* only its own thread groups may join */
	bool failed;
	struct ffs_gen_key *key;
	struct ffs_gen *older;
	struct ffs_gen_who *openers;
	unsigned n_openers;
	unsigned missing_before; /* the key's debt before this one began, for ffs_gen_abort() */
};

struct ffs_gen_rules {
	uint64_t lease_ns;
	unsigned rate; /* new generations a second, also the burst; 0: no limit */
};

/* NULL: no memory. Not thread safe: the caller's lock covers every call. Times are ffs_now_ns(). */
struct ffs_gen_table *ffs_gen_table_new(struct ffs_gen_rules rules);
/* Every generation must have been ended (ffs_gen_end_all). */
void ffs_gen_table_free(struct ffs_gen_table *t);

/* What an open would join: the generation, or NULL where a new one would begin or the open would fail.
 * Changes nothing. */
struct ffs_gen *ffs_gen_peek(struct ffs_gen_table *t, const char *key, enum ffs_gen_file file,
	struct ffs_gen_who who, uint64_t now_ns);
/* Decide, and record the open (JOIN and BEGIN count a handle). -ENOMEM or a verdict. */
int ffs_gen_open(struct ffs_gen_table *t, const char *key, enum ffs_gen_file file, struct ffs_gen_who who,
	uint64_t now_ns, struct ffs_gen **out);
/* Open a file of that very generation, whatever the rule says: for a caller that holds a handle on it
 * (O_PATH). */
int ffs_gen_open_this(struct ffs_gen *g, enum ffs_gen_file file, struct ffs_gen_who who, uint64_t now_ns);
/* A payload is staged in it, or the last one was taken back. */
void ffs_gen_staged(struct ffs_gen *g, bool staged);
void ffs_gen_touch(struct ffs_gen *g, uint64_t now_ns);
void ffs_gen_close(struct ffs_gen *g, uint64_t now_ns);
/* Its branch could not be taken: as if it had never begun. Frees g (the caller owns `data` again). */
void ffs_gen_abort(struct ffs_gen_table *t, struct ffs_gen *g);
/* Its branch failed later: nobody joins it any more. */
void ffs_gen_fail(struct ffs_gen *g);

/* End what nobody can join: no open handle, and either past its lease, or not its key's newest and every
 * thread group that opened it is gone. `alive` says whether a thread group still exists, `ended` takes over
 * data. Returns when to call again (ffs_now_ns), 0: not before the next open or close. */
uint64_t ffs_gen_sweep(struct ffs_gen_table *t, uint64_t now_ns, bool (*alive)(struct ffs_gen_who who),
	void (*ended)(void *data, void *arg), void *arg);
/* End them all, open or not (the VM was let go); keys remember what they are owed. */
void ffs_gen_end_all(struct ffs_gen_table *t, void (*ended)(void *data, void *arg), void *arg);

/* The other of the pair, or 0. */
unsigned ffs_gen_other(unsigned file);
/* Is any key owed the other half of a pair? Then the table must outlive the VM. */
bool ffs_gen_owes(const struct ffs_gen_table *t);
/* 0 for NULL. */
unsigned ffs_gen_count(const struct ffs_gen_table *t);
