#include "fault-kit.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cancel.h"
#include "base/fault.h"
#include "base/util.h"
#include "fake-vmm.h"

#ifndef FFS_FAULTS
int ffs_fault_point(const char *name);
int ffs_fault_mutant(const char *name);
void ffs_fault_place(const char *name);
#endif

#define MAX_RULES 8
#define MAX_HOLDS 8

struct rule {
	char point[40], action[80];
	unsigned nth, passes;
};

struct hold {
	char name[40];
	unsigned standing, came;
	bool open;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct rule rule[MAX_RULES];
static unsigned n_rules;
static struct hold holds[MAX_HOLDS];

bool fault_points_built(void)
{
#ifdef FFS_FAULTS
	return true;
#else
	return false;
#endif
}

static struct hold *hold_named(const char *name)
{
	for (unsigned i = 0; i < MAX_HOLDS; i++) {
		if (!holds[i].name[0])
			snprintf(holds[i].name, sizeof(holds[i].name), "%s", name);
		if (strcmp(holds[i].name, name) == 0)
			return &holds[i];
	}
	abort();
}

void rules(const char *text)
{
	char *copy = strdup(text), *save = NULL;

	pthread_mutex_lock(&lock);
	n_rules = 0;
	for (char *line = strtok_r(copy, "\n", &save); line && n_rules < MAX_RULES;
		line = strtok_r(NULL, "\n", &save)) {
		struct rule *r = &rule[n_rules];

		*r = (struct rule){0};
		if (sscanf(line, "%39s %79s", r->point, r->action) != 2)
			abort();
		char *at = strchr(r->point, '@');

		if (at) {
			*at = '\0';
			r->nth = (unsigned)atoi(at + 1);
		}
		n_rules++;
	}
	pthread_mutex_unlock(&lock);
	free(copy);
}

bool rule_struck(void)
{
	bool struck = false;

	pthread_mutex_lock(&lock);
	for (unsigned i = 0; i < n_rules; i++)
		struck |= rule[i].nth && rule[i].passes >= rule[i].nth;
	pthread_mutex_unlock(&lock);
	return struck;
}

bool wait_held(const char *name, unsigned ms)
{
	bool held = false;

	for (unsigned i = 0; i < ms && !held; i++) {
		pthread_mutex_lock(&lock);
		held = hold_named(name)->came != 0;
		pthread_mutex_unlock(&lock);
		if (!held)
			poll(NULL, 0, 1);
	}
	return held;
}

void let_go(const char *name)
{
	pthread_mutex_lock(&lock);
	hold_named(name)->open = true;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

void rules_none(void)
{
	pthread_mutex_lock(&lock);
	n_rules = 0;
	for (unsigned i = 0; i < MAX_HOLDS; i++)
		holds[i].open = true;
	pthread_cond_broadcast(&changed);
	for (unsigned i = 0; i < MAX_HOLDS; i++)
		while (holds[i].standing)
			pthread_cond_wait(&changed, &lock);
	memset(holds, 0, sizeof(holds));
	pthread_mutex_unlock(&lock);
}

static const struct {
	const char *name;
	int code;
} codes[] = {{"EIO", EIO}, {"ENOSPC", ENOSPC}, {"ENOMEM", ENOMEM}, {"EAGAIN", EAGAIN}};

/* Lock held. */
static int act(const char *action)
{
	if (strncmp(action, "error:", 6) == 0) {
		for (unsigned i = 0; i < FFS_ARRAY_LEN(codes); i++)
			if (strcmp(action + 6, codes[i].name) == 0)
				return -codes[i].code;
		abort();
	}
	if (strncmp(action, "delay:", 6) == 0) {
		int ms = atoi(action + 6);

		pthread_mutex_unlock(&lock);
		poll(NULL, 0, ms);
		pthread_mutex_lock(&lock);
	} else if (strncmp(action, "hold:", 5) == 0) {
		struct hold *h = hold_named(action + 5);

		h->came++;
		h->standing++;
		while (!h->open)
			pthread_cond_wait(&changed, &lock);
		h->standing--;
		pthread_cond_broadcast(&changed);
	}
	return 0;
}

static int pass(const char *name, bool place)
{
	int e = 0;

	pthread_mutex_lock(&lock);
	for (unsigned i = 0; i < n_rules && e == 0; i++) {
		struct rule *r = &rule[i];

		if (strcmp(r->point, name) != 0 && (place || strcmp(r->point, "*") != 0))
			continue;
		if (++r->passes == r->nth || !r->nth) {
			char action[80];

			snprintf(action, sizeof(action), "%s", r->action);
			e = act(action);
		}
	}
	pthread_mutex_unlock(&lock);
	return e;
}

int ffs_fault_point(const char *name)
{
	return pass(name, false);
}

void ffs_fault_place(const char *name)
{
	pass(name, true);
}

int ffs_fault_mutant(const char *name)
{
	return 0;
}

int faults_after(void **state)
{
	rules_none();
	fake_vmm_stop_left_over();
	return 0;
}
