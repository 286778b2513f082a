/* What is read from strangers: a manifest, a packed index, an import stream. The first byte of the input says which, the
 * rest is it.
 *
 *   clang -fsanitize=fuzzer,address …   searches (docs of libFuzzer); corpus/ is where it begins
 *   -DFFS_REPLAY                        a plain program: each file named is tried, and with every byte changed in turn
 *
 * Whatever the input, nothing may crash, and what was accepted must be usable. */
#include <fcntl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "store/internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_manifest(const char *text, size_t len)
{
	struct json_object *o = NULL;
	struct ffs_manifest m = {0};
	bool sealed = false;

	if (ffs_manifest_parse(text, len, &o, &sealed, NULL) < 0)
		return;
	if (ffs_manifest_load(o, true, &m, NULL) == 0)
		ffs_manifest_clear(&m);
	json_object_put(o);
}

static void try_index(const unsigned char *bytes, size_t len)
{
	struct ffs_index x;

	if (ffs_index_decode(bytes, len, &x, NULL) < 0)
		return;
	for (uint64_t i = 0; i < x.n_chunks; i++)
		if (x.kind[i] != FFS_CHUNK_ZERO && (x.pack[i] >= x.n_packs ||
				(uint64_t)x.offset[i] + x.stored[i] > x.packs[x.pack[i]].size))
			abort();
	ffs_index_clear(&x);
}

static void try_stream(const void *bytes, size_t len)
{
	char dir[] = "/dev/shm/forkfs-fuzz-XXXXXX";
	int fd = memfd_create("stream", MFD_CLOEXEC);
	struct ffs_store *st = NULL;
	struct ffs_stored *s = NULL;

	if (fd < 0 || !mkdtemp(dir))
		abort();
	if (ffs_pwrite_full(fd, bytes, len, 0) != (ssize_t)len || ffs_store_open(dir, &st, NULL) < 0)
		abort();
	/* what was taken is whole */
	if (ffs_store_import(st, fd, "s", "b", FFS_STORE_PACKED, NULL, NULL) == 0 &&
		(ffs_stored_open(st, "s", "b", &s, NULL) < 0 || ffs_stored_verify(s, NULL, NULL) < 0))
		abort();
	ffs_stored_unref(s);
	ffs_store_close(st);
	close(fd);
	if (ffs_store_remove_tree(AT_FDCWD, dir) < 0)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!size)
		return 0;
	/* a copy of exactly that size: so that a sanitizer sees a read beyond it */
	unsigned char *copy = malloc(size);

	if (!copy)
		abort();
	memcpy(copy, data, size);
	if (copy[0] == 'm')
		try_manifest((const char *)copy + 1, size - 1);
	else if (copy[0] == 'i' && size > 128) {
		try_index(copy + 1, size - 1);
		/* and with the checksum made right, which would keep the rest from being looked at */
		memset(copy + 1 + 112, 0, 16);
		struct ffs_hash h = ffs_hash_of(copy + 1, size - 1);

		memcpy(copy + 1 + 112, h.b, 16);
		try_index(copy + 1, size - 1);
	} else if (copy[0] == 'i')
		try_index(copy + 1, size - 1);
	else if (copy[0] == 's')
		try_stream(copy + 1, size - 1);
	free(copy);
	return 0;
}

#ifdef FFS_REPLAY
int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		char *text = NULL;
		size_t len = 0;

		if (ffs_read_file(argv[i], 1 << 20, &text, &len) < 0) {
			fprintf(stderr, "%s cannot be read\n", argv[i]);
			return 1;
		}
		LLVMFuzzerTestOneInput((const uint8_t *)text, len);
		for (size_t at = 1; at < len; at++)
			for (unsigned k = 0; k < 3; k++) {
				static const unsigned char with[] = {0xff, 0x80, 0x01};

				text[at] = (char)(text[at] ^ with[k]);
				LLVMFuzzerTestOneInput((const uint8_t *)text, len);
				text[at] = (char)(text[at] ^ with[k]);
			}
		for (size_t cut = 0; cut < len; cut++)
			LLVMFuzzerTestOneInput((const uint8_t *)text, cut);
		free(text);
		printf("%s: %zu bytes\n", argv[i], len);
	}
	return argc > 1 ? 0 : 1;
}
#endif
