#include "fake-vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <x86intrin.h>

#include "base/fault.h"
#include "base/util.h"

#define MAX_WRITERS 16

struct fake_shared {
	_Atomic uint64_t writes[MAX_WRITERS];
	_Atomic uint32_t pause, parked, writers;
};

/* ---- the child ---- */

static struct fake_shared *sh;
static struct fake_vmm *me;

static uint8_t *at(uint64_t offset)
{
	for (unsigned i = 0; i < me->n_regions; i++)
		if (offset - me->region[i].offset < me->region[i].size)
			return (uint8_t *)(uintptr_t)(me->region[i].hva + offset - me->region[i].offset);
	abort();
}

static void *writer(void *arg)
{
	uint64_t id = (uintptr_t)arg, seed = (id + 1) * 0x9e3779b97f4a7c15ull + 1, n = 0;
	uint64_t pages = me->size / 4096, seq = seed % pages;

	for (;;) {
		if (atomic_load(&sh->pause)) {
			atomic_fetch_add(&sh->parked, 1);
			while (atomic_load(&sh->pause))
				poll(NULL, 0, 1);
			atomic_fetch_sub(&sh->parked, 1);
			continue;
		}
		seed ^= seed << 13;
		seed ^= seed >> 7;
		seed ^= seed << 17;
		uint64_t page = (n & 3) ? seed % pages : (seq = (seq + 1) % pages);

		n++;
		/* the last eighth is never touched: holes must stay holes */
		if (page >= pages - pages / 8)
			continue;
		/* a time stamp: a branch that is wrong can say by how much, and in which direction */
		atomic_store_explicit(&((_Atomic uint64_t *)at(page * 4096))[(seed >> 40) % 512], __rdtsc(),
			memory_order_relaxed);
		atomic_fetch_add_explicit(&sh->writes[id], 1, memory_order_relaxed);
	}
	return NULL;
}

static void discard(uint64_t offset, uint64_t len)
{
	madvise(at(offset), len, me->memfd >= 0 ? MADV_REMOVE : MADV_DONTNEED);
}

static void serve(int sock, unsigned writers)
{
	char c;
	ssize_t n;

	/* EINTR: the injection of a system call may interrupt us, as it may any VMM */
	while ((n = recv(sock, &c, 1, 0)) == 1 || (n < 0 && errno == EINTR)) {
		if (n < 0)
			continue;
		if (c == 'p') {
			atomic_store(&sh->pause, 1);
			while (atomic_load(&sh->parked) != writers)
				poll(NULL, 0, 1); /* with a priority lent to us we must not spin */
		} else if (c == 'c') {
			atomic_store(&sh->pause, 0);
			while (atomic_load(&sh->parked) != 0)
				poll(NULL, 0, 1);
		} else if (c == 's') {
			/* saving device state writes guest memory, as real devices do */
			((uint64_t *)at(0))[1]++;
			((uint64_t *)at(4096 * 33))[7]++;
		} else if (c == 'd') {
			discard(FAKE_DISCARD_AT, 65536);
		} else if (c == 'D') {
			discard(FAKE_DISCARD_PAGE, 4096);
		} else if (c == 'h' && fallocate(me->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					       FAKE_DISCARD_PAGE, 4096) < 0) {
			break;
		} else if (c == 'q') {
			c = atomic_load(&sh->pause) ? 'P' : 'R';
		}
		if (send(sock, &c, 1, 0) != 1)
			break;
	}
}

static void child(int sock, unsigned writers)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* the engine's sockets must not live on in here */
	if (me->memfd >= 0 && dup2(me->memfd, 100) != 100)
		_exit(1);
	if (dup2(sock, 101) != 101 || close_range(3, 99, 0) < 0 || close_range(102, ~0u, 0) < 0)
		_exit(1);
	me->memfd = me->memfd >= 0 ? 100 : -1;
	for (unsigned i = 0; i < writers; i++) {
		pthread_t t;

		if (pthread_create(&t, NULL, writer, (void *)(uintptr_t)i))
			_exit(1);
	}
	atomic_store(&sh->writers, writers);
	serve(101, writers);
	_exit(0);
}

/* ---- the test's side ---- */

static bool map_regions(struct fake_vmm *f, enum fake_memory kind)
{
	const uint64_t gap = 4u << 20;

	if (kind != FAKE_ANONYMOUS) {
		f->memfd = memfd_create("fake-guest", MFD_CLOEXEC | (kind == FAKE_HUGETLB ? MFD_HUGETLB : 0));
		if (f->memfd < 0 || ftruncate(f->memfd, (off_t)f->size) < 0)
			return false;
	}
	for (unsigned i = 0; i < f->n_regions; i++) {
		uint64_t size = f->region[i].size;
		/* a hole on either side: neighbours would become one mapping */
		uint8_t *p = mmap(NULL, size + 2 * gap, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (p == MAP_FAILED)
			return false;
		p = (void *)(((uintptr_t)p + gap) & ~(uintptr_t)(gap / 2 - 1));
		int flags = MAP_FIXED | (f->memfd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);

		if (mmap(p, size, PROT_READ | PROT_WRITE, flags, f->memfd,
			    f->memfd < 0 ? 0 : (off_t)f->region[i].offset) == MAP_FAILED)
			return false;
		if (f->memfd < 0)
			madvise(p, size, MADV_NOHUGEPAGE);
		f->region[i].hva = (uintptr_t)p;
	}
	return true;
}

/* A test that failed does not come to its end: what it started must not eat the CPU of the next. */
static pid_t left_over[8];

static void note(pid_t gone, pid_t started)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(left_over); i++)
		if (left_over[i] == gone) {
			left_over[i] = started;
			return;
		}
}

void fake_vmm_stop_left_over(void)
{
	for (unsigned i = 0; i < FFS_ARRAY_LEN(left_over); i++)
		if (left_over[i]) {
			kill(left_over[i], SIGKILL);
			waitpid(left_over[i], NULL, 0);
			left_over[i] = 0;
		}
}

bool fake_vmm_start_regions(struct fake_vmm *f, enum fake_memory kind, const uint64_t *sizes,
	unsigned n_regions, unsigned writers)
{
	int sv[2];

	memset(f, 0, sizeof(*f));
	f->page_size = kind == FAKE_HUGETLB ? 2u << 20 : 4096;
	f->memfd = -1;
	f->keep_truth = true;
	for (f->n_regions = 0; f->n_regions < n_regions; f->n_regions++) {
		f->region[f->n_regions].size = sizes[f->n_regions];
		f->region[f->n_regions].offset = f->size;
		f->size += sizes[f->n_regions];
	}
	if (!map_regions(f, kind)) {
		if (f->memfd >= 0)
			close(f->memfd);
		return false;
	}
	f->truth = mmap(NULL, f->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	f->shared = mmap(NULL, sizeof(*f->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (f->truth == MAP_FAILED || f->shared == MAP_FAILED ||
		socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv))
		return false;
	f->pid = fork();
	if (f->pid < 0)
		return false;
	if (f->pid == 0) {
		static struct fake_vmm own;

		own = *f;
		me = &own;
		sh = f->shared;
		child(sv[1], writers);
	}
	note(0, f->pid);
	close(sv[1]);
	f->sock = sv[0];
	/* another mapping here would be a foreign writer */
	for (unsigned i = 0; i < f->n_regions; i++)
		munmap((void *)(uintptr_t)f->region[i].hva, f->region[i].size);
	while (atomic_load(&f->shared->writers) != writers)
		sched_yield();
	return true;
}

bool fake_vmm_start(struct fake_vmm *f, enum fake_memory kind, uint64_t size, unsigned writers)
{
	return fake_vmm_start_regions(f, kind, &size, 1, writers);
}

void fake_vmm_stop(struct fake_vmm *f)
{
	kill(f->pid, SIGKILL);
	waitpid(f->pid, NULL, 0);
	note(f->pid, 0);
	close(f->sock);
	if (f->memfd >= 0)
		close(f->memfd);
	munmap(f->truth, f->size);
	munmap(f->shared, sizeof(*f->shared));
}

uint64_t fake_vmm_progress(struct fake_vmm *f)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < MAX_WRITERS; i++)
		n += atomic_load(&f->shared->writes[i]);
	return n;
}

bool fake_vmm_runs(struct fake_vmm *f, unsigned ms)
{
	uint64_t deadline = ffs_now_ns() + ms * FFS_NS_PER_MS, n[MAX_WRITERS];
	unsigned writers = atomic_load(&f->shared->writers);

	for (unsigned i = 0; i < writers; i++)
		n[i] = atomic_load(&f->shared->writes[i]);
	while (ffs_now_ns() < deadline) {
		unsigned moved = 0;

		for (unsigned i = 0; i < writers; i++)
			moved += atomic_load(&f->shared->writes[i]) > n[i] + 100;
		if (moved == writers)
			return true;
		poll(NULL, 0, 1);
	}
	return false;
}

bool fake_vmm_protected(struct fake_vmm *f)
{
	char path[64], line[512];
	bool found = false;

	snprintf(path, sizeof(path), "/proc/%d/smaps", f->pid);
	FILE *s = fopen(path, "re");

	while (s && fgets(line, sizeof(line), s))
		if (strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " uw"))
			found = true;
	if (s)
		fclose(s);
	return found;
}

/* ---- the driver ---- */

struct fake {
	struct ffs_vmm head;
	struct fake_vmm *f;
	int vmstate_fd;
	bool sent_stop;
};

static struct fake_vmm *selected;

void fake_vmm_select(struct fake_vmm *f)
{
	selected = f;
}

/* An answer that is late belongs to a command that was given up. */
static char ask(int sock, char c, uint64_t deadline_ns)
{
	char r = 0;
	struct pollfd p = {.fd = sock, .events = POLLIN};

	if (send(sock, &c, 1, MSG_NOSIGNAL) != 1)
		return 0;
	while (r != c && !(c == 'q' && (r == 'P' || r == 'R')))
		if (poll(&p, 1, ffs_ms_until(deadline_ns)) != 1 || recv(sock, &r, 1, MSG_DONTWAIT) != 1)
			return 0;
	return r;
}

bool fake_vmm_tell(struct fake_vmm *f, char command)
{
	return ask(f->sock, command, ffs_now_ns() + 10 * FFS_NS_PER_S) != 0;
}

bool fake_vmm_read_truth(struct fake_vmm *f, void (*beat)(void *), void *arg)
{
	/* in pieces, with a sign of life in between: under a sanitizer this takes longer than a daemon may
	 * stand still */
	for (unsigned i = 0; i < f->n_regions; i++)
		for (uint64_t off = 0; off < f->region[i].size; off += 4u << 20) {
			uint64_t left = f->region[i].size - off, len = left < 4u << 20 ? left : 4u << 20;
			uint8_t *to = f->truth + f->region[i].offset + off;
			struct iovec l = {to, len}, r = {(void *)(uintptr_t)(f->region[i].hva + off), len};
			ssize_t n = f->memfd >= 0
					    ? ffs_pread_full(f->memfd, to, len, f->region[i].offset + off)
					    : process_vm_readv(f->pid, &l, 1, &r, 1, 0);

			if (n != (ssize_t)len)
				return false;
			if (beat)
				beat(arg);
		}
	return true;
}

static int f_connect(const struct ffs_attach_options *opt, struct ffs_cancel *cancel, struct ffs_vmm **out,
	struct ffs_error *err)
{
	int e = FFS_FAULT("vmm-connect");

	if (e)
		return ffs_error_set(err, -e, "fault point vmm-connect");
	struct fake *v = calloc(1, sizeof(*v));

	v->head.ops = &fake_vmm_ops;
	v->head.proc.pid = selected->pid;
	v->f = selected;
	ffs_proc_stat(selected->pid, NULL, &v->head.proc.start);
	*out = &v->head;
	return 0;
}

static int f_geometry(struct ffs_vmm *vmm, struct ffs_geometry *geo, struct ffs_error *err)
{
	struct fake_vmm *f = ((struct fake *)vmm)->f;
	struct stat st = {0};

	memset(geo, 0, sizeof(*geo));
	if (f->memfd >= 0 && fstat(f->memfd, &st) < 0)
		return -errno;
	geo->n_regions = geo->n_ranges = f->n_regions;
	geo->memory_size = f->size;
	for (unsigned i = 0; i < f->n_regions; i++) {
		struct ffs_region *r = &geo->regions[i];

		snprintf(r->name, sizeof(r->name), "ram%u", i);
		r->hva = f->region[i].hva;
		r->size = f->region[i].size;
		r->offset = f->region[i].offset;
		r->page_size = f->page_size;
		r->kind = f->memfd >= 0 ? FFS_REGION_SHARED : FFS_REGION_ANONYMOUS;
		r->dev = st.st_dev;
		r->ino = st.st_ino;
		r->file_offset = f->memfd >= 0 ? r->offset : 0;
		geo->ranges[i] = (struct ffs_gpa_range){
			.gpa = r->offset + (i << 30), .size = r->size, .offset = r->offset};
	}
	return 0;
}

static int f_prepare(struct ffs_vmm *vmm, int vmstate_fd, bool *was_running, struct ffs_error *err)
{
	struct fake *v = (struct fake *)vmm;
	int e = FFS_FAULT("vmm-prepare");

	if (e)
		return ffs_error_set(err, -e, "fault point vmm-prepare");
	v->vmstate_fd = vmstate_fd;
	v->sent_stop = false;
	vmm->resumed_by_others = false;
	char state = ask(v->f->sock, 'q', ffs_now_ns() + FFS_NS_PER_S);

	*was_running = state == 'R';
	return state ? 0 : ffs_error_set(err, EIO, "the fake does not answer");
}

static int f_pause(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct fake *v = (struct fake *)vmm;
	int e = FFS_FAULT("vmm-pause");

	if (e)
		return ffs_error_set(err, -e, "fault point vmm-pause");
	v->f->stops++;
	v->sent_stop = true;
	if (v->f->ignore_stop || !ask(v->f->sock, 'p', deadline_ns))
		return ffs_error_set(err, ETIMEDOUT, "the fake did not stop");
	return 0;
}

static int f_save(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct fake *v = (struct fake *)vmm;
	int e = FFS_FAULT("vmm-save");

	if (e)
		return ffs_error_set(err, -e, "fault point vmm-save");
	if (!ask(v->f->sock, 's', deadline_ns) || pwrite(v->vmstate_fd, "state", 5, 0) != 5)
		return ffs_error_set(err, EIO, "the fake did not save");
	return 0;
}

static int f_resume(struct ffs_vmm *vmm, uint64_t deadline_ns, struct ffs_error *err)
{
	struct fake *v = (struct fake *)vmm;
	struct fake_vmm *f = v->f;
	int e = FFS_FAULT("vmm-resume");

	if (e)
		return ffs_error_set(err, -e, "fault point vmm-resume");
	if (!v->sent_stop) {
		/* found stopped: the truth all the same */
		if (f->keep_truth && atomic_load(&f->shared->pause) &&
			!fake_vmm_read_truth(f, vmm->beat, vmm->beat_arg))
			return ffs_error_set(err, EIO, "no truth");
		return 0;
	}
	if (f->fail_resumes) {
		f->fail_resumes--;
		return ffs_error_set(err, EIO, "the fake was told not to resume");
	}
	if (!atomic_load(&f->shared->pause) && !f->ignore_stop)
		vmm->resumed_by_others = true;
	else if (f->keep_truth && !fake_vmm_read_truth(f, vmm->beat, vmm->beat_arg))
		return ffs_error_set(err, EIO, "no truth");
	if (f->reconnect_on_resume)
		vmm->socket_generation++;
	if (!ask(f->sock, 'c', deadline_ns))
		return ffs_error_set(err, EIO, "the fake did not resume");
	f->resumes++;
	v->sent_stop = false;
	return 0;
}

static void f_finish(struct ffs_vmm *vmm)
{
}

static enum ffs_run_state f_state(struct ffs_vmm *vmm)
{
	return atomic_load(&((struct fake *)vmm)->f->shared->pause) ? FFS_RUN_PAUSED : FFS_RUN_RUNNING;
}

static int f_socket(struct ffs_vmm *vmm)
{
	return ((struct fake *)vmm)->f->sock;
}

static int f_rescue(int sock, uint64_t deadline_ns)
{
	return ask(sock, 'c', deadline_ns) ? 0 : -EIO;
}

static void f_describe(struct ffs_vmm *vmm, struct json_object *obj)
{
	json_object_object_add(obj, "vmm", json_object_new_string("fake"));
}

static void f_close(struct ffs_vmm *vmm)
{
	free(vmm);
}

const struct ffs_vmm_ops fake_vmm_ops = {.kind = "fake",
	.connect = f_connect,
	.geometry = f_geometry,
	.prepare = f_prepare,
	.pause = f_pause,
	.save = f_save,
	.resume = f_resume,
	.finish = f_finish,
	.run_state = f_state,
	.socket = f_socket,
	.rescue = f_rescue,
	.describe = f_describe,
	.close = f_close};
