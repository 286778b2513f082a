/* What a pool says of itself. The main thread; nothing waits. */
#include <json-c/json.h>
#include <stdio.h>
#include <unistd.h>

#include "base/util.h"
#include "pool.h"

static const char *const state_name[FFS_POOL_STATES] = {
	"free", "starting", "idle", "handing", "out", "ending"};

static void add(struct json_object *o, const char *name, uint64_t n)
{
	json_object_object_add(o, name, json_object_new_uint64(n));
}

static struct json_object *times(const struct ffs_pool_times *t)
{
	struct json_object *o = json_object_new_object();

	add(o, "p50", ffs_pool_median(t));
	add(o, "max", t->most);
	return o;
}

static struct json_object *children(const struct pool *p, uint64_t now)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < p->book.max; i++) {
		const struct ffs_pool_place *place = &p->book.place[i];
		struct json_object *o;

		/* of the others a thread knows more */
		if (place->state != FFS_POOL_IDLE && place->state != FFS_POOL_OUT)
			continue;
		o = json_object_new_object();
		add(o, "id", place->id);
		add(o, "pid", (uint64_t)p->child[i].vm.pid);
		json_object_object_add(o, "state", json_object_new_string(state_name[place->state]));
		add(o, "since_ns", now - place->since_ns);
		json_object_object_add(o, "dir", json_object_new_string(p->child[i].vm.dir));
		json_object_array_add(list, o);
	}
	return list;
}

struct json_object *pool_status(struct pool *p)
{
	const struct ffs_pool_book *b = &p->book;
	struct json_object *o = json_object_new_object(), *ended = json_object_new_array();
	uint64_t now = ffs_now_ns();
	char name[200];

	snprintf(name, sizeof(name), "%s/%s%s%s", p->target->sandbox, p->target->branch,
		p->target->fork[0] ? "/" : "", p->target->fork);
	json_object_object_add(o, "pool", json_object_new_string(name));
	add(o, "pid", (uint64_t)getpid());
	json_object_object_add(o, "state",
		json_object_new_string(b->draining                        ? "draining"
				       : b->in_a_row >= FFS_POOL_FAILURES ? "failing"
									  : "serving"));
	add(o, "min", b->min);
	add(o, "max", b->max);
	add(o, "ttl_ns", b->ttl_ns);
	for (enum ffs_pool_state s = FFS_POOL_STARTING; s < FFS_POOL_STATES; s++)
		add(o, state_name[s], b->count[s]);
	add(o, "waiting", b->waiting);
	add(o, "hits", b->hits);
	add(o, "misses", b->misses);
	add(o, "expired", b->expired);
	add(o, "failures", b->failures);
	add(o, "died", b->died);
	add(o, "returned", b->returned);
	add(o, "released", b->released);
	add(o, "timed_out", b->timed_out);
	add(o, "refused", b->refused);
	add(o, "most_at_once", b->most);
	add(o, "failed_in_a_row", b->in_a_row);
	add(o, "retry_in_ns", ffs_pool_backs_off(b, now) ? b->retry_ns - now : 0);
	json_object_object_add(o, "last_error", b->in_a_row ? json_object_new_string(b->why.text) : NULL);
	json_object_object_add(o, "hit_ns", times(&b->hit));
	json_object_object_add(o, "miss_ns", times(&b->miss));
	json_object_object_add(o, "children", children(p, now));
	for (unsigned i = 0; i < p->n_ended; i++)
		json_object_array_add(ended, json_object_new_uint64(p->ended[i].id));
	json_object_object_add(o, "ended", ended);
	return o;
}
