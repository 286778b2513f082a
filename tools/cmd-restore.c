/* forkfs restore: VMs from a branch, which live on when it ends.
 *
 * Threads: the main thread looks at the branch, makes the plan, and then waits for its workers and for signals; each
 * worker starts one child after the other. `lock` is for what they share: the number of the next child, the list of
 * children, who of them is ready, stdout and stderr. What waits with it held is the start of a process, and the end of
 * one that was killed. */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "progress.h"
#include "restore.h"

#define MAX_CHILDREN 4096
#define MAX_AWAITED 128 /* guests that are waited for side by side */
#define DIR_DEFAULT "/run/forkfs/children"

const struct ffs_restore_ops *const ffs_restore_kinds[] = {&ffs_restore_qemu, &ffs_restore_coop,
	&ffs_restore_firecracker, NULL};

struct restore_args {
	const char *count, *vmm, *conf, *dir, *attach, *mount, *backend, *ack, *ready;
	bool paused, trust, torn, show, track, as_served, no_prefetch, no_ack, healthy, help;
	const char *ack_address;
	unsigned n, ack_ms, ready_s;
};

/* The children of one call, side by side. */
struct herd {
	const struct ffs_command *self;
	struct ffs_restore *r;
	const struct restore_args *a;
	pthread_mutex_t lock;
	unsigned next; /* number of the next child, from 1 */
	bool stopping; /* a signal came: nothing new is started */
	unsigned failed;
	struct ffs_child *child; /* a->n of them */
	int done;                /* eventfd-like: the writing end of a pipe, a byte for each worker that is through */
	sem_t starts;            /* so many may be starting; who waits for a guest of its own keeps nobody else from it */
};

void ffs_restore_note(struct ffs_restore *r, const char *fmt, ...)
{
	char text[400];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	json_object_array_add(r->notes, json_object_new_string(text));
}

static const struct ffs_argv *environment_of(const struct ffs_restore *r)
{
	return r->ops->environment ? r->ops->environment(r) : &r->conf.env;
}

int ffs_restore_open(const struct ffs_restore *r, const char *file, struct ffs_error *err)
{
	char dir[160], path[280];
	int fd;

	snprintf(dir, sizeof(dir), "%s/branches/%s", r->target.sandbox, r->target.branch);
	snprintf(path, sizeof(path), "%s/%.100s", dir, file);
	fd = openat(r->tree->fd, path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		return fd;
	struct ffs_error why = {0};

	ffs_error_errno(&why, errno, "%s/%s", r->tree->mount, path);
	ffs_tree_explain(r->tree, dir, &why);
	return ffs_error_set(err, why.code, "%s", why.text);
}

/* ---- the branch ---- */

/* What may be restored, and whether its command line may be used. */
static int look_at_branch(struct ffs_restore *r, const struct restore_args *a, struct ffs_error *err)
{
	const char *label = r->target.branch, *kind, *state;
	char path[176];
	int got;

	snprintf(path, sizeof(path), "%s/branches/%s/status", r->target.sandbox, r->target.branch);
	got = ffs_tree_json(r->tree, path, &r->status, err);
	if (got < 0)
		return got;
	state = ffs_json_string(r->status, "state");
	r->writing = !strcmp(state, "writing");
	if (!strcmp(state, "failed"))
		return ffs_error_set(err, EIO, "branch %s failed and can never be restored: %.300s", label,
			ffs_json_string(r->status, "error"));
	if (!r->writing && strcmp(state, "ready"))
		return ffs_error_set(err, EPROTO, "branch %s is in a state that is not known: '%.40s'", label, state);
	if (json_object_is_type(ffs_json_get(r->status, "torn_possible"), json_type_array) && !a->torn)
		return ffs_error_set(err, EPERM,
			"branch %s was taken by --force while others could write the guest's memory, and may be torn "
			"(torn_possible in its status): --accept-torn starts it all the same",
			label);
	r->memory_size = ffs_json_u64(r->status, "memory_bytes");
	r->imported = ffs_cli_json_bool(r->status, "imported");
	r->vmm = ffs_json_get(r->status, "vmm");
	kind = ffs_json_string(r->vmm, "kind");
	for (const struct ffs_restore_ops *const *k = ffs_restore_kinds; *k; k++)
		if (!strcmp((*k)->kind, kind))
			r->ops = *k;
	if (!r->ops)
		return ffs_error_set(
			err, ENOTSUP, "branch %s is of a VMM of the kind '%.40s', which restore cannot start", label, kind);
	if (!r->memory_size)
		return ffs_error_set(err, EPROTO, "branch %s has no memory", label);
	return 0;
}

/* The manifest of a stranger: they see what it wants to run, and nothing is run. */
static int refuse_imported(struct ffs_restore *r, struct ffs_error *err)
{
	struct json_object *line = ffs_json_get(r->vmm, "command_line");

	if (!r->imported || r->trust || !line)
		return 0;
	return ffs_error_set(err, EPERM,
		"branch %s was imported, and its manifest's command line is not run without --trust: %.300s", r->target.branch,
		json_object_to_json_string_ext(line, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
}

static int prepare(struct ffs_restore *r, const struct restore_args *a, struct ffs_error *err)
{
	int got = ffs_tree_check_target(r->tree, &r->target, err);

	if (!got)
		got = look_at_branch(r, a, err);
	if (!got)
		got = refuse_imported(r, err);
	if (!got)
		got = ffs_restore_conf_read(a->conf, r->ops->kind, &r->conf, err);
	if (!got && a->vmm) {
		/* named by hand, so it may be found by PATH of theirs only as a path */
		free(r->conf.binary);
		r->conf.binary = realpath(a->vmm, NULL);
		if (!r->conf.binary)
			got = ffs_error_errno(err, errno, "--vmm %s", a->vmm);
	}
	if (!got && r->backend && r->ops != &ffs_restore_firecracker)
		got = ffs_error_set(err, EINVAL, "--backend is for Firecracker's children; the branch is of a %s", r->ops->kind);
	if (!got && (r->drives.n || r->nets.n) && r->ops != &ffs_restore_firecracker)
		got = ffs_error_set(err, EINVAL, "--drive and --net are for Firecracker's children; the branch is of a %s",
			r->ops->kind);
	if (!got && r->healthy && r->ops != &ffs_restore_qemu)
		got = ffs_error_set(err, ENOTSUP,
			"--healthy is for QEMU's children, which have a port for an agent; the branch is of a %s", r->ops->kind);
	if (!got && r->backend && r->target.fork[0] && !strcmp(r->backend, "uffd"))
		got = ffs_error_set(err, ENOTSUP,
			"--backend uffd serves the branch's memory, without the payloads of fork %s: leave it out, or serve the "
			"fork's memory.bin by `forkfs pager`",
			r->target.fork);
	if (!got)
		got = r->ops->plan(r, err);
	return got;
}

/* ---- one child ---- */

static void print_child(struct herd *h, const struct ffs_child *c)
{
	struct ffs_restore *r = h->r;
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
	json_object_object_add(o, "sockets", json_object_get(c->sockets));
	json_object_object_add(times, "started_ns", json_object_new_uint64(c->started_ns));
	json_object_object_add(times, "loaded_ns", json_object_new_uint64(c->loaded_ns));
	json_object_object_add(times, "running_ns", r->paused ? NULL : json_object_new_uint64(c->running_ns));
	json_object_object_add(times, "acknowledged_ns", c->ack ? json_object_new_uint64(c->acknowledged_ns) : NULL);
	if (r->healthy)
		json_object_object_add(times, "healthy_ns", json_object_new_uint64(c->healthy_ns));
	json_object_object_add(o, "times", times);
	if (c->ack) {
		json_object_object_add(o, "acks", ffs_restore_ack_json(c));
		json_object_object_add(o, "acks_ignored", ffs_restore_ack_ignored_json(c));
	}
	if (json_object_array_length(r->notes))
		json_object_object_add(o, "notes", json_object_get(r->notes));
	ffs_print_json(o);
	fflush(stdout);
}

/* Its process is there, or it never will be: with the lock, so that a signal ends either none or this one. */
static int start_process(struct herd *h, struct ffs_child *c, const struct ffs_argv *argv, struct ffs_error *err)
{
	int got;

	pthread_mutex_lock(&h->lock);
	if (h->stopping)
		got = ffs_error_set(err, EINTR, "interrupted");
	else
		got = ffs_child_spawn(c, argv, environment_of(h->r), err);
	pthread_mutex_unlock(&h->lock);
	return got;
}

static int attach(struct herd *h, struct ffs_child *c, struct ffs_error *err)
{
	struct json_object *body = json_object_new_object(), *request = json_object_new_object();
	int got;

	json_object_object_add(request, "attach", body);
	json_object_object_add(body, "name", json_object_new_string(c->name));
	json_object_object_add(body, h->r->ops->kind, json_object_new_string(c->attach_socket));
	if (h->a->track)
		json_object_object_add(body, "track", json_object_new_boolean(true));
	got = ffs_tree_request(h->r->tree, ".forkfs/ctl", request, NULL, err);
	json_object_put(request);
	return got;
}

/* Until it runs, or is where it shall stop. */
static int start_child(struct herd *h, struct ffs_child *c, struct ffs_error *err)
{
	struct ffs_restore *r = h->r;
	struct ffs_argv argv = {0};
	int got = ffs_child_make_dir(c, h->a->dir ? h->a->dir : DIR_DEFAULT, r->target.branch, err);

	c->began_ns = ffs_now_ns() - r->began_ns;

	if (!got)
		got = ffs_child_give(c, FFS_CHILD_MEMORY, r->memory_fd, err);
	if (!got)
		got = r->ops->command(r, c, &argv, err);
	if (!got && r->healthy)
		got = ffs_restore_agent_find(c, &argv, err);
	if (!got)
		got = ffs_restore_hooks_before(r, c, err);
	if (!got)
		got = start_process(h, c, &argv, err);
	ffs_argv_free(&argv);
	if (got < 0)
		return got;
	c->started_ns = ffs_now_ns() - r->began_ns;
	got = r->ops->load(r, c, err);
	if (!got)
		got = ffs_restore_fork_write(r, c, err);
	c->loaded_ns = ffs_now_ns() - r->began_ns;
	ffs_restore_hooks_resuming(c);
	if (!got && !r->paused)
		got = r->ops->run(r, c, err);
	c->running_ns = ffs_now_ns() - r->began_ns;
	r->ops->let_go(r, c);
	return got < 0 ? ffs_child_explain(c, got, err) : 0;
}

/* What its guest has to say before it counts. */
static int await_child(struct herd *h, struct ffs_child *c, struct ffs_error *err)
{
	struct ffs_restore *r = h->r;
	int got = ffs_restore_hooks_after_resume(r, c, err);

	c->acknowledged_ns = ffs_now_ns() - r->began_ns;
	if (!got && r->healthy)
		got = ffs_restore_agent_await(r, c, err);
	if (got < 0)
		return ffs_child_explain(c, got, err);
	return c->name[0] ? attach(h, c, err) : 0;
}

static void *work(void *arg)
{
	_cleanup_close_ int watch = -1;
	struct herd *h = arg;

	for (;;) {
		struct ffs_error err = {0};
		struct ffs_child *c;
		int got;

		pthread_mutex_lock(&h->lock);
		c = h->stopping || h->next > h->a->n ? NULL : &h->child[h->next++ - 1];
		pthread_mutex_unlock(&h->lock);
		if (!c)
			break;
		c->watch = &watch;
		while (sem_wait(&h->starts) < 0)
			; /* EINTR: the only way in which it can fail */
		got = start_child(h, c, &err);
		sem_post(&h->starts);
		if (!got)
			got = await_child(h, c, &err);
		pthread_mutex_lock(&h->lock);
		c->ready = !got;
		if (!got) {
			print_child(h, c);
		} else if (!h->stopping) {
			struct ffs_error shown = err;

			ffs_error_prefix(&shown, "child %u", c->number);
			ffs_print_failure(h->self, &shown);
			h->failed++;
		}
		ffs_restore_hooks_close(h->r, c);
		if (got < 0)
			ffs_child_destroy(c);
		else
			ffs_child_release(c);
		pthread_mutex_unlock(&h->lock);
	}
	if (write(h->done, "", 1) != 1)
		return NULL; /* the pipe has room for more than there are workers */
	return NULL;
}

/* ---- all of them ---- */

static unsigned how_many_at_once(unsigned n)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned most = cpus > 2 ? (unsigned)cpus * 2 : 4;

	return n < most ? n : most;
}

/* A signal came: who is not ready is ended; their workers see it by their sockets. */
static void stop(struct herd *h)
{
	pthread_mutex_lock(&h->lock);
	h->stopping = true;
	for (unsigned i = 0; i < h->a->n; i++)
		if (!h->child[i].ready)
			ffs_child_kill(&h->child[i]);
	pthread_mutex_unlock(&h->lock);
}

static int start_workers(struct herd *h, pthread_t *thread, unsigned n)
{
	sigset_t all, old;
	unsigned started = 0;

	/* signals are the main thread's */
	ffs_signals_to_block(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	while (started < n && !pthread_create(&thread[started], NULL, work, h))
		started++;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return (int)started;
}

static int start_all(struct herd *h, struct ffs_error *err)
{
	unsigned at_once = how_many_at_once(h->a->n), n = at_once;
	_cleanup_free_ pthread_t *thread = NULL;
	int p[2], workers;

	if (h->r->healthy || h->r->ack.n)
		n = h->a->n < MAX_AWAITED ? h->a->n : MAX_AWAITED;
	thread = calloc(n, sizeof(*thread));

	h->child = calloc(h->a->n, sizeof(*h->child));
	if (!thread || !h->child)
		return ffs_error_set(err, ENOMEM, "no memory for %u children", h->a->n);
	if (pipe2(p, O_CLOEXEC) < 0 || sem_init(&h->starts, 0, at_once) < 0)
		return ffs_error_errno(err, errno, "a pipe for the threads");
	h->done = p[1];
	for (unsigned i = 0; i < h->a->n; i++) {
		ffs_child_init(&h->child[i], i + 1);
		if (h->a->attach)
			snprintf(h->child[i].name, sizeof(h->child[i].name), h->a->n > 1 ? "%.50s-%u" : "%.64s", h->a->attach,
				i + 1);
	}
	workers = start_workers(h, thread, n);
	for (int through = 0; through < workers;) {
		char byte;
		ssize_t got = read(p[0], &byte, 1);

		through += got == 1;
		if (got < 0 && ffs_interrupted())
			stop(h);
	}
	for (int i = 0; i < workers; i++)
		pthread_join(thread[i], NULL);
	close(p[0]);
	close(p[1]);
	sem_destroy(&h->starts);
	/* whom no worker came to */
	for (unsigned i = h->next - 1; i < h->a->n; i++)
		ffs_child_release(&h->child[i]);
	free(h->child);
	return workers ? 0 : ffs_error_set(err, EAGAIN, "no thread can be started");
}

/* What would be run, and nothing is. */
static int show(const struct ffs_command *self, struct ffs_restore *r)
{
	struct ffs_child c;
	struct ffs_argv argv = {0};
	struct ffs_error err = {0};
	struct json_object *o;
	int got;

	ffs_child_init(&c, 1);
	got = r->ops->command(r, &c, &argv, &err);
	ffs_child_release(&c);
	if (got < 0) {
		ffs_argv_free(&argv);
		return ffs_failure(self, &err);
	}
	o = json_object_new_object();
	json_object_object_add(o, "command", ffs_argv_json(&argv));
	json_object_object_add(o, "environment", ffs_argv_json(environment_of(r)));
	json_object_object_add(o, "notes", json_object_get(r->notes));
	ffs_print_json(o);
	ffs_argv_free(&argv);
	return ffs_finish_output(self);
}

static bool is_uffd(const struct restore_args *a)
{
	return a->backend && !strcmp(a->backend, "uffd");
}

static int restore(const struct ffs_command *self, struct ffs_restore *r, const struct restore_args *a)
{
	struct herd h = {.self = self, .r = r, .a = a, .lock = PTHREAD_MUTEX_INITIALIZER, .next = 1};
	struct ffs_error err = {0};
	int got = prepare(r, a, &err);

	if (!got && a->show)
		return show(self, r);
	/* a child of a branch in flight is served by the daemon for its life, and cannot be branched */
	if (!got && a->attach && r->writing)
		got = ffs_wait_branch(r->tree, &r->target, true, &err);
	if (!got && a->attach)
		r->writing = false;
	if (!got)
		got = ffs_restore_image(r, a->as_served || is_uffd(a), &err); /* served memory is not mapped */
	if (!got && r->target.fork[0])
		got = ffs_restore_fork_read(r, &err);
	if (!got && r->ops->begin)
		got = r->ops->begin(r, a->dir ? a->dir : DIR_DEFAULT, &err);
	if (!got)
		got = start_all(&h, &err);
	if (got < 0)
		return ffs_failure(self, &err);
	if (ffs_interrupted())
		ffs_interrupt_exit();
	got = ffs_finish_output(self);
	return h.failed ? FFS_EXIT_FAILURE : got;
}

/* ---- the command line ---- */

static int parse_count(const char *text, unsigned *out, struct ffs_error *err)
{
	char *end;
	unsigned long n;

	errno = 0;
	n = strtoul(text, &end, 10);
	if (errno || *end || end == text || *text == '-' || !n || n > MAX_CHILDREN)
		return ffs_error_set(err, EINVAL, "-n is a number from 1 to %d, not '%.40s'", MAX_CHILDREN, text);
	*out = (unsigned)n;
	return 0;
}

static int check_args(struct restore_args *a, struct ffs_error *err)
{
	char name[80];
	int got = a->count ? parse_count(a->count, &a->n, err) : 0;

	if (!got && a->attach) {
		snprintf(name, sizeof(name), a->n > 1 ? "%.70s-%u" : "%.70s", a->attach, a->n);
		got = ffs_check_name("sandbox", name, err);
	}
	if (!got && a->ack)
		got = ffs_ack_option(a->ack, &a->ack_ms, err);
	if (!got && a->ack && a->paused)
		got = ffs_error_set(err, EINVAL, "--ack and --paused exclude each other");
	if (!got && a->ack && a->no_ack)
		got = ffs_error_set(err, EINVAL, "--ack and --no-ack exclude each other");
	if (!got && a->healthy && a->paused)
		got = ffs_error_set(err, EINVAL, "--healthy and --paused exclude each other");
	if (!got && a->ready && !a->healthy)
		got = ffs_error_set(err, EINVAL, "--ready-timeout goes with --healthy");
	if (!got && a->ready)
		got = ffs_seconds_option("--ready-timeout", a->ready, &a->ready_s, err);
	if (!got && a->ack_address && ffs_restore_ack_address(a->ack_address, &(struct sockaddr_storage){0}, &(socklen_t){0}) < 0)
		got = ffs_error_set(err, EINVAL, "--ack-address is an IP address of this host, not '%.60s'", a->ack_address);
	if (!got && a->attach && a->paused)
		got = ffs_error_set(err, EINVAL, "--attach and --paused exclude each other");
	if (!got && a->track && !a->attach)
		got = ffs_error_set(err, EINVAL, "--track goes with --attach");
	if (!got && a->backend && strcmp(a->backend, "file") && strcmp(a->backend, "uffd"))
		got = ffs_error_set(err, EINVAL, "--backend is file or uffd, not '%.40s'", a->backend);
	if (!got && a->attach && is_uffd(a))
		got = ffs_error_set(err, EINVAL,
			"--attach and --backend uffd exclude each other: memory that a pager serves cannot be branched");
	if (!got && a->dir && a->dir[0] != '/')
		got = ffs_error_set(err, EINVAL, "--dir is an absolute path");
	return got;
}

int ffs_cmd_restore(const struct ffs_command *self, int argc, char **argv)
{
	struct restore_args a = {.n = 1, .ready_s = FFS_AGENT_READY_S};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct ffs_restore r = {.tree = &t, .memory_fd = -1, .began_ns = ffs_now_ns()};
	const struct ffs_opt opts[] = {
		{NULL, 'n', FFS_OPT_VALUE, &a.count},
		{"vmm", 0, FFS_OPT_VALUE, &a.vmm},
		{"conf", 0, FFS_OPT_VALUE, &a.conf},
		{"dir", 0, FFS_OPT_VALUE, &a.dir},
		{"attach", 0, FFS_OPT_VALUE, &a.attach},
		{"track", 0, FFS_OPT_FLAG, &a.track},
		{"paused", 0, FFS_OPT_FLAG, &a.paused},
		{"backend", 0, FFS_OPT_VALUE, &a.backend},
		{"no-prefetch", 0, FFS_OPT_FLAG, &a.no_prefetch},
		{"drive", 0, FFS_OPT_EACH, &r.drives},
		{"net", 0, FFS_OPT_EACH, &r.nets},
		{"ack", 0, FFS_OPT_VALUE, &a.ack},
		{"no-ack", 0, FFS_OPT_FLAG, &a.no_ack},
		{"ack-address", 0, FFS_OPT_VALUE, &a.ack_address},
		{"healthy", 0, FFS_OPT_FLAG, &a.healthy},
		{"ready-timeout", 0, FFS_OPT_VALUE, &a.ready},
		{"accept-torn", 0, FFS_OPT_FLAG, &a.torn},
		{"trust", 0, FFS_OPT_FLAG, &a.trust},
		{"as-served", 0, FFS_OPT_FLAG, &a.as_served},
		{"show", 0, FFS_OPT_FLAG, &a.show},
		{"mount", 0, FFS_OPT_VALUE, &a.mount},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
		{0},
	};
	struct ffs_error err = {0};
	int n, code, own = argc;

	for (int i = 1; i < argc && own == argc; i++)
		if (!strcmp(argv[i], "--"))
			own = i;
	if (ffs_opts_parse(opts, own, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.help)
		return ffs_usage_help(self);
	if (n != 1)
		return ffs_usage_error(self, "one NAME/BRANCH[/FORK] is wanted; the VMM's own options go after --");
	if (ffs_target_parse(argv[0], FFS_TARGET_BRANCH | FFS_TARGET_FORK, &r.target, &err) < 0 || check_args(&a, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.ack && !r.target.fork[0])
		return ffs_usage_error(self, "--ack is for the mailboxes of a fork: NAME/BRANCH/FORK");
	r.trust = a.trust;
	r.paused = a.paused;
	r.backend = a.backend;
	r.no_prefetch = a.no_prefetch;
	r.ack_all = a.ack;
	r.ack_ms = a.ack_ms;
	r.ack_none = a.no_ack;
	r.ack_address = a.ack_address;
	r.healthy = a.healthy;
	r.ready_s = a.ready_s;
	if (own < argc) {
		r.user_arg = (const char *const *)argv + own + 1;
		r.n_user_args = (unsigned)(argc - own - 1);
	}
	r.notes = json_object_new_array();
	ffs_interrupt_install();
	if (ffs_tree_open(&t, a.mount, &err) < 0)
		code = ffs_failure(self, &err);
	else
		code = restore(self, &r, &a);
	if (r.ops && r.ops->end)
		r.ops->end(&r);
	ffs_restore_conf_free(&r.conf);
	ffs_close_fd(&r.memory_fd);
	free(r.page);
	ffs_words_free(&r.drives);
	ffs_words_free(&r.nets);
	json_object_put(r.notes);
	json_object_put(r.status);
	return code;
}
