/* Named fault points, for tests only.
 *
 * Built with -Dfaults=true, the daemon asks a small text file (named by $FORKFS_FAULT_FILE, read again at
 * every point) what to do when it passes a point. A release build compiles every point to the constant 0.
 *
 * The file has one rule a line:
 *
 *     POINT[@N] ACTION         N: only the N-th pass since the rule was first seen; default: each
 *
 * POINT "*" matches every protocol point, so `*@17 error:EIO` fails the 17th step, whichever that is. ACTION:
 *
 *     error:ERRNO              the step fails with that errno
 *     kill | segv | stop       raise SIGKILL, SIGSEGV, SIGSTOP on ourselves
 *     hold:PATH                create PATH.held, wait until PATH exists (at most 60 s)
 *     delay:MS                 sleep
 */
#pragma once

#ifdef FFS_FAULTS
/* 0, or the -errno to fail with. Any thread; slow (reads a file): never in a release build. */
int ffs_fault_point(const char *name);
/* A place between two looks at the same thing, where a test holds a thread: no step that can fail, passed too often to be
 * one, and so not matched by "*". */
void ffs_fault_place(const char *name);
/* True when the rule `mutant:NAME on` is in the file: tests break the protocol's order with it, on purpose.
 */
int ffs_fault_mutant(const char *name);
/* True when $FORKFS_ALTERNATIVE is that name: another, slower way to a right branch, for the benchmarks to compare
 * with. Without a fault file the points cost next to nothing, so its figures can be compared. */
int ffs_fault_alternative(const char *name);
#define FFS_FAULT(name) ffs_fault_point(name)
#define FFS_PLACE(name) ffs_fault_place(name)
#define FFS_MUTANT(name) ffs_fault_mutant(name)
#define FFS_ALTERNATIVE(name) ffs_fault_alternative(name)
#else
#define FFS_FAULT(name) 0
#define FFS_PLACE(name) ((void)0)
#define FFS_MUTANT(name) 0
#define FFS_ALTERNATIVE(name) 0
#endif
