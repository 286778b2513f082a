/* Owns one child VM from its directory to the moment it is let go: the process, its pidfd, what it inherits.
 *
 * Threads: a child belongs to the thread that starts it; only c->pidfd and c->ready are looked at by another, under
 * the command's lock. No locks here. What waits, waits for the process too. */
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "restore.h"

#define SAID_MAX 300
#define ASKED_MAX (256u << 10)
/* Above what any child inherits: a descriptor that waits there is never overwritten by another's dup2. */
#define ABOVE (3 + FFS_CHILD_FDS)

void ffs_child_init(struct ffs_child *c, unsigned number)
{
	*c = (struct ffs_child){.number = number, .control = -1, .pidfd = -1};
	for (unsigned i = 0; i < FFS_CHILD_FDS; i++)
		c->inherit[i] = -1;
	c->sockets = json_object_new_object();
}

static int make_parents(const char *base, struct ffs_error *err)
{
	_cleanup_free_ char *path = strdup(base);

	if (!path)
		return ffs_error_set(err, ENOMEM, "no memory for a path");
	for (char *p = path + 1;; p++) {
		bool end = !*p;

		if (*p != '/' && !end)
			continue;
		*p = 0;
		if (mkdir(path, 0700) < 0 && errno != EEXIST)
			return ffs_error_errno(err, errno, "%s, for the sockets of the children", path);
		if (end)
			return 0;
		*p = '/';
	}
}

int ffs_child_make_dir(struct ffs_child *c, const char *base, const char *label, struct ffs_error *err)
{
	/* 107 bytes is what a socket's name may have */
	if ((size_t)snprintf(c->dir, sizeof(c->dir), "%s/%.40s.XXXXXX", base, label) >= 80) {
		c->dir[0] = 0;
		return ffs_error_set(err, ENAMETOOLONG,
			"%s is too long a directory for sockets: name another by --dir", base);
	}
	int r = make_parents(base, err);

	if (!r && !mkdtemp(c->dir))
		r = ffs_error_errno(
			err, errno, "%s: no directory can be made there (another by --dir)", base);
	if (r < 0)
		c->dir[0] = 0;
	return r;
}

int ffs_child_give(struct ffs_child *c, int number, int fd, struct ffs_error *err)
{
	int copy;

	if (number < 3 || number >= ABOVE)
		return ffs_error_set(
			err, EMFILE, "a child cannot be given more than %d descriptors", FFS_CHILD_FDS);
	copy = fcntl(fd, F_DUPFD_CLOEXEC, ABOVE);
	if (copy < 0)
		return ffs_error_errno(err, errno, "a descriptor for a child");
	ffs_close_fd(&c->inherit[number - 3]);
	c->inherit[number - 3] = copy;
	return 0;
}

void ffs_child_socket(struct ffs_child *c, const char *what, const char *name, char path[160])
{
	snprintf(path, 160, "%s/%.50s", c->jail[0] ? c->jail : c->dir, name);
	json_object_object_add(c->sockets, what, json_object_new_string(path));
}

void ffs_child_name(const struct ffs_child *c, const char *name, char path[160])
{
	snprintf(path, 160, "%s/%.50s", c->jail[0] ? "" : c->dir, name);
}

/* ---- its start ---- */

/* Ours, with what the caller's configuration says in front, so that it wins. NULL: no memory. */
static char **make_environment(const struct ffs_argv *env)
{
	size_t n = 0, at = 0;
	char **all;

	while (environ[n])
		n++;
	all = calloc(n + env->n + 1, sizeof(*all));
	for (unsigned i = 0; all && i < env->n; i++)
		all[at++] = env->word[i];
	for (size_t i = 0; all && i < n; i++) {
		bool given = false;

		for (unsigned k = 0; k < env->n && !given; k++) {
			size_t len = (size_t)(strchr(env->word[k], '=') - env->word[k]) + 1;

			given = !strncmp(env->word[k], environ[i], len);
		}
		if (!given)
			all[at++] = environ[i];
	}
	return all;
}

static int make_actions(struct ffs_child *c, posix_spawn_file_actions_t *fa)
{
	char path[160];
	int r = posix_spawn_file_actions_addopen(fa, 0, "/dev/null", O_RDONLY, 0);

	for (int fd = 1; !r && fd <= 2; fd++) {
		snprintf(path, sizeof(path), "%s/%s", c->dir, fd == 1 ? "stdout" : "stderr");
		r = posix_spawn_file_actions_addopen(fa, fd, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
	}
	for (int i = 0; !r && i < FFS_CHILD_FDS; i++)
		r = c->inherit[i] < 0 ? 0 : posix_spawn_file_actions_adddup2(fa, c->inherit[i], 3 + i);
	if (!r)
		r = posix_spawn_file_actions_addchdir_np(fa, c->dir);
	return r;
}

/* The command's signal handlers are ours, and so is what its threads block. */
static int make_attributes(posix_spawnattr_t *attr)
{
	sigset_t none, all;
	int r;

	sigemptyset(&none);
	sigfillset(&all);
	r = posix_spawnattr_setsigmask(attr, &none);
	if (!r)
		r = posix_spawnattr_setsigdefault(attr, &all);
	if (!r)
		r = posix_spawnattr_setflags(
			attr, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	return r;
}

int ffs_child_spawn(
	struct ffs_child *c, const struct ffs_argv *argv, const struct ffs_argv *env, struct ffs_error *err)
{
	_cleanup_free_ char **environment = make_environment(env);
	posix_spawn_file_actions_t fa;
	posix_spawnattr_t attr;
	int r;

	if (!environment || argv->failed || env->failed)
		return ffs_error_set(err, ENOMEM, "no memory for a command line");
	r = posix_spawn_file_actions_init(&fa);
	if (r)
		return ffs_error_errno(err, r, "a child cannot be started");
	r = posix_spawnattr_init(&attr);
	if (!r) {
		r = make_actions(c, &fa);
		if (!r)
			r = make_attributes(&attr);
		if (!r)
			r = posix_spawn(&c->pid, argv->word[0], &fa, &attr, argv->word, environment);
		posix_spawnattr_destroy(&attr);
	}
	posix_spawn_file_actions_destroy(&fa);
	for (unsigned i = 0; i < FFS_CHILD_FDS; i++)
		ffs_close_fd(&c->inherit[i]);
	if (r) {
		c->pid = 0;
		return ffs_error_errno(err, r, "%s cannot be run", argv->word[0]);
	}
	/* it is ours and not reaped: the number cannot be another's */
	c->pidfd = (int)syscall(SYS_pidfd_open, c->pid, 0);
	if (c->pidfd < 0)
		return ffs_error_errno(err, errno, "a descriptor of process %d", (int)c->pid);
	return 0;
}

/* ---- its life ---- */

void ffs_child_kill(const struct ffs_child *c)
{
	/* fails when it has ended already */
	if (c->pidfd >= 0 && syscall(SYS_pidfd_send_signal, c->pidfd, SIGKILL, NULL, 0) < 0)
		return;
}

bool ffs_child_ended(const struct ffs_child *c)
{
	struct pollfd p = {.fd = c->pidfd, .events = POLLIN};

	return c->pidfd < 0 || poll(&p, 1, 0) > 0;
}

void ffs_child_poll(const struct ffs_child *c, int fd, int ms)
{
	struct pollfd p[2] = {{.fd = c->pidfd, .events = POLLIN}, {.fd = fd, .events = POLLIN}};

	if (poll(p, 2, ms) < 0)
		return; /* EINTR: the caller looks again */
}

/* The last line it wrote on stderr, printable; "" when there is none. */
static void last_words(const struct ffs_child *c, char out[SAID_MAX])
{
	_cleanup_close_ int fd = -1;
	char path[160], text[1024], *line;
	off_t size;
	ssize_t n;

	out[0] = 0;
	snprintf(path, sizeof(path), "%s/stderr", c->dir);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
	if (size <= 0)
		return;
	n = ffs_pread_full(fd, text, sizeof(text) - 1,
		size > (off_t)sizeof(text) - 1 ? (uint64_t)size - sizeof(text) + 1 : 0);
	if (n <= 0)
		return;
	while (n && text[n - 1] == '\n')
		n--;
	text[n] = 0;
	line = strrchr(text, '\n');
	snprintf(out, SAID_MAX, "%.*s", SAID_MAX - 1, line ? line + 1 : text);
}

/* How it ended; it is reaped. "" while it lives. */
static void how_ended(struct ffs_child *c, char out[80])
{
	int status = 0;

	out[0] = 0;
	if (!c->pid || waitpid(c->pid, &status, WNOHANG) != c->pid)
		return;
	c->pid = 0;
	if (WIFSIGNALED(status))
		snprintf(out, 80, "it was ended by signal %d (%s)%s", WTERMSIG(status),
			strsignal(WTERMSIG(status)),
			WTERMSIG(status) == SIGBUS ? ": its memory could not be read any more" : "");
	else
		snprintf(out, 80, "it ended with exit code %d", WEXITSTATUS(status));
}

int ffs_child_explain(struct ffs_child *c, int code, struct ffs_error *err)
{
	char said[SAID_MAX], ended[80];
	struct ffs_error why = err && err->code ? *err : (struct ffs_error){0};

	if (!why.code)
		ffs_error_errno(&why, -code, "the VM was not started");
	/* a connection that broke is often seen before the end of the process is */
	if (code == -ECONNRESET || code == -ENOTCONN || code == -EPIPE)
		ffs_child_poll(c, -1, 1000);
	how_ended(c, ended);
	last_words(c, said);
	/* what it answered says more than that it then gave up */
	if (ended[0] || said[0])
		ffs_error_set(err, why.code, "%s%s%s", ended[0] && code != -EREMOTEIO ? ended : why.text,
			said[0] ? "; it said: " : "", said);
	else if (err)
		*err = why;
	return code;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
	/* what cannot be removed stays: the directory then does too */
	return remove(path) < 0 && errno != ENOENT;
}

int ffs_remove_tree(const char *dir)
{
	return nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

void ffs_child_destroy(struct ffs_child *c)
{
	int status;

	if (c->pid > 0) {
		/* not reaped yet: the number is its own */
		if (kill(c->pid, SIGKILL) < 0 && errno != ESRCH)
			return;
		while (waitpid(c->pid, &status, 0) < 0 && errno == EINTR)
			;
		c->pid = 0;
	}
	ffs_jail_remove(c);
	if (c->dir[0] && ffs_remove_tree(c->dir) != 0)
		fprintf(stderr, "forkfs restore: %s is left behind: %s\n", c->dir, strerror(errno));
	c->dir[0] = 0;
	ffs_child_release(c);
}

void ffs_child_release(struct ffs_child *c)
{
	for (unsigned i = 0; i < FFS_CHILD_FDS; i++)
		ffs_close_fd(&c->inherit[i]);
	ffs_close_fd(&c->control);
	ffs_close_fd(&c->pidfd);
	json_object_put(c->sockets);
	c->sockets = NULL;
	free(c->agent);
	c->agent = NULL;
}

/* ---- asking a program ---- */

int ffs_ask_program(const char *const argv[], char **out, struct ffs_error *err)
{
	_cleanup_free_ char *text = malloc(ASKED_MAX + 1);
	posix_spawn_file_actions_t fa;
	int p[2], r, status = 0;
	size_t len = 0;
	pid_t pid = 0;

	if (!text)
		return ffs_error_set(err, ENOMEM, "no memory to ask %s", argv[0]);
	if (pipe2(p, O_CLOEXEC) < 0)
		return ffs_error_errno(err, errno, "a pipe to ask %s", argv[0]);
	r = posix_spawn_file_actions_init(&fa);
	if (!r) {
		r = posix_spawn_file_actions_addopen(&fa, 0, "/dev/null", O_RDONLY, 0);
		if (!r)
			r = posix_spawn_file_actions_adddup2(&fa, p[1], 1);
		if (!r)
			r = posix_spawn_file_actions_adddup2(&fa, p[1], 2);
		if (!r)
			r = posix_spawn(&pid, argv[0], &fa, NULL, (char *const *)argv, environ);
		posix_spawn_file_actions_destroy(&fa);
	}
	close(p[1]);
	while (!r && len < ASKED_MAX) {
		ssize_t n = read(p[0], text + len, ASKED_MAX - len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		len += (size_t)n;
	}
	close(p[0]);
	while (!r && waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	if (r)
		return ffs_error_errno(err, r, "%s cannot be run", argv[0]);
	text[len] = 0;
	*out = ffs_steal_ptr(&text);
	return 0;
}
