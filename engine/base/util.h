/* Small things every layer needs: checked arithmetic, the clock, whole-file and whole-buffer I/O, /proc
 * identity. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include "base/error.h"

#define FFS_ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define FFS_NS_PER_S 1000000000ull
#define FFS_NS_PER_MS 1000000ull

/* Checked u64/size arithmetic: true when it overflowed; *out is then unspecified. */
#define ffs_add_overflow(a, b, out) __builtin_add_overflow(a, b, out)
#define ffs_mul_overflow(a, b, out) __builtin_mul_overflow(a, b, out)

/* Bit i of a map. */
static inline bool ffs_bit(const uint64_t *map, uint64_t i)
{
	return map[i / 64] >> (i % 64) & 1;
}
static inline void ffs_bit_set(uint64_t *map, uint64_t i)
{
	map[i / 64] |= 1ull << (i % 64);
}

/* CLOCK_MONOTONIC in nanoseconds. */
static inline uint64_t ffs_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * FFS_NS_PER_S + (uint64_t)ts.tv_nsec;
}

/* CLOCK_REALTIME in nanoseconds since the epoch: for what people read, never for intervals. */
uint64_t ffs_wall_ns(void);

/* Milliseconds from now to a deadline of ffs_now_ns(), rounded up, 0 when it has passed; for poll(2). */
int ffs_ms_until(uint64_t deadline_ns);

/* Read or write exactly len bytes at off unless end of file comes first (reads): bytes done, or -errno. EINTR
 * is retried. */
ssize_t ffs_pread_full(int fd, void *buf, size_t len, uint64_t off);
ssize_t ffs_pwrite_full(int fd, const void *buf, size_t len, uint64_t off);
ssize_t ffs_write_full(int fd, const void *buf, size_t len);

/* Whole small file (procfs too) as a NUL-terminated string the caller frees; at most `max` bytes, -EFBIG
 * beyond. */
int ffs_read_file(const char *path, size_t max, char **out, size_t *out_len);

/* True if all len bytes are zero. */
bool ffs_is_zero(const void *buf, size_t len);

/* A process told apart from a later one with the same pid. */
struct ffs_proc_id {
	pid_t pid;
	uint64_t start; /* field 22 of /proc/PID/stat, clock ticks since boot (proc(5)) */
};

/* Read state and start time of a process (or thread: `tid` of the same /proc layout). The comm field may
 * contain spaces and parentheses: fields are counted from the LAST ')'. -ESRCH when there is none. `state`
 * may be NULL; 'X' is also one that has begun to end: it runs no code of its own any more, and its files are closed before it is
 * a zombie. */
int ffs_proc_stat(pid_t pid, char *state, uint64_t *start);

/* True while that very process exists, is not a zombie and has not begun to end. */
bool ffs_proc_alive(struct ffs_proc_id id);

/* Every signal but those that a fault in the thread itself raises: what a thread may block that leaves
 * signals to others. A blocked SIGSEGV would end the process without its handler, which closes every
 * userfaultfd first. `set` is a sigset_t. */
void ffs_signals_to_block(void *set);

/* What a process holds is let go of with the last reference to it: that of a process that is just ending, or of who looks at
 * the descriptors of others (lsof, a BPF iterator) and holds each for a moment. The kernel tells nobody when it lets go, so who
 * finds it held asks again for so long. */
#define FFS_HELD_NS (2 * FFS_NS_PER_S)
/* Wait a little before asking again; false: it has been held long enough. */
bool ffs_held_again(uint64_t deadline_ns);
/* flock(2) for oneself alone, of what nobody else should have: 0, -EWOULDBLOCK when it is held for FFS_HELD_NS, -errno. */
int ffs_lock(int fd);

/* Open as many files as the host lets this process, not as few as its shell has said. 0 or -errno. */
int ffs_raise_file_limit(void);

/* A random (version 4) UUID; one as 36 characters and a NUL; a random one as that. */
void ffs_uuid_new(uint8_t out[16]);
void ffs_uuid_text(const uint8_t uuid[16], char out[37]);
void ffs_uuid(char out[37]);

/* Names of sandboxes, branches and forks: 1–64 of [A-Za-z0-9._:-], not starting with a dot. 0 or -EINVAL with
 * a sentence that shows the name and the rule; `what` is the noun ("branch"). */
int ffs_check_name(const char *what, const char *name, struct ffs_error *err);
