/* forkfs health: does the agent in a guest answer now?
 *
 * One thread. It waits for the guest's answer as long as it is told to, and for nothing else; a signal ends it. */
#include "cli.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "options.h"
#include "tree.h"

#define WAIT_S 5u /* as long as the health monitor itself waits for an answer */

struct health_args {
	const char *socket, *mount, *wait;
	bool json, help;
	unsigned wait_s;
};

/* Why it is not, when its link still hopes. */
static int late(struct json_object *said, unsigned seconds, struct ffs_error *err)
{
	const char *due = ffs_json_string(said, "due");

	if (due[0])
		return ffs_error_set(err, ETIMEDOUT,
			"the guest's agent is not ready: after %u s the handshake waits at the edge '%.20s'",
			seconds, due);
	return ffs_error_set(err, ETIMEDOUT, "the guest's agent has not answered within %u s", seconds);
}

/* 1: it is; 0: it is not, *err says why; -errno. *said: what is known, NULL: nothing. */
static int ask(
	const char *name, const struct health_args *a, struct json_object **said, struct ffs_error *err)
{
	struct ffs_agent_link l = {.socket = a->socket,
		.ready_s = a->wait_s > FFS_AGENT_READY_S ? a->wait_s : FFS_AGENT_READY_S};
	_cleanup_free_ char *path = NULL, *json = NULL;
	_cleanup_close_ int fd = -1;
	int got = name ? ffs_agent_of(name, a->mount, &l.pid, &path, err) : 0;

	if (got < 0)
		return got;
	l.socket = name ? path : a->socket;
	fd = ffs_agent_dial(&l, err);
	got = fd < 0 ? fd : ffs_agent_health(fd, a->wait_s, &json, err);
	if (got < 0)
		return got;
	*said = json_tokener_parse(json);
	if (!json_object_is_type(*said, json_type_object))
		return ffs_error_set(
			err, EPROTO, "the link to the guest's agent says nothing that can be understood");
	/* its monitor may not have noticed yet */
	json_object_object_add(*said, "healthy", json_object_new_boolean(got));
	if (!got)
		late(*said, a->wait_s, err);
	return got;
}

static int health(const struct ffs_command *self, const char *name, const struct health_args *a)
{
	struct json_object *said = NULL;
	struct ffs_error err = {0};
	int got = ask(name, a, &said, &err), code;

	if (a->json && said)
		ffs_print_json(json_object_get(said));
	else if (got > 0)
		puts("healthy");
	json_object_put(said);
	code = ffs_finish_output(self);
	return got > 0 ? code : ffs_failure(self, &err);
}

int ffs_cmd_health(const struct ffs_command *self, int argc, char **argv)
{
	struct health_args a = {.wait_s = WAIT_S};
	const struct ffs_opt opts[] = {
		{"socket", 0, FFS_OPT_VALUE, &a.socket},
		{"wait", 0, FFS_OPT_VALUE, &a.wait},
		{"json", 0, FFS_OPT_FLAG, &a.json},
		{"mount", 0, FFS_OPT_VALUE, &a.mount},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
		{0},
	};
	struct ffs_error err = {0};
	int n;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.help)
		return ffs_usage_help(self);
	if (n != (a.socket ? 0 : 1))
		return ffs_usage_error(self, "one SANDBOX or --socket PATH is wanted");
	if (a.wait && ffs_seconds_option("--wait", a.wait, &a.wait_s, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	return health(self, n ? argv[0] : NULL, &a);
}
