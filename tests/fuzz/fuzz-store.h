/* What the harness and its repairing of inputs share. */
#pragma once

#include <stddef.h>

/* A copy of the input in which every checksum is right, so that what comes behind the checks is reached:
 * malloc'ed, for the caller to free, its length in *len; NULL: the input is too far from making sense. Any
 * bytes may come in. */
unsigned char *repair_manifest(const unsigned char *in, size_t *len);
unsigned char *repair_index(const unsigned char *in, size_t *len);
unsigned char *repair_stream(const unsigned char *in, size_t *len);
unsigned char *repair_fork(const unsigned char *in, size_t *len);
