/* doctor: userfaultfd in earnest. A child process plays the VMM: its userfaultfd is taken from it by the
 * injection that attach uses, a page of each kind of guest memory is write-protected, and the child writes to
 * it. The write has to wait until we let it go.
 *
 * One thread here and one in the child; pipes order what they do. Every wait has a deadline, at the end the
 * child is killed. */
#include "doctor.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/compat.h"
#include "base/util.h"
#include "uffd/inject.h"
#include "uffd/uffd.h"

#define FFS_DOCTOR_WAIT_NS (5 * FFS_NS_PER_S)
#define FFS_HUGE (2u << 20)

struct sample {
	const char *name;
	unsigned char
		*addr; /* the same in parent and child: mapped before the fork; NULL: not available here */
	size_t size;
	bool shared; /* the parent sees what the child writes */
};

enum { SHARED, SHARED_HOLE, PRIVATE, PRIVATE_HOLE, HUGE_PAGE, N_SAMPLES };

static int map_samples(struct sample *s)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	_cleanup_close_ int fd = memfd_create("forkfs-doctor", MFD_CLOEXEC);
	_cleanup_close_ int huge =
		memfd_create("forkfs-doctor-huge", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);

	if (fd < 0 || ftruncate(fd, (off_t)page * 2))
		return -errno;
	s[SHARED] = (struct sample){"shared memfd", NULL, page, true};
	s[SHARED_HOLE] = (struct sample){"shared memfd, never touched", NULL, page, true};
	s[PRIVATE] = (struct sample){"anonymous", NULL, page, false};
	s[PRIVATE_HOLE] = (struct sample){"anonymous, never touched", NULL, page, false};
	s[HUGE_PAGE] = (struct sample){"hugetlb", NULL, FFS_HUGE, true};
	for (int i = 0; i < N_SAMPLES; i++) {
		int flags = s[i].shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
		int from = i == HUGE_PAGE ? huge : s[i].shared ? fd : -1;
		void *p;

		if (i == HUGE_PAGE && (huge < 0 || ftruncate(huge, FFS_HUGE)))
			continue;
		p = mmap(NULL, s[i].size, PROT_READ | PROT_WRITE, flags, from,
			i == SHARED_HOLE ? (off_t)page : 0);
		if (p == MAP_FAILED) {
			if (i == HUGE_PAGE)
				continue; /* an empty pool */
			return -errno;
		}
		s[i].addr = p;
	}
	return 0;
}

static void unmap_samples(struct sample *s)
{
	for (int i = 0; i < N_SAMPLES; i++)
		if (s[i].addr)
			munmap(s[i].addr, s[i].size);
}

/* The child: touches what is to be present, then for each number it is sent writes to that sample and
 * answers. */
static void __attribute__((noreturn)) play_vmm(struct sample *s, int sock, pid_t parent)
{
	unsigned char which;

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
		_exit(1);
	for (int i = 0; i < N_SAMPLES; i++)
		if (s[i].addr && i != SHARED_HOLE && i != PRIVATE_HOLE)
			s[i].addr[0] = 1;
	which = 0xff;
	do {
		if (send(sock, &which, 1, MSG_NOSIGNAL) != 1)
			break;
		if (recv(sock, &which, 1, 0) != 1)
			break;
		s[which % N_SAMPLES].addr[0] = 2;
	} while (true);
	_exit(0);
}

/* 0 when fd has something to read within the deadline. */
static int await(int fd, uint64_t deadline)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	int r;

	do
		r = poll(&p, 1, ffs_ms_until(deadline));
	while (r < 0 && errno == EINTR);
	return r > 0 ? 0 : r == 0 ? -ETIMEDOUT : -errno;
}

/* Protect, let the child write, see the fault before the write, release, see the write done. */
static int try_sample(int uffd, struct sample *s, unsigned char which, int sock, struct ffs_error *err)
{
	uint64_t addr = (uint64_t)(uintptr_t)s->addr, deadline = ffs_now_ns() + FFS_DOCTOR_WAIT_NS;
	struct pollfd both[2] = {{.fd = uffd, .events = POLLIN}, {.fd = sock, .events = POLLIN}};
	struct uffd_msg msg;
	unsigned char answer;
	int r = ffs_uffd_register(uffd, addr, s->size, err);

	if (r < 0)
		return r;
	r = ffs_uffd_protect(uffd, addr, s->size);
	if (r < 0)
		return ffs_error_errno(err, -r, "UFFDIO_WRITEPROTECT");
	if (send(sock, &which, 1, MSG_NOSIGNAL) != 1)
		return ffs_error_errno(err, errno, "the test's child process");
	do
		r = poll(both, 2, ffs_ms_until(deadline));
	while (r < 0 && errno == EINTR);
	if (r <= 0)
		return ffs_error_set(err, ETIMEDOUT, "a write was neither trapped nor done");
	if (both[1].revents)
		return ffs_error_set(err, EIO, "a write passed the protection untrapped");
	if (read(uffd, &msg, sizeof(msg)) != sizeof(msg) || msg.event != UFFD_EVENT_PAGEFAULT ||
		!(msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP))
		return ffs_error_set(err, EIO, "the event of a write is no write-protect fault");
	if (s->shared && s->addr[0] == 2)
		return ffs_error_set(err, EIO, "the write was done before it was let go");
	r = ffs_uffd_unprotect(uffd, addr, s->size);
	if (r < 0)
		return ffs_error_errno(err, -r, "UFFDIO_WRITEPROTECT (release)");
	r = await(sock, deadline);
	if (r < 0 || recv(sock, &answer, 1, 0) != 1)
		return ffs_error_set(err, EIO, "the write was not let go");
	if (s->shared && s->addr[0] != 2)
		return ffs_error_set(err, EIO, "the write did not arrive");
	return 0;
}

static void try_all(struct ffs_doctor *d, int uffd, struct sample *s, int sock)
{
	struct ffs_error err = {0};

	if (ffs_uffd_api(uffd, &err) < 0) {
		ffs_doctor_line(d, FFS_FINDING_FAIL, "write protection",
			"boot Linux 6.4 or later with CONFIG_USERFAULTFD", "%s", err.text);
		return;
	}
	for (unsigned char i = 0; i < N_SAMPLES; i++) {
		struct ffs_error why = {0};

		if (!s[i].addr)
			continue;
		if (try_sample(uffd, &s[i], i, sock, &why) < 0) {
			ffs_doctor_line(d, i == HUGE_PAGE ? FFS_FINDING_WARN : FFS_FINDING_FAIL,
				"write protection",
				i == HUGE_PAGE ? "do not give guests hugetlb memory"
					       : "this kernel cannot branch a running VM",
				"%s page: %s", s[i].name, why.text);
			return; /* a write that waits would answer for the next sample */
		}
		ffs_doctor_line(d, FFS_FINDING_OK, "write protection", NULL,
			"%s page: the write waited and was let go", s[i].name);
	}
}

void ffs_doctor_uffd(struct ffs_doctor *d)
{
	_cleanup_close_ int uffd = -1;
	struct sample s[N_SAMPLES] = {0};
	struct ffs_spawner *spawner = NULL;
	struct ffs_proc_id id = {0};
	struct ffs_error err = {0};
	int pair[2] = {-1, -1}, r;
	unsigned char ready;
	pid_t parent = getpid();
	uint64_t began;

	r = map_samples(s);
	if (!r && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		r = -errno;
	if (r < 0) {
		ffs_doctor_line(d, FFS_FINDING_FAIL, "userfaultfd", NULL, "the test could not be set up: %s",
			strerror(-r));
		unmap_samples(s);
		return;
	}
	fflush(stdout);
	id.pid = fork();
	if (!id.pid) {
		close(pair[0]);
		play_vmm(s, pair[1], parent);
	}
	close(pair[1]);
	if (id.pid < 0 || await(pair[0], ffs_now_ns() + FFS_DOCTOR_WAIT_NS) < 0 ||
		recv(pair[0], &ready, 1, 0) != 1 || ffs_proc_stat(id.pid, NULL, &id.start) < 0) {
		ffs_doctor_line(
			d, FFS_FINDING_FAIL, "userfaultfd", NULL, "the test's child process did not start");
		goto out;
	}
	r = ffs_spawner_start(&spawner, &err);
	began = ffs_now_ns();
	if (!r)
		r = ffs_inject_userfaultfd(spawner, id, FFS_DOCTOR_WAIT_NS, &uffd, &err);
	if (r < 0) {
		ffs_doctor_line(d, FFS_FINDING_FAIL, "userfaultfd",
			"see 'ptrace scope' and 'userfaultfd rights' above; in a container, allow "
			"userfaultfd and ptrace in its seccomp "
			"profile",
			"not to be had from another process: %s", err.text);
		goto out;
	}
	ffs_doctor_line(d, FFS_FINDING_OK, "userfaultfd", NULL,
		"taken from a child process by injection in %.2f ms", (double)(ffs_now_ns() - began) / 1e6);
	try_all(d, uffd, s, pair[0]);
out:
	if (id.pid > 0) {
		kill(id.pid, SIGKILL);
		while (waitpid(id.pid, NULL, 0) < 0 && errno == EINTR)
			;
	}
	if (spawner)
		ffs_spawner_stop(spawner);
	close(pair[0]);
	unmap_samples(s);
}
