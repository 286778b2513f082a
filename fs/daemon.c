/* Owns the daemon's life: process, engine, mount, session, its threads, and the end.
 *
 * Threads: the main thread runs the session's loop and takes no signals but the one that ends it; SIGTERM,
 * SIGINT and SIGHUP are blocked everywhere and read by the reaper from a signalfd. The engine's helpers are
 * forked before anything that they must not hold (the device) is open and before any thread exists. */
#include "daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ack.h"
#include "attach.h"
#include "attached.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "base/util.h"
#include "ctl.h"
#include "durable.h"
#include "events.h"
#include "keyed.h"
#include "mount.h"
#include "named.h"
#include "ops.h"

#define WORKERS 16
/* Jobs that wait for a VMM each hold a thread; beyond these they queue. */
#define JOBS 128
/* Branches go to the store one after the other: a disk that two share is slower for both. */
#define WRITERS 1
#define KICK_NS (20 * FFS_NS_PER_MS)

struct daemon {
	struct ffs_fs fs;
	struct ffs_mount mount;
	pthread_t main_thread;
	int signals; /* signalfd */
	bool stopping;
	bool signalled; /* it ends by a signal; read after the reaper has ended */
	atomic_bool loop_ended;
	int front; /* pipe to the process that waits for us; -1 */
};

/* What the daemon tells the process that started it. */
struct report {
	int code;
	char text[508];
};

static void tell_front(struct daemon *d, int code, const char *text)
{
	struct report rep = {.code = code};

	if (d->front < 0)
		return;
	snprintf(rep.text, sizeof(rep.text), "%s", text);
	if (ffs_write_full(d->front, &rep, sizeof(rep)) < 0)
		ffs_log(FFS_LOG_DEBUG, "nobody waits for the mount");
	ffs_close_fd(&d->front);
}

/* ---- the reaper's part ---- */

static unsigned reaper_fds(void *arg, int *fds, unsigned max)
{
	struct daemon *d = arg;
	struct ffs_fs *fs = &d->fs;
	unsigned n = 0;

	fds[n++] = d->signals;
	pthread_mutex_lock(&fs->lock);
	for (struct ffs_list *e = fs->sandboxes.next; n < max && e != &fs->sandboxes; e = e->next) {
		struct ffs_sbx *s = ffs_container(e, struct ffs_sbx, link);

		if (s->pidfd >= 0 && !s->exited)
			fds[n++] = s->pidfd;
	}
	pthread_mutex_unlock(&fs->lock);
	return n;
}

static void check_exited(struct ffs_fs *fs, struct ffs_sbx *s)
{
	struct pollfd p = {.fd = s->pidfd, .events = POLLIN};

	if (s->pidfd < 0 || s->exited || poll(&p, 1, 0) <= 0)
		return;
	s->exited = true;
	ffs_event(fs, "exited", s->name, NULL, NULL, NULL);
	ffs_log(FFS_LOG_INFO, "%s: the VM has exited", s->name);
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
	return !a || (b && b < a) ? b : a;
}

static uint64_t reaper_tick(void *arg)
{
	struct daemon *d = arg;
	struct ffs_fs *fs = &d->fs;
	uint64_t now = ffs_now_ns(), again = 0;
	struct signalfd_siginfo si;

	while (read(d->signals, &si, sizeof(si)) == sizeof(si)) {
		ffs_log(FFS_LOG_INFO, "signal %u: ending", si.ssi_signo);
		d->stopping = d->signalled = true;
	}
	pthread_mutex_lock(&fs->lock);
	for (struct ffs_list *e = fs->sandboxes.next, *next; e != &fs->sandboxes; e = next) {
		struct ffs_sbx *s = ffs_container(e, struct ffs_sbx, link);

		next = e->next;
		check_exited(fs, s);
		again = earlier(again, ffs_gen_sweep(s->gens, now, ffs_caller_alive, ffs_live_ended, NULL));
	}
	again = earlier(again, ffs_keyed_tick(fs, now));
	if (fs->shutdown_at_ns && now >= fs->shutdown_at_ns)
		d->stopping = true;
	else
		again = earlier(again, fs->shutdown_at_ns);
	pthread_mutex_unlock(&fs->lock);
	if (d->stopping && !atomic_load(&d->loop_ended)) {
		/* until the loop has seen it: it could be just about to go to sleep */
		fuse_session_exit(fs->se);
		pthread_kill(d->main_thread, SIGUSR1);
		again = earlier(again, now + KICK_NS);
	}
	return again;
}

/* ---- set-up ---- */

static void no_action(int sig)
{
}

/* Blocked here and in every thread from now on, delivered to the signalfd. SIGUSR1 only wakes the main
 * thread. */
static int setup_signals(struct daemon *d, struct ffs_error *err)
{
	struct sigaction wake = {.sa_handler = no_action}, ignore = {.sa_handler = SIG_IGN};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	d->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (d->signals < 0 || sigprocmask(SIG_BLOCK, &set, NULL) < 0 || sigaction(SIGUSR1, &wake, NULL) < 0 ||
		sigaction(SIGPIPE, &ignore, NULL) < 0)
		return ffs_error_errno(err, errno, "signals");
	return 0;
}

static int setup_fs(struct daemon *d, const struct ffs_mount_options *opt, struct ffs_error *err)
{
	struct ffs_fs *fs = &d->fs;

	fs->opt = *opt;
	fs->uid = getuid();
	fs->gid = getgid();
	fs->mounted_ns = ffs_wall_ns();
	fs->next_serial = 1;
	pthread_mutex_init(&fs->lock, NULL);
	pthread_cond_init(&fs->live_taken, NULL);
	ffs_list_init(&fs->sandboxes);
	ffs_list_init(&fs->owed);
	ffs_list_init(&fs->writes);
	fs->nodes = ffs_nodes_new();
	fs->handles = ffs_handles_new();
	fs->events = ffs_events_new(fs);
	fs->sentences = ffs_sentences_new();
	if (!fs->nodes || !fs->handles || !fs->events || !fs->sentences)
		return ffs_error_set(err, ENOMEM, "no memory");
	int r = ffs_keyed_init(fs, err);

	if (!r)
		r = ffs_engine_new(&fs->engine, err);
	if (r < 0)
		return r;
	ffs_engine_limit(
		fs->engine, &(struct ffs_engine_limits){.memory = opt->memory, .captures = opt->captures});
	r = ffs_acks_new(fs, err);
	if (r < 0)
		return r;
	/* after the helpers were forked: they must not hold the store's lock */
	r = ffs_durable_open(fs, err);
	if (r < 0)
		return r;
	fs->give_up = ffs_cancel_new();
	if (!fs->give_up)
		return ffs_error_set(err, ENOMEM, "no memory");
	/* not mounted yet: nobody asks a dead daemon */
	_cleanup_free_ char *dir = realpath(d->mount.dir, NULL);

	fs->attached = ffs_attached_new(opt, dir ? dir : d->mount.dir);
	if (fs->attached && opt->reattach_off) {
		ffs_attached_forget_all(fs->attached);
		ffs_attached_free(fs->attached);
		fs->attached = NULL;
	}
	return 0;
}

static void session_ready(void *arg)
{
	struct daemon *d = arg;
	struct ffs_fs *fs = &d->fs;

	ffs_log(FFS_LOG_INFO, "%s is mounted, settled branches are served %s%s%s", d->mount.dir,
		atomic_load(&fs->pass.on) ? "by passthrough" : "from the page cache",
		fs->pass.why_off[0] ? ": " : "", fs->pass.why_off);
	ffs_mount_read_ahead(&d->mount);
	tell_front(d, 0, "");
	if (fs->opt.ready)
		fs->opt.ready(fs->opt.ready_arg);
}

static void op_init(void *userdata, struct fuse_conn_info *conn)
{
	/* content never changes: an attribute that does (a vmstate's size) is no reason to drop pages, nor to
	 * ask before every read */
	conn->want &= ~(unsigned)FUSE_CAP_AUTO_INVAL_DATA;
	/* so that the kernel remembers that there are none: ls asks for them with every file */
	if (conn->capable & FUSE_CAP_POSIX_ACL)
		conn->want |= FUSE_CAP_POSIX_ACL;
	conn->max_background = 64;
	conn->congestion_threshold = 48;
}

static int setup_session(struct daemon *d, struct ffs_error *err)
{
	struct ffs_fs *fs = &d->fs;
	struct fuse_lowlevel_ops ops = ffs_operations;
	char *argv[] = {(char *)"forkfs",
		(char *)"-ofsname=forkfs,subtype=forkfs,default_permissions,nosuid,nodev",
		(char *)"-oallow_other", NULL};
	struct fuse_args args = FUSE_ARGS_INIT(fs->opt.allow_other ? 3 : 2, argv);

	ops.init = op_init;
	fs->se = fuse_session_new(&args, &ops, sizeof(ops), fs);
	fuse_opt_free_args(&args);
	if (!fs->se)
		return ffs_error_set(err, EIO, "libfuse gives no session (its reason is on stderr)");
	int r = ffs_mount_session(&d->mount, &fs->opt, fs->se, err);

	if (r < 0)
		return r;
	fs->mount_id = d->mount.id;
	fs->mount_dev = d->mount.dev;
	fs->pass.wanted = fs->opt.passthrough == FFS_PASSTHROUGH_AUTO;
	fs->pass.ready = session_ready;
	fs->pass.ready_arg = d;
	r = ffs_passthrough_install(&fs->pass, fs->se, d->mount.device);
	if (r < 0)
		return ffs_error_errno(err, -r, "libfuse's I/O");
	return 0;
}

static int start_threads(struct daemon *d, struct ffs_error *err)
{
	struct ffs_reaper_ops ops = {.fds = reaper_fds, .tick = reaper_tick, .arg = d};

	d->main_thread = pthread_self();
	d->fs.pool = ffs_pool_new(JOBS);
	d->fs.writers = ffs_pool_new(WRITERS);
	d->fs.reaper = d->fs.pool && d->fs.writers ? ffs_reaper_new(&ops) : NULL;
	if (!d->fs.reaper || ffs_acks_start(&d->fs) < 0)
		return ffs_error_set(err, ENOMEM, "no thread for the daemon");
	ffs_attach_again(&d->fs);
	return 0;
}

/* ---- the end ---- */

static void cancel_txn(struct ffs_handle *h, void *arg)
{
	if (h->txn)
		ffs_cancel_set(ffs_txn_cancel(h->txn));
}

/* One after the other: a guest is let go in milliseconds. */
static void detach_all(struct ffs_fs *fs)
{
	for (;;) {
		struct ffs_sbx *found = NULL;

		pthread_mutex_lock(&fs->lock);
		for (struct ffs_list *e = fs->sandboxes.next; !found && e != &fs->sandboxes; e = e->next) {
			struct ffs_sbx *s = ffs_container(e, struct ffs_sbx, link);

			if (s->engine && !s->detaching)
				found = ffs_sbx_ref(s);
		}
		if (found)
			found->detaching = true;
		pthread_mutex_unlock(&fs->lock);
		if (!found)
			return;
		ffs_sbx_detach(found);
		pthread_mutex_lock(&fs->lock);
		ffs_sbx_unref(found);
		pthread_mutex_unlock(&fs->lock);
	}
}

/* What lives in memory ends with us; open handles keep theirs to the last. */
static void drop_branches(struct ffs_fs *fs)
{
	pthread_mutex_lock(&fs->lock);
	for (struct ffs_list *e = fs->sandboxes.next; e != &fs->sandboxes; e = e->next) {
		struct ffs_sbx *s = ffs_container(e, struct ffs_sbx, link);

		for (struct ffs_list *b = s->branches.next, *next; b != &s->branches; b = next) {
			struct ffs_named *n = ffs_container(b, struct ffs_named, link);

			next = b->next;
			if (n->shot)
				ffs_named_remove(n);
		}
	}
	pthread_mutex_unlock(&fs->lock);
}

static void end(struct daemon *d)
{
	struct ffs_fs *fs = &d->fs;

	atomic_store(&d->loop_ended, true);
	pthread_mutex_lock(&fs->lock);
	fs->closing = true;
	ffs_handles_each(fs, cancel_txn, NULL);
	pthread_mutex_unlock(&fs->lock);
	ffs_attach_give_up(fs);
	detach_all(fs);
	ffs_mount_end(&d->mount, fs->se);
	/* what is complete outlives us */
	ffs_durable_drain(fs);
	drop_branches(fs);
	ffs_pool_stop(fs->writers);
	/* Jobs reply through the session, so it stays. What is still parked was ended by the unmount. */
	ffs_pool_stop(fs->pool);
	ffs_acks_stop(fs);
	ffs_reaper_stop(fs->reaper);
	ffs_engine_unref(fs->engine);
	/* who unmounts is done with it; after a signal, or a death, the next daemon goes on */
	if (fs->attached && !d->signalled)
		ffs_attached_forget_all(fs->attached);
	ffs_attached_free(fs->attached);
	ffs_durable_close(fs);
	ffs_log(FFS_LOG_INFO, "%s: ended", d->mount.dir);
}

static int serve(struct daemon *d, const struct ffs_mount_options *opt, struct ffs_error *err)
{
	int r = setup_fs(d, opt, err);

	if (!r)
		r = setup_signals(d, err);
	if (!r)
		r = setup_session(d, err);
	if (!r)
		r = start_threads(d, err);
	if (r < 0) {
		if (d->fs.se)
			ffs_mount_end(&d->mount, d->fs.se);
		if (d->fs.engine)
			ffs_engine_unref(d->fs.engine);
		return r;
	}
	struct fuse_loop_config *config = fuse_loop_cfg_create();

	if (config) {
		fuse_loop_cfg_set_clone_fd(config, 1);
		fuse_loop_cfg_set_max_threads(config, WORKERS);
		fuse_loop_cfg_set_idle_threads(config, WORKERS);
	}
	r = fuse_session_loop_mt(d->fs.se, config);
	fuse_loop_cfg_destroy(config);
	end(d);
	if (!atomic_load(&d->fs.pass.init_done))
		return ffs_error_set(err, EIO, "the kernel ended the session before it began");
	return r < 0 ? ffs_error_errno(err, -r, "the session on %s", d->mount.dir) : 0;
}

/* ---- processes ---- */

static int absolute(const char *dir, char **out)
{
	char *cwd = NULL;
	int n;

	if (dir[0] == '/') {
		*out = strdup(dir);
		return *out ? 0 : -ENOMEM;
	}
	cwd = getcwd(NULL, 0);
	if (!cwd)
		return -errno;
	n = asprintf(out, "%s/%s", strcmp(cwd, "/") == 0 ? "" : cwd, dir);
	free(cwd);
	return n < 0 ? -ENOMEM : 0;
}

static int to_background(void)
{
	int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (fd < 0 || setsid() < 0 || chdir("/") < 0)
		return -errno;
	for (int i = 0; i <= 2; i++)
		if (dup2(fd, i) < 0)
			return -errno;
	if (fd > 2)
		close(fd);
	return 0;
}

/* The new process: never returns. */
static void __attribute__((noreturn)) run_background(struct daemon *d, const struct ffs_mount_options *opt)
{
	struct ffs_error err = {0};
	int r = to_background();

	if (r < 0)
		ffs_error_errno(&err, -r, "going to the background");
	ffs_log_setup(1, opt->log);
	if (!r)
		r = serve(d, opt, &err);
	if (r < 0) {
		ffs_log(FFS_LOG_ERROR, "%s", err.text);
		tell_front(d, -r, err.text);
	}
	_exit(r < 0);
}

static int await_report(pid_t pid, int fd, struct ffs_error *err)
{
	struct report rep;
	size_t got = 0;
	int status = 0;

	while (got < sizeof(rep)) {
		ssize_t n = read(fd, (char *)&rep + got, sizeof(rep) - got);

		if (n == 0 || (n < 0 && errno != EINTR))
			break;
		got += n > 0 ? (size_t)n : 0;
	}
	if (got < sizeof(rep)) {
		while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
			;
		return ffs_error_set(err, EIO, "the daemon ended before it served (%s %d)",
			WIFSIGNALED(status) ? "signal" : "exit code",
			WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
	}
	rep.text[sizeof(rep.text) - 1] = '\0';
	return rep.code ? ffs_error_set(err, rep.code, "%s", rep.text) : 0;
}

/* What the options say of the store, as the daemon needs it: with an absolute path that is not below the
 * mount (it would be hidden, and we would wait for ourselves). */
static int resolve_store(struct ffs_mount_options *opt, const char *mount_dir, struct ffs_error *err)
{
	_cleanup_free_ char *path = NULL;
	size_t len = strlen(mount_dir);
	int r;

	if (!opt->store[0])
		return opt->default_store == FFS_STORE_MEMORY
			       ? 0
			       : ffs_error_set(err, EINVAL,
					 "mount option default-store: without store=DIR branches live in "
					 "memory only");
	if (!opt->default_store_given)
		opt->default_store = FFS_STORE_DENSE;
	r = absolute(opt->store, &path);
	if (r < 0 || strlen(path) >= sizeof(opt->store))
		return ffs_error_set(err, r < 0 ? -r : ENAMETOOLONG, "the store %s has no path", opt->store);
	snprintf(opt->store, sizeof(opt->store), "%s", path);
	if (strncmp(opt->store, mount_dir, len) == 0 && (!opt->store[len] || opt->store[len] == '/'))
		return ffs_error_set(
			err, EINVAL, "the store %s is below the mount: take another directory", path);
	return 0;
}

int ffs_daemon_run(const struct ffs_mount_options *given, struct ffs_error *err)
{
	/* reachable to the end: what the kernel or a parked request still holds then is not freed */
	static struct daemon d;
	static struct ffs_mount_options copy;
	const struct ffs_mount_options *opt = &copy;
	int ends[2], r = absolute(given->mountpoint, &d.mount.dir);

	if (r < 0)
		return ffs_error_errno(err, -r, "%s", given->mountpoint);
	copy = *given;
	r = resolve_store(&copy, d.mount.dir, err);
	if (r < 0)
		return r;
	d.front = -1;
	r = ffs_mount_prepare(d.mount.dir, err);
	if (r < 0)
		return r;
	if (opt->foreground) {
		ffs_log_setup(0, opt->log);
		return serve(&d, opt, err);
	}
	if (pipe2(ends, O_CLOEXEC) < 0)
		return ffs_error_errno(err, errno, "pipe");
	pid_t pid = fork();

	if (pid < 0) {
		r = ffs_error_errno(err, errno, "fork");
		close(ends[0]);
		close(ends[1]);
		return r;
	}
	if (!pid) {
		close(ends[0]);
		d.front = ends[1];
		run_background(&d, opt);
	}
	close(ends[1]);
	r = await_report(pid, ends[0], err);
	close(ends[0]);
	return r;
}
