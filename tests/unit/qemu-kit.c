/* See qemu-kit.h. */
#include "qemu-kit.h"

#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vmm/qmp.h"

#define MAX_ARGS 60

char dir[64], qmp[96], qmp2[96], fault_file[96];
pid_t qemu = -1, extra = -1;
struct ffs_vmm *vmm;
struct ffs_qmp *second;
struct ffs_geometry geo;
struct ffs_error err;
unsigned stops, resumes;
int vmstate = -1;

static int connects(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
	int r = connect(fd, (struct sockaddr *)&a, sizeof(a));

	if (r < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

pid_t spawn(const char *const *argv)
{
	pid_t me = getpid(), pid = fork();

	assert_true(pid >= 0);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != me || chdir(dir) < 0)
			_exit(1);
		execvp(argv[0], (char *const *)argv);
		_exit(127);
	}
	return pid;
}

static void on_event(void *arg, const char *name, struct json_object *data)
{
	stops += strcmp(name, "STOP") == 0;
	resumes += strcmp(name, "RESUME") == 0;
}

/* Start QEMU with the arguments, a monitor for the driver (unless `own_monitor`) and one for the test. */
void boot(bool own_monitor, const char *const *args)
{
	char a[160], b[160];
	const char *argv[MAX_ARGS] = {QEMU, "-accel", "tcg", "-display", "none", "-qmp", a};
	unsigned n = 7;

	snprintf(a, sizeof(a), "unix:%s,server=on,wait=off", qmp2);
	snprintf(b, sizeof(b), "unix:%s,server=on,wait=off", qmp);
	if (!own_monitor) {
		argv[n++] = "-qmp";
		argv[n++] = b;
	}
	while (*args && n < MAX_ARGS - 1)
		argv[n++] = *args++;
	qemu = spawn(argv);
	int fd = -1;

	for (unsigned i = 0; i < 1000 && (fd = connects(qmp2)) < 0; i++) {
		assert_int_equal(waitpid(qemu, NULL, WNOHANG), 0);
		poll(NULL, 0, 10);
	}
	assert_true(fd >= 0);
	struct ffs_qmp_hooks hooks = {.event = on_event};

	stops = resumes = 0;
	assert_int_equal(
		ffs_qmp_open(fd, -1, &hooks, ffs_now_ns() + 10 * FFS_NS_PER_S, NULL, &second, NULL, &err), 0);
}

int attach(const char *socket, pid_t pid)
{
	struct ffs_attach_options opt = {.name = "t", .pid = pid, .qemu_socket = socket};

	memset(&err, 0, sizeof(err));
	int r = ffs_qemu_ops.connect(&opt, NULL, &vmm, &err);

	if (r)
		vmm = NULL;
	return r;
}

struct json_object *ask(const char *command, const char *args)
{
	struct json_object *a = args ? json_tokener_parse(args) : NULL, *ret = NULL;

	OK(ffs_qmp_call(second, command, a, -1, ffs_now_ns() + 10 * FFS_NS_PER_S, &ret, &err));
	json_object_put(a);
	return ret;
}

void tell(const char *command, const char *args)
{
	json_object_put(ask(command, args));
}

bool status_is(const char *want)
{
	struct json_object *ret = ask("query-status", NULL), *v;
	bool same =
		json_object_object_get_ex(ret, "status", &v) && strcmp(json_object_get_string(v), want) == 0;

	json_object_put(ret);
	return same;
}

int setup(void **state)
{
	snprintf(dir, sizeof(dir), "/tmp/ffs-test-qemu.XXXXXX");
	if (!mkdtemp(dir))
		return -1;
	snprintf(qmp, sizeof(qmp), "%s/qmp", dir);
	snprintf(qmp2, sizeof(qmp2), "%s/qmp2", dir);
	snprintf(fault_file, sizeof(fault_file), "%s/faults", dir);
	setenv("FORKFS_FAULT_FILE", fault_file, 1);
	vmstate = memfd_create("vmstate", MFD_CLOEXEC);
	memset(&err, 0, sizeof(err));
	return 0;
}

void kill_vm(void)
{
	if (qemu > 0) {
		kill(qemu, SIGKILL);
		waitpid(qemu, NULL, 0);
	}
	qemu = -1;
}

int teardown(void **state)
{
	static const char *const files[] = {"qmp", "qmp2", "faults", "mem", "disk", "pretty", "mon", "hmp"};
	char path[128];

	if (vmm)
		vmm->ops->close(vmm);
	if (second)
		ffs_qmp_close(second);
	kill_vm();
	if (extra > 0) {
		kill(extra, SIGKILL);
		waitpid(extra, NULL, 0);
	}
	extra = -1;
	vmm = NULL;
	second = NULL;
	close(vmstate);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(files); i++) {
		snprintf(path, sizeof(path), "%s/%s", dir, files[i]);
		if (unlink(path) < 0 && errno != ENOENT)
			return -1;
	}
	return rmdir(dir);
}

int run(const struct CMUnitTest *tests, size_t n)
{
	if (system("command -v " QEMU " >/dev/null") != 0) {
		printf("no " QEMU " here\n");
		return 77;
	}
	signal(SIGPIPE, SIG_IGN);
	if (getenv("FORKFS_TEST_FILTER"))
		cmocka_set_test_filter(getenv("FORKFS_TEST_FILTER"));
	return _cmocka_run_group_tests("qemu", tests, n, NULL, NULL);
}
