/* forkfs doctor: runs every test, prints a line each with its remedy, or all of it as JSON. One thread; the
 * tests that could hang or crash run in child processes that are killed at their deadline. */
#include "cli.h"

#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "doctor.h"
#include "options.h"

struct ffs_doctor {
	struct json_object *checks; /* NULL: print as they come */
	enum ffs_finding worst;
};

static const char *const finding_names[] = {"ok", "info", "warn", "FAIL"};

void ffs_doctor_line(struct ffs_doctor *d, enum ffs_finding finding, const char *name, const char *remedy,
	const char *fmt, ...)
{
	struct json_object *check;
	char text[700];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (finding > d->worst)
		d->worst = finding;
	if (!d->checks) {
		printf("%-4s  %-22s ", finding_names[finding], name);
		ffs_print_safe(text);
		putchar('\n');
		if (remedy)
			printf("%30s→ %s\n", "", remedy);
		fflush(stdout);
		return;
	}
	check = json_object_new_object();
	json_object_object_add(check, "name", json_object_new_string(name));
	json_object_object_add(check, "result",
		json_object_new_string(finding == FFS_FINDING_FAIL ? "fail" : finding_names[finding]));
	json_object_object_add(check, "text", json_object_new_string(text));
	json_object_object_add(check, "remedy", remedy ? json_object_new_string(remedy) : NULL);
	json_object_array_add(d->checks, check);
}

long long ffs_doctor_number(const char *path)
{
	_cleanup_free_ char *text = NULL;
	char *end;
	long long v;

	if (ffs_read_file(path, 4096, &text, NULL) < 0)
		return -1;
	v = strtoll(text, &end, 10);
	return end == text ? -1 : v;
}

int ffs_cmd_doctor(const struct ffs_command *self, int argc, char **argv)
{
	static void (*const tests[])(struct ffs_doctor *) = {
		ffs_doctor_kernel,
		ffs_doctor_privileges,
		ffs_doctor_uffd,
		ffs_doctor_fuse,
		ffs_doctor_kvm,
		ffs_doctor_memory,
		ffs_doctor_limits,
	};
	bool json = false, help = false;
	const struct ffs_opt opts[] = {
		{"json", 0, FFS_OPT_FLAG, &json},
		{"help", 'h', FFS_OPT_FLAG, &help},
		{0},
	};
	struct ffs_doctor d = {0};
	struct ffs_error err = {0};
	int n, code;

	if (ffs_opts_parse(opts, argc, argv, &n, &err) < 0)
		return ffs_usage_error(self, "%s", err.text);
	if (help)
		return ffs_usage_help(self);
	if (n)
		return ffs_usage_error(self, "takes no names");
	if (json)
		d.checks = json_object_new_array();
	for (unsigned i = 0; i < FFS_ARRAY_LEN(tests); i++)
		tests[i](&d);
	if (json) {
		struct json_object *all = json_object_new_object();

		json_object_object_add(all, "ok", json_object_new_boolean(d.worst < FFS_FINDING_FAIL));
		json_object_object_add(all, "version", json_object_new_string(FFS_VERSION));
		json_object_object_add(all, "checks", d.checks);
		ffs_print_json(all);
	}
	code = ffs_finish_output(self);
	return d.worst == FFS_FINDING_FAIL ? FFS_EXIT_FAILURE : code;
}
