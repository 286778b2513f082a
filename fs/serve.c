/* Owns the sentences that explain errors, the memory of repeated OPENs, and the answers that count lookups.
 *
 * Threads: any; the tree lock is taken inside where the header says so. A sentence is kept for the session
 * and user it was said to, in a ring: it is a help, not a record (the log is). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "daemon.h"
#include "nodes.h"

#define SENTENCES 256
/* A client that fails in a loop must not fill the log. */
#define LOG_PER_S 20
/* The kernel tries again at once; what is older is of a client that died in between. */
#define RETRY_NS (5 * FFS_NS_PER_S)

struct ffs_sentences {
	struct {
		uint64_t dir_ino;
		pid_t sid;
		uid_t uid;
		char text[512];
	} ring[SENTENCES];
	unsigned next;
	uint64_t second;
	unsigned logged, suppressed;
};

struct ffs_sentences *ffs_sentences_new(void)
{
	return calloc(1, sizeof(struct ffs_sentences));
}

void ffs_sentences_free(struct ffs_sentences *s)
{
	free(s);
}

int ffs_sentence_get(struct ffs_fs *fs, const struct ffs_caller *who, uint64_t dir_ino, char out[512])
{
	struct ffs_sentences *s = fs->sentences;
	const char *found = NULL;

	pthread_mutex_lock(&fs->lock);
	for (unsigned i = 1; i <= SENTENCES; i++) {
		unsigned at = (s->next + SENTENCES - i) % SENTENCES;

		if (s->ring[at].dir_ino != dir_ino || s->ring[at].uid != who->uid || !s->ring[at].text[0])
			continue;
		if (who->sid && s->ring[at].sid == who->sid) {
			found = s->ring[at].text;
			break;
		}
		if (!found)
			found = s->ring[at].text;
	}
	if (found)
		snprintf(out, 512, "%s", found);
	pthread_mutex_unlock(&fs->lock);
	return found ? 0 : -ENODATA;
}

/* Tree lock held. */
static bool may_log(struct ffs_sentences *s, unsigned *suppressed)
{
	uint64_t second = ffs_now_ns() / FFS_NS_PER_S;

	*suppressed = 0;
	if (s->second != second) {
		s->second = second;
		s->logged = 0;
		*suppressed = s->suppressed;
		s->suppressed = 0;
	}
	if (s->logged >= LOG_PER_S) {
		s->suppressed++;
		return false;
	}
	s->logged++;
	return true;
}

/* Names and VMMs' words get into sentences: no line of the log may be forged, no terminal spoken to. */
static void copy_printable(char *to, size_t room, const char *from)
{
	size_t n = 0;

	for (; from[n] && n + 1 < room; n++)
		to[n] = (unsigned char)from[n] < 0x20 || from[n] == 0x7f ? '?' : from[n];
	to[n] = '\0';
}

void ffs_note_failure(
	struct ffs_fs *fs, const struct ffs_caller *who, uint64_t dir_ino, const struct ffs_error *err)
{
	struct ffs_sentences *s = fs->sentences;
	char text[sizeof(s->ring[0].text)];
	unsigned suppressed;

	if (!err || !err->text[0])
		return;
	copy_printable(text, sizeof(text), err->text);
	atomic_fetch_add(&fs->count.errors, 1);
	pthread_mutex_lock(&fs->lock);
	unsigned at = s->next++ % SENTENCES;

	s->next %= SENTENCES;
	s->ring[at].dir_ino = dir_ino;
	s->ring[at].sid = who->sid;
	s->ring[at].uid = who->uid;
	snprintf(s->ring[at].text, sizeof(s->ring[at].text), "%s", text);
	bool log = may_log(s, &suppressed);

	pthread_mutex_unlock(&fs->lock);
	if (suppressed)
		ffs_log(FFS_LOG_WARN, "%u more failed requests were not logged", suppressed);
	if (log)
		ffs_log(FFS_LOG_WARN, "uid %u pid %d: %s", (unsigned)who->uid, (int)who->tgid, text);
}

void ffs_reply_failure(struct ffs_fs *fs, fuse_req_t req, const struct ffs_caller *who, uint64_t dir_ino,
	int code, const struct ffs_error *err)
{
	struct ffs_caller full = *who;

	/* who it is costs reads of /proc: only now */
	if (err && err->text[0] && !full.tgid)
		ffs_caller_of(req, &full);
	ffs_note_failure(fs, &full, dir_ino, err);
	fuse_reply_err(req, code == ENOSYS ? EOPNOTSUPP : code);
}

/* ---- entries ---- */

void ffs_reply_entry(struct ffs_fs *fs, fuse_req_t req, struct ffs_node *node)
{
	struct fuse_entry_param e = {0};

	pthread_mutex_lock(&fs->lock);
	e.ino = node->id;
	ffs_node_attr(fs, node, &e.attr);
	e.attr_timeout = ffs_node_attr_ttl(fs, node);
	e.entry_timeout = ffs_node_entry_ttl(fs, node);
	node->lookups++;
	ffs_node_unref(fs, node);
	pthread_mutex_unlock(&fs->lock);
	if (fuse_reply_entry(req, &e) != 0) {
		/* the kernel never heard of it */
		pthread_mutex_lock(&fs->lock);
		node = ffs_node_by_id(fs, e.ino);
		if (node)
			ffs_node_forget(fs, node, 1);
		pthread_mutex_unlock(&fs->lock);
	}
}

void ffs_reply_node(struct ffs_call *call, fuse_req_t req, const struct ffs_node_key *key,
	struct ffs_sbx *sbx, struct ffs_named *named, struct ffs_live *live)
{
	pthread_mutex_lock(&call->fs->lock);
	struct ffs_node *node = ffs_node_get(call->fs, key, sbx, named, live);

	if (node)
		ffs_node_ref(node);
	pthread_mutex_unlock(&call->fs->lock);
	if (node)
		ffs_reply_entry(call->fs, req, node);
	else
		fuse_reply_err(req, ENOMEM);
}

/* ---- repeated OPENs ---- */

void ffs_retry_note(struct ffs_fs *fs, pid_t tid, uint64_t ino, enum ffs_retry why)
{
	unsigned at = fs->next_retry++ % FFS_RETRIES;

	fs->retries[at].tid = tid;
	fs->retries[at].ino = ino;
	fs->retries[at].why = why;
	fs->retries[at].at_ns = ffs_now_ns();
}

static enum ffs_retry find_retry(struct ffs_fs *fs, pid_t tid, uint64_t ino, bool take)
{
	uint64_t now = ffs_now_ns();
	enum ffs_retry why = FFS_RETRY_NONE;

	for (unsigned i = 0; i < FFS_RETRIES; i++) {
		if (!fs->retries[i].why || fs->retries[i].tid != tid || fs->retries[i].ino != ino)
			continue;
		if (now - fs->retries[i].at_ns < RETRY_NS)
			why = fs->retries[i].why;
		if (take || now - fs->retries[i].at_ns >= RETRY_NS)
			fs->retries[i].why = FFS_RETRY_NONE;
	}
	return why;
}

enum ffs_retry ffs_retry_peek(struct ffs_fs *fs, pid_t tid, uint64_t ino)
{
	return find_retry(fs, tid, ino, false);
}

enum ffs_retry ffs_retry_take(struct ffs_fs *fs, pid_t tid, uint64_t ino)
{
	return find_retry(fs, tid, ino, true);
}
