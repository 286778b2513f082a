"""A stock Firecracker with the guest of tests/microvm, where there is one: $FIRECRACKER, or in PATH."""

import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import time

from . import children, console, microvm, processes
from .api import Api
from .case import Missing


def program(name="firecracker"):
    """The path of firecracker, or of the jailer beside it."""
    found = os.environ.get(name.upper()) or shutil.which(name)
    if not found and name == "jailer" and os.environ.get("FIRECRACKER"):
        beside = pathlib.Path(os.environ["FIRECRACKER"]).parent / "jailer"
        found = str(beside) if beside.exists() else None
    if not found:
        raise Missing(f"no {name}: unpack a release of firecracker-microvm/firecracker for x86_64 and say "
                      f"{name.upper()}=/PATH/OF/{name}, or put it into PATH")
    return found


def copy_libraries(root):
    """What a Firecracker that is not static needs in its jail: a release is, a build of one's own need not be."""
    said = subprocess.run(["ldd", program()], capture_output=True, text=True, check=False).stdout
    for path in re.findall(r"(/\S+) \(0x", said):
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path[1:])


class Firecracker:
    """One that runs.

    at, work    MiB: where the guest's own slice begins, and its size
    load        (memory, vmstate): restored from these instead
    backend     what `memory` is: "File", or "Uffd" and the socket of a pager
    jail        uid of the jail, or None
    machine     more keys of machine-config
    mailbox     the guest publishes one, config:s3cret, and acknowledges in its page; "vsock": by vsock; "silent": not at all
    fill        all its memory is touched once before it works
    drivers     it uses its drive and its vsock (tests/microvm/fc-virtio.c)
    """

    def __init__(self, case, name, mib=128, at=16, work=64, load=None, jail=None, machine=None, devices=None, backend="File",
                 mailbox=False, drivers=False, fill=False):
        self.case, self.name, self.mib = case, name, mib
        self.dir = root = case.dir / f"vm-{name}"
        self.dir.mkdir()
        self.work = work
        command = [program()]
        if jail:
            command = [program("jailer"), "--id", name, "--exec-file", program(), "--uid", str(jail), "--gid", str(jail),
                       "--chroot-base-dir", str(self.dir), "--new-pid-ns", "--"]
            root = self.dir / pathlib.Path(program()).resolve().name / name / "root"
            root.mkdir(parents=True)
            copy_libraries(root)
        self.root = root
        inside = "" if jail else str(root)
        shutil.copy(os.path.join(os.environ["FORKFS_BUILD"], "tests", "microvm", "fc-guest"), root / "kernel")
        word = {"vsock": "vsock-mailbox", "silent": "silent"}.get(mailbox, "mailbox") if mailbox else "devices" if drivers else f"f{mib}" if fill else "."
        (root / "log").touch()
        config = {"boot-source": {"kernel_image_path": f"{inside}/kernel", "boot_args": f"{at} {work} {word}"},
                  "machine-config": {"vcpu_count": 1, "mem_size_mib": mib, **(machine or {})}, "drives": [], **(devices or {})}
        (root / "config").write_text(json.dumps(config))
        if jail:
            for entry in ("", "kernel", "log", "config"):
                os.chown(root / entry, jail, jail)
        self.api_path = root / "a.sock"
        command += ["--api-sock", f"{inside}/a.sock", "--level", "Error", "--log-path", f"{inside}/log"]
        if not load:
            command += ["--config-file", f"{inside}/config"]
        with open(self.dir / "stderr", "wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        self.pid = self.process.pid
        case.on_end(self.stop)
        self.console = console.Console(self.process.stdout, self.dir / "console")
        self.attach_options = ["--firecracker", self.api_path]
        self.api = Api(self.api_path)
        self._wait_api()
        # a jailer that makes a pid namespace is not what runs in the end
        self.pid = struct.unpack("iii", self.api.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if load:
            self.api.call("PUT", "/snapshot/load", {
                "snapshot_path": str(load[1]), "resume_vm": True,
                "mem_backend": {"backend_type": backend, "backend_path": str(load[0])}})

    def _wait_api(self, timeout=20):
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.api.state()
                return
            except OSError:
                self.api.close()
            # a jailer that makes a pid namespace ends when it has
            assert time.monotonic() < deadline and not self.process.poll(), \
                f"firecracker did not start: {(self.dir / 'stderr').read_text()}{(self.root / 'log').read_text()[-500:]}"
            time.sleep(0.005)

    def booted(self):
        """Wait until the guest works; self."""
        self.check_runs(20)
        return self

    def check_sane(self):
        """Fail if the guest has found wrong memory."""
        bad = [m.string for _, m in self.console.all("MISMATCH")]
        assert not bad, f"{self.name}: the guest says {bad[:3]}"

    def check_runs(self, within=1.5):
        """Fail unless the guest says within so many seconds that it works."""
        self.console.wait(r"ok 0 [0-9a-f]{16}", start=self.console.mark(), timeout=within)
        self.check_sane()

    def steps(self):
        """The number in the last line it printed."""
        lines = self.console.all(r"ok 0 ([0-9a-f]{16})")
        return int(lines[-1][1].group(1), 16) if lines else 0

    def visit_all(self, times=2):
        """Wait until the guest has visited and judged all its pages so many times."""
        self.console.wait("ok 0", start=self.console.mark(), timeout=20)
        goal, deadline = self.steps() + times * self.work * 256, time.monotonic() + 60
        while self.steps() < goal:
            assert time.monotonic() < deadline, f"{self.name} is too slow: {self.steps()} of {goal}"
            time.sleep(0.01)
        self.check_sane()

    def mails(self):
        """What the guest has said of its mailbox."""
        return microvm.mails((self.dir / "console").read_bytes())

    def protected(self):
        """Mappings of the VMM that are registered for write protection."""
        return processes.protected(self.pid)

    def wait_free(self, within=1.5):
        """Fail unless nothing is registered within so many seconds, and no userfaultfd is left open in the VMM."""
        processes.wait_free(self.pid, self.name, within)

    def left_over(self):
        """Files of forkfs beside the API socket."""
        return [n for n in os.listdir(self.root) if ".forkfs-" in n]

    def filtered(self):
        """True when a seccomp filter is in force for the VMM's thread."""
        return re.search(r"^Seccomp:\s*2", pathlib.Path(f"/proc/{self.pid}/status").read_text(), re.M) is not None

    def stop(self):
        """End it."""
        self.api.close()
        if processes.alive(self.pid):
            os.kill(self.pid, 9)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class FirecrackerChild(children.Child):
    """A child by `forkfs restore`: its guest's console is the stdout file in its directory."""

    def console(self):
        """What the guest has said since it is this child."""
        return (self.dir / "stdout").read_text(errors="replace")

    def steps(self):
        """The number in the last line it printed; 0 before the first."""
        found = re.findall(r"ok 0 ([0-9a-f]{16})\n", self.console())
        return int(found[-1], 16) if found else 0

    def mail(self, timeout=60):
        """Wait until the guest has found something in its mailbox; all it found: [(epoch, payload)]."""
        deadline = time.monotonic() + timeout
        while not (found := microvm.mails(self.console().encode())):
            assert self.alive(), f"child {self.pid} has ended: {self.stderr()}"
            assert time.monotonic() < deadline, f"child {self.pid} has found nothing: {self.console()[-300:]}"
            time.sleep(0.005)
        return found

    def visit_all(self, work, times=2, timeout=90):
        """Wait until the guest has visited and judged all its pages (`work` MiB) so many times."""
        deadline, goal = time.monotonic() + timeout, None
        while goal is None or self.steps() < goal:
            assert self.alive(), f"child {self.pid} has ended: {self.stderr()}"
            assert time.monotonic() < deadline, f"child {self.pid} is too slow: {self.steps()} of {goal}"
            if goal is None and self.steps():
                goal = self.steps() + times * work * 256
            time.sleep(0.01)
        assert "MISMATCH" not in self.console(), self.console()[-300:]


def drive(path, name, read_only=False):
    """A drive of the configuration."""
    return {"drive_id": name, "path_on_host": str(path), "is_root_device": False, "is_read_only": read_only}


def restore(mount, branch, *options, check=True):
    """`forkfs restore`; (the children, the command's result)."""
    return children.run(mount, branch, "--vmm", program(), *options, kind=FirecrackerChild, check=check)


def jail_options(case, uid, gid):
    """For children in jails below the test's directory: the command's options, and the jailer's."""
    (case.dir / "jails").mkdir(exist_ok=True)
    return ["--jailer", program("jailer")], ["--uid", uid, "--gid", gid, "--chroot-base-dir", case.dir / "jails"]


def pagers(case):
    """The pids of pagers that `forkfs restore` has started in a test, and that live."""
    found = []
    for path in (case.dir / "ch").glob("pager.*/stdout"):
        said = [json.loads(line) for line in path.read_text().splitlines()]
        found += [s["pid"] for s in said if s["event"] == "listens" and processes.alive(s["pid"])]
    return found


def wait_pagers(case, timeout=30):
    """When the children have ended: their pagers do so too, and let go of the mount."""
    deadline = time.monotonic() + timeout
    while found := pagers(case):
        assert time.monotonic() < deadline, f"pagers live on without children: {found}"
        time.sleep(0.01)
