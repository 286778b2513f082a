/* Reads what a VMM says about its memory, one that cooperates or one that is restored with the Uffd backend,
 * and compares it with what the kernel says. Owns nothing. Any thread.
 *
 * The message is forkd's, which follows Firecracker's for its Uffd backend (docs/snapshotting,
 * GuestRegionUffdMapping): [{"base_host_virt_addr":A,"size":S,"offset":O,"page_size":P,"page_size_kib":P}],
 * all in bytes in spite of that name. The VMM is the untrusted party: every number is checked. */
#include "vmm/api.h"

#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "guest/maps.h"

#define MESSAGE_MAX (16u << 10) /* 64 regions are 10 KiB */
#define MAX_FDS 8

#define ADDRESS_END (1ull << 47) /* of user space on x86-64 with four levels */

static int number(struct json_object *o, const char *key, uint64_t *out)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v))
		return -ENOENT;
	/* beyond 2^63 it would be silently another number */
	if (!json_object_is_type(v, json_type_int) || json_object_get_int64(v) < 0 ||
		json_object_get_int64(v) == INT64_MAX)
		return -EPROTO;
	*out = (uint64_t)json_object_get_int64(v);
	return 0;
}

static int parse_region(struct json_object *o, unsigned i, struct ffs_region *r, struct ffs_error *err)
{
	uint64_t end;

	if (!json_object_is_type(o, json_type_object) || number(o, "base_host_virt_addr", &r->hva) < 0 ||
		number(o, "size", &r->size) < 0 || number(o, "offset", &r->offset) < 0)
		return ffs_error_set(err, EPROTO,
			"region %u has no base_host_virt_addr, size and offset that are whole numbers", i);
	int e = number(o, "page_size", &r->page_size);

	if (e == -ENOENT)
		e = number(o, "page_size_kib", &r->page_size);
	if (e < 0 || (r->page_size != 4096 && r->page_size != 2u << 20))
		return ffs_error_set(err, e == -EPROTO ? EPROTO : ENOTSUP,
			"region %u has no page_size of 4096 or 2097152 bytes", i);
	if (!r->size || (r->size | r->hva | r->offset) % r->page_size ||
		ffs_add_overflow(r->hva, r->size, &end) || end > ADDRESS_END || !r->hva)
		return ffs_error_set(err, EPROTO,
			"region %u (%" PRIu64 " bytes at 0x%" PRIx64 ", offset %" PRIu64
			") is no range of whole pages",
			i, r->size, r->hva, r->offset);
	snprintf(r->name, sizeof(r->name), "ram%u", i);
	return 0;
}

static int by_offset(const void *a, const void *b)
{
	const struct ffs_region *x = a, *y = b;

	return (x->offset > y->offset) - (x->offset < y->offset);
}

static int check_regions(struct ffs_geometry *geo, struct ffs_error *err)
{
	qsort(geo->regions, geo->n_regions, sizeof(geo->regions[0]), by_offset);
	for (unsigned i = 0; i < geo->n_regions; i++) {
		struct ffs_region *r = &geo->regions[i];

		if (r->offset != geo->memory_size)
			return ffs_error_set(err, EPROTO,
				"the regions leave or share bytes of the image at offset %" PRIu64,
				geo->memory_size);
		geo->memory_size += r->size; /* at most 64 times 2^47 */
		/* where the guest sees it, the message does not say: an image has the order of its offsets */
		geo->ranges[i] =
			(struct ffs_gpa_range){.gpa = r->offset, .size = r->size, .offset = r->offset};
		for (unsigned j = 0; j < i; j++)
			if (r->hva < geo->regions[j].hva + geo->regions[j].size &&
				geo->regions[j].hva < r->hva + r->size)
				return ffs_error_set(
					err, EPROTO, "two regions share the address 0x%" PRIx64, r->hva);
	}
	geo->n_ranges = geo->n_regions;
	return 0;
}

int ffs_coop_parse(const char *text, size_t n, struct ffs_geometry *geo, struct ffs_error *err)
{
	struct json_tokener *tok = json_tokener_new_ex(8);
	struct json_object *list = NULL;
	int r = 0;

	memset(geo, 0, sizeof(*geo));
	if (!tok)
		return ffs_error_set(err, ENOMEM, "no memory for the VMM's regions");
	list = json_tokener_parse_ex(tok, text, (int)n);
	enum json_tokener_error e = json_tokener_get_error(tok);
	size_t used = json_tokener_get_parse_end(tok);

	json_tokener_free(tok);
	while (used < n && (text[used] == '\n' || text[used] == ' ' || text[used] == '\0'))
		used++;
	if (e != json_tokener_success || used != n || !json_object_is_type(list, json_type_array))
		r = ffs_error_set(err, EPROTO,
			"the VMM's message is %s: it has to be one JSON array, in one message with the "
			"userfaultfd",
			e == json_tokener_continue ? "cut off" : "no JSON array of regions");
	else if (!json_object_array_length(list) || json_object_array_length(list) > FFS_MAX_REGIONS)
		r = ffs_error_set(err, EPROTO, "the VMM names %zu regions: 1 to %d are possible",
			json_object_array_length(list), FFS_MAX_REGIONS);
	for (unsigned i = 0; !r && i < json_object_array_length(list); i++) {
		r = parse_region(json_object_array_get_idx(list, i), i, &geo->regions[i], err);
		geo->n_regions++;
	}
	json_object_put(list);
	return r ? r : check_regions(geo, err);
}

/* ---- the message ---- */

static bool is_uffd(int fd, char link[64])
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	ssize_t n = readlink(path, link, 63);

	link[n < 0 ? 0 : n] = '\0';
	return strcmp(link, FFS_UFFD_LINK) == 0;
}

/* Descriptors of a message: all but the first are closed. */
static unsigned take_fds(struct msghdr *msg, int *first)
{
	unsigned n = 0;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		unsigned have = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));

		for (unsigned i = 0; i < have; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			if (n++ == 0)
				*first = fd;
			else
				close(fd);
		}
	}
	return n;
}

int ffs_coop_receive(int peer, struct ffs_geometry *geo, int *uffd, struct ffs_error *err)
{
	_cleanup_free_ char *text = malloc(MESSAGE_MAX);
	char control[CMSG_SPACE(MAX_FDS * sizeof(int))] __attribute__((aligned(8))), link[64] = "";
	struct iovec iov = {.iov_base = text, .iov_len = MESSAGE_MAX};
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	_cleanup_close_ int fd = -1;

	if (!text)
		return ffs_error_set(err, ENOMEM, "no memory for the VMM's regions");
	ssize_t n = recvmsg(peer, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n < 0)
		return ffs_error_errno(err, errno, "receive the VMM's regions");
	unsigned n_fds = take_fds(&msg, &fd);
	bool good = fd >= 0 && is_uffd(fd, link);

	if (good)
		*uffd = ffs_steal_fd(&fd);
	if (n == 0)
		return ffs_error_set(err, EPROTO, "the VMM hung up without naming its regions");
	if ((msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || (size_t)n == MESSAGE_MAX)
		return ffs_error_set(err, EMSGSIZE,
			"the VMM's message is larger than %u bytes, or has more than "
			"%u descriptors",
			MESSAGE_MAX - 1, MAX_FDS);
	if (n_fds != 1)
		return ffs_error_set(err, EPROTO,
			"the VMM's message has %u descriptors: one, its userfaultfd, has to come with it",
			n_fds);
	if (!good)
		return ffs_error_set(err, EPROTO, "what the VMM handed over is no userfaultfd (%s)", link);
	/* the handler must not sleep in read(2) */
	int flags = fcntl(*uffd, F_GETFL);

	if (flags < 0 || fcntl(*uffd, F_SETFL, flags | O_NONBLOCK) < 0)
		return ffs_error_errno(err, errno, "set up the VMM's userfaultfd");
	int r = ffs_coop_parse(text, (size_t)n, geo, err);

	return r ? r : 1;
}

/* ---- the kernel's word ---- */

static int map_region(
	pid_t pid, const struct ffs_vma *vma, unsigned n, struct ffs_region *r, struct ffs_error *err)
{
	uint64_t at = r->hva, end = r->hva + r->size, page_size = 0;
	char flags[128];
	bool first = true;

	for (unsigned i = 0; i < n && at < end; i++) {
		const struct ffs_vma *v = &vma[i];
		/* mappings of huge pages have a file that nobody can open */
		bool anonymous = !v->ino || (!v->shared && strncmp(v->name, "/anon_hugepage", 14) == 0);
		enum ffs_region_kind kind = v->shared   ? FFS_REGION_SHARED
					    : anonymous ? FFS_REGION_ANONYMOUS
							: FFS_REGION_PRIVATE;
		uint64_t file_offset = v->ino ? v->offset + (at - v->start) : 0;

		if (v->end <= at)
			continue;
		if (v->start > at)
			break;
		if (!v->read || !v->write)
			return ffs_error_set(err, EINVAL,
				"the VMM's region %s is not readable and writable at 0x%" PRIx64, r->name,
				at);
		if (first) {
			r->dev = v->dev;
			r->ino = v->ino;
			r->kind = kind;
			r->file_offset = file_offset;
		} else if (v->dev != r->dev || v->ino != r->ino || kind != r->kind ||
			   (v->ino && file_offset != r->file_offset + (at - r->hva))) {
			return ffs_error_set(err, EINVAL,
				"the VMM's region %s is made of different mappings (at 0x%" PRIx64 ")",
				r->name, at);
		}
		first = false;
		at = v->end;
	}
	if (at < end)
		return ffs_error_set(err, EINVAL,
			"the VMM's region %s is not mapped at 0x%" PRIx64 " in process %d", r->name, at,
			(int)pid);
	int e = ffs_smaps_flags(pid, r->hva, flags, &page_size);

	if (e < 0)
		return ffs_error_errno(err, -e, "the mapping of region %s in process %d", r->name, (int)pid);
	if (page_size != r->page_size)
		return ffs_error_set(err, EINVAL,
			"the VMM says that region %s has pages of %" PRIu64 " bytes, the kernel %" PRIu64,
			r->name, r->page_size, page_size);
	r->mergeable = strstr(flags, "mg") != NULL;
	return 0;
}

int ffs_coop_check(pid_t pid, struct ffs_geometry *geo, struct ffs_error *err)
{
	_cleanup_free_ struct ffs_vma *vma = NULL;
	unsigned n = 0;
	int r = ffs_maps_read(pid, &vma, &n);

	if (r < 0)
		return ffs_error_errno(err, -r, "the mappings of process %d", (int)pid);
	for (unsigned i = 0; !r && i < geo->n_regions; i++)
		r = map_region(pid, vma, n, &geo->regions[i], err);
	return r;
}
