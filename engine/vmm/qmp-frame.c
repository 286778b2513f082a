/* Owns the receive buffer of one QMP connection. One thread at a time (see qmp.c), no locks, never blocks. */
#include "vmm/qmp-frame.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_CAP 8192
#define CHUNK 4096

void ffs_qmp_framer_init(struct ffs_qmp_framer *f, size_t max)
{
	*f = (struct ffs_qmp_framer){.max = max};
}

void ffs_qmp_framer_free(struct ffs_qmp_framer *f)
{
	free(f->buf);
	f->buf = NULL;
	f->len = f->cap = f->start = f->scan = 0;
}

char *ffs_qmp_framer_room(struct ffs_qmp_framer *f, size_t *room)
{
	if (f->start) {
		memmove(f->buf, f->buf + f->start, f->len - f->start);
		f->len -= f->start;
		f->scan -= f->start;
		f->start = 0;
	}
	if (f->cap - f->len < CHUNK) {
		/* next() refuses more than max bytes without a message, so this is bounded by twice max +
		 * FIRST_CAP */
		size_t cap = f->cap ? f->cap * 2 : FIRST_CAP;
		char *bigger = realloc(f->buf, cap);

		if (!bigger)
			return NULL;
		f->buf = bigger;
		f->cap = cap;
	}
	*room = f->cap - f->len;
	return f->buf + f->len;
}

void ffs_qmp_framer_added(struct ffs_qmp_framer *f, size_t n)
{
	f->len += n;
}

int ffs_qmp_framer_next(struct ffs_qmp_framer *f, char **frame, size_t *len)
{
	for (;;) {
		char *line = f->buf ? f->buf + f->scan : NULL;
		char *nl = line && f->len > f->scan ? memchr(line, '\n', f->len - f->scan) : NULL;

		if (!nl) {
			if (f->skipping)
				f->start = f->scan = f->len;
			return f->len - f->start > f->max ? -EMSGSIZE : 0;
		}
		size_t n = (size_t)(nl - line);

		f->scan += n + 1;
		if (n && line[n - 1] == '\r')
			n--;
		if (f->skipping) {
			f->skipping = false;
			f->start = f->scan;
			continue;
		}
		if (f->pretty && !(n && line[0] == '{')) {
			if (n == 1 && line[0] == '}') {
				*frame = f->buf + f->start;
				*len = (size_t)(line + 1 - *frame);
				f->pretty = false;
				f->start = f->scan;
				return *len > f->max ? -EMSGSIZE : 1;
			}
			continue;
		}
		/* inner lines of a pretty message are indented: a brace in column 0 begins the next one, even
		 * when the end of the last one was lost */
		f->pretty = n == 1 && line[0] == '{';
		if (f->pretty) {
			f->start = (size_t)(line - f->buf);
			continue;
		}
		f->start = f->scan;
		if (!n)
			continue;
		*frame = line;
		*len = n;
		return n > f->max ? -EMSGSIZE : 1;
	}
}

void ffs_qmp_framer_drop(struct ffs_qmp_framer *f)
{
	/* bytes behind scan have no newline yet: they belong to the message that is given up */
	f->skipping = f->scan < f->len;
	f->start = f->scan = f->len;
	f->pretty = false;
}
