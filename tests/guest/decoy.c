/* `decoy,KIND,NAME,TOKEN`: leaves what only looks like a mailbox in memory, says "decoy KIND ready", and stays:
 *
 *     aligned        a copy of a frame in a page of its own
 *     unaligned      8 bytes behind the beginning of a page
 *     straddling     its marker begins in one page and ends in the next
 *     unterminated   at a page, with a token that goes on into the payload
 *     freed          256 copies in pages that were given back to the kernel
 *     cached         a copy in the page cache: a file in memory
 *
 * One thread. What it makes them of is a published page, which is wiped. */
#include "guest.h"

#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mailbox.h"

#define FREED 256
#define TOKEN_FIELD_END 300

static bool in_file(const uint8_t *frame)
{
	int fd = open("/cached-frame", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	bool done = fd >= 0 && write(fd, frame, GUEST_MAILBOX_PAGE) == GUEST_MAILBOX_PAGE;

	if (fd >= 0)
		close(fd);
	return done;
}

int decoy_main(int argc, char **argv)
{
	struct guest_mailbox m;
	bool done = true;

	if (argc < 4 || guest_mailbox_publish(&m, argv[2], argv[3]) < 0) {
		guest_say("decoy: %m");
		return 1;
	}
	const char *kind = argv[1];
	uint64_t bytes = strcmp(kind, "freed") == 0 ? FREED * GUEST_MAILBOX_PAGE : 2 * GUEST_MAILBOX_PAGE;
	uint8_t *mem = guest_memory(bytes);

	if (strcmp(kind, "aligned") == 0) {
		memcpy(mem, m.page, GUEST_MAILBOX_PAGE);
	} else if (strcmp(kind, "unaligned") == 0) {
		memcpy(mem + 8, m.page, GUEST_MAILBOX_PAGE);
	} else if (strcmp(kind, "straddling") == 0) {
		memcpy(mem + GUEST_MAILBOX_PAGE - 20, m.page, GUEST_MAILBOX_PAGE);
	} else if (strcmp(kind, "unterminated") == 0) {
		size_t token_at = 24 + strlen(argv[2]) + 1;

		memcpy(mem, m.page, GUEST_MAILBOX_PAGE);
		memset(mem + token_at, 'x', TOKEN_FIELD_END - token_at);
	} else if (strcmp(kind, "freed") == 0) {
		for (unsigned i = 0; i < FREED; i++)
			memcpy(mem + i * GUEST_MAILBOX_PAGE, m.page, GUEST_MAILBOX_PAGE);
		munmap(mem, bytes);
	} else if (strcmp(kind, "cached") == 0) {
		memcpy(mem + 64, m.page, GUEST_MAILBOX_PAGE);
		done = in_file(mem + 64);
	} else {
		done = false;
	}
	guest_mailbox_withdraw(&m);
	guest_say(done ? "decoy %s ready" : "decoy %s: %m", kind);
	for (;;)
		pause();
}
