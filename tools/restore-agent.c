/* The wait until the agent in a child's guest is healthy, and what it took: timing.json in the child's directory.
 *
 * The handshake itself is the link's (agent-link.h), which is started here and lives as long as the VM; a command in the
 * guest finds it there. Threads: the child's, any number side by side; no locks. What waits here, waits for the link's
 * answer and for the end of the VM, and each edge of the handshake has a time of its own. */
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent-handshake.h"
#include "agent-link.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "restore.h"

int ffs_restore_agent_find(struct ffs_child *c, const struct ffs_argv *argv, struct ffs_error *err)
{
	int got = argv->failed ? ffs_error_set(err, ENOMEM, "no memory for a command line")
			       : ffs_agent_find_in(argv->word, argv->n, c->dir, &c->agent, err);

	if (!got)
		json_object_object_add(c->sockets, "agent", json_object_new_string(c->agent));
	return got;
}

/* ---- timing.json ---- */

/* The time from `*at` to `now` is the phase's; both since the command began. A link that somebody else has started has
 * edges from before our own: they took no time of ours. So the phases are the total, whatever happened. */
static void add_phase(struct json_object *phases, const char *name, uint64_t *at, uint64_t now)
{
	json_object_object_add(phases, name, json_object_new_uint64(now > *at ? now - *at : 0));
	if (now > *at)
		*at = now;
}

static struct json_object *make_timing(
	const struct ffs_restore *r, struct ffs_child *c, struct json_object *said)
{
	struct json_object *o = json_object_new_object(), *phases = json_object_new_object(),
			   *edges = ffs_json_get(said, "phases_ns");
	uint64_t at = c->began_ns, edge = ffs_json_u64(said, "began_ns") - r->began_ns;
	char branch[140];

	add_phase(phases, "start", &at, c->started_ns);
	add_phase(phases, "load", &at, c->loaded_ns);
	add_phase(phases, "run", &at, c->running_ns);
	add_phase(phases, "mailboxes", &at, c->acknowledged_ns);
	for (enum ffs_edge e = 0; e < FFS_EDGES; e++) {
		edge += ffs_json_u64(edges, ffs_edge_name(e));
		add_phase(phases, ffs_edge_name(e), &at, edge);
	}
	c->healthy_ns = at;
	snprintf(branch, sizeof(branch), "%s/%s", r->target.sandbox, r->target.branch);
	json_object_object_add(o, "child", json_object_new_int((int)c->number));
	json_object_object_add(o, "pid", json_object_new_int(c->pid));
	json_object_object_add(o, "branch", json_object_new_string(branch));
	json_object_object_add(o, "fork", r->target.fork[0] ? json_object_new_string(r->target.fork) : NULL);
	for (const char *const *key = (const char *const[]){"epoch", "guest_was", NULL}; *key; key++)
		json_object_object_add(o, *key, json_object_new_string(ffs_json_string(said, *key)));
	json_object_object_add(o, "phases_ns", phases);
	json_object_object_add(o, "guest_ns", json_object_get(ffs_json_get(said, "guest_ns")));
	json_object_object_add(o, "total_ns", json_object_new_uint64(at - c->began_ns));
	return o;
}

/* Whole or not there. */
static int write_timing(const struct ffs_child *c, struct json_object *timing, struct ffs_error *err)
{
	const char *text = json_object_to_json_string_ext(
		timing, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
	char path[130], fresh[140];
	_cleanup_close_ int fd = -1;

	snprintf(path, sizeof(path), "%s/timing.json", c->dir);
	snprintf(fresh, sizeof(fresh), "%s.new", path);
	fd = open(fresh, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0 || ffs_write_full(fd, text, strlen(text)) < 0 || ffs_write_full(fd, "\n", 1) < 0 ||
		rename(fresh, path) < 0)
		return ffs_error_errno(err, errno, "%s, the times of the child", path);
	return 0;
}

/* ---- the wait ---- */

int ffs_restore_agent_await(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	const struct ffs_agent_link link = {.socket = c->agent, .pid = c->pid, .ready_s = r->ready_s};
	struct json_object *said, *timing;
	_cleanup_close_ int fd = ffs_agent_dial(&link, err);
	_cleanup_free_ char *json = NULL;
	int got = fd < 0 ? fd : ffs_agent_wait(fd, c->pidfd, &json, err);

	if (got < 0)
		return got;
	said = json_tokener_parse(json);
	if (!json_object_is_type(said, json_type_object)) {
		json_object_put(said);
		return ffs_error_set(
			err, EPROTO, "the link to the guest's agent says nothing that can be understood");
	}
	timing = make_timing(r, c, said);
	got = write_timing(c, timing, err);
	json_object_put(timing);
	json_object_put(said);
	return got;
}
