/* The command line of a child of QEMU: what of the parent's is the machine, and that nothing of a hostile one gets
 * through. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../tools/restore-qemu-args.h"
#include "base/util.h"

#define MIB (1ull << 20)

struct made {
	struct ffs_qemu_args a;
	struct ffs_error err;
	char text[8192]; /* the words, each between bars */
	int r;
};

static struct made *make_with(const char *const *words, unsigned n, bool trust, const char *disks,
	const char *const *user, unsigned n_user)
{
	static struct made m;
	struct json_object *line = json_object_new_array();
	size_t len = 1;

	m = (struct made){.text = "|"};
	json_object_array_add(line, json_object_new_string("/opt/evil/qemu-system-x86_64"));
	for (unsigned i = 0; i < n; i++)
		json_object_array_add(line, json_object_new_string(words[i]));
	m.a.command_line = line;
	m.a.disks = disks ? json_tokener_parse(disks) : NULL;
	m.a.trust = trust;
	m.a.memory_size = 256 * MIB;
	m.a.user = user;
	m.a.n_user = n_user;
	m.a.notes = json_object_new_array();
	m.r = ffs_qemu_args_make(&m.a, &m.err);
	for (unsigned i = 0; i < m.a.out.n; i++)
		len += (size_t)snprintf(m.text + len, sizeof(m.text) - len, "%s|", m.a.out.word[i]);
	json_object_put(line);
	json_object_put(m.a.disks);
	json_object_put(m.a.notes);
	ffs_argv_free(&m.a.out);
	return &m;
}

#define MAKE(...)                                                                                            \
	make_with((const char *const[]){__VA_ARGS__},                                                        \
		sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *), false, NULL, NULL, 0)
#define assert_has(m, part) has(m, part, true, __LINE__)
#define assert_has_not(m, part) has(m, part, false, __LINE__)

static void has(struct made *m, const char *part, bool wanted, int line)
{
	if (!!strstr(m->text, part) == wanted)
		return;
	print_error("line %d: '%s' is%s in %s\n", line, part, wanted ? " not" : "", m->text);
	fail();
}

static void test_machine(void **state)
{
	struct made *m = MAKE("-M", "microvm,acpi=off,memory-backend=ram0", "-object",
		"memory-backend-memfd,id=ram0,size=256M,share=on", "-m", "256M", "-smp", "2", "-accel",
		"tcg,thread=multi", "-nodefaults", "-chardev", "stdio,id=con,signal=off", "-serial",
		"chardev:con", "-qmp", "unix:/run/q,server=on,wait=off", "-kernel", "/boot/vmlinuz",
		"-append", "console=ttyS0", "-device", "virtio-rng-device");

	assert_int_equal(m->r, 0);
	assert_has(m, "|-M|microvm,acpi=off,memory-backend=ram0|");
	assert_has(m, "|-object|memory-backend-file,id=ram0,size=268435456,mem-path=/proc/self/fd/"
		      "3,share=off,merge=off");
	assert_has(m, "|-chardev|socket,id=con,path=con.sock,server=on,wait=off,logfile=con.log|-serial|"
		      "chardev:con|");
	assert_has(m, "|-device|virtio-rng-device|");
	assert_has_not(m, "memfd");
	assert_has_not(m, "/run/q");
	assert_has_not(m, "/boot");
}

static void test_plain_memory(void **state)
{
	struct made *m = MAKE("-m", "256M", "-nographic");

	assert_int_equal(m->r, 0);
	assert_has(m, "id=pc.ram,");
	assert_has(m, "|-machine|memory-backend=pc.ram|");
	assert_has(m, "|-serial|chardev:serial0|");
}

static void test_network(void **state)
{
	struct made *m = MAKE("-m", "256M", "-netdev", "tap,id=n0,ifname=tap0,script=/etc/evil", "-netdev",
		"user,id=n1,net=10.1.0.0/16,hostfwd=tcp::22-:22,guestfwd=tcp:1.2.3.4:1-cmd:sh,smb=/", "-nic",
		"bridge,br=br0,model=virtio-net-pci,mac=52:54:00:12:34:56");

	assert_int_equal(m->r, 0);
	assert_has(m, "|-netdev|user,id=n0,restrict=on|");
	assert_has(m, "|-netdev|user,id=n1,net=10.1.0.0/16|");
	assert_has(m, "|-nic|user,restrict=on,model=virtio-net-pci,mac=52:54:00:12:34:56|");
	for (const char *const *bad =
			(const char *const[]){"tap", "script", "hostfwd", "cmd:", "smb", "br0", NULL};
		*bad; bad++)
		assert_has_not(m, *bad);

	const char *const user[] = {"-netdev", "tap,id=n0,ifname=tap7"};

	m = make_with((const char *const[]){"-m", "256M", "-netdev", "tap,id=n0,ifname=tap0"}, 4, false, NULL,
		user, 2);
	assert_int_equal(m->r, 0);
	assert_has_not(m, "-netdev");
}

static void test_disks(void **state)
{
	static const char disks[] = "[{\"id\":\"root\",\"path\":\"/vms/root.img\"}]";
	const char *const good[] = {
		"-m", "256M", "-drive", "file=/vms/root.img,format=raw,if=none,id=d0,cache=none,aio=native"};
	const char *const relative[] = {"-m", "256M", "-drive", "file=root.img,if=none,id=d0"};
	const char *const other[] = {"-m", "256M", "-drive", "file=/vms/other.img,format=raw,if=none,id=d0"};
	struct made *m = make_with(good, 4, false, disks, NULL, 0);

	assert_int_equal(m->r, 0);
	assert_has(m, "|-drive|if=none,id=d0,file=/proc/self/fd/6,format=raw,snapshot=on|");
	assert_string_equal(m->a.disk[0], "root");
	/* not probed */
	m = make_with(relative, 4, false, disks, NULL, 0);
	assert_int_equal(m->r, 0);
	assert_has(m, ",format=raw,snapshot=on|");
	/* the parent's own file is never used, whatever is believed */
	for (int trust = 0; trust < 2; trust++) {
		m = make_with(other, 4, trust, disks, NULL, 0);
		assert_int_equal(m->r, -ENOTSUP);
		assert_non_null(strstr(m->err.text, "/vms/other.img"));
	}
	const char *const user[] = {"-drive", "if=none,id=d0,file=/mine.img"};

	m = make_with(other, 4, false, disks, user, 2);
	assert_int_equal(m->r, 0);
	assert_has_not(m, "other");
}

/* Each alone in a command line that is good otherwise: refused, or of no effect. */
static void test_hostile(void **state)
{
	static const char *const refused[][2] = {{"-device", "loader,file=/etc/shadow,addr=0x1000"},
		{"-device", "vfio-pci,host=0000:01:00.0"}, {"-device", "virtio-net-pci,romfile=/etc/shadow"},
		{"-device", "virtio-net-pci,romfile=x.bin"}, {"-device", "virtio-9p-pci,fsdev=f,mount_tag=x"},
		{"-device", "vhost-user-blk-pci,chardev=c"},
		{"-device", "{\"driver\":\"loader\",\"file\":\"/etc/shadow\"}"}, {"-readconfig", "/tmp/evil"},
		{"-set", "drive.d0.file=/etc/shadow"},
		{"-blockdev", "driver=file,filename=/etc/shadow,node-name=x"}, {"-hda", "/dev/sda"},
		{"-cdrom", "/etc/shadow"}, {"-fsdev", "local,path=/,id=f,security_model=none"},
		{"-virtfs", "local,path=/,mount_tag=x"},
		{"-object", "memory-backend-file,id=x,mem-path=/etc/shadow,size=1M,share=on"},
		{"-object", "secret,id=s,file=/etc/shadow"},
		{"-object", "rng-random,id=r,filename=/etc/shadow"}, {"-object", "can-host-socketcan,id=c"},
		{"-drive", "file=/etc/shadow,format=raw,if=virtio"},
		{"-drive", "driver=vvfat,file.driver=vvfat,file=x,format=vvfat"},
		{"-M", "q35,kernel=/etc/shadow"}, {"-machine", "q35,dumpdtb=/etc/cron.d/x"},
		{"-fw_cfg", "name=opt/x,file=/etc/shadow"}, {"-smbios", "file=/etc/shadow"},
		{"-acpitable", "file=/etc/shadow"}, {"-pflash", "/dev/sda"},
		{"-tpmdev", "passthrough,id=t,path=/dev/tpm0"}, {"-cpu", "-device"}, {"-uuid", "x\n-device"},
		{"-chardev", "file,id=../../etc/cron.d/x,path=/etc/passwd"}, {"-serial", "chardev:../x"},
		{"-netdev", "user,id=../x"}, {"-M", "x,memory-backend=a,,share=on"}, {"-daemonise", "x"},
		{"/etc/shadow", "x"}};
	static const char *const harmless[][2] = {{"-serial", "file:/etc/passwd"},
		{"-chardev", "pipe,id=c,path=/etc/passwd"}, {"-monitor", "tcp:0.0.0.0:4444,server"},
		{"-qmp", "tcp:0.0.0.0:4444,server"}, {"-vnc", "0.0.0.0:0"}, {"-pidfile", "/etc/passwd"},
		{"-D", "/etc/passwd"}, {"-incoming", "exec:evil"}, {"-plugin", "/tmp/evil.so"},
		{"-gdb", "tcp::1234"}, {"-kernel", "/etc/shadow"}, {"-initrd", "/etc/shadow"},
		{"-bios", "/etc/shadow"}, {"-L", "/tmp/evil"}, {"-trace", "file=/etc/passwd"},
		{"-netdev", "user,id=n,smb=/,hostfwd=tcp::1-:1"}, {"-net", "tap,script=/tmp/evil"},
		{"-add-fd", "fd=3,set=1"}, {"-chroot", "/tmp/evil"}, {"-debugcon", "file:/etc/passwd"},
		{"-chardev", "file,id=forkfs-control,path=/etc/x"}, {"-parallel", "/dev/parport0"}};

	for (unsigned i = 0; i < FFS_ARRAY_LEN(refused); i++) {
		struct made *m = MAKE("-m", "256M", refused[i][0], refused[i][1]);

		if (m->r >= 0)
			print_error("%s %s was taken: %s\n", refused[i][0], refused[i][1], m->text);
		assert_true(m->r < 0);
		assert_true(m->err.text[0]);
	}
	for (unsigned i = 0; i < FFS_ARRAY_LEN(harmless); i++) {
		struct made *m = MAKE("-m", "256M", harmless[i][0], harmless[i][1]);

		assert_int_equal(m->r, 0);
		for (const char *const *bad = (const char *const[]){"/etc", "/tmp", "evil", "0.0.0.0",
			     "exec:", "1234", "hostfwd", "smb", "/dev/par", NULL};
			*bad; bad++)
			assert_has_not(m, *bad);
	}
}

static void test_no_command_line(void **state)
{
	struct ffs_qemu_args a = {.memory_size = MIB};
	struct ffs_error err = {0};
	static const char *const lines[] = {
		"{}", "[]", "[1,2,3]", "[\"q\",null]", "[\"q\",\"-m\"]", "[\"q\",\"-m\",7]"};

	assert_int_equal(ffs_qemu_args_make(&a, &err), -EINVAL);
	for (unsigned i = 0; i < FFS_ARRAY_LEN(lines); i++) {
		a = (struct ffs_qemu_args){.memory_size = MIB, .command_line = json_tokener_parse(lines[i])};
		assert_true(ffs_qemu_args_make(&a, &err) < 0);
		ffs_argv_free(&a.out);
		json_object_put(a.command_line);
	}
}

static void test_expand(void **state)
{
	const struct ffs_restore_word words[] = {{"memory", "/proc/self/fd/3"}, {"api", "{memory}"}};
	char *text = ffs_restore_expand("--m={memory},{api} {other} {", words, 2);

	assert_string_equal(text, "--m=/proc/self/fd/3,{memory} {other} {");
	free(text);
}

static int conf(const char *text, mode_t mode, struct ffs_restore_conf *out, struct ffs_error *err)
{
	char path[] = "/tmp/forkfs-conf-XXXXXX";
	int fd = mkstemp(path), r;

	assert_true(fd >= 0);
	assert_int_equal(ffs_write_full(fd, text, strlen(text)), (ssize_t)strlen(text));
	assert_int_equal(fchmod(fd, mode), 0);
	close(fd);
	r = ffs_restore_conf_read(path, "qemu", out, err);
	unlink(path);
	return r;
}

static void test_conf(void **state)
{
	struct ffs_restore_conf c = {0};
	struct ffs_error err = {0};

	assert_int_equal(
		conf("# q\nkind = qemu\n  binary=/usr/bin/q \narg = -sandbox\narg = on, x=y\nenv = A=b=c\n",
			0600, &c, &err),
		0);
	assert_string_equal(c.binary, "/usr/bin/q");
	assert_int_equal(c.arg.n, 2);
	assert_string_equal(c.arg.word[1], "on, x=y");
	assert_string_equal(c.env.word[0], "A=b=c");
	ffs_restore_conf_free(&c);
	assert_int_equal(conf("kind = qemu\n", 0622, &c, &err), -EPERM);
	assert_int_equal(conf("kind = coop\n", 0600, &c, &err), -EINVAL);
	assert_int_equal(conf("binary = /usr/bin/q\n", 0600, &c, &err), -EINVAL);
	assert_int_equal(conf("kind = qemu\nbinary = q\n", 0600, &c, &err), -EINVAL);
	assert_non_null(strstr(err.text, "line 2"));
	assert_int_equal(conf("kind = qemu\nshell = sh -c x\n", 0600, &c, &err), -EINVAL);
	assert_int_equal(conf("kind = qemu\nenv = x\n", 0600, &c, &err), -EINVAL);
}

/* What the words and the lines of a file name, as one string; the code when they are refused. */
static int targets(
	const char *text, size_t len, const char *a, const char *b, char names[200], struct ffs_error *err)
{
	char path[] = "/tmp/forkfs-forks-XXXXXX", first[80], second[80], *word[] = {first, second};
	struct ffs_restore_targets t = {0};
	size_t at = 0;
	int r;

	snprintf(first, sizeof(first), "%s", a);
	snprintf(second, sizeof(second), "%s", b ? b : "");
	if (text) {
		int fd = mkstemp(path);

		assert_true(fd >= 0);
		assert_int_equal(ffs_write_full(fd, text, len), (ssize_t)len);
		close(fd);
	}
	r = ffs_restore_targets_read(&t, word, b ? 2 : 1, text ? path : NULL, err);
	names[0] = 0;
	for (unsigned i = 0; !r && i < t.n; i++)
		at += (size_t)snprintf(names + at, 200 - at, "%s/%s/%s ", t.target[i].sandbox,
			t.target[i].branch, t.target[i].fork);
	ffs_restore_targets_free(&t);
	if (text)
		unlink(path);
	return r;
}

static void test_targets(void **state)
{
	struct ffs_error err = {0};
	char names[200], *many = NULL;
	size_t len = 0;
	FILE *f;

	assert_int_equal(targets(NULL, 0, "x/b", NULL, names, &err), 0);
	assert_string_equal(names, "x/b/ ");
	assert_int_equal(targets(NULL, 0, "x/b/z", "x/b/a/", names, &err), 0);
	assert_string_equal(names, "x/b/z x/b/a ");
	assert_int_equal(targets("z\n\na", 4, "x/b", NULL, names, &err), 0);
	assert_string_equal(names, "x/b/z x/b/a ");
	assert_int_equal(targets("z\n", 2, "x/b/c", NULL, names, &err), -EINVAL);
	assert_int_equal(targets("z\0a\n", 4, "x/b", NULL, names, &err), -EINVAL);
	assert_int_equal(targets("z\na \n", 5, "x/b", NULL, names, &err), -EINVAL);
	assert_non_null(strstr(err.text, "line 2"));
	assert_int_equal(targets("", 0, "x/b", NULL, names, &err), -EINVAL);
	assert_int_equal(targets(NULL, 0, "x", NULL, names, &err), -EINVAL);
	f = open_memstream(&many, &len);
	for (unsigned i = 0; i <= FFS_CHILDREN_MAX; i++)
		fprintf(f, "c%u\n", i);
	fclose(f);
	assert_int_equal(targets(many, len, "x/b", NULL, names, &err), -EINVAL);
	assert_non_null(strstr(err.text, "too many"));
	free(many);
}

int main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(test_machine),
		cmocka_unit_test(test_plain_memory), cmocka_unit_test(test_network),
		cmocka_unit_test(test_disks), cmocka_unit_test(test_hostile),
		cmocka_unit_test(test_no_command_line), cmocka_unit_test(test_expand),
		cmocka_unit_test(test_conf), cmocka_unit_test(test_targets)};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
