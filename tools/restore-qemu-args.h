/* From the command line of a QEMU that was branched to that of its children. Pure logic: nothing is opened or run.
 *
 * What comes in was written by the VMM, which is not trusted, or by a stranger: of it only the machine is taken, as
 * the guest sees it (an allow list, restore-qemu-args.c). Everything that names something of the host is replaced by
 * something of the child's own, or left out, or refused. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "restore.h"

#define FFS_QEMU_MAX_DISKS (FFS_CHILD_FDS - (FFS_CHILD_FIRST_DISK - 3))

struct ffs_qemu_args {
	/* given */
	struct json_object *command_line; /* array of strings, with the program's name first */
	struct json_object *disks;        /* of the branch: [{id,path}]; may be NULL */
	const char *const *user;          /* the caller's own options, which win over what they name again */
	unsigned n_user;
	bool trust; /* take options of the host too */
	uint64_t memory_size;
	const char *memory_options; /* further properties of memory-backend-file, ",NAME=VALUE" */
	/* made: the words behind the program's name. Paths are relative to the child's own directory; the memory is
	 * descriptor FFS_CHILD_MEMORY, disk[i] is FFS_CHILD_FIRST_DISK + i */
	struct ffs_argv out;
	struct json_object *notes;         /* a sentence for each thing replaced or left out; may be NULL */
	char disk[FFS_QEMU_MAX_DISKS][65]; /* IDs of the branch's disks */
	bool qcow2
		[FFS_QEMU_MAX_DISKS]; /* whose header may name further files: look at it before it is used */
	unsigned n_disks;
	/* while it is made */
	char memory_id[65];
	unsigned n_serial;
	bool nodefaults, nographic, memory_is_plain;
};

/* 0, or -EPERM, -ENOTSUP, -EINVAL with a sentence that names the word. ffs_argv_free(&a->out) in any case. */
int ffs_qemu_args_make(struct ffs_qemu_args *a, struct ffs_error *err);

/* ---- for restore-qemu-host.c: what belongs to the host ---- */

/* The value of KEY in "a,b=c,…" (QEMU's commas: doubled ones are part of a value), unescaped; false: not there. The
 * first piece may stand without a key: it is `first` then (NULL: it has none). */
bool ffs_qemu_get(const char *opts, const char *first, const char *key, char *out, size_t size);
/* Step through the pieces of `opts`: key ("" for a bare first one) and value as written. False at the end, or when a
 * piece is too long. */
bool ffs_qemu_next(const char **opts, char key[64], char value[512]);
/* Letters, digits, '.', '_', '-' alone: safe as a file's name and inside an option. */
bool ffs_qemu_is_id(const char *id);
/* The caller has given an option of that name (without dashes) whose `key` is `id`. */
bool ffs_qemu_user_has(const struct ffs_qemu_args *a, const char *option, const char *key, const char *id);
void ffs_qemu_note(struct ffs_qemu_args *a, const char *fmt, ...) FFS_PRINTF(2, 3);

int ffs_qemu_chardev(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err);
int ffs_qemu_serial(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err);
int ffs_qemu_netdev(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err);
int ffs_qemu_nic(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err);
int ffs_qemu_drive(struct ffs_qemu_args *a, const char *opt, const char *value, struct ffs_error *err);
