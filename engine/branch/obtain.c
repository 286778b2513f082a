/* Owns nothing: how a tracker comes by its userfaultfd.
 *
 * Threads: whoever has the sandbox busy. Outside any pause: it reads /proc and waits for the injector. */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "branch/internal.h"
#include "guest/maps.h"
#include "uffd/uffd.h"

/* One that was handed over must be of the VMM's own address space: of another one it would protect nothing.
 * The kernel tells by what a registration through it does there. */
static int check_space(const struct ffs_vmm *vmm, const struct ffs_region *r, int uffd, struct ffs_error *err)
{
	char flags[128] = "";
	uint64_t page_size;
	int e = ffs_uffd_register(uffd, r->hva, r->page_size, err);

	if (e < 0)
		return e;
	e = ffs_smaps_flags(vmm->proc.pid, r->hva, flags, &page_size);
	int undone = ffs_uffd_unregister(uffd, r->hva, r->page_size);

	if (e < 0)
		return ffs_error_errno(err, -e, "the mappings of process %d", (int)vmm->proc.pid);
	if (!strstr(flags, "uw"))
		return ffs_error_set(err, EPROTO,
			"the userfaultfd that the VMM handed over is of another process than %d",
			(int)vmm->proc.pid);
	return undone < 0 ? ffs_error_errno(err, -undone, "the userfaultfd of process %d", (int)vmm->proc.pid)
			  : 0;
}

int ffs_tracker_obtain(struct ffs_engine *engine, struct ffs_vmm *vmm, const struct ffs_geometry *geo,
	int *uffd, struct ffs_error *err)
{
	_cleanup_close_ int fd = -1;
	int e;

	if (vmm->ops->uffd) {
		e = vmm->ops->uffd(vmm, &fd, err);
		if (e == 0)
			e = ffs_uffd_api_given(fd, err);
		if (e == 0)
			e = check_space(vmm, &geo->regions[0], fd, err);
	} else {
		e = ffs_inject_userfaultfd(engine->spawner, vmm->proc, 5 * FFS_NS_PER_S, &fd, err);
		if (e == 0)
			e = ffs_uffd_api(fd, err);
	}
	if (e == 0)
		*uffd = ffs_steal_fd(&fd);
	return e;
}
