/* Fault points for a test program, in memory: takes the place of engine/base/fault.c (whose object is then
 * not linked), with the same rules but no files, no limit on how many come and go, and holds that a test can
 * wait for. The watchdog process, forked before any rule exists, has none. */
#pragma once

#include <stdbool.h>

/* False in a build without fault points: there is nothing to test then. */
bool fault_points_built(void);

/* Replace the rules: lines of POINT[@N] ACTION, POINT "*" for all of them; ACTION error:ERRNO | delay:MS |
 * hold:NAME. Counts begin anew for every rule. Holds go on until let_go(). */
void rules(const char *text);
/* Has the N-th pass of a rule POINT@N come? */
bool rule_struck(void);
/* Wait until a thread stands at hold:NAME. */
bool wait_held(const char *name, unsigned ms);
/* Let the threads that stand there go on; those that come by later do not stop. */
void let_go(const char *name);
/* No rules, everybody goes on, names can be used again. */
void rules_none(void);
/* Teardown of a test: no rules, and no stand-in VMM that a failed test left behind. */
int faults_after(void **state);
