#include "store-record.h"

#include <ftw.h>

/* ---- recording ---- */

struct op ops[MAX_OPS];
unsigned n_ops;
static char root[64];
static int fail_op = -1, fail_read = -1, fail_with, calls, reads;
static bool failed;

void record_begin(const struct kit *k)
{
	snprintf(root, sizeof(root), "%s", k->dir);
	ffs_store_ops = &recorder;
}

void fail_at(int at, int code)
{
	fail_op = at;
	fail_read = -1;
	fail_with = code;
	calls = 0;
	failed = false;
}

void fail_read_at(int at, int code)
{
	fail_at(-1, code);
	fail_read = at;
	reads = 0;
}

bool has_failed(void)
{
	return failed;
}

static bool failing(void)
{
	if (fail_op < 0 || calls++ != fail_op)
		return false;
	failed = true;
	return true;
}

static bool failing_read(void)
{
	if (fail_read < 0 || reads++ != fail_read)
		return false;
	failed = true;
	return true;
}

/* The path of a descriptor, and a name in it, below the scratch directory. */
static void path_of(int fd, const char *name, char out[300])
{
	char link[40], full[400];

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, full, sizeof(full) - 1);

	assert_true(n > 0);
	full[n] = '\0';
	assert_int_equal(strncmp(full, root, strlen(root)), 0);
	snprintf(out, 300, "%.200s%s%.90s", full + strlen(root) + 1, name ? "/" : "", name ? name : "");
}

static struct op *record(enum what what, int fd, const char *name)
{
	assert_true(n_ops < MAX_OPS);
	struct op *o = &ops[n_ops++];

	*o = (struct op){.what = what};
	path_of(fd, name, o->path);
	return o;
}

static int rec_mkdir(int dir, const char *name)
{
	if (failing())
		return -fail_with;
	int r = ffs_store_ops_real.mkdir(dir, name);

	if (!r)
		record(MKDIR, dir, name);
	return r;
}

static int rec_create(int dir, const char *name)
{
	if (failing())
		return -fail_with;
	int r = ffs_store_ops_real.create(dir, name);

	if (r >= 0)
		record(CREATE, dir, name);
	return r;
}

static int rec_write(int fd, const void *buf, size_t len, uint64_t off)
{
	if (failing()) {
		/* a part of it gets there */
		assert_int_equal(ffs_store_ops_real.write(fd, buf, len / 2, off), 0);
		return -fail_with;
	}
	struct op *o = record(WRITE, fd, NULL);

	o->data = malloc(len ? len : 1);
	memcpy(o->data, buf, len);
	o->len = len;
	o->off = off;
	return ffs_store_ops_real.write(fd, buf, len, off);
}

static int rec_allocate(int fd, uint64_t size)
{
	if (failing())
		return -fail_with;
	record(ALLOCATE, fd, NULL)->off = size;
	return ffs_store_ops_real.allocate(fd, size);
}

static int rec_fsync(int fd)
{
	if (failing())
		return -fail_with;
	record(FSYNC, fd, NULL);
	return 0; /* nothing of this is to survive the test */
}

static int rec_rename(int dir, const char *from, const char *to, enum ffs_rename how)
{
	if (failing())
		return -fail_with;
	int r = ffs_store_ops_real.rename(dir, from, to, how);

	if (!r) {
		struct op *o = record(RENAME, dir, from);

		o->off = how;
		path_of(dir, to, o->to);
	}
	return r;
}

static int rec_link(int from_dir, const char *from, int dir, const char *to)
{
	if (failing())
		return -fail_with;
	int r = ffs_store_ops_real.link(from_dir, from, dir, to);

	if (!r)
		path_of(dir, to, record(LINK, from_dir, from)->to);
	return r;
}

static int rec_unlink(int dir, const char *name, bool directory)
{
	if (failing())
		return -fail_with;
	int r = ffs_store_ops_real.unlink(dir, name, directory);

	if (!r)
		record(directory ? RMDIR : UNLINK, dir, name);
	return r;
}

static ssize_t rec_pread(int fd, void *buf, size_t len, uint64_t off)
{
	return failing_read() ? -fail_with : ffs_store_ops_real.pread(fd, buf, len, off);
}

static ssize_t rec_read(int fd, void *buf, size_t len)
{
	return failing_read() ? -fail_with : ffs_store_ops_real.read(fd, buf, len);
}

const struct ffs_store_ops recorder = {
	.mkdir = rec_mkdir,
	.create = rec_create,
	.write = rec_write,
	.allocate = rec_allocate,
	.fsync = rec_fsync,
	.rename = rec_rename,
	.link = rec_link,
	.unlink = rec_unlink,
	.pread = rec_pread,
	.read = rec_read,
};

void forget(void)
{
	while (n_ops)
		free(ops[--n_ops].data);
}

/* ---- replaying ---- */

char replay_dir[64];
static char before[64];
static const char *copy_from;

static int copy_entry(const char *path, const struct stat *st, int type, struct FTW *f)
{
	char to[600];

	snprintf(to, sizeof(to), "%s%s", replay_dir, path + strlen(copy_from));
	if (type == FTW_D)
		assert_true(mkdir(to, 0700) == 0 || errno == EEXIST);
	else
		assert_int_equal(link(path, to), 0);
	return 0;
}

static const char *parent_of(const char *path, char out[300])
{
	snprintf(out, 300, "%s", path);
	*strrchr(out, '/') = '\0';
	return out;
}

/* Is what op i did durable after the first n? The file's content by a sync of it; its name by one of its
 * directory. */
static bool durable(unsigned i, unsigned n)
{
	char want[300];
	bool content = ops[i].what == WRITE || ops[i].what == ALLOCATE;

	if (content)
		snprintf(want, sizeof(want), "%s", ops[i].path);
	else
		parent_of(ops[i].what == LINK ? ops[i].to : ops[i].path, want);
	for (unsigned k = i + 1; k < n; k++)
		if (ops[k].what == FSYNC && strcmp(ops[k].path, want) == 0)
			return true;
	return false;
}

/* Carry out an operation; `part`: only half of a write. What it needs may be missing: then nothing happens.
 */
static void apply(const struct op *o, bool part)
{
	int dir = open(replay_dir, O_RDONLY | O_DIRECTORY), fd;

	switch (o->what) {
	case MKDIR:
		(void)!mkdirat(dir, o->path, 0700);
		break;
	case CREATE:
		fd = openat(dir, o->path, O_CREAT | O_RDWR, 0600);
		if (fd >= 0)
			close(fd);
		break;
	case WRITE:
	case ALLOCATE:
		fd = openat(dir, o->path, O_RDWR);
		if (fd >= 0 && o->what == WRITE)
			(void)!pwrite(fd, o->data, part ? o->len / 2 : o->len, (off_t)o->off);
		else if (fd >= 0)
			(void)!ftruncate(fd, (off_t)o->off);
		if (fd >= 0)
			close(fd);
		break;
	case RENAME:
		(void)!renameat2(
			dir, o->path, dir, o->to, o->off == FFS_RENAME_EXCHANGE ? RENAME_EXCHANGE : 0);
		break;
	case LINK:
		(void)!linkat(dir, o->path, dir, o->to, 0);
		break;
	case UNLINK:
	case RMDIR:
		(void)!unlinkat(dir, o->path, o->what == RMDIR ? AT_REMOVEDIR : 0);
		break;
	case FSYNC:
		break;
	}
	close(dir);
}

static uint32_t chance;

void save_before(const struct kit *k)
{
	snprintf(before, sizeof(before), "/dev/shm/forkfs-before-XXXXXX");
	assert_non_null(mkdtemp(before));
	assert_int_equal(rmdir(before), 0);
	snprintf(replay_dir, sizeof(replay_dir), "%s", before);
	copy_from = k->dir;
	assert_int_equal(nftw(k->dir, copy_entry, 16, FTW_PHYS), 0);
	copy_from = before;
	chance = 7;
}

void drop_before(void)
{
	assert_int_equal(ffs_store_remove_tree(AT_FDCWD, before), 0);
}

void drop_replay(void)
{
	assert_int_equal(ffs_store_remove_tree(AT_FDCWD, replay_dir), 0);
}

static unsigned roll(unsigned n)
{
	chance = chance * 1664525 + 1013904223;
	return (chance >> 16) % n;
}

bool replay(unsigned n, unsigned variant)
{
	bool loose = false;

	snprintf(replay_dir, sizeof(replay_dir), "/dev/shm/forkfs-replay-XXXXXX");
	assert_non_null(mkdtemp(replay_dir));
	assert_int_equal(nftw(copy_from, copy_entry, 16, FTW_PHYS), 0);
	for (unsigned i = 0; i < n; i++) {
		bool part = false;

		if (ops[i].what != FSYNC && !durable(i, n)) {
			loose = true;
			if (variant == 1 || (variant > 1 && roll(3) == 0))
				continue;
			part = variant > 1 && roll(4) == 0;
		}
		apply(&ops[i], part);
	}
	return variant == 0 || loose;
}
