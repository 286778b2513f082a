/* Owns nothing: makes a tmpfs (tmpfs.h). Any thread, no locks. */
#include "base/tmpfs.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mount.h>

#include "base/cleanup.h"
#include "base/util.h"

int ffs_tmpfs_mount(const char *huge)
{
	const char *const options[][2] = {
		{"source", "forkfs"}, {"size", "0"}, {"nr_inodes", "0"}, {"mode", "0700"}, {"huge", huge}};
	_cleanup_close_ int fs = fsopen("tmpfs", FSOPEN_CLOEXEC);

	if (fs < 0)
		return -errno;
	for (size_t i = 0; i < FFS_ARRAY_LEN(options); i++)
		if (options[i][1] && fsconfig(fs, FSCONFIG_SET_STRING, options[i][0], options[i][1], 0) < 0)
			return -errno;
	if (fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
		return -errno;
	/* NOATIME: a reader that sets it counts as a writer of the mount, just when it is to become read-only */
	int mount = fsmount(fs, FSMOUNT_CLOEXEC,
		MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOATIME);

	return mount < 0 ? -errno : mount;
}
