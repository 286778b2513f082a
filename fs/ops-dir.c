/* Directories: names to nodes, listings, and the operations on names.
 *
 * Threads: FUSE workers. LOOKUP and listings never wait; mkdir, rmdir and rename go to the pool (named.c).
 * Under the lock that the kernel holds for a directory nothing here waits for a VMM. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ack.h"
#include "base/fault.h"
#include "base/util.h"
#include "box.h"
#include "fork.h"
#include "live.h"
#include "named.h"
#include "ops.h"

static const enum ffs_kind meta_kinds[] = {
	FFS_KIND_VERSION, FFS_KIND_CAPABILITIES, FFS_KIND_METRICS, FFS_KIND_EVENTS, FFS_KIND_META_CTL};
static const enum ffs_kind sbx_kinds[] = {FFS_KIND_SBX_STATUS, FFS_KIND_SBX_STATE, FFS_KIND_SBX_CTL,
	FFS_KIND_BRANCHES, FFS_KIND_SBX_BOXES, FFS_KIND_LIVE};
/* manifest.json last: reading it waits for the capture, and cp -r takes the order of the listing */
static const enum ffs_kind live_kinds[] = {
	FFS_KIND_LIVE_MEMORY, FFS_KIND_LIVE_VMSTATE, FFS_KIND_LIVE_MANIFEST};
static const enum ffs_kind named_kinds[] = {FFS_KIND_NAMED_MEMORY, FFS_KIND_NAMED_VMSTATE,
	FFS_KIND_NAMED_STATUS, FFS_KIND_NAMED_STATE, FFS_KIND_NAMED_WAIT, FFS_KIND_DISKS, FFS_KIND_FORKS,
	FFS_KIND_NAMED_MANIFEST};
static const enum ffs_kind fork_kinds[] = {FFS_KIND_FORK_MEMORY, FFS_KIND_FORK_VMSTATE, FFS_KIND_FORK_BOXES,
	FFS_KIND_FORK_STATUS, FFS_KIND_FORK_RECORD, FFS_KIND_FORK_MANIFEST, FFS_KIND_FORK_ACK};

/* The files and directories with fixed names in a directory. */
static unsigned children(const struct ffs_fs *fs, const struct ffs_node *dir, const enum ffs_kind **out)
{
	switch (dir->key.kind) {
	case FFS_KIND_META:
		*out = meta_kinds;
		return FFS_ARRAY_LEN(meta_kinds);
	case FFS_KIND_SBX:
		*out = sbx_kinds;
		/* branch/ is the last: gone with the VM, or hidden */
		return FFS_ARRAY_LEN(sbx_kinds) - (fs->opt.branch_off || !dir->sbx->engine ? 2 : 0);
	case FFS_KIND_LIVE:
		*out = live_kinds;
		return FFS_ARRAY_LEN(live_kinds);
	case FFS_KIND_NAMED:
		*out = named_kinds;
		return FFS_ARRAY_LEN(named_kinds);
	case FFS_KIND_FORK:
		*out = fork_kinds;
		/* ack is the last: for who asks for it */
		return FFS_ARRAY_LEN(fork_kinds) - !ffs_ack_asks(dir->fork);
	default:
		return 0;
	}
}

static bool hidden(const struct ffs_sbx *s)
{
	return s->removed || (s->attaching && !s->n_branches);
}

/* ---- lookup: tree lock held ---- */

static struct ffs_node *get(
	struct ffs_fs *fs, enum ffs_kind kind, struct ffs_sbx *sbx, struct ffs_named *named)
{
	struct ffs_node_key key = {.kind = kind, .object = named ? named->serial : sbx ? sbx->serial : 0};

	/* a handle's answer must not be another's: every lookup of a ctl is a file of its own */
	if (ffs_kind_is_ctl(kind))
		key.extra = fs->next_serial++;
	return ffs_node_get(fs, &key, sbx, named, NULL);
}

static struct ffs_node *get_named_file(struct ffs_call *call, enum ffs_kind kind, struct ffs_named *named)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_node_key key = {.kind = kind, .object = named->serial};

	if (kind != FFS_KIND_NAMED_MEMORY && kind != FFS_KIND_NAMED_VMSTATE)
		return ffs_node_get(fs, &key, named->sbx, named, NULL);
	if (ffs_retry_peek(fs, call->who.tid, ffs_ino(kind, named->serial, NULL)) == FFS_RETRY_WRITER)
		key.mode = FFS_MODE_DIRECT;
	else if (named->shot && named->shot->state == FFS_BRANCH_READY && atomic_load(&fs->pass.on) &&
		 ffs_shot_is_file(named->shot, kind == FFS_KIND_NAMED_MEMORY))
		key.mode = FFS_MODE_PASS;
	return ffs_node_get(fs, &key, named->sbx, named, NULL);
}

static struct ffs_node *get_fork_file(struct ffs_call *call, enum ffs_kind kind, struct ffs_fork *fork)
{
	struct ffs_fs *fs = call->fs;
	struct ffs_node_key key = {.kind = kind, .object = fork->serial};

	if ((kind == FFS_KIND_FORK_MEMORY || kind == FFS_KIND_FORK_VMSTATE) &&
		ffs_retry_peek(fs, call->who.tid, ffs_ino(kind, fork->serial, NULL)) == FFS_RETRY_WRITER)
		key.mode = FFS_MODE_DIRECT;
	return ffs_node_get_fork(fs, &key, fork);
}

static int find_fork(struct ffs_fs *fs, struct ffs_named *named, const char *name, struct ffs_node **out)
{
	struct ffs_fork *f = ffs_fork_find(named, name);

	if (!f)
		return -ENOENT;
	struct ffs_node_key key = {.kind = FFS_KIND_FORK, .object = f->serial};

	*out = ffs_node_get_fork(fs, &key, f);
	return 0;
}

/* Never for writing: such an open is refused, and asks for no node of its own. */
static int find_disk(struct ffs_fs *fs, struct ffs_named *named, const char *id, struct ffs_node **out)
{
	int i = ffs_named_disk(named, id);

	if (i < 0)
		return -ENOENT;
	struct ffs_node_key key = {.kind = FFS_KIND_DISK, .object = named->serial, .key = named->disks[i].id};

	if (named->shot->state == FFS_BRANCH_READY && atomic_load(&fs->pass.on) &&
		ffs_shot_is_file(named->shot, false))
		key.mode = FFS_MODE_PASS;
	*out = ffs_node_get(fs, &key, named->sbx, named, NULL);
	return 0;
}

static int find_in_root(struct ffs_fs *fs, const char *name, struct ffs_node **out)
{
	if (strcmp(name, ffs_kind_name(FFS_KIND_META)) == 0) {
		*out = get(fs, FFS_KIND_META, NULL, NULL);
		return 0;
	}
	struct ffs_sbx *s = ffs_tree_find(fs, name);

	if (!s || hidden(s))
		return -ENOENT;
	*out = get(fs, FFS_KIND_SBX, s, NULL);
	return 0;
}

/* branch@KEY: any key that could be a name; nothing is taken by looking. */
static int find_keyed(struct ffs_fs *fs, struct ffs_node *dir, const char *name, struct ffs_node **out)
{
	static const char prefix[] = "branch@";

	if (strncmp(name, prefix, sizeof(prefix) - 1) != 0 || fs->opt.branch_off || !dir->sbx->engine ||
		ffs_check_name("key", name + sizeof(prefix) - 1, NULL) < 0)
		return -ENOENT;
	struct ffs_node_key key = {
		.kind = FFS_KIND_LIVE, .object = dir->sbx->serial, .key = name + sizeof(prefix) - 1};

	*out = ffs_node_get(fs, &key, dir->sbx, NULL, NULL);
	return 0;
}

/* 0 and *out (NULL: no memory), or -ENOENT. */
static int find(struct ffs_call *call, struct ffs_node *dir, const char *name, struct ffs_node **out)
{
	struct ffs_fs *fs = call->fs;
	const enum ffs_kind *kinds = NULL;
	unsigned n = children(fs, dir, &kinds);

	if ((dir->sbx && dir->sbx->removed) || (dir->named && !dir->named->shot) ||
		(dir->fork && dir->fork->removed))
		return -ENOENT;
	for (unsigned i = 0; i < n; i++) {
		if (strcmp(name, ffs_kind_name(kinds[i])) != 0)
			continue;
		if (dir->key.kind == FFS_KIND_LIVE)
			*out = ffs_live_lookup(call, dir, (int)kinds[i]);
		else if (dir->fork)
			*out = get_fork_file(call, kinds[i], dir->fork);
		else if (dir->named)
			*out = get_named_file(call, kinds[i], dir->named);
		else
			*out = get(fs, kinds[i], dir->sbx, NULL);
		return 0;
	}
	if (dir->key.kind == FFS_KIND_ROOT)
		return find_in_root(fs, name, out);
	if (dir->key.kind == FFS_KIND_SBX)
		return find_keyed(fs, dir, name, out);
	if (dir->key.kind == FFS_KIND_DISKS)
		return find_disk(fs, dir->named, name, out);
	if (dir->key.kind == FFS_KIND_FORKS)
		return find_fork(fs, dir->named, name, out);
	if (ffs_kind_is_boxes(dir->key.kind))
		return ffs_box_lookup(fs, dir, name, out);
	if (dir->key.kind == FFS_KIND_BRANCHES) {
		struct ffs_named *named = ffs_named_find(dir->sbx, name);

		if (!named || !named->shot)
			return -ENOENT;
		*out = get(fs, FFS_KIND_NAMED, dir->sbx, named);
		return 0;
	}
	return -ENOENT;
}

void ffs_op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct ffs_call call;
	struct ffs_node *found = NULL, *dir = ffs_call_begin(&call, req, parent);
	int r;

	if (!dir)
		return;
	if (dir->key.kind == FFS_KIND_LIVE)
		ffs_caller_of(req, &call.who);
	pthread_mutex_lock(&call.fs->lock);
	r = find(&call, dir, name, &found);
	if (found)
		ffs_node_ref(found);
	pthread_mutex_unlock(&call.fs->lock);
	if (found)
		ffs_reply_entry(call.fs, req, found);
	else
		fuse_reply_err(req, r < 0 ? -r : ENOMEM);
	ffs_call_end(&call, dir);
}

/* ---- forget, getattr ---- */

static void forget(struct ffs_fs *fs, uint64_t ino, uint64_t n)
{
	pthread_mutex_lock(&fs->lock);
	struct ffs_node *node = ffs_node_by_id(fs, ino);

	if (node)
		ffs_node_forget(fs, node, n);
	pthread_mutex_unlock(&fs->lock);
}

void ffs_op_forget(fuse_req_t req, fuse_ino_t ino, uint64_t nlookup)
{
	forget(fuse_req_userdata(req), ino, nlookup);
	fuse_reply_none(req);
}

void ffs_op_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets)
{
	for (size_t i = 0; i < count; i++)
		forget(fuse_req_userdata(req), forgets[i].ino, forgets[i].nlookup);
	fuse_reply_none(req);
}

void ffs_op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *node = ffs_call_begin(&call, req, ino);
	struct stat st;

	if (!node)
		return;
	pthread_mutex_lock(&call.fs->lock);
	ffs_node_attr(call.fs, node, &st);
	double ttl = ffs_node_attr_ttl(call.fs, node);

	pthread_mutex_unlock(&call.fs->lock);
	fuse_reply_attr(req, &st, ttl);
	ffs_call_end(&call, node);
}

/* ---- listings: made at opendir, so that one listing is consistent ---- */

void ffs_listing_add(struct ffs_listing *l, const char *name, uint64_t ino, mode_t type)
{
	if (l->n == l->room) {
		unsigned room = l->room ? l->room * 2 : 16;
		struct ffs_dirent *more = realloc(l->entries, room * sizeof(*more));

		if (!more) {
			l->failed = true;
			return;
		}
		l->entries = more;
		l->room = room;
	}
	char *copy = strdup(name);

	if (copy)
		l->entries[l->n++] = (struct ffs_dirent){.name = copy, .ino = ino, .type = type};
	else
		l->failed = true;
}

void ffs_listing_free(struct ffs_listing *l)
{
	for (unsigned i = 0; i < l->n; i++)
		free(l->entries[i].name);
	free(l->entries);
	*l = (struct ffs_listing){0};
}

static uint64_t parent_ino(const struct ffs_node *dir)
{
	switch (dir->key.kind) {
	case FFS_KIND_LIVE:
	case FFS_KIND_BRANCHES:
		return ffs_ino(FFS_KIND_SBX, dir->sbx->serial, NULL);
	case FFS_KIND_FORK:
		return ffs_ino(FFS_KIND_FORKS, dir->named->serial, NULL);
	case FFS_KIND_FORKS:
	case FFS_KIND_DISKS:
		return ffs_ino(FFS_KIND_NAMED, dir->named->serial, NULL);
	case FFS_KIND_NAMED:
		return ffs_ino(FFS_KIND_BRANCHES, dir->sbx->serial, NULL);
	default:
		return FUSE_ROOT_ID;
	}
}

/* Tree lock held. */
static void list(struct ffs_fs *fs, struct ffs_node *dir, struct ffs_listing *l)
{
	const enum ffs_kind *kinds = NULL;
	unsigned n = children(fs, dir, &kinds);
	uint64_t serial = dir->fork    ? dir->fork->serial
			  : dir->named ? dir->named->serial
			  : dir->sbx   ? dir->sbx->serial
				       : 0;

	ffs_listing_add(l, ".", dir->ino, S_IFDIR);
	ffs_listing_add(l, "..", parent_ino(dir), S_IFDIR);
	if ((dir->sbx && dir->sbx->removed) || (dir->named && !dir->named->shot) ||
		(dir->fork && dir->fork->removed))
		return;
	for (unsigned i = 0; i < n; i++)
		ffs_listing_add(l, ffs_kind_name(kinds[i]), ffs_ino(kinds[i], serial, dir->key.key),
			ffs_kind_type(kinds[i]));
	if (dir->key.kind == FFS_KIND_ROOT) {
		ffs_listing_add(l, ffs_kind_name(FFS_KIND_META), ffs_ino(FFS_KIND_META, 0, NULL), S_IFDIR);
		for (struct ffs_list *e = fs->sandboxes.next; e != &fs->sandboxes; e = e->next) {
			struct ffs_sbx *s = ffs_container(e, struct ffs_sbx, link);

			if (!hidden(s))
				ffs_listing_add(l, s->name, ffs_ino(FFS_KIND_SBX, s->serial, NULL), S_IFDIR);
		}
	} else if (dir->key.kind == FFS_KIND_FORKS) {
		for (struct ffs_list *e = dir->named->forks.next; e != &dir->named->forks; e = e->next) {
			struct ffs_fork *f = ffs_container(e, struct ffs_fork, link);

			ffs_listing_add(l, f->name, ffs_ino(FFS_KIND_FORK, f->serial, NULL), S_IFDIR);
		}
	} else if (dir->key.kind == FFS_KIND_DISKS) {
		for (unsigned i = 0; i < dir->named->n_disks; i++)
			ffs_listing_add(l, dir->named->disks[i].id,
				ffs_ino(FFS_KIND_DISK, serial, dir->named->disks[i].id), S_IFREG);
	} else if (dir->key.kind == FFS_KIND_BRANCHES) {
		for (struct ffs_list *e = dir->sbx->branches.next; e != &dir->sbx->branches; e = e->next) {
			struct ffs_named *b = ffs_container(e, struct ffs_named, link);

			if (b->shot)
				ffs_listing_add(
					l, b->name, ffs_ino(FFS_KIND_NAMED, b->serial, NULL), S_IFDIR);
		}
	}
}

void ffs_reply_listing(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, struct ffs_node *dir,
	int flags, struct ffs_listing *l)
{
	struct fuse_file_info fi = {.flags = flags};

	pthread_mutex_lock(&fs->lock);
	struct ffs_handle *h = l->failed ? NULL : ffs_handle_new(fs, dir, flags, who);

	if (h) {
		h->entries = l->entries;
		h->n_entries = l->n;
		*l = (struct ffs_listing){0};
		fi.fh = h->id;
	}
	pthread_mutex_unlock(&fs->lock);
	ffs_listing_free(l);
	if (!h) {
		fuse_reply_err(req, ENOMEM);
	} else if (fuse_reply_open(req, &fi) != 0) {
		pthread_mutex_lock(&fs->lock);
		ffs_handle_unref(fs, h);
		pthread_mutex_unlock(&fs->lock);
	}
}

void ffs_op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *dir = ffs_call_begin(&call, req, ino);
	struct ffs_listing l = {0};

	if (!dir)
		return;
	if (ffs_kind_is_boxes(dir->key.kind)) {
		ffs_caller_of(req, &call.who);
		ffs_box_opendir(&call, dir, fi->flags);
	} else {
		pthread_mutex_lock(&call.fs->lock);
		list(call.fs, dir, &l);
		pthread_mutex_unlock(&call.fs->lock);
		ffs_reply_listing(call.fs, req, &call.who, dir, fi->flags, &l);
	}
	ffs_call_end(&call, dir);
}

/* There is no readdirplus: the kernel forgets what it knows of an entry's ACLs with each, and asks again for all
 * of them when ls -l does. */
void ffs_op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *dir = ffs_call_begin(&call, req, ino);
	size_t used = 0;

	if (!dir)
		return;
	if (size > 65536)
		size = 65536;
	char *buf = malloc(size);

	pthread_mutex_lock(&call.fs->lock);
	struct ffs_handle *h = ffs_handle_by_id(call.fs, fi->fh);

	if (h)
		ffs_handle_ref(h);
	pthread_mutex_unlock(&call.fs->lock);
	/* entries are fixed as long as the handle lives */
	for (uint64_t i = (uint64_t)off; buf && h && i < h->n_entries; i++) {
		const struct ffs_dirent *d = &h->entries[i];
		struct stat st = {.st_ino = d->ino, .st_mode = d->type};
		size_t n = fuse_add_direntry(req, buf + used, size - used, d->name, &st, (off_t)i + 1);

		if (n > size - used)
			break;
		used += n;
	}
	if (buf && h)
		fuse_reply_buf(req, buf, used);
	else
		fuse_reply_err(req, h ? ENOMEM : EBADF);
	free(buf);
	if (h) {
		pthread_mutex_lock(&call.fs->lock);
		ffs_handle_unref(call.fs, h);
		pthread_mutex_unlock(&call.fs->lock);
	}
	ffs_call_end(&call, dir);
}

void ffs_op_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct ffs_fs *fs = fuse_req_userdata(req);

	pthread_mutex_lock(&fs->lock);
	struct ffs_handle *h = ffs_handle_by_id(fs, fi->fh);

	if (h && !h->released) {
		h->released = true;
		ffs_handle_unref(fs, h);
	}
	pthread_mutex_unlock(&fs->lock);
	fuse_reply_err(req, 0);
}

/* ---- operations on names ---- */

/* The kernel holds the directory's lock: what is not durable yet is said, not waited for. */
void ffs_op_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	struct ffs_call call;
	struct ffs_node *dir = ffs_call_begin(&call, req, ino);
	struct ffs_error err = {0};
	int code = 0;

	if (!dir)
		return;
	pthread_mutex_lock(&call.fs->lock);
	if (dir->named && dir->named->shot) {
		if (dir->named->shot->state == FFS_BRANCH_WRITING)
			code = -ffs_error_set(&err, EBUSY,
				"branch '%s' is still being written: sync its memory.bin or read its file "
				"wait",
				dir->named->name);
		else if (dir->named->shot->state == FFS_BRANCH_FAILED)
			code = (err = dir->named->shot->failure, EIO);
	} else if (dir->key.kind == FFS_KIND_BRANCHES || dir->key.kind == FFS_KIND_SBX) {
		for (struct ffs_list *e = dir->sbx->branches.next; !code && e != &dir->sbx->branches;
			e = e->next) {
			struct ffs_named *b = ffs_container(e, struct ffs_named, link);

			if (!b->shot || b->shot->state == FFS_BRANCH_WRITING)
				code = -ffs_error_set(&err, EBUSY,
					"branch '%s' is still being written: sync its memory.bin or read its "
					"file wait",
					b->name);
		}
	}
	pthread_mutex_unlock(&call.fs->lock);
	ffs_reply_failure(call.fs, req, &call.who, ffs_node_dir_ino(dir), code, &err);
	ffs_call_end(&call, dir);
}

static void refuse(struct ffs_call *call, struct ffs_node *dir, int code, const char *why)
{
	struct ffs_error err = {0};

	ffs_error_set(&err, code, "%s", why);
	ffs_reply_failure(call->fs, call->req, &call->who, ffs_node_dir_ino(dir), code, &err);
}

void ffs_op_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	struct ffs_call call;
	struct ffs_node *dir = ffs_call_begin(&call, req, parent);

	if (!dir)
		return;
	if (dir->key.kind == FFS_KIND_BRANCHES)
		ffs_named_mkdir(&call, dir, name);
	else if (dir->key.kind == FFS_KIND_FORKS)
		ffs_fork_mkdir(&call, dir, name);
	else
		refuse(&call, dir, EPERM,
			"directories are made in branches/ (a named branch) and in a branch's forks/ only; a "
			"VM "
			"gets its directory by attach");
	ffs_call_end(&call, dir);
}

void ffs_op_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct ffs_call call;
	struct ffs_node *dir = ffs_call_begin(&call, req, parent);

	if (!dir)
		return;
	if (dir->key.kind == FFS_KIND_BRANCHES)
		ffs_named_rmdir(&call, dir, name);
	else if (dir->key.kind == FFS_KIND_FORKS)
		ffs_fork_rmdir(&call, dir, name);
	else
		refuse(&call, dir, EPERM,
			"only branches/NAME and forks/NAME can be removed; a VM's directory goes by detach");
	ffs_call_end(&call, dir);
}

void ffs_op_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent,
	const char *newname, unsigned int flags)
{
	struct ffs_call call;
	struct ffs_node *dir = ffs_call_begin(&call, req, parent), *to;

	if (!dir)
		return;
	pthread_mutex_lock(&call.fs->lock);
	to = ffs_node_by_id(call.fs, newparent);
	if (to)
		ffs_node_ref(to);
	pthread_mutex_unlock(&call.fs->lock);
	if (to && dir->key.kind == FFS_KIND_BRANCHES && to->key.kind == FFS_KIND_BRANCHES)
		ffs_named_rename(&call, dir, name, to, newname, flags);
	else
		refuse(&call, dir, EPERM, "only branches/NAME can be renamed, within its branches/");
	if (to)
		ffs_call_end(&call, to);
	ffs_call_end(&call, dir);
}
