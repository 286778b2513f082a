/* The guest's one static program: which part of it runs is the name it is called by (see init.c). */
#pragma once

#include <stdint.h>

/* The number given as "KEY=N" among the arguments, or `otherwise`. */
uint64_t guest_arg(int argc, char **argv, const char *key, uint64_t otherwise);
/* Write one whole line to the serial console in one write(2). */
void guest_say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Anonymous memory of `bytes`, every page of it present. Ends the program when there is none. */
void *guest_memory(uint64_t bytes);
/* Give every page bytes of its own, none of them zero: what is all zero costs a branch next to nothing. */
void guest_fill(void *mem, uint64_t bytes);

int init_main(int argc, char **argv);
int counter_main(int argc, char **argv);
int load_main(int argc, char **argv);
int selfcheck_main(int argc, char **argv);
int stall_main(int argc, char **argv);
int journal_main(int argc, char **argv);
int mailbox_main(int argc, char **argv);
int decoy_main(int argc, char **argv);
int hear_main(int argc, char **argv);
