/* A long action of the engine, run by a command: a bar on a terminal, an end by Ctrl-C. */
#pragma once

#include <pthread.h>

#include "store/store.h"

struct ffs_long_action {
	struct ffs_store_progress progress;
	const char *label;
	atomic_bool over;
	bool drawn;
	bool started;
	pthread_t thread;
};

/* Watch from now on; the label is borrowed. */
void ffs_long_action_begin(struct ffs_long_action *a, const char *label);
void ffs_long_action_end(struct ffs_long_action *a);
