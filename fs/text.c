/* Makes the content of the small files. Owns nothing.
 *
 * Threads: FUSE workers, without the tree lock (taken inside, for copying what is needed); asks the engine
 * for JSON, which never waits for a VMM. Guest memory and payloads never pass through here. */
#include "convert.h"
#include "text.h"

#include <errno.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ack.h"
#include "base/util.h"
#include "ctl.h"
#include "durable.h"
#include "events.h"
#include "fork.h"

void ffs_rfc3339(uint64_t wall_ns, char out[40])
{
	time_t s = (time_t)(wall_ns / FFS_NS_PER_S);
	struct tm tm;
	char date[24];

	gmtime_r(&s, &tm);
	strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%S", &tm);
	snprintf(out, 40, "%s.%09lluZ", date, (unsigned long long)(wall_ns % FFS_NS_PER_S));
}

static struct json_object *words(const char *const *w)
{
	struct json_object *a = json_object_new_array();

	for (; *w; w++)
		json_object_array_add(a, json_object_new_string(*w));
	return a;
}

static int from_json(struct json_object *o, char **text)
{
	int n = asprintf(text, "%s\n",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));

	json_object_put(o);
	return n < 0 ? -ENOMEM : n;
}

static int make_capabilities(struct ffs_fs *fs, char **text)
{
	static const char *const drivers[] = {"qemu", "firecracker", "coop", NULL},
				 *const modes[] = {"live", "diff", "full", NULL},
				 *const stores[] = {"memory", "dense", "packed", NULL},
				 *const no_store[] = {"memory", NULL};
	struct json_object *o = json_object_new_object();
	bool pass = atomic_load(&fs->pass.on);

	json_object_object_add(o, "version", json_object_new_string(FFS_VERSION));
	json_object_object_add(o, "pid", json_object_new_int(getpid()));
	json_object_object_add(o, "drivers", words(drivers));
	json_object_object_add(o, "modes", words(modes));
	json_object_object_add(o, "stores", words(fs->store ? stores : no_store));
	json_object_object_add(
		o, "store", fs->store ? json_object_new_string(ffs_store_path(fs->store)) : NULL);
	json_object_object_add(
		o, "default_store", json_object_new_string(ffs_store_kind_name(fs->opt.default_store)));
	json_object_object_add(o, "passthrough", json_object_new_boolean(pass));
	json_object_object_add(
		o, "passthrough_reason", pass ? NULL : json_object_new_string(fs->pass.why_off));
	json_object_object_add(o, "serving_settled", json_object_new_string(pass ? "passthrough" : "cached"));
	json_object_object_add(o, "branch_directory", json_object_new_boolean(!fs->opt.branch_off));
	json_object_object_add(o, "branch_rate", json_object_new_int64(fs->opt.branch_rate));
	json_object_object_add(o, "lease_ns", json_object_new_int64((int64_t)fs->opt.lease_ns));
	json_object_object_add(o, "memory",
		fs->opt.memory == FFS_MEMORY_AUTO        ? json_object_new_string("auto")
		: fs->opt.memory == FFS_MEMORY_UNLIMITED ? json_object_new_string("unlimited")
							 : json_object_new_uint64(fs->opt.memory));
	json_object_object_add(o, "captures", json_object_new_int64(fs->opt.captures));
	json_object_object_add(o, "allow_other", json_object_new_boolean(fs->opt.allow_other));
	json_object_object_add(o, "fuse_minor", json_object_new_int64(fs->pass.kernel_minor));
	return from_json(o, text);
}

/* ---- metrics: Prometheus text format 0.0.4 ---- */

struct tally {
	unsigned sandboxes, exited, generations, writing, ready, failed, nodes, handles;
};

static void count_tree(struct ffs_fs *fs, struct tally *t)
{
	pthread_mutex_lock(&fs->lock);
	t->nodes = ffs_nodes_count(fs);
	t->handles = ffs_handles_count(fs);
	for (struct ffs_list *e = fs->sandboxes.next; e != &fs->sandboxes; e = e->next) {
		struct ffs_sbx *s = ffs_container(e, struct ffs_sbx, link);

		t->sandboxes++;
		t->exited += s->exited;
		t->generations += ffs_gen_count(s->gens);
		for (struct ffs_list *b = s->branches.next; b != &s->branches; b = b->next) {
			struct ffs_named *n = ffs_container(b, struct ffs_named, link);
			enum ffs_branch_state state = n->shot ? n->shot->state : FFS_BRANCH_WRITING;

			t->writing += state == FFS_BRANCH_WRITING;
			t->ready += state == FFS_BRANCH_READY;
			t->failed += state == FFS_BRANCH_FAILED;
		}
	}
	pthread_mutex_unlock(&fs->lock);
}

static void metric(FILE *f, const char *name, const char *type, const char *help, unsigned long long value)
{
	fprintf(f, "# HELP forkfs_%s %s\n# TYPE forkfs_%s %s\nforkfs_%s %llu\n", name, help, name, type, name,
		value);
}

static int make_metrics(struct ffs_fs *fs, char **text)
{
	struct tally t = {0};
	struct ffs_engine_usage usage;
	struct ffs_counters *c = &fs->count;
	size_t len = 0;
	FILE *f = open_memstream(text, &len);

	if (!f)
		return -ENOMEM;
	count_tree(fs, &t);
	ffs_engine_usage(fs->engine, &usage);
	metric(f, "sandboxes", "gauge", "Sandbox directories.", t.sandboxes);
	metric(f, "sandboxes_exited", "gauge", "Sandboxes whose VM has exited.", t.exited);
	fprintf(f, "# HELP forkfs_branches Named branches.\n# TYPE forkfs_branches gauge\n");
	fprintf(f, "forkfs_branches{state=\"writing\"} %u\nforkfs_branches{state=\"ready\"} %u\n", t.writing,
		t.ready);
	fprintf(f, "forkfs_branches{state=\"failed\"} %u\n", t.failed);
	metric(f, "image_bytes", "gauge", "Memory of complete images, until their last user is gone.",
		usage.memory_taken);
	metric(f, "image_reserved_bytes", "gauge", "Memory reserved for captures in flight.",
		usage.memory_reserved);
	metric(f, "captures", "gauge", "Captures in flight.", usage.captures);
	metric(f, "captures_waiting", "gauge", "Branches that wait for a permit to capture.", usage.waiting);
	if (usage.limits.memory < FFS_MEMORY_AUTO)
		metric(f, "image_limit_bytes", "gauge", "Mount option memory=.", usage.limits.memory);
	metric(f, "cache_hits_total", "counter", "Branches asked for by a key that were there.",
		atomic_load(&c->cache_hits));
	metric(f, "cache_misses_total", "counter", "Branches asked for by a key that were taken.",
		atomic_load(&c->cache_misses));
	metric(f, "cache_pruned_total", "counter", "Cached branches let go: old, too many, in the way.",
		atomic_load(&c->cache_pruned));
	metric(f, "generations", "gauge", "Live generations of branch/.", t.generations);
	metric(f, "nodes", "gauge", "Nodes that the kernel or an open file holds.", t.nodes);
	metric(f, "open_files", "gauge", "Open files and directories.", t.handles);
	metric(f, "requests_total", "counter", "FUSE requests.", atomic_load(&c->requests));
	metric(f, "reads_total", "counter", "Reads of branches that the daemon served.",
		atomic_load(&c->reads));
	metric(f, "read_bytes_total", "counter", "Bytes of branches that the daemon served.",
		atomic_load(&c->read_bytes));
	metric(f, "generations_total", "counter", "Branches taken through branch/.",
		atomic_load(&c->generations));
	metric(f, "named_total", "counter", "Named branches taken.", atomic_load(&c->named));
	metric(f, "attaches_total", "counter", "VMs attached.", atomic_load(&c->attaches));
	metric(f, "reattached_total", "counter", "VMs of an earlier daemon that were attached again.",
		atomic_load(&c->reattached));
	metric(f, "reattaching", "gauge", "VMs of an earlier daemon that are being attached again.",
		atomic_load(&c->reattaching));
	metric(f, "reattach_failed_total", "counter",
		"VMs of an earlier daemon that are gone, or could not be attached.", atomic_load(&c->lost));
	metric(f, "rate_limited_total", "counter", "Opens of branch/ refused by branch-rate.",
		atomic_load(&c->limited));
	metric(f, "errors_total", "counter", "Requests that failed with a sentence.",
		atomic_load(&c->errors));
	metric(f, "interrupted_total", "counter", "Requests ended by a signal to their client.",
		atomic_load(&c->interrupted));
	metric(f, "acks_total", "counter", "Acknowledgements of mailboxes of forks.",
		atomic_load(&c->acks[FFS_ACK_TAKEN]));
	fprintf(f, "# HELP forkfs_acks_ignored_total Datagrams that were none, or not the ones that forks "
		   "wait for.\n"
		   "# TYPE forkfs_acks_ignored_total counter\n");
	for (enum ffs_ack_verdict v = FFS_ACK_TAKEN + 1; v < FFS_ACK_VERDICTS; v++)
		fprintf(f, "forkfs_acks_ignored_total{why=\"%s\"} %llu\n", ffs_ack_verdict_name(v),
			atomic_load(&c->acks[v]));
	metric(f, "passthrough", "gauge", "1: settled branches are served by passthrough.",
		atomic_load(&fs->pass.on));
	bool bad = ferror(f) != 0;

	return fclose(f) != 0 || bad ? -ENOMEM : (int)len;
}

/* ---- sandboxes and branches ---- */

static void add_branches(struct ffs_sbx *s, struct json_object *o)
{
	struct json_object *a = json_object_new_array();

	for (struct ffs_list *b = s->branches.next; b != &s->branches; b = b->next) {
		struct ffs_named *n = ffs_container(b, struct ffs_named, link);
		struct json_object *one;

		if (!n->shot)
			continue;
		one = json_object_new_object();
		json_object_object_add(one, "name", json_object_new_string(n->name));
		json_object_object_add(
			one, "state", json_object_new_string(ffs_branch_state_name(n->shot->state)));
		json_object_array_add(a, one);
	}
	json_object_object_add(o, "branches", a);
	json_object_object_add(o, "generations", json_object_new_int64(ffs_gen_count(s->gens)));
}

static int make_sbx_status(struct ffs_fs *fs, struct ffs_node *node, char **text, struct ffs_error *err)
{
	struct ffs_sbx *s = node->sbx;
	struct ffs_sandbox *engine = NULL;
	struct json_object *o = NULL;

	pthread_mutex_lock(&fs->lock);
	if (s->engine)
		engine = ffs_sandbox_ref(s->engine);
	else if (s->last_status)
		o = json_tokener_parse(s->last_status);
	pthread_mutex_unlock(&fs->lock);
	if (engine) {
		int r = ffs_sandbox_status(engine, &o);

		ffs_sandbox_unref(engine);
		if (r < 0)
			return ffs_error_errno(err, -r, "status of %s", s->name);
	}
	if (!o)
		o = json_object_new_object();
	pthread_mutex_lock(&fs->lock);
	json_object_object_add(o, "name", json_object_new_string(s->name));
	json_object_object_add(o, "state", json_object_new_string(ffs_sbx_state(s)));
	char when[40], owner[48];

	ffs_rfc3339(s->attached_ns, when);
	json_object_object_add(o, "attached", json_object_new_string(when));
	snprintf(owner, sizeof(owner), "%u:%u%s", (unsigned)s->uid, (unsigned)s->gid,
		s->writable ? ":rw" : "");
	json_object_object_add(o, "owner", json_object_new_string(owner));
	if (s->origin[0])
		json_object_object_add(o, "restored_from", json_object_new_string(s->origin));
	add_branches(s, o);
	pthread_mutex_unlock(&fs->lock);
	return from_json(o, text);
}

struct json_object *ffs_named_status(struct ffs_fs *fs, struct ffs_named *named)
{
	struct ffs_shot *shot;
	struct json_object *o = NULL;
	char name[sizeof(named->name)];

	pthread_mutex_lock(&fs->lock);
	shot = named->shot ? ffs_shot_ref(named->shot) : NULL;
	snprintf(name, sizeof(name), "%s", named->name);
	pthread_mutex_unlock(&fs->lock);
	if (!shot)
		return NULL;
	if (!shot->branch || ffs_branch_status(shot->branch, &o) < 0)
		o = json_object_new_object();
	ffs_durable_status(shot, o);
	pthread_mutex_lock(&fs->lock);
	/* the name of today, and the state that `state` and `wait` go by */
	json_object_object_add(o, "name", json_object_new_string(name));
	json_object_object_add(o, "sandbox", json_object_new_string(shot->sbx->name));
	ffs_convert_status(named, o);
	if (named->key)
		json_object_object_add(o, "key", json_object_new_string(named->key));
	json_object_object_add(o, "state", json_object_new_string(ffs_branch_state_name(shot->state)));
	if (shot->state == FFS_BRANCH_FAILED)
		json_object_object_add(o, "error", json_object_new_string(shot->failure.text));
	pthread_mutex_unlock(&fs->lock);
	ffs_shot_unref(shot);
	return o;
}

struct json_object *ffs_fork_status(struct ffs_fs *fs, struct ffs_fork *f)
{
	struct json_object *o = NULL;

	pthread_mutex_lock(&fs->lock);
	const struct ffs_named *n = f->named;

	if (n->shot && !f->removed) {
		o = ffs_fork_json(f);
		json_object_object_add(o, "sandbox", json_object_new_string(n->sbx->name));
		json_object_object_add(o, "branch", json_object_new_string(n->name));
		json_object_object_add(o, "branch_id", json_object_new_string(ffs_shot_id(n->shot)));
		json_object_object_add(o, "state",
			json_object_new_string(f->failure.code ? ffs_branch_state_name(FFS_BRANCH_FAILED)
							       : ffs_branch_state_name(n->shot->state)));
		if (f->failure.code)
			json_object_object_add(o, "error", json_object_new_string(f->failure.text));
		if (ffs_ack_asks(f))
			json_object_object_add(o, "ack", ffs_ack_json(f));
		/* durable as its branch is */
		json_object_object_add(o, "stored", json_object_new_boolean(n->shot->stored != NULL));
		json_object_object_add(o, "memory_bytes", json_object_new_uint64(n->memory_size));
		/* its memory is no file that the kernel could serve by itself */
		json_object_object_add(o, "serving", json_object_new_string("daemon"));
	}
	pthread_mutex_unlock(&fs->lock);
	return o;
}

static int make_named_state(struct ffs_fs *fs, struct ffs_node *node, char **text)
{
	pthread_mutex_lock(&fs->lock);
	const char *state = node->named->shot ? ffs_branch_state_name(node->named->shot->state) : NULL;

	pthread_mutex_unlock(&fs->lock);
	if (!state)
		return -ENOENT;
	int n = asprintf(text, "%s\n", state);

	return n < 0 ? -ENOMEM : n;
}

static int make_sbx_state(struct ffs_fs *fs, struct ffs_node *node, char **text)
{
	pthread_mutex_lock(&fs->lock);
	const char *state = ffs_sbx_state(node->sbx);

	pthread_mutex_unlock(&fs->lock);
	int n = asprintf(text, "%s\n", state);

	return n < 0 ? -ENOMEM : n;
}

bool ffs_text_kind(enum ffs_kind kind)
{
	return kind == FFS_KIND_VERSION || kind == FFS_KIND_CAPABILITIES || kind == FFS_KIND_METRICS ||
	       kind == FFS_KIND_SBX_STATUS || kind == FFS_KIND_SBX_STATE || kind == FFS_KIND_NAMED_STATUS ||
	       kind == FFS_KIND_NAMED_STATE || kind == FFS_KIND_FORK_STATUS || kind == FFS_KIND_FORK_RECORD;
}

int ffs_text_make(struct ffs_fs *fs, struct ffs_node *node, char **text, size_t *len, struct ffs_error *err)
{
	struct json_object *o;
	int n = -EIO;

	*text = NULL;
	switch (node->key.kind) {
	case FFS_KIND_VERSION:
		n = asprintf(text, "forkfs %s\n", FFS_VERSION);
		break;
	case FFS_KIND_CAPABILITIES:
		n = make_capabilities(fs, text);
		break;
	case FFS_KIND_METRICS:
		n = make_metrics(fs, text);
		break;
	case FFS_KIND_SBX_STATUS:
		n = make_sbx_status(fs, node, text, err);
		break;
	case FFS_KIND_SBX_STATE:
		n = make_sbx_state(fs, node, text);
		break;
	case FFS_KIND_NAMED_STATUS:
		o = ffs_named_status(fs, node->named);
		n = o ? from_json(o, text) : -ENOENT;
		break;
	case FFS_KIND_FORK_STATUS:
		o = ffs_fork_status(fs, node->fork);
		n = o ? from_json(o, text) : -ENOENT;
		break;
	case FFS_KIND_FORK_RECORD:
		return ffs_fork_record(fs, node->fork, text, len, err);
	case FFS_KIND_NAMED_STATE:
		n = make_named_state(fs, node, text);
		break;
	default:
		break;
	}
	if (n == -ENOENT)
		return ffs_error_set(err, ENOENT, "the branch was removed");
	if (n < 0)
		return n == -1 ? -ENOMEM : n;
	*len = (size_t)n;
	return 0;
}

unsigned ffs_handle_revents(struct ffs_fs *fs, const struct ffs_handle *h)
{
	const struct ffs_named *named = h->node->named;

	switch (h->node->key.kind) {
	case FFS_KIND_NAMED_WAIT:
		if (!named->shot || named->shot->state == FFS_BRANCH_FAILED)
			return POLLIN | POLLRDNORM | POLLERR;
		return named->shot->state == FFS_BRANCH_READY ? POLLIN | POLLRDNORM : 0;
	case FFS_KIND_FORK_ACK:
		return ffs_ack_readable(h->node->fork) ? POLLIN | POLLRDNORM : 0;
	case FFS_KIND_EVENTS:
		return ffs_events_pending(fs, h) ? POLLIN | POLLRDNORM : 0;
	case FFS_KIND_META_CTL:
	case FFS_KIND_SBX_CTL:
		return ffs_txn_revents(h->txn);
	case FFS_KIND_LIVE_MANIFEST:
	case FFS_KIND_NAMED_MANIFEST:
	case FFS_KIND_FORK_MANIFEST:
		return h->shot && h->shot->state == FFS_BRANCH_WRITING ? 0 : POLLIN | POLLRDNORM;
	default:
		return POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM;
	}
}
