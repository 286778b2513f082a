/* The store's operations recorded, failed on purpose, and replayed as a crash would leave them. */
#pragma once

#include "store-kit.h"

#define MAX_OPS 600
#define VARIANTS 16

enum what { MKDIR, CREATE, WRITE, ALLOCATE, FSYNC, RENAME, LINK, UNLINK, RMDIR };

struct op {
	enum what what;
	char path[300], to[300]; /* relative to the scratch directory */
	unsigned char *data;
	size_t len;
	uint64_t off; /* of a rename: how */
};
extern struct op ops[MAX_OPS];
extern unsigned n_ops;

/* Put this table into ffs_store_ops to record what is done below k->dir (record_begin() says which); syncs
 * are only recorded. */
extern const struct ffs_store_ops recorder;
void record_begin(const struct kit *k);
void forget(void);

/* The next operation but `at` fails with this errno, half done where it is a write; reads are counted apart.
 * at -1: none. */
void fail_at(int at, int code);
void fail_read_at(int at, int code);
/* Did it come to that? */
bool has_failed(void);

/* Make a copy of all that is there, to which operations are replayed: its name. */
void save_before(const struct kit *k);
void drop_before(void);
/* The state after n operations and a crash, in a directory of its own (replay_dir). variant 0: all of them
 * have got to the disk; 1: only what a sync made durable; else: some of the others, by chance. False: it is
 * the same as another variant. Then drop_replay(). */
extern char replay_dir[64];
bool replay(unsigned n, unsigned variant);
void drop_replay(void);
