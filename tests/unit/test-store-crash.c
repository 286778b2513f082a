/* What a crash, an error or a full disk leaves of a publish, a rename, a removal: the old state or the new one, whole.
 *
 * The store's operations are recorded through its table of operations, and replayed into fresh directories: every
 * prefix, and prefixes from which those operations are missing (or half done) that no sync had made durable by then.
 * Then each operation fails in turn. */
#include "store-kit.h"

#include <ftw.h>
#include <sys/mount.h>

#define SIZE (640 * KIB + 100)
#define MAX_OPS 400
#define VARIANTS 24

/* ---- recording
 * ---------------------------------------------------------------------------------------------------------- */

enum what { MKDIR, CREATE, WRITE, ALLOCATE, FSYNC, RENAME, LINK, UNLINK, RMDIR };

struct op {
	enum what what;
	char path[300], to[300]; /* relative to the scratch directory */
	unsigned char *data;
	size_t len;
	uint64_t off;
};

static struct op ops[MAX_OPS];
static unsigned n_ops;
static char root[64];
static int fail_at = -1, fail_with, calls;

static bool failing(void)
{
	return fail_at >= 0 && calls++ == fail_at;
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

static int rec_rename(int dir, const char *from, const char *to, bool replace)
{
	if (failing())
		return -fail_with;
	int r = ffs_store_ops_real.rename(dir, from, to, replace);

	if (!r)
		path_of(dir, to, record(RENAME, dir, from)->to);
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

static const struct ffs_store_ops recorder = {
	.mkdir = rec_mkdir,
	.create = rec_create,
	.write = rec_write,
	.allocate = rec_allocate,
	.fsync = rec_fsync,
	.rename = rec_rename,
	.link = rec_link,
	.unlink = rec_unlink,
};

static void forget(void)
{
	while (n_ops)
		free(ops[--n_ops].data);
}

/* ---- scenarios
 * ---------------------------------------------------------------------------------------------------------- */

static unsigned char *memories[3];
static int memory_fds[3];

static const char *const ids[] = {"00000000-0000-4000-8000-000000000000", "00000000-0000-4000-8000-000000000001",
	"00000000-0000-4000-8000-000000000002"};

static int put(struct ffs_store *st, const char *name, unsigned which, enum ffs_store_kind kind, const char *share)
{
	struct json_object *o = make_manifest(ids[which], SIZE);
	int vmstate = make_vmstate();
	struct ffs_stored *parent = NULL;
	struct ffs_draft *d = NULL;
	struct ffs_error err = {0};
	int r = share ? ffs_stored_open(st, "sbx1", share, &parent, &err) : 0;

	if (!r)
		r = ffs_draft_begin(st, "sbx1", name, &d, &err);
	if (!r)
		r = ffs_draft_memory(d, memory_fds[which], SIZE, kind, parent, NULL, &err);
	if (!r)
		r = ffs_draft_file(d, "vmstate", vmstate, &err);
	if (!r)
		r = ffs_draft_disk(d, "vda", vmstate, NULL, &err);
	if (!r)
		r = ffs_store_publish(d, o, NULL, &err);
	ffs_draft_end(d);
	ffs_stored_unref(parent);
	json_object_put(o);
	close(vmstate);
	return r;
}

static int do_dense(struct ffs_store *st)
{
	return put(st, "b2", 1, FFS_STORE_DENSE, NULL);
}

static int do_packed(struct ffs_store *st)
{
	return put(st, "b2", 1, FFS_STORE_PACKED, "b1");
}

static int do_first_of_sandbox(struct ffs_store *st)
{
	struct ffs_draft *d = NULL;
	struct json_object *o = make_manifest(ids[1], SIZE);
	int vmstate = make_vmstate(), r = ffs_draft_begin(st, "sbx2", "b2", &d, NULL);

	if (!r)
		r = ffs_draft_memory(d, memory_fds[1], SIZE, FFS_STORE_DENSE, NULL, NULL, NULL);
	if (!r)
		r = ffs_draft_file(d, "vmstate", vmstate, NULL);
	if (!r)
		r = ffs_store_publish(d, o, NULL, NULL);
	ffs_draft_end(d);
	json_object_put(o);
	close(vmstate);
	return r;
}

static int do_rename(struct ffs_store *st)
{
	return ffs_store_rename(st, "sbx1", "b1", "b3", NULL);
}

static int do_remove(struct ffs_store *st)
{
	int r = ffs_store_remove(st, "sbx1", "b1", NULL);

	return r ? r : ffs_store_reap(st, "sbx1", NULL);
}

static const struct scenario {
	const char *name;
	int (*run)(struct ffs_store *st);
	unsigned before, after; /* branches, beside b0, which is always there */
	bool by_rename; /* the one there is may have either name */
} scenarios[] = {
	{"dense", do_dense, 1, 2, false},
	{"packed and shared", do_packed, 1, 2, false},
	{"first of a sandbox", do_first_of_sandbox, 1, 2, false},
	{"rename", do_rename, 1, 1, true},
	{"remove", do_remove, 1, 0, false},
};

/* ---- looking at what is left
 * --------------------------------------------------------------------------------------------- */

struct seen {
	struct ffs_store *st;
	unsigned branches, failed;
	bool b0;
};

static int look(void *arg, const char *sandbox, const char *name, enum ffs_store_entry entry)
{
	struct seen *seen = arg;
	struct ffs_stored *s = NULL;
	struct ffs_error err = {0};

	if (entry == FFS_STORE_ENTRY_FAILED) {
		seen->failed++;
		return 0;
	}
	assert_ok(ffs_stored_open(seen->st, sandbox, name, &s, &err), err);
	assert_ok(ffs_stored_verify(s, NULL, &err), err);
	check_memory(s, memories[ffs_stored_id(s)[35] - '0'], SIZE);
	ffs_stored_unref(s);
	if (strcmp(name, "b0") == 0)
		seen->b0 = true;
	else
		seen->branches++;
	return 0;
}

/* Open the store as a daemon would; every branch in it is whole. */
static struct seen recover_and_look(const char *path)
{
	struct ffs_error err = {0};
	struct seen seen = {0};
	char name[300];

	assert_ok(ffs_store_open(path, &seen.st, &err), err);
	assert_ok(ffs_store_recover(seen.st, &err), err);
	assert_ok(ffs_store_each(seen.st, NULL, look, &seen, &err), err);
	ffs_store_close(seen.st);
	assert_true(seen.b0);
	snprintf(name, sizeof(name), "%s/sbx1/b2.partial", path);
	assert_int_equal(access(name, F_OK), -1);
	return seen;
}

/* The store before: b0 dense, b1 packed. */
static void set_up(struct kit *k)
{
	kit_open(k);
	snprintf(root, sizeof(root), "%s", k->dir);
	assert_int_equal(put(k->st, "b0", 0, FFS_STORE_DENSE, NULL), 0);
	assert_int_equal(put(k->st, "b1", 2, FFS_STORE_PACKED, NULL), 0);
}

/* ---- replaying
 * ---------------------------------------------------------------------------------------------------------- */

static char replay_dir[64];
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

/* Is what op i did durable after the first n? The file's content by a sync of it; its name by one of its directory. */
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

/* Carry out an operation; `part`: only half of a write. What it needs may be missing: then nothing happens. */
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
		(void)!renameat(dir, o->path, dir, o->to);
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

static unsigned roll(unsigned n)
{
	chance = chance * 1664525 + 1013904223;
	return (chance >> 16) % n;
}

/* The state after n operations and a crash. variant 0: all of them have got to the disk; 1: only what a sync made
 * durable; else: some of the others, by chance. False: it is the same as another variant. */
static bool replay(unsigned n, unsigned variant)
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

static void check_replay(const struct scenario *sc, unsigned n)
{
	char path[100];

	snprintf(path, sizeof(path), "%s/st", replay_dir);
	struct seen seen = recover_and_look(path);

	if (seen.branches != sc->before && seen.branches != sc->after)
		fail_msg("%s: after %u of %u operations there are %u branches", sc->name, n, n_ops, seen.branches);
	if (n == n_ops && seen.branches != sc->after)
		fail_msg("%s: done, and a crash brings the old state back", sc->name);
}

static void test_every_crash(void **state)
{
	unsigned replays = 0;

	for (unsigned i = 0; i < FFS_ARRAY_LEN(scenarios); i++) {
		const struct scenario *sc = &scenarios[i];
		char before[64];
		struct kit k;

		set_up(&k);
		/* the state before, for replays: hard links of files that never change */
		snprintf(before, sizeof(before), "/dev/shm/forkfs-before-XXXXXX");
		assert_non_null(mkdtemp(before));
		assert_int_equal(rmdir(before), 0);
		snprintf(replay_dir, sizeof(replay_dir), "%s", before);
		copy_from = k.dir;
		assert_int_equal(nftw(k.dir, copy_entry, 16, FTW_PHYS), 0);
		ffs_store_ops = &recorder;
		assert_int_equal(sc->run(k.st), 0);
		ffs_store_ops = &ffs_store_ops_real;
		assert_true(n_ops > 1);
		copy_from = before;
		chance = 7;
		for (unsigned n = 0; n <= n_ops; n++)
			for (unsigned v = 0; v < VARIANTS; v++) {
				if (replay(n, v)) {
					check_replay(sc, n);
					replays++;
				} else {
					v = VARIANTS;
				}
				assert_int_equal(ffs_store_remove_tree(AT_FDCWD, replay_dir), 0);
			}
		forget();
		assert_int_equal(ffs_store_remove_tree(AT_FDCWD, before), 0);
		kit_close(&k);
	}
	print_message("%u crashes\n", replays);
	assert_true(replays > 1000);
}

/* A control: the order is what keeps it whole. A publish whose files were never synced is torn by some crash. */
static void test_replay_can_tell(void **state)
{
	bool torn = false;
	char before[64], path[100];
	struct kit k;

	set_up(&k);
	snprintf(before, sizeof(before), "/dev/shm/forkfs-before-XXXXXX");
	assert_non_null(mkdtemp(before));
	assert_int_equal(rmdir(before), 0);
	snprintf(replay_dir, sizeof(replay_dir), "%s", before);
	copy_from = k.dir;
	assert_int_equal(nftw(k.dir, copy_entry, 16, FTW_PHYS), 0);
	ffs_store_ops = &recorder;
	assert_int_equal(do_dense(k.st), 0);
	ffs_store_ops = &ffs_store_ops_real;
	for (unsigned i = 0; i < n_ops; i++)
		if (ops[i].what == FSYNC && strstr(ops[i].path, "memory.bin"))
			snprintf(ops[i].path, sizeof(ops[i].path), "nothing");
	copy_from = before;
	chance = 7;
	for (unsigned v = 0; v < VARIANTS && !torn; v++) {
		struct ffs_store *st = NULL;
		struct ffs_stored *s = NULL;

		replay(n_ops, v);
		snprintf(path, sizeof(path), "%s/st", replay_dir);
		assert_int_equal(ffs_store_open(path, &st, NULL), 0);
		if (ffs_stored_open(st, "sbx1", "b2", &s, NULL) < 0 || ffs_stored_verify(s, NULL, NULL) < 0)
			torn = true;
		ffs_stored_unref(s);
		ffs_store_close(st);
		assert_int_equal(ffs_store_remove_tree(AT_FDCWD, replay_dir), 0);
	}
	assert_true(torn);
	forget();
	assert_int_equal(ffs_store_remove_tree(AT_FDCWD, before), 0);
	kit_close(&k);
}

/* ---- errors
 * ------------------------------------------------------------------------------------------------------------ */

static void test_every_error(void **state)
{
	static const int codes[] = {EIO, ENOSPC};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(scenarios); i++)
		for (unsigned c = 0; c < FFS_ARRAY_LEN(codes); c++)
			for (int at = 0;; at++) {
				const struct scenario *sc = &scenarios[i];
				struct kit k;

				set_up(&k);
				ffs_store_ops = &recorder;
				fail_at = at;
				fail_with = codes[c];
				calls = 0;
				int r = sc->run(k.st);
				bool reached = calls > at;

				fail_at = -1;
				ffs_store_ops = &ffs_store_ops_real;
				forget();
				struct seen seen = recover_and_look(k.path);

				if (seen.branches != sc->before && seen.branches != sc->after)
					fail_msg("%s: operation %d failed: %u branches", sc->name, at, seen.branches);
				if (!r && seen.branches != sc->after)
					fail_msg("%s: operation %d failed, nothing was said", sc->name, at);
				if (r && sc->after > sc->before && seen.branches == sc->after)
					fail_msg("%s: operation %d failed, and it was published", sc->name, at);
				kit_close(&k);
				if (!reached)
					break;
			}
}

/* A file system that is too small, by every amount. */
static void test_every_size(void **state)
{
	bool fits = false;
	char data[32];
	struct kit k;

	kit_open(&k);
	ffs_store_close(k.st);
	for (unsigned kib = 1400; !fits; kib += 68) {
		snprintf(data, sizeof(data), "size=%uk", kib);
		if (mount("none", k.path, "tmpfs", 0, data) < 0) {
			print_message("a tmpfs cannot be mounted here\n");
			break;
		}
		assert_int_equal(ffs_store_open(k.path, &k.st, NULL), 0);
		int b0 = put(k.st, "b0", 0, FFS_STORE_DENSE, NULL);
		int b1 = b0 ? b0 : put(k.st, "b1", 2, FFS_STORE_PACKED, NULL);
		int b2 = b1 ? b1 : do_packed(k.st);

		ffs_store_close(k.st);
		assert_true(!b2 || b2 == -ENOSPC);
		if (!b0) {
			struct seen seen = recover_and_look(k.path);

			assert_int_equal(seen.branches, !b1 + !b2);
			assert_int_equal(seen.failed, 0);
		}
		fits = !b2;
		assert_int_equal(umount(k.path), 0);
	}
	assert_int_equal(ffs_store_open(k.path, &k.st, NULL), 0);
	kit_close(&k);
}

static int make_memories(void **state)
{
	for (unsigned i = 0; i < 3; i++)
		memory_fds[i] = make_memory(SIZE, i ? 5 : 1, &memories[i]);
	/* 1 is 2 but for a page */
	memset(memories[1] + 3 * FFS_STORE_CHUNK, 0x5a, 4096);
	return pwrite(memory_fds[1], memories[1] + 3 * FFS_STORE_CHUNK, 4096, 3 * FFS_STORE_CHUNK) == 4096 ? 0 : -1;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_crash),
		cmocka_unit_test(test_replay_can_tell),
		cmocka_unit_test(test_every_error),
		cmocka_unit_test(test_every_size),
	};

	return cmocka_run_group_tests(tests, make_memories, NULL);
}
