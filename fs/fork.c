/* Owns forks: their life, what is staged in them, and what they say of themselves.
 *
 * Threads: any, tree lock held, but for ffs_fork_manifest() and the two FUSE handlers, which take it; these go to the
 * pool, because the store has a fork before the tree (fork-store.c). Nothing else here waits; guest memory is read by
 * stage.c. */
#include "fork.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ack.h"
#include "base/util.h"
#include "box.h"
#include "park.h"
#include "text.h"

struct ffs_fork *ffs_fork_new(struct ffs_fs *fs, struct ffs_named *named, const char *name)
{
	struct ffs_fork *f = calloc(1, sizeof(*f));

	if (!f)
		return NULL;
	f->overlay = ffs_overlay_new();
	if (!f->overlay) {
		free(f);
		return NULL;
	}
	f->refs = 1;
	f->serial = fs->next_serial++;
	snprintf(f->name, sizeof(f->name), "%s", name);
	ffs_uuid_new(f->epoch);
	ffs_uuid_text(f->epoch, f->id);
	f->named = named ? ffs_named_ref(named) : NULL;
	f->time_ns = ffs_wall_ns();
	ffs_list_init(&f->staged);
	ffs_list_init(&f->tokens);
	return f;
}

struct ffs_fork *ffs_fork_ref(struct ffs_fork *f)
{
	f->refs++;
	return f;
}

void ffs_staged_free(struct ffs_staged *s)
{
	if (!s)
		return;
	free(s->box.text);
	free(s);
}

void ffs_fork_unref(struct ffs_fork *f)
{
	if (!f || --f->refs)
		return;
	while (!ffs_list_empty(&f->staged)) {
		struct ffs_staged *s = ffs_container(f->staged.next, struct ffs_staged, link);

		ffs_list_del(&s->link);
		ffs_staged_free(s);
	}
	ffs_ack_free(f);
	ffs_tokens_free(&f->tokens);
	ffs_overlay_unref(f->overlay);
	ffs_named_unref(f->named);
	free(f);
}

struct ffs_fork *ffs_fork_find(struct ffs_named *named, const char *name)
{
	for (struct ffs_list *e = named->forks.next; e != &named->forks; e = e->next) {
		struct ffs_fork *f = ffs_container(e, struct ffs_fork, link);

		if (strcmp(f->name, name) == 0)
			return f;
	}
	return NULL;
}

int ffs_fork_may_add(const struct ffs_fork *f, struct ffs_error *err)
{
	struct ffs_named *n = f->named;

	if (!n->shot)
		return ffs_error_set(err, ENOENT, "the branch was removed");
	if (n->shot->state == FFS_BRANCH_FAILED)
		return ffs_error_set(err, EIO, "branch '%s' failed: %.400s", n->name, n->shot->failure.text);
	if (ffs_fork_find(n, f->name))
		return ffs_error_set(err, EEXIST, "branch '%s' has a fork '%s' already", n->name, f->name);
	return 0;
}

int ffs_fork_add(struct ffs_fork *f, struct ffs_error *err)
{
	int r = ffs_fork_may_add(f, err);

	if (!r)
		ffs_list_add(&f->named->forks, &ffs_fork_ref(f)->link);
	return r;
}

void ffs_fork_remove(struct ffs_fork *f)
{
	if (f->removed)
		return;
	f->removed = true;
	if (f->ack)
		ffs_ack_wake(f->named->sbx->fs);
	ffs_list_del(&f->link);
	ffs_fork_unref(f);
}

void ffs_forks_drop(struct ffs_named *named)
{
	while (!ffs_list_empty(&named->forks))
		ffs_fork_remove(ffs_container(named->forks.next, struct ffs_fork, link));
}

/* ---- payloads ---- */

static struct ffs_staged *at_frame(const struct ffs_fork *f, uint64_t offset)
{
	for (struct ffs_list *e = f->staged.next; e != &f->staged; e = e->next) {
		struct ffs_staged *s = ffs_container(e, struct ffs_staged, link);

		if (s->box.frame.offset == offset)
			return s;
	}
	return NULL;
}

static int check_fixed(const struct ffs_fork *f, struct ffs_error *err)
{
	if (f->failure.code)
		return ffs_error_set(err, EIO, "%s", f->failure.text);
	if (!f->fixed)
		return 0;
	return ffs_error_set(err, EBUSY,
		f->named ? "fork '%s' was read, or made before the daemon began: it never changes again; "
			   "make another"
			 : "the snapshot%s that it was meant for was read meanwhile",
		f->name);
}

int ffs_fork_may_stage(const struct ffs_fork *f, const struct ffs_mailbox_frame *frame,
	const struct ffs_gen_who *who, struct ffs_error *err)
{
	const struct ffs_staged *old = at_frame(f, frame->offset);
	int r = check_fixed(f, err);

	if (r < 0)
		return r;
	if (f->removed)
		return ffs_error_set(err, ENOENT, "fork '%s' was removed", f->name);
	if (old && who && (!who->tgid || old->who.tgid != who->tgid || old->who.start != who->start))
		return ffs_error_set(err, EBUSY,
			"process %d of this session has a payload for mailbox '%s', which nobody has read "
			"yet: rm it "
			"first",
			(int)old->who.tgid, frame->id.name);
	if (!old && f->n_staged == FFS_MAILBOX_MAX)
		return ffs_error_set(
			err, E2BIG, "at most %u mailboxes of a fork get a payload", FFS_MAILBOX_MAX);
	return 0;
}

int ffs_fork_stage(struct ffs_fork *f, struct ffs_staged *s, bool own_only, struct ffs_error *err)
{
	int r = ffs_fork_may_stage(f, &s->box.frame, own_only ? &s->who : NULL, err);

	if (r < 0)
		return r;
	if (ffs_overlay_set(f->overlay, s->box.frame.offset, s->box.page) < 0)
		return ffs_error_set(err, ENOMEM, "no memory for the payload");
	struct ffs_staged *old = at_frame(f, s->box.frame.offset);

	if (old) {
		ffs_list_del(&old->link);
		ffs_staged_free(old);
	} else {
		f->n_staged++;
	}
	ffs_list_add(&f->staged, &s->link);
	ffs_ack_expect(f);
	return 0;
}

struct ffs_staged *ffs_fork_staged(const struct ffs_fork *f, const char *text)
{
	for (struct ffs_list *e = f->staged.next; e != &f->staged; e = e->next) {
		struct ffs_staged *s = ffs_container(e, struct ffs_staged, link);

		if (ffs_mailbox_means(&s->box.frame.id, text))
			return s;
	}
	return NULL;
}

int ffs_fork_may_unstage(const struct ffs_fork *f, const char *text, struct ffs_error *err)
{
	return ffs_fork_staged(f, text)
		       ? check_fixed(f, err)
		       : ffs_error_set(err, ENOENT, "mailbox '%.80s' has no payload to take back", text);
}

int ffs_fork_unstage(struct ffs_fork *f, const char *text, struct ffs_error *err)
{
	struct ffs_staged *s = ffs_fork_staged(f, text);
	int r = ffs_fork_may_unstage(f, text, err);

	if (r < 0)
		return r;
	ffs_overlay_remove(f->overlay, s->box.frame.offset);
	ffs_list_del(&s->link);
	f->n_staged--;
	ffs_ack_expect(f);
	ffs_staged_free(s);
	return 0;
}

/* ---- what it says ---- */

static struct json_object *staged_json(const struct ffs_staged *s)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "name", json_object_new_string(s->box.frame.id.name));
	json_object_object_add(
		o, "kind", json_object_new_string(ffs_mailbox_layout(s->box.frame.id.kind)->title));
	json_object_object_add(o, "offset", json_object_new_int64((int64_t)s->box.frame.offset));
	json_object_object_add(o, "payload_bytes", json_object_new_int64((int64_t)s->box.payload.len));
	if (s->box.wants_ack)
		json_object_object_add(o, "ack_timeout_ms", json_object_new_int64(s->box.ack_timeout_ms));
	return o;
}

struct json_object *ffs_fork_json(const struct ffs_fork *f)
{
	struct json_object *o = json_object_new_object(), *boxes = json_object_new_array(),
			   *pages = json_object_new_array();
	char when[40];

	json_object_object_add(o, "name", json_object_new_string(f->name));
	json_object_object_add(o, "epoch", json_object_new_string(f->id));
	ffs_rfc3339(f->time_ns, when);
	json_object_object_add(o, "made", json_object_new_string(when));
	json_object_object_add(o, "fixed", json_object_new_boolean(f->fixed));
	/* what it costs beyond its branch */
	json_object_object_add(o, "overlay_bytes",
		json_object_new_int64((int64_t)ffs_overlay_pages(f->overlay) * FFS_MAILBOX_PAGE));
	for (unsigned i = 0; i < ffs_overlay_pages(f->overlay); i++) {
		uint64_t at;

		ffs_overlay_page(f->overlay, i, &at);
		json_object_array_add(pages, json_object_new_int64((int64_t)at));
	}
	json_object_object_add(o, "overlay_pages", pages);
	for (struct ffs_list *e = f->staged.next; e != &f->staged; e = e->next)
		json_object_array_add(boxes, staged_json(ffs_container(e, struct ffs_staged, link)));
	json_object_object_add(o, "mailboxes", boxes);
	return o;
}

/* The branch's manifest as text; NULL: it has none. Without the tree lock. */
static char *base_manifest(struct ffs_shot *shot)
{
	if (!shot->stored)
		return shot->manifest ? strndup(shot->manifest, shot->manifest_len) : NULL;
	uint64_t size = ffs_stored_manifest_size(shot->stored);
	char *text = calloc(1, size + 1);

	if (text && ffs_stored_read_manifest(shot->stored, text, size, 0) != (ssize_t)size) {
		free(text);
		return NULL;
	}
	return text;
}

/* The checksums of the branch's own files are not those of the fork. */
static void drop_hashes(struct json_object *o)
{
	struct json_object *memory;

	json_object_object_del(o, "manifest_xxh3_128");
	json_object_object_del(o, "files");
	json_object_object_del(o, "store");
	if (!json_object_object_get_ex(o, "memory", &memory))
		return;
	json_object_object_del(memory, "xxh3_128");
	json_object_object_del(memory, "block_size");
	json_object_object_del(memory, "blocks_xxh3_128");
}

char *ffs_fork_manifest(struct ffs_fs *fs, struct ffs_fork *f, struct ffs_shot *shot, size_t *len)
{
	char *base = base_manifest(shot), *text = NULL;
	struct json_object *o = base ? json_tokener_parse(base) : NULL;

	free(base);
	if (!o)
		return NULL;
	drop_hashes(o);
	pthread_mutex_lock(&fs->lock);
	json_object_object_add(o, "fork", ffs_fork_json(f));
	pthread_mutex_unlock(&fs->lock);
	int n = asprintf(&text, "%s\n",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));

	json_object_put(o);
	*len = n < 0 ? 0 : (size_t)n;
	return n < 0 ? NULL : text;
}

/* ---- FUSE ---- */

static void mkdir_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_error err = {0};
	struct ffs_node *node = NULL;
	int r = ffs_check_name("fork", t->name, &err);

	pthread_mutex_lock(&fs->lock);
	struct ffs_fork *f = r < 0 ? NULL : ffs_fork_new(fs, t->node->named, t->name);

	pthread_mutex_unlock(&fs->lock);
	if (!r)
		r = f ? ffs_fork_keep_new(f, &err) : ffs_error_set(&err, ENOMEM, "no memory for a fork");
	pthread_mutex_lock(&fs->lock);
	if (!r) {
		struct ffs_node_key key = {.kind = FFS_KIND_FORK, .object = f->serial};

		/* without memory for it the next lookup finds it */
		node = ffs_node_get_fork(fs, &key, f);
		if (node)
			ffs_node_ref(node);
	}
	ffs_fork_unref(f);
	pthread_mutex_unlock(&fs->lock);
	if (node)
		ffs_reply_entry(fs, ffs_parked_req(t->p), node);
	else
		ffs_reply_failure(fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node),
			r < 0 ? -r : ENOMEM, &err);
}

static void rmdir_task(struct ffs_task *t)
{
	struct ffs_fs *fs = t->call.fs;
	struct ffs_error err = {0};

	pthread_mutex_lock(&fs->lock);
	struct ffs_fork *f = ffs_fork_find(t->node->named, t->name);

	if (f)
		ffs_fork_ref(f);
	pthread_mutex_unlock(&fs->lock);
	int r = f ? ffs_fork_keep_removed(f, &err)
		  : ffs_error_set(&err, ENOENT, "there is no fork '%.80s'", t->name);

	pthread_mutex_lock(&fs->lock);
	ffs_fork_unref(f);
	pthread_mutex_unlock(&fs->lock);
	ffs_reply_failure(fs, ffs_parked_req(t->p), &t->call.who, ffs_node_dir_ino(t->node), -r, &err);
}

/* It is claimed at once: what is done must be said to be done. */
static void start(
	struct ffs_call *call, struct ffs_node *dir, const char *name, void (*run)(struct ffs_task *t))
{
	struct ffs_task *t = ffs_task_new(call, false);

	if (!t)
		return;
	snprintf(t->name, sizeof(t->name), "%s", name);
	pthread_mutex_lock(&call->fs->lock);
	t->node = ffs_node_ref(dir);
	pthread_mutex_unlock(&call->fs->lock);
	if (ffs_task_claim(t))
		ffs_task_start(t, run);
	else
		ffs_task_drop(t);
}

void ffs_fork_mkdir(struct ffs_call *call, struct ffs_node *dir, const char *name)
{
	start(call, dir, name, mkdir_task);
}

void ffs_fork_rmdir(struct ffs_call *call, struct ffs_node *dir, const char *name)
{
	start(call, dir, name, rmdir_task);
}
