/* Owns nothing: the list is the caller's (in the watchdog's shared page). Called by the thread that takes a
 * branch, and by the watchdog process for a daemon that died or hangs. No locks; system calls of a
 * microsecond each. */
#include "uffd/priority.h"

#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"

/* Above ordinary threads, below the kernel's own and the watchdog. Where vCPUs can keep all CPUs busy they
 * are below the thread that stops them, or it would wait for its turn. Else all are alike: a thread that
 * wakes up does not preempt a vCPU then but goes to another CPU, which spares the vCPU, whose turn is next,
 * the move. */
enum { PRIO_VCPU = 2, PRIO_VMM = 4, PRIO_SELF = 4 };

static void read_comm(pid_t pid, const char *tid, char comm[16])
{
	char path[64], *text = NULL;

	comm[0] = '\0';
	snprintf(path, sizeof(path), "/proc/%d/task/%.12s/comm", (int)pid, tid);
	if (ffs_read_file(path, 64, &text, NULL) == 0)
		snprintf(comm, 16, "%.*s", (int)strcspn(text, "\n"), text);
	free(text);
}

/* The main thread saves and resumes, or one that has a name of its own and is no vCPU by it does:
 * Firecracker's and a cooperating VMM's API thread, QEMU's I/O threads. Names of vCPUs: "CPU 0/KVM" (QEMU,
 * which names its threads only when asked to), "fc_vcpu 0", "vcpu0". A thread that has the process's name, or
 * whose name cannot be read, may be a vCPU. */
static bool is_vcpu(pid_t pid, const char *process, const char *tid)
{
	char comm[16];

	if (atoi(tid) == pid)
		return false;
	read_comm(pid, tid, comm);
	return !comm[0] || strcmp(comm, process) == 0 || strcasestr(comm, "cpu");
}

static void closedirp(DIR **d)
{
	if (*d)
		closedir(*d);
}

void ffs_priority_find(struct ffs_lent *l, pid_t pid)
{
	char path[64], process[16];
	struct dirent *e;

	l->found = 0;
	snprintf(path, sizeof(path), "%d", (int)pid);
	read_comm(pid, path, process);
	snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
	_cleanup_(closedirp) DIR *dir = opendir(path);

	while (dir && l->found < FFS_LENT_THREADS && (e = readdir(dir))) {
		int tid = atoi(e->d_name), policy = tid > 0 ? sched_getscheduler(tid) : -1;
		int base = policy & ~SCHED_RESET_ON_FORK;

		/* who has real-time priority already was given it by its owner */
		if (policy < 0 || (base != SCHED_OTHER && base != SCHED_BATCH && base != SCHED_IDLE))
			continue;
		l->thread[l->found].tid = tid;
		l->thread[l->found].policy = policy;
		l->thread[l->found].vcpu = is_vcpu(pid, process, e->d_name);
		l->found++;
	}
}

static void give_back(struct ffs_lent *l, bool vcpus_only)
{
	const struct sched_param ordinary = {0};
	uint32_t n = atomic_load(&l->n);

	for (uint32_t i = 0; i < n && i < FFS_LENT_THREADS; i++)
		if (l->thread[i].vcpu || !vcpus_only)
			/* fails only for a thread that has ended */
			if (sched_setscheduler(l->thread[i].tid, l->thread[i].policy, &ordinary) < 0)
				errno = 0;
}

static int priority_of_others(const struct ffs_lent *l)
{
	long vcpus = 0;

	for (uint32_t i = 0; i < l->found; i++)
		vcpus += l->thread[i].vcpu;
	return vcpus < sysconf(_SC_NPROCESSORS_ONLN) ? PRIO_VCPU : PRIO_VMM;
}

bool ffs_priority_lend(struct ffs_lent *l)
{
	int others = priority_of_others(l);

	atomic_store(&l->n, l->found);
	for (uint32_t i = 0; i < l->found; i++) {
		struct sched_param p = {.sched_priority = l->thread[i].vcpu ? PRIO_VCPU : others};

		/* a child that the VMM forks meanwhile must not keep it */
		if (sched_setscheduler(l->thread[i].tid, SCHED_RR | SCHED_RESET_ON_FORK, &p) < 0 &&
			errno != ESRCH) {
			ffs_priority_return(l);
			return false;
		}
	}
	return true;
}

void ffs_priority_return_vcpus(struct ffs_lent *l)
{
	give_back(l, true);
}

void ffs_priority_return(struct ffs_lent *l)
{
	give_back(l, false);
	atomic_store(&l->n, 0);
}

bool ffs_priority_self(int above)
{
	struct sched_param p = {.sched_priority = above ? PRIO_SELF + above : 0};

	return sched_setscheduler(0, above ? SCHED_RR | SCHED_RESET_ON_FORK : SCHED_OTHER, &p) == 0;
}
