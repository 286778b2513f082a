/* What is asked for with a child: payloads for mailboxes, a main command. Read from a request, which is not trusted (its
 * payloads are checked again by whoever makes the fork), and done to a child.
 *
 * pool_order_fork() and pool_order_main() are of the thread that hands the child out; the first waits for the tree, the second
 * for the guest's agent and for the end of the VM. No locks. */
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "fork-request.h"
#include "mailbox/mailbox.h"
#include "pool.h"

void pool_order_free(struct pool_order *o)
{
	if (!o)
		return;
	for (unsigned i = 0; i < o->n_boxes; i++)
		free(o->box[i]);
	free(o->box);
	free(o->main);
	free(o->log);
	free(o);
}

/* ---- from a request ---- */

/* A list of strings, whose NUL is their end. */
static int check_words(struct json_object *list, size_t most, const char *what, struct ffs_error *err)
{
	size_t n = json_object_is_type(list, json_type_array) ? json_object_array_length(list) : 0;

	if (list && !json_object_is_type(list, json_type_array))
		return ffs_error_set(err, EINVAL, "%s is no list", what);
	if (n > most)
		return ffs_error_set(err, E2BIG, "%s has more than %zu words", what, most);
	for (size_t i = 0; i < n; i++) {
		struct json_object *word = json_object_array_get_idx(list, i);

		if (!json_object_is_type(word, json_type_string) ||
			strlen(json_object_get_string(word)) != (size_t)json_object_get_string_len(word))
			return ffs_error_set(err, EINVAL, "%s has something that is no word", what);
	}
	return 0;
}

static int read_boxes(struct pool_order *o, struct json_object *list, struct ffs_error *err)
{
	int r = check_words(list, FFS_MAILBOX_MAX, "mailboxes", err);
	size_t n = r || !list ? 0 : json_object_array_length(list);

	o->box = calloc(n + 1, sizeof(*o->box));
	if (!o->box)
		return ffs_error_set(err, ENOMEM, "no memory for payloads");
	for (size_t i = 0; !r && i < n; i++) {
		o->box[o->n_boxes] = strdup(json_object_get_string(json_object_array_get_idx(list, i)));
		if (!o->box[o->n_boxes++])
			r = ffs_error_set(err, ENOMEM, "no memory for payloads");
	}
	return r;
}

static int read_log(struct pool_order *o, struct json_object *log, struct ffs_error *err)
{
	const char *path = json_object_is_type(log, json_type_string) ? json_object_get_string(log) : "";

	if (path[0] != '/' || strlen(path) >= PATH_MAX ||
		strlen(path) != (size_t)json_object_get_string_len(log))
		return ffs_error_set(err, EINVAL, "log is no absolute path");
	o->log = strdup(path);
	return o->log ? 0 : ffs_error_set(err, ENOMEM, "no memory for a path");
}

static int read_main(struct pool_order *o, struct json_object *words, struct json_object *env,
	struct json_object *log, struct ffs_error *err)
{
	_cleanup_free_ struct agent_exec *e = NULL;
	int r = check_words(words, AGENT_WORDS_MAX, "main", err);

	if (!r)
		r = check_words(env, AGENT_WORDS_MAX, "env", err);
	if (!r && words && log)
		r = read_log(o, log, err);
	if (r < 0 || !words)
		return r;
	e = calloc(1, sizeof(*e));
	o->main = malloc(AGENT_PAYLOAD_MAX);
	if (!e || !o->main)
		return ffs_error_set(err, ENOMEM, "no memory for a command");
	e->cwd = "";
	e->flags = o->log ? AGENT_EXEC_OUTPUT : 0;
	for (; e->argc < json_object_array_length(words); e->argc++)
		e->argv[e->argc] = json_object_get_string(json_object_array_get_idx(words, e->argc));
	for (; env && e->envc < json_object_array_length(env); e->envc++)
		e->env[e->envc] = json_object_get_string(json_object_array_get_idx(env, e->envc));
	o->main_len = e->argc ? agent_exec_make(e, o->main, AGENT_PAYLOAD_MAX) : 0;
	return o->main_len ? 0
			   : ffs_error_set(err, E2BIG,
				     "a main command has a word at least, and with its variables %u bytes at "
				     "most",
				     AGENT_PAYLOAD_MAX);
}

int pool_order_read(struct json_object *o, struct pool_order **out, struct ffs_error *err)
{
	struct pool_order *p = calloc(1, sizeof(*p));
	const char *ack = ffs_json_get(o, "ack_ms") ? ffs_json_string(o, "ack_ms") : NULL;
	int r;

	if (!p)
		return ffs_error_set(err, ENOMEM, "no memory for an order");
	r = read_boxes(p, ffs_json_get(o, "mailboxes"), err);
	if (!r)
		r = read_main(
			p, ffs_json_get(o, "main"), ffs_json_get(o, "env"), ffs_json_get(o, "log"), err);
	if (!r && ack)
		r = ffs_ack_option(ack, &p->ack_ms, err);
	p->ack = ack;
	p->no_ack = ffs_cli_json_bool(o, "no_ack");
	if (r < 0)
		pool_order_free(p);
	else
		*out = p;
	return r;
}

struct json_object *pool_order_words(char *const *word, unsigned n)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < n; i++)
		json_object_array_add(list, json_object_new_string(word[i]));
	return list;
}

struct json_object *pool_order_json(char *const *box, unsigned n, const char *ack, bool no_ack)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "mailboxes", pool_order_words(box, n));
	if (ack)
		json_object_object_add(o, "ack_ms", json_object_new_string(ack));
	json_object_object_add(o, "no_ack", json_object_new_boolean(no_ack));
	return o;
}

/* ---- to a child ---- */

/* A fork is what restore knows how to give to a child: an epoch of its own, pages, acknowledgements. It has its name for as
 * long as it is read. */
int pool_order_fork(
	struct ffs_restore *view, const struct pool_order *o, char epoch[40], struct ffs_error *err)
{
	_cleanup_free_ char *request = NULL;
	struct json_object *answer = NULL;
	char uuid[37], ctl[80], path[260];
	int got;

	ffs_uuid(uuid);
	snprintf(view->target.fork, sizeof(view->target.fork), "pool.%s", uuid);
	snprintf(ctl, sizeof(ctl), "%s/ctl", view->target.sandbox);
	snprintf(path, sizeof(path), "%s/branches/%s/forks/%s", view->target.sandbox, view->target.branch,
		view->target.fork);
	got = ffs_fork_request(&view->target, view->target.fork, o->box, o->n_boxes,
		o->ack ? &o->ack_ms : NULL, &request, err);
	if (!got)
		got = ffs_tree_request_text(view->tree, ctl, request, &answer, err);
	if (got < 0)
		return got;
	snprintf(epoch, 40, "%s", ffs_json_string(ffs_json_get(answer, "fork"), "epoch"));
	json_object_put(answer);
	view->ack_none = o->no_ack;
	got = ffs_restore_fork_read(view, err);
	/* gone with its branch, when that is */
	if (unlinkat(view->tree->fd, path, AT_REMOVEDIR) < 0 && errno != ENOENT && !got)
		got = ffs_error_errno(err, errno, "%s/%s cannot be removed", view->tree->mount, path);
	return got;
}

/* Until the agent says what came of it. */
static int await_main(int fd, uint64_t *pid, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_agent_input *in = calloc(1, sizeof(*in));
	struct agent_frame f;

	if (!in)
		return ffs_error_set(err, ENOMEM, "no memory for an answer");
	for (;;) {
		int got = ffs_agent_next(fd, in, &f);
		struct agent_reader r = {f.payload, f.len, false};

		if (got <= 0)
			return ffs_error_set(err, ECONNRESET, "the link to the guest's agent has ended");
		if (f.type == AGENT_STARTED) {
			*pid = agent_get(&r, 4);
			return 0;
		}
		if (f.type == AGENT_EXIT)
			return 0; /* it was short */
		if (f.type == AGENT_REFUSED)
			agent_get(&r, 4);
		if (f.type == AGENT_REFUSED || f.type == AGENT_ERROR)
			return ffs_error_set(err, EREMOTEIO, "the main command was not started: %.*s",
				(int)(r.left > 300 ? 300 : r.left), (const char *)r.p);
	}
}

int pool_order_main(const struct ffs_child *c, const struct pool_order *o, unsigned ready_s, uint64_t *pid,
	struct ffs_error *err)
{
	_cleanup_free_ char *path = NULL;
	_cleanup_close_ int fd = -1;
	struct ffs_agent_link link = {.pid = c->pid, .ready_s = ready_s};
	int got = ffs_agent_find(c->pid, &path, err);

	if (got < 0)
		return got;
	link.socket = path;
	fd = ffs_agent_dial(&link, err);
	if (fd < 0)
		return fd;
	got = ffs_agent_wait(fd, c->pidfd, NULL, err);
	if (!got && o->log && (got = ffs_agent_send(fd, AGENT_LOG, 0, o->log, strlen(o->log))) < 0)
		ffs_error_errno(err, -got, "the link to the guest's agent");
	if (!got && (got = ffs_agent_send(fd, AGENT_MAIN, 1, o->main, o->main_len)) < 0)
		ffs_error_errno(err, -got, "the link to the guest's agent");
	return got ? got : await_main(fd, pid, err);
}
