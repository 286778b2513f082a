/* What status and manifest.json say: JSON objects made from a sandbox's or a branch's fields. Any thread;
 * takes the owner's lock for a moment. */
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "branch/internal.h"

static void add_u64(struct json_object *obj, const char *key, uint64_t v)
{
	json_object_object_add(obj, key, json_object_new_uint64(v));
}

static void add_str(struct json_object *obj, const char *key, const char *v)
{
	json_object_object_add(obj, key, v ? json_object_new_string(v) : NULL);
}

static void add_time(struct json_object *obj, const char *key, uint64_t wall_ns)
{
	time_t s = (time_t)(wall_ns / FFS_NS_PER_S);
	struct tm tm;
	char text[64];

	gmtime_r(&s, &tm);
	snprintf(text, sizeof(text), "%04d-%02d-%02dT%02d:%02d:%02d.%06luZ", tm.tm_year + 1900, tm.tm_mon + 1,
		tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, (unsigned long)(wall_ns % FFS_NS_PER_S / 1000));
	add_str(obj, key, text);
}

/* A copy of a value that other threads may be reading: json-c counts references without atomics, so it cannot
 * be shared. NULL for NULL. */
static struct json_object *copy_of(struct json_object *v)
{
	struct json_object *copy = NULL;

	if (v && json_object_deep_copy(v, &copy, NULL) < 0)
		return NULL; /* out of memory: the key says null */
	return copy;
}

/* Copy every key of `from` into `to`. */
static void add_all(struct json_object *to, struct json_object *from)
{
	if (!from)
		return;
	json_object_object_foreach(from, key, value) json_object_object_add(to, key, copy_of(value));
}

/* The value of a driver's key under another name; null when the driver did not say. */
static void add_renamed(struct json_object *to, const char *key, struct json_object *from, const char *theirs)
{
	struct json_object *v = NULL;

	if (from)
		json_object_object_get_ex(from, theirs, &v);
	json_object_object_add(to, key, copy_of(v));
}

void ffs_report_phases(struct json_object *obj, const struct ffs_phases *p)
{
	struct json_object *ph = json_object_new_object();

	add_u64(obj, "pause_ns", p->pause_ns);
	add_u64(ph, "scan_ns", p->scan_ns);
	add_u64(ph, "prearm_ns", p->prearm_ns);
	add_u64(ph, "converge_ns", p->converge_ns);
	add_u64(ph, "stop_ns", p->stop_ns);
	add_u64(ph, "vmstate_ns", p->vmstate_ns);
	add_u64(ph, "arm_ns", p->arm_ns);
	add_u64(ph, "disks_ns", p->disks_ns);
	add_u64(ph, "resume_ns", p->resume_ns);
	add_u64(ph, "capture_ns", p->capture_ns);
	json_object_object_add(obj, "phases", ph);
	add_u64(obj, "converge_rounds", p->converge_rounds);
	add_u64(obj, "dirty_at_pause_pages", p->dirty_at_pause);
	json_object_object_add(obj, "priority_lent", json_object_new_boolean(p->priority_lent));
}

struct json_object *ffs_report_regions(const struct ffs_geometry *geo)
{
	static const char *const kinds[] = {"shared", "anonymous", "private-file"};
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < geo->n_ranges; i++) {
		const struct ffs_gpa_range *g = &geo->ranges[i];
		const struct ffs_region *r = NULL;

		for (unsigned k = 0; k < geo->n_regions && !r; k++)
			if (g->offset >= geo->regions[k].offset &&
				g->offset - geo->regions[k].offset < geo->regions[k].size)
				r = &geo->regions[k];
		struct json_object *o = json_object_new_object();

		add_str(o, "name", r ? r->name : "");
		add_u64(o, "gpa", g->gpa);
		add_u64(o, "offset", g->offset);
		add_u64(o, "size", g->size);
		add_u64(o, "page_size", r ? r->page_size : 0);
		add_str(o, "kind", r ? kinds[r->kind] : "");
		json_object_array_add(list, o);
	}
	return list;
}

/* As attach takes them: {"ID":"PATH"}. */
static struct json_object *named_disks(const struct ffs_sandbox *sb)
{
	struct json_object *o = json_object_new_object();

	for (unsigned i = 0; sb->disks && i < sb->disks->n; i++)
		add_str(o, sb->disks->disk[i].id, sb->disks->disk[i].path);
	return o;
}

static void add_waiting(void *list, const char *name, unsigned place)
{
	struct json_object *o = json_object_new_object();

	add_str(o, "name", name);
	add_u64(o, "place", place);
	json_object_array_add(list, o);
}

int ffs_sandbox_status(struct ffs_sandbox *sb, struct json_object **out)
{
	struct json_object *o = json_object_new_object();
	enum ffs_run_state state = ffs_sandbox_state(sb);
	unsigned in_flight = 0;
	uint64_t faults = 0, fault_max = 0;
	bool realtime = false;

	if (!o)
		return -ENOMEM;
	add_str(o, "name", sb->name);
	add_u64(o, "pid", (uint64_t)sb->proc.pid);
	add_str(o, "state", ffs_run_state_name(state));
	pthread_mutex_lock(&sb->lock);
	add_str(o, "vmm", sb->vmm_kind);
	add_renamed(o, "vmm_version", sb->vmm_desc, "version");
	add_renamed(o, "accelerator", sb->vmm_desc, "accelerator");
	add_renamed(o, "vmstate_kind", sb->vmm_desc, "vmstate_kind");
	add_renamed(o, "resets_vsock", sb->vmm_desc, "resets_vsock");
	json_object_object_add(o, "attached", json_object_new_boolean(!sb->detached));
	add_u64(o, "memory_bytes", sb->geo.memory_size);
	json_object_object_add(o, "regions", ffs_report_regions(&sb->geo));
	json_object_object_add(o, "tracking", json_object_new_boolean(sb->track));
	json_object_object_add(o, "disks", named_disks(sb));
	if (sb->findings)
		json_object_object_add(o, "findings", copy_of(sb->findings));
	if (sb->tracker) {
		for (unsigned i = 0; i < FFS_SLOTS; i++)
			in_flight += atomic_load(&sb->tracker->slots[i].branch) != NULL;
		realtime = atomic_load(&sb->tracker->handler_rt);
		faults = atomic_load(&sb->tracker->faults);
		fault_max = atomic_load(&sb->tracker->fault_max_ns);
	}
	json_object_object_add(o, "handler_realtime", json_object_new_boolean(realtime));
	add_u64(o, "in_flight", in_flight);
	add_u64(o, "faults", faults);
	add_u64(o, "fault_max_ns", fault_max);
	struct json_object *queue = json_object_new_array();

	ffs_permits_queue(sb->engine->permits, &sb->permits, add_waiting, queue);
	json_object_object_add(o, "queue", queue);
	add_u64(o, "branches_taken", sb->branches_taken);
	struct json_object *last = NULL;

	if (sb->branches_taken) {
		last = json_object_new_object();
		ffs_report_phases(last, &sb->last);
	}
	json_object_object_add(o, "last_branch", last);
	pthread_mutex_unlock(&sb->lock);
	*out = o;
	return 0;
}

static struct json_object *histogram(struct ffs_branch *b)
{
	struct json_object *list = json_object_new_array();
	unsigned top = 0;

	for (unsigned i = 0; i < FFS_LATENCY_BUCKETS; i++)
		if (atomic_load(&b->latency[i]))
			top = i + 1;
	for (unsigned i = 0; i < top; i++)
		json_object_array_add(list, json_object_new_uint64(atomic_load(&b->latency[i])));
	return list;
}

static void add_branch_head(struct json_object *o, struct ffs_branch *b)
{
	add_str(o, "id", b->id);
	add_str(o, "sandbox", b->sandbox);
	add_str(o, "name", b->name[0] ? b->name : NULL);
	add_time(o, "instant", b->instant_wall_ns);
	add_str(o, "mode", ffs_branch_mode_name(b->mode));
	add_str(o, "parent", b->layer ? ffs_layer_parent(b->layer) : NULL);
	if (b->torn)
		json_object_object_add(o, "torn_possible", copy_of(b->torn));
}

/* What a restore has to know of the VMM; in the status too, for a child may be started while the branch is written. */
static void add_vmm(struct json_object *o, const struct ffs_branch *b)
{
	struct json_object *vmm = json_object_new_object();

	add_str(vmm, "kind", b->vmm_kind);
	add_all(vmm, b->vmm);
	json_object_object_add(o, "vmm", vmm);
}

static void add_disks(struct json_object *o, const struct ffs_branch *b)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < b->disks.n; i++) {
		const struct ffs_disk_image *img = &b->disks.image[i];
		struct json_object *d = json_object_new_object();
		char text[200];

		add_str(d, "id", img->id);
		add_str(d, "path", img->path);
		add_u64(d, "size", img->size);
		add_str(d, "how", img->copied ? "copy" : "clone");
		add_u64(d, "capture_ns", img->capture_ns);
		if (img->copied) {
			snprintf(text, sizeof(text),
				"the file system of this disk shares no blocks: it was copied inside the "
				"pause, which became %.1f ms "
				"longer",
				(double)img->capture_ns / 1e6);
			add_str(d, "warning", text);
		}
		json_object_array_add(list, d);
	}
	json_object_object_add(o, "disks", list);
	if (b->disks.n) {
		add_u64(o, "disk_flush_ns", b->disks.flush_ns);
		add_u64(o, "disk_flush_rounds", b->disks.flush_rounds);
	}
}

/* *memory, which may be NULL: what its image counts for. */
static struct ffs_phases phases_now(struct ffs_branch *b, enum ffs_branch_state *state, uint64_t *memory)
{
	pthread_mutex_lock(&b->lock);
	struct ffs_phases p = b->phases;

	if (memory)
		*memory = b->memory_reserved + b->memory_taken;
	*state = ffs_branch_state(b);
	pthread_mutex_unlock(&b->lock);
	return p;
}

int ffs_branch_status(struct ffs_branch *b, struct json_object **out)
{
	struct json_object *o = json_object_new_object();
	enum ffs_branch_state state;
	struct ffs_error why = {0};

	if (!o)
		return -ENOMEM;
	uint64_t memory;
	struct ffs_phases ph = phases_now(b, &state, &memory);

	ffs_branch_failure(b, &why);
	add_branch_head(o, b);
	add_str(o, "state", ffs_branch_state_name(state));
	add_str(o, "error", why.code ? why.text : NULL);
	add_str(o, "store", "memory"); /* gone with the daemon */
	add_u64(o, "memory_bytes", b->geo.memory_size);
	add_u64(o, "captured_bytes", b->geo.memory_size - atomic_load(&b->remaining));
	add_u64(o, "shared_bytes", b->shared_bytes); /* with the parent: neither copied nor held */
	add_u64(o, "image_bytes", memory);
	add_u64(o, "vmstate_bytes", b->vmstate_size);
	add_disks(o, b);
	add_vmm(o, b);
	ffs_report_phases(o, &ph);
	add_u64(o, "faults", atomic_load(&b->faults));
	add_u64(o, "fault_max_ns", atomic_load(&b->fault_max_ns));
	/* [i]: faults served in less than 2^i microseconds (and not in [i-1]) */
	json_object_object_add(o, "fault_histogram_us", histogram(b));
	*out = o;
	return 0;
}

int ffs_branch_manifest(struct ffs_branch *b, struct json_object **out)
{
	enum ffs_branch_state state;
	struct ffs_phases ph = phases_now(b, &state, NULL);

	if (state != FFS_BRANCH_READY)
		return state == FFS_BRANCH_WRITING ? -EAGAIN : -EIO;
	struct json_object *o = json_object_new_object(), *mem = json_object_new_object(),
			   *vs = json_object_new_object();

	if (!o || !mem || !vs) {
		json_object_put(o);
		json_object_put(mem);
		json_object_put(vs);
		return -ENOMEM;
	}
	add_u64(o, "format", 1);
	add_branch_head(o, b);
	add_u64(mem, "size", b->geo.memory_size);
	json_object_object_add(mem, "regions", ffs_report_regions(&b->geo));
	json_object_object_add(o, "memory", mem);
	add_u64(vs, "size", b->vmstate_size);
	json_object_object_add(o, "vmstate", vs);
	add_disks(o, b);
	add_vmm(o, b);
	ffs_report_phases(o, &ph);
	add_u64(o, "faults", atomic_load(&b->faults));
	*out = o;
	return 0;
}
