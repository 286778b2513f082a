/* Compares what the VMM itself holds of its memory's files with what the kernel counts.
 *
 * Owns nothing. Any thread, no locks.
 *
 * Why the counts are enough. An open file (struct file) counts whoever holds it: descriptors, mappings,
 * messages in a socket, io_uring's tables. So when the VMM's own descriptors and mappings of it are as many,
 * nobody else has one of that file. Other files of the same inode, if they can be written, were opened by a
 * name (that of /proc too), which the inode counts (i_writecount); only the one that came with
 * memfd_create(2) was not. So the VMM must have that one itself, or the inode have a name in a directory and
 * so never have had one. A table of descriptors that another process shares (CLONE_FILES) counts who has it.
 *
 * Whatever takes a file in passing makes a count larger, never smaller, and so costs a look at everybody.
 * What the VMM opens and closes meanwhile could make up for somebody else: its descriptors are read before
 * and after. */
#include "guest/foreign-count.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/util.h"
#include "guest/foreign-bpf.h"
#include "guest/foreign-walk.h"

#define FILES_MAX 32u /* open files of guest memory in one VMM; with more, everybody is looked at */

/* An open file that the VMM has open or mapped. */
struct use {
	uint64_t file, ino, dev;
	uint64_t held, refs; /* by the VMM; by all */
	bool writes, named;  /* may write; was opened by a name for it */
};

struct inode {
	uint64_t ino, dev;
	bool by_file; /* who has it open for writing can change guest memory; of a private region only its
			 mappings count */
	/* what the kernel last said */
	bool seen;
	int64_t own, shared; /* mappings that are shared and may write: the VMM's, all */
	int64_t writers;     /* opens for writing by a name */
	uint64_t links;
};

/* What one reading of an iterator has told. */
struct tally {
	struct use use[FILES_MAX];
	struct inode inode[FFS_MAX_REGIONS];
	unsigned uses, inodes;
	uint64_t sharers; /* threads of the VMM that share its table of descriptors */
	bool odd;         /* too many files, or somebody else has that table */
};

static struct inode *inode_of(struct tally *t, uint64_t dev, uint64_t ino)
{
	for (unsigned i = 0; i < t->inodes; i++)
		if (t->inode[i].ino == ino && t->inode[i].dev == dev)
			return &t->inode[i];
	return NULL;
}

static void begin(struct tally *t, const struct ffs_geometry *geo, uint64_t sharers)
{
	memset(t, 0, sizeof(*t));
	t->sharers = sharers;
	for (unsigned k = 0; k < geo->n_regions; k++) {
		const struct ffs_region *r = &geo->regions[k];
		struct inode *i = inode_of(t, r->dev, r->ino);

		if (!r->ino)
			continue;
		if (!i) {
			i = &t->inode[t->inodes++];
			*i = (struct inode){.ino = r->ino, .dev = r->dev};
		}
		i->by_file |= r->kind == FFS_REGION_SHARED;
	}
}

static struct use *find(struct tally *t, uint64_t file)
{
	for (unsigned i = 0; i < t->uses; i++)
		if (t->use[i].file == file)
			return &t->use[i];
	return NULL;
}

static void add(struct tally *t, const struct ffs_bpf_record *r, bool mapping)
{
	const uint64_t writable = FFS_VM_SHARED | FFS_VM_MAYWRITE;
	struct inode *i = inode_of(t, r->dev, r->ino);
	struct use *u = find(t, r->file);

	/* A thread without a table (KVM has some), or with one of its own, shows all mappings once more. What
	 * only its own table has is missing from the VMM's count, so that it looks like somebody else's. */
	if (r->tid != r->tgid)
		return;
	t->odd |= !i || r->sharers != t->sharers || (!u && t->uses == FILES_MAX);
	if (t->odd)
		return;
	if (!u) {
		u = &t->use[t->uses++];
		*u = (struct use){.file = r->file, .ino = r->ino, .dev = r->dev};
	}
	u->held++;
	u->refs = r->refs;
	u->writes = r->mode & FFS_FMODE_WRITE;
	u->named = r->mode & FFS_FMODE_WRITER;
	i->seen = true;
	i->own += mapping && (r->vm_flags & writable) == writable;
	i->shared = (int32_t)r->shared;
	i->writers = r->writers;
	i->links = r->links;
}

struct threads {
	pid_t pid;
	uint64_t sharers;
};

static int add_thread(void *arg, int dir, const char *number)
{
	struct threads *t = arg;

	t->sharers += syscall(SYS_kcmp, t->pid, atoi(number), KCMP_FILES, 0, 0) == 0;
	return 0;
}

/* How many threads of the VMM share its table of descriptors; none where the kernel will not say. */
static int count_sharers(pid_t pid, uint64_t *sharers)
{
	struct threads t = {.pid = pid};
	char path[48];

	snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
	_cleanup_close_ int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int e = dir < 0 ? -errno : ffs_foreign_each(dir, add_thread, &t);

	*sharers = t.sharers;
	return e;
}

static int read_all(struct tally *t, struct ffs_proc_id vmm, const struct ffs_geometry *geo,
	enum ffs_bpf_what what, uint64_t sharers)
{
	struct ffs_bpf_record rec[32];
	_cleanup_close_ int iter = ffs_bpf_iter_open(geo, what, vmm.pid);
	int n;

	begin(t, geo, sharers);
	if (iter < 0)
		return iter;
	while ((n = ffs_bpf_iter_read(iter, rec, FFS_ARRAY_LEN(rec))) > 0)
		for (int i = 0; i < n; i++)
			add(t, &rec[i], what == FFS_BPF_MAPPINGS);
	return n;
}

static bool same(struct tally *a, struct tally *b)
{
	for (unsigned i = 0; i < a->uses; i++) {
		const struct use *u = find(b, a->use[i].file);

		if (!u || u->held != a->use[i].held)
			return false;
	}
	return a->uses == b->uses;
}

/* Does the VMM account for all who could write this inode? */
static bool accounted(const struct inode *i, struct tally *mapped, struct tally *open)
{
	bool first = i->links >
		     0; /* the file that came with the inode is among the VMM's, or there never was one */
	int64_t named = 0;

	if (!i->seen || i->own != i->shared)
		return false;
	for (unsigned k = 0; k < mapped->uses && i->by_file; k++) {
		const struct use *u = &mapped->use[k], *o = find(open, u->file);

		if (u->ino != i->ino || u->dev != i->dev || !u->writes)
			continue;
		if (u->refs != u->held + (o ? o->held : 0))
			return false;
		named += u->named;
		first |= !u->named;
	}
	/* of a file that is open and not mapped the iterator's own hold could not be told from another's */
	for (unsigned k = 0; k < open->uses && i->by_file; k++) {
		const struct use *u = &open->use[k];

		if (u->ino == i->ino && u->dev == i->dev && u->writes && !find(mapped, u->file))
			return false;
	}
	return !i->by_file || (first && named == i->writers);
}

struct looks {
	struct tally before, mapped, after;
};

int ffs_foreign_alone(struct ffs_proc_id vmm, const struct ffs_geometry *geo)
{
	_cleanup_free_ struct looks *l = malloc(sizeof(*l));
	int e = l ? 0 : -ENOMEM;
	uint64_t sharers = 0;

	if (!ffs_bpf_counts() || FFS_FAULT("bpf-alone") < 0)
		return -ENOTSUP;
	if (e == 0)
		e = count_sharers(vmm.pid, &sharers);
	if (e == 0)
		e = read_all(&l->before, vmm, geo, FFS_BPF_FILES, sharers);
	if (e == 0)
		e = read_all(&l->mapped, vmm, geo, FFS_BPF_MAPPINGS, sharers);
	if (e == 0)
		e = read_all(&l->after, vmm, geo, FFS_BPF_FILES, sharers);
	if (e < 0)
		return e;
	bool alone = !l->before.odd && !l->mapped.odd && !l->after.odd && same(&l->before, &l->after);

	for (unsigned i = 0; i < l->mapped.inodes && alone; i++)
		alone = accounted(&l->mapped.inode[i], &l->mapped, &l->after);
	return alone;
}
