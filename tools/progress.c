/* Waiting for a branch (progress.h): the file NAME/branches/BRANCH/wait says when, `status` how far.
 *
 * One thread. poll(2) on `wait` wakes at the end; its time-out only paces the redrawing. */
#include "progress.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "cli.h"

#define FFS_REDRAW_MS 100

static void draw(const struct ffs_tree *t, const struct ffs_target *target, const char *status_path)
{
	struct json_object *status = NULL;
	struct winsize ws = {0};
	uint64_t done, all;
	const char *what = "";
	char a[32], b[32];
	int width = 30, full;

	if (ffs_tree_json(t, status_path, &status, NULL) < 0)
		return;
	done = ffs_json_u64(status, "captured_bytes");
	all = ffs_json_u64(status, "memory_bytes");
	/* captured: from now on it is its way to the store that takes the time */
	if (done >= all && ffs_json_get(status, "stored_bytes")) {
		done = ffs_json_u64(status, "stored_bytes");
		what = ", to the store";
	}
	json_object_put(status);
	if (!all)
		return;
	if (done > all)
		done = all;
	if (!ioctl(STDERR_FILENO, TIOCGWINSZ, &ws) && ws.ws_col && ws.ws_col < 100)
		width = ws.ws_col > 75 ? 20 : 10;
	full = (int)((double)done / (double)all * width);
	fprintf(stderr, "\r%.40s/%.40s [%.*s%*s] %3d %%  %s of %s%s\033[K", target->sandbox, target->branch,
		full, "##############################", width - full, "", (int)(done * 100.0 / all),
		ffs_format_bytes(a, done), ffs_format_bytes(b, all), what);
	fflush(stderr);
}

static void erase(void)
{
	fputs("\r\033[K", stderr);
	fflush(stderr);
}

/* The reason of a failed branch: the status file has it in words. */
static int failed(const struct ffs_tree *t, const struct ffs_target *target, const char *dir,
	const char *status_path, int code, struct ffs_error *err)
{
	struct json_object *status = NULL;
	struct ffs_error why = {0};

	ffs_error_errno(&why, code, "branch %s/%s", target->sandbox, target->branch);
	if (ffs_tree_json(t, status_path, &status, NULL) == 0 && *ffs_json_string(status, "error"))
		ffs_error_set(&why, code, "branch %s/%s failed: %s", target->sandbox, target->branch,
			ffs_json_string(status, "error"));
	else
		ffs_tree_explain(t, dir, &why);
	json_object_put(status);
	if (err)
		*err = why;
	return -code;
}

int ffs_wait_branch(
	const struct ffs_tree *t, const struct ffs_target *target, bool bar, struct ffs_error *err)
{
	char dir[160], path[176], status[176], word[64];
	_cleanup_close_ int fd = -1;
	bool drawn = false;
	int code = 0;
	ssize_t n;

	snprintf(dir, sizeof(dir), "%s/branches/%s", target->sandbox, target->branch);
	snprintf(path, sizeof(path), "%s/wait", dir);
	snprintf(status, sizeof(status), "%s/status", dir);
	fd = openat(t->fd, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		if (errno == ENOENT && ffs_tree_check_target(t, target, err) < 0)
			return -ENOENT;
		return failed(t, target, dir, status, errno, err);
	}
	bar = bar && isatty(STDERR_FILENO);
	while (bar && !ffs_interrupted()) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		int r = poll(&p, 1, FFS_REDRAW_MS);

		if (r != 0 && !(r < 0 && errno == EINTR))
			break;
		if (r == 0) {
			draw(t, target, status);
			drawn = true;
		}
	}
	if (drawn)
		erase();
	do {
		n = ffs_interrupted() ? -1 : read(fd, word, sizeof(word));
		code = n < 0 ? (ffs_interrupted() ? EINTR : errno) : 0;
	} while (code == EINTR && !ffs_interrupted());
	if (!code)
		return 0;
	if (code == EINTR)
		return ffs_error_set(
			err, EINTR, "interrupted; branch %s/%s goes on", target->sandbox, target->branch);
	return failed(t, target, dir, status, code, err);
}
