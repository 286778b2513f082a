/* Cuts the byte stream of a QMP monitor into messages: one line each, or (-qmp-pretty) the lines from "{" to
 * "}".
 *
 * Used by the client (qmp.c) and by the watchdog's rescue (qemu-rescue.c), which may begin in the middle of a
 * message: whatever does not frame is handed out as it is, for the JSON parser to reject, and the next
 * message frames again. One thread at a time. Format: QEMU's docs/interop/qmp-spec.txt (messages end in CRLF)
 * and qobject_to_json_pretty(), which indents every inner line. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

struct ffs_qmp_framer {
	char *buf;
	size_t len, cap, max; /* bytes held, allocated, longest message */
	size_t start, scan;   /* of the message being collected; of the first byte not looked at */
	bool pretty;          /* inside "{" … "}" */
	bool skipping;        /* until the end of a line that was given up */
};

void ffs_qmp_framer_init(struct ffs_qmp_framer *f, size_t max);
void ffs_qmp_framer_free(struct ffs_qmp_framer *f);
/* Where to put more bytes (*room > 0), or NULL without memory. Invalidates frames handed out. */
char *ffs_qmp_framer_room(struct ffs_qmp_framer *f, size_t *room);
void ffs_qmp_framer_added(struct ffs_qmp_framer *f, size_t n);
/* 1 and the next message (no newline at its end; valid until the next _room), 0 when more bytes are needed,
 * -EMSGSIZE when a message exceeds `max`: call ffs_qmp_framer_drop() to go on behind it. */
int ffs_qmp_framer_next(struct ffs_qmp_framer *f, char **frame, size_t *len);
void ffs_qmp_framer_drop(struct ffs_qmp_framer *f);
