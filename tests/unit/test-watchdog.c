/* The watchdog against real deaths: a fake daemon protects the memory of a real process and is killed,
 * stopped, or stops serving. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <cmocka.h>

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "uffd/inject.h"
#include "uffd/uffd.h"
#include "uffd/watchdog.h"
#include "target.h"

#define PAGE 4096ull
#define LEN (96ull << 20)
#define MS FFS_NS_PER_MS

static struct ffs_spawner *spawner;
static char *ram[2];    /* of the targets: a memfd, anonymous */
static int vmm_sock[2]; /* [0] stays with the test, [1] is what the daemon has */

static struct shared {
	_Atomic uint64_t writes;            /* of the target's writer, which goes on for ever */
	_Atomic uint64_t longest_ns;        /* one write took */
	_Atomic(struct ffs_wd_slot *) slot; /* the daemon's; the mapping is older than the fork only in the
					       daemon and the watchdog */
	_Atomic uint32_t revoked;           /* as the daemon saw it */
	_Atomic int removed_ms;
	_Atomic uint32_t go;
} * sh;

static struct ffs_proc_id vm;

static void writer(void *arg)
{
	target_ready();
	for (uint64_t i = 0;; i++) {
		uint64_t t0 = ffs_now_ns();

		*(volatile uint64_t *)(ram[i & 1] + (i * 7919 % (LEN / PAGE)) * PAGE) = i;
		uint64_t ns = ffs_now_ns() - t0;

		if (ns > atomic_load(&sh->longest_ns))
			atomic_store(&sh->longest_ns, ns);
		atomic_store(&sh->writes, i);
		if (i % 64 == 0)
			poll(NULL, 0, 1);
	}
}

static int fake_rescue(int sock, uint64_t deadline_ns)
{
	return write(sock, "cont", 4) == 4 ? 0 : -1;
}

/* A VMM that does not answer: waits for its whole deadline. */
static int stuck_rescue(int sock, uint64_t deadline_ns)
{
	poll(NULL, 0, ffs_ms_until(deadline_ns));
	return -ETIMEDOUT;
}

static const struct ffs_vmm_ops ops = {.kind = "fake", .rescue = fake_rescue};
static const struct ffs_vmm_ops stuck_ops = {.kind = "stuck", .rescue = stuck_rescue};

static struct ffs_geometry geometry(void)
{
	struct ffs_geometry g = {.n_regions = 2};

	for (unsigned i = 0; i < 2; i++) {
		g.regions[i].hva = (uint64_t)(uintptr_t)ram[i];
		g.regions[i].size = LEN;
		g.regions[i].page_size = PAGE;
	}
	return g;
}

static int setup(void **state)
{
	memset(sh, 0, sizeof(*sh));
	int fd = memfd_create("ram", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, LEN) < 0 ||
		socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, vmm_sock) < 0)
		return -1;
	ram[0] = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ram[1] = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	close(fd);
	memset(ram[0], 1, LEN / 2);
	memset(ram[1], 1, LEN / 2);
	vm = target_start(writer, NULL);
	return 0;
}

static int teardown(void **state)
{
	target_end(vm);
	munmap(ram[0], LEN);
	munmap(ram[1], LEN);
	close(vmm_sock[0]);
	if (vmm_sock[1] >= 0)
		close(vmm_sock[1]);
	return 0;
}

/* ---- the fake daemon ---- */

enum kind {
	IDLE,        /* holds protection, serves nothing, handler_seq even */
	SERVING,     /* a handler that works */
	IN_HANDLER,  /* has read the event, handler_seq odd, and hangs */
	PAUSING,     /* stopped the VM, nothing protected yet, no beat */
	STUCK_PAUSE, /* two slots: one whose VMM does not answer, one that does */
};

static struct ffs_watchdog *wd;
static int uffd = -1;

static void protect_all(const struct ffs_geometry *g)
{
	struct ffs_error err = {0};

	for (unsigned i = 0; i < g->n_regions; i++)
		if (ffs_uffd_register(uffd, g->regions[i].hva, LEN, &err) < 0 ||
			ffs_uffd_protect(uffd, g->regions[i].hva, LEN) < 0)
			_exit(20);
}

static void serve(struct ffs_wd_slot *slot, bool hang)
{
	struct uffd_msg m;

	for (;;) {
		struct pollfd p = {.fd = uffd, .events = POLLIN};

		poll(&p, 1, 100);
		atomic_store(&sh->revoked, atomic_load(&slot->revoked));
		atomic_fetch_add(&slot->handler_seq, 1);
		while (read(uffd, &m, sizeof(m)) == sizeof(m)) {
			if (hang)
				for (;;) {
					atomic_store(&sh->revoked, atomic_load(&slot->revoked));
					poll(NULL, 0, 10);
				}
			/* ENOENT: revoked while we stood between the event and the answer to it */
			if (m.event == UFFD_EVENT_PAGEFAULT &&
				ffs_uffd_unprotect(uffd, m.arg.pagefault.address & ~(PAGE - 1), PAGE) < 0 &&
				!atomic_load(&slot->revoked))
				_exit(21);
		}
		atomic_fetch_add(&slot->handler_seq, 1);
	}
}

static void fake_daemon(void *arg)
{
	enum kind kind = (enum kind)(long)arg;
	struct ffs_error err = {0};
	struct ffs_wd_slot *slot, *slot2;
	struct ffs_geometry g = geometry();
	struct ffs_spawner *sp;
	static const struct ffs_geometry none;

	if (ffs_watchdog_start(&wd, &err) < 0 || ffs_spawner_start(&sp, &err) < 0)
		_exit(10);
	if (ffs_inject_userfaultfd(sp, vm, 5 * FFS_NS_PER_S, &uffd, &err) < 0 || ffs_uffd_api(uffd, &err) < 0)
		_exit(11);
	if (kind == STUCK_PAUSE) {
		if (ffs_watchdog_add(wd, uffd, target_keep, &stuck_ops, &none, &slot2, &err) < 0)
			_exit(12);
		atomic_store(&slot2->pausing, 1);
	}
	if (ffs_watchdog_add(wd, uffd, target_keep, &ops, &g, &slot, &err) < 0)
		_exit(12);
	poll(NULL, 0, 120); /* it sleeps by now: the poke has to wake it */
	atomic_store(&slot->active, 1);
	if (kind >= PAUSING)
		atomic_store(&slot->pausing, 1);
	ffs_watchdog_poke(wd);
	protect_all(&g);
	target_ready();
	if (kind == SERVING || kind == IN_HANDLER)
		serve(slot, kind == IN_HANDLER);
	for (;;) {
		atomic_store(&sh->revoked, atomic_load(&slot->revoked));
		poll(NULL, 0, 10);
	}
}

static struct ffs_proc_id start_daemon(enum kind kind)
{
	target_keep = vmm_sock[1];
	struct ffs_proc_id d = target_start(fake_daemon, (void *)(long)kind);

	target_keep = -1;
	assert_true(ffs_proc_alive(d));
	return d;
}

/* The guest writes on (every page of it, so that nothing stays protected) within ms. */
static void assert_runs(int ms)
{
	uint64_t w = atomic_load(&sh->writes);

	assert_true(target_wait(atomic_load(&sh->writes) > w + 10, ms));
	w = atomic_load(&sh->writes);
	assert_true(target_wait(atomic_load(&sh->writes) > w + 2 * LEN / PAGE, 10000));
}

static bool rescued(int ms)
{
	struct pollfd p = {.fd = vmm_sock[0], .events = POLLIN};
	char buf[5] = "";

	return poll(&p, 1, ms) == 1 && read(vmm_sock[0], buf, 4) == 4 && strcmp(buf, "cont") == 0;
}

/* The watchdog of a dead daemon ends: nobody has the VMM's socket any more. */
static void assert_no_holder(void)
{
	struct pollfd p = {.fd = vmm_sock[0], .events = POLLIN};
	char c;

	close(vmm_sock[1]);
	vmm_sock[1] = -1;
	assert_int_equal(poll(&p, 1, 3000), 1);
	assert_int_equal(read(vmm_sock[0], &c, 1), 0);
}

/* ---- deaths ---- */

static void test_killed(void **state)
{
	struct ffs_proc_id d = start_daemon(IDLE);

	poll(NULL, 0, 100);
	target_end(d);
	assert_runs(1000);
	assert_true(atomic_load(&sh->longest_ns) < 1000 * MS);
	assert_false(rescued(50)); /* it was not pausing */
	assert_no_holder();
}

static void test_killed_while_pausing(void **state)
{
	struct ffs_proc_id d = start_daemon(PAUSING);

	target_end(d);
	assert_true(rescued(500));
	assert_runs(1000);
	assert_no_holder();
}

static void test_killed_beside_a_stuck_vmm(void **state)
{
	struct ffs_proc_id d = start_daemon(STUCK_PAUSE);

	target_end(d);
	assert_true(rescued(500));
	assert_runs(1000);
}

static void test_stopped(void **state)
{
	struct ffs_proc_id d = start_daemon(SERVING);

	poll(NULL, 0, 100);
	assert_int_equal(atomic_load(&sh->revoked), 0);
	kill(d.pid, SIGSTOP);
	assert_runs(1000);
	assert_false(rescued(50));
	kill(d.pid, SIGCONT);
	assert_true(target_wait(atomic_load(&sh->revoked) == 1, 2000));
	target_end(d);
	assert_runs(1000);
	assert_no_holder();
}

static void test_stopped_while_pausing(void **state)
{
	struct ffs_proc_id d = start_daemon(PAUSING);

	kill(d.pid, SIGSTOP);
	assert_true(rescued(1000));
	assert_runs(1000);
	assert_false(rescued(1300)); /* once: what is stopped after that was stopped by somebody else */
	target_end(d);
	assert_true(rescued(500)); /* dead, and `pausing` is still set: asked again, which is harmless */
	assert_no_holder();
}

static void test_not_served(void **state)
{
	for (unsigned i = 0; i < 2; i++) {
		struct ffs_proc_id d = start_daemon(i ? IN_HANDLER : IDLE);

		assert_runs(1500);
		assert_true(target_wait(atomic_load(&sh->revoked) == 1, 1000));
		assert_in_range(atomic_load(&sh->longest_ns), 400 * MS, 1000 * MS);
		target_end(d);
	}
	assert_no_holder();
}

static void test_served(void **state)
{
	struct ffs_proc_id d = start_daemon(SERVING);

	assert_false(target_wait(atomic_load(&sh->revoked), 1500));
	assert_runs(1000);
	target_end(d);
	assert_no_holder();
}

/* ---- requests, in this process ---- */

static struct ffs_watchdog *own;

static int open_fds_of(pid_t pid)
{
	return (int)target_fds(pid);
}

static pid_t child_named(const char *name)
{
	char text[256] = "", path[64], line[128], want[64];

	snprintf(path, sizeof(path), "/proc/%d/task/%d/children", getpid(), getpid());
	snprintf(want, sizeof(want), "Name:\t%s\n", name);
	FILE *f = fopen(path, "re");

	if (!f || !fgets(text, sizeof(text), f))
		text[0] = '\0';
	if (f)
		fclose(f);
	for (char *save = NULL, *p = strtok_r(text, " ", &save); p; p = strtok_r(NULL, " ", &save)) {
		target_status(atoi(p), "Name:", line);
		if (strcmp(line, want) == 0)
			return atoi(p);
	}
	return 0;
}

static void test_add_replace_remove(void **state)
{
	struct ffs_error err = {0};
	struct ffs_wd_slot *slot[FFS_WD_SLOTS], *more;
	struct ffs_geometry g = geometry();
	pid_t pid = child_named("forkfs-wd");
	char line[128];
	int fd = -1;

	assert_true(pid > 0);
	int before = open_fds_of(pid);

	target_status(pid, "SigBlk:", line);
	assert_non_null(
		strstr(line, "fffffffe7ffbfeff")); /* all but KILL, STOP and the two that glibc keeps */
	assert_int_equal(ffs_inject_userfaultfd(spawner, vm, 5 * FFS_NS_PER_S, &fd, &err), 0);
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++)
		assert_int_equal(ffs_watchdog_add(own, fd, vmm_sock[1], &ops, &g, &slot[i], &err), 0);
	assert_int_equal(open_fds_of(pid), before + 2 * FFS_WD_SLOTS);
	assert_int_equal(ffs_watchdog_add(own, fd, -1, &ops, &g, &more, &err), -ENOSPC);
	atomic_store(&slot[7]->revoked, 1);
	assert_int_equal(ffs_watchdog_replace(own, slot[7], fd, -1, &g, &err), 0);
	/* captures of before the revocation may still be under way: only another slot is clean */
	assert_int_equal(atomic_load(&slot[7]->revoked), 1);
	assert_int_equal(open_fds_of(pid), before + 2 * FFS_WD_SLOTS - 1);
	for (unsigned i = 0; i < FFS_WD_SLOTS; i++)
		ffs_watchdog_remove(own, slot[i]);
	assert_int_equal(open_fds_of(pid), before);
	/* a blocking descriptor */
	assert_int_equal(fcntl(fd, F_SETFL, 0), 0);
	assert_int_equal(ffs_watchdog_add(own, fd, -1, &ops, &g, &more, &err), -EINVAL);
	assert_int_equal(open_fds_of(pid), before);
	close(fd);
}

static unsigned long cpu_switches(pid_t pid)
{
	char line[128];

	target_status(pid, "voluntary_ctxt_switches:", line);
	return strtoul(line + strcspn(line, "0123456789"), NULL, 10);
}

/* No timer while nothing is active; a poke always wakes it, whenever it comes. */
static void test_sleep_and_poke(void **state)
{
	struct ffs_error err = {0};
	struct ffs_wd_slot *slot;
	struct ffs_geometry g = {.n_regions = 0};
	pid_t pid = child_named("forkfs-wd");
	int fd = -1;

	assert_int_equal(ffs_inject_userfaultfd(spawner, vm, 5 * FFS_NS_PER_S, &fd, &err), 0);
	assert_int_equal(ffs_watchdog_add(own, fd, vmm_sock[1], &ops, &g, &slot, &err), 0);
	poll(NULL, 0, 150);
	unsigned long n = cpu_switches(pid);

	poll(NULL, 0, 500);
	assert_int_equal(cpu_switches(pid), n);
	for (unsigned i = 0; i < 40; i++) {
		atomic_fetch_add(&slot->pause_beat, 1);
		atomic_store(&slot->pausing, 1);
		ffs_watchdog_poke(own);
		n = cpu_switches(pid);
		assert_true(target_wait(cpu_switches(pid) > n, 500)); /* it ticks */
		atomic_store(&slot->pausing, 0);
		poll(NULL, 0, (int)(i * 3 % 60)); /* falls asleep around here, or not yet */
	}
	assert_int_equal(atomic_load(&slot->revoked), 0);
	/* a pause without a beat is ended, one with a beat is not */
	atomic_store(&slot->pausing, 1);
	ffs_watchdog_poke(own);
	for (unsigned i = 0; i < 15; i++) {
		poll(NULL, 0, 100);
		atomic_fetch_add(&slot->pause_beat, 1);
	}
	assert_int_equal(atomic_load(&slot->revoked), 0);
	assert_false(rescued(0));
	assert_true(rescued(1000));
	assert_int_equal(atomic_load(&slot->revoked), 1);
	ffs_watchdog_remove(own, slot);
	close(fd);
}

static void *add_and_remove(void *arg)
{
	struct ffs_geometry g = geometry();
	struct ffs_wd_slot *slot;

	for (unsigned i = 0; i < 200; i++) {
		if (ffs_watchdog_add(own, *(int *)arg, vmm_sock[1], &ops, &g, &slot, NULL) < 0)
			return arg;
		atomic_store(&slot->active, 1);
		ffs_watchdog_poke(own);
		ffs_watchdog_remove(own, slot);
	}
	return NULL;
}

static void test_threads(void **state)
{
	struct ffs_error err = {0};
	pthread_t th[4];
	int fd = -1;

	assert_int_equal(ffs_inject_userfaultfd(spawner, vm, 5 * FFS_NS_PER_S, &fd, &err), 0);
	assert_int_equal(ffs_uffd_api(fd, &err), 0);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(pthread_create(&th[i], NULL, add_and_remove, &fd), 0);
	for (unsigned i = 0; i < 4; i++) {
		void *failed;

		pthread_join(th[i], &failed);
		assert_null(failed);
	}
	close(fd);
}

/* Without its watchdog the daemon is told so, at once. */
static void test_watchdog_killed(void **state)
{
	struct ffs_error err = {0};
	struct ffs_wd_slot *slot;
	struct ffs_geometry g = geometry();
	int fd = -1;

	assert_int_equal(ffs_inject_userfaultfd(spawner, vm, 5 * FFS_NS_PER_S, &fd, &err), 0);
	kill(child_named("forkfs-wd"), SIGKILL);
	assert_int_equal(ffs_watchdog_add(own, fd, -1, &ops, &g, &slot, &err), -EIO);
	assert_non_null(strstr(err.text, "watchdog"));
	close(fd);
}

static int start_helpers(void **state)
{
	sh = shared_page(4096);
	return ffs_spawner_start(&spawner, NULL) || ffs_watchdog_start(&own, NULL);
}

static int stop_helpers(void **state)
{
	ffs_spawner_stop(spawner);
	ffs_watchdog_stop(own);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_killed, setup, teardown),
		cmocka_unit_test_setup_teardown(test_killed_while_pausing, setup, teardown),
		cmocka_unit_test_setup_teardown(test_killed_beside_a_stuck_vmm, setup, teardown),
		cmocka_unit_test_setup_teardown(test_stopped, setup, teardown),
		cmocka_unit_test_setup_teardown(test_stopped_while_pausing, setup, teardown),
		cmocka_unit_test_setup_teardown(test_not_served, setup, teardown),
		cmocka_unit_test_setup_teardown(test_served, setup, teardown),
		cmocka_unit_test_setup_teardown(test_add_replace_remove, setup, teardown),
		cmocka_unit_test_setup_teardown(test_sleep_and_poke, setup, teardown),
		cmocka_unit_test_setup_teardown(test_threads, setup, teardown),
		cmocka_unit_test_setup_teardown(test_watchdog_killed, setup, teardown),
	};

	return cmocka_run_group_tests(tests, start_helpers, stop_helpers);
}
