"""VMs that `forkfs restore` has started: told by the lines it prints."""

import json
import os
import pathlib
import re
import signal
import socket
import time

from . import microvm, processes, qmp


class Child:
    """One VM, ended with the test. `said` is its line."""

    def __init__(self, case, said):
        self.case, self.said, self.pid = case, said, said["pid"]
        self.dir = pathlib.Path(said["dir"])
        self._sock = None
        case.on_end(self.stop)

    def drop(self):
        """Close the connection to it; the next question makes another."""
        if self._sock:
            self._sock.close()
            self._sock = None

    def stop(self):
        """End it."""
        self.drop()
        if processes.alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)
            assert processes.wait_gone(self.pid, 10), processes.describe(self.pid)

    def alive(self):
        """Does the process live?"""
        return processes.alive(self.pid)

    def stderr(self):
        """What the VMM has said."""
        return (self.dir / "stderr").read_text(errors="replace")

    def maps(self):
        """The files it has mapped."""
        return pathlib.Path(f"/proc/{self.pid}/maps").read_text()

    def files(self):
        """The files it has open."""
        return list(processes.open_files(self.pid).values())

    def pss(self):
        """Bytes of memory that are its own: pages shared with n others count for an n-th."""
        text = pathlib.Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Pss:\s+(\d+) kB", text, re.M).group(1)) << 10


class QemuChild(Child):
    """A QEMU: its guest's console is a log in its directory."""

    def console(self):
        """What the guest has said since it is this child."""
        path = self.dir / "con.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_console(self, pattern, count=1, timeout=60):
        """Wait until so many lines match."""
        deadline = time.monotonic() + timeout
        while len(re.findall(pattern, self.console(), re.M)) < count:
            assert self.alive(), f"child {self.pid} has ended: {self.stderr()}"
            assert time.monotonic() < deadline, f"child {self.pid} has not said {pattern} {count} times: {self.console()[-500:]}"
            time.sleep(0.01)

    def check_sane(self):
        """Fail if the guest has found wrong memory."""
        bad = re.findall(r"^.*(?:MISMATCH|ended:|panic|BUG:).*$", self.console(), re.M)
        assert not bad, bad[:3]

    def monitor(self):
        """A QMP connection, the caller's."""
        return qmp.Qmp(self.said["sockets"]["qmp"])


class MicroChild(Child):
    """The project's microVM, started with --control={dir}/control."""

    def status(self, command="status"):
        """What it says of itself, after a command."""
        if not self._sock:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._sock.settimeout(20)
            self._sock.connect(str(self.dir / "control"))
        self._sock.send(command.encode())
        answer = json.loads(self._sock.recv(4096))
        assert not answer["error"], answer
        return answer

    def check_sane(self):
        """Fail if the guest has found wrong memory."""
        assert self.status()["mismatches"] == 0, (self.dir / "stdout").read_text()[-300:]

    def mails(self):
        """What the guest has said of its mailbox since it is this child: [(epoch, payload)]."""
        return microvm.mails((self.dir / "stdout").read_bytes())

    def mail(self, number=1, timeout=60):
        """Wait for the first of them, or the one with that number."""
        deadline = time.monotonic() + timeout
        while len(found := self.mails()) < number:
            assert self.alive(), f"child {self.pid} has ended: {self.stderr()}"
            assert time.monotonic() < deadline, f"child {self.pid} says nothing more of its mailbox: {self.status()}"
            time.sleep(0.001)
        return found[number - 1]

    def visit_all(self, mib, times=2):
        """Wait until the guest has visited and judged all its pages so many times."""
        goal, deadline = self.status()["steps"] + times * mib * 256, time.monotonic() + 90
        while self.status()["steps"] < goal:
            assert time.monotonic() < deadline, f"{self.pid} is too slow: {self.status()}"
            time.sleep(0.005)
        self.check_sane()


# How the project's microVM is told what it starts from.
MICRO = ["--restore={memory}", "--vmstate={vmstate}", "--api={api}", "--control={dir}/control", "--paused=1"]


def micro_options(case):
    """The options of `forkfs restore` for children of the microVM."""
    return ["--vmm", case.tool("../microvm/microvm")]


def lines(case, text, kind):
    """The children that a command has told of."""
    return [kind(case, json.loads(line)) for line in text.splitlines()]


def vms(case):
    """The processes that work in a directory of a child: where, and the pid."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            where = os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            continue
        if where.startswith(f"{case.dir}/ch/"):
            found.append((pathlib.Path(where), int(pid)))
    return found


def nothing_left(case):
    """No directory of a child and no process in one: of commands that have failed."""
    base = case.dir / "ch"
    assert not base.exists() or not list(base.iterdir()), list(base.iterdir())
    assert not vms(case), [processes.describe(pid) for _, pid in vms(case)]


def words(mount, branch, *options, vmm=()):
    """The command that starts them, without the program."""
    return ["restore", branch, "--dir", str(mount.case.dir / "ch"), *options, *(["--", *vmm] if vmm else ())]


def run(mount, branch, *options, kind=QemuChild, vmm=(), check=True, timeout=120, **how):
    """`forkfs restore`; (the children, the command's result). branch: NAME/BRANCH[/FORK]; options may have more of them."""
    result = mount.run(*words(mount, branch, *options, vmm=vmm), check=check, timeout=timeout, **how)
    return lines(mount.case, result.out, kind), result


def run_micro(mount, branch, *options, **how):
    """The same for a branch of the microVM."""
    return run(mount, branch, *micro_options(mount.case), *options, kind=MicroChild, vmm=MICRO, **how)
