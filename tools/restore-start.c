/* One child, in three steps: from nothing to loaded, where the branch was taken; from there to running, with what a fork has
 * over its branch; and what its guest has to say before it counts. And the line that tells of it.
 *
 * The thread of the child, which may be another one for each step: what the plan has is read only by then. No locks of its
 * own; the process is started under the caller's, so that a signal ends either none or this one. */
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "restore.h"

const struct ffs_argv *ffs_restore_environment(const struct ffs_restore *r)
{
	return r->ops->environment ? r->ops->environment(r) : &r->conf.env;
}

static int spawn(struct ffs_restore *r, struct ffs_child *c, const struct ffs_restore_gate *gate,
	const struct ffs_argv *argv, struct ffs_error *err)
{
	int got = 0;

	pthread_mutex_lock(gate->lock);
	if (*gate->closed)
		got = ffs_error_set(err, EINTR, "interrupted");
	else
		got = ffs_child_spawn(c, argv, ffs_restore_environment(r), err);
	pthread_mutex_unlock(gate->lock);
	return got;
}

int ffs_restore_load(struct ffs_restore *r, struct ffs_child *c, const struct ffs_restore_gate *gate,
	struct ffs_error *err)
{
	struct ffs_argv argv = {0};
	int got = ffs_child_give(c, FFS_CHILD_MEMORY, r->memory_fd, err);

	c->began_ns = ffs_now_ns() - r->began_ns;
	if (!got)
		got = r->ops->command(r, c, &argv, err);
	if (!got && r->healthy)
		got = ffs_restore_agent_find(c, &argv, err);
	if (!got)
		got = spawn(r, c, gate, &argv, err);
	ffs_argv_free(&argv);
	if (got < 0)
		return got;
	c->started_ns = ffs_now_ns() - r->began_ns;
	got = r->ops->load(r, c, err);
	if (got < 0) {
		r->ops->let_go(r, c);
		return ffs_child_explain(c, got, err);
	}
	c->loaded_ns = ffs_now_ns() - r->began_ns;
	return 0;
}

int ffs_restore_run(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	int got = ffs_restore_hooks_loaded(r, c, err);

	if (!got)
		got = ffs_restore_fork_write(r, c, err);
	ffs_restore_hooks_resuming(c);
	if (!got && !r->paused)
		got = r->ops->run(r, c, err);
	c->running_ns = ffs_now_ns() - r->began_ns;
	r->ops->let_go(r, c);
	return got < 0 ? ffs_child_explain(c, got, err) : 0;
}

int ffs_restore_await(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	int got = ffs_restore_hooks_after_resume(r, c, err);

	c->acknowledged_ns = ffs_now_ns() - r->began_ns;
	if (!got && r->healthy)
		got = ffs_restore_agent_await(r, c, err);
	return got < 0 ? ffs_child_explain(c, got, err) : 0;
}

struct json_object *ffs_restore_line(struct ffs_restore *r, const struct ffs_child *c)
{
	struct json_object *o = json_object_new_object(), *times = json_object_new_object();
	char text[160];

	json_object_object_add(o, "child", json_object_new_int((int)c->number));
	json_object_object_add(o, "pid", json_object_new_int(c->pid));
	snprintf(text, sizeof(text), "%s/%s", r->target.sandbox, r->target.branch);
	json_object_object_add(o, "branch", json_object_new_string(text));
	json_object_object_add(o, "fork", r->target.fork[0] ? json_object_new_string(r->target.fork) : NULL);
	json_object_object_add(o, "sandbox", c->name[0] ? json_object_new_string(c->name) : NULL);
	json_object_object_add(o, "state", json_object_new_string(r->paused ? "paused" : "running"));
	json_object_object_add(o, "dir", json_object_new_string(c->dir));
	json_object_object_add(o, "jail", c->jail[0] ? json_object_new_string(c->jail) : NULL);
	json_object_object_add(o, "sockets", json_object_get(c->sockets));
	json_object_object_add(times, "started_ns", json_object_new_uint64(c->started_ns));
	json_object_object_add(times, "loaded_ns", json_object_new_uint64(c->loaded_ns));
	json_object_object_add(times, "running_ns", r->paused ? NULL : json_object_new_uint64(c->running_ns));
	json_object_object_add(
		times, "acknowledged_ns", c->ack ? json_object_new_uint64(c->acknowledged_ns) : NULL);
	if (r->healthy)
		json_object_object_add(times, "healthy_ns", json_object_new_uint64(c->healthy_ns));
	json_object_object_add(o, "times", times);
	if (c->ack) {
		json_object_object_add(o, "acks", ffs_restore_ack_json(c));
		json_object_object_add(o, "acks_ignored", ffs_restore_ack_ignored_json(c));
	}
	if (json_object_array_length(r->notes))
		json_object_object_add(o, "notes", json_object_get(r->notes));
	return o;
}
