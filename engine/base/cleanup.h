/* Scope-bound release of what a function owns, and the two ways to give ownership away. */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static inline void ffs_freep(void *p)
{
	free(*(void **)p);
}
static inline void ffs_closep(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}
static inline void ffs_fclosep(FILE **f)
{
	if (*f)
		fclose(*f);
}

#define _cleanup_(fn) __attribute__((cleanup(fn)))
#define _cleanup_free_ _cleanup_(ffs_freep)
#define _cleanup_close_ _cleanup_(ffs_closep)
#define _cleanup_fclose_ _cleanup_(ffs_fclosep)

/* Hand an owned pointer or descriptor to somebody else: the variable is emptied. */
#define ffs_steal_ptr(p)                                                                                     \
	({                                                                                                   \
		__typeof__(*(p)) ffs_stolen_ = *(p);                                                         \
		*(p) = NULL;                                                                                 \
		ffs_stolen_;                                                                                 \
	})
static inline int ffs_steal_fd(int *fd)
{
	int stolen = *fd;

	*fd = -1;
	return stolen;
}

/* Close *fd if it is open and mark it closed. */
static inline void ffs_close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}
