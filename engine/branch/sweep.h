/* Write-protecting what the guest may write: the sweeps of pre-arm, converge and arm. */
#pragma once

#include "branch/internal.h"

struct ffs_sweep {
	struct ffs_tracker *t;
	const char *sandbox;
	struct ffs_cancel *cancel;
	uint64_t deadline_ns;
};

/* -EINTR (cancelled) or -EAGAIN (deadline) when the branch should not be taken after all; before the pause
 * only. */
int ffs_sweep_stop_asked(const struct ffs_sweep *s, struct ffs_error *err);
/* Protect every writable page once; *swept counts them. While the guest runs it stops when asked; `paused`
 * moves the watchdog's beat. */
int ffs_sweep(const struct ffs_sweep *s, bool paused, uint64_t *swept, struct ffs_error *err);
/* Pre-arm, with several threads where it pays, and, when the guest runs, converge. */
int ffs_sweep_prearm(const struct ffs_sweep *s, bool running, struct ffs_phases *ph, struct ffs_error *err);
