/* Owns the node table: by number (what the kernel holds) and by key (so that a name gives the same node
 * again).
 *
 * Threads: any, tree lock held throughout. Never waits; the registration of a backing file is released here
 * (an ioctl that only takes kernel locks of the device). */
#include "nodes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "fork.h"

#define BUCKETS 4096

/* What a name that only the kernel can change may be cached for; and one that we change too: the kernel is
 * told then (inval.h), this bounds what a lookup that overtook the notice can leave behind. Seconds. */
#define LONG_TTL 3600.0
#define SHORT_TTL 1.0

struct ffs_nodes {
	struct ffs_node *by_id[BUCKETS];
	struct ffs_node *by_key[BUCKETS];
	uint64_t next_id;
	unsigned count;
};

static const struct {
	const char *name;
	mode_t type, perm;
	enum ffs_kind dir; /* whose error sentences these are */
	bool fixed_name;   /* the name's node never changes while the parent exists */
} kinds[FFS_KIND_COUNT] = {
	[FFS_KIND_ROOT] = {"", S_IFDIR, 0700, FFS_KIND_ROOT, true},
	[FFS_KIND_META] = {".forkfs", S_IFDIR, 0700, FFS_KIND_META, true},
	[FFS_KIND_VERSION] = {"version", S_IFREG, 0400, FFS_KIND_META, true},
	[FFS_KIND_CAPABILITIES] = {"capabilities", S_IFREG, 0400, FFS_KIND_META, true},
	[FFS_KIND_METRICS] = {"metrics", S_IFREG, 0400, FFS_KIND_META, true},
	[FFS_KIND_EVENTS] = {"events", S_IFREG, 0400, FFS_KIND_META, true},
	[FFS_KIND_META_CTL] = {"ctl", S_IFREG, 0600, FFS_KIND_META, false},
	[FFS_KIND_SBX] = {"", S_IFDIR, 0700, FFS_KIND_SBX, false},
	[FFS_KIND_SBX_STATUS] = {"status", S_IFREG, 0400, FFS_KIND_SBX, true},
	[FFS_KIND_SBX_STATE] = {"state", S_IFREG, 0400, FFS_KIND_SBX, true},
	[FFS_KIND_SBX_CTL] = {"ctl", S_IFREG, 0600, FFS_KIND_SBX, false},
	[FFS_KIND_LIVE] = {"branch", S_IFDIR, 0500, FFS_KIND_LIVE, false},
	[FFS_KIND_LIVE_MEMORY] = {"memory.bin", S_IFREG, 0600, FFS_KIND_LIVE, false},
	[FFS_KIND_LIVE_VMSTATE] = {"vmstate", S_IFREG, 0400, FFS_KIND_LIVE, false},
	[FFS_KIND_LIVE_MANIFEST] = {"manifest.json", S_IFREG, 0400, FFS_KIND_LIVE, false},
	[FFS_KIND_BRANCHES] = {"branches", S_IFDIR, 0700, FFS_KIND_BRANCHES, true},
	[FFS_KIND_NAMED] = {"", S_IFDIR, 0500, FFS_KIND_NAMED, true},
	[FFS_KIND_NAMED_MEMORY] = {"memory.bin", S_IFREG, 0600, FFS_KIND_NAMED, false},
	[FFS_KIND_NAMED_VMSTATE] = {"vmstate", S_IFREG, 0400, FFS_KIND_NAMED, false},
	[FFS_KIND_NAMED_MANIFEST] = {"manifest.json", S_IFREG, 0400, FFS_KIND_NAMED, true},
	[FFS_KIND_NAMED_STATUS] = {"status", S_IFREG, 0400, FFS_KIND_NAMED, true},
	[FFS_KIND_NAMED_STATE] = {"state", S_IFREG, 0400, FFS_KIND_NAMED, true},
	[FFS_KIND_NAMED_WAIT] = {"wait", S_IFREG, 0400, FFS_KIND_NAMED, true},
	[FFS_KIND_DISKS] = {"disks", S_IFDIR, 0500, FFS_KIND_NAMED, true},
	[FFS_KIND_DISK] = {"", S_IFREG, 0400, FFS_KIND_NAMED, false},
	[FFS_KIND_FORKS] = {"forks", S_IFDIR, 0700, FFS_KIND_FORKS, true},
	[FFS_KIND_FORK] = {"", S_IFDIR, 0700, FFS_KIND_FORK, false},
	[FFS_KIND_FORK_MEMORY] = {"memory.bin", S_IFREG, 0600, FFS_KIND_FORK, false},
	[FFS_KIND_FORK_VMSTATE] = {"vmstate", S_IFREG, 0400, FFS_KIND_FORK, false},
	[FFS_KIND_FORK_MANIFEST] = {"manifest.json", S_IFREG, 0400, FFS_KIND_FORK, true},
	[FFS_KIND_FORK_STATUS] = {"status", S_IFREG, 0400, FFS_KIND_FORK, true},
	[FFS_KIND_FORK_ACK] = {"ack", S_IFREG, 0400, FFS_KIND_FORK, false},
	[FFS_KIND_FORK_RECORD] = {"record.json", S_IFREG, 0400, FFS_KIND_FORK, true},
	[FFS_KIND_FORK_BOXES] = {"mailboxes", S_IFDIR, 0700, FFS_KIND_FORK_BOXES, true},
	[FFS_KIND_SBX_BOXES] = {"mailboxes", S_IFDIR, 0700, FFS_KIND_SBX_BOXES, false},
	[FFS_KIND_SBX_BOX] = {"", S_IFREG, 0600, FFS_KIND_SBX_BOXES, false},
	[FFS_KIND_FORK_BOX] = {"", S_IFREG, 0600, FFS_KIND_FORK_BOXES, false},
};

bool ffs_kind_is_dir(enum ffs_kind kind)
{
	return kinds[kind].type == S_IFDIR;
}

bool ffs_kind_is_live_file(enum ffs_kind kind)
{
	return kind == FFS_KIND_LIVE_MEMORY || kind == FFS_KIND_LIVE_VMSTATE ||
	       kind == FFS_KIND_LIVE_MANIFEST;
}

bool ffs_kind_is_data(enum ffs_kind kind)
{
	return ffs_kind_is_live_file(kind) || kind == FFS_KIND_NAMED_MEMORY ||
	       kind == FFS_KIND_NAMED_VMSTATE || kind == FFS_KIND_NAMED_MANIFEST || kind == FFS_KIND_DISK ||
	       kind == FFS_KIND_FORK_MEMORY || kind == FFS_KIND_FORK_VMSTATE ||
	       kind == FFS_KIND_FORK_MANIFEST;
}

bool ffs_kind_is_manifest(enum ffs_kind kind)
{
	return kind == FFS_KIND_LIVE_MANIFEST || kind == FFS_KIND_NAMED_MANIFEST ||
	       kind == FFS_KIND_FORK_MANIFEST;
}

bool ffs_kind_is_boxes(enum ffs_kind kind)
{
	return kind == FFS_KIND_FORK_BOXES || kind == FFS_KIND_SBX_BOXES;
}

bool ffs_kind_is_box(enum ffs_kind kind)
{
	return kind == FFS_KIND_FORK_BOX || kind == FFS_KIND_SBX_BOX;
}

bool ffs_kind_is_ctl(enum ffs_kind kind)
{
	return kind == FFS_KIND_META_CTL || kind == FFS_KIND_SBX_CTL;
}

const char *ffs_kind_name(enum ffs_kind kind)
{
	return kinds[kind].name;
}

mode_t ffs_kind_type(enum ffs_kind kind)
{
	return kinds[kind].type;
}

/* ---- keys and numbers ---- */

static uint64_t mix(uint64_t h, uint64_t v)
{
	h = (h ^ v) * 0x9e3779b97f4a7c15ull;
	return h ^ (h >> 29);
}

static uint64_t hash_text(uint64_t h, const char *text)
{
	for (; text && *text; text++)
		h = mix(h, (unsigned char)*text);
	return h;
}

static unsigned key_bucket(const struct ffs_node_key *k)
{
	uint64_t h =
		mix(mix(mix((uint64_t)k->kind * 4 + (uint64_t)k->mode, k->object), k->extra), k->unbound);

	return (unsigned)(hash_text(h, k->key) % BUCKETS);
}

static bool same_key(const struct ffs_node_key *a, const struct ffs_node_key *b)
{
	if (a->kind != b->kind || a->mode != b->mode || a->object != b->object || a->extra != b->extra ||
		a->unbound != b->unbound || !a->key != !b->key)
		return false;
	return !a->key || strcmp(a->key, b->key) == 0;
}

/* The number must be the same for all nodes of a name, and differ between names: 64 kinds per object, and for
 * branch@KEY and for a disk a number derived from the key in the upper half of the space. */
uint64_t ffs_ino(enum ffs_kind kind, uint64_t serial, const char *key)
{
	if (kind == FFS_KIND_ROOT)
		return FUSE_ROOT_ID;
	uint64_t base = serial * 64;

	if (key)
		base = (hash_text(mix(0, serial), key) & 0x3fffffffffffffc0ull) | 0x4000000000000000ull;
	return base + (uint64_t)kind + 1;
}

static uint64_t serial_of(
	const struct ffs_sbx *sbx, const struct ffs_named *named, const struct ffs_fork *fork)
{
	return fork ? fork->serial : named ? named->serial : sbx ? sbx->serial : 0;
}

uint64_t ffs_node_dir_ino(const struct ffs_node *n)
{
	enum ffs_kind dir = kinds[n->key.kind].dir;
	const char *key = n->key.kind == FFS_KIND_DISK || ffs_kind_is_box(n->key.kind) ? NULL : n->key.key;

	return ffs_ino(dir, serial_of(n->sbx, n->named, n->fork), key);
}

/* ---- table ---- */

static void link_id(struct ffs_nodes *t, struct ffs_node *n)
{
	struct ffs_node **p = &t->by_id[n->id % BUCKETS];

	n->next_id = *p;
	*p = n;
	t->count++;
}

static void link_key(struct ffs_nodes *t, struct ffs_node *n)
{
	struct ffs_node **p = &t->by_key[key_bucket(&n->key)];

	n->next_key = *p;
	*p = n;
	n->findable = true;
}

static void unlink_key(struct ffs_nodes *t, struct ffs_node *n)
{
	if (!n->findable)
		return;
	struct ffs_node **p = &t->by_key[key_bucket(&n->key)];

	while (*p != n)
		p = &(*p)->next_key;
	*p = n->next_key;
	n->findable = false;
}

static struct ffs_node *find_key(struct ffs_nodes *t, const struct ffs_node_key *key)
{
	for (struct ffs_node *n = t->by_key[key_bucket(key)]; n; n = n->next_key)
		if (same_key(&n->key, key))
			return n;
	return NULL;
}

struct ffs_nodes *ffs_nodes_new(void)
{
	struct ffs_nodes *t = calloc(1, sizeof(*t));
	struct ffs_node *root = calloc(1, sizeof(*root));

	if (!t || !root) {
		free(t);
		free(root);
		return NULL;
	}
	root->id = FUSE_ROOT_ID;
	root->ino = FUSE_ROOT_ID;
	root->refs = 1;
	link_id(t, root);
	link_key(t, root);
	t->next_id = FUSE_ROOT_ID + 1;
	return t;
}

static void free_node(struct ffs_fs *fs, struct ffs_nodes *t, struct ffs_node *n)
{
	struct ffs_node **p = &t->by_id[n->id % BUCKETS];

	while (*p != n)
		p = &(*p)->next_id;
	*p = n->next_id;
	t->count--;
	unlink_key(t, n);
	if (n->pass_opens && fs)
		ffs_passthrough_close(&fs->pass, n->backing_id);
	ffs_live_unref(n->live);
	ffs_fork_unref(n->fork);
	ffs_named_unref(n->named);
	ffs_sbx_unref(n->sbx);
	free((char *)n->key.key);
	free(n);
}

void ffs_nodes_free(struct ffs_nodes *t)
{
	for (unsigned i = 0; t && i < BUCKETS; i++)
		while (t->by_id[i])
			free_node(NULL, t, t->by_id[i]);
	free(t);
}

struct ffs_node *ffs_node_by_id(struct ffs_fs *fs, uint64_t id)
{
	for (struct ffs_node *n = fs->nodes->by_id[id % BUCKETS]; n; n = n->next_id)
		if (n->id == id)
			return n;
	return NULL;
}

static struct ffs_node *get_node(struct ffs_fs *fs, const struct ffs_node_key *key, struct ffs_sbx *sbx,
	struct ffs_named *named, struct ffs_live *live, struct ffs_fork *fork)
{
	struct ffs_node *n = find_key(fs->nodes, key);

	if (n)
		return n;
	n = calloc(1, sizeof(*n));
	if (!n)
		return NULL;
	n->key = *key;
	if (key->key) {
		n->key.key = strdup(key->key);
		if (!n->key.key) {
			free(n);
			return NULL;
		}
	}
	n->id = fs->nodes->next_id++;
	n->ino = ffs_ino(key->kind, serial_of(sbx, named, fork), key->key);
	n->sbx = sbx ? ffs_sbx_ref(sbx) : NULL;
	n->named = named ? ffs_named_ref(named) : NULL;
	n->live = live ? ffs_live_ref(live) : NULL;
	n->fork = fork ? ffs_fork_ref(fork) : NULL;
	link_id(fs->nodes, n);
	link_key(fs->nodes, n);
	return n;
}

struct ffs_node *ffs_node_get(struct ffs_fs *fs, const struct ffs_node_key *key, struct ffs_sbx *sbx,
	struct ffs_named *named, struct ffs_live *live)
{
	return get_node(fs, key, sbx, named, live, NULL);
}

struct ffs_node *ffs_node_get_fork(struct ffs_fs *fs, const struct ffs_node_key *key, struct ffs_fork *fork)
{
	return get_node(fs, key, fork->named->sbx, fork->named, NULL, fork);
}

void ffs_node_bind(struct ffs_fs *fs, struct ffs_node *n, struct ffs_live *live)
{
	unlink_key(fs->nodes, n);
	n->live = ffs_live_ref(live);
	n->key.unbound = false;
	n->key.object = live->serial;
	n->key.extra = 0;
	if (!find_key(fs->nodes, &n->key))
		link_key(fs->nodes, n);
}

struct ffs_node *ffs_node_ref(struct ffs_node *n)
{
	n->refs++;
	return n;
}

static void drop_unused(struct ffs_fs *fs, struct ffs_node *n)
{
	if (!n->refs && !n->lookups)
		free_node(fs, fs->nodes, n);
}

void ffs_node_unref(struct ffs_fs *fs, struct ffs_node *n)
{
	n->refs--;
	drop_unused(fs, n);
}

void ffs_node_forget(struct ffs_fs *fs, struct ffs_node *n, uint64_t lookups)
{
	n->lookups = lookups > n->lookups ? 0 : n->lookups - lookups;
	drop_unused(fs, n);
}

unsigned ffs_nodes_count(struct ffs_fs *fs)
{
	return fs->nodes->count;
}

/* ---- attributes ---- */

static uint64_t size_of(const struct ffs_node *n)
{
	const struct ffs_shot *s = n->named ? n->named->shot : n->live ? n->live->shot : NULL;

	switch (n->key.kind) {
	case FFS_KIND_LIVE_MEMORY:
		return n->sbx->memory_size;
	case FFS_KIND_LIVE_VMSTATE:
		return n->live ? n->live->vmstate_size : 0;
	case FFS_KIND_NAMED_MEMORY:
	case FFS_KIND_FORK_MEMORY:
		return n->named->memory_size;
	case FFS_KIND_NAMED_VMSTATE:
	case FFS_KIND_FORK_VMSTATE:
		return n->named->vmstate_size;
	case FFS_KIND_DISK: {
		int i = ffs_named_disk(n->named, n->key.key);

		return i < 0 ? 0 : n->named->disks[i].size;
	}
	case FFS_KIND_FORK_BOX: {
		const struct ffs_staged *staged = ffs_fork_staged(n->fork, n->key.key);

		return staged ? staged->box.text_len : 0;
	}
	case FFS_KIND_LIVE_MANIFEST:
	case FFS_KIND_NAMED_MANIFEST:
		return s ? s->manifest_len : 0;
	default:
		return 0;
	}
}

static uint64_t time_of(const struct ffs_fs *fs, const struct ffs_node *n)
{
	if (n->fork)
		return n->fork->time_ns;
	if (n->named)
		return n->named->time_ns;
	if (n->live && n->live->time_ns)
		return n->live->time_ns;
	if (n->sbx)
		return n->key.kind == FFS_KIND_BRANCHES ? n->sbx->changed_ns : n->sbx->attached_ns;
	return fs->mounted_ns;
}

static mode_t perm_of(const struct ffs_fs *fs, const struct ffs_node *n)
{
	mode_t perm = kinds[n->key.kind].perm;

	/* others pass through the root to what they are lent; they can't list it */
	if (n->key.kind == FFS_KIND_ROOT && fs->opt.allow_other)
		return 0711;
	/* memory.bin stays 0600: QEMU opens it for writing to map it privately, and no write is ever accepted
	 */
	if (n->sbx && !n->sbx->writable && n->key.kind != FFS_KIND_LIVE_MEMORY &&
		n->key.kind != FFS_KIND_NAMED_MEMORY && n->key.kind != FFS_KIND_FORK_MEMORY)
		perm &= ~(mode_t)0200;
	return perm;
}

void ffs_node_attr(struct ffs_fs *fs, struct ffs_node *n, struct stat *st)
{
	uint64_t size = size_of(n), t = time_of(fs, n);
	bool gone = (n->sbx && n->sbx->removed) || (n->named && n->named->removed) ||
		    (n->fork && n->fork->removed);

	*st = (struct stat){
		.st_ino = n->ino,
		.st_mode = kinds[n->key.kind].type | perm_of(fs, n),
		/* of a directory too: 1 says that it does not count subdirectories */
		.st_nlink = gone ? 0 : 1,
		.st_uid = n->sbx ? n->sbx->uid : fs->uid,
		.st_gid = n->sbx ? n->sbx->gid : fs->gid,
		.st_size = (off_t)size,
		.st_blksize = 4096,
		.st_blocks = (blkcnt_t)((size + 511) / 512),
		.st_mtim = {.tv_sec = (time_t)(t / FFS_NS_PER_S), .tv_nsec = (long)(t % FFS_NS_PER_S)},
	};
	st->st_atim = st->st_ctim = st->st_mtim;
}

double ffs_node_attr_ttl(struct ffs_fs *fs, const struct ffs_node *n)
{
	switch (n->key.kind) {
	case FFS_KIND_LIVE_MEMORY:
	case FFS_KIND_LIVE_VMSTATE:
	case FFS_KIND_LIVE_MANIFEST:
	case FFS_KIND_FORK_BOX:
	case FFS_KIND_SBX_BOX:
		return 0;
	case FFS_KIND_BRANCHES:
		return SHORT_TTL;
	case FFS_KIND_NAMED_MANIFEST:
		return n->named->shot && n->named->shot->manifest_len ? LONG_TTL : 0;
	default:
		return LONG_TTL;
	}
}

double ffs_node_entry_ttl(struct ffs_fs *fs, const struct ffs_node *n)
{
	if (kinds[n->key.kind].fixed_name)
		return LONG_TTL;
	/* a settled branch's name has its last node; a writer's second node is asked for anew (the kernel
	 * revalidates after ESTALE whatever it was told) */
	if ((n->key.kind == FFS_KIND_NAMED_MEMORY || n->key.kind == FFS_KIND_NAMED_VMSTATE ||
		    n->key.kind == FFS_KIND_DISK) &&
		n->key.mode != FFS_MODE_DIRECT && n->named->shot && n->named->shot->state == FFS_BRANCH_READY)
		return LONG_TTL;
	return n->key.kind == FFS_KIND_SBX || n->key.kind == FFS_KIND_LIVE ||
			       n->key.kind == FFS_KIND_SBX_BOXES
		       ? SHORT_TTL
		       : 0;
}

/* ---- what the kernel must forget ---- */

static struct ffs_node *find_plain(struct ffs_fs *fs, enum ffs_kind kind, uint64_t object)
{
	struct ffs_node_key key = {.kind = kind, .object = object};

	return find_key(fs->nodes, &key);
}

void ffs_inval_collect(struct ffs_fs *fs, struct ffs_sbx *sbx, struct ffs_inval *out)
{
	struct ffs_node *dir = find_plain(fs, FFS_KIND_SBX, sbx->serial);

	*out = (struct ffs_inval){.dir = dir ? dir->id : 0};
	snprintf(out->name, sizeof(out->name), "%s", sbx->name);
	for (unsigned i = 0; i < BUCKETS; i++)
		for (struct ffs_node *n = fs->nodes->by_id[i]; n; n = n->next_id) {
			if (n->sbx != sbx || n->key.kind == FFS_KIND_SBX_CTL)
				continue;
			if (out->n == out->room) {
				unsigned room = out->room ? out->room * 2 : 64;
				uint64_t *more = realloc(out->ids, room * sizeof(*more));

				/* without memory the kernel forgets by itself, later */
				if (!more)
					return;
				out->ids = more;
				out->room = room;
			}
			out->ids[out->n++] = n->id;
		}
}

void ffs_inval_send(struct ffs_fs *fs, struct ffs_inval *inval)
{
	pthread_mutex_lock(&fs->lock);
	/* with no worker left a request that holds one of those locks would hold us for ever */
	bool closing = fs->closing;

	pthread_mutex_unlock(&fs->lock);
	if (closing)
		inval->dir = inval->n = 0;
	/* an error says that the kernel holds no such thing */
	if (inval->dir) {
		fuse_lowlevel_notify_inval_entry(fs->se, inval->dir, ffs_kind_name(FFS_KIND_LIVE),
			strlen(ffs_kind_name(FFS_KIND_LIVE)));
		fuse_lowlevel_notify_inval_entry(fs->se, inval->dir, ffs_kind_name(FFS_KIND_SBX_BOXES),
			strlen(ffs_kind_name(FFS_KIND_SBX_BOXES)));
		fuse_lowlevel_notify_inval_entry(fs->se, FUSE_ROOT_ID, inval->name, strlen(inval->name));
	}
	for (unsigned i = 0; i < inval->n; i++)
		fuse_lowlevel_notify_inval_inode(fs->se, inval->ids[i], -1, 0);
	free(inval->ids);
}

uint64_t ffs_branches_node(struct ffs_fs *fs, struct ffs_sbx *sbx)
{
	struct ffs_node *n = find_plain(fs, FFS_KIND_BRANCHES, sbx->serial);

	return n ? n->id : 0;
}

void ffs_inval_name(struct ffs_fs *fs, uint64_t dir, const char *name)
{
	pthread_mutex_lock(&fs->lock);
	bool closing = fs->closing;

	pthread_mutex_unlock(&fs->lock);
	if (dir && !closing)
		fuse_lowlevel_notify_inval_entry(fs->se, dir, name, strlen(name));
}
