/* Owns the page of a fork's mailbox: what the branch has there, with a payload in it.
 *
 * Pure, any thread; allocates nothing. */
#include <errno.h>
#include <string.h>

#include "mailbox/mailbox.h"

static int put(void *arg, const void *bytes, size_t len, unsigned at)
{
	memcpy((uint8_t *)arg + at, bytes, len);
	return 0;
}

int ffs_mailbox_lay(enum ffs_mailbox_kind kind, struct ffs_span payload, const uint8_t epoch[16],
	bool wants_ack, unsigned port, void *page, struct ffs_error *err)
{
	char with_port[FFS_MAILBOX_PAYLOAD_MAX];
	int r = ffs_mailbox_fits(kind, payload.len, 0, FFS_MAILBOX_PAGE, err);

	if (!r && wants_ack && port) {
		ssize_t n = ffs_json_add_port(payload, FFS_ACK_PORT_KEY, port, with_port,
			ffs_mailbox_layout(kind)->payload_max, err);

		r = n < 0 ? (int)n : 0;
		payload = (struct ffs_span){with_port, n < 0 ? 0 : (size_t)n};
	}
	return r < 0 ? r
		     : ffs_mailbox_write(kind, payload.at, payload.len, epoch,
			       wants_ack ? FFS_MAILBOX_WANTS_ACK : 0, put, page);
}
