/* Whether the kernel's counts tell that a VMM has its memory for itself: each way in which somebody else
 * could have it makes them say no, and what a VMM does by itself does not. */
#include "foreign-kit.h"

#include <fcntl.h>
#include <sched.h>

#include "guest/foreign-count.h"

/* A VMM whose memory's file is not ours, as in the kit. Where its descriptor is, and which inode: of a shared
 * page. */
static struct own {
	int fd;
	dev_t dev;
	ino_t ino;
} * own;
static char on_tmpfs[80];

enum way {
	KEEPS_IT,      /* the descriptor of its memory stays open */
	CLOSES_IT,     /* only the mapping is left */
	HAS_COPIES,    /* dup(), and a mapping in pieces */
	HAS_READER,    /* and opens it for reading too */
	REOPENED,      /* maps a second open of it, and has closed the first */
	BY_NAME,       /* a file on tmpfs */
	SHARES_TABLE,  /* another process has its table of descriptors */
	SENT_IT,       /* a message with it lies in a socket */
	UNMAPPED_COPY, /* a second open for writing, not mapped */
	PRIVATE_TABLE, /* a thread of it has a table of descriptors of its own, with the memory in it */
	EMPTY_TABLE,   /* a thread has one without it, as KVM's have none */
};

static pid_t sharer_of; /* whose table is shared */

static int shares_files(void *arg)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (!arg && getppid() != sharer_of) /* it ended before that */
		_exit(0);
	if (arg) { /* a table of its own: the test would wait for its copy of the pipe */
		close(target_pipe_[1]);
		if (*(enum way *)arg == EMPTY_TABLE)
			close(own->fd);
		*(enum way *)arg = KEEPS_IT; /* done */
	}
	for (;;)
		pause();
	return 0;
}

static void spawn_sharing(int flags, void *arg)
{
	static char stack[65536] __attribute__((aligned(16)));

	sharer_of = getpid();
	if (clone(shares_files, stack + sizeof(stack), flags, arg) < 0)
		_exit(3);
}

static int reopen(int fd, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	int again = open(path, flags | O_CLOEXEC);

	if (again < 0)
		_exit(4);
	return again;
}

static void leave_in_socket(int fd)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0 || !send_fd(pair[0], 0, fd))
		_exit(5);
}

static void own_vmm(void *arg)
{
	enum way way = *(enum way *)arg;
	int fd = way == BY_NAME ? open(on_tmpfs, O_RDWR | O_CREAT | O_CLOEXEC, 0600)
				: memfd_create("guest-ram", MFD_CLOEXEC);
	struct stat st;

	if (fd < 0 || ftruncate(fd, SIZE) < 0 || fstat(fd, &st) < 0)
		_exit(3);
	if (way == REOPENED) {
		int again = reopen(fd, O_RDWR);

		close(fd);
		fd = again;
	}
	map_at(ram, fd, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	ram[0] = 1;
	*own = (struct own){.fd = fd, .dev = st.st_dev, .ino = st.st_ino};
	switch (way) {
	case CLOSES_IT:
		close(fd);
		break;
	case HAS_COPIES:
		if (dup(fd) < 0 || dup(fd) < 0 || mprotect(ram + 4096, 8192, PROT_READ) < 0)
			_exit(3);
		break;
	case HAS_READER:
		reopen(fd, O_RDONLY);
		break;
	case SHARES_TABLE:
		spawn_sharing(CLONE_FILES | SIGCHLD, NULL);
		break;
	case PRIVATE_TABLE:
	case EMPTY_TABLE:
		spawn_sharing(CLONE_VM | CLONE_THREAD | CLONE_SIGHAND, arg);
		while (*(volatile enum way *)arg == way)
			sched_yield();
		break;
	case SENT_IT:
		leave_in_socket(fd);
		break;
	case UNMAPPED_COPY:
		reopen(fd, O_RDWR);
		break;
	default:
		break;
	}
	rest();
}

static struct ffs_proc_id start_own(enum way way)
{
	target_keep = -1;
	return target_start(own_vmm, &way);
}

static struct ffs_geometry own_geometry(enum ffs_region_kind kind)
{
	struct ffs_geometry geo = geometry(writable);

	geo.regions[0].dev = own->dev;
	geo.regions[0].ino = own->ino;
	geo.regions[0].kind = kind;
	return geo;
}

static int alone(struct ffs_proc_id v)
{
	struct ffs_geometry geo = own_geometry(FFS_REGION_SHARED);

	return ffs_foreign_alone(v, &geo);
}

static int setup_own(void **s)
{
	own = shared_page(sizeof(*own));
	if (setup(s) < 0)
		return -1;
	snprintf(on_tmpfs, sizeof(on_tmpfs), "%s/memory", scratch);
	return 0;
}

static int teardown_own(void **s)
{
	unlink(on_tmpfs);
	return teardown(s);
}

/* A machine whose kernel does not count has nothing to test here. */
static void need_counts(void)
{
	struct ffs_proc_id v = start_own(KEEPS_IT);
	int e = alone(v);

	target_end(v);
	if (e < 0) {
		print_message("SKIP: the kernel does not tell counts of open files here (%s): CAP_BPF, "
			      "CAP_PERFMON, BTF and Linux 6.1 are needed\n",
			strerror(-e));
		skip();
	}
}

static void test_alone(void **s)
{
	static const enum way ways[] = {KEEPS_IT, CLOSES_IT, HAS_COPIES, HAS_READER, BY_NAME,
#ifndef __SANITIZE_THREAD__ /* it must know of all threads */
		EMPTY_TABLE
#endif
	};

	need_counts();
	for (unsigned i = 0; i < FFS_ARRAY_LEN(ways); i++) {
		struct ffs_proc_id v = start_own(ways[i]);

		print_message("way %d\n", ways[i]);
		assert_int_equal(alone(v), 1);
		target_end(v);
		unlink(on_tmpfs);
	}
}

/* Not to be told from somebody else's hold, or one that could be passed on. */
static void test_not_alone(void **s)
{
	static const enum way ways[] = {REOPENED, SHARES_TABLE, SENT_IT, UNMAPPED_COPY,
#ifndef __SANITIZE_THREAD__
		PRIVATE_TABLE
#endif
	};

	need_counts();
	for (unsigned i = 0; i < FFS_ARRAY_LEN(ways); i++) {
		struct ffs_proc_id v = start_own(ways[i]);

		print_message("way %d\n", ways[i]);
		assert_int_equal(alone(v), 0);
		target_end(v);
	}
}

/* ---- another process ---- */

static int taken; /* the VMM's file, in this process */

/* How another process gets at it. */
static void take(struct ffs_proc_id v, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/fd/%d", v.pid, own->fd);
	taken = open(path, flags | O_CLOEXEC);
	assert_true(taken >= 0);
}

static void take_same(struct ffs_proc_id v)
{
	int pidfd = (int)syscall(SYS_pidfd_open, v.pid, 0);

	taken = (int)syscall(SYS_pidfd_getfd, pidfd, own->fd, 0);
	close(pidfd);
	assert_true(taken >= 0);
}

static void other_holds(void *arg)
{
	rest();
}

static void other_maps(void *arg)
{
	map_at(second, taken, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	close(taken);
	rest();
}

/* The VMM is alone, somebody has its memory (`fn`, with `taken`), and has let go of it. */
static void with_taker(struct ffs_proc_id v, void (*fn)(void *), int expected)
{
	keep(taken);
	struct ffs_proc_id o = target_start(fn, NULL);

	close(taken);
	assert_int_equal(alone(v), expected);
	target_end(o);
	assert_int_equal(alone(v), 1);
}

static void test_others(void **s)
{
	static const enum way ways[] = {KEEPS_IT, BY_NAME};

	need_counts();
	for (unsigned i = 0; i < FFS_ARRAY_LEN(ways); i++) {
		struct ffs_proc_id v = start_own(ways[i]);

		assert_int_equal(alone(v), 1);
		take_same(v);
		with_taker(v, other_holds, 0);
		take_same(v);
		with_taker(v, other_maps, 0);
		take(v, O_RDWR);
		with_taker(v, other_holds, 0);
		take(v, O_RDWR);
		with_taker(v, other_maps, 0);
		take(v, O_WRONLY);
		with_taker(v, other_holds, 0);
		take(v, O_RDONLY);
		with_taker(v, other_holds, 1);
		target_end(v);
		unlink(on_tmpfs);
	}
}

/* Of memory that is private only shared mappings of its file matter, as in the look at everybody. */
static void test_private(void **s)
{
	need_counts();
	struct ffs_proc_id v = start_own(KEEPS_IT);
	struct ffs_geometry geo = own_geometry(FFS_REGION_PRIVATE);

	take(v, O_RDWR);
	assert_int_equal(ffs_foreign_alone(v, &geo), 1);
	void *m = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, taken, 0);

	assert_ptr_not_equal(m, MAP_FAILED);
	assert_int_equal(ffs_foreign_alone(v, &geo), 0);
	munmap(m, SIZE);
	close(taken);
	assert_int_equal(ffs_foreign_alone(v, &geo), 1);
	target_end(v);
}

/* What has ended, and memory of another file. */
static void test_nothing(void **s)
{
	need_counts();
	struct ffs_proc_id v = start_own(KEEPS_IT);
	struct ffs_geometry geo = own_geometry(FFS_REGION_SHARED);

	geo.regions[0].ino++;
	assert_int_equal(ffs_foreign_alone(v, &geo), 0);
	target_end(v);
	assert_true(alone(v) <= 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_alone),
		cmocka_unit_test(test_not_alone),
		cmocka_unit_test(test_others),
		cmocka_unit_test(test_private),
		cmocka_unit_test(test_nothing),
	};
	return cmocka_run_group_tests(tests, setup_own, teardown_own);
}
