/* The inside of the QEMU driver, shared by its files:
 *   qemu.c           the table; prepare, pause, resume, finish, describe; run state from events
 *   qemu-save.c      staging and writing the vmstate, and which way it can be written
 *   qemu-connect.c   the connection: dial, identify, reconnect     qemu-find.c  monitors of a command line
 *   qemu-holder.c    who is connected to a monitor                 qemu-rescue.c  what the watchdog does
 *   qemu-geometry.c  guest memory, cross-checked                   qemu-blocks.c  what QEMU says about it */
#pragma once

#include <stdatomic.h>

#include "vmm/qmp.h"
#include "vmm/vmm.h"

struct json_object;

#define FFS_QEMU_CALL_NS (5 * FFS_NS_PER_S) /* for a command outside the pause */
#define FFS_QEMU_GREETING_NS (2 * FFS_NS_PER_S)
#define FFS_QEMU_MAX_MONITORS 8
#define FFS_QEMU_MAX_BLOCKS 96

/* One QMP monitor to try. */
struct ffs_qemu_monitor {
	char path[1024];       /* file name, or abstract name without its leading NUL */
	bool abstract, padded; /* padded: QEMU's tight=off, the name fills sun_path */
};

enum ffs_qemu_way { FFS_QEMU_XEN_SAVE, FFS_QEMU_MIGRATE };

/* What prepare staged, until finish. */
struct ffs_qemu_stage {
	bool active;
	enum ffs_qemu_way way;
	int vmstate_fd; /* the caller's */
	int64_t fdset;  /* -1: none */
	bool fd_named;  /* getfd happened and migrate did not take it yet */
	bool caps_changed, had_ignore_shared, had_events;
	int64_t old_bandwidth; /* -1: unchanged */
	bool migrate_sent;
};

struct ffs_qemu {
	struct ffs_vmm vmm; /* first */
	struct ffs_qmp *q;  /* NULL: no connection now */
	int pidfd;
	struct ffs_qemu_monitor monitor;
	struct json_object *version, *command_line; /* version may be NULL */
	unsigned version_number;                    /* major * 100 + minor */
	char accelerator[8];
	_Atomic int state; /* enum ffs_run_state */
	_Atomic int way;   /* enum ffs_qemu_way of the last prepare */
	bool window;       /* claimed from prepare to finish */
	struct ffs_qemu_stage stage;
	bool was_running; /* when the last prepare looked */
	bool sent_stop;   /* pause stopped it, and it has not been seen running since */
	bool sent_cont;   /* resume has begun to undo that */
	/* written by the event hook; read by calls while claimed */
	unsigned stops, resumes;
	char migration[24]; /* status of the last MIGRATION event; "" since it was cleared */
};

/* A RAM block, from `info ramblock` and query-memdev. */
struct ffs_qemu_block {
	char name[64];
	uint64_t offset, size, max_size, page_size;
	bool guest;   /* a memory backend: part of memory.bin */
	bool shared;  /* of a backend: share=on */
	uint64_t hva; /* 0: not known yet */
};

struct ffs_qemu_blocks {
	unsigned n;
	struct ffs_qemu_block block[FFS_QEMU_MAX_BLOCKS]; /* by offset */
};

static inline struct ffs_qemu *ffs_qemu_of(struct ffs_vmm *vmm)
{
	return (struct ffs_qemu *)vmm;
}

/* qemu.c: a call on the present connection. -ESRCH when the process is gone, -EIO when QEMU refuses,
 * -ENOTCONN without one. */
int ffs_qemu_call(struct ffs_qemu *d, const char *command, struct json_object *args, int fd,
	uint64_t deadline_ns, struct json_object **ret, struct ffs_error *err);
/* A connection that can be relied on: the present one, or a new one when it is dead or doubtful. */
int ffs_qemu_ensure(struct ffs_qemu *d, struct ffs_error *err);
/* human-monitor-command; *text is the caller's. */
int ffs_qemu_hmp(struct ffs_qemu *d, const char *line, char **text, struct ffs_error *err);
/* A string, number or boolean of a JSON object, or NULL / dflt when it is not there or another type. */
const char *ffs_json_str(struct json_object *obj, const char *key);
int64_t ffs_json_int(struct json_object *obj, const char *key, int64_t dflt);
bool ffs_json_bool(struct json_object *obj, const char *key, bool dflt);
/* The run state QEMU names, into out; d->state follows. */
int ffs_qemu_query_status(struct ffs_qemu *d, uint64_t deadline_ns, char out[32], struct ffs_error *err);
/* Hooks of every connection of this driver. */
struct ffs_qmp_hooks ffs_qemu_hooks(struct ffs_qemu *d);

/* qemu-connect.c */
int ffs_qemu_connect(const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_vmm **out,
	struct ffs_error *err);
/* Drop the connection, if any, and make a new one. */
int ffs_qemu_reconnect(struct ffs_qemu *d, uint64_t deadline_ns, struct ffs_error *err);
void ffs_qemu_close(struct ffs_vmm *vmm);
/* A connected socket to a monitor: 0 or -errno (-EAGAIN: its queue stayed full until the deadline). No json,
 * no threads. */
int ffs_qemu_dial(const struct ffs_qemu_monitor *m, pid_t pid, uint64_t deadline_ns, int *sock);

/* qemu-find.c: the QMP unix sockets a VMM's command line names. Returns how many; -ESRCH, -ENOTSUP with a
 * sentence. */
int ffs_qemu_find_monitors(
	pid_t pid, struct ffs_qemu_monitor out[FFS_QEMU_MAX_MONITORS], struct ffs_error *err);
/* The command line as a JSON array, or NULL. */
struct json_object *ffs_qemu_command_line(pid_t pid);
/* comm of a process into out ("?" when gone). */
void ffs_proc_comm(pid_t pid, char out[32]);

/* qemu-holder.c: a process that is connected to the monitor behind sock; 0 when none is found. */
pid_t ffs_qemu_holder(int sock);
/* Whether pid holds the listening end of the monitor behind sock. */
bool ffs_qemu_listens(pid_t pid, int sock);

/* qemu-blocks.c */
int ffs_qemu_read_blocks(struct ffs_qemu *d, struct ffs_qemu_blocks *out, struct ffs_error *err);
/* Guest-physical ranges of the blocks, and their hva. memory.bin offsets are counted over guest blocks in
 * their order. */
int ffs_qemu_read_ranges(
	struct ffs_qemu *d, struct ffs_qemu_blocks *b, struct ffs_geometry *geo, struct ffs_error *err);

/* qemu-geometry.c */
int ffs_qemu_geometry(struct ffs_vmm *vmm, struct ffs_geometry *out, struct ffs_error *err);

/* qemu-save.c */
int ffs_qemu_stage(struct ffs_qemu *d, int vmstate_fd, bool was_running, struct ffs_error *err);
int ffs_qemu_save(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err);
/* A migration that did not end must not stop the VM later: before resuming. */
void ffs_qemu_cancel_migration(struct ffs_qemu *d, uint64_t deadline_ns);
void ffs_qemu_unstage(struct ffs_qemu *d);

/* qemu-rescue.c */
int ffs_qemu_rescue(int sock, uint64_t deadline_ns);
