/* What the tests against a real QEMU share: one VM a test, a directory, a monitor for the driver and one for
 * the test itself. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>
#include <sys/types.h>

#include "base/util.h"
#include "vmm/vmm.h"

struct json_object;
struct ffs_qmp;

#define MIB (1ull << 20)
#define GIB (1ull << 30)
#define QEMU "qemu-system-x86_64"

extern char dir[64], qmp[96], qmp2[96], fault_file[96];
extern pid_t qemu, extra;      /* the VM, and whatever else a test starts; killed by teardown() */
extern struct ffs_vmm *vmm;    /* attached; closed by teardown() */
extern struct ffs_qmp *second; /* the test's own monitor */
extern struct ffs_geometry geo;
extern struct ffs_error err;
extern unsigned stops, resumes; /* events that `second` has seen */
extern int vmstate;             /* an empty memfd */

int setup(void **state);
int teardown(void **state);
/* Start a process that dies with us, in `dir`. */
pid_t spawn(const char *const *argv);
/* Start QEMU with the arguments, a monitor for the driver (unless `own_monitor`) and one for the test. */
void boot(bool own_monitor, const char *const *args);
#define BOOT(own, ...) boot(own, (const char *const[]){__VA_ARGS__, NULL})
void kill_vm(void);
int attach(const char *socket, pid_t pid);
/* Over the test's monitor. */
struct json_object *ask(const char *command, const char *args);
void tell(const char *command, const char *args);
bool status_is(const char *want);
/* The end of a program: 77 without QEMU. */
int run(const struct CMUnitTest *tests, size_t n);

static inline uint64_t in(unsigned ms)
{
	return ffs_now_ns() + ms * FFS_NS_PER_MS;
}

#define OK(expr)                                                                                             \
	do {                                                                                                 \
		int ok_ = (expr);                                                                            \
		if (ok_)                                                                                     \
			fail_msg("%s: %d: %s", #expr, ok_, err.text);                                        \
	} while (0)
#define FAILS(expr, code, part)                                                                              \
	do {                                                                                                 \
		int ok_ = (expr);                                                                            \
		if (ok_ != -(code) || !strstr(err.text, part))                                               \
			fail_msg("%s: %d: %s; want %d and \"%s\"", #expr, ok_, err.text, -(code), part);     \
	} while (0)

#define MICROVM                                                                                              \
	"-M", "microvm,acpi=off,memory-backend=ram0", "-nodefaults", "-object",                              \
		"memory-backend-memfd,id=ram0,size=128M,share=on", "-m", "128M"
