/* A tmpfs of one's own, in no mount namespace. */
#pragma once

/* Mount one without limits, for its owner alone. `huge`: its option of that name (when its files get large pages),
 * NULL: the kernel's default. The descriptor of the mount, the caller's: what is opened in it keeps it, and it goes
 * with the last of that; -errno (EPERM: needs CAP_SYS_ADMIN). Any thread. Source of the options: tmpfs(5). */
int ffs_tmpfs_mount(const char *huge);
