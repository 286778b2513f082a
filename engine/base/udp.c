/* Owns nothing: addresses as people write them, and sockets bound to them. Any thread; waits for nothing but a port that is held. */
#include "base/udp.h"

#include <arpa/inet.h>
#include <errno.h>

#include "base/cleanup.h"
#include "base/util.h"

int ffs_ip_parse(const char *text, struct sockaddr_storage *out, socklen_t *len)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)out;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;

	*out = (struct sockaddr_storage){0};
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		*len = sizeof(*v4);
		return 0;
	}
	if (inet_pton(AF_INET6, text, &v6->sin6_addr) != 1)
		return -EINVAL;
	v6->sin6_family = AF_INET6;
	*len = sizeof(*v6);
	return 0;
}

/* The same place in both. */
static in_port_t *port_in(struct sockaddr_storage *name)
{
	return name->ss_family == AF_INET ? &((struct sockaddr_in *)name)->sin_port
					  : &((struct sockaddr_in6 *)name)->sin6_port;
}

int ffs_udp_listen(
	const char *address, unsigned port, uint64_t held_until_ns, unsigned *bound, struct ffs_error *err)
{
	_cleanup_close_ int sock = -1;
	struct sockaddr_storage name;
	socklen_t len;
	int r;

	if (ffs_ip_parse(address, &name, &len) < 0)
		return ffs_error_set(err, EINVAL, "'%.60s' is no IP address", address);
	*port_in(&name) = htons((uint16_t)port);
	sock = socket(name.ss_family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	do
		r = sock < 0 ? -1 : bind(sock, (struct sockaddr *)&name, len);
	while (r < 0 && errno == EADDRINUSE && ffs_held_again(held_until_ns));
	if (r < 0 || getsockname(sock, (struct sockaddr *)&name, &len) < 0)
		return port ? ffs_error_errno(err, errno, "port %u of %s for acknowledgements", port, address)
			    : ffs_error_errno(err, errno, "a port of %s for acknowledgements", address);
	*bound = ntohs(*port_in(&name));
	return ffs_steal_fd(&sock);
}
