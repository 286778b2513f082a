/* Owns nothing: formats into the caller's struct. Any thread, async-signal-unsafe (vsnprintf). */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* A sentence that was cut must not end in half a UTF-8 sequence: JSON writers would reject it. */
static void trim_utf8(char *text)
{
	size_t n = strlen(text), back = 0;

	while (back < 3 && back < n && ((unsigned char)text[n - 1 - back] & 0xc0) == 0x80)
		back++;
	if (back == n)
		return;
	unsigned char lead = (unsigned char)text[n - 1 - back];
	size_t want = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : lead >= 0xc0 ? 1 : 0;

	if (want > back)
		text[n - 1 - back] = '\0';
}

int ffs_error_set(struct ffs_error *err, int code, const char *fmt, ...)
{
	if (err) {
		va_list ap;

		err->code = code;
		va_start(ap, fmt);
		vsnprintf(err->text, sizeof(err->text), fmt, ap);
		va_end(ap);
		trim_utf8(err->text);
	}
	return -code;
}

int ffs_error_errno(struct ffs_error *err, int code, const char *fmt, ...)
{
	if (err) {
		va_list ap;
		char reason[128];

		err->code = code;
		va_start(ap, fmt);
		vsnprintf(err->text, sizeof(err->text), fmt, ap);
		va_end(ap);
		size_t used = strlen(err->text);

		snprintf(err->text + used, sizeof(err->text) - used, ": %s",
			strerror_r(code, reason, sizeof(reason)));
		trim_utf8(err->text);
	}
	return -code;
}

void ffs_error_prefix(struct ffs_error *err, const char *fmt, ...)
{
	if (!err || !err->code)
		return;
	char old[sizeof(err->text)];
	va_list ap;

	memcpy(old, err->text, sizeof(old));
	va_start(ap, fmt);
	vsnprintf(err->text, sizeof(err->text), fmt, ap);
	va_end(ap);
	size_t used = strlen(err->text);

	snprintf(err->text + used, sizeof(err->text) - used, ": %s", old);
	trim_utf8(err->text);
}
