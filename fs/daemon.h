/* The inside of the daemon: its state, the objects behind the tree, and the rules for locks.
 *
 * One lock, the *tree lock* (fs->lock), guards everything here that is not atomic or fixed. It is held for
 * short, never across I/O, a reply, a notification to the kernel or an engine call that may wait. Below it:
 * the reaper's, the pool's and the engine's own locks. libfuse's request lock is above it (an interrupt
 * handler runs under that): so no libfuse function that takes it (fuse_req_interrupt_func) is called with the
 * tree lock held. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include <fuse_lowlevel.h>

#include "caller.h"
#include "forkfs-engine.h"
#include "fs.h"
#include "generation.h"
#include "list.h"
#include "mailbox/ack.h"
#include "mailbox/mailbox.h"
#include "passthrough.h"
#include "store/store.h"
#include "work.h"

struct ffs_events;
struct ffs_node;
struct ffs_handle;
struct ffs_sentences;
struct ffs_durable;
struct ffs_conversion;
struct ffs_store;
struct ffs_stored;
struct ffs_keyed;
struct ffs_attached;
struct ffs_fork;
struct ffs_acks;

/* A request that threads claim from each other before they act for it or answer it (park.h). */
struct ffs_parked;

/* A branch with those who wait for it: an image of the engine, or one of the store. A named branch that goes
 * to the store changes from a shot of the one sort to one of the other when it is ready. Shared by a
 * generation or a name, and by the open handles on it: an image's memory is free when the last of them is
 * gone. */
struct ffs_shot {
	atomic_uint refs;
	struct ffs_fs *fs;
	struct ffs_branch *branch; /* NULL: of the store, or failed before this daemon began */
	struct ffs_stored *stored; /* NULL: in memory; fixed */
	struct ffs_layer *kin;     /* the pages that branches to come share with it; NULL: none. Tree lock */
	struct ffs_durable
		*durable; /* on its way to the store, or never meant for it (NULL); fixed once published */
	struct ffs_branch_watch watch;
	struct ffs_work settle_work, free_work;
	uint64_t memory_size, vmstate_size, time_ns; /* fixed */
	struct ffs_sbx *sbx;                         /* referenced */
	/* tree lock: */
	enum ffs_branch_state state; /* as clients see it: changes before any waiter is answered */
	struct ffs_error failure;    /* while FAILED */
	bool dense;                  /* READY with an image of its own: served by passthrough */
	char *manifest;              /* once READY; NULL if it could not be made */
	size_t manifest_len;
	struct ffs_list waiters; /* struct ffs_waiter: until it is no longer WRITING */
	unsigned opens;          /* open files of it */
	struct ffs_named *named; /* its name, while it has one; not referenced */
	struct ffs_live *live;   /* its generation, while that lives; not referenced */
	bool frames_known;       /* its memory was searched for mailboxes */
	struct ffs_mailbox_frames frames;
};

/* Called once with the tree lock NOT held: on the reaper's thread when the shot is no longer WRITING, or on a
 * pool thread, still WRITING, when nobody but those who wait for it was left and it is being freed. */
struct ffs_waiter {
	struct ffs_list link;
	void (*settled)(struct ffs_waiter *w, struct ffs_shot *shot);
};

/* What a generation reads from: the payload (data) of a struct ffs_gen. Tree lock. */
struct ffs_live {
	unsigned refs; /* of the generation, nodes and handles */
	uint64_t serial;
	struct ffs_sbx *sbx;   /* referenced */
	struct ffs_gen *gen;   /* NULL: ended */
	struct ffs_shot *shot; /* referenced; NULL: being taken, or ended */
	struct ffs_fork *fork; /* the payloads that lie over its memory; referenced */
	bool taking;
	unsigned stagers; /* writes of payloads that wait for the branch to be taken, beside the openers */
	struct ffs_error why; /* it was not taken */
	char *key;
	struct ffs_list openers;        /* struct ffs_parked: wait for the branch to be taken */
	struct ffs_cancel *cancel;      /* of the take */
	uint64_t vmstate_size, time_ns; /* remembered for nodes that outlive the image */
};

/* A disk in branches/NAME/disks; outlives the shot, as the size of an open file does. */
struct ffs_named_disk {
	char id[80];
	uint64_t size;
};

/* branches/NAME. Tree lock. */
struct ffs_named {
	unsigned refs;
	uint64_t serial;
	char name[80];
	char next_name[80]; /* while it is renamed in the store */
	enum ffs_store_kind kind;
	struct ffs_durable *durable; /* while it is taken: the taker's */
	struct ffs_sbx *sbx;         /* referenced */
	struct ffs_shot *shot; /* referenced; NULL: being taken (then the name is only reserved) or removed */
	bool removed;
	uint64_t vmstate_size, memory_size, time_ns;
	struct ffs_named_disk *disks; /* fixed with the shot */
	unsigned n_disks;
	struct ffs_conversion *conversion; /* while it is given another form (convert.c) */
	char *key;                         /* a cached branch: what it was taken for; NULL: its user's */
	uint64_t last_use_ns;
	struct ffs_list link;  /* in sbx->branches */
	struct ffs_list waits; /* struct ffs_parked: reads of `wait` */
	struct ffs_list forks; /* struct ffs_fork: referenced */
};

/* One directory of the mount's root. It outlives its VM as long as it has branches. Tree lock. */
struct ffs_sbx {
	unsigned refs;
	uint64_t serial;
	char name[80]; /* fixed */
	struct ffs_fs *fs;
	struct ffs_sandbox *engine; /* referenced; NULL: detached */
	bool attaching;             /* the name is reserved */
	bool detaching;
	bool removed; /* no longer in the root directory */
	bool exited;
	int pidfd; /* of the VMM, polled by the reaper; -1 */
	pid_t pid; /* of the VMM; 0: none */
	uint64_t memory_size, attached_ns /* wall clock */, changed_ns;
	uint64_t write_turn, imagined_turn; /* writers.c: when a branch of it was last written */
	char origin[37];                    /* id of the branch that its VM is a child of; "": not known */
	uint64_t adopted_ns;                /* instant of the youngest branch found in the store */
	uid_t uid;
	gid_t gid;
	bool writable;     /* by its owner */
	char *last_status; /* JSON, of before the detach */
	struct ffs_gen_table *gens;
	struct ffs_list tokens;           /* of its mailboxes, by session: box.c */
	struct ffs_mailbox_frames frames; /* where they were when its memory was searched last */
	struct ffs_list branches;         /* struct ffs_named */
	unsigned n_branches;
	struct ffs_list link; /* in fs->sandboxes */
};

/* OPEN is tried twice by the kernel when the answer is ESTALE: what the second try must be told. */
enum ffs_retry { FFS_RETRY_NONE, FFS_RETRY_WRITER, FFS_RETRY_NODE, FFS_RETRY_TORN };
#define FFS_RETRIES 256

struct ffs_counters {
	atomic_ullong requests, reads, read_bytes, generations, named, attaches, refused, errors, interrupted,
		limited, cache_hits, cache_misses, cache_pruned, reattached, reattaching, lost;
	atomic_ullong acks[FFS_ACK_VERDICTS]; /* of children of forks, by what they were taken for */
};

struct ffs_fs {
	struct ffs_mount_options opt; /* fixed */
	struct ffs_engine *engine;    /* fixed */
	struct fuse_session *se;      /* fixed */
	struct ffs_passthrough pass;
	struct ffs_store *store;       /* NULL: none; fixed */
	struct ffs_attached *attached; /* records of what is attached; NULL: none are kept; fixed */
	struct ffs_cancel *give_up;    /* attaching again; fixed */
	atomic_bool store_pass;        /* the kernel serves files of the store; false once it refused */
	struct ffs_pool *pool;         /* fixed */
	struct ffs_pool *writers;      /* into the store; fixed */
	struct ffs_reaper *reaper;     /* fixed */
	uid_t uid;                     /* of the mounting user, fixed */
	gid_t gid;
	uint64_t mounted_ns; /* wall clock, fixed */
	int mount_id;        /* of our mount in our namespace, as fdinfo names it; 0: not known */
	dev_t mount_dev;
	struct ffs_counters count;

	pthread_mutex_t names; /* above the tree lock: names of the store's branches (durable.c) */
	pthread_mutex_t lock;
	pthread_cond_t live_taken; /* a branch of branch/ was taken, or not */
	struct ffs_list writes;    /* struct ffs_write: from before the pause until it is published */
	uint64_t writes_arrived, write_turns;
	unsigned n_reaps; /* jobs that delete files of removed branches; durable_idle says when one is done */
	uint64_t reaped_ns; /* when the last one was */
	unsigned n_durable; /* branches on their way to the store */
	pthread_cond_t durable_idle;
	struct ffs_list sandboxes;
	struct ffs_list owed; /* pair tables of sandboxes that are gone, by name: tree.c */
	unsigned n_owed;
	uint64_t next_serial;
	struct ffs_nodes *nodes;
	struct ffs_handles *handles;
	struct ffs_events *events;
	struct ffs_acks *acks;
	struct ffs_keyed *keyed;
	struct ffs_sentences *sentences;
	struct {
		pid_t tid;
		uint64_t ino;
		enum ffs_retry why;
		uint64_t at_ns;
	} retries[FFS_RETRIES];
	unsigned next_retry;
	bool closing;
	uint64_t shutdown_at_ns; /* 0: not asked for */
};

/* A request being handled. */
struct ffs_call {
	struct ffs_fs *fs;
	fuse_req_t req;
	struct ffs_caller who;
};

/* ---- tree.c: objects. Tree lock held unless said otherwise ---- */

struct ffs_sbx *ffs_tree_find(struct ffs_fs *fs, const char *name);
/* A new sandbox directory that is not yet in the tree's root: ffs_tree_add. One reference, the caller's.
 * NULL: no memory. */
struct ffs_sbx *ffs_sbx_new(struct ffs_fs *fs, const char *name);
void ffs_tree_add(struct ffs_fs *fs, struct ffs_sbx *sbx);
/* Out of the root when it has neither VM nor branch. True: it was removed. */
bool ffs_tree_drop_empty(struct ffs_fs *fs, struct ffs_sbx *sbx);
struct ffs_sbx *ffs_sbx_ref(struct ffs_sbx *sbx);
void ffs_sbx_unref(struct ffs_sbx *sbx);
/* "running" | "paused" | "exited" | "detached" */
const char *ffs_sbx_state(struct ffs_sbx *sbx);

struct ffs_named *ffs_named_find(struct ffs_sbx *sbx, const char *name);
/* Reserve a name: in the list, without a shot. */
struct ffs_named *ffs_named_new(struct ffs_sbx *sbx, const char *name);
/* The number of the disk with that ID, or -1. */
int ffs_named_disk(const struct ffs_named *n, const char *id);
/* Once, before anybody else knows the name: room for its disks (-ENOMEM), then each of them. */
int ffs_named_room_for_disks(struct ffs_named *n, unsigned count);
void ffs_named_add_disk(struct ffs_named *n, const char *id, uint64_t size);
struct ffs_named *ffs_named_ref(struct ffs_named *n);
void ffs_named_unref(struct ffs_named *n);
/* Out of its list; drops the shot. */
void ffs_named_remove(struct ffs_named *n);

struct ffs_live *ffs_live_new(struct ffs_sbx *sbx, const char *key);
struct ffs_live *ffs_live_ref(struct ffs_live *l);
void ffs_live_unref(struct ffs_live *l);
/* For ffs_gen_sweep and ffs_gen_end_all: the generation is over. data: struct ffs_live. */
void ffs_live_ended(void *data, void *arg);

/* Takes over the reference on branch; without the tree lock. NULL: no memory (the branch is released). */
struct ffs_shot *ffs_shot_new(struct ffs_sbx *sbx, struct ffs_branch *branch);
/* One without an image: of the store, or of what failed. Tree lock held; NULL: no memory. */
struct ffs_shot *ffs_shot_plain(struct ffs_sbx *sbx);
/* The shot of a branch like this one that is served from the store, whose reference it takes over. Tree lock held;
 * NULL: no memory, and the reference is still the caller's. */
struct ffs_shot *ffs_shot_of_store(const struct ffs_shot *like, struct ffs_stored *stored);
/* Tree lock held: the name is served by `next`, which is taken over, from now on; who has `s` open stays with it. The
 * name's reference of `s` is dropped. */
void ffs_shot_succeed(struct ffs_shot *s, struct ffs_shot *next);
/* Tree lock held: its memory (or its vmstate) is one file that the kernel may serve. */
bool ffs_shot_is_file(const struct ffs_shot *s, bool memory);
/* The branch's id; "" of one that failed before it had one. */
const char *ffs_shot_id(const struct ffs_shot *s);
/* Begin to watch the branch: after the shot was published. Without the tree lock. */
void ffs_shot_watch(struct ffs_shot *s);
/* Any locks held; the last one frees in the pool. */
struct ffs_shot *ffs_shot_ref(struct ffs_shot *s);
void ffs_shot_unref(struct ffs_shot *s);
/* The last one frees here and now (true): without the tree lock, and only when it is not being captured. */
bool ffs_shot_unref_now(struct ffs_shot *s);
/* Bytes of memory that it takes, or of disk where it is stored. */
uint64_t ffs_shot_bytes(const struct ffs_shot *s);

/* ---- serve.c: answers ---- */

struct ffs_node_key;

struct ffs_sentences *ffs_sentences_new(void);
void ffs_sentences_free(struct ffs_sentences *s);
/* The last sentence for that caller about a directory: of its session, else of its user. 0 and a copy, or
 * -ENODATA. Takes the tree lock. */
int ffs_sentence_get(struct ffs_fs *fs, const struct ffs_caller *who, uint64_t dir_ino, char out[512]);
/* Answer with an error and leave the sentence where the caller finds it: user.forkfs.error of the directory
 * `dir_ino`, and the log. Without the tree lock. err->text may be empty: then nothing is left. `code` is a
 * positive errno; ENOSYS, which the kernel would remember for good, becomes EOPNOTSUPP. */
void ffs_reply_failure(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, uint64_t dir_ino,
	int code, const struct ffs_error *err);
/* The same without answering. */
void ffs_note_failure(
	struct ffs_fs *fs, const struct ffs_caller *who, uint64_t dir_ino, const struct ffs_error *err);
/* Answer LOOKUP or MKDIR with the node of a key, and count the lookup. Without the tree lock. */
void ffs_reply_node(struct ffs_call *call, fuse_req_t req, const struct ffs_node_key *key,
	struct ffs_sbx *sbx, struct ffs_named *named, struct ffs_live *live);
/* The same with a node that the caller found and references; the reference is taken over. */
void ffs_reply_entry(struct ffs_fs *fs, fuse_req_t req, struct ffs_node *node);

/* What the second try of an OPEN must be told (tree lock held). */
void ffs_retry_note(struct ffs_fs *fs, pid_t tid, uint64_t ino, enum ffs_retry why);
enum ffs_retry ffs_retry_peek(struct ffs_fs *fs, pid_t tid, uint64_t ino);
enum ffs_retry ffs_retry_take(struct ffs_fs *fs, pid_t tid, uint64_t ino);
