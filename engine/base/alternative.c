/* Owns nothing: which other way of taking a branch the benchmarks asked for (see fault.h). Apart from fault.c, which
 * tests of the engine put another in place of. Threads: any. */
#include "base/fault.h"

#ifdef FFS_FAULTS

#include <stdlib.h>
#include <string.h>

int ffs_fault_alternative(const char *name)
{
	const char *chosen = getenv("FORKFS_ALTERNATIVE");

	return chosen && strcmp(chosen, name) == 0;
}

#else
typedef int ffs_alternative_not_built; /* an empty translation unit is not C */
#endif
