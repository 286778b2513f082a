/* Jails of Firecracker's children, made by its jailer: a root directory of their own, a user without rights, a cgroup. Neither
 * what a process inherits nor any file of the host is there; what a child needs is put into the directory before its jailer
 * starts, or mounted there, in its own mount namespace, when its API listens.
 *
 * The words that are the jailer's come from the configuration and the caller, as anybody writes them who knows it; forkfs adds
 * --id and --exec-file. */
#pragma once

#include "restore.h"

#define FFS_JAIL_MEMORY "memory" /* names in the root of each */
#define FFS_JAIL_VMSTATE "vmstate"
#define FFS_JAIL_PAGER "pager"

struct ffs_jails {
	bool on;
	struct ffs_argv own,
		vmm; /* the jailer's words, and those that it passes on; {number} is not replaced yet */
	const char *uid, *gid;     /* among them */
	const char *parent_cgroup; /* among them; NULL: none */
	char *base;                /* --chroot-base-dir, without links */
	char *name;                /* of the program: a directory below base */
	bool pid_ns, cgroup;
	int image_ns; /* the mount namespace where r->memory_fd has a name; -1: it is ours */
};

/* A file of the host that is to be seen in a jail. */
struct ffs_jail_bind {
	int ns;             /* the mount namespace of `fd`; -1: ours */
	int fd;             /* -1: by its name */
	char *file;         /* its name on the host */
	const char *inside; /* a file that is there, in the jail */
	bool read_only;
};
#define FFS_JAIL_BINDS 20

/* Understand the words, and refuse what cannot be; nothing where no jailer was named. r->conf.binary is known. -EINVAL: they
 * make no sense. -EPERM: only root can make jails. */
int ffs_jails_plan(struct ffs_restore *r, struct ffs_jails *j, struct ffs_error *err);
void ffs_jails_free(struct ffs_jails *j);
/* The user of all children, where it is one: -EINVAL otherwise. */
int ffs_jails_owner(const struct ffs_jails *j, unsigned *uid, unsigned *gid, struct ffs_error *err);
/* Make r->memory_fd a file that a jail can be shown: the branch's own image, where the mount lets that user in, else a copy in
 * memory, one for the command, which is gone with it and its children. Main thread. -EINTR by a signal. */
int ffs_jails_image(struct ffs_restore *r, struct ffs_jails *j, struct ffs_error *err);

/* The child's jail, with the vmstate in it; c->jail is its root from then on. Any thread. */
int ffs_jail_make(
	struct ffs_restore *r, const struct ffs_jails *j, struct ffs_child *c, struct ffs_error *err);
/* An empty file of the child's user in its jail, opened for writing. `inside` was checked by ffs_jail_is_name(). */
int ffs_jail_create(
	const struct ffs_child *c, const char *inside, bool read_only, int *fd, struct ffs_error *err);
/* Can a file of a jail have that name? */
bool ffs_jail_is_name(const char *inside);
/* The command line, up to and without what is Firecracker's own. */
int ffs_jail_command(const struct ffs_restore *r, const struct ffs_jails *j, const struct ffs_child *c,
	struct ffs_argv *out, struct ffs_error *err);
/* Add Firecracker's words, and those of the caller for it. */
int ffs_jail_vmm_words(
	const struct ffs_jails *j, const struct ffs_child *c, struct ffs_argv *out, struct ffs_error *err);
/* The child was started: with a pid namespace of its own the VM is another process than the jailer, which ends. */
int ffs_jail_started(const struct ffs_jails *j, struct ffs_child *c, struct ffs_error *err);
/* A file of `mode` in memory that has a name, for that is what can be mounted elsewhere: in a mount namespace of its own, which
 * goes with *ns. Below the directory `at`, which any will do for. */
int ffs_jail_shared_file(const char *at, mode_t mode, int *fd, int *ns, struct ffs_error *err);
/* Its VM listens, hence is in its jail: let it see those files. */
int ffs_jail_bind(
	const struct ffs_child *c, const struct ffs_jail_bind *bind, unsigned n, struct ffs_error *err);
