/* Where a Firecracker has its guest's vsock: its API says so, and its command line where that is
 * (agent-link.h).
 *
 * The caller's thread; an answer is waited for no longer than API_NS. */
#include <errno.h>
#include <json-c/json.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "options.h"
#include "tree.h"
#include "vmm/dial.h"
#include "vmm/http.h"

#define API_NS (5 * FFS_NS_PER_S)

const char *ffs_agent_api_of(char *const *word, unsigned n)
{
	static const char option[] = "--api-sock";

	for (unsigned i = 1; i < n; i++) {
		if (!strcmp(word[i], option) && i + 1 < n)
			return word[i + 1];
		if (!strncmp(word[i], option, sizeof(option) - 1) && word[i][sizeof(option) - 1] == '=')
			return word[i] + sizeof(option);
	}
	return NULL;
}

/* True when the process sees the files that we see, by the same names. */
static bool is_here(pid_t pid)
{
	char name[40], root[8] = "";
	struct stat its, ours;

	snprintf(name, sizeof(name), "/proc/%d/root", (int)pid);
	if (readlink(name, root, sizeof(root) - 1) != 1 || root[0] != '/')
		return false;
	snprintf(name, sizeof(name), "/proc/%d/ns/mnt", (int)pid);
	return stat(name, &its) == 0 && stat("/proc/self/ns/mnt", &ours) == 0 && its.st_ino == ours.st_ino;
}

/* A name as the VMM knows it, which may be in a jail, as we do. */
static int name_here(pid_t pid, const char *name, char out[PATH_MAX])
{
	int n;

	if (name[0] == '/' && is_here(pid))
		n = snprintf(out, PATH_MAX, "%s", name);
	else
		n = snprintf(out, PATH_MAX, "/proc/%d/%s%s%s", (int)pid, name[0] == '/' ? "root" : "cwd",
			name[0] == '/' ? "" : "/", name);
	return n < PATH_MAX ? 0 : -ENAMETOOLONG;
}

static int get_config(const char *api, struct json_object **out, struct ffs_error *err)
{
	uint64_t deadline = ffs_now_ns() + API_NS;
	struct ffs_http_answer a = {0};
	struct ffs_http http;
	int sock, r = ffs_dial_path(api, deadline, &sock);

	if (r < 0)
		return ffs_error_errno(err, -r, "%.200s, the API socket of the VM", api);
	ffs_http_init(&http, sock);
	r = ffs_http_send(&http, "GET", "/vm/config", NULL, deadline, err);
	if (!r)
		r = ffs_http_recv(&http, NULL, deadline, &a, err);
	*out = !r && a.status == 200 ? json_tokener_parse(a.body) : NULL;
	if (!r && !*out)
		r = ffs_error_set(err, EPROTO, "%.200s says nothing of the VM's devices", api);
	ffs_http_answer_free(&a);
	ffs_http_close(&http);
	return r;
}

int ffs_agent_find_firecracker(pid_t pid, const char *api, char **out, struct ffs_error *err)
{
	struct json_object *config = NULL, *vsock = NULL;
	char path[PATH_MAX];
	const char *uds;
	int r = name_here(pid, api, path);

	r = r < 0 ? ffs_error_errno(err, -r, "the API socket of process %d", (int)pid)
		  : get_config(path, &config, err);
	if (r < 0)
		return r;
	vsock = ffs_json_get(config, "vsock");
	uds = vsock ? ffs_json_string(vsock, "uds_path") : "";
	if (!*uds)
		r = ffs_error_set(err, ENOENT,
			"the VM has no vsock, on which its agent would listen (PUT /vsock, before it "
			"starts)");
	else if (name_here(pid, uds, path) < 0 || asprintf(out, "vsock:%s", path) < 0)
		r = ffs_error_set(err, ENOMEM, "no memory for a path");
	json_object_put(config);
	return r;
}
