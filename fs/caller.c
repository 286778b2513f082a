/* Owns nothing: reads /proc about the thread that made a request. Any thread. The answers can be stale when a
 * caller dies meanwhile; they are used to key and to explain, never to grant. */
#include "caller.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

static pid_t thread_group(pid_t tid)
{
	_cleanup_free_ char *text = NULL;
	char path[40];

	snprintf(path, sizeof(path), "/proc/%d/status", (int)tid);
	if (ffs_read_file(path, 16384, &text, NULL) < 0)
		return tid;
	/* Name: is the first line and its value has no newline in it: proc(5) escapes them */
	const char *line = strstr(text, "\nTgid:");

	return line ? (pid_t)atoi(line + 6) : tid;
}

void ffs_caller_of(fuse_req_t req, struct ffs_caller *out)
{
	const struct fuse_ctx *ctx = fuse_req_ctx(req);

	*out = (struct ffs_caller){.tid = ctx->pid, .uid = ctx->uid, .gid = ctx->gid};
	/* getsid(0) is our own session: a caller that can't be seen must not be keyed by it */
	if (out->tid <= 0) {
		out->tid = 0;
		return;
	}
	out->tgid = thread_group(out->tid);
	pid_t sid = getsid(out->tid);

	out->sid = sid > 0 ? sid : 0;
	if (ffs_proc_stat(out->tgid, NULL, &out->start) < 0)
		out->start = 0;
}

struct ffs_gen_who ffs_caller_who(const struct ffs_caller *c)
{
	return (struct ffs_gen_who){.tgid = c->tgid, .start = c->start};
}

bool ffs_caller_alive(struct ffs_gen_who who)
{
	return ffs_proc_alive((struct ffs_proc_id){.pid = who.tgid, .start = who.start});
}
