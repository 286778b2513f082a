#include "store-scenarios.h"

unsigned char *memories[3];
static int memory_fds[3];

static const char *const ids[] = {"00000000-0000-4000-8000-000000000000",
	"00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"};

int put(struct ffs_store *st, const char *name, unsigned which, enum ffs_store_kind kind, const char *share)
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

static int do_pack(struct ffs_store *st)
{
	int r = ffs_store_convert(st, "sbx1", "b0", FFS_STORE_PACKED, NULL, NULL, NULL);

	return r == 1 ? 0 : r;
}

static int do_unpack(struct ffs_store *st)
{
	int r = ffs_store_convert(st, "sbx1", "b1", FFS_STORE_DENSE, NULL, NULL, NULL);

	return r == 1 ? 0 : r;
}

const struct scenario scenarios[] = {
	{"dense", do_dense, 1, 2, -1},
	{"packed and shared", do_packed, 1, 2, -1},
	{"first of a sandbox", do_first_of_sandbox, 1, 2, -1},
	{"rename", do_rename, 1, 1, -1},
	{"remove", do_remove, 1, 0, -1},
	{"convert to packed", do_pack, 1, 1, 0},
	{"convert to dense", do_unpack, 1, 1, 2},
};
const unsigned n_scenarios = FFS_ARRAY_LEN(scenarios);

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
	seen->dense += ffs_stored_kind(s) == FFS_STORE_DENSE;
	ffs_stored_unref(s);
	if (strcmp(name, "b0") == 0)
		seen->b0 = true;
	else
		seen->branches++;
	return 0;
}

struct seen recover_and_look(const char *path)
{
	struct ffs_error err = {0};
	struct seen seen = {0};
	char name[300];

	assert_ok(ffs_store_open(path, &seen.st, &err), err);
	assert_ok(ffs_store_recover(seen.st, &err), err);
	assert_ok(ffs_store_each(seen.st, NULL, look, &seen, &err), err);
	ffs_store_close(seen.st);
	assert_true(seen.b0);
	for (unsigned i = 0; i < 3; i++) {
		snprintf(name, sizeof(name), "%s/sbx1/b%u.partial", path, i);
		assert_int_equal(access(name, F_OK), -1);
	}
	return seen;
}

void set_up(struct kit *k)
{
	kit_open(k);
	assert_int_equal(put(k->st, "b0", 0, FFS_STORE_DENSE, NULL), 0);
	assert_int_equal(put(k->st, "b1", 2, FFS_STORE_PACKED, NULL), 0);
}

int make_memories(void **state)
{
	for (unsigned i = 0; i < 3; i++)
		memory_fds[i] = make_memory(SIZE, i ? 5 : 1, &memories[i]);
	/* 1 is 2 but for a page */
	memset(memories[1] + 3 * FFS_STORE_CHUNK, 0x5a, 4096);
	return pwrite(memory_fds[1], memories[1] + 3 * FFS_STORE_CHUNK, 4096, 3 * FFS_STORE_CHUNK) == 4096
		       ? 0
		       : -1;
}
