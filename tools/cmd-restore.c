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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "progress.h"
#include "restore.h"

#define MAX_AWAITED 128 /* guests that are waited for side by side */

struct restore_args {
	struct ffs_restore_args *how;
	struct ffs_restore_targets targets;
	const char *count, *attach, *ack, *forks;
	bool paused, show, track, no_ack, help;
	unsigned n, all, ack_ms; /* children of each target, of all of them */
};

/* The children of one call, side by side: a->n of each target, in the order of the targets. */
struct herd {
	const struct ffs_command *self;
	struct ffs_restore *r;    /* what all of them share */
	struct ffs_restore *view; /* the same for those of each target */
	const struct restore_args *a;
	pthread_mutex_t lock;
	unsigned next; /* number of the next child, from 1 */
	bool stopping; /* a signal came: nothing new is started */
	unsigned failed;
	struct ffs_child *child; /* a->all of them */
	int done;     /* eventfd-like: the writing end of a pipe, a byte for each worker that is through */
	sem_t starts; /* so many may be starting; who waits for a guest of its own keeps nobody else from it */
};

/* ---- one child ---- */

static struct ffs_restore *view_of(struct herd *h, const struct ffs_child *c)
{
	return &h->view[(c->number - 1) / h->a->n];
}

static int attach(struct herd *h, struct ffs_child *c, struct ffs_error *err)
{
	struct json_object *body = json_object_new_object(), *request = json_object_new_object();
	const char *id = ffs_json_string(h->r->status, "id");
	int got;

	json_object_object_add(request, "attach", body);
	json_object_object_add(body, "name", json_object_new_string(c->name));
	json_object_object_add(body, h->r->ops->kind, json_object_new_string(c->attach_socket));
	if (strlen(id) == 36)
		json_object_object_add(body, "restored_from", json_object_new_string(id));
	if (h->a->track)
		json_object_object_add(body, "track", json_object_new_boolean(true));
	got = ffs_tree_request(h->r->tree, ".forkfs/ctl", request, NULL, err);
	json_object_put(request);
	return got;
}

/* Until it runs, or is where it shall stop. */
static int start_child(struct herd *h, struct ffs_child *c, struct ffs_error *err)
{
	const struct ffs_restore_gate gate = {&h->lock, &h->stopping};
	struct ffs_restore *r = view_of(h, c);
	int got = ffs_child_make_dir(c, ffs_restore_dir(h->a->how), r->target.branch, err);

	if (!got)
		got = ffs_restore_hooks_before(r, c, err);
	if (!got)
		got = ffs_restore_load(r, c, &gate, err);
	return got ? got : ffs_restore_run(r, c, err);
}

/* What its guest has to say before it counts. */
static int await_child(struct herd *h, struct ffs_child *c, struct ffs_error *err)
{
	int got = ffs_restore_await(view_of(h, c), c, err);

	return !got && c->name[0] ? attach(h, c, err) : got;
}

static void *work(void *arg)
{
	_cleanup_close_ int watch = -1;
	struct herd *h = arg;

	for (;;) {
		struct ffs_error err = {0};
		struct ffs_restore *r;
		struct ffs_child *c;
		int got;

		pthread_mutex_lock(&h->lock);
		c = h->stopping || h->next > h->a->all ? NULL : &h->child[h->next++ - 1];
		pthread_mutex_unlock(&h->lock);
		if (!c)
			break;
		c->watch = &watch;
		r = view_of(h, c);
		while (sem_wait(&h->starts) < 0)
			; /* EINTR: the only way in which it can fail */
		got = start_child(h, c, &err);
		sem_post(&h->starts);
		if (!got)
			got = await_child(h, c, &err);
		pthread_mutex_lock(&h->lock);
		c->ready = !got;
		if (!got) {
			ffs_print_json(ffs_restore_line(r, c));
			fflush(stdout);
		} else if (!h->stopping) {
			struct ffs_error shown = err;

			if (h->a->targets.n > 1)
				ffs_error_prefix(&shown, "child %u, of fork %s", c->number, r->target.fork);
			else
				ffs_error_prefix(&shown, "child %u", c->number);
			ffs_print_failure(h->self, &shown);
			h->failed++;
		}
		pthread_mutex_unlock(&h->lock);
		if (!got)
			ffs_restore_set_ready(r, c);
		pthread_mutex_lock(&h->lock);
		ffs_restore_hooks_close(r, c);
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
	for (unsigned i = 0; i < h->a->all; i++)
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

/* Is there anything that a guest has to say? */
static bool waits_for_guests(const struct herd *h)
{
	bool waits = h->r->healthy;

	for (unsigned i = 0; i < h->a->targets.n; i++)
		waits |= h->view[i].ack.n > 0;
	return waits;
}

static int start_all(struct herd *h, struct ffs_error *err)
{
	const unsigned all = h->a->all, at_once = how_many_at_once(all);
	unsigned n = at_once;
	_cleanup_free_ pthread_t *thread = NULL;
	int p[2], workers;

	if (waits_for_guests(h))
		n = all < MAX_AWAITED ? all : MAX_AWAITED;
	thread = calloc(n, sizeof(*thread));

	h->child = calloc(all, sizeof(*h->child));
	if (!thread || !h->child)
		return ffs_error_set(err, ENOMEM, "no memory for %u children", all);
	if (pipe2(p, O_CLOEXEC) < 0 || sem_init(&h->starts, 0, at_once) < 0)
		return ffs_error_errno(err, errno, "a pipe for the threads");
	h->done = p[1];
	for (unsigned i = 0; i < all; i++) {
		ffs_child_init(&h->child[i], i + 1);
		if (h->a->attach)
			snprintf(h->child[i].name, sizeof(h->child[i].name), all > 1 ? "%.50s-%u" : "%.64s",
				h->a->attach, i + 1);
	}
	workers = start_workers(h, thread, n);
	ffs_restore_set_prefetch(h->r, p[0]);
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
	for (unsigned i = h->next - 1; i < all; i++)
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
	json_object_object_add(o, "environment", ffs_argv_json(ffs_restore_environment(r)));
	json_object_object_add(o, "notes", json_object_get(r->notes));
	ffs_print_json(o);
	ffs_argv_free(&argv);
	return ffs_finish_output(self);
}

/* All that can be refused, of whichever target, is refused here. */
static int plan(struct ffs_restore *r, const struct restore_args *a, struct ffs_error *err)
{
	int got = ffs_restore_plan(r, a->how, err);

	for (unsigned i = 1; !got && i < a->targets.n; i++)
		got = ffs_tree_check_target(r->tree, &a->targets.target[i], err);
	return got;
}

/* What the children of all targets share is there once; then what those of each have of their own. */
static int begin(struct herd *h, struct ffs_error *err)
{
	const struct ffs_restore_targets *t = &h->a->targets;
	unsigned n = 0;
	int got;

	h->r->target.fork[0] = 0;
	got = ffs_restore_begin(h->r, h->a->how, err);
	if (got < 0)
		return got;
	ffs_restore_set_open(h->r);
	h->view = calloc(t->n, sizeof(*h->view));
	if (!h->view)
		return ffs_error_set(err, ENOMEM, "no memory for %u forks", t->n);
	while (!got && n < t->n) {
		got = ffs_restore_view(h->r, &t->target[n], &h->view[n], err);
		n++;
		if (!got && ffs_interrupted())
			got = ffs_error_set(err, EINTR, "interrupted");
	}
	return got;
}

static void end_views(struct herd *h)
{
	for (unsigned i = 0; h->view && i < h->a->targets.n; i++)
		ffs_restore_view_end(&h->view[i]);
	free(h->view);
}

static int restore(const struct ffs_command *self, struct ffs_restore *r, const struct restore_args *a)
{
	struct herd h = {.self = self, .r = r, .a = a, .lock = PTHREAD_MUTEX_INITIALIZER, .next = 1};
	struct ffs_error err = {0};
	int got = plan(r, a, &err);

	if (!got && a->show)
		return show(self, r);
	/* a child of a branch in flight is served by the daemon for its life, and cannot be branched */
	if (!got && a->attach && r->writing)
		got = ffs_wait_branch(r->tree, &r->target, true, &err);
	if (!got && a->attach)
		r->writing = false;
	if (!got)
		got = begin(&h, &err);
	if (!got)
		got = start_all(&h, &err);
	ffs_restore_set_end(r);
	end_views(&h);
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
	if (errno || *end || end == text || *text == '-' || !n || n > FFS_CHILDREN_MAX)
		return ffs_error_set(
			err, EINVAL, "-n is a number from 1 to %d, not '%.40s'", FFS_CHILDREN_MAX, text);
	*out = (unsigned)n;
	return 0;
}

static int check_args(struct restore_args *a, struct ffs_error *err)
{
	char name[80];
	int got = a->count ? parse_count(a->count, &a->n, err) : 0;

	a->all = a->n * a->targets.n;
	if (!got && a->all > FFS_CHILDREN_MAX)
		got = ffs_error_set(err, EINVAL,
			"%u children of each of %u forks are too many: %d are the most of one command", a->n,
			a->targets.n, FFS_CHILDREN_MAX);
	if (!got && a->ack && !a->targets.target->fork[0])
		got = ffs_error_set(err, EINVAL, "--ack is for the mailboxes of a fork: NAME/BRANCH/FORK");
	if (!got && a->attach) {
		snprintf(name, sizeof(name), a->all > 1 ? "%.70s-%u" : "%.70s", a->attach, a->all);
		got = ffs_check_name("sandbox", name, err);
	}
	if (!got && a->ack)
		got = ffs_ack_option(a->ack, &a->ack_ms, err);
	if (!got && a->ack && a->paused)
		got = ffs_error_set(err, EINVAL, "--ack and --paused exclude each other");
	if (!got && a->ack && a->no_ack)
		got = ffs_error_set(err, EINVAL, "--ack and --no-ack exclude each other");
	if (!got && a->how->healthy && a->paused)
		got = ffs_error_set(err, EINVAL, "--healthy and --paused exclude each other");
	if (!got && a->attach && a->paused)
		got = ffs_error_set(err, EINVAL, "--attach and --paused exclude each other");
	if (!got && a->track && !a->attach)
		got = ffs_error_set(err, EINVAL, "--track goes with --attach");
	if (!got && a->attach && ffs_restore_is_uffd(a->how))
		got = ffs_error_set(err, EINVAL,
			"--attach and --backend uffd exclude each other: memory that a pager serves cannot "
			"be branched");
	return got ? got : ffs_restore_check_args(a->how, err);
}

/* What the command line says, in one piece; 0, or the exit code of the command. */
static int read_targets(const struct ffs_command *self, struct restore_args *a, char **word, int n)
{
	struct ffs_error err = {0};
	int got = ffs_restore_targets_read(&a->targets, word, (unsigned)n, a->forks, &err);

	if (!got)
		got = check_args(a, &err);
	if (!got)
		return 0;
	return got == -EINVAL ? ffs_usage_error(self, "%s", err.text) : ffs_failure(self, &err);
}

static void free_args(struct restore_args *a)
{
	ffs_restore_targets_free(&a->targets);
	ffs_restore_args_free(a->how);
}

int ffs_cmd_restore(const struct ffs_command *self, int argc, char **argv)
{
	struct ffs_restore_args how = {0};
	_cleanup_(free_args) struct restore_args a = {.how = &how, .n = 1};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct ffs_restore r;
	struct ffs_opt opts[FFS_RESTORE_OPTS + 10] = {
		{NULL, 'n', FFS_OPT_VALUE, &a.count},
		{"forks", 0, FFS_OPT_VALUE, &a.forks},
		{"attach", 0, FFS_OPT_VALUE, &a.attach},
		{"track", 0, FFS_OPT_FLAG, &a.track},
		{"paused", 0, FFS_OPT_FLAG, &a.paused},
		{"ack", 0, FFS_OPT_VALUE, &a.ack},
		{"no-ack", 0, FFS_OPT_FLAG, &a.no_ack},
		{"show", 0, FFS_OPT_FLAG, &a.show},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
	};
	struct ffs_error err = {0};
	int n, code, own = argc;

	ffs_restore_opts(&how, opts + 9);
	for (int i = 1; i < argc && own == argc; i++)
		if (!strcmp(argv[i], "--"))
			own = i;
	if (ffs_opts_parse(opts, own, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.help)
		return ffs_usage_help(self);
	code = read_targets(self, &a, argv, n);
	if (code)
		return code;
	if (own < argc) {
		how.user_arg = (const char *const *)argv + own + 1;
		how.n_user_args = (unsigned)(argc - own - 1);
	}
	ffs_restore_init(&r, &t, a.targets.target, &how);
	r.paused = a.paused;
	r.ack_all = a.ack;
	r.ack_ms = a.ack_ms;
	r.ack_none = a.no_ack;
	ffs_interrupt_install();
	if (ffs_tree_open(&t, how.mount, &err) < 0)
		code = ffs_failure(self, &err);
	else
		code = restore(self, &r, &a);
	ffs_restore_end(&r);
	return code;
}
