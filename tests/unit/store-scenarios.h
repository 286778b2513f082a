/* What can be done to a store, and what is to be left of it whatever happens meanwhile: for the tests of
 * crashes and of errors. */
#pragma once

#include "store-kit.h"

#define SIZE (640 * KIB + 100)

struct scenario {
	const char *name;
	int (*run)(struct ffs_store *st);
	unsigned before, after; /* branches, beside b0, which is always there */
	int dense;              /* of all, those that are dense afterwards; -1: whatever */
};
extern const struct scenario scenarios[];
extern const unsigned n_scenarios;

struct seen {
	struct ffs_store *st;
	unsigned branches, failed, dense;
	bool b0;
};
/* Open the store as a daemon would; every branch in it is whole. */
struct seen recover_and_look(const char *path);

/* Three memories, of which 1 is 2 but for a page. */
extern unsigned char *memories[3];
/* Write a branch with one of them. */
int put(struct ffs_store *st, const char *name, unsigned which, enum ffs_store_kind kind, const char *share);
/* The store before: b0 dense, b1 packed. */
void set_up(struct kit *k);
/* For cmocka's group. */
int make_memories(void **state);
