/* The host's side of a guest's agent.
 *
 * A virtio-serial port has one client. So one process a VM, the link, has its connection, for as long as the VM lives: it
 * does the handshake, watches the guest's health, and passes on the frames of everybody who wants something, whom it
 * serves on a socket beside the port's own (PATH.link). It is started by whoever comes first. */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "agent/wire.h"
#include "base/error.h"
#include "base/util.h"

#define FFS_AGENT_READY_S                                                                                    \
	60 /* how long a guest may take to answer, when nothing else is said: only a backstop */

/* ---- agent-client.c ---- */

struct ffs_agent_link {
	const char *
		socket; /* of the agent: a chardev's socket, the agent's own, or "vsock:" and that of a Firecracker's vsock */
	pid_t pid; /* of the VMM, which must be who listens there; 0: whoever does */
	unsigned ready_s;
};

/* A connection to the link of that agent, which is started if there is none; the caller's. Blocking socket. */
int ffs_agent_dial(const struct ffs_agent_link *l, struct ffs_error *err);
/* Wait until the guest is healthy: *json (may be NULL; the caller frees) is what the link knows of the handshake and its
 * times. Else -errno with the link's sentence. `fd` is a fresh connection; pidfd: of the VM, whose end ends the wait (-1: the
 * link sees it). */
int ffs_agent_wait(int fd, int pidfd, char **json, struct ffs_error *err);
/* Ask now whether the guest's agent is healthy: 1, it has answered; 0, not within so many seconds; *json (the caller frees)
 * is what the link knows then. -errno with the link's sentence: it never will be. `fd` is a fresh connection. */
int ffs_agent_health(int fd, unsigned seconds, char **json, struct ffs_error *err);
/* The lock under which a link of that agent is started and ends: a descriptor, or -errno. */
int ffs_agent_lock(const char *socket, struct ffs_error *err);
/* The next frame from a blocking connection: 1, 0 at its end, or -errno. */
struct ffs_agent_input {
	struct agent_decoder dec;
	uint8_t buf[16384];
	size_t at, len;
};
int ffs_agent_next(int fd, struct ffs_agent_input *in, struct agent_frame *out);
int ffs_agent_send(int fd, uint8_t type, uint32_t stream, const void *payload, size_t len);
/* The socket of the agent of a QEMU or Firecracker, from its command line; the caller frees it. -ENOENT with a sentence. */
int ffs_agent_find(pid_t pid, char **out, struct ffs_error *err);
/* The same of a sandbox of the mount, and its process. */
int ffs_agent_of(const char *sandbox, const char *mount, pid_t *pid, char **out, struct ffs_error *err);
/* The same of one that is to be started in the directory cwd, by the words of its command line. */
int ffs_agent_find_in(char *const *word, unsigned n, const char *cwd, char **out, struct ffs_error *err);

/* ---- agent-firecracker.c ---- */

/* The API socket that such a command line names, NULL: it is no Firecracker's. */
const char *ffs_agent_api_of(char *const *word, unsigned n);
int ffs_agent_find_firecracker(pid_t pid, const char *api, char **out, struct ffs_error *err);

/* ---- agent-connect.c ---- */

/* The name of the file in it. */
const char *ffs_agent_path(const char *socket);
struct ffs_agent_vm {
	int fd;    /* non-blocking: the agent, or, of a chardev, where it will come */
	int pidfd; /* of the VMM, whose end is the end of everything */
	struct ffs_proc_id id;
	uint8_t epoch[16];
};
/* Both descriptors are the caller's, or -1, also after a failure. */
int ffs_agent_connect(
	const struct ffs_agent_link *l, uint64_t deadline_ns, struct ffs_agent_vm *vm, struct ffs_error *err);

/* ---- agent-link.c ---- */

/* The link's process: `listener` is its socket at PATH.link. Returns when the VM has ended, or the handshake failed and
 * nobody asks any more. */
int ffs_agent_link_run(const struct ffs_agent_link *l, int listener);
