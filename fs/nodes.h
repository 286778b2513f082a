/* Nodes: what the kernel knows by a number. One per generation, branch, settled state and open mode, with the
 * st_ino of its name. A node is described by integers and strings alone (struct ffs_node_key), so that the
 * table can be handed on; no other part of fs/ knows about inode modes. All functions: tree lock held. */
#pragma once

#include "daemon.h"

enum ffs_kind {
	FFS_KIND_ROOT,
	FFS_KIND_META, /* .forkfs */
	FFS_KIND_VERSION,
	FFS_KIND_CAPABILITIES,
	FFS_KIND_METRICS,
	FFS_KIND_EVENTS,
	FFS_KIND_META_CTL,
	FFS_KIND_SBX,
	FFS_KIND_SBX_STATUS,
	FFS_KIND_SBX_STATE,
	FFS_KIND_SBX_CTL,
	FFS_KIND_LIVE, /* branch, branch@KEY */
	FFS_KIND_LIVE_MEMORY,
	FFS_KIND_LIVE_VMSTATE,
	FFS_KIND_LIVE_MANIFEST,
	FFS_KIND_BRANCHES,
	FFS_KIND_NAMED,
	FFS_KIND_NAMED_MEMORY,
	FFS_KIND_NAMED_VMSTATE,
	FFS_KIND_NAMED_MANIFEST,
	FFS_KIND_NAMED_STATUS,
	FFS_KIND_NAMED_STATE,
	FFS_KIND_NAMED_WAIT,
	FFS_KIND_DISKS, /* branches/NAME/disks */
	FFS_KIND_DISK,  /* a disk in it; key: its ID */
	FFS_KIND_FORKS, /* branches/NAME/forks */
	FFS_KIND_FORK,  /* forks/NAME; object: the fork's serial, here and in what follows */
	FFS_KIND_FORK_MEMORY,
	FFS_KIND_FORK_VMSTATE,
	FFS_KIND_FORK_MANIFEST,
	FFS_KIND_FORK_STATUS,
	FFS_KIND_FORK_ACK,    /* forks/NAME/ack, where something of it is to be acknowledged */
	FFS_KIND_FORK_RECORD, /* forks/NAME/record.json */
	FFS_KIND_FORK_BOXES,  /* forks/NAME/mailboxes */
	FFS_KIND_SBX_BOXES,   /* SANDBOX/mailboxes */
	FFS_KIND_SBX_BOX,     /* a mailbox in it; object: the sandbox's serial */
	FFS_KIND_FORK_BOX,    /* a mailbox in it; key: NAME or NAME:TOKEN */
	FFS_KIND_COUNT,
};

/* How the kernel serves the handles of a node: one mode for all its life. */
enum ffs_mode {
	FFS_MODE_CACHED, /* page cache, filled by us */
	FFS_MODE_DIRECT, /* direct_io: no shared mappings; for handles that could write */
	FFS_MODE_PASS,   /* passthrough to the sealed image */
};

struct ffs_node_key {
	enum ffs_kind kind;
	enum ffs_mode mode;
	uint64_t object; /* serial of the sandbox, branch or generation; of the sandbox for a node without
			    generation */
	uint64_t extra;  /* thread group that a node without generation is for; counter of a ctl node */
	const char *key; /* KEY of branch@KEY, ID of a disk; NULL */
	bool unbound;    /* of branch/: belongs to no generation yet */
};

struct ffs_node {
	uint64_t id;
	struct ffs_node_key key; /* key.key is the node's own copy */
	uint64_t ino;
	uint64_t lookups;        /* how many the kernel holds */
	unsigned refs;           /* of parked requests, tasks and handles */
	struct ffs_sbx *sbx;     /* referenced; NULL above the sandboxes */
	struct ffs_named *named; /* referenced, or NULL */
	struct ffs_live *live;   /* referenced, or NULL */
	struct ffs_fork *fork;   /* referenced, or NULL */
	uint32_t backing_id;     /* passthrough, while pass_opens > 0 */
	unsigned pass_opens;
	bool findable; /* in the table by its key */
	struct ffs_node *next_id, *next_key;
};

struct ffs_nodes *ffs_nodes_new(void);
/* All kernel references are void (the mount is gone). */
void ffs_nodes_free(struct ffs_nodes *t);
struct ffs_node *ffs_node_by_id(struct ffs_fs *fs, uint64_t id);
/* The node of a key, made when there is none. The objects are referenced by the node. It stays until the next
 * ffs_node_unref or ffs_node_forget leaves it without use: take a reference or count a lookup under the same
 * lock. NULL: no memory. */
struct ffs_node *ffs_node_get(struct ffs_fs *fs, const struct ffs_node_key *key, struct ffs_sbx *sbx,
	struct ffs_named *named, struct ffs_live *live);
/* The same for what belongs to a fork of a named branch. */
struct ffs_node *ffs_node_get_fork(struct ffs_fs *fs, const struct ffs_node_key *key, struct ffs_fork *fork);
/* A node of branch/ gets its generation; its old key is free again. */
void ffs_node_bind(struct ffs_fs *fs, struct ffs_node *n, struct ffs_live *live);
struct ffs_node *ffs_node_ref(struct ffs_node *n);
void ffs_node_unref(struct ffs_fs *fs, struct ffs_node *n);
void ffs_node_forget(struct ffs_fs *fs, struct ffs_node *n, uint64_t lookups);
unsigned ffs_nodes_count(struct ffs_fs *fs);

/* st_ino of a kind of file of an object (a sandbox's or branch's serial; 0 above them). */
uint64_t ffs_ino(enum ffs_kind kind, uint64_t serial, const char *key);
/* st_ino of the directory a node's error sentences belong to: its own or its parent's. */
uint64_t ffs_node_dir_ino(const struct ffs_node *n);
bool ffs_kind_is_dir(enum ffs_kind kind);
/* memory.bin, vmstate or manifest.json of branch/ or of a named branch, and its disks. */
bool ffs_kind_is_live_file(enum ffs_kind kind);
bool ffs_kind_is_data(enum ffs_kind kind);
bool ffs_kind_is_box(enum ffs_kind kind);   /* a mailbox, which is written and read back */
bool ffs_kind_is_boxes(enum ffs_kind kind); /* a directory of mailboxes */
bool ffs_kind_is_manifest(enum ffs_kind kind);
bool ffs_kind_is_ctl(enum ffs_kind kind);
mode_t ffs_kind_type(enum ffs_kind kind);      /* S_IFDIR or S_IFREG */
const char *ffs_kind_name(enum ffs_kind kind); /* the file's name; "" where it is a variable one */

/* Attributes as stat(2) shows them, and how long the kernel may keep name and attributes (seconds). */
void ffs_node_attr(struct ffs_fs *fs, struct ffs_node *n, struct stat *st);
double ffs_node_attr_ttl(struct ffs_fs *fs, const struct ffs_node *n);
double ffs_node_entry_ttl(struct ffs_fs *fs, const struct ffs_node *n);

/* ---- what the kernel must forget when a sandbox was attached, detached or removed ---- */

struct ffs_inval {
	uint64_t dir; /* the sandbox's directory */
	char name[80];
	uint64_t *ids; /* its nodes: their attributes have changed */
	unsigned n, room;
};
/* Tree lock held. */
void ffs_inval_collect(struct ffs_fs *fs, struct ffs_sbx *sbx, struct ffs_inval *out);
/* Without the tree lock and never from a FUSE worker: it takes locks of the root directory and of the
 * sandbox's that a request may hold which waits for us. Frees what was collected. */
void ffs_inval_send(struct ffs_fs *fs, struct ffs_inval *inval);

/* Tree lock held: the number of the node of a sandbox's branches/; 0: the kernel does not know it. */
uint64_t ffs_branches_node(struct ffs_fs *fs, struct ffs_sbx *sbx);
/* As ffs_inval_send(), for one name in that directory. */
void ffs_inval_name(struct ffs_fs *fs, uint64_t dir, const char *name);

/* ---- open files ---- */

struct ffs_txn;

/* fi->fh is its number. */
struct ffs_handle {
	uint64_t id;
	unsigned refs; /* one of the kernel, those of parked requests */
	bool released;
	struct ffs_node *node;       /* referenced */
	int flags;                   /* of open(2) */
	struct ffs_caller who;       /* who opened it */
	struct ffs_shot *shot;       /* referenced: data files */
	struct ffs_live *live;       /* referenced: files of branch/ count as open in its generation */
	bool counted;                /* in the generation */
	struct ffs_txn *txn;         /* ctl */
	struct ffs_box *box;         /* a mailbox */
	struct ffs_overlay *overlay; /* referenced: over the memory that is read; NULL: none */
	char *text;                  /* a generated file's content, made anew for each read from the start */
	size_t text_len;
	uint64_t event_seq;         /* events: the next to read */
	struct ffs_dirent *entries; /* directory listing */
	unsigned n_entries;
	struct fuse_pollhandle *ph; /* somebody polls: to be notified once */
	struct ffs_handle *next_id;
};

struct ffs_dirent {
	char *name;
	uint64_t ino;
	mode_t type;
};

struct ffs_handles *ffs_handles_new(void);
void ffs_handles_free(struct ffs_fs *fs);
struct ffs_handle *ffs_handle_new(
	struct ffs_fs *fs, struct ffs_node *node, int flags, const struct ffs_caller *who);
struct ffs_handle *ffs_handle_by_id(struct ffs_fs *fs, uint64_t id);
struct ffs_handle *ffs_handle_ref(struct ffs_handle *h);
/* The last one frees; the generation is closed at release, not here. */
void ffs_handle_unref(struct ffs_fs *fs, struct ffs_handle *h);
unsigned ffs_handles_count(struct ffs_fs *fs);
/* Walk all handles. */
void ffs_handles_each(struct ffs_fs *fs, void (*fn)(struct ffs_handle *h, void *arg), void *arg);
