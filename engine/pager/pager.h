/* Serves the memory of a branch to VMMs that are restored with Firecracker's Uffd backend
 * (docs/vmm.md, "The pager").
 *
 * A VMM connects to a socket, sends where its memory lies and a userfaultfd of it; from then on every page
 * that it touches for the first time is put there by a thread of this process. Whatever goes wrong, no page
 * of a branch ever reads as zeros that were not there: the VMM is ended instead, also when this process dies
 * (guard.h). */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

struct ffs_pager;

enum ffs_pager_event_kind {
	FFS_PAGER_SERVES,   /* a VMM's message was taken */
	FFS_PAGER_RELEASED, /* it has all its pages and needs the pager no more */
	FFS_PAGER_EXITED,   /* it has ended by itself */
	FFS_PAGER_KILLED,   /* we have ended it: `why` */
	FFS_PAGER_REFUSED,  /* what connected was no such VMM, or not allowed: `why` */
};
const char *ffs_pager_event_name(enum ffs_pager_event_kind kind);

struct ffs_pager_event {
	enum ffs_pager_event_kind kind;
	pid_t pid; /* of the VMM */
	const char *why;
	uint64_t memory_bytes, served_bytes, prefetched_bytes, faults;
};

struct ffs_pager_options {
	const char *socket; /* where to listen; nothing may be there */
	const char *memory; /* memory.bin of a branch, or another image with dense offsets */
	uid_t uid;          /* who may connect besides root and this process's user; the socket's owner */
	gid_t gid;
	const char *working_set; /* file that says what to put there first, and is written; NULL: none */
	bool no_prefetch;        /* do not read it; it is written anew */
	bool all;                /* put all pages there, then let go */
	uint64_t limit;          /* bytes that are recorded, or prefetched, at most */
	unsigned children;       /* end when so many VMMs came and went; 0: only when stopped */
	void (*report)(void *arg, const struct ffs_pager_event *event); /* one at a time; must not block */
	void *report_arg;
};

/* Listen. Forks the guard: call it before any thread exists. The strings of `opt` stay the caller's and must
 * live as long as the pager. */
int ffs_pager_new(const struct ffs_pager_options *opt, struct ffs_pager **out, struct ffs_error *err);
/* Serve until stopped, or until opt->children have gone. Then every VMM that is left has all its pages. */
int ffs_pager_run(struct ffs_pager *p, struct ffs_error *err);
/* Both may be called from signal handlers. stop: give every VMM all its pages, let go and return from run.
 * ready: the VMMs have started; what they touched so far is the working set. */
void ffs_pager_stop(struct ffs_pager *p);
void ffs_pager_ready(struct ffs_pager *p);
/* The same: no more VMMs will come, run returns when the last that is there has gone. */
void ffs_pager_last(struct ffs_pager *p);
void ffs_pager_free(struct ffs_pager *p);
