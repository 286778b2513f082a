/* A stand-in for a VMM with guest memory that threads of a real process write as fast as they can: what lets
 * the engine be stressed, and watched by ThreadSanitizer, without a hypervisor. Its driver records the truth:
 * what the memory holds while the "guest" is stopped, read by the test's own code. The driver keeps the
 * contract of vmm/vmm.h: it resumes only what it stopped, and passes the fault points vmm-prepare, vmm-pause,
 * vmm-save and vmm-resume. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmm/vmm.h"

#define FAKE_REGIONS 8

struct fake_vmm {
	pid_t pid;
	int sock;                 /* commands, one byte each: fake_vmm_tell() */
	int memfd;                /* -1: anonymous memory; else of all regions, one behind the other */
	uint64_t size, page_size; /* size: of all regions */
	unsigned n_regions;
	struct {
		uint64_t hva, size, offset;
	} region[FAKE_REGIONS];
	struct fake_shared *shared;
	uint8_t *truth; /* size bytes, in the order of memory.bin: filled when the driver resumes */
	bool keep_truth;
	unsigned stops, resumes;
	/* what the driver is told to do wrong */
	unsigned fail_resumes;    /* so many calls of resume fail, the guest stays stopped */
	bool ignore_stop;         /* pause is never answered */
	bool reconnect_on_resume; /* as if resume had made a new connection */
};

enum fake_memory { FAKE_MEMFD, FAKE_ANONYMOUS, FAKE_HUGETLB };

/* Start it: `writers` threads over size bytes. False when the machine has no such memory (hugetlb pool). */
bool fake_vmm_start(struct fake_vmm *f, enum fake_memory kind, uint64_t size, unsigned writers);
/* The same with several regions, each with holes around it. Sizes are multiples of the page size. */
bool fake_vmm_start_regions(struct fake_vmm *f, enum fake_memory kind, const uint64_t *sizes,
	unsigned n_regions, unsigned writers);
void fake_vmm_stop(struct fake_vmm *f);
/* Kill those that no test has stopped: at the end of each. */
void fake_vmm_stop_left_over(void);
/* One of these commands; returns when it is done, false when the VMM is gone:
 *   p  stop       c  go on     d  discard the 64 KiB at 512 KiB (as a balloon does)
 *   D  discard one page in the middle of them
 *   h  punch that page out of the memfd, which nobody is told of (QEMU does so before 'D') */
bool fake_vmm_tell(struct fake_vmm *f, char command);
#define FAKE_DISCARD_AT (65536ull * 8)
#define FAKE_DISCARD_PAGE (FAKE_DISCARD_AT + 3 * 4096)
/* Writes its threads made so far: moves while the guest runs. */
uint64_t fake_vmm_progress(struct fake_vmm *f);
/* True when every thread of the guest makes progress within `ms`. */
bool fake_vmm_runs(struct fake_vmm *f, unsigned ms);
/* True when /proc/PID/smaps shows a userfaultfd registration ("uw"). */
bool fake_vmm_protected(struct fake_vmm *f);
/* Copy the memory to f->truth, by the test's own means; the guest is stopped. False when that fails. */
bool fake_vmm_read_truth(struct fake_vmm *f, void (*beat)(void *), void *arg);
/* Which fake the driver connects to next. */
void fake_vmm_select(struct fake_vmm *f);
extern const struct ffs_vmm_ops fake_vmm_ops;
