/* Which program restores a kind of VMM: files of /etc/forkfs/vmm.d, by the host's administrator.
 *
 *     # comment
 *     kind   = qemu                          which branches it is for; needed
 *     binary = /usr/bin/qemu-system-x86_64   absolute
 *     jailer = /usr/bin/jailer               absolute; of kind firecracker: children are started by it
 *     arg    = -sandbox                      one word each, in their order
 *     env    = NAME=VALUE
 *
 * Main thread; pure reading, no locks. No shell ever sees a word of it. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "restore.h"

#define CONF_MAX (64u << 10)

/* ---- words ---- */

void ffs_argv_add(struct ffs_argv *a, const char *word)
{
	char *copy = strdup(word);
	char **more = copy ? realloc(a->word, (a->n + 2) * sizeof(*more)) : NULL;

	if (!more) {
		free(copy);
		a->failed = true;
		return;
	}
	a->word = more;
	a->word[a->n++] = copy;
	a->word[a->n] = NULL;
}

void ffs_argv_addf(struct ffs_argv *a, const char *fmt, ...)
{
	_cleanup_free_ char *text = NULL;
	va_list ap;

	va_start(ap, fmt);
	if (vasprintf(&text, fmt, ap) < 0) {
		text = NULL;
		a->failed = true;
	}
	va_end(ap);
	if (text)
		ffs_argv_add(a, text);
}

void ffs_argv_free(struct ffs_argv *a)
{
	for (unsigned i = 0; i < a->n; i++)
		free(a->word[i]);
	free(a->word);
	*a = (struct ffs_argv){0};
}

struct json_object *ffs_argv_json(const struct ffs_argv *a)
{
	struct json_object *list = json_object_new_array();

	for (unsigned i = 0; i < a->n; i++)
		json_object_array_add(list, json_object_new_string(a->word[i]));
	return list;
}

/* ---- {NAME} ---- */

static const char *value_of(const char *name, size_t len, const struct ffs_restore_word *words, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		if (strlen(words[i].name) == len && !strncmp(words[i].name, name, len))
			return words[i].value;
	return NULL;
}

char *ffs_restore_expand(const char *text, const struct ffs_restore_word *words, unsigned n)
{
	char *out = NULL;
	size_t len = 0;
	FILE *f = open_memstream(&out, &len);

	if (!f)
		return NULL;
	while (*text) {
		const char *end = *text == '{' ? strchr(text, '}') : NULL;
		const char *value = end ? value_of(text + 1, (size_t)(end - text) - 1, words, n) : NULL;

		if (value) {
			fputs(value, f);
			text = end + 1;
		} else {
			fputc(*text++, f);
		}
	}
	bool bad = ferror(f) != 0;

	if (fclose(f) != 0 || bad) {
		free(out);
		return NULL;
	}
	return out;
}

/* ---- files ---- */

static char *trim(char *s)
{
	char *end;

	s += strspn(s, " \t\r");
	end = s + strlen(s);
	while (end > s && strchr(" \t\r", end[-1]))
		end--;
	*end = 0;
	return s;
}

/* One "key = value" into *c; -EINVAL with a sentence. `kind` gets the file's kind. */
static int take_line(char *line, struct ffs_restore_conf *c, char kind[32], struct ffs_error *err)
{
	char *eq = strchr(line, '=');
	const char *key, *value;

	if (!eq)
		return ffs_error_set(err, EINVAL, "'%.100s' is not KEY = VALUE", line);
	*eq = 0;
	key = trim(line);
	value = trim(eq + 1);
	if (!strcmp(key, "kind")) {
		snprintf(kind, 32, "%s", value);
	} else if (!strcmp(key, "binary") || !strcmp(key, "jailer")) {
		char **program = key[0] == 'b' ? &c->binary : &c->jailer;

		if (value[0] != '/')
			return ffs_error_set(err, EINVAL, "%s is an absolute path, not '%.100s'", key, value);
		free(*program);
		*program = strdup(value);
		c->arg.failed |= !*program;
	} else if (!strcmp(key, "arg")) {
		ffs_argv_add(&c->arg, value);
	} else if (!strcmp(key, "env")) {
		if (!strchr(value, '=') || value[0] == '=')
			return ffs_error_set(err, EINVAL, "env is NAME=VALUE, not '%.100s'", value);
		ffs_argv_add(&c->env, value);
	} else {
		return ffs_error_set(
			err, EINVAL, "there is no key '%.60s': kind, binary, jailer, arg, env", key);
	}
	return 0;
}

/* What is in it is run with the caller's rights: nobody else may be able to write it. */
static int check_owner(const char *path, struct ffs_error *err)
{
	struct stat st;

	if (stat(path, &st) < 0)
		return ffs_error_errno(err, errno, "%s", path);
	if ((st.st_uid != 0 && st.st_uid != geteuid()) || (st.st_mode & 022))
		return ffs_error_set(err, EPERM,
			"%s can be written by others (owner %u, mode %o): let it be root's or yours, chmod "
			"go-w",
			path, (unsigned)st.st_uid, (unsigned)st.st_mode & 07777);
	return 0;
}

static int read_conf(const char *path, struct ffs_restore_conf *out, char kind[32], struct ffs_error *err)
{
	struct ffs_restore_conf c = {0};
	_cleanup_free_ char *text = NULL;
	struct ffs_error why = {0};
	unsigned number = 0;
	size_t len;
	int r = check_owner(path, err);

	if (r < 0)
		return r;
	r = ffs_read_file(path, CONF_MAX, &text, &len);
	if (r < 0)
		return ffs_error_errno(err, -r, "%s", path);
	kind[0] = 0;
	for (char *line = text, *next; line && !r; line = next) {
		next = strchr(line, '\n');
		if (next)
			*next++ = 0;
		number++;
		line = trim(line);
		if (*line && *line != '#')
			r = take_line(line, &c, kind, &why);
	}
	if (!r && (c.arg.failed || c.env.failed))
		r = ffs_error_set(err, ENOMEM, "no memory for %s", path);
	else if (r < 0)
		ffs_error_set(err, EINVAL, "%s, line %u: %s", path, number, why.text);
	else if (!kind[0])
		r = ffs_error_set(
			err, EINVAL, "%s does not say which kind of VMM it is for (kind = qemu)", path);
	if (r < 0)
		ffs_restore_conf_free(&c);
	else
		*out = c;
	return r;
}

static int conf_name(const struct dirent *d)
{
	size_t n = strlen(d->d_name);

	return d->d_name[0] != '.' && n > 5 && !strcmp(d->d_name + n - 5, ".conf");
}

int ffs_restore_conf_read(
	const char *path, const char *kind, struct ffs_restore_conf *out, struct ffs_error *err)
{
	struct dirent **list = NULL;
	char found[32] = "";
	int n, r = 0;

	if (path) {
		r = read_conf(path, out, found, err);
		if (!r && strcmp(found, kind)) {
			ffs_restore_conf_free(out);
			r = ffs_error_set(err, EINVAL, "%s is for VMMs of the kind %s; the branch is of a %s",
				path, found, kind);
		}
		return r;
	}
	n = scandir(FFS_VMM_DIR, &list, conf_name, alphasort);
	if (n < 0)
		return errno == ENOENT ? 0 : ffs_error_errno(err, errno, FFS_VMM_DIR);
	for (int i = 0; i < n; i++) {
		_cleanup_free_ char *full = NULL;

		if (!r && strcmp(found, kind)) {
			ffs_restore_conf_free(out);
			r = asprintf(&full, FFS_VMM_DIR "/%s", list[i]->d_name) < 0
				    ? ffs_error_set(err, ENOMEM, "no memory for a path")
				    : read_conf(full, out, found, err);
		}
		free(list[i]);
	}
	free(list);
	if (r < 0 || strcmp(found, kind))
		ffs_restore_conf_free(out);
	return r;
}

void ffs_restore_conf_free(struct ffs_restore_conf *c)
{
	free(c->binary);
	free(c->jailer);
	ffs_argv_free(&c->arg);
	ffs_argv_free(&c->env);
	*c = (struct ffs_restore_conf){0};
}
