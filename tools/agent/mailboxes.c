/* The mailboxes of this guest: published when it starts, looked at for payloads, and those handed to a
 * command, which has them on stdin and in its environment (docs/agent.md). What ends with 0 is acknowledged.
 *
 * A page tells nobody that it was written: a look is a load, done whenever the loop goes round, and every
 * LOOK_MS; where the VM has a generation id the kernel's log says that it was restored, and the loop goes
 * round at once. A mailbox is not looked at while its command runs; what comes meanwhile waits in the page.
 * One thread. */
#include "agent.h"
#include "spawn.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mailbox.h"

#define LOOK_MS 10
#define FLAG_EXTENSION 1u

struct box {
	struct guest_mailbox m;
	const char *name;
	uint8_t epoch[16]; /* of the last payload */
	bool had_one;      /* and it had an epoch */
	uint32_t flags;
	unsigned port;       /* of the host, for a text by UDP; 0: none */
	uint32_t vsock_port; /* by vsock */
	pid_t pid;           /* of the command that has it; 0: none */
	int born;
};

static struct box box[MAILBOXES_MAX];
static unsigned count;

/* ---- publishing ---- */

static void publish(char *word)
{
	struct box *b = &box[count];
	char *token = strchr(word, ':');
	size_t len;

	if (token)
		*token++ = '\0';
	len = strspn(word, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");
	if (word[len] || !len || len > 64) {
		say("forkfs-agent: mailbox '%.80s': a name has 1 to 64 of A-Z a-z 0-9 . _ -, a token comes "
		    "after a colon",
			word);
		return;
	}
	for (unsigned i = 0; i < count; i++)
		if (!strcmp(box[i].name, word)) {
			say("forkfs-agent: mailbox %s is named twice", word);
			return;
		}
	/* no secret, only what the frame has to have: without one in a request the name alone counts */
	if (guest_mailbox_publish(&b->m, word, token ? token : word) < 0) {
		say("forkfs-agent: mailbox %s: %s", word, strerror(errno));
		return;
	}
	b->name = word;
	count++;
}

/* Having woken up is all there is to do: the loop looks after each event. */
static void log_ready(struct watch *w, uint32_t events)
{
	if (guest_mailbox_restored(w->fd))
		say("forkfs-agent: the VM was restored");
}

static struct watch log_watch = {.fd = -1, .ready = log_ready};

void mailboxes_start(void)
{
	if (options.n_mailboxes && !options.on_mailbox) {
		say("forkfs-agent: there is no --on-mailbox for what comes into the mailboxes");
		return;
	}
	for (unsigned i = 0; i < options.n_mailboxes; i++)
		publish(options.mailbox[i]);
	if (count) {
		log_watch.fd = guest_mailbox_watch();
		watch_arm(&log_watch, EPOLLIN);
	}
}

int mailboxes_due_ms(void)
{
	return count ? LOOK_MS : -1;
}

/* ---- acknowledging ---- */

/* The host, where nothing else is said, is behind the default gateway; so has QEMU's user network it. */
static bool gateway(struct in_addr *out)
{
	FILE *routes = fopen("/proc/net/route", "re");
	char line[256];
	bool found = false;

	while (routes && !found && fgets(line, sizeof(line), routes)) {
		unsigned long destination, address, flags;

		found = sscanf(line, "%*s %lx %lx %lx", &destination, &address, &flags) == 3 &&
			!destination && flags & 2;
		if (found)
			out->s_addr = (in_addr_t)address;
	}
	if (routes)
		fclose(routes);
	return found;
}

static void send_text(const struct box *b, const char *text, size_t len)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)b->port)};
	int fd;

	if (options.ack_address ? inet_pton(AF_INET, options.ack_address, &to.sin_addr) != 1
				: !gateway(&to.sin_addr))
		return; /* no network: the page has it */
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || sendto(fd, text, len, 0, (struct sockaddr *)&to, sizeof(to)) < 0)
		say("forkfs-agent: mailbox %s: its ACK to port %u: %s", b->name, b->port, strerror(errno));
	if (fd >= 0)
		close(fd);
}

/* The host is waited for: by a process of its own, which has nothing of ours that somebody could wait for the end of. */
static void send_vsock(const struct box *b, const char *text, size_t len)
{
	pid_t pid = fork();

	if (pid < 0)
		say("forkfs-agent: mailbox %s: its ACK to vsock port %u: %s", b->name, b->vsock_port,
			strerror(errno));
	if (pid)
		return;
	closefrom(STDERR_FILENO + 1);
	/* reset: the host does not listen any more, and has heard of it in another way */
	if (guest_mailbox_vsock(b->vsock_port, text, len) < 0 && errno != ECONNRESET)
		say("forkfs-agent: mailbox %s: its ACK to vsock port %u: %s", b->name, b->vsock_port,
			strerror(errno));
	_exit(0);
}

static void acknowledge(struct box *b)
{
	char text[140];
	size_t len = guest_mailbox_ack_text(&b->m, b->epoch, text);

	/* not when the page has another fork's payload meanwhile, whose ACK this would not be */
	if (b->flags & GUEST_MAILBOX_WANTS_ACK && !memcmp(b->m.page + GUEST_MAILBOX_EPOCH_AT, b->epoch, 16))
		guest_mailbox_ack(&b->m, b->epoch);
	if (b->port)
		send_text(b, text, len);
	if (b->vsock_port && options.vsock)
		send_vsock(b, text, len);
}

/* ---- the command ---- */

/* The payload as a file to be read from its beginning: nobody has to write it into a pipe. */
static int payload_file(const char *payload, size_t len)
{
	int fd = memfd_create("payload", MFD_CLOEXEC);

	if (fd >= 0 && (write(fd, payload, len) != (ssize_t)len || lseek(fd, 0, SEEK_SET) < 0)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static void hand_over(struct box *b, const char *payload, size_t len)
{
	static struct agent_exec e;
	static char name[80], text[GUEST_MAILBOX_PAYLOAD + 20], epoch[60];
	struct spawned s;
	int input = payload_file(payload, len), r;

	snprintf(name, sizeof(name), "FORKFS_MAILBOX=%s", b->name);
	snprintf(text, sizeof(text), "FORKFS_PAYLOAD=%s", payload);
	r = snprintf(epoch, sizeof(epoch), "FORKFS_EPOCH=");
	for (unsigned i = 0; i < 16; i++)
		r += snprintf(epoch + r, sizeof(epoch) - (size_t)r, "%s%02x",
			i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", b->epoch[i]);
	e = (struct agent_exec){.cwd = "", .env = {name, text, epoch}, .envc = 3};
	/* a guest need not have a shell: it is asked only for what is more than the name of a program */
	if (options.on_mailbox[strcspn(options.on_mailbox, " \t\n|&;<>()$`\\\"'*?[#~=%")]) {
		e.argv[e.argc++] = "/bin/sh";
		e.argv[e.argc++] = "-c";
	}
	e.argv[e.argc++] = options.on_mailbox;
	r = input < 0 ? -errno : spawn_command(&e, true, input, &s);
	if (input >= 0)
		close(input);
	if (r < 0) {
		say("forkfs-agent: mailbox %s: %s cannot be started: %s", b->name, options.on_mailbox,
			strerror(-r));
		return;
	}
	b->pid = s.pid;
	b->born = s.born;
}

bool mailboxes_ended(pid_t pid, int status)
{
	for (unsigned i = 0; i < count; i++) {
		struct box *b = &box[i];
		int why = 0;

		if (b->pid != pid)
			continue;
		b->pid = 0;
		if (read(b->born, &why, sizeof(why)) != sizeof(why))
			why = 0;
		close(b->born);
		if (why)
			say("forkfs-agent: mailbox %s: %s: %s", b->name, options.on_mailbox, strerror(why));
		else if (WIFEXITED(status) && !WEXITSTATUS(status))
			acknowledge(b);
		else
			say("forkfs-agent: mailbox %s: no ACK, its command has ended with %d", b->name,
				WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
		return true;
	}
	return false;
}

/* ---- looking ---- */

static void look_at(struct box *b)
{
	static char payload[GUEST_MAILBOX_PAYLOAD + 1];
	uint8_t epoch[16];
	size_t len;
	int r = guest_mailbox_take(&b->m, payload, &len, epoch, &b->flags);

	if (r < 0)
		say("forkfs-agent: mailbox %s: a damaged payload is dropped", b->name);
	if (r <= 0)
		return;
	payload[len] = '\0';
	/* of a payload that this guest had already, written once more */
	if (b->flags & FLAG_EXTENSION && b->had_one && !memcmp(b->epoch, epoch, 16)) {
		say("forkfs-agent: mailbox %s: a payload that was here before is dropped", b->name);
		return;
	}
	b->had_one = b->flags & FLAG_EXTENSION;
	memcpy(b->epoch, epoch, 16);
	b->port = guest_mailbox_number(payload, "ack_port");
	if (b->port > UINT16_MAX)
		b->port = 0;
	b->vsock_port = guest_mailbox_number(payload, "ack_vsock_port");
	hand_over(b, payload, len);
}

void mailboxes_look(void)
{
	for (unsigned i = 0; i < count; i++)
		if (!box[i].pid)
			look_at(&box[i]);
}
