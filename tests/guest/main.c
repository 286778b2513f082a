/* Start of the guest program, and what its parts share. Threads: any part's; guest_say() is one write(2) a
 * line. */
#include "guest.h"

#include <libgen.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

uint64_t guest_arg(int argc, char **argv, const char *key, uint64_t otherwise)
{
	size_t len = strlen(key);

	for (int i = 1; i < argc; i++)
		if (strncmp(argv[i], key, len) == 0 && argv[i][len] == '=')
			return strtoull(argv[i] + len + 1, NULL, 0);
	return otherwise;
}

void guest_say(const char *fmt, ...)
{
	char line[4096];
	va_list ap;

	va_start(ap, fmt);
	int n = vsnprintf(line, sizeof(line) - 1, fmt, ap);
	va_end(ap);
	if (n < 0)
		return;
	if (n > (int)sizeof(line) - 2)
		n = sizeof(line) - 2;
	line[n++] = '\n';
	for (int done = 0; done < n;) {
		ssize_t w = write(STDOUT_FILENO, line + done, (size_t)(n - done));

		if (w <= 0)
			return;
		done += (int)w;
	}
}

void *guest_memory(uint64_t bytes)
{
	void *p =
		mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED) {
		guest_say("no memory for %llu bytes", (unsigned long long)bytes);
		exit(1);
	}
	return p;
}

void guest_fill(void *mem, uint64_t bytes)
{
	uint64_t *word = mem;

	for (uint64_t i = 0; i < bytes / sizeof(*word); i++)
		word[i] = (i + 1) * 0x9e3779b97f4a7c15ull | 1;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*main)(int argc, char **argv);
	} parts[] = {{"init", init_main}, {"counter", counter_main}, {"load", load_main},
		{"selfcheck", selfcheck_main}, {"stall", stall_main}, {"journal", journal_main},
		{"mailbox", mailbox_main}, {"decoy", decoy_main}, {"hear", hear_main}};
	const char *name = basename(argv[0]);

	for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
		if (strcmp(parts[i].name, name) == 0)
			return parts[i].main(argc, argv);
	guest_say("no such program: %s", name);
	return 127;
}
