/* forkfs verify, export, import, convert, inspect: what is done with branches as files, in a store or through a mount.
 *
 * One thread, and one that draws. Ctrl-C ends each and leaves nothing half done: an export is renamed when it is whole, an
 * import or a conversion is published when it is. */
#include "cli.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "long-action.h"
#include "options.h"
#include "tree.h"

/* A store, a sandbox, a branch. */
#define MAX_DEPTH 2

static bool is_branch(const char *path)
{
	_cleanup_free_ char *manifest = NULL;

	if (asprintf(&manifest, "%s/manifest.json", path) < 0) {
		manifest = NULL;
		return false;
	}
	return faccessat(AT_FDCWD, manifest, F_OK, 0) == 0;
}

/* The directory that is meant: a path, or NAME/BRANCH of the mount. The caller frees it. */
static int find_branch(const char *word, const char *mount, char **out, struct ffs_error *err)
{
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct ffs_target target;
	struct stat st;
	int r;

	if (stat(word, &st) == 0 && S_ISDIR(st.st_mode)) {
		*out = strdup(word);
		return *out ? 0 : ffs_error_set(err, ENOMEM, "no memory");
	}
	if (ffs_target_parse(word, FFS_TARGET_BRANCH, &target, NULL) < 0)
		return ffs_error_set(
			err, ENOENT, "there is no directory '%.200s', nor is that a NAME/BRANCH", word);
	r = ffs_tree_open(&t, mount, err);
	if (!r)
		r = ffs_tree_check_target(&t, &target, err);
	if (!r && asprintf(out, "%s/%s/branches/%s", t.mount, target.sandbox, target.branch) < 0)
		r = ffs_error_set(err, ENOMEM, "no memory");
	return r;
}

/* The options and words of a command: true when there are `want` words (0: any, but one at least); else it ends with
 * *code. `what`: the sentence that says which words. */
static bool take_words(const struct ffs_command *self, const struct ffs_opt *opts, const bool *help, int argc,
	char **argv, int want, const char *what, int *n, int *code)
{
	struct ffs_error err = {0};

	if (ffs_opts_parse(opts, argc, argv, n, &err) < 0)
		*code = ffs_usage_error(self, "%s", err.text);
	else if (*help)
		*code = ffs_usage_help(self);
	else if (want ? *n != want : !*n)
		*code = ffs_usage_error(self, "%s", what);
	else
		return true;
	return false;
}

/* ---- verify ---- */

struct verify {
	const struct ffs_command *self;
	unsigned branches, failed;
};

static void verify_branch(struct verify *v, const char *path)
{
	struct ffs_long_action a;
	struct ffs_stored *s = NULL;
	struct ffs_error err = {0};
	char size[32];
	int r;

	ffs_long_action_begin(&a, path, NULL, NULL);
	r = ffs_stored_open_dir(path, &s, &err);
	if (!r)
		r = ffs_stored_verify(s, &a.progress, &err);
	ffs_long_action_end(&a);
	v->branches++;
	if (!r) {
		ffs_print_safe(path);
		printf(": ok, %s\n", ffs_format_bytes(size, atomic_load(&a.progress.total)));
	} else {
		v->failed++;
		ffs_failure(v->self, &err);
	}
	ffs_stored_unref(s);
}

static int plain_directory(const struct dirent *e)
{
	size_t n = strlen(e->d_name);

	return e->d_name[0] != '.' && !(n > 8 && strcmp(e->d_name + n - 8, ".partial") == 0) &&
	       !(n > 9 && strcmp(e->d_name + n - 9, ".removing") == 0);
}

/* A branch, or all below. */
static void verify_path(struct verify *v, const char *path, unsigned depth)
{
	struct dirent **list = NULL;
	int n = 0;

	if (is_branch(path)) {
		verify_branch(v, path);
		return;
	}
	if (depth < MAX_DEPTH)
		n = scandir(path, &list, plain_directory, alphasort);
	for (int i = 0; i < n; i++) {
		_cleanup_free_ char *below = NULL;
		struct stat st;

		if (asprintf(&below, "%s/%s", path, list[i]->d_name) < 0)
			below = NULL;
		else if (stat(below, &st) == 0 && S_ISDIR(st.st_mode))
			verify_path(v, below, depth + 1);
		free(list[i]);
	}
	free(list);
}

int ffs_cmd_verify(const struct ffs_command *self, int argc, char **argv)
{
	struct verify v = {.self = self};
	const char *mount = ffs_global_mount;
	bool help = false;
	const struct ffs_opt opts[] = {
		{"mount", 0, FFS_OPT_VALUE, &mount}, {"help", 'h', FFS_OPT_FLAG, &help}, {0}};
	struct ffs_error err = {0};
	int n = 0, code;

	if (!take_words(self, opts, &help, argc, argv, 0,
		    "name a branch, NAME/BRANCH or its directory, or a store", &n, &code))
		return code;
	for (int i = 0; i < n; i++) {
		_cleanup_free_ char *path = NULL;
		unsigned before = v.branches;

		err = (struct ffs_error){0};
		if (find_branch(argv[i], mount, &path, &err) < 0) {
			v.failed++;
			ffs_failure(self, &err);
			continue;
		}
		verify_path(&v, path, 0);
		if (v.branches == before) {
			v.failed++;
			ffs_error_set(&err, ENOENT, "there is no branch in %s", path);
			ffs_failure(self, &err);
		}
	}
	return v.failed ? (ffs_finish_output(self), FFS_EXIT_FAILURE) : ffs_finish_output(self);
}

/* ---- export ---- */

/* To a file that has its name when it is whole. */
static int export_to(
	struct ffs_stored *s, const char *file, struct ffs_store_progress *p, struct ffs_error *err)
{
	_cleanup_free_ char *partial = NULL;
	_cleanup_close_ int fd = -1;
	int r;

	if (asprintf(&partial, "%s.partial", file) < 0) {
		partial = NULL;
		return ffs_error_set(err, ENOMEM, "no memory");
	}
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		return ffs_error_errno(err, errno, "%s", partial);
	r = ffs_stored_export(s, fd, p, err);
	if (!r && (fsync(fd) < 0 || rename(partial, file) < 0))
		r = ffs_error_errno(err, errno, "%s", file);
	if (r < 0)
		unlink(partial);
	return r;
}

int ffs_cmd_export(const struct ffs_command *self, int argc, char **argv)
{
	const char *mount = ffs_global_mount;
	bool help = false;
	const struct ffs_opt opts[] = {
		{"mount", 0, FFS_OPT_VALUE, &mount}, {"help", 'h', FFS_OPT_FLAG, &help}, {0}};
	_cleanup_free_ char *path = NULL;
	struct ffs_stored *s = NULL;
	struct ffs_error err = {0};
	struct ffs_long_action a;
	int n = 0, r, code;

	if (!take_words(self, opts, &help, argc, argv, 2,
		    "takes a branch, NAME/BRANCH or its directory, and a FILE or -", &n, &code))
		return code;
	bool to_stdout = strcmp(argv[1], "-") == 0;

	if (to_stdout && isatty(STDOUT_FILENO))
		return ffs_usage_error(self, "the stream is not for a terminal: name a FILE, or pipe it");
	if (find_branch(argv[0], mount, &path, &err) < 0)
		return ffs_failure(self, &err);
	ffs_long_action_begin(&a, argv[0], NULL, NULL);
	r = ffs_stored_open_dir(path, &s, &err);
	if (!r)
		r = to_stdout ? ffs_stored_export(s, STDOUT_FILENO, &a.progress, &err)
			      : export_to(s, argv[1], &a.progress, &err);
	ffs_long_action_end(&a);
	ffs_stored_unref(s);
	return r < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}

/* ---- import ---- */

/* The store of the mount, as its daemon says. */
static int store_of(struct ffs_tree *t, char **out, struct ffs_error *err)
{
	struct json_object *caps = NULL;
	int r = ffs_tree_json(t, ".forkfs/capabilities", &caps, err);

	if (r < 0)
		return r;
	const char *path = ffs_json_string(caps, "store");

	if (*path)
		*out = strdup(path);
	else
		r = ffs_error_set(err, EOPNOTSUPP,
			"the mount %s has no store to import into: mount it with -o store=DIR, or name one "
			"by "
			"--store-dir",
			t->mount);
	json_object_put(caps);
	return !r && !*out ? ffs_error_set(err, ENOMEM, "no memory") : r;
}

/* Tell the daemon that there is a branch more in its store. */
static int tell_daemon(const struct ffs_tree *t, const struct ffs_target *target, struct ffs_error *err)
{
	struct json_object *body = json_object_new_object(), *request = json_object_new_object();
	int r;

	json_object_object_add(request, "adopt", body);
	json_object_object_add(body, "name", json_object_new_string(target->sandbox));
	json_object_object_add(body, "branch", json_object_new_string(target->branch));
	r = ffs_tree_request(t, ".forkfs/ctl", request, NULL, err);
	json_object_put(request);
	return r;
}

static int import(int fd, const char *dir, const struct ffs_target *target, enum ffs_store_kind kind,
	struct ffs_store_progress *p, struct ffs_error *err)
{
	struct ffs_store *st = NULL;
	int r = ffs_store_open(dir, &st, err);

	if (!r)
		r = ffs_store_import(st, fd, target->sandbox, target->branch, kind, p, err);
	ffs_store_close(st);
	return r;
}

int ffs_cmd_import(const struct ffs_command *self, int argc, char **argv)
{
	const char *mount = ffs_global_mount, *store = NULL, *store_dir = NULL;
	bool help = false;
	const struct ffs_opt opts[] = {{"store", 0, FFS_OPT_VALUE, &store},
		{"store-dir", 0, FFS_OPT_VALUE, &store_dir}, {"mount", 0, FFS_OPT_VALUE, &mount},
		{"help", 'h', FFS_OPT_FLAG, &help}, {0}};
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	enum ffs_store_kind kind = FFS_STORE_MEMORY;
	_cleanup_free_ char *dir = NULL;
	_cleanup_close_ int file = -1;
	struct ffs_target target;
	struct ffs_error err = {0};
	struct ffs_long_action a;
	int n = 0, r, code;

	if (!take_words(self, opts, &help, argc, argv, 2, "takes a FILE or -, and NAME/BRANCH", &n, &code))
		return code;
	if (ffs_target_parse(argv[1], FFS_TARGET_BRANCH, &target, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (store && (!ffs_store_kind_parse(store, &kind) || kind == FFS_STORE_MEMORY))
		return ffs_usage_error(self, "--store is dense or packed, not '%s'", store);
	if (strcmp(argv[0], "-") != 0) {
		file = open(argv[0], O_RDONLY | O_CLOEXEC);
		if (file < 0) {
			ffs_error_errno(&err, errno, "%s", argv[0]);
			return ffs_failure(self, &err);
		}
	} else if (isatty(STDIN_FILENO)) {
		return ffs_usage_error(
			self, "the stream does not come from a terminal: name a FILE, or pipe it");
	}
	r = store_dir ? 0 : ffs_tree_open(&t, mount, &err);
	if (!r && !store_dir)
		r = store_of(&t, &dir, &err);
	if (!r) {
		ffs_long_action_begin(&a, argv[1], NULL, NULL);
		r = import(file < 0 ? STDIN_FILENO : file, store_dir ? store_dir : dir, &target, kind,
			&a.progress, &err);
		ffs_long_action_end(&a);
	}
	if (!r && !store_dir)
		r = tell_daemon(&t, &target, &err);
	return r < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}

/* ---- convert ---- */

/* STORE/SANDBOX/BRANCH of a store that no daemon serves. */
static int convert_directory(
	const char *path, enum ffs_store_kind kind, struct ffs_store_progress *p, struct ffs_error *err)
{
	_cleanup_free_ char *real = realpath(path, NULL), *status = NULL;
	char *branch = real ? strrchr(real, '/') : NULL, *sandbox;
	struct ffs_store *st = NULL;
	int r;

	if (!real)
		return ffs_error_errno(err, errno, "%s", path);
	if (asprintf(&status, "%s/status", real) < 0) {
		status = NULL;
		return ffs_error_set(err, ENOMEM, "no memory");
	}
	*branch++ = '\0';
	sandbox = strrchr(real, '/');
	if (!sandbox || sandbox == real || faccessat(AT_FDCWD, status, F_OK, 0) == 0)
		return ffs_error_set(err, EINVAL,
			"%s is no branch's directory in a store: a branch of a mount is named NAME/BRANCH",
			path);
	*sandbox++ = '\0';
	r = ffs_store_open(real, &st, err);
	/* what an earlier one left that was killed would stand in the way */
	if (!r)
		r = ffs_store_recover(st, err);
	if (r == -EBUSY)
		ffs_error_set(err, EBUSY,
			"the store %s is served by a forkfs daemon: name the branch %s/%s, so that the "
			"daemon converts it",
			real, sandbox, branch);
	if (!r)
		r = ffs_store_convert(st, sandbox, branch, kind, NULL, p, err);
	ffs_store_close(st);
	return r;
}

struct conversion {
	struct ffs_tree t;
	struct ffs_target target;
};

/* How far the daemon is. */
static void look_at_conversion(void *arg, struct ffs_store_progress *p)
{
	struct conversion *c = arg;
	struct json_object *o = NULL;
	char path[176];

	snprintf(path, sizeof(path), "%s/branches/%s/status", c->target.sandbox, c->target.branch);
	if (ffs_tree_json(&c->t, path, &o, NULL) < 0)
		return;
	if (*ffs_json_string(o, "converting_to")) {
		atomic_store(&p->done, ffs_json_u64(o, "converted_bytes"));
		atomic_store(&p->total, ffs_json_u64(o, "memory_bytes"));
	}
	json_object_put(o);
}

static int convert_served(struct conversion *c, const char *kind, struct ffs_error *err)
{
	struct json_object *request = json_object_new_object(), *body = json_object_new_object();
	char ctl[80];
	int r;

	json_object_object_add(request, "convert", body);
	json_object_object_add(body, "name", json_object_new_string(c->target.branch));
	json_object_object_add(body, "store", json_object_new_string(kind));
	snprintf(ctl, sizeof(ctl), "%s/ctl", c->target.sandbox);
	r = ffs_tree_request(&c->t, ctl, request, NULL, err);
	json_object_put(request);
	return r;
}

int ffs_cmd_convert(const struct ffs_command *self, int argc, char **argv)
{
	const char *mount = ffs_global_mount, *to = NULL;
	bool help = false;
	const struct ffs_opt opts[] = {{"to", 0, FFS_OPT_VALUE, &to}, {"mount", 0, FFS_OPT_VALUE, &mount},
		{"help", 'h', FFS_OPT_FLAG, &help}, {0}};
	struct conversion c = {.t = FFS_TREE_INIT};
	enum ffs_store_kind kind;
	struct ffs_error err = {0};
	struct ffs_long_action a;
	struct stat st;
	int n = 0, r, code;

	if (!take_words(self, opts, &help, argc, argv, 1,
		    "takes one branch: NAME/BRANCH, or its directory in a store", &n, &code))
		return code;
	if (!to || !ffs_store_kind_parse(to, &kind) || kind == FFS_STORE_MEMORY)
		return ffs_usage_error(self, "--to is dense or packed%s%s", to ? ", not " : "", to ? to : "");
	if (stat(argv[0], &st) == 0 && S_ISDIR(st.st_mode)) {
		ffs_long_action_begin(&a, argv[0], NULL, NULL);
		r = convert_directory(argv[0], kind, &a.progress, &err);
		ffs_long_action_end(&a);
		return r < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
	}
	if (ffs_target_parse(argv[0], FFS_TARGET_BRANCH, &c.target, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	r = ffs_tree_open(&c.t, mount, &err);
	if (!r)
		r = ffs_tree_check_target(&c.t, &c.target, &err);
	if (!r) {
		ffs_long_action_begin(&a, argv[0], look_at_conversion, &c);
		r = convert_served(&c, to, &err);
		ffs_long_action_end(&a);
	}
	ffs_tree_close(&c.t);
	return r < 0 ? ffs_failure(self, &err) : FFS_EXIT_OK;
}

/* ---- inspect ---- */

int ffs_cmd_inspect(const struct ffs_command *self, int argc, char **argv)
{
	const char *mount = ffs_global_mount;
	bool help = false, chunks = false;
	const struct ffs_opt opts[] = {{"chunks", 0, FFS_OPT_FLAG, &chunks},
		{"mount", 0, FFS_OPT_VALUE, &mount}, {"help", 'h', FFS_OPT_FLAG, &help}, {0}};
	_cleanup_free_ char *path = NULL;
	struct json_object *o = NULL;
	struct ffs_error err = {0};
	int n = 0, code;

	if (!take_words(self, opts, &help, argc, argv, 1,
		    "takes one branch: its directory in a store, or NAME/BRANCH", &n, &code))
		return code;
	if (find_branch(argv[0], mount, &path, &err) < 0 || ffs_store_inspect(path, chunks, &o, &err) < 0)
		return ffs_failure(self, &err);
	puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(o);
	return ffs_finish_output(self);
}
