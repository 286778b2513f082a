/* Owns the table of open files: numbers for the kernel, never pointers.
 *
 * Threads: any, tree lock held throughout; never waits. */
#include <stdlib.h>

#include "box.h"
#include "ctl.h"
#include "nodes.h"

#define BUCKETS 1024

struct ffs_handles {
	struct ffs_handle *by_id[BUCKETS];
	uint64_t next_id;
	unsigned count;
};

struct ffs_handles *ffs_handles_new(void)
{
	struct ffs_handles *t = calloc(1, sizeof(*t));

	if (t)
		t->next_id = 1;
	return t;
}

struct ffs_handle *ffs_handle_new(
	struct ffs_fs *fs, struct ffs_node *node, int flags, const struct ffs_caller *who)
{
	struct ffs_handle *h = calloc(1, sizeof(*h));

	if (!h)
		return NULL;
	h->id = fs->handles->next_id++;
	h->refs = 1;
	h->node = ffs_node_ref(node);
	h->flags = flags;
	h->who = *who;
	h->next_id = fs->handles->by_id[h->id % BUCKETS];
	fs->handles->by_id[h->id % BUCKETS] = h;
	fs->handles->count++;
	return h;
}

struct ffs_handle *ffs_handle_by_id(struct ffs_fs *fs, uint64_t id)
{
	for (struct ffs_handle *h = fs->handles->by_id[id % BUCKETS]; h; h = h->next_id)
		if (h->id == id)
			return h;
	return NULL;
}

struct ffs_handle *ffs_handle_ref(struct ffs_handle *h)
{
	h->refs++;
	return h;
}

static void free_handle(struct ffs_fs *fs, struct ffs_handle *h)
{
	struct ffs_handle **p = &fs->handles->by_id[h->id % BUCKETS];

	while (*p != h)
		p = &(*p)->next_id;
	*p = h->next_id;
	fs->handles->count--;
	if (h->ph)
		fuse_pollhandle_destroy(h->ph);
	ffs_txn_unref(h->txn);
	ffs_box_free(h->box);
	ffs_overlay_unref(h->overlay);
	ffs_live_unref(h->live);
	if (h->shot)
		h->shot->opens--;
	ffs_shot_unref(h->shot);
	ffs_node_unref(fs, h->node);
	for (unsigned i = 0; i < h->n_entries; i++)
		free(h->entries[i].name);
	free(h->entries);
	free(h->text);
	free(h);
}

void ffs_handle_unref(struct ffs_fs *fs, struct ffs_handle *h)
{
	if (!--h->refs)
		free_handle(fs, h);
}

unsigned ffs_handles_count(struct ffs_fs *fs)
{
	return fs->handles->count;
}

void ffs_handles_each(struct ffs_fs *fs, void (*fn)(struct ffs_handle *h, void *arg), void *arg)
{
	for (unsigned i = 0; i < BUCKETS; i++)
		for (struct ffs_handle *h = fs->handles->by_id[i], *next; h; h = next) {
			next = h->next_id;
			fn(h, arg);
		}
}

void ffs_handles_free(struct ffs_fs *fs)
{
	for (unsigned i = 0; fs->handles && i < BUCKETS; i++)
		while (fs->handles->by_id[i])
			free_handle(fs, fs->handles->by_id[i]);
	free(fs->handles);
	fs->handles = NULL;
}
