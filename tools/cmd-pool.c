/* forkfs pool: a warm pool of a branch's children. serve is the pool itself, in the foreground; the others ask it.
 *
 * One thread until the pool serves; the signals that end it are read from a descriptor then, and blocked in all threads. */
#include "cli.h"

#include <errno.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "pool.h"

struct serve_args {
	const char *socket, *min, *max, *ttl;
	bool end_all, help;
	unsigned n_min, n_max, ttl_s;
};

static int parse_number(const char *name, const char *text, unsigned least, unsigned most, unsigned *out,
	struct ffs_error *err)
{
	char *end;
	unsigned long n;

	errno = 0;
	n = strtoul(text ? text : "", &end, 10);
	if (!text || errno || *end || end == text || *text == '-' || n < least || n > most)
		return ffs_error_set(err, EINVAL, "%s is a number from %u to %u%s%.40s%s", name, least, most,
			text ? ", not '" : "", text ? text : "", text ? "'" : "");
	*out = (unsigned)n;
	return 0;
}

static int check(struct serve_args *a, struct ffs_restore_args *how, struct ffs_error *err)
{
	int got =
		a->socket ? 0 : ffs_error_set(err, EINVAL, "--socket PATH is wanted: where the pool serves");

	if (!got)
		got = parse_number("--max", a->max, 1, FFS_POOL_MAX, &a->n_max, err);
	if (!got)
		got = parse_number("--min", a->min, 0, a->n_max, &a->n_min, err);
	if (!got && a->ttl)
		got = ffs_seconds_option("--ttl", a->ttl, &a->ttl_s, err);
	if (!got)
		got = ffs_restore_check_args(how, err);
	if (!got && ffs_restore_is_uffd(how))
		got = ffs_error_set(err, ENOTSUP,
			"--backend uffd is not for a pool, whose children share the branch's image and get "
			"pages of their own");
	return got;
}

static int take_signals(void)
{
	static const int all[] = {SIGINT, SIGTERM, SIGHUP};

	return ffs_signals_take(all, FFS_ARRAY_LEN(all));
}

/* A few descriptors for each child, and one for each who asks. */
static void raise_limit(void)
{
	struct rlimit l;

	if (!getrlimit(RLIMIT_NOFILE, &l) && l.rlim_cur < l.rlim_max) {
		l.rlim_cur = l.rlim_max < 65536 ? l.rlim_max : 65536;
		/* where it cannot be, there is less room */
		if (setrlimit(RLIMIT_NOFILE, &l) < 0)
			return;
	}
}

static unsigned starts_at_once(unsigned max)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned most = cpus > 2 ? (unsigned)cpus * 2 : 4;

	most = most < POOL_STARTS ? most : POOL_STARTS;
	return max < most ? max : most;
}

static void say_ready(const struct pool *p)
{
	struct json_object *o = json_object_new_object();
	char name[200];

	snprintf(name, sizeof(name), "%s/%s%s%s", p->target->sandbox, p->target->branch,
		p->target->fork[0] ? "/" : "", p->target->fork);
	json_object_object_add(o, "pool", json_object_new_string(name));
	json_object_object_add(o, "pid", json_object_new_int(getpid()));
	json_object_object_add(o, "socket", json_object_new_string(p->name.path));
	ffs_print_json(o);
	fflush(stdout);
}

/* The branch is looked at before anybody can ask: what can never be restored is refused here. */
static int begin(struct pool *p, const struct serve_args *a, struct ffs_error *err)
{
	int got = pool_listen(&p->name, a->socket, err);

	if (got < 0)
		return got;
	pool_template_put(pool_template_get(p, err));
	if (!p->template)
		return -err->code;
	p->child = calloc(a->n_max, sizeof(*p->child));
	p->ended = calloc(a->n_max, sizeof(*p->ended));
	if (!p->child || !p->ended ||
		ffs_pool_book_init(
			&p->book, a->n_min, a->n_max, starts_at_once(a->n_max), a->ttl_s * FFS_NS_PER_S) < 0)
		return ffs_error_set(err, ENOMEM, "no memory for %u children", a->n_max);
	if (ffs_interrupted())
		return ffs_error_set(err, EINTR, "interrupted");
	p->signals = take_signals();
	p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (p->signals < 0 || p->wake < 0)
		return ffs_error_errno(err, errno, "the pool's descriptors");
	got = pool_guard_start(&p->guard, err);
	if (!got && !pool_guard_socket(&p->guard, &p->name))
		got = ffs_error_set(err, EPIPE, "the guard of the pool does not listen");
	return got;
}

static int serve_pool(struct pool *p, const struct serve_args *a)
{
	struct ffs_error err = {0};
	int got = begin(p, a, &err);

	if (!got) {
		say_ready(p);
		got = pool_serve(p, &err);
	}
	pool_unlisten(&p->name);
	pool_guard_end(&p->guard);
	pool_template_put(p->template);
	for (unsigned i = 0; i < POOL_STARTS; i++)
		ffs_close_fd(&p->watch[i]);
	ffs_pool_book_free(&p->book);
	free(p->child);
	free(p->ended);
	return got < 0 ? ffs_failure(p->self, &err) : FFS_EXIT_OK;
}

static int serve(const struct ffs_command *self, int argc, char **argv)
{
	struct serve_args a = {0};
	_cleanup_(ffs_restore_args_free) struct ffs_restore_args how = {0};
	struct ffs_opt opts[FFS_RESTORE_OPTS + 7] = {
		{"socket", 0, FFS_OPT_VALUE, &a.socket},
		{"min", 0, FFS_OPT_VALUE, &a.min},
		{"max", 0, FFS_OPT_VALUE, &a.max},
		{"ttl", 0, FFS_OPT_VALUE, &a.ttl},
		{"end-all", 0, FFS_OPT_FLAG, &a.end_all},
		{"help", 'h', FFS_OPT_FLAG, &a.help},
	};
	static struct pool p;
	struct ffs_target target;
	struct ffs_error err = {0};
	int n, own = argc;

	ffs_restore_opts(&how, opts + 6);
	for (int i = 1; i < argc && own == argc; i++)
		if (!strcmp(argv[i], "--"))
			own = i;
	if (ffs_opts_parse(opts, own, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (a.help)
		return ffs_usage_help(self);
	if (n != 1)
		return ffs_usage_error(
			self, "one NAME/BRANCH[/FORK] is wanted; the VMM's own options go after --");
	if (ffs_target_parse(argv[0], FFS_TARGET_BRANCH | FFS_TARGET_FORK, &target, &err) < 0 ||
		check(&a, &how, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (own < argc) {
		how.user_arg = (const char *const *)argv + own + 1;
		how.n_user_args = (unsigned)(argc - own - 1);
	}
	p = (struct pool){.self = self,
		.target = &target,
		.how = &how,
		.end_all = a.end_all,
		.name = {.listener = -1},
		.signals = -1,
		.wake = -1,
		.guard = {.fd = -1, .pidfd = -1},
		.lock = PTHREAD_MUTEX_INITIALIZER,
		.template_lock = PTHREAD_MUTEX_INITIALIZER,
		.began_ns = ffs_now_ns()};
	for (unsigned i = 0; i < POOL_STARTS; i++)
		p.watch[i] = -1;
	raise_limit();
	ffs_interrupt_install();
	return serve_pool(&p, &a);
}

int ffs_cmd_pool(const struct ffs_command *self, int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(const struct ffs_command *self, int argc, char **argv);
	} verbs[] = {{"serve", serve}, {"acquire", pool_acquire}, {"release", pool_release_some},
		{"status", pool_ask_status}, {"drain", pool_ask_drain}};

	for (unsigned i = 0; argc > 1 && i < FFS_ARRAY_LEN(verbs); i++)
		if (!strcmp(argv[1], verbs[i].name))
			return verbs[i].run(self, argc - 1, argv + 1);
	if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
		return ffs_usage_help(self);
	return ffs_usage_error(self, "one of serve, acquire, release, status and drain is wanted");
}
