"""Starting a VM from two files as `forkfs restore` does, with the same words, but without it: the VMM's own share of a restore."""

import json
import os
import pathlib
import socket
import subprocess
import time

from forkfs_test import children
from forkfs_test.qmp import QmpError

POLL = 0.0002  # seconds; where a VMM has no event that could be waited for


def since(start):
    """Milliseconds since a time.monotonic()."""
    return (time.monotonic() - start) * 1e3


class Monitor:
    """QMP on one end of a socket pair: a command at a time, in one thread."""

    def __init__(self, sock):
        self.sock, self.file = sock, sock.makefile("r")
        self.read()
        self.execute("qmp_capabilities")

    def read(self):
        """The next message."""
        line = self.file.readline()
        if not line:
            raise QmpError("the VM has ended")
        return json.loads(line)

    def execute(self, command, fd=None, until=None, **arguments):
        """Its answer; then until(message) is true for an event, which may have come before the answer."""
        data = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        if fd is None:
            self.sock.sendall(data)
        else:
            socket.send_fds(self.sock, [data], [fd])
        answered, happened = False, until is None
        while not answered or not happened:
            message = self.read()
            if "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            answered |= "return" in message
            happened |= "event" in message and until is not None and until(message)

    def close(self):
        """The VM goes on without it."""
        self.file.close()
        self.sock.close()


def loaded(message):
    """Has QEMU taken the device state?"""
    if message["event"] != "MIGRATION" or message["data"]["status"] not in ("completed", "failed"):
        return False
    if message["data"]["status"] == "failed":
        raise QmpError("the device state could not be loaded")
    return True


class Way:
    """How children of one guest are started: the words are what `forkfs restore --show` says of a branch."""

    kind, options, vmm = children.QemuChild, (), ()
    repeat = 2  # starts of a settled branch in a round
    herd = ()  # options of the command for many at the same time

    def __init__(self, mount, branch):
        self.mount, self.case, self.count = mount, mount.case, 0
        shown = json.loads(mount.run("restore", branch, *self.options, "--show", *(["--", *self.vmm] if self.vmm else ())).out)
        self.words = shown["command"]
        self.environment = dict(word.split("=", 1) for word in shown["environment"])

    def command(self, branch, *options):
        """Children by `forkfs restore`: they, and milliseconds that the command took."""
        found, result = children.run(self.mount, branch, *self.options, *options, kind=self.kind, vmm=self.vmm)
        return found, result.seconds * 1e3

    def told(self, branch, *options):
        """The same, each as soon as it is told of; a failure of any is one."""
        words = children.words(self.mount, branch, *self.options, *options, vmm=self.vmm)
        command = self.case.start(self.mount.binary, words[0], "--mount", self.mount.path, *words[1:], stdout=subprocess.PIPE, text=True)
        for line in command.stdout:
            yield self.kind(self.case, json.loads(line))
        assert command.wait() == 0, f"forkfs restore ended with {command.returncode}"

    def direct(self, memory, vmstate, number=0, paused=False):
        """One child of two files; said["runs_ms"] is when it ran (paused: was loaded). number: among those of the same time."""
        where = self.case.dir / "direct" / f"{self.count}.{number}"
        where.mkdir(parents=True)
        ours, theirs = socket.socketpair()
        put = {"/proc/self/fd/3": str(memory), "/proc/self/fd/4": str(vmstate), "fd=5": f"fd={theirs.fileno()}",
               "--control=/": "--control="}

        def own(word):
            for old, new in put.items():
                word = word.replace(old, new)
            return word

        start = time.monotonic()
        with theirs, open(where / "stdout", "wb") as said, open(where / "stderr", "wb") as errors:
            process = subprocess.Popen([own(w) for w in self.words], cwd=where, stdin=subprocess.DEVNULL, stdout=said,
                                       stderr=errors, pass_fds=[theirs.fileno()], start_new_session=True,
                                       env={**os.environ, **{k: own(v) for k, v in self.environment.items()}})
        child = self.kind(self.case, {"pid": process.pid, "dir": str(where), "start": start})
        child.process = process
        try:
            self.go(child, ours, vmstate, paused)
        except (OSError, QmpError) as e:
            raise AssertionError(f"a VM of {memory} did not start: {e}: {child.stderr().strip()}") from e
        finally:
            ours.close()
        child.said["runs_ms"] = since(start)
        return child

    def go(self, child, sock, vmstate, paused):
        """Until its guest runs: QEMU says so by an event."""
        monitor = Monitor(sock)
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        with open(vmstate, "rb") as f:
            monitor.execute("getfd", fd=f.fileno(), fdname="vmstate")
        monitor.execute("migrate-incoming", uri="fd:vmstate", until=loaded)
        if not paused:
            monitor.execute("cont", until=lambda m: m["event"] == "RESUME")
        monitor.close()

    def works(self, child):
        """Wait until the guest has done something that can be seen: a line on its console."""
        log = child.dir / "con.log"
        while not log.exists() or not log.stat().st_size:
            assert child.alive(), f"child {child.pid} has ended: {child.stderr()}"
            time.sleep(0.001)

    def at_work(self, child):
        """Wait until it has written what it writes over and over."""
        child.wait_console(r"^load \d", count=2, timeout=120)

    def end(self, found):
        """End children; their directories go with the case."""
        for child in found:
            child.stop()
            if hasattr(child, "process"):
                child.process.wait()
        self.count += 1


class MicroWay(Way):
    """The same for the project's microVM, by its control socket."""

    kind, vmm = children.MicroChild, children.MICRO
    repeat = 6
    herd = ("--paused",)  # each would take a CPU to itself: then the scheduler is measured
    written = 4  # MiB that its guest writes

    def __init__(self, mount, branch):
        self.options = ["--vmm", pathlib.Path(os.environ["FORKFS_BUILD"]) / "tests/microvm/microvm"]
        super().__init__(mount, branch)

    def go(self, child, sock, vmstate, paused):
        """Until its guest runs: the answer comes then."""
        while True:
            try:
                child.steps = child.status()["steps"]
                break
            except (FileNotFoundError, ConnectionRefusedError):
                child.drop()
                assert child.alive(), f"child {child.pid} has ended: {child.stderr()}"
                time.sleep(POLL)
        if not paused:
            child.status("resume")

    def works(self, child):
        """Wait until the guest has visited a page."""
        while child.status()["steps"] <= getattr(child, "steps", 0):
            time.sleep(POLL)

    def at_work(self, child):
        """Wait until it has written what it writes over and over; stopped again."""
        child.status("resume")
        child.visit_all(self.written)
        child.status("pause")
