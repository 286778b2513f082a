/* A VMM of a few hundred lines around /dev/kvm, for tests: its vCPUs write guest memory from inside KVM,
 * which is the path production takes, and its guest (guest.S) judges that memory itself.
 *
 * Options, as --NAME=VALUE: control (path of the socket), memory (MiB), vcpus, kind (memfd, anonymous, thp,
 * hugetlb), work (MiB the guest writes; default: seven eighths of the memory), fill (1: the rest of them is
 * resident too), spin (idle loops after each step), paused (1: does not start by itself), restore (a
 * memory.bin, mapped privately) with vmstate (a file), api (path of another control socket: examples/coop)
 * with regions (as how many pieces it announces its memory), mailbox (NAME,TOKEN: the guest publishes it), silent (1: and acknowledges nothing). The
 * serial port is stdout: lines "ok VCPU STEPS", "MISMATCH VCPU ADDRESS" when memory is not what the registers
 * say, and "mail EPOCH PAYLOAD" (guest.S). Without KVM: "SKIP: why", exit code 77.
 *
 * Control: SOCK_SEQPACKET, one command a message: pause, resume, status, save (the vmstate goes into the
 * descriptor that comes with it by SCM_RIGHTS), quit. The answer is one JSON object, the whole status;
 * "answer" is the command, "error" a sentence or "". pause is answered when all vCPUs are out of KVM_RUN with
 * nothing pending.
 *
 * Threads: main does the control, each vCPU has its own. One lock, for what goes between them (`paused`,
 * `parked`, `halted`); nobody holds it in KVM_RUN. */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/memfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "coop.h"
#include "machine.h"

#define MIB (1ull << 20)
#define MAX_CLIENTS 16

extern const char guest_begin[], guest_end[];

/* The machine but for its memory, as it is saved: KVM's parts are of the last save, the rest is of now. */
static struct vmstate {
	char magic[8];
	uint64_t memory, saves, vcpus;
	struct vcpu_state {
		struct kvm_regs regs;
		struct kvm_sregs sregs;
		struct kvm_xsave xsave;
		uint64_t halted, line_len;
		char line[4096]; /* of the serial port, not ended yet; holds the longest payload */
	} cpu[MAX_VCPUS];
} state = {.magic = "microvm"};

/* In the order in which they are put back. */
static const struct {
	unsigned long get, set;
	size_t at;
} parts[] = {{KVM_GET_SREGS, KVM_SET_SREGS, offsetof(struct vcpu_state, sregs)},
	{KVM_GET_REGS, KVM_SET_REGS, offsetof(struct vcpu_state, regs)},
	{KVM_GET_XSAVE, KVM_SET_XSAVE, offsetof(struct vcpu_state, xsave)}};
enum { N_PARTS = sizeof(parts) / sizeof(parts[0]) };

static struct vcpu {
	pthread_t thread;
	int fd;
	struct kvm_run *run;
	bool parked;
	struct vcpu_state *s;
} cpus[MAX_VCPUS];

static uint8_t *memory;
static uint64_t page_size;
static const char *kind;
static atomic_ulong mismatches;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t go = PTHREAD_COND_INITIALIZER, stopped = PTHREAD_COND_INITIALIZER;
static bool paused = true;
static unsigned parked;
static __thread struct kvm_run *own_run;

#define skip(what) err(77, "SKIP: %s", what)

static int kvm(int fd, unsigned long request, void *arg, const char *name)
{
	int r = ioctl(fd, request, arg);

	if (r < 0)
		skip(name);
	return r;
}

/* ---- vCPUs ---- */

static void kick(int sig)
{
	if (own_run)
		own_run->immediate_exit = 1;
}

/* Returns when the vCPU may run. Clears immediate_exit where no pause is asked for: later kicks stay. */
static void wait_for_go(struct vcpu *c, bool halt)
{
	pthread_mutex_lock(&lock);
	c->s->halted |= halt;
	mismatches += halt;
	while (paused || c->s->halted) {
		parked += !c->parked;
		c->parked = true;
		pthread_cond_signal(&stopped);
		pthread_cond_wait(&go, &lock);
	}
	parked -= c->parked;
	c->parked = false;
	c->run->immediate_exit = 0;
	pthread_mutex_unlock(&lock);
}

/* One byte for the serial port; true when it ended a line after which a vCPU has no more to say. */
static bool serial(struct vcpu_state *s, char byte)
{
	s->line[s->line_len++] = byte;
	if (byte != '\n' && s->line_len < sizeof(s->line))
		return false;
	/* a kick ends a write that waits for a reader: then the line is lost, not the pause */
	if (write(STDOUT_FILENO, s->line, s->line_len) < 0 && errno != EINTR)
		warn("serial port");
	s->line_len = 0;
	return strncmp(s->line, "MISMATCH", 8) == 0;
}

static void *vcpu_main(void *arg)
{
	struct vcpu *c = arg;
	struct kvm_run *run = own_run = c->run;
	char name[16];

	snprintf(name, sizeof(name), "CPU %u/KVM", (unsigned)(c - cpus));
	pthread_setname_np(pthread_self(), name);
	wait_for_go(c, false);
	for (;;) {
		int r = ioctl(c->fd, KVM_RUN, 0);

		if (r < 0 && errno == EINTR) {
			wait_for_go(c,
				false); /* what the last exit left pending is done: the state is complete */
		} else if (r == 0 && run->exit_reason == KVM_EXIT_IO && run->io.port == SERIAL_PORT) {
			if (serial(c->s, *((char *)run + run->io.data_offset)))
				wait_for_go(c, true);
		} else if (r < 0 ? errno != EAGAIN : run->exit_reason != KVM_EXIT_INTR) {
			warn("%s stops: KVM_RUN %d, exit reason %u", name, r, run->exit_reason);
			wait_for_go(c, true);
		}
	}
	return NULL;
}

static void set_paused(bool on)
{
	pthread_mutex_lock(&lock);
	paused = on;
	if (!on)
		pthread_cond_broadcast(&go);
	for (unsigned i = 0; on && i < state.vcpus; i++)
		if (!cpus[i].parked)
			pthread_kill(cpus[i].thread, SIGUSR1);
	while (on && parked < state.vcpus)
		pthread_cond_wait(&stopped, &lock);
	pthread_mutex_unlock(&lock);
}

/* ---- state ---- */

/* While paused. The device counts its saves in guest memory, as real devices write theirs then: memory older
 * than its vmstate is found out when the branch is restored. */
static const char *save(int fd)
{
	size_t size = offsetof(struct vmstate, cpu) + state.vcpus * sizeof(state.cpu[0]);

	for (unsigned i = 0; i < state.vcpus; i++)
		for (unsigned p = 0; p < N_PARTS; p++)
			if (ioctl(cpus[i].fd, parts[p].get, (char *)cpus[i].s + parts[p].at) < 0)
				return "KVM does not give the state of a vCPU";
	atomic_store((_Atomic uint64_t *)(memory + GPA_DEVICE), ++state.saves);
	return pwrite(fd, &state, size, 0) == (ssize_t)size ? "" : "the vmstate cannot be written";
}

static void load(const char *path)
{
	uint64_t size = state.memory;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = pread(fd, &state, sizeof(state), 0);
	bool good = n > (ssize_t)offsetof(struct vmstate, cpu) && memcmp(state.magic, "microvm", 8) == 0 &&
		    state.memory == size && state.vcpus >= 1 && state.vcpus <= MAX_VCPUS &&
		    n == (ssize_t)(offsetof(struct vmstate, cpu) + state.vcpus * sizeof(state.cpu[0]));

	for (unsigned i = 0; good && i < state.vcpus; i++)
		good = state.cpu[i].line_len < sizeof(state.cpu[i].line) && state.cpu[i].regs.r15 <= size - 8;
	if (!good)
		errx(1, "%s is no vmstate of such a machine", path);
	close(fd);
	if (*(uint64_t *)(memory + GPA_DEVICE) != state.saves && dprintf(STDOUT_FILENO, "MISMATCH device\n"))
		mismatches++;
}

/* Long mode from the first instruction on, in ring 3 with IOPL 3: a hypervisor without hardware support
 * (kvm_pvm) emulates ring 0 instruction by instruction, and runs this natively. */
static void boot_vcpu(unsigned i, uint64_t slice, uint64_t pages, uint64_t spin)
{
	struct kvm_segment data = {.limit = ~0u, .present = 1, .s = 1, .g = 1, .type = 3, .db = 1, .dpl = 3};
	struct kvm_segment code = {.limit = ~0u, .present = 1, .s = 1, .g = 1, .type = 11, .l = 1, .dpl = 3};
	struct kvm_sregs *s = &state.cpu[i].sregs;
	struct kvm_regs *r = &state.cpu[i].regs;

	kvm(cpus[i].fd, KVM_GET_SREGS, s, "KVM_GET_SREGS");
	kvm(cpus[i].fd, KVM_GET_XSAVE, &state.cpu[i].xsave, "KVM_GET_XSAVE");
	code.type = 11;
	code.l = 1;
	code.selector = 0x33;
	data.selector = 0x2b;
	s->cs = code;
	s->ds = s->es = s->fs = s->gs = s->ss = data;
	s->cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
	s->cr3 = GPA_PML4;
	s->cr4 = 0x620;  /* OSXMMEXCPT OSFXSR PAE */
	s->efer = 0x500; /* LMA LME */
	r->rip = GPA_PROGRAM;
	r->rflags = 0x3202;
	r->rsp = GPA_STACKS + (i + 1) * 4096;
	r->rdi = '0' + i;
	r->r15 = slice;
	r->r14 = pages;
	r->r11 = spin;
	r->rbp = 0x9e3779b97f4a7c15 + 2 * i;
	r->r9 = 0x123456789abcdef + i;
	while (r->rbx < pages - 1)
		r->rbx = r->rbx << 1 | 1;
}

/* What the guest makes a frame of, and vCPU 0's word that there is one. */
static void give_mailbox(const char *text, bool silent)
{
	char *at = (char *)memory + GPA_MAILBOX + MAILBOX_NAME;
	size_t name = strcspn(text, ","), token = text[name] ? strlen(text + name + 1) : 0;

	if (!name || name > 64 || !token || token > 128)
		errx(2, "--mailbox=NAME,TOKEN");
	memcpy(at, text, name);
	memcpy(at + name + 1, text + name + 1, token);
	state.cpu[0].regs.rdi |= HAS_MAILBOX | (silent ? IS_SILENT : 0);
}

/* Accessed and dirty bits are set from the start: KVM has no reason to write the page tables. */
static void boot(uint64_t work, bool fill, uint64_t spin, const char *mailbox, bool silent)
{
	uint64_t *table = (uint64_t *)memory, end = state.memory / 8 * 7 & ~4095ull;
	uint64_t size = work ? work : end - GPA_SLICES, slice = size / state.vcpus & ~4095ull;

	if (slice < 4 * 4096 || size > end - GPA_SLICES)
		errx(1, "the memory does not hold the slices of the vCPUs");
	table[GPA_PML4 / 8] = GPA_PDPT | 0x27;
	for (uint64_t i = 0; i < MAX_MEMORY >> 30; i++)
		table[GPA_PDPT / 8 + i] = (GPA_PD + i * 4096) | 0x27;
	for (uint64_t i = 0; i < MAX_MEMORY >> 21; i++)
		table[GPA_PD / 8 + i] = i << 21 | 0xe7;
	memcpy(memory + GPA_PROGRAM, guest_begin, (size_t)(guest_end - guest_begin));
	for (uint64_t at = GPA_SLICES + size; fill && at < end; at += 4096)
		*(uint64_t *)(memory + at) = at;
	for (unsigned i = 0; i < state.vcpus; i++)
		boot_vcpu(i, GPA_SLICES + i * slice, slice / 4096 - 1, spin);
	if (mailbox)
		give_mailbox(mailbox, silent);
}

/* ---- the machine ---- */

static void make_memory(const char *file)
{
	int flags = MAP_SHARED | MAP_NORESERVE, fd = -1;

	page_size = strcmp(kind, "hugetlb") == 0 ? 2 * MIB : 4096;
	if (file) {
		kind = "private";
		flags = MAP_PRIVATE | MAP_NORESERVE;
		fd = open(file, O_RDONLY | O_CLOEXEC);
		state.memory = (uint64_t)lseek(fd, 0, SEEK_END);
	} else if (strcmp(kind, "memfd") == 0 || page_size > 4096) {
		fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING |
						   (page_size > 4096 ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
		if (ftruncate(fd, (off_t)state.memory) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) < 0)
			skip("no such memory");
		if (page_size > 4096)
			flags = MAP_SHARED; /* reserve: an empty pool is found now, not by a SIGBUS */
	} else {
		flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	}
	if (state.memory < 2 * MIB || state.memory > MAX_MEMORY || state.memory % (2 * MIB))
		errx(1, "the memory is 2 MiB to 16 GiB in steps of 2 MiB");
	/* aligned as a real VMM's is, and with nothing beside it that the kernel could merge it with */
	char *room = mmap(
		NULL, state.memory + 4 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	void *at = (void *)(((uintptr_t)room + 2 * MIB) & ~(2 * MIB - 1));

	memory = mmap(at, state.memory, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
	if (memory == MAP_FAILED)
		skip("guest memory cannot be mapped");
	if (fd < 0 &&
		madvise(memory, state.memory, strcmp(kind, "thp") ? MADV_NOHUGEPAGE : MADV_HUGEPAGE) < 0)
		warn("madvise");
}

static void make_machine(void)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = {.head.nent = 256};
	struct kvm_userspace_memory_region ram = {
		.memory_size = state.memory, .userspace_addr = (uintptr_t)memory};
	int dev = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (dev < 0)
		skip("/dev/kvm");
	int vm = kvm(dev, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
	size_t size = (size_t)kvm(dev, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE");

	kvm(vm, KVM_SET_USER_MEMORY_REGION, &ram, "KVM_SET_USER_MEMORY_REGION");
	kvm(dev, KVM_GET_SUPPORTED_CPUID, &cpuid, "KVM_GET_SUPPORTED_CPUID");
	for (unsigned i = 0; i < state.vcpus; i++) {
		cpus[i].s = &state.cpu[i];
		cpus[i].fd = kvm(vm, KVM_CREATE_VCPU, (void *)(uintptr_t)i, "KVM_CREATE_VCPU");
		kvm(cpus[i].fd, KVM_SET_CPUID2, &cpuid, "KVM_SET_CPUID2");
		cpus[i].run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, cpus[i].fd, 0);
		if (cpus[i].run == MAP_FAILED)
			skip("struct kvm_run");
	}
}

static void start_vcpus(void)
{
	for (unsigned i = 0; i < state.vcpus; i++) {
		for (unsigned p = 0; p < N_PARTS; p++)
			kvm(cpus[i].fd, parts[p].set, (char *)cpus[i].s + parts[p].at,
				"setting the state of a vCPU");
		if ((errno = pthread_create(&cpus[i].thread, NULL, vcpu_main, &cpus[i])))
			err(1, "vCPU thread");
	}
}

/* ---- control ---- */

static void answer(int client, const char *command, const char *error)
{
	unsigned long steps = 0, least = ~0ul;
	char text[1024];

	for (unsigned i = 0; i < state.vcpus; i++) {
		unsigned long n = atomic_load((_Atomic uint64_t *)(memory + state.cpu[i].regs.r15));

		steps += n;
		least = n < least ? n : least;
	}
	int n = snprintf(text, sizeof(text),
		"{\"answer\":\"%s\",\"error\":\"%s\",\"state\":\"%s\",\"vcpus\":%lu,\"steps\":%lu,"
		"\"least_steps\":%lu,\"mismatches\":%lu,"
		"\"saves\":%lu,\"kind\":\"%s\",\"hva\":%lu,\"size\":%lu,\"page_size\":%lu}",
		command, error, paused ? "paused" : "running", state.vcpus, steps, least, mismatches,
		state.saves, kind, (unsigned long)memory, state.memory, page_size);

	/* a client that does not read its answers loses them: the guest must not wait for it */
	if (send(client, text, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		warn("an answer was lost");
}

/* One command. False when the client is gone. */
static bool serve(int client)
{
	char text[4096] = "", control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
	struct iovec iov = {text, sizeof(text) - 1};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control};
	const char *command = text, *error = "";
	int fd = -1;

	msg.msg_controllen = sizeof(control);
	if (recvmsg(client, &msg, MSG_CMSG_CLOEXEC) <= 0)
		return false;
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	if (c && c->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	if (strcmp(text, "quit") == 0) {
		exit(0);
	} else if (strcmp(text, "pause") == 0 || strcmp(text, "resume") == 0) {
		set_paused(text[0] == 'p');
	} else if (strcmp(text, "save") == 0) {
		error = fd < 0 ? "save needs a descriptor" : paused ? save(fd) : "not paused";
	} else if (strcmp(text, "status") != 0) {
		error = "commands: pause, resume, status, save, quit";
		command = "?";
	}
	answer(client, command, error);
	if (fd >= 0)
		close(fd);
	return true;
}

static _Noreturn void serve_all(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	struct pollfd p[1 + MAX_CLIENTS] = {
		{.fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), .events = POLLIN}};

	strncpy(a.sun_path, path, sizeof(a.sun_path) - 1);
	if (bind(p[0].fd, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(p[0].fd, MAX_CLIENTS) < 0)
		err(1, "%s", path);
	for (nfds_t n = 1;;) {
		p[0].events = n <= MAX_CLIENTS ? POLLIN : 0;
		if (poll(p, n, -1) < 0)
			continue; /* EINTR */
		int fd = p[0].revents ? accept4(p[0].fd, NULL, NULL, SOCK_CLOEXEC) : -1;

		for (nfds_t i = n; --i > 0;)
			if (p[i].revents && !serve(p[i].fd)) {
				close(p[i].fd);
				p[i] = p[--n];
			}
		if (fd >= 0)
			p[n++] = (struct pollfd){.fd = fd, .events = POLLIN};
	}
}

/* ---- the API of examples/coop ---- */

static bool is_paused(void)
{
	pthread_mutex_lock(&lock);
	bool is = paused;

	pthread_mutex_unlock(&lock);
	return is;
}

static bool save_into(int fd)
{
	return !*save(fd);
}

static struct coop_vmm api = {.is_paused = is_paused, .set_paused = set_paused, .save = save_into};

static void *api_main(void *unused)
{
	pthread_setname_np(pthread_self(), "api");
	coop_serve(&api);
	err(1, "%s", api.socket);
}

static void start_api(const char *path, unsigned n)
{
	static struct coop_region regions[64];
	pthread_t thread;

	for (unsigned i = 0; i < n; i++) {
		uint64_t from = state.memory / page_size * i / n * page_size,
			 to = state.memory / page_size * (i + 1) / n * page_size;

		regions[i] = (struct coop_region){memory + from, to - from, from, page_size};
	}
	api.socket = path;
	api.regions = regions;
	api.n_regions = n;
	if ((errno = pthread_create(&thread, NULL, api_main, NULL)))
		err(1, "API thread");
}

static const char *option(char **argv, const char *name, const char *otherwise)
{
	for (size_t n = strlen(name); *argv; argv++)
		if (strncmp(*argv, name, n) == 0 && (*argv)[n] == '=')
			return *argv + n + 1;
	return otherwise;
}

static uint64_t number(char **argv, const char *name, const char *otherwise)
{
	return strtoull(option(argv, name, otherwise), NULL, 10);
}

int main(int argc, char **argv)
{
	const char *control = option(argv, "--control", NULL), *restore = option(argv, "--restore", NULL);
	struct sigaction sa = {.sa_handler = kick};

	sigaction(SIGUSR1, &sa, NULL);
	kind = option(argv, "--kind", "memfd");
	state.memory = number(argv, "--memory", "64") * MIB;
	state.vcpus = number(argv, "--vcpus", "1");
	if (!control || state.vcpus < 1 || state.vcpus > MAX_VCPUS)
		errx(2, "usage: microvm --control=PATH [--NAME=VALUE]..., with 1 to %d vcpus", MAX_VCPUS);
	make_memory(restore);
	if (restore)
		load(option(argv, "--vmstate", ""));
	make_machine();
	if (!restore)
		boot(number(argv, "--work", "0") * MIB, number(argv, "--fill", "0"),
			number(argv, "--spin", "0"), option(argv, "--mailbox", NULL),
			number(argv, "--silent", "0"));
	start_vcpus();
	if (!number(argv, "--paused", "0"))
		set_paused(false);
	const char *path = option(argv, "--api", NULL);

	if (path)
		start_api(path, (unsigned)number(argv, "--regions", "1"));
	serve_all(control);
}
