/* Mappings and memory of a process, read from outside: a child with every kind of guest memory, checked
 * against what it put there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/compat.h"
#include "base/util.h"
#include "guest/maps.h"
#include "guest/memory.h"
#include "guest/touched.h"

#define MIB (1ull << 20)
#define SIZE (16 * MIB)
#define PAGE 4096ull

/* The layout is made here and inherited by the child, which then dirties it: the addresses are known on both
 * sides. */
static int memfd, file_fd, to_child[2], to_parent[2];
static char *shared, *anon, *priv;
static pid_t child;
static struct ffs_proc_id id;

static void child_main(void)
{
	char c;

	/* 1: pages 3, 40 and the last of each */
	while (read(to_child[0], &c, 1) == 1) {
		if (c == 'w') {
			char *base[] = {shared, anon, priv};

			for (unsigned i = 0; i < 3; i++) {
				memset(base[i] + 3 * PAGE, 'a' + (int)i, PAGE);
				memset(base[i] + 40 * PAGE + 100, 'k' + (int)i, 50);
				memset(base[i] + SIZE - PAGE, 'x', PAGE);
			}
		} else if (c == 'u') {
			munmap(anon, SIZE);
		} else if (c == 't') {
			if (ftruncate(memfd, MIB) < 0)
				_exit(3);
		}
		if (write(to_parent[1], &c, 1) != 1)
			_exit(2);
	}
	_exit(0);
}

static void tell(char c)
{
	char back = 0;

	assert_int_equal(write(to_child[1], &c, 1), 1);
	assert_int_equal(read(to_parent[0], &back, 1), 1);
	assert_int_equal(back, c);
}

static int make_file(void)
{
	int fd = memfd_create("test", MFD_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)(SIZE + MIB)), 0);
	return fd;
}

static int setup(void **state)
{
	memfd = make_file();
	file_fd = make_file();
	assert_int_equal(pwrite(file_fd, "from the file", 13, (off_t)(MIB + 5 * PAGE)), 13);
	/* at an offset in its file, so that a forgotten one shows */
	shared = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, (off_t)MIB);
	priv = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file_fd, (off_t)MIB);
	anon = mmap(NULL, SIZE + 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(shared != MAP_FAILED && priv != MAP_FAILED && anon != MAP_FAILED);
	anon += MIB; /* merged with neighbours on both sides */
	assert_int_equal(madvise(anon - MIB, SIZE + 2 * MIB, MADV_NOHUGEPAGE), 0);
	assert_int_equal(pipe2(to_child, O_CLOEXEC), 0);
	assert_int_equal(pipe2(to_parent, O_CLOEXEC), 0);
	child = fork();
	assert_true(child >= 0);
	if (!child) {
		close(to_child[1]);
		close(to_parent[0]);
		child_main();
	}
	close(to_child[0]);
	id.pid = child;
	assert_int_equal(ffs_proc_stat(child, NULL, &id.start), 0);
	return 0;
}

static int teardown(void **state)
{
	close(to_child[1]);
	close(to_parent[0]);
	close(to_parent[1]);
	if (child > 0)
		waitpid(child, NULL, 0);
	munmap(shared, SIZE);
	munmap(priv, SIZE);
	munmap(anon - MIB, SIZE + 2 * MIB);
	close(memfd);
	close(file_fd);
	return 0;
}

static const struct ffs_vma *find(const struct ffs_vma *v, unsigned n, const void *at)
{
	for (unsigned i = 0; i < n; i++)
		if ((uintptr_t)at >= v[i].start && (uintptr_t)at < v[i].end)
			return &v[i];
	return NULL;
}

static void geometry(struct ffs_geometry *geo)
{
	struct stat a, b;

	memset(geo, 0, sizeof(*geo));
	assert_int_equal(fstat(memfd, &a), 0);
	assert_int_equal(fstat(file_fd, &b), 0);
	geo->n_regions = 3;
	geo->memory_size = 3 * SIZE;
	geo->regions[0] = (struct ffs_region){.name = "shared",
		.hva = (uintptr_t)shared,
		.size = SIZE,
		.page_size = PAGE,
		.kind = FFS_REGION_SHARED,
		.dev = a.st_dev,
		.ino = a.st_ino,
		.file_offset = MIB};
	geo->regions[1] = (struct ffs_region){.name = "anon",
		.hva = (uintptr_t)anon,
		.size = SIZE,
		.offset = SIZE,
		.page_size = PAGE,
		.kind = FFS_REGION_ANONYMOUS};
	geo->regions[2] = (struct ffs_region){.name = "private",
		.hva = (uintptr_t)priv,
		.size = SIZE,
		.offset = 2 * SIZE,
		.page_size = PAGE,
		.kind = FFS_REGION_PRIVATE,
		.dev = b.st_dev,
		.ino = b.st_ino,
		.file_offset = MIB};
}

static void maps(void **state)
{
	struct ffs_vma *v = NULL;
	unsigned n = 0;
	struct stat st;
	char flags[128];
	uint64_t page = 0;

	assert_int_equal(ffs_maps_read(child, &v, &n), 0);
	assert_true(n > 5);
	assert_int_equal(fstat(memfd, &st), 0);
	const struct ffs_vma *s = find(v, n, shared), *a = find(v, n, anon);

	assert_non_null(s);
	assert_non_null(a);
	assert_true(s->shared && s->read && s->write && s->dev == st.st_dev && s->ino == st.st_ino &&
		    s->offset == MIB);
	assert_int_equal(strncmp(s->name, "/memfd:test", 11), 0);
	assert_true(!a->shared && a->ino == 0 && !a->name[0] && a->start < (uintptr_t)anon &&
		    a->end > (uintptr_t)anon + SIZE);
	free(v);

	assert_int_equal(ffs_smaps_flags(child, (uintptr_t)anon + 5, flags, &page), 0);
	assert_int_equal(page, PAGE);
	assert_non_null(strstr(flags, "rd wr"));
	assert_int_equal(ffs_smaps_flags(child, 4096, flags, &page), -EFAULT);
	v = NULL;
	assert_int_equal(ffs_maps_read(0x3ffffff, &v, &n), -ESRCH);
	assert_null(v);
	assert_int_equal(ffs_smaps_flags(0x3ffffff, 0, flags, &page), -ESRCH);
}

static uint64_t resident(const char *what)
{
	char path[64], *text, *at;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)child);
	assert_int_equal(ffs_read_file(path, 65536, &text, NULL), 0);
	at = strstr(text, what);
	assert_non_null(at);
	uint64_t kib = strtoull(at + strlen(what), NULL, 10);

	free(text);
	return kib << 10;
}

static void reading(void **state)
{
	struct ffs_geometry geo;
	struct ffs_memory *m = NULL;
	struct ffs_error err = {0};
	static char buf[4 * MIB];
	bool zero;
	struct stat st, st2;

	geometry(&geo);
	assert_int_equal(ffs_memory_open(id, &geo, &m, &err), 0);
	for (unsigned r = 0; r < 2; r++) {
		assert_int_equal(ffs_memory_read(m, r, 0, buf, 65536, &zero), 0);
		assert_true(zero);
	}
	tell('w');
	assert_int_equal(fstat(memfd, &st), 0);
	uint64_t anon_before = resident("RssAnon:");

	for (unsigned r = 0; r < 3; r++) {
		static const size_t unit[] = {4096, 65536, 2 * MIB, 4 * MIB, 100001};

		for (unsigned u = 0; u < FFS_ARRAY_LEN(unit); u++)
			for (uint64_t off = 0; off < SIZE; off += unit[u]) {
				size_t len = off + unit[u] > SIZE ? (size_t)(SIZE - off) : unit[u];

				memset(buf, 0x5a, len);
				assert_int_equal(ffs_memory_read(m, r, off, buf, len, &zero), 0);
				for (uint64_t i = 0; i < len; i++) {
					uint64_t at = off + i, page = at / PAGE;
					char want = 0;

					if (page == 3)
						want = (char)('a' + r);
					else if (at >= 40 * PAGE + 100 && at < 40 * PAGE + 150)
						want = (char)('k' + r);
					else if (page == SIZE / PAGE - 1)
						want = 'x';
					else if (r == 2 && at >= 5 * PAGE && at < 5 * PAGE + 13)
						want = "from the file"[at - 5 * PAGE];
					if ((zero ? 0 : buf[i]) != want || (zero && buf[i] != 0x5a))
						fail_msg("region %u unit %zu offset %" PRIu64
							 ": %d, want %d (zero %d)",
							r, unit[u], at, buf[i], want, zero);
				}
			}
	}
	/* nothing that the child never touched is there now */
	assert_int_equal(fstat(memfd, &st2), 0);
	assert_int_equal(st.st_blocks, st2.st_blocks);
	assert_true(st2.st_blocks <= 3 * 8);
	assert_true(resident("RssAnon:") - anon_before < 64 * PAGE);

	assert_int_equal(ffs_memory_read(m, 3, 0, buf, 1, &zero), -EINVAL);
	assert_int_equal(ffs_memory_read(m, 0, SIZE - 1, buf, 2, &zero), -EINVAL);
	assert_int_equal(ffs_memory_read(m, 0, UINT64_MAX, buf, 2, &zero), -EINVAL);
	ffs_memory_close(m);
}

/* A never-touched page that is write-protected has a marker that pagemap shows as swapped: it must still
 * count as absent. */
static void markers(void **state)
{
	struct ffs_proc_id self = {.pid = getpid()};
	struct ffs_geometry geo;
	struct ffs_memory *m = NULL;
	struct ffs_error err = {0};
	char buf[65536];
	bool zero;
	int u = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (u < 0)
		skip();
	struct uffdio_api api = {.api = UFFD_API,
		.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
			    UFFD_FEATURE_WP_UNPOPULATED};

	assert_int_equal(ioctl(u, UFFDIO_API, &api), 0);
	char *mem = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_true(mem != MAP_FAILED);
	assert_int_equal(madvise(mem, SIZE, MADV_NOHUGEPAGE), 0);
	mem[5 * PAGE] = 'z';
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)mem, .len = SIZE}, .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_writeprotect wp = {
		.range = {.start = (uintptr_t)mem, .len = SIZE}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};

	assert_int_equal(ioctl(u, UFFDIO_REGISTER, &reg), 0);
	assert_int_equal(ioctl(u, UFFDIO_WRITEPROTECT, &wp), 0);
	assert_int_equal(ffs_proc_stat(self.pid, NULL, &self.start), 0);
	memset(&geo, 0, sizeof(geo));
	geo.n_regions = 1;
	geo.regions[0] = (struct ffs_region){.name = "anon",
		.hva = (uintptr_t)mem,
		.size = SIZE,
		.page_size = PAGE,
		.kind = FFS_REGION_ANONYMOUS};
	assert_int_equal(ffs_memory_open(self, &geo, &m, &err), 0);
	assert_int_equal(ffs_memory_read(m, 0, MIB, buf, sizeof(buf), &zero), 0);
	if (geteuid() == 0)
		assert_true(zero);
	assert_int_equal(ffs_memory_read(m, 0, 0, buf, sizeof(buf), &zero), 0);
	assert_false(zero);
	assert_int_equal(buf[5 * PAGE], 'z');
	assert_int_equal(buf[4 * PAGE], 0);
	ffs_memory_close(m);
	close(u);
	munmap(mem, SIZE);
}

static void changes(void **state)
{
	struct ffs_geometry geo;
	struct ffs_memory *m = NULL;
	struct ffs_error err = {0};
	char buf[4096];
	bool zero;

	geometry(&geo);
	assert_int_equal(ffs_memory_open(id, &geo, &m, &err), 0);
	assert_int_equal(ffs_memory_check(m, &err), 0);
	tell('t');
	assert_int_equal(ffs_memory_check(m, &err), -ESTALE);
	assert_non_null(strstr(err.text, "shared"));
	assert_non_null(strstr(err.text, "truncated"));
	assert_int_equal(ffs_memory_read(m, 0, 2 * MIB, buf, sizeof(buf), &zero), -EFAULT);
	assert_int_equal(ftruncate(memfd, (off_t)(SIZE + MIB)), 0);
	tell('w');
	tell('u');
	assert_int_equal(ffs_memory_check(m, &err), -ESTALE);
	assert_non_null(strstr(err.text, "anon"));
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	child = -1;
	assert_int_equal(ffs_memory_check(m, &err), -ESRCH);
	assert_int_equal(ffs_memory_read(m, 1, 3 * PAGE, buf, sizeof(buf), &zero), -ESRCH);
	ffs_memory_close(m);
	assert_int_equal(ffs_memory_open(id, &geo, &m, &err), -ESRCH);
}

/* A process that is killed closes what it has before it becomes a zombie: who sees a connection end by that is told that it
 * has exited, not that it closed the connection. */
static void ends(void **state)
{
	for (unsigned i = 0; i < 300; i++) {
		struct ffs_proc_id dying;
		int pair[2];
		char c;

		assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
		dying.pid = fork();
		assert_true(dying.pid >= 0);
		if (!dying.pid) {
			/* memory that takes a while to go, and more files after the one that is watched */
			for (unsigned n = 0; n < 50; n++)
				if (memfd_create("more", 0) < 0)
					_exit(1);
			for (;;)
				pause();
		}
		close(pair[1]);
		assert_int_equal(ffs_proc_stat(dying.pid, NULL, &dying.start), 0);
		assert_true(ffs_proc_alive(dying));
		assert_int_equal(kill(dying.pid, SIGKILL), 0);
		assert_int_equal(read(pair[0], &c, 1), 0);
		assert_false(ffs_proc_alive(dying));
		close(pair[0]);
		assert_int_equal(waitpid(dying.pid, NULL, 0), dying.pid);
		assert_false(ffs_proc_alive(dying));
	}
}

/* Who names a process chooses what stands before its state in /proc/PID/stat, and a number comes back with another
 * process: neither passes for a process that has ended, or for one that lives. */
static void names_and_numbers(void **state)
{
	struct ffs_proc_id p;
	int ready[2];
	char c;

	assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
	p.pid = fork();
	assert_true(p.pid >= 0);
	if (!p.pid) {
		prctl(PR_SET_NAME, "a) Z (b");
		if (write(ready[1], "", 1) != 1)
			_exit(1);
		for (;;)
			pause();
	}
	assert_int_equal(read(ready[0], &c, 1), 1);
	assert_int_equal(ffs_proc_stat(p.pid, &c, &p.start), 0);
	assert_int_not_equal(c, 'Z');
	assert_true(ffs_proc_alive(p));
	/* the same number, of a process that began earlier */
	assert_false(ffs_proc_alive((struct ffs_proc_id){.pid = p.pid, .start = p.start - 1}));
	assert_int_equal(kill(p.pid, SIGKILL), 0);
	siginfo_t info;

	assert_int_equal(waitid(P_PID, (id_t)p.pid, &info, WEXITED | WNOWAIT), 0);
	assert_int_equal(ffs_proc_stat(p.pid, &c, NULL), 0);
	assert_int_equal(c, 'Z');
	assert_false(ffs_proc_alive(p));
	assert_int_equal(waitpid(p.pid, NULL, 0), p.pid);
	assert_false(ffs_proc_alive(p));
	close(ready[0]);
	close(ready[1]);
}

/* What the child has touched of a file, as the map says it: 64 KiB to a bit. */
static void touched_of(int fd, uint64_t map[5], int expected)
{
	struct ffs_error err = {0};
	struct stat st;

	memset(map, 0, 5 * sizeof(*map));
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(
		ffs_touched_read(child, st.st_dev, st.st_ino, SIZE + MIB, 16 * PAGE, map, &err), expected);
}

/* By the ioctl where the kernel has it, and without. */
static void touched(void **state)
{
	char path[] = "/tmp/forkfs-maps-XXXXXX";
	int rules = mkstemp(path);
	uint64_t map[5];

	assert_true(rules >= 0);
	tell('w');
	for (int again = 0; again < 2; again++) {
		const int files[] = {memfd, file_fd};

		for (unsigned f = 0; f < 2; f++) {
			uint64_t want[5] = {0};

			/* the pages are at an offset of MIB in the file */
			ffs_bit_set(want, 16 + 3 / 16);
			ffs_bit_set(want, 16 + 40 / 16);
			ffs_bit_set(want, 16 + SIZE / PAGE / 16 - 1);
			touched_of(files[f], map, 0);
			for (unsigned i = 0; i < 5; i++)
				assert_int_equal(map[i], want[i]);
		}
		assert_int_equal(write(rules, "pagemap-scan error:ENOTTY\n", 26), 26);
		assert_int_equal(setenv("FORKFS_FAULT_FILE", path, 1), 0);
	}
	int other = make_file();

	touched_of(other, map, -ENOENT);
	close(other);
	assert_int_equal(unsetenv("FORKFS_FAULT_FILE"), 0);
	assert_int_equal(kill(child, SIGKILL), 0);
	assert_int_equal(waitpid(child, NULL, 0), child);
	touched_of(memfd, map, -ESRCH);
	child = 0;
	close(rules);
	assert_int_equal(unlink(path), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(maps, setup, teardown),
		cmocka_unit_test_setup_teardown(reading, setup, teardown),
		cmocka_unit_test(markers),
		cmocka_unit_test_setup_teardown(changes, setup, teardown),
		cmocka_unit_test(ends),
		cmocka_unit_test(names_and_numbers),
		cmocka_unit_test_setup_teardown(touched, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
