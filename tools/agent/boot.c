/* The first moments of a guest whose process 1 is the agent, and its last; and what is left of its main command then. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A place that is a mount already stays as it is. */
static void mount_on(const char *type, const char *where, unsigned long flags, const char *data)
{
	if (mkdir(where, 0755) < 0 && errno != EEXIST)
		say("forkfs-agent: %s: %s", where, strerror(errno));
	if (mount(type, where, type, flags, data) < 0 && errno != EBUSY)
		say("forkfs-agent: %s on %s: %s", type, where, strerror(errno));
}

/* /modules/order names one module a line, a module after those it needs. One that is built in is refused with EEXIST. */
static void load_modules(void)
{
	FILE *order = fopen("/modules/order", "re");
	char name[128], path[160];

	while (order && fscanf(order, "%127s", name) == 1) {
		snprintf(path, sizeof(path), "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
			say("forkfs-agent: module %s: %s", name, strerror(errno));
		if (fd >= 0)
			close(fd);
	}
	if (order)
		fclose(order);
}

/* The next word, in place. Blanks between double quotes belong to it, as the kernel has it. */
static char *next_word(char **at)
{
	char *word = *at + strspn(*at, " \n"), *from = word, *to = word;
	bool quoted = false;

	if (!*word)
		return NULL;
	for (; *from && (quoted || !strchr(" \n", *from)); from++)
		if (*from == '"')
			quoted = !quoted;
		else
			*to++ = *from;
	*at = *from ? from + 1 : from;
	*to = '\0';
	return word;
}

/* What follows the name and an equals sign, or NULL. */
static char *value_of(char *word, const char *name)
{
	size_t len = strlen(name);

	return !strncmp(word, name, len) && word[len] == '=' ? word + len + 1 : NULL;
}

/* The options as `forkfs.NAME`: a name with a dot is not handed to process 1 by the kernel. After -- come the words of the
 * main command. */
static void read_command_line(void)
{
	static char text[4096];
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	char *at = text;

	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return;
	for (char *word, *value; (word = next_word(&at)) && strcmp(word, "--");) {
		if (!strcmp(word, "forkfs.halt"))
			options.halt = true;
		else if (!strcmp(word, "forkfs.no_vsock"))
			options.vsock = false;
		else if ((value = value_of(word, "forkfs.exit_file")))
			options.exit_file = value;
		else if ((value = value_of(word, "forkfs.mailbox")))
			option_mailbox(value);
		else if ((value = value_of(word, "forkfs.on_mailbox")))
			options.on_mailbox = value;
		else if ((value = value_of(word, "forkfs.ack_address")))
			options.ack_address = value;
	}
}

void boot(void)
{
	mount_on("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
	mount_on("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_on("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_on("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
	mount_on("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
	int console = open("/dev/console", O_RDWR | O_NOCTTY);

	if (console >= 0)
		for (int fd = 0; fd < 3; fd++)
			dup2(console, fd);
	if (console > 2)
		close(console);
	if (setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 0) < 0 ||
		setenv("HOME", "/", 0) < 0)
		say("forkfs-agent: %s", strerror(errno));
	load_modules();
	read_command_line();
}

void exit_file_remove(void)
{
	if (options.exit_file && unlink(options.exit_file) < 0 && errno != ENOENT)
		say("forkfs-agent: %s, of a main command of the past: %s", options.exit_file,
			strerror(errno));
}

void exit_file_write(int code)
{
	char text[16], temporary[300];
	int n = snprintf(text, sizeof(text), "%d\n", code);
	int fd;

	if (!options.exit_file ||
		snprintf(temporary, sizeof(temporary), "%s.new", options.exit_file) >= (int)sizeof(temporary))
		return;
	fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	/* whole or not there, and on the disk before anybody hears of it */
	if (fd < 0 || write(fd, text, (size_t)n) != n || fsync(fd) < 0 ||
		rename(temporary, options.exit_file) < 0)
		say("forkfs-agent: %s: %s", options.exit_file, strerror(errno));
	if (fd >= 0)
		close(fd);
	sync();
}

void power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	/* without ACPI a machine cannot be switched off: its end is that of a reboot, with -no-reboot */
	reboot(RB_AUTOBOOT);
	say("forkfs-agent: this machine does not stop: %s", strerror(errno));
	for (;;)
		pause();
}
