/* LD_PRELOAD for a VMM that opens its memory file for writing, although it maps it privately: what lies below
 * the directory named by $OPEN_READ_ONLY is opened O_RDONLY. So a branch is served by the kernel itself
 * (passthrough) to a stock QEMU too, whose option for it (readonly=on,rom=off) came with 8.2.
 *
 * Any thread; no state. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

typedef int open_function(const char *path, int flags, ...);

static int open_as(const char *name, const char *path, int flags, mode_t mode)
{
	const char *below = getenv("OPEN_READ_ONLY");
	open_function *next = (open_function *)dlsym(RTLD_NEXT, name);

	if (below && strncmp(path, below, strlen(below)) == 0 && (flags & O_ACCMODE) == O_RDWR)
		flags = (flags & ~O_ACCMODE) | O_RDONLY;
	return next(path, flags, mode);
}

/* The names under which the C library's open(2) is called, the last with checks (_FORTIFY_SOURCE). */
int open64(const char *path, int flags, ...);
int __open64_2(const char *path, int flags);

int open64(const char *path, int flags, ...)
{
	mode_t mode = 0;
	va_list more;

	va_start(more, flags);
	if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE)
		mode = va_arg(more, mode_t);
	va_end(more);
	return open_as("open64", path, flags, mode);
}

int __open64_2(const char *path, int flags)
{
	return open_as("open64", path, flags, 0);
}
