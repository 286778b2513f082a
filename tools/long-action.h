/* A long action of the engine, run by a command: a bar on a terminal, an end by Ctrl-C. */
#pragma once

#include <pthread.h>

#include "store/store.h"

struct ffs_long_action {
	struct ffs_store_progress progress;
	const char *label;
	void (*look)(void *arg, struct ffs_store_progress *p);
	void *arg;
	bool drawn, started;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t ended;
	bool over; /* lock */
};

/* Watch from now on; the label is borrowed. `look` (NULL: none): where the progress is another process's it
 * is asked for before each drawing, in a thread of its own. */
void ffs_long_action_begin(struct ffs_long_action *a, const char *label,
	void (*look)(void *arg, struct ffs_store_progress *p), void *arg);
void ffs_long_action_end(struct ffs_long_action *a);
