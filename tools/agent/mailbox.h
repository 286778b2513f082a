/* The guest's side of mailboxes, for programs in a VM: publish one, see what the host has written into it.
 * One header, the C library and the kernel's headers, and nothing else. The frame is described in docs/mailbox.md.
 *
 *     struct guest_mailbox m;
 *     if (guest_mailbox_publish(&m, "config", "my-token") < 0) …
 *     for (;;) {
 *         if (guest_mailbox_take(&m, payload, &len, epoch, &flags) > 0) {
 *             …;
 *             if (flags & GUEST_MAILBOX_WANTS_ACK)
 *                 guest_mailbox_ack(&m, epoch);
 *         }
 *         sleep a little, or until guest_mailbox_watch() can be read;
 *     }
 *
 * One thread a mailbox. Functions return -1 and errno, or what they say. Nothing but the published page ever
 * holds a whole frame: the magic is put together byte by byte in place, and the program's own image has it
 * nowhere. */
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <linux/vm_sockets.h> /* after sys/socket.h */

#define GUEST_MAILBOX_PAGE 4096u
#define GUEST_MAILBOX_PAYLOAD 3832u
#define GUEST_MAILBOX_WANTS_ACK 2u
#define GUEST_MAILBOX_EPOCH_AT 240u

struct guest_mailbox {
	uint8_t *page;
};

static inline uint32_t guest_mailbox_u32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* CRC-32C, continuing `crc` (0 to begin). */
static inline uint32_t guest_mailbox_crc(uint32_t crc, const uint8_t *p, size_t len)
{
	crc = ~crc;
	for (size_t i = 0; i < len; i++) {
		crc ^= p[i];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	return ~crc;
}

/* Publish a mailbox of 1 to 64 bytes of A-Z a-z 0-9 . _ : - with a token of 1 to 128 bytes. The page is
 * locked and not inherited by child processes: a copy of it would make the mailbox ambiguous. */
static inline int guest_mailbox_publish(struct guest_mailbox *m, const char *name, const char *token)
{
	/* "HYPEMAN_FORK_MAILBOX_V1", each byte one more than it is */
	static const char shifted[] = "IZQFNBO`GPSL`NBJMCPY`W2";
	size_t name_len = strlen(name), token_len = strlen(token), magic = sizeof(shifted);
	volatile uint8_t *page;

	if (!name_len || name_len > 64 || !token_len || token_len > 128) {
		errno = EINVAL;
		return -1;
	}
	m->page = mmap(NULL, GUEST_MAILBOX_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (m->page == MAP_FAILED)
		return -1;
	if (madvise(m->page, GUEST_MAILBOX_PAGE, MADV_DONTFORK) < 0 ||
		mlock(m->page, GUEST_MAILBOX_PAGE) < 0) {
		munmap(m->page, GUEST_MAILBOX_PAGE);
		return -1;
	}
	page = m->page;
	for (size_t i = 0; i < name_len; i++)
		page[magic + i] = (uint8_t)name[i];
	for (size_t i = 0; i < token_len; i++)
		page[magic + name_len + 1 + i] = (uint8_t)token[i];
	/* the magic last: from here on it is a frame */
	for (size_t i = magic - 1; i-- > 0;)
		page[i] = (uint8_t)(shifted[i] - 1);
	return 0;
}

/* Take the page back; what is left of it is no frame. */
static inline void guest_mailbox_withdraw(struct guest_mailbox *m)
{
	explicit_bzero(m->page, GUEST_MAILBOX_PAGE);
	munmap(m->page, GUEST_MAILBOX_PAGE);
}

/* 1: a payload was there, copied to `payload` (GUEST_MAILBOX_PAYLOAD bytes of room), and the mailbox is free
 * again; 0: none; -1 with EBADMSG: what is there is damaged (it is dropped). Cheap: a load, when there is
 * none. */
static inline int guest_mailbox_take(
	struct guest_mailbox *m, void *payload, size_t *len, uint8_t epoch[16], uint32_t *flags)
{
	/* 232 to 239 are ours, and written as 0: an ACK that is given at this moment for the payload before counts in no sum */
	static const uint8_t no_ack[8];
	uint32_t *seq = (uint32_t *)(m->page + 256), crc;
	uint32_t length;
	int good;

	if (!__atomic_load_n(seq, __ATOMIC_ACQUIRE))
		return 0;
	length = guest_mailbox_u32(m->page + 260);
	*flags = guest_mailbox_u32(m->page + 228);
	good = length <= GUEST_MAILBOX_PAYLOAD;
	if (good && *flags & 1) {
		crc = guest_mailbox_crc(0, m->page + 228, 4);
		crc = guest_mailbox_crc(crc, no_ack, 8);
		crc = guest_mailbox_crc(crc, m->page + GUEST_MAILBOX_EPOCH_AT, 16);
		crc = guest_mailbox_crc(crc, m->page + 260, 4);
		crc = guest_mailbox_crc(crc, m->page + 264, length);
		good = crc == guest_mailbox_u32(m->page + 224);
	}
	if (good) {
		memcpy(payload, m->page + 264, length);
		memcpy(epoch, m->page + GUEST_MAILBOX_EPOCH_AT, 16);
		*len = length;
	}
	__atomic_store_n(seq, 0, __ATOMIC_RELEASE);
	if (good)
		return 1;
	errno = EBADMSG;
	return -1;
}

/* What identifies a fork is in its epoch, what identifies the mailbox in its name; the marker begins with the
 * 24 bytes of the magic. */
static inline const char *guest_mailbox_name(const struct guest_mailbox *m)
{
	return (const char *)m->page + 24;
}

/* Acknowledge the payload that came with this epoch, in the page itself: the host looks there while it waits
 * (GUEST_MAILBOX_WANTS_ACK in the flags). */
static inline void guest_mailbox_ack(struct guest_mailbox *m, const uint8_t epoch[16])
{
	uint32_t crc = guest_mailbox_crc(0, epoch, 16);

	crc = guest_mailbox_crc(crc, (const uint8_t *)guest_mailbox_name(m), strlen(guest_mailbox_name(m)));
	__atomic_store_n((uint32_t *)(m->page + 236), crc, __ATOMIC_RELAXED);
	__atomic_store_n((uint32_t *)(m->page + 232), 1, __ATOMIC_RELEASE);
}

/* The number that a payload has under a key, as "ack_port"; 0: it has none that fits. `text` ends with a NUL. The host has
 * checked that it is an object; a string that is followed by a colon is a key. */
static inline uint32_t guest_mailbox_number(const char *text, const char *key)
{
	size_t key_len = strlen(key);
	unsigned depth = 0;

	for (const char *p = text; *p; p++) {
		const char *begin = p + 1, *value;

		if (*p == '{' || *p == '[')
			depth++;
		if (*p == '}' || *p == ']')
			depth--;
		if (*p != '"')
			continue;
		for (p++; *p && *p != '"'; p++)
			if (*p == '\\' && p[1])
				p++;
		if (!*p)
			return 0;
		value = p + 1 + strspn(p + 1, " \t\r\n");
		if (depth == 1 && *value == ':' && (size_t)(p - begin) == key_len &&
			!memcmp(begin, key, key_len)) {
			unsigned long long n = strtoull(value + 1, NULL, 10);

			return n <= UINT32_MAX ? (uint32_t)n : 0;
		}
	}
	return 0;
}

/* The same as a text, for the port that the payload names, "ack_port" by UDP, "ack_vsock_port" by vsock: "stage=applied
 * mailbox=NAME epoch=HEX\n" and a NUL, of at most 140 bytes. Its length. */
static inline size_t guest_mailbox_ack_text(
	const struct guest_mailbox *m, const uint8_t epoch[16], char out[140])
{
	static const char stage[] = "stage=applied mailbox=", word[] = " epoch=",
			  digit[] = "0123456789abcdef";
	size_t len = sizeof(stage) - 1, name = strlen(guest_mailbox_name(m));

	memcpy(out, stage, len);
	memcpy(out + len, guest_mailbox_name(m), name);
	len += name;
	memcpy(out + len, word, sizeof(word) - 1);
	len += sizeof(word) - 1;
	for (unsigned i = 0; i < 32; i++)
		out[len++] = digit[epoch[i / 2] >> (i % 2 ? 0 : 4) & 15];
	out[len++] = '\n';
	out[len] = '\0';
	return len;
}

/* Once: a connection to that port of the host, the text, and then the host's end of it, which comes when it was read. */
static inline int guest_mailbox_vsock_once(uint32_t port, const char *text, size_t len)
{
	struct sockaddr_vm a = {.svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_HOST};
	struct timeval wait = {.tv_sec = 2};
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0), r = -1, why;
	char end;

	if (fd < 0)
		return -1;
	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait)) == 0 &&
		connect(fd, (struct sockaddr *)&a, sizeof(a)) == 0 &&
		send(fd, text, len, MSG_NOSIGNAL) == (ssize_t)len && recv(fd, &end, 1, 0) == 0)
		r = 0;
	why = errno;
	close(fd);
	errno = why;
	return r;
}

/* Send that text to the port that a payload has as "ack_vsock_port": 0 when the host has read it; -1 and errno: ENODEV,
 * EAFNOSUPPORT … where there is no vsock, ECONNRESET when the host does not listen (any more), ETIMEDOUT, EAGAIN. Waits for
 * the host, in tries of at most 2 s each way: a restore resets the transport of vsock, and what was begun just then with it. */
#define GUEST_MAILBOX_VSOCK_TRIES 20
static inline int guest_mailbox_vsock(uint32_t port, const char *text, size_t len)
{
	int r = -1;

	for (unsigned i = 0; r < 0 && i < GUEST_MAILBOX_VSOCK_TRIES; i++) {
		if (i)
			(void)poll(NULL, 0, 10);
		r = guest_mailbox_vsock_once(port, text, len);
		if (r < 0 && errno != ECONNRESET && errno != EPIPE && errno != ENOTCONN)
			break;
	}
	return r;
}

/* Where the VM has a generation id (QEMU's vmgenid) the kernel's driver notices a restore at once, makes its random numbers
 * anew, and says so in its log: a descriptor that can be read then, from the end of the log on. -1 and errno: no log. Without
 * the device it stays silent, and the page is all that tells. */
static inline int guest_mailbox_watch(void)
{
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (fd >= 0 && lseek(fd, 0, SEEK_END) < 0) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* Take what the log says: 1 when the VM was restored since the last call, or lines of it were lost and it may have been. Lines
 * are "PRIORITY,NUMBER,TIME,FLAGS;TEXT"; only the kernel's own have a priority below 8, no program can write those. */
static inline int guest_mailbox_restored(int fd)
{
	static const char told[] = "crng reseeded due to virtual machine fork";
	char line[1024];
	int restored = 0;
	ssize_t n;

	while ((n = read(fd, line, sizeof(line) - 1)) > 0 || (n < 0 && errno == EPIPE)) {
		line[n > 0 ? n : 0] = '\0';
		if (n < 0 || (strtoul(line, NULL, 10) < 8 && strstr(line, told)))
			restored = 1;
	}
	return restored;
}
