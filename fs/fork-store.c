/* Owns the way of forks into the store and back: every change of a fork whose branch is kept there is in its file
 * first, durably, and then in the tree. So what was said to be done is there after a crash, and what is read was
 * there before.
 *
 * Threads: the pool; the main thread at the start. Locks: fs->names, which is held across the writing of one small file
 * and makes the changes of all forks one after the other (a branch has one directory meanwhile, and is neither
 * published nor converted), then the tree lock. A fork whose file is being written can't be opened for reading, or its
 * reader would have what a crash takes away. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ack.h"
#include "base/cleanup.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/util.h"
#include "durable.h"
#include "fork.h"

/* ---- the record ---- */

static int copy_box(const struct ffs_fork_box *from, struct ffs_fork_record *r)
{
	struct ffs_fork_box *to = &r->box[r->n];

	*to = *from;
	to->text = malloc(from->text_len + 1);
	if (!to->text)
		return -ENOMEM;
	memcpy(to->text, from->text, from->text_len);
	to->payload.at = to->text + (from->payload.at - from->text);
	r->n++;
	return 0;
}

/* Tree lock held: what it would be with `add` in place of what is staged for that frame, and without `drop`. */
static int describe(const struct ffs_fork *f, const struct ffs_staged *add, const struct ffs_staged *drop,
	struct ffs_fork_record *out)
{
	struct ffs_fork_record r = {.made_ns = f->time_ns};
	int got = 0;

	snprintf(r.name, sizeof(r.name), "%s", f->name);
	snprintf(r.branch, sizeof(r.branch), "%s", f->named->shot ? ffs_shot_id(f->named->shot) : "");
	memcpy(r.epoch, f->epoch, sizeof(r.epoch));
	r.ack_port = f->ack ? f->ack->port : 0;
	r.box = calloc(f->n_staged + 1, sizeof(*r.box));
	if (!r.box)
		return -ENOMEM;
	for (struct ffs_list *e = f->staged.next; !got && e != &f->staged; e = e->next) {
		const struct ffs_staged *s = ffs_container(e, struct ffs_staged, link);

		if (s != drop && !(add && add->box.frame.offset == s->box.frame.offset))
			got = copy_box(&s->box, &r);
	}
	if (!got && add)
		got = copy_box(&add->box, &r);
	if (got < 0)
		ffs_fork_record_clear(&r);
	else
		*out = r;
	return got;
}

static int text_of(struct ffs_fork *f, const struct ffs_staged *add, const struct ffs_staged *drop,
	char **text, size_t *len, struct ffs_error *err)
{
	struct ffs_fs *fs = f->named->sbx->fs;
	struct ffs_fork_record r = {0};

	pthread_mutex_lock(&fs->lock);
	int got =
		f->failure.code ? ffs_error_set(err, EIO, "%s", f->failure.text) : describe(f, add, drop, &r);

	pthread_mutex_unlock(&fs->lock);
	if (got == -ENOMEM)
		return ffs_error_set(err, ENOMEM, "no memory for fork '%s'", f->name);
	if (!got)
		got = ffs_fork_record_text(&r, text, len, err);
	ffs_fork_record_clear(&r);
	return got;
}

int ffs_fork_record(struct ffs_fs *fs, struct ffs_fork *f, char **text, size_t *len, struct ffs_error *err)
{
	return text_of(f, NULL, NULL, text, len, err);
}

/* ---- its file; fs->names held ---- */

static int cannot(const struct ffs_fork *f, int code, const char *what, struct ffs_error *err)
{
	return ffs_error_errno(err, code, "fork '%s' can't be %s the store%s", f->name, what,
		code == ENOSPC || code == EDQUOT ? ", which is full (make room with forkfs rm)" : "");
}

/* Where the branch's files are, to be closed; -1: it is in memory only. */
static int directory(struct ffs_fork *f, int *dir, struct ffs_error *err)
{
	*dir = ffs_durable_dir(f->named);
	if (*dir >= 0)
		return 0;
	if (*dir != -ENODATA)
		return cannot(f, -*dir, "kept in", err);
	*dir = -1;
	return 0;
}

/* Tree lock not held. Where the last step fails it may or may not be there after a crash: then the fork is unusable, and
 * says why. */
static int write_file(struct ffs_fork *f, int dir, const struct ffs_staged *add,
	const struct ffs_staged *drop, bool fresh, struct ffs_error *err)
{
	struct ffs_fs *fs = f->named->sbx->fs;
	_cleanup_free_ char *text = NULL;
	size_t len = 0;
	bool there = false;
	int r = text_of(f, add, drop, &text, &len, err);

	if (r < 0)
		return r;
	r = ffs_fork_file_write(dir, f->name, text, len);
	if (r < 0)
		return cannot(f, -r, "written to", err);
	r = ffs_fork_file_publish(dir, f->name, fresh, &there);
	if (r == -EEXIST)
		return ffs_error_set(err, EEXIST, "the store has a file of a fork '%s' already", f->name);
	if (there && r < 0) {
		struct ffs_error why = {0};

		cannot(f, -r, "published in", &why);
		pthread_mutex_lock(&fs->lock);
		f->failure = why;
		pthread_mutex_unlock(&fs->lock);
	}
	return r < 0 ? cannot(f, -r, "published in", err) : 0;
}

static int remove_file(struct ffs_fork *f, int dir, struct ffs_error *err)
{
	int r = FFS_FAULT("fork-remove");

	if (!r)
		r = ffs_fork_file_remove(dir, f->name);
	/* by hand, or by one of us that could not say so */
	return r < 0 && r != -ENOENT ? cannot(f, -r, "removed from", err) : 0;
}

/* ---- changes ---- */

int ffs_fork_keep_new(struct ffs_fork *f, struct ffs_error *err)
{
	struct ffs_fs *fs = f->named->sbx->fs;
	_cleanup_close_ int dir = -1;
	struct ffs_error why = {0};

	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	int r = ffs_fork_may_add(f, err);

	pthread_mutex_unlock(&fs->lock);
	if (!r)
		r = directory(f, &dir, err);
	if (!r && dir >= 0)
		r = write_file(f, dir, NULL, NULL, true, err);
	/* its failure was of that last step */
	bool there = !r || f->failure.code;

	if (!r) {
		pthread_mutex_lock(&fs->lock);
		r = ffs_fork_add(f, err);
		pthread_mutex_unlock(&fs->lock);
	}
	if (r < 0 && there && dir >= 0 && remove_file(f, dir, &why) < 0)
		ffs_log(FFS_LOG_WARN, "%s", why.text);
	pthread_mutex_unlock(&fs->names);
	return r;
}

/* Tree lock held. */
static void begin(struct ffs_fork *f, int r)
{
	f->changing = !r;
}

int ffs_fork_keep_staged(struct ffs_fork *f, struct ffs_staged *s, struct ffs_error *err)
{
	struct ffs_fs *fs = f->named->sbx->fs;
	_cleanup_close_ int dir = -1;

	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	int r = ffs_fork_may_stage(f, &s->box.frame, NULL, err);

	begin(f, r);
	pthread_mutex_unlock(&fs->lock);
	if (!r)
		r = directory(f, &dir, err);
	if (!r && dir >= 0)
		r = write_file(f, dir, s, NULL, false, err);
	pthread_mutex_lock(&fs->lock);
	f->changing = false;
	if (!r) {
		r = ffs_fork_stage(f, s, false, err);
		/* no memory: the store has what the tree has not */
		if (r < 0 && dir >= 0)
			ffs_error_set(&f->failure, EIO, "fork '%s' is not what the store has: make another",
				f->name);
	}
	pthread_mutex_unlock(&fs->lock);
	pthread_mutex_unlock(&fs->names);
	return r;
}

int ffs_fork_keep_unstaged(struct ffs_fork *f, const char *text, struct ffs_error *err)
{
	struct ffs_fs *fs = f->named->sbx->fs;
	_cleanup_close_ int dir = -1;

	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	/* changes of a fork come one after the other: it stays until we have the lock again */
	const struct ffs_staged *s = ffs_fork_staged(f, text);
	int r = ffs_fork_may_unstage(f, text, err);

	begin(f, r);
	pthread_mutex_unlock(&fs->lock);
	if (!r)
		r = directory(f, &dir, err);
	if (!r && dir >= 0)
		r = write_file(f, dir, NULL, s, false, err);
	pthread_mutex_lock(&fs->lock);
	f->changing = false;
	if (!r)
		r = ffs_fork_unstage(f, text, err);
	pthread_mutex_unlock(&fs->lock);
	pthread_mutex_unlock(&fs->names);
	return r;
}

int ffs_fork_keep_removed(struct ffs_fork *f, struct ffs_error *err)
{
	struct ffs_fs *fs = f->named->sbx->fs;
	_cleanup_close_ int dir = -1;
	int r = 0;

	pthread_mutex_lock(&fs->names);
	pthread_mutex_lock(&fs->lock);
	if (f->removed)
		r = ffs_error_set(err, ENOENT, "fork '%s' was removed", f->name);
	pthread_mutex_unlock(&fs->lock);
	if (!r)
		r = directory(f, &dir, err);
	if (!r && dir >= 0)
		r = remove_file(f, dir, err);
	if (!r) {
		pthread_mutex_lock(&fs->lock);
		ffs_fork_remove(f);
		pthread_mutex_unlock(&fs->lock);
	}
	pthread_mutex_unlock(&fs->names);
	return r;
}

/* ---- back ---- */

struct loading {
	struct ffs_fs *fs;
	struct ffs_stored *stored;
	struct ffs_list *out;
};

/* The boxes of a record, which gives away its texts. */
static int take_boxes(struct ffs_fork *f, struct ffs_fork_record *r)
{
	for (unsigned i = 0; i < r->n; i++) {
		struct ffs_staged *s = calloc(1, sizeof(*s));

		if (!s || ffs_overlay_set(f->overlay, r->box[i].frame.offset, r->box[i].page) < 0) {
			free(s);
			return -ENOMEM;
		}
		s->box = r->box[i];
		r->box[i].text = NULL;
		ffs_list_add(&f->staged, &s->link);
		f->n_staged++;
	}
	return 0;
}

static int load_one(void *arg, const char *name)
{
	const struct loading *l = arg;
	struct ffs_fork_record r = {0};
	struct ffs_error why = {0};

	pthread_mutex_lock(&l->fs->lock);
	struct ffs_fork *f = ffs_fork_new(l->fs, NULL, name);

	pthread_mutex_unlock(&l->fs->lock);
	if (!f)
		return -ENOMEM;
	f->fixed = true;
	if (ffs_stored_fork(l->stored, name, &r, &why) == 0) {
		memcpy(f->epoch, r.epoch, sizeof(f->epoch));
		ffs_uuid_text(f->epoch, f->id);
		f->time_ns = r.made_ns;
		if (take_boxes(f, &r) < 0)
			ffs_error_set(&why, ENOMEM, "no memory for fork '%s'", name);
		else if (r.ack_port)
			ffs_ack_listen_again(l->fs, f, r.ack_port);
	}
	ffs_fork_record_clear(&r);
	if (why.code) {
		f->failure = why;
		ffs_log(FFS_LOG_WARN, "store: fork '%s' can't be used: %s", name, why.text);
	}
	ffs_list_add(l->out, &f->link);
	return 0;
}

void ffs_forks_load(struct ffs_fs *fs, struct ffs_stored *stored, struct ffs_list *out)
{
	struct loading l = {.fs = fs, .stored = stored, .out = out};
	int r = ffs_fork_files_sweep(ffs_stored_dirfd(stored));

	if (!r)
		r = ffs_fork_files_each(ffs_stored_dirfd(stored), load_one, &l);
	if (r < 0)
		ffs_log(FFS_LOG_WARN, "store: the forks of branch %s can't be found: %s",
			ffs_stored_id(stored), strerror(-r));
}

void ffs_forks_adopt(struct ffs_named *named, struct ffs_list *loaded)
{
	while (!ffs_list_empty(loaded)) {
		struct ffs_fork *f = ffs_container(loaded->next, struct ffs_fork, link);

		ffs_list_del(&f->link);
		f->named = ffs_named_ref(named);
		ffs_list_add(&named->forks, &f->link);
	}
}

void ffs_forks_forget(struct ffs_list *loaded)
{
	while (!ffs_list_empty(loaded)) {
		struct ffs_fork *f = ffs_container(loaded->next, struct ffs_fork, link);

		ffs_list_del(&f->link);
		ffs_fork_unref(f);
	}
}
