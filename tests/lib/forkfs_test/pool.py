"""A warm pool, `forkfs pool serve`, and those who ask it."""

import json
import os
import pathlib
import signal
import subprocess
import time

from . import children, processes


class Pool:
    """A pool of a branch; ended with the test. The directories of its children are below `base`."""

    def __init__(self, mount, branch, *options, name="pool", low=2, high=4, kind=children.QemuChild, vmm=(), wait=True):
        self.mount, self.case, self.kind = mount, mount.case, kind
        self.path = self.case.dir / f"{name}.sock"
        self.base = self.case.dir / f"ch-{name}"
        self.log = self.case.dir / f"{name}.log"
        self.command = [mount.binary, "pool", "serve", branch, "--mount", str(mount.path), "--socket", str(self.path), "--dir", str(self.base),
                        "--min", str(low), "--max", str(high), *(str(o) for o in options), *(["--", *vmm] if vmm else [])]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        self.case.on_end(self.stop)
        self.pid = self.process.pid
        line = self.process.stdout.readline()
        assert line, f"the pool did not start: {self.said()}"
        self.ready = json.loads(line)
        if wait:
            self.wait(lambda s: s["idle"] >= low)

    def said(self):
        """What it has said on stderr."""
        return self.log.read_text(errors="replace")

    def ask(self, verb, *words, **how):
        """One of the other verbs; its Result."""
        return self.case.run(self.mount.binary, "pool", verb, "--socket", self.path, *words, **how)

    def status(self):
        """What it says of itself."""
        return json.loads(self.ask("status").out)

    def wait(self, condition, timeout=60):
        """Until condition(status) is true; that status."""
        deadline = time.monotonic() + timeout
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, f"the pool stays so: {status}: {self.said()}"
            time.sleep(0.01)
        return status

    def acquire(self, *options):
        """A child."""
        return self.kind(self.case, json.loads(self.ask("acquire", *options).out))

    def refused(self, *options):
        """The sentence with which nothing is handed out."""
        done = self.ask("acquire", *options, check=False)
        assert done.code == 1 and not done.out, (done.code, done.out, done.err)
        return done.err

    def asking(self, *options, **how):
        """Somebody who asks, as a process."""
        return self.case.start(self.mount.binary, "pool", "acquire", "--socket", self.path, *options, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **how)

    def release(self, child):
        """Give it back, which ends it."""
        self.ask("release", str(child.said["id"]))
        assert not child.alive() and not child.dir.exists()

    def vms(self):
        """The processes that work below its directory."""
        return vms_in(self.base)

    def drain(self, *options):
        """Ask for its end; what it said. Nothing of it is there afterwards but what was handed out."""
        left = json.loads(self.ask("drain", *options).out)
        self.process.wait(timeout=30)
        return left

    def check_gone(self, pids=(), dirs=()):
        """Fail unless only these processes and directories are left of it."""
        deadline = time.monotonic() + 20
        while (sorted(self.vms()), self._dirs(), self.path.exists()) != (sorted(pids), sorted(str(d) for d in dirs), False):
            assert time.monotonic() < deadline, ([processes.describe(p) for p in self.vms()], self._dirs(), self.path.exists(), self.said())
            time.sleep(0.01)

    def _dirs(self):
        return sorted(str(d) for d in self.base.iterdir()) if self.base.exists() else []

    def stop(self):
        """End it as a service is ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=60)
        self.process.stdout.close()


def vms_in(base):
    """The processes whose working directory is below that one, also when it has been removed."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            where = os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            continue
        if pathlib.Path(where).is_relative_to(base) and processes.alive(int(pid)):
            found.append(int(pid))
    return found


def micro(mount, branch, *options, **how):
    """A pool of a branch of the microVM."""
    return Pool(mount, branch, *children.micro_options(mount.case), *options, kind=children.MicroChild, vmm=children.MICRO, **how)
