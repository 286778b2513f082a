/* `mailbox,NAME,TOKEN[,ms=5][,stale=0]`: publishes a mailbox and says what the host puts into it:
 *
 *     mailbox NAME ready
 *     mailbox NAME took LENGTH epoch HEX flags N: PAYLOAD
 *
 * ms: between two looks. stale: so many old copies of the frame lie in memory beside it, as page cache and
 * freed pages hold them. One thread. */
#include "guest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mailbox.h"

int mailbox_main(int argc, char **argv)
{
	static char payload[GUEST_MAILBOX_PAYLOAD + 1], hex[33];
	uint64_t ms = guest_arg(argc, argv, "ms", 5), stale = guest_arg(argc, argv, "stale", 0);
	struct timespec step = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};
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
		}
		nanosleep(&step, NULL);
	}
}
