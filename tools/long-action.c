/* Owns one thread beside a command that works: it draws the bar and hands a signal on as a wish to end.
 *
 * Signals are left to the command's thread, whose reads and writes they interrupt. */
#include "long-action.h"

#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "cli.h"

#define REDRAW_NS 100000000

static void draw(struct ffs_long_action *a)
{
	unsigned long long done = atomic_load(&a->progress.done), total = atomic_load(&a->progress.total);
	char x[32], y[32];

	if (!total)
		return;
	if (done > total)
		done = total;
	fprintf(stderr, "\r%.60s %3d %%  %s of %s\033[K", a->label, (int)((double)done * 100 / (double)total),
		ffs_format_bytes(x, done), ffs_format_bytes(y, total));
	fflush(stderr);
	a->drawn = true;
}

static void *watch(void *arg)
{
	struct ffs_long_action *a = arg;
	bool bar = isatty(STDERR_FILENO);

	while (!atomic_load(&a->over)) {
		struct timespec pause = {.tv_nsec = REDRAW_NS};

		nanosleep(&pause, NULL);
		if (ffs_interrupted())
			atomic_store(&a->progress.cancel, true);
		if (bar && !atomic_load(&a->over))
			draw(a);
	}
	return NULL;
}

void ffs_long_action_begin(struct ffs_long_action *a, const char *label)
{
	sigset_t all, old;

	*a = (struct ffs_long_action){.label = label};
	ffs_interrupt_install();
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	/* without a thread the work goes on, unseen */
	a->started = pthread_create(&a->thread, NULL, watch, a) == 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void ffs_long_action_end(struct ffs_long_action *a)
{
	atomic_store(&a->over, true);
	if (a->started)
		pthread_join(a->thread, NULL);
	if (a->drawn)
		fputs("\r\033[K", stderr);
}
