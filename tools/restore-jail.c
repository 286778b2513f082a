/* Jails of Firecracker's children until their jailer starts: the words of its command line, the user, the directory with what
 * is needed there. A directory is written to by its name, for nobody else knows it yet.
 *
 * ffs_jails_*() are of the main thread, the rest of each child's. No locks. What waits: the copy of a branch. */
#include "restore-jail.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "cli.h"

#define BASE_DEFAULT "/srv/jailer" /* the jailer's own */
#define STEP (1u << 20)

/* ---- what is asked for ---- */

/* The word after an option, the last that was given. NULL: none. */
static const char *value_of(const struct ffs_argv *words, const char *option)
{
	const char *value = NULL;

	for (unsigned i = 0; i + 1 < words->n; i++)
		if (!strcmp(words->word[i], option))
			value = words->word[i + 1];
	return value;
}

static bool has(const struct ffs_argv *words, const char *option)
{
	for (unsigned i = 0; i < words->n; i++)
		if (!strcmp(words->word[i], option))
			return true;
	return false;
}

/* Up to the first "--" they are the jailer's. */
static void split(const struct ffs_restore *r, struct ffs_jails *j)
{
	struct ffs_argv *to = &j->own;

	for (unsigned i = 0; i < r->conf.arg.n + r->n_user_args; i++) {
		const char *word = i < r->conf.arg.n ? r->conf.arg.word[i] : r->user_arg[i - r->conf.arg.n];

		if (to == &j->own && !strcmp(word, "--"))
			to = &j->vmm;
		else
			ffs_argv_add(to, word);
	}
}

static int check_words(const struct ffs_jails *j, struct ffs_error *err)
{
	static const char *const ours[] = {"--id", "--exec-file", "--daemonize", "--help", "--version"};

	if (j->own.failed || j->vmm.failed)
		return ffs_error_set(err, ENOMEM, "no memory for a command line");
	for (unsigned i = 0; i < FFS_ARRAY_LEN(ours); i++)
		if (has(&j->own, ours[i]))
			return ffs_error_set(err, EINVAL,
				"%s cannot be given to the jailer: forkfs names each jail and its program, "
				"and waits for it",
				ours[i]);
	if (has(&j->vmm, "--api-sock") || has(&j->vmm, "--no-api"))
		return ffs_error_set(err, EINVAL,
			"the API socket of each child is forkfs's to name: leave --api-sock and --no-api "
			"out");
	if (!j->uid || !j->gid)
		return ffs_error_set(err, EINVAL,
			"as which user does the jailer start the children? Give its own options after --: "
			"--uid UID --gid GID");
	return 0;
}

/* Programs and devices are to work there. */
static int check_base(struct ffs_jails *j, struct ffs_error *err)
{
	const char *base = value_of(&j->own, "--chroot-base-dir");
	struct statvfs fs;

	if (!base)
		base = BASE_DEFAULT;
	j->base = realpath(base, NULL);
	if (!j->base)
		return ffs_error_errno(
			err, errno, "%s, where the jails are made (another by --chroot-base-dir)", base);
	if (statvfs(j->base, &fs) < 0)
		return ffs_error_errno(err, errno, "%s", j->base);
	if (fs.f_flag & (ST_NODEV | ST_NOEXEC))
		return ffs_error_set(err, EACCES,
			"%s is mounted %s, and a jail has /dev/kvm and a program: name another directory by "
			"--chroot-base-dir",
			j->base, fs.f_flag & ST_NODEV ? "nodev" : "noexec");
	return 0;
}

int ffs_jails_plan(struct ffs_restore *r, struct ffs_jails *j, struct ffs_error *err)
{
	const char *slash;
	int got;

	j->image_ns = -1;
	if (!r->conf.jailer)
		return 0;
	j->on = true;
	split(r, j);
	j->uid = value_of(&j->own, "--uid");
	j->gid = value_of(&j->own, "--gid");
	j->parent_cgroup = value_of(&j->own, "--parent-cgroup");
	j->pid_ns = has(&j->own, "--new-pid-ns");
	j->cgroup = has(&j->own, "--cgroup");
	got = check_words(j, err);
	if (!got && geteuid() != 0)
		got = ffs_error_set(
			err, EPERM, "only root can make jails: run the command as root, or without --jailer");
	if (!got)
		got = check_base(j, err);
	if (got < 0)
		return got;
	/* the jailer names the directory by the program that the links lead to */
	_cleanup_free_ char *program = realpath(r->conf.binary, NULL);

	if (!program)
		return ffs_error_errno(err, errno, "%s", r->conf.binary);
	slash = strrchr(program, '/');
	j->name = strdup(slash ? slash + 1 : program);
	if (!j->name)
		return ffs_error_set(err, ENOMEM, "no memory for a name");
	/* the VM then is our child's child, and ours when that has ended */
	if (j->pid_ns && prctl(PR_SET_CHILD_SUBREAPER, 1) < 0)
		return ffs_error_errno(err, errno, "PR_SET_CHILD_SUBREAPER");
	return 0;
}

void ffs_jails_free(struct ffs_jails *j)
{
	ffs_argv_free(&j->own);
	ffs_argv_free(&j->vmm);
	if (j->on)
		ffs_close_fd(&j->image_ns);
	free(j->base);
	free(j->name);
}

/* ---- words of one child ---- */

/* A name of its own for the jail: letters, digits and hyphens. */
static void name_jail(const struct ffs_restore *r, const struct ffs_child *c, char id[65])
{
	const char *slash = strrchr(c->dir, '/');

	if (slash)
		snprintf(id, 65, "%s", slash + 1);
	else
		snprintf(id, 65, "%.40s-%u", r->target.branch, c->number);
	for (char *p = id; *p; p++)
		if (!isalnum((unsigned char)*p))
			*p = '-';
}

static char *expand(const char *pattern, const struct ffs_child *c)
{
	char number[16];
	const struct ffs_restore_word words[] = {{"number", number}, {"dir", c->dir}};

	snprintf(number, sizeof(number), "%u", c->number);
	return ffs_restore_expand(pattern, words, FFS_ARRAY_LEN(words));
}

static int add_words(
	const struct ffs_argv *words, const struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err)
{
	for (unsigned i = 0; i < words->n; i++) {
		_cleanup_free_ char *word = expand(words->word[i], c);

		if (!word)
			return ffs_error_set(err, ENOMEM, "no memory for a command line");
		ffs_argv_add(out, word);
	}
	return 0;
}

int ffs_jail_command(const struct ffs_restore *r, const struct ffs_jails *j, const struct ffs_child *c,
	struct ffs_argv *out, struct ffs_error *err)
{
	char id[65];
	int got;

	name_jail(r, c, id);
	ffs_argv_add(out, r->conf.jailer);
	ffs_argv_add(out, "--id");
	ffs_argv_add(out, id);
	ffs_argv_add(out, "--exec-file");
	ffs_argv_add(out, r->conf.binary);
	got = add_words(&j->own, c, out, err);
	ffs_argv_add(out, "--");
	return got;
}

int ffs_jail_vmm_words(
	const struct ffs_jails *j, const struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err)
{
	return add_words(&j->vmm, c, out, err);
}

static int number_of(const char *pattern, const struct ffs_child *c, const char *option, unsigned *out,
	struct ffs_error *err)
{
	_cleanup_free_ char *text = expand(pattern, c);
	unsigned long n;
	char *end;

	if (!text)
		return ffs_error_set(err, ENOMEM, "no memory for a number");
	errno = 0;
	n = strtoul(text, &end, 10);
	if (errno || !isdigit((unsigned char)*text) || *end || n >= UINT32_MAX)
		return ffs_error_set(err, EINVAL, "%s is a number, not '%.40s'", option, text);
	*out = (unsigned)n;
	return 0;
}

static int user_of(const struct ffs_jails *j, struct ffs_child *c, struct ffs_error *err)
{
	int got = number_of(j->uid, c, "--uid", &c->uid, err);

	return got ? got : number_of(j->gid, c, "--gid", &c->gid, err);
}

int ffs_jails_owner(const struct ffs_jails *j, unsigned *uid, unsigned *gid, struct ffs_error *err)
{
	struct ffs_child first = {.number = 1}, second = {.number = 2};
	int got = user_of(j, &first, err);

	if (!got)
		got = user_of(j, &second, err);
	if (got < 0)
		return got;
	*uid = first.uid;
	*gid = first.gid;
	if (first.uid != second.uid || first.gid != second.gid)
		return ffs_error_set(err, EINVAL,
			"the children are of different users: one file cannot be lent to all of them");
	return 0;
}

/* ---- the memory ---- */

/* May that user open memory.bin in the mount? */
static bool is_lent(const struct ffs_restore *r, unsigned uid)
{
	struct json_object *capabilities = NULL;
	struct stat st;
	bool others = false;

	if (!ffs_tree_json(r->tree, ".forkfs/capabilities", &capabilities, NULL))
		others = ffs_cli_json_bool(capabilities, "allow_other");
	json_object_put(capabilities);
	return others && fstat(r->memory_fd, &st) == 0 && st.st_uid == uid;
}

int ffs_jails_image(struct ffs_restore *r, struct ffs_jails *j, struct ffs_error *err)
{
	static const struct ffs_sparse_words words = {.file = "a file in memory for the branch",
		.read = "the branch's memory cannot be read",
		.write = "the branch cannot be loaded into memory"};
	_cleanup_close_ int fd = -1;
	unsigned uid, gid;
	char path[40];
	int got;

	if (ffs_jails_owner(j, &uid, &gid, NULL) == 0 && is_lent(r, uid) && ffs_restore_is_image(r))
		return 0;
	got = ffs_jail_shared_file(j->base, 0444, &fd, &j->image_ns, err);
	if (!got)
		got = ffs_copy_sparse(r->memory_fd, fd, r->memory_size, STEP, &words, err);
	if (got < 0)
		return got;
	ffs_close_fd(&r->memory_fd);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	r->memory_fd = open(path, O_RDONLY | O_CLOEXEC);
	if (r->memory_fd < 0)
		return ffs_error_errno(err, errno, "%s", words.file);
	ffs_restore_note(r, "the branch was loaded into memory, once for the children of this command: a "
			    "jail's user gets the branch's own image "
			    "where forkfs is mounted with allow_other and the sandbox is lent to that user "
			    "(attach --owner)");
	return 0;
}

/* ---- its directory ---- */

bool ffs_jail_is_name(const char *inside)
{
	const char *p = inside + (*inside == '/');

	for (;;) {
		size_t n = strcspn(p, "/");

		if (!n || (n == 1 && p[0] == '.') || (n == 2 && !strncmp(p, "..", 2)))
			return false;
		if (!p[n])
			return true;
		p += n + 1;
	}
}

int ffs_jail_create(
	const struct ffs_child *c, const char *inside, bool read_only, int *fd, struct ffs_error *err)
{
	_cleanup_free_ char *path = NULL;
	size_t root = strlen(c->jail);

	if (asprintf(&path, "%s/%s", c->jail, inside + (*inside == '/')) < 0) {
		path = NULL;
		return ffs_error_set(err, ENOMEM, "no memory for a path");
	}
	for (char *p = path + root + 1; (p = strchr(p, '/')); p++) {
		*p = 0;
		if (mkdir(path, 0755) < 0 && errno != EEXIST)
			return ffs_error_errno(err, errno, "%s", path);
		*p = '/';
	}
	_cleanup_close_ int own =
		open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, read_only ? 0400 : 0600);

	if (own < 0 || fchown(own, c->uid, c->gid) < 0)
		return ffs_error_errno(err, errno, "%s", path);
	*fd = ffs_steal_fd(&own);
	return 0;
}

static int make_directories(
	const struct ffs_jails *j, const char *id, struct ffs_child *c, struct ffs_error *err)
{
	const char *group = j->parent_cgroup ? j->parent_cgroup : j->name;
	char path[sizeof(c->jail)], parent[sizeof(c->jail)], cgroup[sizeof(c->cgroup)];

	/* a socket's name has 107 bytes at most */
	if ((size_t)snprintf(path, sizeof(path), "%s/%s/%s/root", j->base, j->name, id) >= sizeof(path))
		return ffs_error_set(err, ENAMETOOLONG,
			"%s/%s is too long a directory for jails with sockets: name another by "
			"--chroot-base-dir",
			j->base, j->name);
	/* a part of it would be another's, or left behind */
	if ((size_t)snprintf(cgroup, sizeof(cgroup), "%s/%s", group, id) >= sizeof(cgroup))
		return ffs_error_set(err, ENAMETOOLONG,
			"%.300s is too long a name of a cgroup: name another by --parent-cgroup", group);
	snprintf(parent, sizeof(parent), "%s/%s", j->base, j->name);
	if (mkdir(parent, 0755) < 0 && errno != EEXIST)
		return ffs_error_errno(err, errno, "%s", parent);
	*strrchr(path, '/') = 0;
	if (mkdir(path, 0755) < 0)
		return ffs_error_errno(err, errno, "%s, for the jail of a child", path);
	/* from here on it is this child's, to be removed with it */
	*strchr(path, 0) = '/';
	memcpy(c->jail, path, sizeof(path));
	if (j->cgroup)
		memcpy(c->cgroup, cgroup, sizeof(cgroup));
	return mkdir(c->jail, 0700) < 0 ? ffs_error_errno(err, errno, "%s", c->jail) : 0;
}

static int copy_vmstate(struct ffs_restore *r, struct ffs_child *c, struct ffs_error *err)
{
	static const struct ffs_sparse_words words = {.file = "the device state in a jail",
		.read = "the device state of the branch cannot be read",
		.write = "the device state cannot be written into a jail"};
	_cleanup_close_ int from = ffs_restore_open(r, "vmstate", err), to = -1;
	struct stat st;
	int got;

	if (from < 0)
		return from;
	if (fstat(from, &st) < 0)
		return ffs_error_errno(err, errno, "%s", words.read);
	got = ffs_jail_create(c, FFS_JAIL_VMSTATE, true, &to, err);
	return got ? got : ffs_copy_sparse(from, to, (uint64_t)st.st_size, 4096, &words, err);
}

int ffs_jail_make(
	struct ffs_restore *r, const struct ffs_jails *j, struct ffs_child *c, struct ffs_error *err)
{
	static const char *const mounted[] = {FFS_JAIL_MEMORY, FFS_JAIL_PAGER};
	char id[65];
	int got = user_of(j, c, err);

	name_jail(r, c, id);
	if (!got)
		got = make_directories(j, id, c, err);
	if (!got)
		got = copy_vmstate(r, c, err);
	for (unsigned i = 0; !got && i < FFS_ARRAY_LEN(mounted); i++) {
		_cleanup_close_ int fd = -1;

		got = ffs_jail_create(c, mounted[i], true, &fd, err);
	}
	return got;
}
