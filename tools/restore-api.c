/* Children of VMMs that speak the small API of docs/vmm.md. Such a VMM has no command line that forkfs knows: the host's
 * configuration (or the caller, after --) says it, with {memory}, {vmstate}, {api}, {vsock} and {dir} where those go.
 *
 * One thread a child (restore.h); no locks. */
#include "restore-api.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/dial.h"

#define NO_DEADLINE (UINT64_MAX / 4)
#define SOCKET "api" /* in the child's directory */

/* ---- the connection ---- */

static int ended(const struct ffs_child *c, struct ffs_error *err)
{
	return ffs_error_set(err, ECONNRESET, "process %d has ended", (int)c->pid);
}

void ffs_restore_api_socket(struct ffs_child *c, char path[160])
{
	if (!c->dir[0])
		return;
	ffs_child_socket(c, "api", SOCKET, path);
	snprintf(c->attach_socket, sizeof(c->attach_socket), "%s", path);
}

int ffs_restore_api_give_vmstate(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	if (!c->dir[0])
		return 0;
	_cleanup_close_ int fd = ffs_restore_open(r, "vmstate", err);

	return fd < 0 ? fd : ffs_child_give(c, FFS_CHILD_VMSTATE, fd, err);
}

int ffs_restore_api_connect(struct ffs_child *c, struct ffs_error *err)
{
	struct ffs_restore_talk *t = calloc(1, sizeof(*t));
	char path[160], events[4096];
	int sock, r;

	if (!t)
		return ffs_error_set(err, ENOMEM, "no memory for a connection");
	t->http.sock = -1;
	c->talk = t;
	const char *dir = c->jail[0] ? c->jail : c->dir;

	snprintf(path, sizeof(path), "%s/" SOCKET, dir);
	if (*c->watch < 0)
		*c->watch = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	if (*c->watch < 0 || inotify_add_watch(*c->watch, dir, IN_CREATE | IN_MOVED_TO) < 0)
		return ffs_error_errno(err, errno, "%s cannot be watched", dir);
	while ((r = ffs_dial_path(path, NO_DEADLINE, &sock)) < 0) {
		if (r != -ENOENT && r != -ECONNREFUSED)
			return ffs_error_errno(err, -r, "%s", path);
		if (ffs_child_ended(c))
			return ended(c, err);
		/* between bind(2) and listen(2) there is no event */
		ffs_child_poll(c, *c->watch, r == -ECONNREFUSED ? 1 : -1);
		while (read(*c->watch, events, sizeof(events)) > 0)
			;
	}
	ffs_http_init(&t->http, sock);
	return 0;
}

static int child_ended(struct ffs_http_wait *w, struct ffs_error *err)
{
	return ffs_error_set(err, ECONNRESET, "the VM has ended");
}

int ffs_restore_api_call(struct ffs_child *c, const char *method, const char *path, const char *body,
	struct json_object **answer, struct ffs_error *err)
{
	struct ffs_http *http = &((struct ffs_restore_talk *)c->talk)->http;
	struct ffs_http_wait wait = {.fd = c->pidfd, .ready = child_ended};
	struct ffs_http_answer a = {0};
	struct json_object *said = NULL;
	int r = ffs_http_send(http, method, path, body, NO_DEADLINE, err);

	if (!r)
		r = ffs_http_recv(http, &wait, NO_DEADLINE, &a, err);
	if (r < 0)
		return r;
	if (a.len)
		said = json_tokener_parse(a.body);
	if (a.status < 200 || a.status > 299)
		r = ffs_error_set(err, EREMOTEIO, "%s %s was answered %d: %.300s", method, path, a.status,
			*ffs_json_string(said, "fault_message") ? ffs_json_string(said, "fault_message")
								: "no reason given");
	ffs_http_answer_free(&a);
	if (!r && answer)
		*answer = said;
	else
		json_object_put(said);
	return r;
}

int ffs_restore_api_run(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	const struct ffs_restore_talk *t = c->talk;

	/* the answer comes when it runs */
	return t->running ? 0 : ffs_restore_api_call(c, "PATCH", "/vm", "{\"state\":\"Resumed\"}", NULL, err);
}

void ffs_restore_api_let_go(struct ffs_restore *r, struct ffs_child *c)
{
	struct ffs_restore_talk *t = c->talk;

	if (t)
		ffs_http_close(&t->http);
	free(t);
	c->talk = NULL;
}

/* ---- the kind coop ---- */

static bool says(const struct ffs_restore *r, const char *word)
{
	for (unsigned i = 0; i < r->conf.arg.n; i++)
		if (strstr(r->conf.arg.word[i], word))
			return true;
	for (unsigned i = 0; i < r->n_user_args; i++)
		if (strstr(r->user_arg[i], word))
			return true;
	return false;
}

static int plan(struct ffs_restore *r, struct ffs_error *err)
{
	static const char *const wanted[] = {"{memory}", "{vmstate}", "{api}"};

	if (!r->conf.binary)
		return ffs_error_set(err, EINVAL,
			"how a VMM of the kind coop is started is not known: name it by --vmm, and its "
			"options after -- with "
			"{memory}, {vmstate} and {api}, or in a file of " FFS_VMM_DIR);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(wanted); i++)
		if (!says(r, wanted[i]))
			return ffs_error_set(err, EINVAL,
				"%s is in none of the VMM's options: where does it go?", wanted[i]);
	return 0;
}

static int command(struct ffs_restore *r, struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err)
{
	char memory[32], vmstate[32], mib[32], number[16], api[160] = SOCKET, vsock[160] = FFS_CHILD_VSOCK;
	const struct ffs_restore_word words[] = {{"memory", memory}, {"vmstate", vmstate}, {"api", api},
		{"dir", c->dir}, {"memory_mib", mib}, {"number", number}, {"vsock", vsock}};

	snprintf(memory, sizeof(memory), "/proc/self/fd/%d", FFS_CHILD_MEMORY);
	snprintf(vmstate, sizeof(vmstate), "/proc/self/fd/%d", FFS_CHILD_VMSTATE);
	snprintf(mib, sizeof(mib), "%llu", (unsigned long long)(r->memory_size >> 20));
	snprintf(number, sizeof(number), "%u", c->number);
	ffs_restore_api_socket(c, api);
	c->vsock = says(r, "{vsock}");
	if (c->vsock && c->dir[0])
		ffs_child_socket(c, "vsock", FFS_CHILD_VSOCK, vsock);
	ffs_argv_add(out, r->conf.binary);
	for (unsigned i = 0; i < r->conf.arg.n + r->n_user_args; i++) {
		_cleanup_free_ char *word = ffs_restore_expand(
			i < r->conf.arg.n ? r->conf.arg.word[i] : r->user_arg[i - r->conf.arg.n], words,
			FFS_ARRAY_LEN(words));

		if (!word)
			return ffs_error_set(err, ENOMEM, "no memory for a command line");
		ffs_argv_add(out, word);
	}
	return ffs_restore_api_give_vmstate(r, c, err);
}

static int load(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	struct json_object *root = NULL;
	int got = ffs_restore_api_connect(c, err);

	if (!got)
		got = ffs_restore_api_call(c, "GET", "/", NULL, &root, err);
	if (got < 0)
		return got;
	struct ffs_restore_talk *t = c->talk;

	t->running = !strcmp(ffs_json_string(root, "state"), "Running");
	if (!t->running && strcmp(ffs_json_string(root, "state"), "Paused"))
		got = ffs_error_set(err, EPROTO, "the VMM has not loaded the branch: its state is '%.40s'",
			ffs_json_string(root, "state"));
	else if (t->running && r->paused)
		got = ffs_error_set(err, EPROTO,
			"the VM runs by itself, so it cannot be left paused: its options must say that it is "
			"loaded only");
	else if (t->running && r->target.fork[0])
		got = ffs_error_set(err, EPROTO,
			"the VM runs by itself, so the payloads of fork %s came too late: its options must "
			"say that it is loaded only",
			r->target.fork);
	json_object_put(root);
	return got;
}

const struct ffs_restore_ops ffs_restore_coop = {
	.kind = "coop",
	.plan = plan,
	.command = command,
	.load = load,
	.run = ffs_restore_api_run,
	.let_go = ffs_restore_api_let_go,
};
