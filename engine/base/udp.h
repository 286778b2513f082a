/* Ports of UDP that somebody listens at. */
#pragma once

#include <stdint.h>
#include <sys/socket.h>

#include "base/error.h"

/* An IPv4 or IPv6 address as text. 0 or -EINVAL. */
int ffs_ip_parse(const char *text, struct sockaddr_storage *out, socklen_t *len);
/* A non-blocking socket that is bound to an address and a port (0: any that is free): its descriptor, the caller's, and
 * *port; -EINVAL (no address), -EADDRINUSE (still held at `held_until_ns`), … with the sentence. */
int ffs_udp_listen(
	const char *address, unsigned port, uint64_t held_until_ns, unsigned *bound, struct ffs_error *err);
