/* doctor: FUSE, passthrough, and whether passthrough is safe from writers, each tried on a tiny file system
 * of one sealed file.
 *
 * Everything happens in a process of its own with a private mount namespace: nobody else sees the mount, and
 * it is gone with the process. That process is the client; its child is the server (doctor-fuse-server.c).
 * They share a page of counters. The doctor waits with a deadline and then kills the whole process group,
 * which ends a hung mount too.
 *
 * Protocol: include/uapi/linux/fuse.h. */
#include "doctor-fuse.h"
#include "doctor.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

#define FFS_DOCTOR_WAIT_NS (10 * FFS_NS_PER_S)
#define FFS_TEST_BYTE 0x5a

/* ---- the client ---- */

static bool all_as_sealed(const unsigned char *p, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (p[i] != FFS_TEST_BYTE)
			return false;
	return true;
}

/* Try to change the file through fd in each way there is. What is refused is right; what is not shows in the
 * bytes. */
static void attack(int fd)
{
	unsigned char *p;

	if (pwrite(fd, "!", 1, 10) == 1)
		fsync(fd);
	if (!ftruncate(fd, 100))
		fsync(fd);
	if (!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096))
		fsync(fd);
	p = mmap(NULL, FFS_TEST_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p != MAP_FAILED) {
		p[20] = '!';
		msync(p, FFS_TEST_BYTES, MS_SYNC);
		munmap(p, FFS_TEST_BYTES);
	}
}

static void client(int file, struct ffs_fuse_findings *f)
{
	unsigned char *map, *buf = malloc(FFS_TEST_BYTES);
	_cleanup_close_ int fd = open(FFS_TEST_FILE, O_RDONLY | O_CLOEXEC), rw = -1;
	_cleanup_free_ void *owned = buf;
	struct stat a, b;

	if (fd < 0 || !buf || ffs_pread_full(fd, buf, FFS_TEST_BYTES, 0) != FFS_TEST_BYTES) {
		f->client_errno = errno ? errno : EIO;
		return;
	}
	map = mmap(NULL, FFS_TEST_BYTES, PROT_READ, MAP_PRIVATE, fd, 0);
	f->passed = all_as_sealed(buf, FFS_TEST_BYTES) && map != MAP_FAILED &&
		    all_as_sealed(map, FFS_TEST_BYTES) && !f->reads;
	if (map != MAP_FAILED)
		munmap(map, FFS_TEST_BYTES);
	attack(fd);

	rw = open(FFS_TEST_FILE, O_RDWR | O_CLOEXEC);
	if (rw >= 0) {
		f->second_node = f->writer_opens && !fstat(fd, &a) && !fstat(rw, &b) && a.st_ino == b.st_ino;
		map = mmap(NULL, FFS_TEST_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, rw, 0);
		if (map != MAP_FAILED) {
			f->private_map = all_as_sealed(map, FFS_TEST_BYTES);
			map[30] = '!';
			munmap(map, FFS_TEST_BYTES);
		}
		attack(rw);
	}
	f->changed = ffs_pread_full(file, buf, FFS_TEST_BYTES, 0) != FFS_TEST_BYTES ||
		     !all_as_sealed(buf, FFS_TEST_BYTES);
	f->done = 1;
}

/* The process of its own: a namespace, the mount, the server, the client. */
static void __attribute__((noreturn)) session(struct ffs_fuse_findings *f, int file, pid_t parent)
{
	_cleanup_close_ int dev = -1;
	char options[120];
	pid_t server, self = getpid();

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent || setpgid(0, 0))
		_exit(1);
	dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (dev < 0 || unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
		f->mount_errno = errno;
		_exit(0);
	}
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=%u,group_id=%u", dev, geteuid(),
		getegid());
	if (mount("forkfs-doctor", FFS_TEST_DIR, "fuse.forkfs-doctor", MS_NOSUID | MS_NODEV, options)) {
		f->mount_errno = errno;
		_exit(0);
	}
	f->mount_errno = 0;
	server = fork();
	if (!server)
		ffs_doctor_fuse_serve(dev, file, f, self);
	ffs_close_fd(&dev); /* the server's is the only one: its death ends the session */
	if (server > 0)
		client(file, f);
	_exit(0);
}

/* ---- the doctor ---- */

static int sealed_file(void)
{
	_cleanup_close_ int fd = memfd_create("forkfs-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	unsigned char page[4096];

	memset(page, FFS_TEST_BYTE, sizeof(page));
	for (uint64_t off = 0; fd >= 0 && off < FFS_TEST_BYTES; off += sizeof(page))
		if (ffs_pwrite_full(fd, page, sizeof(page), off) != sizeof(page))
			return -1;
	if (fd < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL))
		return -1;
	return ffs_steal_fd(&fd);
}

static void run_session(struct ffs_fuse_findings *f, int file)
{
	_cleanup_close_ int pidfd = -1;
	pid_t parent = getpid(), pid;
	struct pollfd p;

	fflush(stdout);
	pid = fork();
	if (!pid)
		session(f, file, parent);
	if (pid < 0)
		return;
	pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	p = (struct pollfd){.fd = pidfd, .events = POLLIN};
	if (pidfd >= 0) {
		uint64_t deadline = ffs_now_ns() + FFS_DOCTOR_WAIT_NS;

		while (poll(&p, 1, ffs_ms_until(deadline)) < 0 && errno == EINTR)
			;
	}
	kill(-pid, SIGKILL);
	kill(pid, SIGKILL);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

/* Without the right to mount: what can be told from outside. */
static void report_unprivileged(struct ffs_doctor *d)
{
	_cleanup_close_ int dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	int code = errno;
	struct stat st;
	bool helper = !stat("/usr/bin/fusermount3", &st) && (st.st_mode & S_ISUID);

	if (dev < 0)
		ffs_doctor_line(d, FFS_FINDING_FAIL, "FUSE",
			"modprobe fuse; in a container, give it --device /dev/fuse", "/dev/fuse: %s",
			strerror(code));
	else if (!helper)
		ffs_doctor_line(d, FFS_FINDING_FAIL, "FUSE",
			"install fuse3 (fusermount3, setuid), or run as root",
			"/dev/fuse is there, but this user may not mount");
	else
		ffs_doctor_line(d, FFS_FINDING_OK, "FUSE", NULL, "this user mounts by fusermount3");
	ffs_doctor_line(d, FFS_FINDING_WARN, "passthrough", "run forkfs mount as root",
		"needs CAP_SYS_ADMIN: complete branches are read through the page cache");
}

static void report(struct ffs_doctor *d, const struct ffs_fuse_findings *f)
{
	bool changed = f->changed;

	if (f->mount_errno == ENOENT || f->mount_errno == ENODEV || f->mount_errno == ENXIO) {
		ffs_doctor_line(d, FFS_FINDING_FAIL, "FUSE",
			"modprobe fuse; in a container, give it --device /dev/fuse", "%s",
			strerror(f->mount_errno));
		return;
	}
	if (f->mount_errno || f->client_errno || !f->done) {
		int code = f->mount_errno > 0 ? f->mount_errno : f->client_errno;

		ffs_doctor_line(d, FFS_FINDING_FAIL, "FUSE", NULL, "a test mount %s: %s",
			f->mount_errno ? "failed" : "does not work",
			code ? strerror(code) : "no answer within 10 s");
		return;
	}
	ffs_doctor_line(d, FFS_FINDING_OK, "FUSE", NULL, "a test mount answers");
	if (f->passed)
		ffs_doctor_line(d, FFS_FINDING_OK, "passthrough", NULL,
			"reads and mappings went straight to the backing file");
	else if (!f->offered)
		ffs_doctor_line(d, FFS_FINDING_WARN, "passthrough",
			"boot Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH",
			"not in this kernel: complete branches are read through the page cache");
	else
		ffs_doctor_line(d, FFS_FINDING_WARN, "passthrough",
			"run forkfs mount as root in the initial user namespace",
			"refused (%s): complete branches are read through the page cache",
			f->backing_errno ? strerror(f->backing_errno) : "reads still reached the server");
	if (changed)
		ffs_doctor_line(d, FFS_FINDING_FAIL, "write safety",
			"mount with -o passthrough=off, and report it",
			"a client changed a sealed file through the test mount");
	else if (!f->second_node || !f->private_map)
		ffs_doctor_line(d, FFS_FINDING_WARN, "write safety", "start QEMU children with readonly=on",
			"no byte was changed, but an open for reading and writing %s",
			f->second_node ? "cannot be mapped privately" : "did not get a node of its own");
	else
		ffs_doctor_line(d, FFS_FINDING_OK, "write safety", NULL,
			"write, truncate, punch and shared mappings changed no byte; O_RDWR gets a node of "
			"its own");
}

void ffs_doctor_fuse(struct ffs_doctor *d)
{
	_cleanup_close_ int file = sealed_file();
	struct ffs_fuse_findings *f =
		mmap(NULL, sizeof(*f), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (file < 0 || f == MAP_FAILED) {
		ffs_doctor_line(d, FFS_FINDING_FAIL, "FUSE", NULL, "the test could not be set up: %s",
			strerror(errno));
		return;
	}
	f->mount_errno = -1;
	run_session(f, file);
	if (f->mount_errno == EPERM || f->mount_errno == EACCES)
		report_unprivileged(d);
	else
		report(d, f);
	munmap(f, sizeof(*f));
}
