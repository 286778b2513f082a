/* Connecting to a VMM's control socket by its name. Any thread, the watchdog's processes too: no locks, no
 * allocation. */
#pragma once

#include <stdint.h>
#include <sys/socket.h>
#include <sys/un.h>

/* A connected, non-blocking, close-on-exec stream socket in *sock: 0, or -errno (-EAGAIN: the listener's
 * queue stayed full until the deadline). */
int ffs_dial_addr(const struct sockaddr_un *addr, socklen_t len, uint64_t deadline_ns, int *sock);
/* By file name, which may be longer than sun_path. */
int ffs_dial_path(const char *path, uint64_t deadline_ns, int *sock);
