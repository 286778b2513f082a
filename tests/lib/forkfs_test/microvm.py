"""The project's own microVM on KVM (tests/microvm) in an integration test, with the API of examples/coop."""

import json
import os
import re
import socket
import subprocess
import time

from . import processes
from .api import Api
from .case import Skip


def mails(serial):
    """The lines of a serial port (bytes) about the guest's mailbox, in their order: [(epoch as hex digits, "again" or "damaged", payload)]."""
    return re.findall(r"^mail (\w+) ?(.*)\n", serial.decode(errors="replace"), re.M)


class MicroVm:
    """A microVM that runs; options are those of the program (kind, vcpus, work, regions, restore, vmstate, mailbox …)."""

    def __init__(self, case, name, mib=64, **options):
        self.case, self.name, self.mib = case, name, mib
        self.dir = case.dir / f"vm-{name}"
        self.dir.mkdir()
        self.api_path = self.dir / "api"
        self.attach_options = ["--coop", self.api_path]
        options = {"kind": "anonymous", "vcpus": 2, **options}
        program = os.path.join(os.environ["FORKFS_BUILD"], "tests", "microvm", "microvm")
        command = [program, f"--control={self.dir}/control", f"--api={self.api_path}", f"--memory={mib}"] + [f"--{k}={v}" for k, v in options.items()]
        with open(self.dir / "console", "wb") as serial, open(self.dir / "stderr", "wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=serial, stderr=errors)
        self.pid = self.process.pid
        case.on_end(self.stop)
        self.sock = self._connect()
        self.api = Api(self.api_path)

    def _connect(self, timeout=20):
        deadline = time.monotonic() + timeout
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(timeout)
            try:
                sock.connect(str(self.dir / "control"))
                if self.api_path.exists():
                    return sock
            except OSError:
                pass
            sock.close()
            said = (self.dir / "stderr").read_text().strip()
            if self.process.poll() == 77:
                raise Skip(said)
            assert self.process.poll() is None and time.monotonic() < deadline, f"the microVM did not start: {said}"
            time.sleep(0.002)

    def status(self, command="status"):
        """What it says of itself, after a command."""
        self.sock.send(command.encode())
        answer = json.loads(self.sock.recv(4096))
        assert not answer["error"], answer
        return answer

    def hva(self):
        """Where its memory is in its address space."""
        return self.status()["hva"]

    def mails(self):
        """What the guest has said of its mailbox."""
        return mails((self.dir / "console").read_bytes())

    def booted(self):
        """Wait until each vCPU of the guest works (the first one makes the mailbox before that); self."""
        deadline = time.monotonic() + 20
        while not self.status()["least_steps"]:
            assert time.monotonic() < deadline, f"{self.name} does not begin: {self.status()}"
            time.sleep(0.002)
        self.check_sane()
        return self

    def check_sane(self):
        """Fail if the guest has found wrong memory."""
        assert self.status()["mismatches"] == 0, (self.dir / "console").read_text()[-300:]

    def check_runs(self, within=1.0):
        """Fail unless the guest gets on within so many seconds, and is content."""
        deadline = time.monotonic() + within
        first = self.status()["steps"]
        while self.status()["steps"] == first:
            assert time.monotonic() < deadline, f"{self.name} stands still: {self.status()}"
            time.sleep(0.002)
        self.check_sane()

    def visit_all(self, times=2):
        """Wait until the guest has visited and judged all its pages so many times."""
        goal, deadline = self.status()["steps"] + times * self.mib * 256, time.monotonic() + 60
        while self.status()["steps"] < goal:
            assert time.monotonic() < deadline, f"{self.name} is too slow: {self.status()}"
            time.sleep(0.005)
        self.check_sane()

    def protected(self):
        """Mappings of the VMM that are registered for write protection."""
        return processes.protected(self.pid)

    def wait_free(self, within=1.0):
        """Fail unless nothing is registered within so many seconds, and no userfaultfd is left open in the VMM."""
        processes.wait_free(self.pid, self.name, within)

    def left_over(self):
        """Files of forkfs beside the API socket."""
        return [n for n in os.listdir(self.dir) if ".forkfs-" in n]

    def stop(self):
        """End it."""
        if processes.alive(self.pid):
            self.process.kill()
        self.process.wait()
        if hasattr(self, "sock"):
            self.sock.close()
            self.api.close()
