/* Owns the search for frames: one pass over the beginnings of all pages, by several threads, and the choice
 * of the one frame that is meant.
 *
 * Threads: the caller's, and up to three more while a scan lasts; they share a counter of pieces and a list
 * under a mutex, which is held for one frame at a time. Reads memory that may take long to read: never inside
 * a pause, never with a lock held that a pause needs. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "mailbox/mailbox.h"

#define MAX_THREADS 4
#define FILE_PIECE (32ull << 20) /* mapped at once */
#define READ_PIECE (1ull << 20)  /* copied at once; the heads of a FILE_PIECE are fewer bytes */

struct scan {
	const struct ffs_mailbox_memory *mem;
	uint64_t piece;
	atomic_ullong next; /* piece to do */
	atomic_bool stop;
	pthread_mutex_t lock; /* all that follows */
	struct ffs_mailbox_frames found;
	unsigned room;
	int result;
	struct ffs_error why;
};

void ffs_mailbox_frames_free(struct ffs_mailbox_frames *f)
{
	free(f->frame);
	*f = (struct ffs_mailbox_frames){0};
}

int ffs_mailbox_frames_copy(struct ffs_mailbox_frames *to, const struct ffs_mailbox_frames *from)
{
	*to = (struct ffs_mailbox_frames){0};
	if (!from->n)
		return 0;
	to->frame = malloc(from->n * sizeof(*to->frame));
	if (!to->frame)
		return -ENOMEM;
	memcpy(to->frame, from->frame, from->n * sizeof(*to->frame));
	to->n = from->n;
	return 0;
}

static void fail(struct scan *s, int code, const struct ffs_error *why)
{
	pthread_mutex_lock(&s->lock);
	if (!s->result) {
		s->result = code;
		s->why = *why;
	}
	pthread_mutex_unlock(&s->lock);
	atomic_store(&s->stop, true);
}

static int append(struct scan *s, const struct ffs_mailbox_frame *f, struct ffs_error *err)
{
	if (s->found.n == FFS_MAILBOX_FRAMES_MAX)
		return ffs_error_set(err, EOVERFLOW,
			"the guest's memory holds more than %u mailbox frames: it publishes too many, or old "
			"copies of them",
			FFS_MAILBOX_FRAMES_MAX);
	if (s->found.n == s->room) {
		unsigned room = s->room ? s->room * 2 : 16;
		struct ffs_mailbox_frame *more = realloc(s->found.frame, room * sizeof(*more));

		if (!more)
			return ffs_error_set(err, ENOMEM, "no memory for the mailboxes that were found");
		s->found.frame = more;
		s->room = room;
	}
	s->found.frame[s->found.n++] = *f;
	return 0;
}

/* What all magics begin with: one comparison a page. */
static const char common[8] = {'H', 'Y', 'P', 'E', 'M', 'A', 'N', '_'};

static void candidate(struct scan *s, const void *page, uint64_t off)
{
	struct ffs_mailbox_frame f = {.offset = off};
	struct ffs_error why = {0};

	if (!ffs_mailbox_parse(page, &f.id))
		return;
	pthread_mutex_lock(&s->lock);
	int r = append(s, &f, &why);

	pthread_mutex_unlock(&s->lock);
	if (r < 0)
		fail(s, r, &why);
}

static void look(struct scan *s, const char *bytes, uint64_t len, uint64_t off)
{
	for (uint64_t at = 0; at + FFS_MAILBOX_PAGE <= len && !atomic_load(&s->stop); at += FFS_MAILBOX_PAGE)
		if (memcmp(bytes + at, common, sizeof(common)) == 0)
			candidate(s, bytes + at, off + at);
}

/* Only what is data is touched: a hole would get a page by being looked at. */
static void look_at_file(struct scan *s, uint64_t off, uint64_t len)
{
	struct ffs_error why = {0};
	off_t data = lseek(s->mem->fd, (off_t)off, SEEK_DATA);

	if (data < 0 || (uint64_t)data >= off + len) {
		if (data < 0 && errno != ENXIO)
			fail(s, ffs_error_errno(&why, errno, "memory can't be searched for mailboxes"), &why);
		return;
	}
	char *map = mmap(NULL, len, PROT_READ, MAP_SHARED, s->mem->fd, (off_t)off);

	if (map == MAP_FAILED) {
		fail(s, ffs_error_errno(&why, errno, "memory can't be searched for mailboxes"), &why);
		return;
	}
	while (data >= 0 && (uint64_t)data < off + len && !atomic_load(&s->stop)) {
		off_t hole = lseek(s->mem->fd, data, SEEK_HOLE);
		uint64_t end = hole < 0 || (uint64_t)hole > off + len ? off + len : (uint64_t)hole;

		look(s, map + ((uint64_t)data - off), end - (uint64_t)data, (uint64_t)data);
		data = lseek(s->mem->fd, (off_t)end, SEEK_DATA);
	}
	munmap(map, len);
}

static void cannot_read(struct scan *s, ssize_t code, struct ffs_error *why)
{
	if (!why->text[0])
		ffs_error_errno(why, (int)-code, "memory can't be searched for mailboxes");
	fail(s, (int)code, why);
}

static void look_at_read(struct scan *s, char *buf, uint64_t off, uint64_t len)
{
	struct ffs_error why = {0};
	ssize_t n = s->mem->read(s->mem->arg, buf, len, off, &why);

	if (n < 0)
		cannot_read(s, n, &why);
	else
		look(s, buf, (uint64_t)n, off);
}

/* Of running memory: what begins as a frame is read whole, and may be another by then. */
static void look_at_heads(struct scan *s, uint64_t *head, uint64_t off, uint64_t len)
{
	size_t pages = len / FFS_MAILBOX_PAGE;
	struct ffs_error why = {0};
	char page[FFS_MAILBOX_PAGE];
	int r = s->mem->heads(s->mem->arg, head, pages, off, &why);

	if (r < 0) {
		cannot_read(s, r, &why);
		return;
	}
	for (size_t i = 0; i < pages && !atomic_load(&s->stop); i++) {
		if (memcmp(&head[i], common, sizeof(common)) != 0)
			continue;
		ssize_t n = s->mem->read(s->mem->arg, page, sizeof(page), off + i * FFS_MAILBOX_PAGE, &why);

		if (n < 0)
			cannot_read(s, n, &why);
		else if ((size_t)n == sizeof(page))
			candidate(s, page, off + i * FFS_MAILBOX_PAGE);
	}
}

static void *work(void *arg)
{
	struct scan *s = arg;
	_cleanup_free_ char *buf = s->mem->fd < 0 ? malloc(READ_PIECE) : NULL;

	if (s->mem->fd < 0 && !buf) {
		struct ffs_error why = {0};

		fail(s, ffs_error_set(&why, ENOMEM, "no memory to search for mailboxes"), &why);
	}
	while (!atomic_load(&s->stop)) {
		uint64_t off = atomic_fetch_add(&s->next, 1) * s->piece;

		if (off >= s->mem->size)
			break;
		uint64_t len = s->mem->size - off < s->piece ? s->mem->size - off : s->piece;

		if (s->mem->fd >= 0)
			look_at_file(s, off, len);
		else if (s->mem->heads)
			look_at_heads(s, (uint64_t *)(void *)buf, off, len);
		else
			look_at_read(s, buf, off, len);
	}
	return NULL;
}

static int by_offset(const void *a, const void *b)
{
	const struct ffs_mailbox_frame *x = a, *y = b;

	return x->offset < y->offset ? -1 : x->offset > y->offset;
}

int ffs_mailbox_scan(
	const struct ffs_mailbox_memory *mem, struct ffs_mailbox_frames *out, struct ffs_error *err)
{
	struct scan s = {.mem = mem,
		.piece = mem->fd >= 0 || mem->heads ? FILE_PIECE : READ_PIECE,
		.lock = PTHREAD_MUTEX_INITIALIZER};
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	pthread_t thread[MAX_THREADS - 1];
	unsigned n = 0;

	while (n < MAX_THREADS - 1 && (long)n + 1 < cpus && (n + 1) * s.piece < mem->size &&
		pthread_create(&thread[n], NULL, work, &s) == 0)
		n++;
	work(&s);
	while (n)
		pthread_join(thread[--n], NULL);
	if (s.result < 0) {
		ffs_mailbox_frames_free(&s.found);
		return ffs_error_set(err, -s.result, "%s", s.why.text);
	}
	if (s.found.n)
		qsort(s.found.frame, s.found.n, sizeof(*s.found.frame), by_offset);
	*out = s.found;
	return 0;
}

static bool same_id(const struct ffs_mailbox_id *a, const struct ffs_mailbox_id *b)
{
	return a->kind == b->kind && strcmp(a->name, b->name) == 0 && a->token_len == b->token_len &&
	       memcmp(a->token, b->token, a->token_len) == 0;
}

int ffs_mailbox_verify(
	const struct ffs_mailbox_memory *mem, struct ffs_mailbox_frames *frames, struct ffs_error *err)
{
	char page[FFS_MAILBOX_PAGE];
	struct ffs_mailbox_id id;
	unsigned kept = 0;

	for (unsigned i = 0; i < frames->n; i++) {
		ssize_t n = mem->read(mem->arg, page, sizeof(page), frames->frame[i].offset, err);

		if (n < 0)
			return (int)n;
		if ((size_t)n == sizeof(page) && ffs_mailbox_parse(page, &id) &&
			same_id(&id, &frames->frame[i].id))
			frames->frame[kept++] = frames->frame[i];
	}
	frames->n = kept;
	return 0;
}

/* ---- which one ---- */

bool ffs_mailbox_means(const struct ffs_mailbox_id *id, const char *text)
{
	size_t n = strlen(id->name);

	if (strncmp(id->name, text, n) != 0)
		return false;
	if (!text[n])
		return true;
	return text[n] == ':' && strlen(text + n + 1) == id->token_len &&
	       memcmp(text + n + 1, id->token, id->token_len) == 0;
}

static bool means(const struct ffs_mailbox_id *id, const char *name, const char *token, size_t token_len)
{
	if (!token)
		return ffs_mailbox_means(id, name);
	return strcmp(id->name, name) == 0 && id->token_len == token_len &&
	       memcmp(id->token, token, token_len) == 0;
}

/* " 0x1000 0x2000 …": as many as a sentence has room for. */
static void name_offsets(const struct ffs_mailbox_frames *in, const char *name, const char *token,
	size_t token_len, char *out, size_t room)
{
	size_t len = 0;

	for (unsigned i = 0; i < in->n && len + 24 < room; i++)
		if (means(&in->frame[i].id, name, token, token_len))
			len += (size_t)snprintf(
				out + len, room - len, " %#llx", (unsigned long long)in->frame[i].offset);
}

int ffs_mailbox_find(const struct ffs_mailbox_frames *in, const char *name, const char *token,
	size_t token_len, const struct ffs_mailbox_frame **out, struct ffs_error *err)
{
	const struct ffs_mailbox_frame *one = NULL;
	unsigned n = 0;
	char where[200];

	if (token && (!token_len || token_len > FFS_MAILBOX_TOKEN_MAX))
		return ffs_error_set(err, EINVAL, "mailbox '%.64s': a token has 1 to %u bytes", name,
			FFS_MAILBOX_TOKEN_MAX);
	for (unsigned i = 0; i < in->n; i++)
		if (means(&in->frame[i].id, name, token, token_len)) {
			one = &in->frame[i];
			n++;
		}
	if (!n)
		return ffs_error_set(err, ENOENT,
			"the guest publishes no mailbox '%.200s'%s (it publishes %u in all)", name,
			token ? " with that token" : "", in->n);
	if (n > 1) {
		name_offsets(in, name, token, token_len, where, sizeof(where));
		return ffs_error_set(err, ENOTUNIQ,
			"mailbox '%.130s' is there %u times, at%s: nothing says which is the guest's own%s",
			name, n, where, token ? "" : "; name its token (NAME:TOKEN) if the tokens differ");
	}
	*out = one;
	return 0;
}
