/* Owns the log's destination. Any thread; a line is one write(2), so lines of several threads do not mix. */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

static int to_syslog_;
static enum ffs_log_level max_ = FFS_LOG_INFO;

void ffs_log_setup(int to_syslog, enum ffs_log_level max)
{
	if (to_syslog)
		openlog("forkfs", LOG_PID | LOG_NDELAY, LOG_DAEMON);
	to_syslog_ = to_syslog;
	max_ = max;
}

void ffs_log(enum ffs_log_level level, const char *fmt, ...)
{
	if (level > max_)
		return;
	char line[1024];
	va_list ap;

	va_start(ap, fmt);
	if (to_syslog_) {
		vsyslog((int)level, fmt, ap);
		va_end(ap);
		return;
	}
	struct timespec ts;
	struct tm tm;

	clock_gettime(CLOCK_REALTIME, &ts);
	gmtime_r(&ts.tv_sec, &tm);
	int n = snprintf(line, sizeof(line), "forkfs[%d] %02d:%02d:%02d.%03ld %s: ", (int)getpid(),
		tm.tm_hour, tm.tm_min, tm.tm_sec, ts.tv_nsec / 1000000,
		level <= FFS_LOG_ERROR   ? "error"
		: level == FFS_LOG_WARN  ? "warning"
		: level == FFS_LOG_DEBUG ? "debug"
					 : "info");
	int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, ap);

	va_end(ap);
	size_t len = m < 0 ? (size_t)n : (size_t)n + (size_t)m;

	if (len > sizeof(line) - 2)
		len = sizeof(line) - 2;
	line[len++] = '\n';
	if (write(STDERR_FILENO, line, len) < 0)
		return; /* nobody left to tell */
}
