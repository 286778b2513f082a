/* `mailbox,NAME,TOKEN[,ms=5][,stale=0][,ack=1][,vmgenid=0]`: publishes a mailbox and says what the host puts into
 * it:
 *
 *     mailbox NAME ready
 *     mailbox NAME took LENGTH epoch HEX flags N: PAYLOAD
 *     mailbox NAME acknowledged: TEXT       (where the host wants it)
 *     mailbox NAME restored                 (the kernel says so: vmgenid)
 *
 * ack: 0 never, 2 with a wrong epoch. ms: between two looks. vmgenid: and whenever the kernel says that the VM
 * was restored. stale: so many old copies of the frame lie in memory beside it, as page cache and freed pages
 * hold them. One thread. */
#include "guest.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mailbox.h"

static void acknowledge(struct guest_mailbox *m, const uint8_t epoch[16], uint64_t how)
{
	uint8_t what[16];
	char text[140];

	memcpy(what, epoch, sizeof(what));
	if (how == 2)
		what[15] ^= 1;
	guest_mailbox_ack_text(m, what, text);
	guest_mailbox_ack(m, what);
	guest_say("mailbox %s acknowledged: %.*s", guest_mailbox_name(m), (int)strcspn(text, "\n"), text);
}

int mailbox_main(int argc, char **argv)
{
	static char payload[GUEST_MAILBOX_PAYLOAD + 1], hex[33];
	uint64_t ms = guest_arg(argc, argv, "ms", 5), stale = guest_arg(argc, argv, "stale", 0),
		 ack = guest_arg(argc, argv, "ack", 1);
	struct pollfd log = {
		.fd = guest_arg(argc, argv, "vmgenid", 0) ? guest_mailbox_watch() : -1, .events = POLLIN};
	struct guest_mailbox m;
	uint8_t epoch[16];
	uint32_t flags;
	size_t len;

	if (argc < 3 || guest_mailbox_publish(&m, argv[1], argv[2]) < 0) {
		guest_say("mailbox: %m");
		return 1;
	}
	for (uint64_t i = 0; i < stale; i++)
		memcpy(guest_memory(GUEST_MAILBOX_PAGE), m.page, GUEST_MAILBOX_PAGE);
	guest_say("mailbox %s ready", argv[1]);
	for (;;) {
		int r = guest_mailbox_take(&m, payload, &len, epoch, &flags);

		if (r < 0)
			guest_say("mailbox %s: %m", argv[1]);
		if (r > 0) {
			payload[len] = '\0';
			for (unsigned i = 0; i < 16; i++)
				snprintf(hex + 2 * i, 3, "%02x", epoch[i]);
			guest_say("mailbox %s took %zu epoch %s flags %u: %.3000s", argv[1], len, hex, flags,
				payload);
			if (flags & GUEST_MAILBOX_WANTS_ACK && ack)
				acknowledge(&m, epoch, ack);
		}
		if (poll(&log, 1, (int)ms) > 0 && guest_mailbox_restored(log.fd))
			guest_say("mailbox %s restored", argv[1]);
	}
}
