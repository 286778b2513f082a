/* What drivers of VMMs that are controlled over HTTP on a unix socket have in common.
 *   api.c         the connection, run state, pause and resume      api-place.c   the directory of its socket
 *   api-save.c    the vmstate by way of a file                     api-drives.c  its drives
 *   api-rescue.c  what the watchdog does                           http.c        HTTP
 *   coop*.c       VMMs that hand over a userfaultfd                firecracker*.c  the stock Firecracker
 *
 * The API (Firecracker's, docs and src/firecracker/swagger/firecracker.yaml): GET / has "state", "Not
 * started", "Running" or "Paused"; PATCH /vm {"state":"Paused"|"Resumed"} is answered 204, also when the VM
 * is in that state already; a failure has {"fault_message":TEXT}. It has no events. */
#pragma once

#include <stdatomic.h>

#include "vmm/http.h"
#include "vmm/vmm.h"

#define FFS_API_CALL_NS (5 * FFS_NS_PER_S) /* for a request outside the pause */

struct json_object;

/* The directory in which the VMM made its API socket, where both sides can meet: reached through the VMM's
 * own root or working directory, which may be a jail. Nothing in it is trusted: names are used with
 * O_NOFOLLOW. */
struct ffs_api_place {
	int dir;        /* O_PATH; -1: not known */
	char seen[128]; /* its name for the VMM, with a slash at the end; "" where that is its working
			   directory */
	char base[64];  /* the socket's own name in it */
	uid_t uid;      /* the VMM's */
	gid_t gid;
};

struct ffs_api {
	struct ffs_vmm vmm; /* first */
	struct ffs_http http;
	int pidfd;
	char path[1024]; /* of the socket, as we were given it */
	struct ffs_api_place place;
	char version[64], app[32];
	_Atomic int state;   /* enum ffs_run_state, as of the last request */
	bool window;         /* from prepare to finish */
	bool was_running;    /* when the last prepare or pause looked */
	bool sent_pause;     /* we paused it, and it has not been seen running since */
	bool pipelines;      /* two requests may be sent at once */
	int vmstate_fd;      /* the caller's, from prepare to finish */
	bool vsock, balloon; /* devices the VM has */
	unsigned writable_drives;
	struct json_object *machine; /* its machine-config, or NULL */
	struct json_object *drives;  /* an array, as of attach or of the last branch, or NULL */
	bool has_disks;              /* some of them were named at attach, to be captured with the branches */
	/* coop */
	int uffd; /* handed over with the geometry, and not yet taken; -1 */
	/* firecracker */
	int fifo; /* the reading end of the FIFO for the vmstate, from prepare to finish; -1 */
};

static inline struct ffs_api *ffs_api_of(struct ffs_vmm *vmm)
{
	return (struct ffs_api *)vmm;
}

/* ---- api.c ---- */
/* Connect to the socket, see whose it is (`pid`, when not 0), and that it speaks the API. */
int ffs_api_connect(
	struct ffs_api *d, const char *path, pid_t pid, struct ffs_cancel *cancel, struct ffs_error *err);
/* A connection that can be relied on: the present one, or a new one when it is dead or doubtful. */
int ffs_api_ensure(struct ffs_api *d, uint64_t deadline_ns, struct ffs_error *err);
/* One request and its answer. `wait` may be NULL (the driver's beat is called all the same). */
int ffs_api_call(struct ffs_api *d, const char *method, const char *path, const char *body,
	struct ffs_http_wait *wait, uint64_t deadline_ns, struct ffs_http_answer *out, struct ffs_error *err);
/* GET with a JSON object as its answer, the caller's; NULL and 0 where the API says 4xx. */
int ffs_api_get(struct ffs_api *d, const char *path, uint64_t deadline_ns, struct json_object **out,
	struct ffs_error *err);
/* The fault_message of an answer, made printable, or its status as text; in `text`. */
const char *ffs_api_fault(const struct ffs_http_answer *a, char text[300]);
/* What GET / said: FFS_RUN_RUNNING, FFS_RUN_PAUSED; -EAGAIN "Not started", -EPROTO. */
int ffs_api_state_of(const char *body);
int ffs_api_query_state(struct ffs_api *d, uint64_t deadline_ns, struct ffs_error *err);
/* The start of every driver's prepare: sound connection, run state. */
int ffs_api_prepare(struct ffs_api *d, int vmstate_fd, bool *was_running, struct ffs_error *err);
/* The operations themselves, for the drivers' tables. */
int ffs_api_pause(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err);
int ffs_api_resume(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err);
enum ffs_run_state ffs_api_run_state(struct ffs_vmm *vmm);
int ffs_api_socket(struct ffs_vmm *vmm);
void ffs_api_describe(struct ffs_api *d, struct json_object *obj);
void ffs_api_init(struct ffs_api *d, const struct ffs_vmm_ops *ops);
void ffs_api_close(struct ffs_vmm *vmm);

/* A member that is a string, made printable; `out` stays as it is where there is none. */
void ffs_api_copy_string(struct json_object *o, const char *key, char *out, size_t size);

/* ---- api-drives.c ---- */
/* The drives that are files, of a VM's configuration, as the VMM knows them: an array of {id, path, read_only}, the caller's. */
struct json_object *ffs_api_list_drives(struct json_object *config, unsigned *writable);
/* Look at the drives again: others may have changed them since. Where disks were named that is refused (-ENOTSUP), for their
 * files may no longer be what the guest writes; else the list is what they are now. */
int ffs_api_look_at_drives(struct ffs_api *d, struct ffs_error *err);

/* ---- api-place.c ---- */
/* From the peer of a connected socket; pid is the VMM's. */
int ffs_api_place_open(int sock, pid_t pid, struct ffs_api_place *out, struct ffs_error *err);
void ffs_api_place_close(struct ffs_api_place *p);
/* "BASE.forkfs-WHAT": the name of a file of ours in the directory, and (seen) what the VMM is told. */
void ffs_api_place_name(const struct ffs_api_place *p, const char *what, char name[96]);
void ffs_api_place_seen(const struct ffs_api_place *p, const char *what, char path[256]);
/* Connect to the socket BASE through the directory. */
int ffs_api_place_dial(const struct ffs_api_place *p, uint64_t deadline_ns, int *sock);
/* A FIFO of ours, empty, that only the VMM can write: its reading end, non-blocking. */
int ffs_api_place_fifo(const struct ffs_api_place *p, const char *what, int *fd, struct ffs_error *err);
/* The reading end of one that is there; -errno. */
int ffs_api_place_open_fifo(const struct ffs_api_place *p, const char *what);
/* An empty file of ours that the VMM may write, and what is in it afterwards, whoever made it: read-only. */
int ffs_api_place_file(const struct ffs_api_place *p, const char *what, struct ffs_error *err);
int ffs_api_place_open_file(const struct ffs_api_place *p, const char *what, int *fd, struct ffs_error *err);
/* A listening socket that the VMM may connect to. */
int ffs_api_place_listen(const struct ffs_api_place *p, const char *what, int *fd, struct ffs_error *err);
void ffs_api_place_remove(const struct ffs_api_place *p, const char *what);

/* ---- api-save.c ---- */
/* PUT /snapshot/create with our file or FIFO as the snapshot_path, and that name with `memory` behind it as
 * the mem_file_path. */
int ffs_api_create(struct ffs_api *d, const char *type, const char *memory, struct ffs_http_wait *wait,
	uint64_t deadline_ns, struct ffs_http_answer *out, struct ffs_error *err);
/* The same by way of a file, which then goes into d->vmstate_fd. `status` is the answer that means success,
 * and `fault` (or NULL) a piece of the fault_message that comes with it. */
int ffs_api_save_file(struct ffs_api *d, const char *type, const char *memory, int status, const char *fault,
	uint64_t deadline_ns, struct ffs_error *err);

/* ---- api-rescue.c ---- */
int ffs_api_rescue(int sock, uint64_t deadline_ns);

#define FFS_API_STATE_FILE "state" /* the vmstate's way out: FIFO or file */

/* ---- coop-receive.c ---- */
/* The regions a VMM announces, checked as far as they can be without asking the kernel. `text` has n bytes.
 */
int ffs_coop_parse(const char *text, size_t n, struct ffs_geometry *out, struct ffs_error *err);
/* The one message of a connected VMM: its regions and one userfaultfd. 1 when they are there, 0 when nothing
 * has come yet, never waits. *uffd (-1 before) is the caller's, also when the message is refused. */
int ffs_coop_receive(int peer, struct ffs_geometry *geo, int *uffd, struct ffs_error *err);
#define FFS_UFFD_LINK "anon_inode:[userfaultfd]" /* what /proc/PID/fd shows of one */
/* Compared with the mappings of the process: fills what is left of the regions. */
int ffs_coop_check(pid_t pid, struct ffs_geometry *geo, struct ffs_error *err);

/* ---- firecracker-geometry.c ---- */
int ffs_fc_geometry(struct ffs_vmm *vmm, struct ffs_geometry *out, struct ffs_error *err);
