/* The project's own microVM (tests/microvm) in a test: started, restored, talked to, and driven by the engine
 * through microvm_ops. Its driver records the truth: what the memory holds while the guest is stopped, read
 * by the test's own code. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmm/vmm.h"

struct microvm {
	pid_t pid;
	int sock;     /* the test's own connection; the driver has another */
	char dir[64]; /* control socket, serial port, messages */
	uint64_t size;
	uint8_t *truth; /* size bytes: filled when the driver resumes, if keep_truth */
	bool keep_truth;
	uint64_t truth_ns; /* what the last one took: part of the pause the engine measured */
	unsigned stops, resumes;
};

struct microvm_options {
	const char *kind; /* memfd, anonymous, thp, hugetlb; NULL: restored from the two descriptors */
	unsigned mib, vcpus, work_mib;
	bool fill, paused;
	int memory_fd, vmstate_fd;
};

struct microvm_status {
	bool paused;
	char kind[16];
	uint64_t steps, mismatches, saves, hva, size, page_size;
};

/* 0; -ENOTSUP: this machine cannot, *why says what it lacks; other -errno: failed, *why what it said. */
int microvm_start(struct microvm *v, const struct microvm_options *opt, struct ffs_error *why);
/* Kill it (if it still is), remove its files. */
void microvm_stop(struct microvm *v);
/* After a test that failed in the middle: the same for all that are left. */
void microvm_stop_all(void);
/* pause, resume, status, save PATH: one command over the test's own connection. */
int microvm_command(struct microvm *v, const char *command, struct microvm_status *st);
/* Wait until the guest has made that many more steps: 0, -EILSEQ when it found its memory wrong, -ETIMEDOUT.
 */
int microvm_runs(struct microvm *v, uint64_t steps, unsigned ms);
/* True when /proc/PID/smaps shows a userfaultfd registration ("uw"). */
bool microvm_protected(struct microvm *v);
/* Which microVM the driver connects to next. */
void microvm_select(struct microvm *v);
extern const struct ffs_vmm_ops microvm_ops;
