/* Owns the language of -o. Pure: no I/O. One thread. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/udp.h"
#include "base/util.h"
#include "forkfs-engine.h"
#include "fs.h"

#define MAX_LEASE_S 86400u
#define MAX_RATE 100000u
#define CACHE_AGE_S 86400u
#define MAX_CACHE_AGE_S (10u * 365 * 86400)

static unsigned default_captures(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	return cpus > 4 ? 2 * (unsigned)cpus : 8;
}

void ffs_mount_options_init(struct ffs_mount_options *opt)
{
	*opt = (struct ffs_mount_options){
		.lease_ns = 30 * FFS_NS_PER_S,
		.branch_rate = 10,
		.memory = FFS_MEMORY_AUTO,
		.captures = default_captures(),
		.cache_age_ns = CACHE_AGE_S * FFS_NS_PER_S,
		.cache_size = UINT64_MAX,
		.cache_store = UINT64_MAX,
		.ack_address = "127.0.0.1",
		.max_read = 1u << 20,
		.log = FFS_LOG_INFO,
	};
}

/* What mount(8), fstab(5) and systemd say to a helper and mean for themselves. */
static bool of_mount(const char *o)
{
	static const char *const words[] = {"rw", "ro", "dev", "nodev", "suid", "nosuid", "exec", "noexec",
		"auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail",
		"defaults", "sync", "async", "dirsync", "atime", "noatime", "diratime", "nodiratime",
		"relatime", "norelatime", "strictatime", "default_permissions", "remount", NULL};

	if (strncmp(o, "x-", 2) == 0 || strncmp(o, "X-", 2) == 0 || strncmp(o, "comment=", 8) == 0 ||
		strncmp(o, "fsname=", 7) == 0 || strncmp(o, "subtype=", 8) == 0)
		return true;
	for (const char *const *w = words; *w; w++)
		if (strcmp(o, *w) == 0)
			return true;
	return false;
}

static int number(
	const char *name, const char *value, unsigned long max, unsigned long *out, struct ffs_error *err)
{
	char *end;

	if (*value < '0' || *value > '9')
		return ffs_error_set(err, EINVAL, "mount option %s: '%s' is no number", name, value);
	errno = 0;
	*out = strtoul(value, &end, 10);
	if (*end || errno || *out > max)
		return ffs_error_set(
			err, EINVAL, "mount option %s: '%s' is no number from 0 to %lu", name, value, max);
	return 0;
}

/* A number of bytes, or of units: 512M, 8G. */
static int size(const char *name, const char *value, uint64_t *out, struct ffs_error *err)
{
	static const char units[] = "KMGT";
	unsigned long long n = 0;
	char *end = NULL;
	int bad = *value < '0' || *value > '9';

	errno = 0;
	if (!bad)
		n = strtoull(value, &end, 10);
	const char *unit = !bad && *end ? strchr(units, *end) : NULL;

	bad |= errno != 0 || (!bad && *end && (!unit || end[1]));
	if (!bad && unit)
		bad = ffs_mul_overflow(n, 1ull << (10 * (unit - units + 1)), &n);
	if (bad || n >= FFS_MEMORY_AUTO)
		return ffs_error_set(
			err, EINVAL, "mount option %s: '%s' is no size (512M, 8G, …)", name, value);
	*out = n;
	return 0;
}

static int choice(
	const char *name, const char *value, const char *const *words, unsigned *out, struct ffs_error *err)
{
	for (unsigned i = 0; words[i]; i++)
		if (strcmp(value, words[i]) == 0) {
			*out = i;
			return 0;
		}
	return ffs_error_set(err, EINVAL, "mount option %s: there is no '%s'", name, value);
}

static int with_value(
	struct ffs_mount_options *opt, const char *name, const char *value, struct ffs_error *err)
{
	static const char *const on_off[] = {"on", "off", NULL}, *const auto_off[] = {"auto", "off", NULL},
				 *const levels[] = {"error", "warning", "info", "debug", NULL};
	static const enum ffs_log_level level[] = {FFS_LOG_ERROR, FFS_LOG_WARN, FFS_LOG_INFO, FFS_LOG_DEBUG};
	unsigned long n = 0;
	unsigned word = 0;
	int r = 0;

	if (strcmp(name, "branch") == 0) {
		r = choice(name, value, on_off, &word, err);
		opt->branch_off = word;
	} else if (strcmp(name, "branch-rate") == 0) {
		r = number(name, value, MAX_RATE, &n, err);
		opt->branch_rate = (unsigned)n;
	} else if (strcmp(name, "memory") == 0) {
		r = 0;
		if (strcmp(value, "auto") == 0)
			opt->memory = FFS_MEMORY_AUTO;
		else if (strcmp(value, "unlimited") == 0)
			opt->memory = FFS_MEMORY_UNLIMITED;
		else
			r = size(name, value, &opt->memory, err);
	} else if (strcmp(name, "captures") == 0) {
		r = number(name, value, MAX_RATE, &n, err);
		opt->captures = (unsigned)n;
	} else if (strcmp(name, "cache-age") == 0) {
		r = number(name, value, MAX_CACHE_AGE_S, &n, err);
		opt->cache_age_ns = n * FFS_NS_PER_S;
	} else if (strcmp(name, "cache-size") == 0) {
		r = size(name, value, &opt->cache_size, err);
	} else if (strcmp(name, "cache-store") == 0) {
		r = size(name, value, &opt->cache_store, err);
	} else if (strcmp(name, "lease") == 0) {
		r = number(name, value, MAX_LEASE_S, &n, err);
		opt->lease_ns = n * FFS_NS_PER_S;
	} else if (strcmp(name, "passthrough") == 0) {
		r = choice(name, value, auto_off, &word, err);
		opt->passthrough = word ? FFS_PASSTHROUGH_OFF : FFS_PASSTHROUGH_AUTO;
	} else if (strcmp(name, "reattach") == 0) {
		r = choice(name, value, on_off, &word, err);
		opt->reattach_off = word;
	} else if (strcmp(name, "store") == 0) {
		if (!*value || strlen(value) >= sizeof(opt->store))
			return ffs_error_set(err, EINVAL, "mount option store: name a directory");
		snprintf(opt->store, sizeof(opt->store), "%s", value);
	} else if (strcmp(name, "default-store") == 0) {
		if (!ffs_store_kind_parse(value, &opt->default_store))
			return ffs_error_set(err, EINVAL,
				"mount option default-store: there is no '%s' (memory, dense, packed)",
				value);
		opt->default_store_given = true;
		return 0;
	} else if (strcmp(name, "ack-address") == 0) {
		if (strlen(value) >= sizeof(opt->ack_address) ||
			ffs_ip_parse(value, &(struct sockaddr_storage){0}, &(socklen_t){0}) < 0)
			return ffs_error_set(err, EINVAL,
				"mount option ack-address: an IP address of this host, not '%.60s'", value);
		snprintf(opt->ack_address, sizeof(opt->ack_address), "%s", value);
	} else if (strcmp(name, "max_read") == 0) {
		r = number(name, value, 1u << 20, &n, err);
		if (!r && (n < 4096 || n % 4096))
			r = ffs_error_set(
				err, EINVAL, "mount option max_read: a multiple of 4096, at most 1048576");
		opt->max_read = (uint32_t)n;
	} else if (strcmp(name, "log") == 0) {
		r = choice(name, value, levels, &word, err);
		opt->log = level[word];
	} else {
		r = ffs_error_set(err, EINVAL,
			"there is no mount option '%s' (allow_other, branch=, branch-rate=, lease=, "
			"memory=, captures=, cache-age=, cache-size=, cache-store=, passthrough=, reattach=, "
			"store=, "
			"default-store=, ack-address=, max_read=, "
			"log=)",
			name);
	}
	return r;
}

int ffs_mount_options_parse(struct ffs_mount_options *opt, const char *list, struct ffs_error *err)
{
	_cleanup_free_ char *copy = strdup(list);
	char *save = NULL;

	if (!copy)
		return ffs_error_set(err, ENOMEM, "no memory");
	for (char *o = strtok_r(copy, ",", &save); o; o = strtok_r(NULL, ",", &save)) {
		char *eq = strchr(o, '=');
		int r = 0;

		if (of_mount(o))
			continue;
		if (strcmp(o, "allow_other") == 0) {
			opt->allow_other = true;
		} else {
			if (eq)
				*eq++ = '\0';
			r = with_value(opt, o, eq ? eq : "", err);
		}
		if (r < 0)
			return r;
	}
	return 0;
}
