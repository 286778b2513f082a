/* What the tests of foreign writers share: a VMM that is a child with a memfd, and looks at it. Everything is
 * static: each program has its own. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>

#include "guest/foreign.h"
#include "guest/maps.h"
#include "target.h"

#ifdef __SANITIZE_THREAD__
/* children of these programs, which had threads when they forked, start some themselves */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
	return "die_after_fork=0";
}
#endif

#define MIB (1ull << 20)
#define SIZE (8 * MIB)

/* Made here and inherited, so that both sides know the addresses. `writable` and `readable` are descriptors
 * of one memfd, `other` is of another one. */
static int writable, readable, other;
static uint8_t *ram, *anon, *second;
static char scratch[64];

/* How the other processes are looked at: by the kernel's iterators (where it has them; of mappings only if
 * need be, or always), with its query for mappings, with the text of maps; the whole of them each time, or
 * (`again`) only what has run since the look before. A build without fault points can have the first only. That
 * nobody need be looked at is not among them: these programs hold the memory themselves (test-foreign-count.c). */
static const struct mode {
	const char *name, *rules;
	bool again;
} modes[] = {
	{"BPF", "", true},
	{"BPF, mappings too", "bpf-count error:EIO\n", true},
	{"/proc", "bpf-iter error:EIO\n", false},
	{"text of maps", "bpf-iter error:EIO\nprocmap-query error:EIO\n", false},
	{"/proc, again", "bpf-iter error:EIO\n", true},
};
#ifdef FFS_FAULTS
enum { N_MODES = FFS_ARRAY_LEN(modes) };
#else
enum { N_MODES = 1 }; /* nothing makes it take the others */
#endif
static const struct mode *mode = &modes[0];
static struct ffs_foreign_known *known;

static inline struct ffs_foreign_known **what_is_known(void)
{
	return mode->again ? &known : NULL;
}

static inline void set_faults(const struct mode *m, const char *more)
{
	char path[96];

	snprintf(path, sizeof(path), "%s/faults", scratch);
	FILE *f = fopen(path, "we");

	assert_true(f && fputs(m->rules, f) >= 0 && fputs(more, f) >= 0 && fclose(f) == 0);
	setenv("FORKFS_FAULT_FILE", path, 1);
}

static inline int setup(void **s)
{
	char path[64];

	writable = memfd_create("guest-ram", MFD_CLOEXEC);
	other = memfd_create("guest-ram", MFD_CLOEXEC);
	if (ftruncate(writable, SIZE) < 0 || ftruncate(other, SIZE) < 0)
		return -1;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", writable);
	readable = open(path, O_RDONLY | O_CLOEXEC);
	anon = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	/* only an address: the child maps the memory there */
	ram = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	second = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	snprintf(scratch, sizeof(scratch), "/dev/shm/test-foreign-XXXXXX");
	if (readable < 0 || !mkdtemp(scratch))
		return -1;
	set_faults(mode, "");
	return 0;
}

static inline int teardown(void **s)
{
	char path[96];

	snprintf(path, sizeof(path), "%s/faults", scratch);
	unlink(path);
	munmap(ram, SIZE);
	munmap(second, SIZE);
	munmap(anon, SIZE);
	close(writable);
	close(readable);
	close(other);
	ffs_foreign_known_free(known);
	known = NULL;
	return rmdir(scratch);
}

/* The tests in each mode; how many failed. */
static inline int run_in_modes(const struct CMUnitTest *tests, size_t n)
{
	int failed = 0;

	for (unsigned i = 0; i < N_MODES; i++) {
		mode = &modes[i];
		failed += _cmocka_run_group_tests(mode->name, tests, n, setup, teardown);
	}
	mode = &modes[0];
	return failed;
}

/* ---- the children ---- */

/* A descriptor that only the next child has: it survives target_start()'s closing of the others. */
static inline int keep(int fd)
{
	target_keep = fd;
	return fd;
}

static inline void rest(void)
{
	target_ready();
	for (;;)
		pause();
}

/* A byte, and with it a descriptor (-1: none). */
static inline bool send_fd(int sock, char byte, int fd)
{
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {.align = {.cmsg_len = CMSG_LEN(sizeof(int)),
			     .cmsg_level = SOL_SOCKET,
			     .cmsg_type = SCM_RIGHTS}};
	struct iovec v = {&byte, 1};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};

	memcpy(CMSG_DATA(&control.align), &fd, sizeof(fd));
	if (fd >= 0) {
		m.msg_control = control.buf;
		m.msg_controllen = sizeof(control);
	}
	return sendmsg(sock, &m, 0) == 1;
}

static inline void map_at(void *at, int fd, int prot, int flags, off_t off)
{
	if (mmap(at, SIZE - (size_t)off, prot, flags | MAP_FIXED, fd, off) != at)
		_exit(3);
}

/* What the VMM does beside mapping its memory. */
static void (*vmm_extra)(void);

static inline void vmm(void *arg)
{
	map_at(ram, writable, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	ram[0] = 1;
	if (vmm_extra)
		vmm_extra();
	rest();
}

static inline struct ffs_proc_id start_vmm(void (*extra)(void))
{
	vmm_extra = extra;
	keep(writable);
	return target_start(vmm, NULL);
}

/* ---- looking ---- */

static inline struct ffs_geometry geometry(int fd)
{
	struct ffs_geometry geo = {.n_regions = 1, .n_ranges = 1, .memory_size = SIZE};
	struct ffs_region *r = &geo.regions[0];
	struct stat st;

	snprintf(r->name, sizeof(r->name), "ram0");
	r->hva = (uintptr_t)(fd < 0 ? anon : ram);
	r->size = SIZE;
	r->page_size = 4096;
	r->kind = fd < 0 ? FFS_REGION_ANONYMOUS : FFS_REGION_SHARED;
	if (fd >= 0 && fstat(fd, &st) == 0) {
		r->dev = st.st_dev;
		r->ino = st.st_ino;
	}
	return geo;
}

static struct ffs_foreign f;
static struct ffs_error err;
static uint64_t took;

static inline int look(struct ffs_proc_id vmm_id)
{
	struct ffs_geometry geo = geometry(writable);

	err = (struct ffs_error){0};
	int e = ffs_foreign_scan(vmm_id, &geo, what_is_known(), &f, &took, &err);

	assert_true(took > 0);
	/* a machine may have a process that not even root may look at */
	if (f.n && f.list[f.n - 1].kind == FFS_FOREIGN_UNREADABLE)
		f.n--;
	assert_int_equal(e == -EBUSY, f.refusing > 0);
	return e;
}

static inline void show(void)
{
	for (unsigned i = 0; i < f.n; i++)
		print_message("%s: %s\n", ffs_foreign_kind_name(f.list[i].kind), f.list[i].text);
}

static inline void nothing(struct ffs_proc_id v)
{
	int e = look(v);

	show();
	assert_int_equal(f.n, 0);
	assert_int_equal(e, 0);
}

static inline const struct ffs_foreign_finding *found(enum ffs_foreign_kind kind, pid_t pid)
{
	for (unsigned i = 0; i < f.n; i++)
		if (f.list[i].kind == kind && f.list[i].pid == pid)
			return &f.list[i];
	return NULL;
}

/* One finding of that kind, of that process, in words; nothing else. */
static inline void expect(struct ffs_proc_id v, enum ffs_foreign_kind kind, pid_t pid, const char *word)
{
	char who[32];

	snprintf(who, sizeof(who), "process %d (", pid);
	int e = look(v);

	show();
	assert_int_equal(f.n, 1);
	const struct ffs_foreign_finding *o = found(kind, pid);

	assert_non_null(o);
	assert_non_null(strstr(o->text, who));
	assert_non_null(strstr(o->text, word));
	assert_true(strlen(o->text) < sizeof(o->text) - 1);
	if (kind < FFS_FOREIGN_FIRST_HARMLESS) {
		assert_int_equal(e, -EBUSY);
		assert_string_equal(err.text, o->text);
	} else {
		assert_int_equal(e, 0);
		assert_int_equal(err.code, 0);
	}
}
