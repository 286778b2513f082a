/* Owns one thread beside a command that works: it draws the bar and hands a signal on as a wish to end.
 *
 * Signals are left to the command's thread, whose reads and writes they interrupt. */
#include "long-action.h"

#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "base/cancel.h"
#include "base/util.h"
#include "cli.h"

#define REDRAW_NS (100 * FFS_NS_PER_MS)

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

	pthread_mutex_lock(&a->lock);
	while (!a->over) {
		/* paces the drawing; the end is signalled */
		ffs_cancel_wait(NULL, &a->ended, &a->lock, ffs_now_ns() + REDRAW_NS);
		if (ffs_interrupted())
			atomic_store(&a->progress.cancel, true);
		if (!bar || a->over)
			continue;
		pthread_mutex_unlock(&a->lock);
		if (a->look)
			a->look(a->arg, &a->progress);
		draw(a);
		pthread_mutex_lock(&a->lock);
	}
	pthread_mutex_unlock(&a->lock);
	return NULL;
}

void ffs_long_action_begin(struct ffs_long_action *a, const char *label,
	void (*look)(void *arg, struct ffs_store_progress *p), void *arg)
{
	sigset_t all, old;

	*a = (struct ffs_long_action){.label = label, .look = look, .arg = arg};
	pthread_mutex_init(&a->lock, NULL);
	ffs_cond_init(&a->ended);
	ffs_interrupt_install();
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	/* without a thread the work goes on, unseen */
	a->started = pthread_create(&a->thread, NULL, watch, a) == 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void ffs_long_action_end(struct ffs_long_action *a)
{
	pthread_mutex_lock(&a->lock);
	a->over = true;
	pthread_cond_signal(&a->ended);
	pthread_mutex_unlock(&a->lock);
	if (a->started)
		pthread_join(a->thread, NULL);
	if (a->drawn)
		fputs("\r\033[K", stderr);
	pthread_cond_destroy(&a->ended);
	pthread_mutex_destroy(&a->lock);
}
