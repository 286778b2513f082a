"""Guests: a stock QEMU with a stock kernel and the programs of tests/guest."""

import collections
import os
import pathlib
import re
import shutil
import subprocess
import time

from . import console, processes, qmp

GUEST_DIR = pathlib.Path(__file__).resolve().parents[2] / "guest"
MIB = 1 << 20
# What a program of the guest says when it has its memory and works.
AT_WORK = {"counter": r"^tick \d+$", "load": r"^load [1-9]\d*$", "selfcheck": r"^ok \d+ \d+$",
           "journal": r"^journal \d+$", "mailbox": r"^mailbox \S+ ready$", "decoy": r"^decoy \S+ ready$"}


def kit():
    """The directory with vmlinuz and initrd, made by tests/guest/build.sh when it is not there yet."""
    if "FORKFS_GUEST_KIT" not in os.environ:
        r = subprocess.run([str(GUEST_DIR / "build.sh")], stdout=subprocess.PIPE, text=True, check=True)
        os.environ["FORKFS_GUEST_KIT"] = r.stdout.strip()
    return os.environ["FORKFS_GUEST_KIT"]


def vmgenid_kernel():
    """A kernel with the driver of vmgenid, which the kit's own has not."""
    return subprocess.run([str(GUEST_DIR / "build.sh"), "vmgenid"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def archive(files):
    """An initramfs (cpio, newc) of [(name, mode, bytes)]."""
    out = b""
    for name, mode, data in [*files, ("TRAILER!!!", 0, b"")]:
        fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
        out += head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
    return out


def agent_initrd(case):
    """An initrd whose process 1 is the agent, with a shell; made once a test."""
    path, source = case.dir / "agent-initrd", pathlib.Path(kit()) / "agent"
    if path.exists():
        return path
    agent = pathlib.Path(os.environ["FORKFS_BUILD"]) / "tools/forkfs-agent"
    files = [(d, 0o40755, b"") for d in ("bin", "dev", "proc", "sys", "modules", "tmp", "etc")]
    files += [(f"{p.relative_to(source)}", 0o100755, p.read_bytes()) for p in sorted(source.rglob("*")) if p.is_file()]
    files += [(f"bin/{name}", 0o120777, b"busybox") for name in AGENT_TOOLS]
    path.write_bytes(archive([*files, ("init", 0o100755, agent.read_bytes())]))
    return path


AGENT_TOOLS = ("sh", "cat", "echo", "true", "false", "sleep", "kill", "seq", "ps", "stty", "tty", "date", "ls", "md5sum", "head", "dd", "yes",
               "tail", "wc", "grep", "id", "env", "pwd", "setsid", "ip", "ifconfig", "mkdir", "rm", "touch", "insmod")
NOBODY = 65534


def accelerator(may_kvm=True):
    """KVM only where real hardware support is loaded: other KVMs hang a stock kernel."""
    hardware = may_kvm and any(os.path.exists(f"/sys/module/{m}") for m in ("kvm_intel", "kvm_amd"))
    return ["-accel", "kvm", "-cpu", "host"] if hardware else ["-accel", "tcg,thread=multi", "-cpu", "max"]


class Guest:
    """A running VM of a test.

    machine   microvm or q35; by default a microvm, and q35 where there is a disk (this kernel finds none on a microvm)
    backend   memfd (shared), hugetlb (shared, 2 MiB pages), ram (private), plain (-m alone, private) or file (a private mapping of
              `memory`: a child's, or any file of that size)
    run       what the guest starts, e.g. ["counter", "load,mib=64"]
    disk      None, "plain" or "iothread"
    image     the file behind the disk, which is there already; by default an empty one in the guest's own directory
    image_format  raw or qcow2
    overlay   the disk's writes go to a temporary file: the image is opened for reading only
    rights    None (the test's own), "nobody" (started by a user without any) or "dropped" (by root, who becomes one: not dumpable)
    network   a card in QEMU's user network, where the host is the gateway, 10.0.2.2
    balloon   the guest gives memory back when it is asked to; on a q35
    vmgenid   the VM has a generation id, and a kernel that knows it; on a q35
    agent     its process 1 is the agent of the build under test, on a q35; `run` is then the main command, as words.
              "port": there is the port for an agent, and nobody in the guest who listens there
    Two QMP sockets: `qmp_path` is left to forkfs; `qmp` is the test's own, which also counts events.
    """

    def __init__(self, case, name, run=("counter",), machine=None, mib=256, backend="memfd", smp=2, disk=None,
                 memory=None, stream=None, image=None, image_format="raw", overlay=False,
                 rights=None, balloon=False, agent=False, append="", vmgenid=False, network=False):
        self.case, self.name, self.mib, self.smp = case, name, mib, smp
        self.machine = machine or ("q35" if disk or balloon or agent or vmgenid else "microvm")
        self.agent, self.append, self.vmgenid = agent, append, vmgenid
        self.rights, self.balloon, self.network = rights, balloon, network
        self.run, self.disk_kind, self.image_format, self.overlay = list(run), disk, image_format, overlay
        self.dir = case.dir / f"vm-{name}"
        self.dir.mkdir()
        self.qmp_path = str(self.dir / "qmp")
        self.disk = image
        self.backend = "file" if memory else backend
        command = self._command(memory)
        if stream:
            command += ["-S", "-incoming", "defer", "-global", "migration.send-configuration=off"]
        who = {}
        if rights == "nobody":
            os.chmod(case.dir, 0o711)
            os.chown(self.dir, NOBODY, NOBODY)
            who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        with open(self.dir / "stderr", "wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, **who)
        case.on_end(self.stop)
        self.pid = self.process.pid
        self.console = console.Console(self.process.stdout, self.dir / "console")
        try:
            self.qmp = qmp.Qmp(str(self.dir / "tests"))
        except OSError as e:
            said = (self.dir / "stderr").read_text()
            raise AssertionError(f"QEMU did not start: {said.strip() or e}") from e
        if stream:
            self._incoming(stream)

    def _command(self, memory):
        size = f"{self.mib}M"
        objects = {
            "memfd": f"memory-backend-memfd,id=ram0,size={size},share=on",
            "hugetlb": f"memory-backend-memfd,id=ram0,size={size},share=on,hugetlb=on,hugetlbsize=2M",
            "ram": f"memory-backend-ram,id=ram0,size={size},share=off",
            "file": f"memory-backend-file,id=ram0,size={size},mem-path={memory},share=off",
        }
        # with ACPI a microvm under TCG has no clock that the kernel can calibrate, and often hangs at boot
        machine = {"microvm": "microvm,acpi=off", "q35": "q35"}[self.machine]
        kernel = kit()
        if self.rights == "nobody":  # who cannot look into root's home
            kernel = shutil.copytree(kernel, self.dir / "kit")
        memory_options = ["-M", machine]
        if self.backend != "plain":
            memory_options = ["-M", f"{machine},memory-backend=ram0", "-object", objects[self.backend]]
        command = ["qemu-system-x86_64", *memory_options, "-m", size, "-smp", str(self.smp), *accelerator(not self.rights),
                   "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                   "-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
                   "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
                   "-qmp", f"unix:{self.dir}/tests,server=on,wait=off",
                   "-kernel", f"{kernel}/vmlinuz", "-initrd", f"{kernel}/initrd",
                   "-append", "console=ttyS0 quiet panic=-1 " + " ".join(f"run={r}" for r in self.run)]
        if self.agent is True:
            # on a busy machine its timer is late, which this kernel takes for none on a q35, and panics
            at = command.index("-initrd")
            command[at + 1] = agent_initrd(self.case)
            command[command.index("-append") + 1] = " ".join(
                ["console=ttyS0 quiet panic=-1 no_timer_check", self.append, *(["--", *self.run] if self.run else [])])
        if self.agent:
            command += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={self.dir}/agent,server=on,wait=off",
                        "-device", "virtserialport,chardev=agent,name=forkfs.agent"]
        if self.vmgenid:
            command[command.index("-kernel") + 1] = vmgenid_kernel()
            command += ["-device", "vmgenid,guid=auto"]
        if self.rights == "dropped":
            command += ["-runas", "nobody"]
        if self.network:
            command += ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"]
        if self.balloon:
            command += ["-device", "virtio-balloon-pci"]
        if self.disk_kind:
            if not self.disk:
                self.disk = self.dir / "disk.img"
                with open(self.disk, "wb") as f:
                    f.truncate(64 * MIB)
            device = "virtio-blk-pci,drive=d0"
            if self.disk_kind == "iothread":
                command += ["-object", "iothread,id=io0"]
                device += ",iothread=io0"
            command += ["-drive", f"file={self.disk},format={self.image_format},if=none,id=d0{',snapshot=on' if self.overlay else ''}",
                        "-device", device]
        return command

    def _incoming(self, stream):
        self.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self.qmp.execute("migrate-incoming", uri=f"exec:cat {stream}")
        message = self.qmp.wait_event(
            lambda m: m["event"] == "MIGRATION" and m["data"]["status"] in ("completed", "failed"))
        if message["data"]["status"] != "completed":
            said = (self.dir / "stderr").read_text().strip()
            raise AssertionError(f"the child could not load {stream}: {said}")

    def child(self, name, memory, stream, disk=None, image_format="raw"):
        """A VM that goes on from a branch's two files; stopped until `go`. disk: a captured one, used through an overlay."""
        if disk:
            return Guest(self.case, name, run=self.run, machine=self.machine, mib=self.mib, smp=self.smp, disk=self.disk_kind,
                         memory=memory, stream=stream, image=disk, image_format=image_format, overlay=True)
        other = Guest(self.case, name, run=self.run, machine=self.machine, mib=self.mib, smp=self.smp,
                      disk=self.disk_kind, memory=memory, stream=stream)
        if self.disk:
            shutil.copyfile(self.disk, other.disk)
        return other

    def go(self):
        """Let a child run."""
        self.qmp.execute("cont")

    def booted(self):
        """Wait until each of the guest's programs is at work; self."""
        if self.agent is True:
            self.console.wait("forkfs-agent: up", timeout=90)
            return self
        for run in self.run:
            self.console.wait(AT_WORK[run.split(",")[0]], timeout=90)
        return self

    def hva(self, gpa=0):
        """Where the VMM has a guest-physical address mapped, as QEMU itself says."""
        said = self.qmp.monitor(f"gpa2hva {gpa:#x}")
        match = re.search(r"is (0x[0-9a-f]+)", said)
        assert match, f"gpa2hva {gpa:#x}: {said}"
        return int(match.group(1), 16)

    def stops(self):
        """How often the VM was stopped until now."""
        self.qmp.execute("query-status")  # events come in the order in which they happened: those before the answer are here
        return self.qmp.count("STOP")

    def check_runs(self, within=1.0):
        """Fail unless QEMU says the guest runs, and its console goes on, within so many seconds."""
        start, deadline = self.console.mark(), time.monotonic() + within
        status = None
        while status != "running":
            try:
                status = self.qmp.execute("query-status", timeout=max(0.05, deadline - time.monotonic()))["status"]
            except qmp.QmpError as e:
                status = str(e)
            assert status == "running" or time.monotonic() < deadline, \
                f"{self.name} should be running after {within:.2f} s, is: {status}"
        self.console.wait(r"\d$", timeout=max(0.05, deadline - time.monotonic()), start=start)

    def check_sane(self):
        """Fail if a self-checking program has found wrong memory, or any program of the guest has ended."""
        bad = [m.string for _, m in self.console.all(r"MISMATCH|ended:|panic|BUG:")]
        assert not bad, f"{self.name}: the guest says {bad[:3]}"

    def check_torn(self):
        """Fail if a child of memory and vmstate of two instants goes on as if nothing were wrong.

        It says so itself, its kernel does, or it cannot even say anything."""
        start = self.console.mark()
        try:
            self.console.wait("MISMATCH|ended:|panic|BUG:|Oops|WARNING", timeout=20, start=start)
        except AssertionError:
            content = self.console.all("^ok", start)
            assert not content, f"{self.name} is torn and content: {content[-1][1].string}"

    def protected(self):
        """Mappings of the VMM that are registered for write protection."""
        return processes.protected(self.pid)

    def fds(self):
        """The VMM's open files, by what they are, each with how often."""
        return collections.Counter(processes.open_files(self.pid).values())

    def check_free(self, fds, within=1.0):
        """Fail unless within so many seconds nothing of the VMM is registered, and its files are those it had.

        Not counted: the one memfd for device state that a daemon killed between add-fd and remove-fd leaves in QEMU; the next
        branch removes it."""
        deadline = time.monotonic() + within
        stale = "/memfd:forkfs-vmstate (deleted)"

        def files():
            found = self.fds()
            assert found[stale] <= 1, f"{found[stale]} memfds for device state are left in the VMM"
            del found[stale]
            return found

        fds = +fds
        del fds[stale]
        while self.protected() or files() != fds:
            now = files()
            assert time.monotonic() < deadline, (
                f"{self.protected()} mappings of the VMM are registered; files it has too many: {dict(now - fds)}, "
                f"too few: {dict(fds - now)}")
            time.sleep(0.01)

    def memfd(self):
        """The memfd which is the guest's memory, as a path."""
        for path, link in processes.open_files(self.pid).items():
            if "memory-backend-memfd" in link:
                return path
        raise AssertionError(f"{self.name} has no memfd")

    def memfd_blocks(self):
        """512-byte blocks that are allocated to that memfd."""
        return os.stat(self.memfd()).st_blocks

    def stop(self):
        """End the VM."""
        if processes.alive(self.pid):
            self.process.kill()
        self.process.wait()
        if hasattr(self, "qmp"):
            self.qmp.close()
