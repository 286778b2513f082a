/* Command lines and names (options.h).
 *
 * Called by main's only thread and by unit tests; no locks, nothing blocks but the user database behind
 * ffs_owner_parse(). */
#include "options.h"

#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include "base/util.h"
#include "mailbox/ack.h"

#define SECONDS_MAX 86400u

static const struct ffs_opt *find_long(const struct ffs_opt *opts, const char *name, size_t len)
{
	for (; opts->name || opts->letter; opts++)
		if (opts->name && strlen(opts->name) == len && !strncmp(opts->name, name, len))
			return opts;
	return NULL;
}

static const struct ffs_opt *find_letter(const struct ffs_opt *opts, char letter)
{
	for (; opts->name || opts->letter; opts++)
		if (opts->letter && opts->letter == letter)
			return opts;
	return NULL;
}

static bool takes_value(const struct ffs_opt *o)
{
	return o->kind == FFS_OPT_VALUE || o->kind == FFS_OPT_LIST || o->kind == FFS_OPT_EACH;
}

/* `shown` is the option as the user wrote it. */
static int apply(const struct ffs_opt *o, const char *shown, const char *value, struct ffs_error *err)
{
	switch (o->kind) {
	case FFS_OPT_FLAG:
		*(bool *)o->out = true;
		return 0;
	case FFS_OPT_VALUE: {
		const char **out = o->out;

		if (*out)
			return ffs_error_set(err, EINVAL, "%s is given twice", shown);
		*out = value;
		return 0;
	}
	case FFS_OPT_LIST: {
		char **out = o->out;
		char *joined = NULL;

		if (asprintf(&joined, "%s%s%s", *out ? *out : "", *out ? "," : "", value) < 0)
			return ffs_error_set(err, ENOMEM, "no memory for %s", shown);
		free(*out);
		*out = joined;
		return 0;
	}
	case FFS_OPT_EACH: {
		struct ffs_words *out = o->out;
		const char **more = realloc(out->word, (out->n + 1) * sizeof(*more));

		if (!more)
			return ffs_error_set(err, ENOMEM, "no memory for %s", shown);
		out->word = more;
		out->word[out->n++] = value;
		return 0;
	}
	case FFS_OPT_CHOICE: {
		const char **out = o->out;

		if (*out && strcmp(*out, o->name))
			return ffs_error_set(err, EINVAL, "--%s and --%s exclude each other", *out, o->name);
		*out = o->name;
		return 0;
	}
	}
	return ffs_error_set(err, EINVAL, "unknown kind of option %s", shown);
}

/* One argument that begins with "--"; *i moves on when the value is the next argument. */
static int parse_long(const struct ffs_opt *opts, int argc, char **argv, int *i, struct ffs_error *err)
{
	const char *arg = argv[*i], *name = arg + 2, *eq = strchr(name, '=');
	size_t len = eq ? (size_t)(eq - name) : strlen(name);
	const struct ffs_opt *o = find_long(opts, name, len);
	char shown[64];

	snprintf(shown, sizeof(shown), "--%.*s", (int)(len > 50 ? 50 : len), name);
	if (!o)
		return ffs_error_set(err, EINVAL, "there is no option %s", shown);
	if (!takes_value(o)) {
		if (eq)
			return ffs_error_set(err, EINVAL, "%s takes no value", shown);
		return apply(o, shown, NULL, err);
	}
	if (eq)
		return apply(o, shown, eq + 1, err);
	if (*i + 1 >= argc)
		return ffs_error_set(err, EINVAL, "%s needs a value", shown);
	return apply(o, shown, argv[++*i], err);
}

/* One argument of single letters, "-f" or "-fo value" or "-ovalue". */
static int parse_letters(const struct ffs_opt *opts, int argc, char **argv, int *i, struct ffs_error *err)
{
	for (const char *p = argv[*i] + 1; *p; p++) {
		const struct ffs_opt *o = find_letter(opts, *p);
		char shown[3] = {'-', *p, 0};
		int r;

		if (!o)
			return ffs_error_set(err, EINVAL, "there is no option %s", shown);
		if (takes_value(o)) {
			if (p[1])
				return apply(o, shown, p + 1, err);
			if (*i + 1 >= argc)
				return ffs_error_set(err, EINVAL, "%s needs a value", shown);
			return apply(o, shown, argv[++*i], err);
		}
		r = apply(o, shown, NULL, err);
		if (r < 0)
			return r;
	}
	return 0;
}

int ffs_opts_parse(const struct ffs_opt *opts, int argc, char **argv, int *n, struct ffs_error *err)
{
	bool ended = false;
	int words = 0, r;

	for (int i = 1; i < argc; i++) {
		char *arg = argv[i];

		if (ended || arg[0] != '-' || !arg[1]) {
			argv[words++] = arg;
			continue;
		}
		if (!strcmp(arg, "--")) {
			ended = true;
			continue;
		}
		r = arg[1] == '-' ? parse_long(opts, argc, argv, &i, err)
				  : parse_letters(opts, argc, argv, &i, err);
		if (r < 0)
			return r;
	}
	*n = words;
	return 0;
}

/* Copy text[0 … len-1] into a name buffer; what is too long stays too long for ffs_check_name(), which says
 * so. */
static int take_name(const char *what, const char *text, size_t len, char out[65], struct ffs_error *err)
{
	char copy[80];
	int r;

	if (len >= sizeof(copy))
		len = sizeof(copy) - 1;
	memcpy(copy, text, len);
	copy[len] = 0;
	r = ffs_check_name(what, copy, err);
	if (r < 0)
		return r;
	memcpy(out, copy, len + 1);
	return 0;
}

int ffs_target_parse(
	const char *text, enum ffs_target_kind allowed, struct ffs_target *out, struct ffs_error *err)
{
	struct ffs_target t = {0};
	size_t len = strlen(text);
	const char *slash;
	int r;

	if (len > 1 && text[len - 1] == '/')
		len--;
	slash = memchr(text, '/', len);
	if (slash && !(allowed & FFS_TARGET_BRANCH))
		return ffs_error_set(
			err, EINVAL, "'%.140s' names a branch; a sandbox's name is wanted here", text);
	if (!slash && !(allowed & FFS_TARGET_SANDBOX))
		return ffs_error_set(err, EINVAL, "'%.140s' names no branch: say NAME/BRANCH", text);
	r = take_name("sandbox", text, slash ? (size_t)(slash - text) : len, t.sandbox, err);
	if (r < 0)
		return r;
	if (slash) {
		size_t rest = len - (size_t)(slash - text) - 1;
		const char *second = memchr(slash + 1, '/', rest);

		if (second && allowed & FFS_TARGET_FORK) {
			size_t left = rest - (size_t)(second - slash);

			rest -= left + 1;
			r = take_name("fork", second + 1, left, t.fork, err);
			if (r < 0)
				return r;
			second = NULL;
		}
		if (second)
			return ffs_error_set(
				err, EINVAL, "'%.140s' has too many parts: say NAME/BRANCH", text);
		r = take_name("branch", slash + 1, rest, t.branch, err);
		if (r < 0)
			return r;
	}
	*out = t;
	return 0;
}

/* A whole decimal number below `max`; false otherwise. */
static bool parse_number(const char *text, unsigned long max, unsigned long *out)
{
	char *end;

	if (*text < '0' || *text > '9')
		return false;
	errno = 0;
	*out = strtoul(text, &end, 10);
	return !errno && !*end && *out < max;
}

int ffs_owner_parse(const char *text, char out[64], struct ffs_error *err)
{
	const char *colon = strchr(text, ':'), *second = colon ? strchr(colon + 1, ':') : NULL;
	char user[64], group[64];
	unsigned long uid, gid;
	size_t ulen, glen;

	if (!colon || (second && strcmp(second, ":rw")))
		goto bad;
	ulen = (size_t)(colon - text);
	glen = second ? (size_t)(second - colon - 1) : strlen(colon + 1);
	if (!ulen || !glen || ulen >= sizeof(user) || glen >= sizeof(group))
		goto bad;
	memcpy(user, text, ulen);
	user[ulen] = 0;
	memcpy(group, colon + 1, glen);
	group[glen] = 0;

	/* (uid_t)-1 means "no change" to chown: never an owner */
	if (!parse_number(user, UINT32_MAX, &uid)) {
		const struct passwd *pw = getpwnam(user);

		if (!pw)
			return ffs_error_set(err, EINVAL, "--owner: there is no user '%s'", user);
		uid = pw->pw_uid;
	}
	if (!parse_number(group, UINT32_MAX, &gid)) {
		const struct group *gr = getgrnam(group);

		if (!gr)
			return ffs_error_set(err, EINVAL, "--owner: there is no group '%s'", group);
		gid = gr->gr_gid;
	}
	snprintf(out, 64, "%lu:%lu%s", uid, gid, second ? ":rw" : "");
	return 0;
bad:
	return ffs_error_set(err, EINVAL, "--owner '%.80s' is not UID:GID or UID:GID:rw", text);
}

int ffs_disk_parse(const char *text, char id[65], const char **path, struct ffs_error *err)
{
	const char *equals = strchr(text, '=');

	if (!equals || !equals[1])
		return ffs_error_set(err, EINVAL, "--disk '%.140s' is not ID=PATH", text);
	*path = equals + 1;
	return take_name("disk", text, (size_t)(equals - text), id, err);
}

int ffs_pid_parse(const char *text, int *pid, struct ffs_error *err)
{
	unsigned long v;

	if (!parse_number(text, INT32_MAX, &v) || !v)
		return ffs_error_set(err, EINVAL, "'%.40s' is no process id", text);
	*pid = (int)v;
	return 0;
}

int ffs_size_parse(const char *what, const char *text, uint64_t *out, struct ffs_error *err)
{
	static const char suffixes[] = "KMGT";
	char digits[32];
	size_t len = strlen(text);
	const char *suffix = len ? strchr(suffixes, text[len - 1]) : NULL;
	unsigned shift = suffix ? (unsigned)(suffix - suffixes + 1) * 10 : 0;
	unsigned long v;

	snprintf(digits, sizeof(digits), "%.*s", (int)(suffix ? len - 1 : len), text);
	/* what JSON carries is a signed number */
	if (len >= sizeof(digits) || !parse_number(digits, INT64_MAX >> shift, &v) || !v)
		return ffs_error_set(err, EINVAL, "%s '%.40s' is no number of bytes", what, text);
	*out = (uint64_t)v << shift;
	return 0;
}

int ffs_seconds_option(const char *name, const char *text, unsigned *seconds, struct ffs_error *err)
{
	unsigned long v;

	if (!parse_number(text, SECONDS_MAX + 1, &v) || !v)
		return ffs_error_set(err, EINVAL, "%s is a number of seconds from 1 to %u, not '%.40s'", name,
			SECONDS_MAX, text);
	*seconds = (unsigned)v;
	return 0;
}

int ffs_ack_option(const char *text, unsigned *ms, struct ffs_error *err)
{
	char *end;
	long long n;

	errno = 0;
	n = strtoll(text, &end, 10);
	if (errno || *end || end == text || !strchr("-0123456789", *text))
		return ffs_error_set(err, EINVAL,
			"--ack is a number of milliseconds from 0 (the default, %u) to %u, not '%.40s'",
			FFS_ACK_DEFAULT_MS, FFS_ACK_MAX_MS, text);
	return ffs_ack_timeout(n, "--ack", ms, err);
}
