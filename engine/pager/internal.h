/* Private to engine/pager: what its files share.
 *   pager.c     the socket, who connects, the list of VMMs, the working set's file
 *   child.c     one VMM: its thread, faults, events, what is put there without being asked for
 *   pages.c     putting pages into a VMM's memory
 *   guard.c     the process that accepts VMMs, and ends them when this one has died */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "base/util.h"
#include "pager/guard.h"
#include "pager/pager.h"
#include "store/working-set.h"
#include "vmm/vmm.h"

#define FFS_PAGER_CLUSTER FFS_WORKING_SET_UNIT /* a fault brings its whole cluster */

struct ffs_child {
	struct ffs_pager *pager;
	struct ffs_child *next;
	pthread_t thread;
	uint64_t id;
	pid_t pid;
	int peer, pidfd, uffd;
	int memory; /* memory.bin; another handle once the branch is complete */
	int wait;   /* becomes readable when the branch is complete; -1 */
	bool over;
	struct ffs_geometry geo;
	/* a bit for each 4096 bytes of memory.bin. `done`: was put there; `gone`: the VMM has discarded it,
	 * it reads as zeros */
	uint64_t *done, *gone;
	_Atomic uint64_t *touched; /* a bit for each cluster that a fault asked for */
	char *buf;                 /* FFS_PAGER_CLUSTER, or a huge page */
	size_t buf_size;
	struct ffs_working_set set; /* what to put there first */
	unsigned set_at;            /* span */
	uint64_t next_off;          /* in memory.bin: within the span, or of all */
	bool fill;                  /* put all of it there */
	uint64_t served, prefetched, faults;
};

struct ffs_pager {
	struct ffs_pager_options opt;
	struct ffs_guard guard;
	int listening;
	int stop, ready, last,
		changed; /* eventfds: see ffs_pager_stop() and _ready(); a thread has come to its end */
	bool bound, no_more;
	pthread_mutex_t lock; /* all below, but for n_alive and saved, which are of the thread that accepts */
	struct ffs_child *children;
	unsigned n_alive, n_over;
	struct ffs_working_set set; /* as it was read */
	uint64_t memory_size;       /* of `recorded`; 0: no VMM came yet */
	uint64_t *recorded;         /* clusters that VMMs which have ended had touched */
	bool saved;
};

/* ---- child.c ---- */
/* The thread's body: from the message to the end of the VMM. */
void *ffs_child_main(void *child);
/* Its message was taken: from now on `touched` may be read, which becomes the child's, and it has what is to
 * be put there first. */
int ffs_pager_serves(struct ffs_child *c, _Atomic uint64_t *touched, struct ffs_error *err);
/* What has become of it. Any thread. */
void ffs_pager_report(struct ffs_child *c, enum ffs_pager_event_kind kind, const char *why);
/* Its thread's last act: what it touched may go into the working set. */
void ffs_pager_over(struct ffs_child *c, bool was_served);

/* ---- pages.c ---- */
/* Pages of memory.bin from `off` on, as far as they are in one region, at most `len` bytes: those that are
 * not there yet. 0; -EAGAIN: an event has to be read first; -ESRCH: the VMM is gone; else the reason to end
 * it. */
int ffs_child_put(struct ffs_child *c, uint64_t off, uint64_t len, struct ffs_error *err);
/* One page that the VMM waits for, with what lies around it. */
int ffs_child_fault(struct ffs_child *c, uint64_t hva, struct ffs_error *err);
/* The VMM has discarded these addresses. */
void ffs_child_discard(struct ffs_child *c, uint64_t start, uint64_t end);
/* True while the VMM is changing its mappings: an event will come. */
bool ffs_child_is_changing(struct ffs_child *c);
