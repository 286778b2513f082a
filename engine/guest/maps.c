/* Owns nothing. Any thread. The text is the kernel's (proc_pid_maps(5), proc_pid_smaps(5)) but the names in
 * it are the VMM's. */
#include "guest/maps.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"

#define MAPS_MAX (64u << 20)

static int parse_line(const char *line, struct ffs_vma *v)
{
	char perm[5];
	unsigned maj, min;
	int at = 0;

	if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %n", &v->start, &v->end,
		    perm, &v->offset, &maj, &min, &v->ino, &at) < 7 ||
		!at || strlen(perm) != 4 || v->end <= v->start)
		return -EPROTO;
	v->dev = makedev(maj, min);
	v->read = perm[0] == 'r';
	v->write = perm[1] == 'w';
	v->shared = perm[3] == 's' || perm[3] == 'S';
	snprintf(v->name, sizeof(v->name), "%s", line + at);
	return 0;
}

int ffs_maps_read(pid_t pid, struct ffs_vma **out, unsigned *n)
{
	char path[64];
	_cleanup_free_ char *text = NULL;
	_cleanup_free_ struct ffs_vma *list = NULL;
	char *save = NULL;
	unsigned have = 0, lines = 0;
	int r = FFS_FAULT("maps-read");

	snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	if (!r)
		r = ffs_read_file(path, MAPS_MAX, &text, NULL);
	if (r < 0)
		return r == -ENOENT ? -ESRCH : r;
	for (const char *p = text; *p; p++)
		lines += *p == '\n';
	/* a zombie has no mappings left, a living process always has some */
	if (!lines)
		return -ESRCH;
	list = calloc(lines, sizeof(*list));
	if (!list)
		return -ENOMEM;
	for (char *line = strtok_r(text, "\n", &save); line && have < lines;
		line = strtok_r(NULL, "\n", &save)) {
		r = parse_line(line, &list[have++]);
		if (r)
			return r;
	}
	*out = ffs_steal_ptr(&list);
	*n = have;
	return 0;
}

int ffs_smaps_flags(pid_t pid, uint64_t addr, char flags[128], uint64_t *kernel_page_size)
{
	char path[64];
	_cleanup_fclose_ FILE *f = NULL;
	_cleanup_free_ char *line = NULL;
	size_t cap = 0;
	bool inside = false, have_size = false;
	int r = FFS_FAULT("smaps-read");

	if (r)
		return r;
	snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
	f = fopen(path, "re");
	if (!f)
		return errno == ENOENT ? -ESRCH : -errno;
	while (getline(&line, &cap, f) > 0) {
		uint64_t start, end, kib;

		/* a header begins with a lower-case hex number, every other line with a capital */
		if (!isupper((unsigned char)line[0]) &&
			sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &start, &end) == 2) {
			if (inside)
				return -EPROTO;
			inside = addr >= start && addr < end;
		} else if (inside && sscanf(line, "KernelPageSize: %" SCNu64 " kB", &kib) == 1) {
			*kernel_page_size = kib << 10;
			have_size = true;
		} else if (inside && strncmp(line, "VmFlags:", 8) == 0) {
			size_t n;

			snprintf(flags, 128, "%s", line + 8 + strspn(line + 8, " "));
			n = strcspn(flags, "\n");
			while (n && flags[n - 1] == ' ')
				n--;
			flags[n] = '\0';
			return have_size ? 0 : -EPROTO;
		}
	}
	return ferror(f) ? -EIO : -EFAULT;
}
