/* LD_PRELOAD for a QEMU before 8.2, which opens the file of its memory for writing although it maps it privately: the
 * file named by $FORKFS_OPEN_READ_ONLY, or what lies below it, is opened O_RDONLY. So its pages are the branch's own,
 * shared by all children, and served by the kernel (passthrough). Later QEMUs have options for it (readonly=on,rom=off).
 *
 * Any thread; the name is read once, before main(). It stays in the environment: the VMM may be started by a script. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

typedef int open_function(const char *path, int flags, ...);

static char below[512];

static void __attribute__((constructor)) read_name(void)
{
	const char *name = getenv("FORKFS_OPEN_READ_ONLY");

	if (name && strlen(name) < sizeof(below))
		strcpy(below, name);
}

static int is_ours(const char *path)
{
	size_t n = strlen(below);

	return n && strncmp(path, below, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int open_as(const char *name, const char *path, int flags, mode_t mode)
{
	open_function *next = (open_function *)dlsym(RTLD_NEXT, name);

	if ((flags & O_ACCMODE) == O_RDWR && is_ours(path))
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
