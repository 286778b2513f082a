/* The stream of export and import: its records (docs/format.md). */
#pragma once

#include "store/internal.h"

#define FFS_STREAM_MAGIC "forkfsST"
#define FFS_STREAM_HEADER 16u
#define FFS_STREAM_NAME_MAX 255u

enum ffs_record {
	FFS_RECORD_MANIFEST = 1,
	FFS_RECORD_BLOCK = 2,
	FFS_RECORD_FILE = 3,
	FFS_RECORD_DATA = 4,
	FFS_RECORD_END = 5,
	FFS_RECORD_FORK = 6,
};

struct ffs_record_head {
	uint32_t type, kind; /* enum ffs_chunk_kind */
	uint64_t length;     /* of what it stands for */
	uint32_t stored, name;
};
#define FFS_RECORD_HEAD 24u

void ffs_record_encode(const struct ffs_record_head *h, unsigned char out[FFS_RECORD_HEAD]);
void ffs_record_decode(const unsigned char in[FFS_RECORD_HEAD], struct ffs_record_head *h);
