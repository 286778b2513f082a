/* .forkfs/events: one JSON line per event, and poll(2) of everything that can be waited for. */
#pragma once

#include "daemon.h"

struct ffs_events *ffs_events_new(struct ffs_fs *fs);
void ffs_events_free(struct ffs_events *e);
/* Tree lock held. what: attach, detach, branch, ready, failed, removed, exited. branch, id and error may be
 * NULL. Readers are answered by the reaper. */
void ffs_event(struct ffs_fs *fs, const char *what, const char *sandbox, const char *branch, const char *id,
	const char *error);
/* Tree lock held: the number the next event will get. */
uint64_t ffs_events_next(struct ffs_fs *fs);
/* A read of an events handle, and its poll state (tree lock held). */
void ffs_events_read(struct ffs_call *call, struct ffs_handle *h, size_t size, int flags);
bool ffs_events_pending(struct ffs_fs *fs, const struct ffs_handle *h);
/* Shutdown: answer every reader with end of file. Without the tree lock. */
void ffs_events_close(struct ffs_fs *fs);

/* Notify those who poll something that became ready. Without the tree lock, never from a FUSE handler. */
void ffs_polls_check(struct ffs_fs *fs);
