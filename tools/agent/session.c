/* The beginning of a session, and what a guest has to do when it was restored: its clock stands, its random numbers are
 * those of its siblings, its address is its parent's. Each step is told when it is done. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define CLOCK_IS_RIGHT 10000000ll /* ns: below that it is left alone */

static int set_clock(uint64_t wall_ns)
{
	struct timespec t = {(time_t)(wall_ns / 1000000000ull), (long)(wall_ns % 1000000000ull)};
	int64_t off = (int64_t)(wall_ns - now_ns(CLOCK_REALTIME));

	if (!wall_ns || (off < CLOCK_IS_RIGHT && off > -CLOCK_IS_RIGHT))
		return 0;
	return clock_settime(CLOCK_REALTIME, &t);
}

/* The kernel's generator is given the host's bytes and makes its key anew at once; siblings were equal until here. */
static int add_entropy(const uint8_t bytes[32])
{
	struct {
		struct rand_pool_info head;
		uint8_t bytes[32];
	} pool = {.head = {.entropy_count = 256, .buf_size = 32}};
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC), r;

	if (fd < 0)
		return -1;
	memcpy(pool.bytes, bytes, 32);
	r = ioctl(fd, RNDADDENTROPY, &pool);
	if (r == 0)
		r = ioctl(fd, RNDRESEEDCRNG);
	close(fd);
	explicit_bzero(&pool, sizeof(pool));
	return r;
}

/* ---- the address ---- */

static void set_inet(struct sockaddr *out, const void *ipv4)
{
	struct sockaddr_in in = {.sin_family = AF_INET};

	memcpy(&in.sin_addr, ipv4, 4);
	memcpy(out, &in, sizeof(in));
}

static int set_mac(int fd, struct ifreq *r, const uint8_t mac[6])
{
	static const uint8_t none[6];

	if (!memcmp(mac, none, 6))
		return 0;
	r->ifr_hwaddr.sa_family = ARPHRD_ETHER;
	memcpy(r->ifr_hwaddr.sa_data, mac, 6);
	return ioctl(fd, SIOCSIFHWADDR, r);
}

static int set_gateway(int fd, const uint8_t gateway[4], char *interface)
{
	struct rtentry rt = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = interface};
	static const uint8_t any[4];

	if (!memcmp(gateway, any, 4))
		return 0;
	set_inet(&rt.rt_gateway, gateway);
	set_inet(&rt.rt_dst, any);
	set_inet(&rt.rt_genmask, any);
	return ioctl(fd, SIOCADDRT, &rt);
}

/* Down, its MAC, its address, up: what was known of neighbours under the old one is gone with it. */
static int set_network(const struct agent_hello *h)
{
	uint32_t mask = htonl(h->prefix ? ~0u << (32 - h->prefix) : 0);
	struct ifreq r = {0};
	char interface[16];
	int fd, bad;

	if (!h->interface[0])
		return 0;
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	memcpy(r.ifr_name, h->interface, sizeof(interface));
	memcpy(interface, h->interface, sizeof(interface));
	bad = ioctl(fd, SIOCGIFFLAGS, &r) < 0;
	r.ifr_flags &= (short)~IFF_UP;
	bad = bad || ioctl(fd, SIOCSIFFLAGS, &r) < 0 || set_mac(fd, &r, h->mac) < 0;
	set_inet(&r.ifr_addr, h->ipv4);
	bad = bad || ioctl(fd, SIOCSIFADDR, &r) < 0;
	set_inet(&r.ifr_netmask, &mask);
	bad = bad || ioctl(fd, SIOCSIFNETMASK, &r) < 0 || ioctl(fd, SIOCGIFFLAGS, &r) < 0;
	r.ifr_flags |= IFF_UP;
	bad = bad || ioctl(fd, SIOCSIFFLAGS, &r) < 0 || set_gateway(fd, h->gateway, interface) < 0;
	close(fd);
	return bad ? -1 : 0;
}

/* ---- HELLO ---- */

static void restored(struct conn *c, const struct agent_hello *h, struct agent_ack *a)
{
	uint64_t t0 = now_ns(CLOCK_MONOTONIC), t1;

	a->failed |= set_clock(h->wall_ns) < 0 ? 1 : 0;
	t1 = now_ns(CLOCK_MONOTONIC);
	a->clock_ns = t1 - t0;
	a->failed |= add_entropy(h->entropy) < 0 ? 2 : 0;
	t0 = now_ns(CLOCK_MONOTONIC);
	a->entropy_ns = t0 - t1;
	a->failed |= set_network(h) < 0 ? 4 : 0;
	a->network_ns = now_ns(CLOCK_MONOTONIC) - t0;
}

void session_hello(struct conn *c, const struct agent_frame *f)
{
	static uint8_t epoch[16];
	static bool known;
	struct agent_hello h;
	struct agent_ack a = {0};
	uint8_t begin[33], ack[64];
	uint64_t t0 = now_ns(CLOCK_MONOTONIC);

	/* said again: the answer is under way */
	if (!agent_hello_parse(f, &h) || (c->session && !memcmp(c->nonce, h.nonce, 16)))
		return;
	process_hangup(c, true, 0);
	agent_out_clear(&c->out);
	c->session = true;
	memcpy(c->nonce, h.nonce, 16);
	memcpy(a.nonce, h.nonce, 16);
	memcpy(begin, h.nonce, 16);
	memcpy(begin + 16, h.epoch, 16);
	begin[32] = !known ? AGENT_FIRST : memcmp(epoch, h.epoch, 16) ? AGENT_RESTORED : AGENT_SAME;
	/* remembered before anything is done: a guest that is branched from here on is at this epoch */
	memcpy(epoch, h.epoch, 16);
	known = true;
	conn_send(c, AGENT_BEGIN, 0, begin, sizeof(begin));
	if (begin[32] != AGENT_SAME)
		channels_rebind(c);
	a.rebind_ns = now_ns(CLOCK_MONOTONIC) - t0;
	conn_send(c, AGENT_REBOUND, 0, h.nonce, 16);
	if (begin[32] != AGENT_SAME)
		restored(c, &h, &a);
	conn_send(c, AGENT_ACK, 0, ack, agent_ack_make(&a, ack));
	conn_send(c, AGENT_OUTPUT, 0, h.nonce, 16);
	explicit_bzero(&h, sizeof(h));
}
