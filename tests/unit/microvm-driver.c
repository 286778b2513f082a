/* Owns the microVMs of a test and the engine's driver for them.
 *
 * Threads: a microvm belongs to the test's thread; the driver's operations are called as vmm.h says
 * (run_state by any thread, rescue in the watchdog's process). No locks. */
#include "microvm-driver.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "guest/maps.h"

/* ---- talking to it ---- */

/* One command and its answer. Answers to commands that somebody gave up on are passed over. */
static int ask(int sock, const char *command, int fd, uint64_t deadline_ns, char *text, size_t size,
	struct ffs_vmm *beating)
{
	char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = {0}, head[64];
	struct iovec iov = {(void *)(uintptr_t)command, strlen(command)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		msg.msg_control = control;
		msg.msg_controllen = sizeof(control);
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

		*c = (struct cmsghdr){
			.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
		memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	}
	if (sendmsg(sock, &msg, MSG_NOSIGNAL) < 0)
		return errno == EPIPE || errno == ECONNRESET ? -ESRCH : -errno;
	snprintf(head, sizeof(head), "{\"answer\":\"%.*s\"", (int)strcspn(command, " "), command);
	for (;;) {
		struct pollfd p = {.fd = sock, .events = POLLIN};
		int ms = ffs_ms_until(deadline_ns), r = poll(&p, 1, ms < 50 ? ms : 50);

		if (beating && beating->beat)
			beating->beat(beating->beat_arg);
		if (r == 0 && ms == 0)
			return -ETIMEDOUT;
		if (r <= 0)
			continue;
		ssize_t n = recv(sock, text, size - 1, 0);

		if (n <= 0)
			return -ESRCH;
		text[n] = '\0';
		if (strncmp(text, head, strlen(head)) == 0)
			return strstr(text, "\"error\":\"\"") ? 0 : -EIO;
	}
}

static int parse(const char *text, struct microvm_status *st)
{
	struct json_object *o = json_tokener_parse(text);

	if (!o)
		return -EPROTO;
#define NUMBER(key) json_object_get_uint64(json_object_object_get(o, key))
	*st = (struct microvm_status){.steps = NUMBER("steps"),
		.mismatches = NUMBER("mismatches"),
		.saves = NUMBER("saves"),
		.hva = NUMBER("hva"),
		.size = NUMBER("size"),
		.page_size = NUMBER("page_size"),
		.paused = strcmp(json_object_get_string(json_object_object_get(o, "state")), "paused") == 0};
#undef NUMBER
	snprintf(st->kind, sizeof(st->kind), "%s", json_object_get_string(json_object_object_get(o, "kind")));
	json_object_put(o);
	return 0;
}

static int status_of(int sock, uint64_t deadline_ns, struct microvm_status *st)
{
	char text[2048];
	int e = ask(sock, "status", -1, deadline_ns, text, sizeof(text), NULL);

	return e < 0 ? e : parse(text, st);
}

int microvm_command(struct microvm *v, const char *command, struct microvm_status *st)
{
	char text[2048];
	int e = ask(v->sock, command, -1, ffs_now_ns() + 10 * FFS_NS_PER_S, text, sizeof(text), NULL);

	return e < 0 ? e : parse(text, st);
}

int microvm_runs(struct microvm *v, uint64_t steps, unsigned ms)
{
	uint64_t deadline = ffs_now_ns() + ms * FFS_NS_PER_MS;
	struct microvm_status st, first;
	int e = microvm_command(v, "status", &first);

	while (e == 0) {
		e = microvm_command(v, "status", &st);
		if (e == 0 && st.mismatches)
			return -EILSEQ;
		if (e == 0 && st.steps >= first.steps + steps)
			return 0;
		if (ffs_now_ns() > deadline)
			return -ETIMEDOUT;
		poll(NULL, 0, 2);
	}
	return e;
}

bool microvm_protected(struct microvm *v)
{
	char path[64], line[512];
	bool found = false;

	snprintf(path, sizeof(path), "/proc/%d/smaps", v->pid);
	_cleanup_fclose_ FILE *s = fopen(path, "re");

	while (s && fgets(line, sizeof(line), s))
		if (strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " uw"))
			found = true;
	return found;
}

/* ---- starting and stopping ---- */

/* What is running, for microvm_stop_all(). */
static struct {
	pid_t pid;
	char dir[64];
} running[32];

static int connect_to(const char *dir)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	_cleanup_close_ int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	snprintf(a.sun_path, sizeof(a.sun_path), "%s/control", dir);
	return fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0 ? -errno : ffs_steal_fd(&fd);
}

/* The program lies beside the tests in the build tree; $MICROVM names another. */
static void find_program(char path[256])
{
	ssize_t n = readlink("/proc/self/exe", path, 200);
	const char *given = getenv("MICROVM");

	path[n > 0 ? n : 0] = '\0';
	char *slash = strrchr(path, '/');

	if (given)
		snprintf(path, 256, "%s", given);
	else if (slash)
		strcpy(slash, "/../microvm/microvm");
}

static _Noreturn void run(
	const char *program, const struct microvm *v, const struct microvm_options *o, char *const *argv)
{
	char path[96];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (!o->kind && (fcntl(o->memory_fd, F_SETFD, 0) < 0 || fcntl(o->vmstate_fd, F_SETFD, 0) < 0))
		_exit(1);
	for (int i = 1; i <= 2; i++) {
		snprintf(path, sizeof(path), "%s/%s", v->dir, i == 1 ? "serial" : "messages");
		int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

		if (fd < 0 || dup2(fd, i) < 0)
			_exit(1);
	}
	execv(program, argv);
	dprintf(2, "%s: %s\n", program, strerror(errno));
	_exit(1);
}

int microvm_start(struct microvm *v, const struct microvm_options *o, struct ffs_error *why)
{
	enum { ARGS = 9 };
	char arg[ARGS][128] = {"microvm"}, program[256], *argv[ARGS + 1] = {0}, path[96];
	unsigned n = 1;
	int e, status;

	memset(v, 0, sizeof(*v));
	v->sock = -1;
	v->keep_truth = true;
	snprintf(v->dir, sizeof(v->dir), "/tmp/microvm-XXXXXX");
	if (!mkdtemp(v->dir))
		return ffs_error_errno(why, errno, "mkdtemp");
	find_program(program);
	snprintf(arg[n++], sizeof(arg[0]), "--control=%s/control", v->dir);
	snprintf(arg[n++], sizeof(arg[0]), "--paused=%d", o->paused);
	if (o->kind) {
		snprintf(arg[n++], sizeof(arg[0]), "--kind=%s", o->kind);
		snprintf(arg[n++], sizeof(arg[0]), "--memory=%u", o->mib);
		snprintf(arg[n++], sizeof(arg[0]), "--vcpus=%u", o->vcpus);
		snprintf(arg[n++], sizeof(arg[0]), "--work=%u", o->work_mib);
		snprintf(arg[n++], sizeof(arg[0]), "--fill=%d", o->fill);
	} else {
		snprintf(arg[n++], sizeof(arg[0]), "--restore=/proc/self/fd/%d", o->memory_fd);
		snprintf(arg[n++], sizeof(arg[0]), "--vmstate=/proc/self/fd/%d", o->vmstate_fd);
	}
	for (unsigned i = 0; i < n; i++)
		argv[i] = arg[i];
	v->pid = fork();
	if (v->pid == 0)
		run(program, v, o, argv);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(running); i++)
		if (!running[i].dir[0]) {
			running[i].pid = v->pid;
			memcpy(running[i].dir, v->dir, sizeof(v->dir));
			break;
		}
	while ((e = connect_to(v->dir)) < 0) {
		if (v->pid < 0 || waitpid(v->pid, &status, WNOHANG) != 0) {
			_cleanup_free_ char *text = NULL;

			snprintf(path, sizeof(path), "%s/messages", v->dir);
			if (ffs_read_file(path, 4096, &text, NULL) == 0)
				text[strcspn(text, "\n")] = '\0';
			const char *skip = text ? strstr(text, "SKIP:") : NULL;

			e = WIFEXITED(status) && WEXITSTATUS(status) == 77 ? ENOTSUP : ECHILD;
			e = ffs_error_set(why, e, "%s",
				skip   ? skip
				: text ? text
				       : "the microVM did not start");
			v->pid = 0;
			microvm_stop(v);
			return e;
		}
		poll(NULL, 0, 1);
	}
	v->sock = e;
	struct microvm_status st;

	e = microvm_command(v, "status", &st);
	if (e == 0) {
		v->size = st.size;
		v->truth = mmap(NULL, st.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	}
	if (e == 0 && v->truth != MAP_FAILED)
		return 0;
	microvm_stop(v);
	return ffs_error_set(why, EIO, "the microVM does not answer");
}

static void remove_it(pid_t pid, const char *dir)
{
	static const char *const files[] = {"control", "serial", "messages"};
	char path[96];

	if (pid > 0) {
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
	}
	for (unsigned i = 0; i < FFS_ARRAY_LEN(files); i++) {
		snprintf(path, sizeof(path), "%s/%s", dir, files[i]);
		unlink(path);
	}
	rmdir(dir);
}

void microvm_stop(struct microvm *v)
{
	remove_it(v->pid, v->dir);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(running); i++)
		if (strcmp(running[i].dir, v->dir) == 0)
			running[i].dir[0] = '\0';
	ffs_close_fd(&v->sock);
	if (v->truth && v->truth != MAP_FAILED)
		munmap(v->truth, v->size);
	v->truth = NULL;
}

void microvm_stop_all(void)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(running); i++)
		if (running[i].dir[0]) {
			remove_it(running[i].pid, running[i].dir);
			running[i].dir[0] = '\0';
		}
}

/* ---- the driver ---- */

struct driver {
	struct ffs_vmm head;
	struct microvm *v;
	int sock, file; /* file: of shared memory, for the truth; -1 */
	uint64_t hva;
	int vmstate_fd;
	bool stopped_it;
	_Atomic bool paused;
};

static struct microvm *selected;

void microvm_select(struct microvm *v)
{
	selected = v;
}

static int command(struct driver *d, const char *what, int fd, uint64_t deadline_ns, struct ffs_error *err)
{
	char text[2048];
	int e = ask(d->sock, what, fd, deadline_ns, text, sizeof(text), &d->head);

	if (e < 0)
		return ffs_error_errno(err, -e, "the microVM of process %d: %s", (int)d->head.proc.pid, what);
	atomic_store(&d->paused, strstr(text, "\"state\":\"paused\"") != NULL);
	return 0;
}

static void m_close(struct ffs_vmm *vmm)
{
	struct driver *d = (struct driver *)vmm;

	ffs_close_fd(&d->sock);
	ffs_close_fd(&d->file);
	free(d);
}

static int m_connect(const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_vmm **out,
	struct ffs_error *err)
{
	struct driver *d = calloc(1, sizeof(*d));

	if (!d)
		return ffs_error_set(err, ENOMEM, "out of memory");
	d->head.ops = &microvm_ops;
	d->head.proc.pid = selected->pid;
	d->v = selected;
	d->file = -1;
	d->sock = connect_to(selected->dir);
	if (d->sock < 0 || ffs_proc_stat(selected->pid, NULL, &d->head.proc.start) < 0) {
		m_close(&d->head);
		return ffs_error_set(err, ESRCH, "the microVM is gone");
	}
	d->head.socket_generation = 1;
	*out = &d->head;
	return 0;
}

static int m_geometry(struct ffs_vmm *vmm, struct ffs_geometry *geo, struct ffs_error *err)
{
	struct driver *d = (struct driver *)vmm;
	struct ffs_region *r = &geo->regions[0];
	_cleanup_free_ struct ffs_vma *vma = NULL;
	const struct ffs_vma *at = NULL;
	struct microvm_status st;
	char flags[128], path[128];
	unsigned n = 0;
	int e = status_of(d->sock, ffs_now_ns() + 2 * FFS_NS_PER_S, &st);

	if (e == 0)
		e = ffs_maps_read(vmm->proc.pid, &vma, &n);
	if (e < 0)
		return ffs_error_errno(err, -e, "the geometry of the microVM");
	for (unsigned i = 0; i < n; i++)
		if (vma[i].start <= st.hva && st.hva + st.size <= vma[i].end)
			at = &vma[i];
	memset(geo, 0, sizeof(*geo));
	geo->n_regions = geo->n_ranges = 1;
	geo->memory_size = geo->ranges[0].size = st.size;
	snprintf(r->name, sizeof(r->name), "ram");
	r->hva = d->hva = st.hva;
	r->size = st.size;
	if (!at || ffs_smaps_flags(vmm->proc.pid, st.hva, flags, &r->page_size) < 0 ||
		r->page_size != st.page_size)
		return ffs_error_set(
			err, EPROTO, "the memory that the microVM names is not mapped like that");
	r->mergeable = strstr(flags, "mg") != NULL;
	r->dev = at->dev;
	r->ino = at->ino;
	r->file_offset = at->ino ? at->offset + (st.hva - at->start) : 0;
	r->kind = at->shared ? FFS_REGION_SHARED : at->ino ? FFS_REGION_PRIVATE : FFS_REGION_ANONYMOUS;
	ffs_close_fd(&d->file);
	snprintf(path, sizeof(path), "/proc/%d/map_files/%" PRIx64 "-%" PRIx64, (int)vmm->proc.pid, at->start,
		at->end);
	if (at->shared && (d->file = open(path, O_RDONLY | O_CLOEXEC)) < 0)
		return ffs_error_errno(err, errno, "%s", path);
	return 0;
}

static int m_prepare(struct ffs_vmm *vmm, int vmstate_fd, bool *was_running, struct ffs_error *err)
{
	struct driver *d = (struct driver *)vmm;

	vmm->resumed_by_others = false;
	if (atomic_exchange(&vmm->suspect, false)) {
		/* answers to the watchdog may still come over the old one */
		int sock = connect_to(d->v->dir);

		if (sock < 0)
			return ffs_error_errno(err, -sock, "connecting to the microVM again");
		ffs_close_fd(&d->sock);
		d->sock = sock;
		vmm->socket_generation++;
	}
	d->vmstate_fd = vmstate_fd;
	d->stopped_it = false;
	int e = command(d, "status", -1, ffs_now_ns() + 2 * FFS_NS_PER_S, err);

	*was_running = !atomic_load(&d->paused);
	return e;
}

static int m_pause(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct driver *d = (struct driver *)vmm;

	d->v->stops++;
	d->stopped_it = true;
	return command(d, "pause", -1, deadline_ns, err);
}

static int m_save(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct driver *d = (struct driver *)vmm;

	return command(d, "save", d->vmstate_fd, deadline_ns, err);
}

/* In pieces, with a sign of life in between: under a sanitizer this takes longer than a daemon may stand
 * still. */
static int read_truth(struct driver *d)
{
	for (uint64_t off = 0, len; off < d->v->size; off += len) {
		len = d->v->size - off < 4u << 20 ? d->v->size - off : 4u << 20;
		struct iovec l = {d->v->truth + off, len}, r = {(void *)(uintptr_t)(d->hva + off), len};
		ssize_t n = d->file >= 0 ? ffs_pread_full(d->file, l.iov_base, len, off)
					 : process_vm_readv(d->v->pid, &l, 1, &r, 1, 0);

		if (n != (ssize_t)len)
			return -EIO;
		if (d->head.beat)
			d->head.beat(d->head.beat_arg);
	}
	return 0;
}

static int m_resume(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct driver *d = (struct driver *)vmm;
	uint64_t start = ffs_now_ns();
	int e = d->v->keep_truth ? read_truth(d) : 0;

	d->v->truth_ns = ffs_now_ns() - start;
	if (e < 0)
		return ffs_error_set(err, EIO, "the truth could not be read");
	if (!d->stopped_it)
		return 0;
	d->v->resumes++;
	e = command(d, "resume", -1, deadline_ns + d->v->truth_ns, err);
	if (e == 0)
		d->stopped_it = false;
	return e;
}

static void m_finish(struct ffs_vmm *vmm)
{
}

static enum ffs_run_state m_state(struct ffs_vmm *vmm)
{
	return atomic_load(&((struct driver *)vmm)->paused) ? FFS_RUN_PAUSED : FFS_RUN_RUNNING;
}

static int m_socket(struct ffs_vmm *vmm)
{
	return ((struct driver *)vmm)->sock;
}

static int m_rescue(int sock, uint64_t deadline_ns)
{
	char text[2048];

	return ask(sock, "resume", -1, deadline_ns, text, sizeof(text), NULL);
}

static void m_describe(struct ffs_vmm *vmm, struct json_object *obj)
{
	json_object_object_add(obj, "vmm", json_object_new_string("microvm"));
	json_object_object_add(obj, "accelerator", json_object_new_string("kvm"));
}

const struct ffs_vmm_ops microvm_ops = {.kind = "microvm",
	.connect = m_connect,
	.geometry = m_geometry,
	.prepare = m_prepare,
	.pause = m_pause,
	.save = m_save,
	.resume = m_resume,
	.finish = m_finish,
	.run_state = m_state,
	.socket = m_socket,
	.rescue = m_rescue,
	.describe = m_describe,
	.close = m_close};
