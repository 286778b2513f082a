/* Drivers of the guest that Firecracker runs (fc-guest.S), for a drive and a vsock: polled, without interrupts. They judge what
 * they get, and say so on the serial port:
 *   disk N       N sectors were written. Each has its number; before one is written again what was there is read and judged
 *   vsock open   a connection to port PORT of the host; it is tried again and again. Numbers are sent that come back, one at a time
 *   vsock lost   an open connection is over
 *   vsock N      so many numbers came back
 *   mail EPOCH PAYLOAD   by_vsock: what was in the mailbox. No numbers are sent then: the connection is to the port that the
 *                payload names, for its ACK, which the page does not get
 *   vsock acknowledged   the host has closed that connection
 *   DISK MISMATCH, VSOCK MISMATCH   what came is not what should
 *
 * Ring 3 with port access, one vCPU, memory mapped as it is; no SSE, whose registers are the judge's. Called between two of its
 * steps: nothing here waits. */
#include <stdbool.h>
#include <stdint.h>

#include "machine.h"

#define ENTRIES 8
#define SECTORS 64
#define MAILBOX(field) (GPA_MAILBOX + (uintptr_t)MAILBOX_##field)
#define SAY_EACH 64
#define HOST 2
#define PORT 52          /* but for an ACK */
#define QUIET_POLLS 2000 /* after a refused connection, so that the host is not asked at each step */

enum {
	DEVICE = 0x08,
	FEATURES = 0x20,
	FEATURES_SEL = 0x24,
	QUEUE = 0x30,
	SIZE = 0x38,
	READY = 0x44,
	NOTIFY = 0x50,
	STATUS = 0x70,
	DESC = 0x80,
	AVAIL = 0x90,
	USED = 0xa0,
	CONFIG = 0x100
};
enum { BLOCK = 2, VSOCK = 19 };
enum { RX, TX, EVENTS };
enum { NEXT = 1, WRITE = 2 };

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};

struct queue {
	struct desc desc[ENTRIES] __attribute__((aligned(16)));
	struct {
		uint16_t flags, idx, ring[ENTRIES];
	} avail;
	struct {
		uint16_t flags, idx;
		struct {
			uint32_t id, len;
		} ring[ENTRIES];
	} used __attribute__((aligned(4)));
	uint16_t seen; /* of used */
};

struct packet {
	uint64_t src_cid, dst_cid;
	uint32_t src_port, dst_port, len;
	uint16_t type, op;
	uint32_t flags, buf_alloc, fwd_cnt;
	uint64_t data;
	uint8_t room[200];
} __attribute__((packed));
#define HEADER 44
#define TEXT_AT HEADER /* data and room are one: the text of an ACK */
enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

static volatile struct queue blk_queue, vsock_queue[3];
static volatile uint8_t *blk, *vsock;
static volatile struct {
	uint32_t type, reserved;
	uint64_t sector;
} request;
static volatile uint64_t sector[64];
static volatile uint8_t blk_status;
static volatile struct packet rx[ENTRIES], tx;
static volatile uint32_t event[ENTRIES];
static uint64_t written, echoed, cid;
static bool began, blk_busy, blk_reading, tx_busy, is_open, asked;
static uint32_t port = 1024, received, quiet;
/* The mailbox is ours; where its ACK goes, 0: nowhere, and the ACK. */
bool by_vsock;
static uint32_t ack_port, ack_len;
static char ack_text[140];

/* ---- words ---- */

static void put(char c)
{
	__asm__ volatile("outb %0, %1" : : "a"(c), "Nd"((uint16_t)SERIAL_PORT));
}

static void say(const char *text)
{
	while (*text)
		put(*text++);
}

static void say_number(const char *text, uint64_t n)
{
	say(text);
	for (int shift = 60; shift >= 0; shift -= 4)
		put("0123456789abcdef"[n >> shift & 15]);
	put('\n');
}

/* ---- virtio over MMIO ---- */

static uint32_t get(volatile uint8_t *dev, unsigned reg)
{
	return *(volatile uint32_t *)(dev + reg);
}

static void set(volatile uint8_t *dev, unsigned reg, uint32_t value)
{
	*(volatile uint32_t *)(dev + reg) = value;
}

static void set_address(volatile uint8_t *dev, unsigned reg, volatile void *p)
{
	set(dev, reg, (uint32_t)(uintptr_t)p);
	set(dev, reg + 4, (uint32_t)((uintptr_t)p >> 32));
}

static void start(volatile uint8_t *dev, volatile struct queue *q, unsigned n)
{
	set(dev, STATUS, 0);
	set(dev, STATUS, 1);
	set(dev, STATUS, 3);
	set(dev, FEATURES_SEL, 1);
	set(dev, FEATURES, 1); /* VIRTIO_F_VERSION_1 */
	set(dev, STATUS, 11);
	for (unsigned i = 0; i < n; i++) {
		set(dev, QUEUE, i);
		set(dev, SIZE, ENTRIES);
		set_address(dev, DESC, q[i].desc);
		set_address(dev, AVAIL, &q[i].avail);
		set_address(dev, USED, &q[i].used);
		set(dev, READY, 1);
	}
	set(dev, STATUS, 15);
}

static void describe(volatile struct queue *q, unsigned i, volatile void *p, uint32_t len, uint16_t flags)
{
	q->desc[i].addr = (uintptr_t)p;
	q->desc[i].len = len;
	q->desc[i].flags = flags;
	q->desc[i].next = (uint16_t)(i + 1);
}

static void offer(volatile struct queue *q, unsigned head)
{
	q->avail.ring[q->avail.idx % ENTRIES] = (uint16_t)head;
	__sync_synchronize();
	q->avail.idx++;
	__sync_synchronize();
}

/* The head of a chain that came back; -1: none. */
static int taken(volatile struct queue *q)
{
	if (q->seen == q->used.idx)
		return -1;
	__sync_synchronize();
	return (int)q->used.ring[q->seen++ % ENTRIES].id;
}

/* ---- the drive ---- */

static void transfer(bool reading)
{
	request.type = !reading;
	request.sector = written % SECTORS;
	blk_status = 0xff;
	describe(&blk_queue, 0, &request, 16, NEXT);
	describe(&blk_queue, 1, sector, 512, (uint16_t)(NEXT | (reading ? WRITE : 0)));
	describe(&blk_queue, 2, &blk_status, 1, WRITE);
	blk_reading = reading;
	blk_busy = true;
	offer(&blk_queue, 0);
	set(blk, NOTIFY, 0);
}

static void poll_drive(void)
{
	uint64_t want =
		written < SECTORS ? 0 : written - SECTORS + 1; /* one more than its number; 0 at first */

	if (!blk_busy) {
		transfer(true);
		return;
	}
	if (taken(&blk_queue) < 0)
		return;
	blk_busy = false;
	if (blk_status)
		say_number("DISK MISMATCH status ", blk_status);
	if (!blk_reading) {
		written++;
		if (written % SAY_EACH == 0)
			say_number("disk ", written);
		return;
	}
	for (unsigned i = 0; i < 64; i++)
		if (sector[i] != want) {
			say_number("DISK MISMATCH at ", written);
			say_number("DISK MISMATCH is ", sector[i]);
			break;
		}
	for (unsigned i = 0; i < 64; i++)
		sector[i] = written + 1;
	transfer(false);
}

/* ---- the vsock ---- */

static void send(uint32_t from, uint32_t to, uint16_t op, uint32_t len)
{
	tx.src_cid = cid;
	tx.dst_cid = HOST;
	tx.src_port = from;
	tx.dst_port = to;
	tx.len = len;
	tx.type = 1;
	tx.op = op;
	tx.flags = 0;
	tx.buf_alloc = 65536;
	tx.fwd_cnt = received;
	if (!by_vsock)
		tx.data = echoed + 1;
	describe(&vsock_queue[TX], 0, &tx, HEADER + len, 0);
	tx_busy = true;
	offer(&vsock_queue[TX], 0);
	set(vsock, NOTIFY, TX);
}

static void lose(bool heard)
{
	if (is_open && by_vsock && heard) {
		say("vsock acknowledged\n");
		ack_port = 0;
	} else if (is_open) {
		say("vsock lost\n");
	}
	is_open = asked = false;
	port++;
}

static uint32_t host_port(void)
{
	return by_vsock ? ack_port : PORT;
}

static void send_ack(void)
{
	volatile char *to = (volatile char *)&tx + TEXT_AT;

	for (unsigned i = 0; i < ack_len; i++)
		to[i] = ack_text[i];
	send(port, ack_port, RW, ack_len);
}

static void take_packet(volatile struct packet *p)
{
	if (p->dst_port != port || p->src_port != host_port()) {
		/* of a connection that is over */
		if (p->op != RST)
			send(p->dst_port, p->src_port, RST, 0);
		return;
	}
	switch (p->op) {
	case RESPONSE:
		is_open = true;
		received = 0;
		say("vsock open\n");
		if (by_vsock)
			send_ack();
		else
			send(port, PORT, RW, 8);
		break;
	case RW:
		received += p->len;
		if (!is_open || p->len != 8 || p->data != echoed + 1)
			say_number("VSOCK MISMATCH ", p->data);
		echoed++;
		if (echoed % SAY_EACH == 0)
			say_number("vsock ", echoed);
		send(port, PORT, RW, 8);
		break;
	case CREDIT_REQUEST:
		send(port, host_port(), CREDIT_UPDATE, 0);
		break;
	case SHUTDOWN:
		send(port, host_port(), RST, 0);
		lose(true);
		break;
	case RST:
		quiet = QUIET_POLLS;
		lose(true);
		break;
	}
}

static void poll_vsock(void)
{
	int i = taken(&vsock_queue[EVENTS]);

	/* a reset of the transport: whatever was open is over. What was on its way may have to be asked for again */
	if (i >= 0) {
		lose(false);
		cid = get(vsock, CONFIG);
		offer(&vsock_queue[EVENTS], (unsigned)i);
		set(vsock, NOTIFY, EVENTS);
		set(vsock, NOTIFY, TX);
	}
	if (tx_busy && taken(&vsock_queue[TX]) < 0)
		return;
	tx_busy = false;
	i = taken(&vsock_queue[RX]);
	if (i >= 0) {
		take_packet(&rx[i]);
		offer(&vsock_queue[RX], (unsigned)i);
		set(vsock, NOTIFY, RX);
	} else if (!asked && quiet) {
		quiet--;
	} else if (!asked && host_port()) {
		asked = true;
		send(port, host_port(), REQUEST, 0);
	}
}

/* ---- the mailbox ---- */

static void append(const char *text, unsigned len)
{
	while (len-- && ack_len < sizeof(ack_text))
		ack_text[ack_len++] = *text++;
}

/* The number behind a key that is in the payload once: 0, there is none. */
static uint32_t number_of(const char *key)
{
	const char *payload = (const char *)MAILBOX(PAYLOAD);
	uint32_t len = *(volatile uint32_t *)MAILBOX(LENGTH), n = 0;

	for (unsigned at = 0, i; at < len; at++) {
		for (i = 0; key[i] && at + i < len && payload[at + i] == key[i]; i++)
			;
		if (key[i])
			continue;
		for (i += at; i < len && payload[i] >= '0' && payload[i] <= '9'; i++)
			n = n * 10 + (uint32_t)(payload[i] - '0');
		return n;
	}
	return 0;
}

static void poll_mailbox(void)
{
	static const char digits[] = "0123456789abcdef";
	volatile uint32_t *seq = (volatile uint32_t *)MAILBOX(SEQ);
	const char *name = (const char *)MAILBOX(NAME);
	unsigned len = 0;
	char hex[32];

	if (!*seq)
		return;
	for (unsigned i = 0; i < sizeof(hex); i++)
		hex[i] = digits[*(uint8_t *)MAILBOX(EPOCH + i / 2) >> (i % 2 ? 0 : 4) & 15];
	while (name[len])
		len++;
	say("mail ");
	for (unsigned i = 0; i < sizeof(hex); i++)
		put(hex[i]);
	put(' ');
	for (uint32_t i = 0; i < *(volatile uint32_t *)MAILBOX(LENGTH); i++)
		put(*(char *)MAILBOX(PAYLOAD + i));
	put('\n');
	ack_len = 0;
	append("mailbox=", 8);
	append(name, len);
	append(" epoch=", 7);
	append(hex, sizeof(hex));
	append(" stage=applied\n", 15);
	ack_port = number_of("\"ack_vsock_port\":");
	*seq = 0;
}

/* ---- all of them ---- */

static void begin(void)
{
	/* Firecracker's places for devices: from the third GiB on, until 1.12 a quarter higher */
	for (unsigned slot = 0; slot < 32; slot++) {
		volatile uint8_t *dev = (volatile uint8_t *)(0xc0000000 + (uintptr_t)(slot & 16) * 0x1000000 +
							     (uintptr_t)(slot & 15) * 0x1000);

		if (get(dev, 0) != 0x74726976)
			continue;
		if (get(dev, DEVICE) == BLOCK && !blk) {
			blk = dev;
			start(blk, &blk_queue, 1);
		} else if (get(dev, DEVICE) == VSOCK) {
			vsock = dev;
			start(vsock, vsock_queue, 3);
			cid = get(vsock, CONFIG);
			for (unsigned i = 0; i < ENTRIES; i++) {
				describe(&vsock_queue[RX], i, &rx[i], sizeof(rx[i]), WRITE);
				describe(&vsock_queue[EVENTS], i, &event[i], 4, WRITE);
				offer(&vsock_queue[RX], i);
				offer(&vsock_queue[EVENTS], i);
			}
			set(vsock, NOTIFY, RX);
		}
	}
}

void virtio_poll(void);
void virtio_poll(void)
{
	if (!began) {
		began = true;
		begin();
	}
	if (blk)
		poll_drive();
	if (by_vsock)
		poll_mailbox();
	if (vsock)
		poll_vsock();
}
