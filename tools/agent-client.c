/* Finding a VM's agent, and talking to its link, which is started here when there is none (agent-link.h).
 *
 * Any thread; the lock is a file's, of the directory in which the sockets are, and is held while a link is looked for or
 * started: connecting, binding and a spawn, none of which waits for anybody. */
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent-link.h"
#include "base/cleanup.h"
#include "base/util.h"
#include "options.h"
#include "restore-qemu-args.h"
#include "spawn-self.h"
#include "tree.h"

#define COMMAND_LINE_MAX (1u << 20)
#define GOODBYE_MS 1000

int ffs_agent_lock(const char *socket, struct ffs_error *err)
{
	const char *path = ffs_agent_path(socket), *slash = strrchr(path, '/');
	char dir[120];
	int fd;

	snprintf(dir, sizeof(dir), "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
	fd = open(*dir ? dir : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return ffs_error_errno(err, errno, "%s, where the agent's socket is", dir);
	while (flock(fd, LOCK_EX) < 0)
		if (errno != EINTR) {
			int code = errno;

			close(fd);
			return ffs_error_errno(err, code, "%s cannot be locked", dir);
		}
	return fd;
}

static int name_of(const struct ffs_agent_link *l, struct sockaddr_un *a, struct ffs_error *err)
{
	*a = (struct sockaddr_un){.sun_family = AF_UNIX};
	if ((size_t)snprintf(a->sun_path, sizeof(a->sun_path), "%s.link", ffs_agent_path(l->socket)) >=
		sizeof(a->sun_path))
		return ffs_error_set(err, ENAMETOOLONG,
			"%.100s: a name that long leaves no room for the link's own",
			ffs_agent_path(l->socket));
	return 0;
}

static int try_connect(const struct sockaddr_un *a)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd >= 0 && connect(fd, (const struct sockaddr *)a, sizeof(*a)) < 0) {
		int code = errno;

		close(fd);
		return -code;
	}
	return fd < 0 ? -errno : fd;
}

static int make_listener(const struct sockaddr_un *a, struct ffs_error *err)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), code;

	/* a name that nobody answers at is of a link that was killed */
	if (fd < 0 || (unlink(a->sun_path) < 0 && errno != ENOENT) ||
		bind(fd, (const struct sockaddr *)a, sizeof(*a)) < 0 || chmod(a->sun_path, 0600) < 0 ||
		listen(fd, 128) < 0) {
		code = errno;
		if (fd >= 0)
			close(fd);
		return ffs_error_errno(err, code, "%s, a socket for the commands in the guest", a->sun_path);
	}
	return fd;
}

/* The process lives as long as the VM; all it has of ours is the listener, as descriptor 3. */
static int start_link(const struct ffs_agent_link *l, int listener, struct ffs_error *err)
{
	char pid[16], ready[16];
	char name[] = "forkfs-agent-link";
	char *argv[] = {name, (char *)(uintptr_t)l->socket, pid, ready, NULL};
	pid_t child;

	snprintf(pid, sizeof(pid), "%d", (int)l->pid);
	snprintf(ready, sizeof(ready), "%u", l->ready_s);
	int r = ffs_spawn_self(argv, listener, false, &child);

	return r < 0 ? ffs_error_errno(err, -r, "the link to the guest's agent cannot be started") : 0;
}

int ffs_agent_dial(const struct ffs_agent_link *l, struct ffs_error *err)
{
	_cleanup_close_ int lock = -1, listener = -1;
	struct sockaddr_un a;
	int fd = name_of(l, &a, err);

	if (fd < 0)
		return fd;
	lock = ffs_agent_lock(l->socket, err);
	if (lock < 0)
		return lock;
	fd = try_connect(&a);
	if (fd >= 0)
		return fd;
	if (fd != -ENOENT && fd != -ECONNREFUSED)
		return ffs_error_errno(err, -fd, "%s", a.sun_path);
	listener = make_listener(&a, err);
	if (listener < 0)
		return listener;
	fd = start_link(l, listener, err);
	if (fd < 0)
		return fd;
	fd = try_connect(&a);
	return fd >= 0 ? fd : ffs_error_errno(err, -fd, "%s", a.sun_path);
}

/* ---- frames over a connection ---- */

int ffs_agent_send(int fd, uint8_t type, uint32_t stream, const void *payload, size_t len)
{
	uint8_t wire[AGENT_WIRE_MAX];
	size_t n = agent_encode(type, stream, payload, len, wire), at = 0;

	while (at < n) {
		ssize_t w = send(fd, wire + at, n - at, MSG_NOSIGNAL);

		if (w < 0 && errno == EINTR)
			continue;
		if (w <= 0)
			return -errno;
		at += (size_t)w;
	}
	return 0;
}

int ffs_agent_next(int fd, struct ffs_agent_input *in, struct agent_frame *out)
{
	for (;;) {
		size_t used;
		int r;

		if (in->at == in->len) {
			ssize_t n = read(fd, in->buf, sizeof(in->buf));

			if (n < 0)
				return -errno;
			if (n == 0)
				return 0;
			in->at = 0;
			in->len = (size_t)n;
		}
		r = agent_decode(&in->dec, in->buf + in->at, in->len - in->at, &used, out);
		in->at += used;
		if (r == 1)
			return 1;
	}
}

/* Until something comes from the link: 1; 0: not until the deadline; -ECONNRESET: the VM has ended, and its link has nothing
 * to say about it. */
static int wait_for_link(int fd, int pidfd, uint64_t deadline)
{
	struct pollfd p[2] = {{.fd = fd, .events = POLLIN}, {.fd = pidfd, .events = POLLIN}};
	int n;

	do
		n = poll(p, 2, deadline == UINT64_MAX ? -1 : ffs_ms_until(deadline));
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		return n < 0 ? -errno : 0;
	/* it sees the end too, and goes: what it says is better than what we know */
	return p[0].revents || poll(p, 1, GOODBYE_MS) == 1 ? 1 : -ECONNRESET;
}

/* The link's next answer, in *json: 1, 0 at the deadline, or -errno with its sentence. */
static int next_answer(
	int fd, int pidfd, uint64_t deadline, struct ffs_agent_input *in, char **json, struct ffs_error *err)
{
	struct agent_frame f;
	int r = 1;

	while (r > 0) {
		r = in->at < in->len ? 1 : wait_for_link(fd, pidfd, deadline);
		if (r == 0)
			return 0;
		if (r > 0)
			r = ffs_agent_next(fd, in, &f);
		if (r == 0)
			r = -ECONNRESET;
		if (r > 0 && f.type == AGENT_ERROR)
			return ffs_error_set(
				err, EIO, "%.*s", (int)(f.len > 400 ? 400 : f.len), (const char *)f.payload);
		if (r > 0 && f.type == AGENT_STATUS) {
			*json = strndup((const char *)f.payload, f.len);
			return *json ? 1 : ffs_error_set(err, ENOMEM, "no memory for an answer");
		}
	}
	return ffs_error_errno(err, -r, "the link to the guest's agent");
}

int ffs_agent_wait(int fd, int pidfd, char **json, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_agent_input *in = calloc(1, sizeof(*in));
	_cleanup_free_ char *said = NULL;
	int r = in ? ffs_agent_send(fd, AGENT_STATUS, 0, NULL, 0) : -ENOMEM;

	if (r < 0)
		return ffs_error_errno(err, -r, "the link to the guest's agent");
	r = next_answer(fd, pidfd, UINT64_MAX, in, &said, err);
	if (json)
		*json = ffs_steal_ptr(&said);
	return r < 0 ? r : 0;
}

int ffs_agent_health(int fd, unsigned seconds, char **json, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_agent_input *in = calloc(1, sizeof(*in));
	uint64_t deadline = ffs_now_ns() + seconds * FFS_NS_PER_S;
	int r = in ? ffs_agent_send(fd, AGENT_HEALTH, 0, "\1", 1) : -ENOMEM;

	if (r < 0)
		return ffs_error_errno(err, -r, "the link to the guest's agent");
	r = next_answer(fd, -1, deadline, in, json, err);
	if (r)
		return r;
	/* the guest has not; its link does at once */
	r = ffs_agent_send(fd, AGENT_HEALTH, 0, "\0", 1);
	if (r < 0)
		return ffs_error_errno(err, -r, "the link to the guest's agent");
	r = next_answer(fd, -1, ffs_now_ns() + GOODBYE_MS * FFS_NS_PER_MS, in, json, err);
	if (r == 0)
		return ffs_error_set(err, ETIMEDOUT,
			"the guest's agent has not answered within %u s: not even the connection was taken",
			seconds);
	return r < 0 ? r : 0;
}

/* ---- where a QEMU has it ---- */

/* The value of the chardev `id`, or of the option `name` in which `key` is `value`. NULL: there is none. */
static const char *option_with(
	char *const *word, unsigned n, const char *name, const char *key, const char *value)
{
	char got[512];

	for (unsigned i = 0; i + 1 < n; i++) {
		const char *w = word[i];

		if (w[0] == '-' && !strcmp(w + 1 + (w[1] == '-'), name) &&
			ffs_qemu_get(word[i + 1], NULL, key, got, sizeof(got)) && !strcmp(got, value))
			return word[i + 1];
	}
	return NULL;
}

int ffs_agent_find_in(char *const *word, unsigned n, const char *cwd, char **out, struct ffs_error *err)
{
	const char *port = option_with(word, n, "device", "name", AGENT_PORT), *chardev;
	char id[65], path[512];

	if (!port || !ffs_qemu_get(port, NULL, "chardev", id, sizeof(id)))
		return ffs_error_set(err, ENOENT,
			"the VM has no port for an agent (-device virtserialport,name=" AGENT_PORT
			",chardev=…); --socket names one");
	chardev = option_with(word, n, "chardev", "id", id);
	if (!chardev || !ffs_qemu_get(chardev, NULL, "path", path, sizeof(path)))
		return ffs_error_set(err, ENOENT, "the agent's chardev %.40s is no socket with a path", id);
	if (path[0] == '/')
		*out = strdup(path);
	else if (asprintf(out, "%s/%s", cwd, path) < 0)
		*out = NULL;
	return *out ? 0 : ffs_error_set(err, ENOMEM, "no memory for a path");
}

int ffs_agent_find(pid_t pid, char **out, struct ffs_error *err)
{
	_cleanup_free_ char *text = NULL;
	_cleanup_free_ char **word = NULL;
	char path[40], cwd[300];
	size_t len = 0;
	ssize_t cwd_len;
	unsigned n = 0, count = 0;
	int r;

	snprintf(path, sizeof(path), "/proc/%d/cwd", (int)pid);
	cwd_len = readlink(path, cwd, sizeof(cwd) - 1);
	if (cwd_len < 0)
		return ffs_error_errno(err, errno, "%s", path);
	cwd[cwd_len] = 0;
	snprintf(path, sizeof(path), "/proc/%d/cmdline", (int)pid);
	r = ffs_read_file(path, COMMAND_LINE_MAX, &text, &len);
	if (r < 0)
		return ffs_error_errno(err, -r, "the command line of process %d", (int)pid);
	for (size_t i = 0; i < len; i++)
		count += !text[i];
	word = calloc(count + 1, sizeof(*word));
	if (!word)
		return ffs_error_set(err, ENOMEM, "no memory for a command line");
	for (size_t at = 0; at < len && n < count; at += strlen(text + at) + 1)
		word[n++] = text + at;
	if (ffs_agent_api_of(word, n))
		return ffs_agent_find_firecracker(pid, ffs_agent_api_of(word, n), out, err);
	return ffs_agent_find_in(word, n, cwd, out, err);
}

int ffs_agent_of(const char *sandbox, const char *mount, pid_t *pid, char **out, struct ffs_error *err)
{
	_cleanup_(ffs_tree_close) struct ffs_tree t = FFS_TREE_INIT;
	struct json_object *status = NULL;
	struct ffs_target target;
	char file[80];
	int got = ffs_target_parse(sandbox, FFS_TARGET_SANDBOX, &target, err);

	if (!got)
		got = ffs_tree_open(&t, mount, err);
	if (!got)
		got = ffs_tree_check_target(&t, &target, err);
	snprintf(file, sizeof(file), "%s/status", target.sandbox);
	if (!got)
		got = ffs_tree_json(&t, file, &status, err);
	if (got < 0)
		return got;
	*pid = (pid_t)ffs_json_u64(status, "pid");
	json_object_put(status);
	return ffs_agent_find(*pid, out, err);
}
