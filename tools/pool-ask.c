/* Those who ask a pool for something: forkfs pool acquire, release, status, drain.
 *
 * One thread, one connection, one line each way; a child is said to be taken when its line is out. What waits, waits for the
 * pool; a signal ends us, and with the connection what we asked for. */
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"
#include "fork-request.h"
#include "pool.h"

#define ANSWER_MAX (4u << 20)
#define TIMEOUT_DEFAULT_S 60

/* ---- lines ---- */

static int say(int fd, struct json_object *o, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	int n = asprintf(&text, "%s\n",
		json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
	size_t len = n < 0 ? 0 : (size_t)n, at = 0;

	json_object_put(o);
	if (n < 0)
		return ffs_error_set(err, ENOMEM, "no memory for a request");
	if (len > POOL_REQUEST_MAX)
		return ffs_error_set(err, E2BIG, "a request has at most %u bytes", POOL_REQUEST_MAX);
	while (at < len) {
		ssize_t w = send(fd, text + at, len - at, MSG_NOSIGNAL);

		if (w < 0 && errno == EINTR && !ffs_interrupted())
			continue;
		/* it may have answered before it heard all of it */
		if (w < 0 && errno == EPIPE)
			return 0;
		if (w <= 0)
			return ffs_error_errno(err, errno, "the pool");
		at += (size_t)w;
	}
	return 0;
}

static int hear(FILE *in, struct json_object **out, struct ffs_error *err)
{
	_cleanup_free_ char *line = NULL;
	size_t room = 0;
	ssize_t n;

	do {
		clearerr(in);
		n = getline(&line, &room, in);
	} while (n < 0 && ferror(in) && errno == EINTR && !ffs_interrupted());
	if (n <= 0)
		return ffs_error_set(err, ECONNRESET, "the pool has ended");
	*out = json_tokener_parse(line);
	if (!json_object_is_type(*out, json_type_object)) {
		json_object_put(*out);
		return ffs_error_set(err, EPROTO, "the pool says nothing that can be understood");
	}
	if (ffs_json_get(*out, "error")) {
		int code = (int)ffs_json_u64(*out, "errno");

		ffs_error_set(
			err, code > 0 && code < 4096 ? code : EIO, "%s", ffs_json_string(*out, "error"));
		json_object_put(*out);
		return -err->code;
	}
	return 0;
}

/* A request {what: body}, which is released, and its answer; the connection stays open in *in. */
static int ask(const char *path, const char *what, struct json_object *body, FILE **in,
	struct json_object **out, struct ffs_error *err)
{
	_cleanup_close_ int fd = pool_dial(path, err);
	struct json_object *request = json_object_new_object();
	int got;

	json_object_object_add(request, what, body);
	if (fd < 0) {
		json_object_put(request);
		return fd;
	}
	got = say(fd, request, err);
	if (got < 0)
		return got;
	*in = fdopen(fd, "r");
	if (!*in)
		return ffs_error_errno(err, errno, "the pool's answer");
	ffs_steal_fd(&fd);
	return hear(*in, out, err);
}

/* ---- command lines ---- */

struct ask_args {
	const char *socket, *timeout, *ack, *log;
	struct ffs_words boxes, env;
	bool no_ack, main, end_all, help;
	char **command;
	unsigned n_words;
};

static void free_args(struct ask_args *a)
{
	ffs_words_free(&a->boxes);
	ffs_words_free(&a->env);
}

/* The words of a verb before --; those behind it into a->command. 0, or FFS_EXIT_USAGE + 1 for help, or an exit code. */
static int parse(const struct ffs_command *self, int argc, char **argv, const struct ffs_opt *opts,
	struct ask_args *a, int *n)
{
	struct ffs_error err = {0};
	int own = argc;

	for (int i = 1; i < argc && own == argc; i++)
		if (!strcmp(argv[i], "--"))
			own = i;
	if (own < argc) {
		a->command = argv + own + 1;
		a->n_words = (unsigned)(argc - own - 1);
	}
	if (ffs_opts_parse(opts, own, argv, n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (!a->help && !a->socket)
		return ffs_usage_error(self, "--socket PATH is wanted: where the pool serves");
	return 0;
}

/* ---- acquire ---- */

static int check(struct ask_args *a, unsigned *timeout_ms, struct ffs_error *err)
{
	unsigned seconds = TIMEOUT_DEFAULT_S, ms;
	int r = 0;

	if (a->timeout && strcmp(a->timeout, "0") != 0)
		r = ffs_seconds_option("--timeout", a->timeout, &seconds, err);
	else if (a->timeout)
		seconds = 0;
	*timeout_ms = seconds * 1000;
	if (!r && a->ack)
		r = ffs_ack_option(a->ack, &ms, err);
	if (!r && a->ack && a->no_ack)
		r = ffs_error_set(err, EINVAL, "--ack and --no-ack exclude each other");
	if (!r && a->ack && !a->boxes.n)
		r = ffs_error_set(err, EINVAL, "--ack is for the payloads of --mailbox");
	if (!r && a->main != (a->n_words > 0))
		r = ffs_error_set(err, EINVAL, "--main and a command after -- go together");
	if (!r && (a->env.n || a->log) && !a->main)
		r = ffs_error_set(err, EINVAL, "%s is for the command of --main", a->log ? "--log" : "--env");
	for (unsigned i = 0; !r && i < a->env.n; i++)
		if (!strchr(a->env.word[i], '=') || a->env.word[i][0] == '=')
			r = ffs_error_set(err, EINVAL, "--env is NAME=VALUE, not '%.100s'", a->env.word[i]);
	return r;
}

/* Written down first, then taken: and only when the pool has said so it is ours. */
static int take(FILE *in, struct json_object *child, struct ffs_error *err)
{
	struct json_object *o = json_object_new_object(), *answer = NULL;
	int got;

	puts(json_object_to_json_string_ext(child, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(child);
	if (fflush(stdout) != 0) {
		json_object_put(o);
		return ffs_error_errno(err, errno, "the child is ended: its line cannot be written");
	}
	json_object_object_add(o, "taken", json_object_new_boolean(true));
	got = say(fileno(in), o, err);
	if (!got)
		got = hear(in, &answer, err);
	if (got < 0)
		ffs_error_prefix(err, "the child is ended, for it was not taken in time");
	json_object_put(answer);
	return got;
}

/* Files are read here: the pool may be elsewhere. */
static int add_main(const struct ask_args *a, struct json_object *order, struct ffs_error *err)
{
	_cleanup_free_ char *cwd = NULL, *log = NULL;

	if (!a->n_words)
		return 0;
	json_object_object_add(order, "main", pool_order_words(a->command, a->n_words));
	json_object_object_add(
		order, "env", pool_order_words((char *const *)(uintptr_t)a->env.word, a->env.n));
	if (!a->log)
		return 0;
	cwd = getcwd(NULL, 0);
	if (!cwd)
		return ffs_error_errno(err, errno, "the working directory");
	if (asprintf(&log, "%s%s%s", a->log[0] == '/' ? "" : cwd, a->log[0] == '/' ? "" : "/", a->log) < 0)
		return ffs_error_set(err, ENOMEM, "no memory for a path");
	json_object_object_add(order, "log", json_object_new_string(log));
	return 0;
}

static int order_child(const struct ask_args *a, unsigned timeout_ms, FILE **in, struct json_object **child,
	struct ffs_error *err)
{
	char **box = calloc(a->boxes.n + 1, sizeof(*box));
	int got = box ? 0 : ffs_error_set(err, ENOMEM, "no memory for payloads");

	for (unsigned i = 0; !got && i < a->boxes.n; i++)
		got = ffs_fork_box(a->boxes.word[i], &box[i], err);
	if (!got) {
		struct json_object *order = pool_order_json(box, a->boxes.n, a->ack, a->no_ack);

		json_object_object_add(order, "timeout_ms", json_object_new_int64(timeout_ms));
		got = add_main(a, order, err);
		if (got < 0)
			json_object_put(order);
		else
			got = ask(a->socket, "acquire", order, in, child, err);
	}
	for (unsigned i = 0; box && i < a->boxes.n; i++)
		free(box[i]);
	free(box);
	return got;
}

int pool_acquire(const struct ffs_command *self, int argc, char **argv)
{
	_cleanup_(free_args) struct ask_args a = {0};
	const struct ffs_opt opts[] = {
		{"socket", 0, FFS_OPT_VALUE, &a.socket},
		{"mailbox", 0, FFS_OPT_EACH, &a.boxes},
		{"ack", 0, FFS_OPT_VALUE, &a.ack},
		{"no-ack", 0, FFS_OPT_FLAG, &a.no_ack},
		{"main", 0, FFS_OPT_FLAG, &a.main},
		{"env", 'e', FFS_OPT_EACH, &a.env},
		{"log", 0, FFS_OPT_VALUE, &a.log},
		{"timeout", 0, FFS_OPT_VALUE, &a.timeout},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
		{0},
	};
	_cleanup_fclose_ FILE *in = NULL;
	struct json_object *child = NULL;
	struct ffs_error err = {0};
	unsigned timeout_ms = 0;
	int n, code = parse(self, argc, argv, opts, &a, &n), got;

	if (code || a.help)
		return code ? code : ffs_usage_help(self);
	if (n)
		return ffs_usage_error(self, "acquire takes no word '%s'", argv[0]);
	if (check(&a, &timeout_ms, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	got = order_child(&a, timeout_ms, &in, &child, &err);
	if (!got)
		got = take(in, child, &err);
	return got < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}

/* ---- the others ---- */

static int print_answer(
	const struct ffs_command *self, const char *path, const char *what, struct json_object *body)
{
	_cleanup_fclose_ FILE *in = NULL;
	struct json_object *answer = NULL;
	struct ffs_error err = {0};

	if (ask(path, what, body, &in, &answer, &err) < 0)
		return ffs_failure(self, &err);
	ffs_print_json(answer);
	return ffs_finish_output(self);
}

int pool_release_some(const struct ffs_command *self, int argc, char **argv)
{
	struct ask_args a = {0};
	const struct ffs_opt opts[] = {
		{"socket", 0, FFS_OPT_VALUE, &a.socket}, {"help", 'h', FFS_OPT_FLAG, &a.help}, {0}};
	int n, worst = 0, code = parse(self, argc, argv, opts, &a, &n);

	if (code || a.help)
		return code ? code : ffs_usage_help(self);
	if (n < 1)
		return ffs_usage_error(self, "the id of a child is wanted, as acquire has printed it");
	for (int i = 0; i < n; i++) {
		struct json_object *body = json_object_new_object();
		char *end;
		unsigned long long id = strtoull(argv[i], &end, 10);

		if (*end || end == argv[i] || argv[i][0] == '-' || !id) {
			json_object_put(body);
			return ffs_usage_error(self, "an id is a number, not '%.40s'", argv[i]);
		}
		json_object_object_add(body, "id", json_object_new_uint64(id));
		code = print_answer(self, a.socket, "release", body);
		worst = code > worst ? code : worst;
	}
	return worst;
}

int pool_ask_status(const struct ffs_command *self, int argc, char **argv)
{
	struct ask_args a = {0};
	const struct ffs_opt opts[] = {
		{"socket", 0, FFS_OPT_VALUE, &a.socket}, {"help", 'h', FFS_OPT_FLAG, &a.help}, {0}};
	int n, code = parse(self, argc, argv, opts, &a, &n);

	if (code || a.help)
		return code ? code : ffs_usage_help(self);
	if (n)
		return ffs_usage_error(self, "status takes no word '%s'", argv[0]);
	return print_answer(self, a.socket, "status", json_object_new_object());
}

int pool_ask_drain(const struct ffs_command *self, int argc, char **argv)
{
	struct ask_args a = {0};
	const struct ffs_opt opts[] = {{"socket", 0, FFS_OPT_VALUE, &a.socket},
		{"end-all", 0, FFS_OPT_FLAG, &a.end_all}, {"help", 'h', FFS_OPT_FLAG, &a.help}, {0}};
	int n, code = parse(self, argc, argv, opts, &a, &n);
	struct json_object *body;

	if (code || a.help)
		return code ? code : ffs_usage_help(self);
	if (n)
		return ffs_usage_error(self, "drain takes no word '%s'", argv[0]);
	body = json_object_new_object();
	json_object_object_add(body, "end_all", json_object_new_boolean(a.end_all));
	return print_answer(self, a.socket, "drain", body);
}
