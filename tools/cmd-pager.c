/* forkfs pager: serves the memory of a branch to VMMs that are restored with Firecracker's Uffd backend
 * (engine/pager/pager.h). Runs in the foreground for as long as it is needed; one line of JSON for each thing
 * that happens.
 *
 * Threads: the pager's. SIGTERM, SIGINT and SIGHUP: every VM gets all its pages, then it ends. SIGUSR1: the
 * VMs have started, what they touched is the working set. SIGUSR2: no more will come, it ends with the last.
 */
#include "cli.h"

#include <errno.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "options.h"
#include "pager/pager.h"
#include "store/working-set.h"
#include "tree.h"

static struct ffs_pager *pager; /* for the signal handlers: set before they are installed */

static void on_stop(int sig)
{
	ffs_pager_stop(pager);
}

static void on_ready(int sig)
{
	ffs_pager_ready(pager);
}

static void on_last(int sig)
{
	ffs_pager_last(pager);
}

/* `parent`: whose end is waited for; 0: nobody's. */
static void install(pid_t parent)
{
	static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
	struct sigaction stop = {.sa_handler = on_stop, .sa_flags = SA_RESTART};
	struct sigaction last = {.sa_handler = on_last, .sa_flags = SA_RESTART};
	struct sigaction ready = {.sa_handler = on_ready, .sa_flags = SA_RESTART};

	for (unsigned i = 0; i < sizeof(signals) / sizeof(*signals); i++)
		sigaction(signals[i], &stop, NULL);
	sigaction(SIGUSR1, &ready, NULL);
	sigaction(SIGUSR2, &last, NULL);
	/* it may have ended before the kernel knew that we want to be told */
	if (parent && (prctl(PR_SET_PDEATHSIG, SIGUSR2) < 0 || getppid() != parent))
		on_last(SIGUSR2);
	signal(SIGPIPE, SIG_IGN); /* who reads our lines may go */
}

static void report(void *arg, const struct ffs_pager_event *e)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "event", json_object_new_string(ffs_pager_event_name(e->kind)));
	json_object_object_add(o, "pid", json_object_new_int(e->pid));
	json_object_object_add(o, "memory_bytes", json_object_new_uint64(e->memory_bytes));
	json_object_object_add(o, "served_bytes", json_object_new_uint64(e->served_bytes));
	json_object_object_add(o, "prefetched_bytes", json_object_new_uint64(e->prefetched_bytes));
	json_object_object_add(o, "faults", json_object_new_uint64(e->faults));
	if (*e->why)
		json_object_object_add(o, "why", json_object_new_string(e->why));
	ffs_print_json(o);
	if (fflush(stdout))
		clearerr(stdout); /* nobody reads: the VMs come first */
}

/* memory.bin of a file, or of NAME/BRANCH; and the file of its working set, where it has a place. The caller
 * frees both. */
static int find(const char *word, const char *mount, char **memory, char **working_set, struct ffs_error *err)
{
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct ffs_target target;
	struct json_object *caps = NULL;

	if (access(word, F_OK) == 0) {
		*memory = realpath(word, NULL);
		return *memory ? 0 : ffs_error_errno(err, errno, "%.300s", word);
	}
	if (ffs_target_parse(word, FFS_TARGET_BRANCH, &target, NULL) < 0)
		return ffs_error_set(
			err, ENOENT, "there is no file '%.200s', nor is that a NAME/BRANCH", word);
	int r = ffs_tree_open(&t, mount, err);

	if (!r)
		r = ffs_tree_check_target(&t, &target, err);
	if (!r)
		r = ffs_tree_json(&t, ".forkfs/capabilities", &caps, err);
	if (r < 0)
		return r;
	const char *store = ffs_json_string(caps, "store");

	if (asprintf(memory, "%s/%s/branches/%s/memory.bin", t.mount, target.sandbox, target.branch) < 0)
		*memory = NULL;
	if (*store && !*working_set &&
		asprintf(working_set, "%s/%s/%s/" FFS_WORKING_SET, store, target.sandbox, target.branch) < 0)
		*working_set = NULL;
	json_object_put(caps);
	return *memory ? 0 : ffs_error_set(err, ENOMEM, "no memory");
}

/* Which user may connect. */
static int parse_owner(const char *text, struct ffs_pager_options *opt, struct ffs_error *err)
{
	char numbers[64];
	int r = ffs_owner_parse(text, numbers, err);

	if (r < 0)
		return r;
	if (sscanf(numbers, "%u:%u", &opt->uid, &opt->gid) != 2)
		return ffs_error_set(err, EINVAL, "--owner is UID:GID, not '%.60s'", text);
	return 0;
}

int ffs_cmd_pager(const struct ffs_command *self, int argc, char **argv)
{
	const char *mount = ffs_global_mount, *owner = NULL, *children = NULL, *limit = NULL, *set = NULL;
	struct ffs_pager_options opt = {
		.uid = geteuid(), .gid = getegid(), .limit = FFS_WORKING_SET_LIMIT, .report = report};
	bool help = false, with_parent = false;
	const struct ffs_opt opts[] = {{"mount", 0, FFS_OPT_VALUE, &mount},
		{"owner", 0, FFS_OPT_VALUE, &owner}, {"children", 'n', FFS_OPT_VALUE, &children},
		{"all", 0, FFS_OPT_FLAG, &opt.all}, {"no-prefetch", 0, FFS_OPT_FLAG, &opt.no_prefetch},
		{"limit", 0, FFS_OPT_VALUE, &limit}, {"working-set", 0, FFS_OPT_VALUE, &set},
		{"with-parent", 0, FFS_OPT_FLAG, &with_parent}, {"help", 'h', FFS_OPT_FLAG, &help}, {0}};
	_cleanup_free_ char *memory = NULL;
	_cleanup_free_ char *working_set = NULL;
	struct ffs_error err = {0};
	pid_t parent = getppid();
	int n = 0, r, count = 0;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (help)
		return ffs_usage_help(self);
	if (n != 2)
		return ffs_usage_error(
			self, "takes a branch, NAME/BRANCH or its memory.bin, and the SOCKET to listen at");
	if ((owner && parse_owner(owner, &opt, &err) < 0) ||
		(limit && ffs_size_parse("--limit", limit, &opt.limit, &err) < 0))
		return ffs_usage_error(self, "%s", err.text);
	if (children && ffs_pid_parse(children, &count, NULL) < 0)
		return ffs_usage_error(self, "--children is a number above 0, not '%.60s'", children);
	opt.children = (unsigned)count;
	if (set && !(working_set = strdup(set)))
		return FFS_EXIT_FAILURE;
	if (find(argv[0], mount, &memory, &working_set, &err) < 0)
		return ffs_failure(self, &err);
	opt.memory = memory;
	opt.working_set = working_set;
	opt.socket = argv[1];
	/* each VM has some, here and in the guard; where it fails, fewer can be served */
	r = ffs_raise_file_limit();
	if (r < 0)
		fprintf(stderr, "forkfs pager: the limit of open files stays: %s\n", strerror(-r));
	if (ffs_pager_new(&opt, &pager, &err) < 0)
		return ffs_failure(self, &err);
	install(with_parent ? parent : 0);
	printf("{\"event\":\"listens\",\"pid\":%d}\n", (int)getpid());
	r = fflush(stdout) ? ffs_error_errno(&err, errno, "the output could not be written") : 0;
	if (!r)
		r = ffs_pager_run(pager, &err);
	ffs_pager_free(pager);
	return r < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}
