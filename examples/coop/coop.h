/* What a VMM adds to itself to be branched by forkfs without ptrace: the four requests of docs/vmm.md, served
 * over HTTP on a unix socket. An example to copy from: no library, no dependency. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct coop_region {
	void *address;
	uint64_t size, offset; /* bytes; offset in the image, in which the regions lie one behind the other */
	uint64_t page_size;    /* 4096, or 2 MiB of hugetlb */
};

struct coop_vmm {
	const char *socket; /* path of the API socket, on tmpfs if you can */
	const struct coop_region *regions;
	unsigned n_regions;
	bool (*is_paused)(void);
	/* Return when the vCPUs are stopped and no device touches guest memory any more; when they run. */
	void (*set_paused)(bool on);
	/* Write the device state, not the memory, into a file; false: failed. After it nothing of the VMM
	 * touches guest memory until it runs again. */
	bool (*save)(int fd);
};

/* Serve for ever: a thread's whole life. Returns only when the socket cannot be made, with errno set. */
int coop_serve(const struct coop_vmm *vmm);
