/* Process 1 of the test guest: mounts, loads the drivers, starts what the kernel command line names, reaps.
 *
 *   run=PROGRAM[,KEY=N]…     a part of this program; may be given several times, all run side by side
 *
 * One thread. It never exits: the kernel would panic. */
#include "guest.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_ARGS 16

/* /modules/order names one module a line, a module after those it needs. One that the kernel refuses is built
 * in. */
static void load_modules(void)
{
	FILE *order = fopen("/modules/order", "r");
	char name[128], path[160];

	while (order && fscanf(order, "%127s", name) == 1) {
		snprintf(path, sizeof(path), "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
			guest_say("module %s: %m", name);
		if (fd >= 0)
			close(fd);
	}
	if (order)
		fclose(order);
}

static void start(char *spec)
{
	char *argv[MAX_ARGS + 1] = {NULL}, *save = NULL, path[64];
	int argc = 0;

	for (char *a = strtok_r(spec, ",", &save); a && argc < MAX_ARGS; a = strtok_r(NULL, ",", &save))
		argv[argc++] = a;
	if (argc == 0)
		return;
	if (fork() == 0) {
		snprintf(path, sizeof(path), "/bin/%s", argv[0]);
		execv(path, argv);
		guest_say("%s: %m", path);
		_exit(127);
	}
}

int init_main(int argc, char **argv)
{
	static char cmdline[4096];
	char *save = NULL;
	int status;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	if (mount("proc", "/proc", "proc", 0, NULL) < 0 || mount("sys", "/sys", "sysfs", 0, NULL) < 0 ||
		mount("dev", "/dev", "devtmpfs", 0, NULL) < 0)
		guest_say("mount: %m");
	int console = open("/dev/ttyS0", O_RDWR);

	if (console >= 0)
		for (int fd = 0; fd < 3; fd++)
			dup2(console, fd);
	load_modules();

	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, cmdline, sizeof(cmdline) - 1);

	if (n <= 0)
		guest_say("/proc/cmdline: %m");
	guest_say("guest is up");
	for (char *word = strtok_r(cmdline, " \n", &save); word; word = strtok_r(NULL, " \n", &save))
		if (strncmp(word, "run=", 4) == 0)
			start(word + 4);
	for (;;) {
		pid_t pid = wait(&status);

		if (pid < 0)
			pause();
		else
			guest_say("ended: process %d, status %#x", (int)pid, (unsigned)status);
	}
}
