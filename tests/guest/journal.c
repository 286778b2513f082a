/* `journal`: a guest whose disk and memory can be held against each other.
 *
 * Mounts the ext4 file system on /dev/vda and appends records to its file `log`, each with its number and a
 * CRC-32, each made durable by fdatasync before the next; every 16th step also makes, renames and removes a
 * file, so that there is always metadata on its way. A page of memory says how far it is: `begun` is the
 * number of the record that is being written, `done` of the last one that is durable. So at every instant the
 * disk, its journal replayed, holds all records up to `done` and none beyond `begun`. Says "journal NUMBER"
 * now and then. One thread.
 *
 *   record (512 bytes)   u64 number, u32 CRC-32 of the whole with this field zero, u32 0, filler made from the
 *                        number
 *   the page             16 bytes of magic, u64 begun, u64 done
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECORD 512

struct record {
	uint64_t number;
	uint32_t crc, zero;
	uint8_t filler[RECORD - 16];
};

struct page {
	uint8_t magic[16];
	volatile uint64_t begun, done;
};

/* IEEE 802.3, as zlib's crc32() */
static uint32_t crc32_of(const void *data, size_t len)
{
	const uint8_t *p = data;
	uint32_t crc = ~0u;

	for (size_t i = 0; i < len; i++) {
		crc ^= p[i];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
	}
	return ~crc;
}

static void fill(struct record *r, uint64_t number)
{
	uint64_t x = number * 0x9e3779b97f4a7c15ull | 1;

	*r = (struct record){.number = number};
	for (size_t i = 0; i < sizeof(r->filler); i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		r->filler[i] = (uint8_t)x;
	}
	r->crc = crc32_of(r, sizeof(*r));
}

static void die(const char *what)
{
	guest_say("journal: %s: %m", what);
	exit(1);
}

static void churn(uint64_t number)
{
	char name[64], other[64];

	snprintf(name, sizeof(name), "/mnt/new-%llu", (unsigned long long)number);
	snprintf(other, sizeof(other), "/mnt/old-%llu", (unsigned long long)number % 7);
	int fd = open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || write(fd, name, sizeof(name)) != sizeof(name) || close(fd) < 0 ||
		rename(name, other) < 0)
		die(name);
	if (number % 3 == 0 && unlink(other) < 0)
		die(other);
}

int journal_main(int argc, char **argv)
{
	struct page *page = (struct page *)guest_memory(4096);
	struct record r;

	/* put together here: the bytes must be nowhere else in memory, so not in the program either */
	for (unsigned i = 0; i < sizeof(page->magic); i++)
		page->magic[i] = (uint8_t)("gpsl!ebubcbtf!1"[i % 15] - 1 + (i == 15));
	mkdir("/mnt", 0755);
	if (mount("/dev/vda", "/mnt", "ext4", MS_NOATIME, NULL) < 0)
		die("mount /dev/vda");
	int fd = open("/mnt/log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

	if (fd < 0)
		die("/mnt/log");
	for (uint64_t n = 1;; n++) {
		fill(&r, n);
		page->begun = n;
		if (write(fd, &r, sizeof(r)) != sizeof(r) || fdatasync(fd) < 0)
			die("/mnt/log");
		page->done = n;
		if (n % 16 == 0)
			churn(n / 16);
		if (n % 64 == 0)
			guest_say("journal %llu", (unsigned long long)n);
	}
}
