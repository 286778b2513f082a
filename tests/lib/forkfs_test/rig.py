"""A guest, a mount and a sandbox put together, and branches whose truth is known."""

import errno
import json
import os
import pathlib
import threading
import time

from . import truth

READY_TIMEOUT = 60
# Where a branch is held while its truth is read: in the pause, just before QEMU is told to go on. Not where the engine arms: a build
# that arms at the wrong time must be held at the right one.
INSTANT = "qmp-cont"
HOLDS = 10


def remove(path):
    """Remove a file that need not exist."""
    pathlib.Path(path).unlink(missing_ok=True)


def state(branch):
    """The state of a branch: writing, ready or failed."""
    return (branch / "state").read_text().strip()


def wait_settled(branch, timeout=READY_TIMEOUT):
    """Wait until a branch is no longer being captured; its state."""
    deadline = time.monotonic() + timeout
    while state(branch) == "writing":
        assert time.monotonic() < deadline, f"{branch.name} is still being captured after {timeout} s"
        time.sleep(0.005)
    return state(branch)


def revoked(r):
    """Did the watchdog end a pause or a capture, as it does on a machine too busy? The line of parents begins anew then."""
    log = r.mount.log()
    return "watchdog resumed" in log or "watchdog let" in log


def metric(r, name):
    """A number of .forkfs/metrics."""
    for line in (r.mount / ".forkfs/metrics").read_text().splitlines():
        if line.startswith(f"forkfs_{name} "):
            return int(line.split()[1])
    raise AssertionError(f"no metric {name}")


def request(ctl, **body):
    """Ask a sandbox's ctl for one thing and wait for the answer; an OSError with the sentence when it is refused."""
    fd = os.open(ctl, os.O_RDWR)
    try:
        try:
            os.write(fd, json.dumps(body).encode() + b"\n")
        except OSError as e:
            said = json.loads(os.read(fd, 1 << 16))
            raise OSError(e.errno, said["error"]) from e
        said = json.loads(os.read(fd, 1 << 16))
    finally:
        os.close(fd)
    if "error" in said:
        raise OSError(said["errno"], said["error"])
    return said


class Making(threading.Thread):
    """mkdir of a branch, or a request for one, in a thread: `finish` gives back what came of it."""

    def __init__(self, path, **how):
        super().__init__(daemon=True)
        self.path, self.how, self.error = path, how, None
        self.start()

    def run(self):
        """The thread."""
        try:
            if self.how:
                request(self.path.parents[1] / "ctl", branch={"name": self.path.name, **self.how})
            else:
                os.mkdir(self.path)
        except OSError as e:
            self.error = e

    def finish(self, timeout=30):
        """Wait for the mkdir; None or its OSError."""
        self.join(timeout)
        assert not self.is_alive(), f"mkdir {self.path} has not come back after {timeout} s"
        return self.error


class Rig:
    """`guest` is attached as `sandbox` on `mount`."""

    instant = INSTANT

    def __init__(self, case, mount=None, options="", attach=(), guest=None, **vm):
        self.case = case
        self.guest = guest or case.guest(**vm).booted()
        self.mount = mount or case.mount(options=options)
        self.sandbox = self.mount.attach(self.guest, None, *attach)
        self.hold = case.dir / "hold"
        self.truth = case.dir / "truth"

    def branch(self, name):
        """Take a named branch; its directory."""
        path = self.sandbox / "branches" / name
        try:
            path.mkdir()
        except OSError as e:
            raise AssertionError(f"mkdir {path}: {e.strerror}: {self.mount.error_of(path.parent)}") from e
        return path

    def branch_with_truth(self, name, *rules, kind="mem", **how):
        """Take a branch and, while the guest is held stopped at its instant, read the truth by foreign hands.

        kind   mem: a program of ours on /proc/PID/mem; pmem: QEMU's own pmemsave; memfd: cp of the memfd, which touches nothing of the VM.
        `rules`: more rules for fault points.
        `how`: keys of a request for the branch, as mode="full"; without any it is taken by mkdir.
        Gives the branch's directory; the truth is in the file self.truth. The watchdog ends a pause of half a second and mkdir gives up
        after a second, which a busy machine can need for the reading: such a branch has failed as it should, and is taken again.
        """
        if kind != "memfd" and not self.truth.exists():  # memory that was never touched takes longest to read for the first time
            self.case.run(*truth.foreign_command(self.case, self.guest, self.truth))
        for attempt in range(HOLDS):
            path, error = self._held_branch(name, rules, kind, how)
            if error is None:
                return path
            # what ended the attempt before may have taken the parent along
            orphan = attempt and how.get("mode") == "diff" and error.errno == errno.ENOENT
            if error.errno not in (errno.ETIMEDOUT, errno.EAGAIN) and not orphan:
                break
            if orphan or (how.get("mode") == "diff" and revoked(self)):
                how = {**how, "mode": "live"}
        raise AssertionError(f"{path} ({how or 'mkdir'}): {error}: {self.mount.error_of(path.parent)}")

    def _held_branch(self, name, rules, kind, how):
        marks = [self.hold, pathlib.Path(f"{self.hold}.held")]
        for mark in marks:
            remove(mark)
        self.mount.faults(f"{self.instant} hold:{self.hold}", *rules)
        path = self.sandbox / "branches" / name
        reader = None
        if kind == "mem":
            reader = self.case.start(*truth.foreign_command(self.case, self.guest, self.truth, self.hold))
        elif kind == "memfd":
            copy = f"until [ -e {marks[1]} ]; do sleep 0.002; done; cp --sparse=always {self.guest.memfd()} {self.truth}; touch {self.hold}"
            reader = self.case.start("bash", "-euc", copy)
        making = Making(path, **how)
        while not marks[1].exists() and making.is_alive():
            time.sleep(0.0005)
        if not marks[1].exists():
            assert making.error, f"mkdir {path} has passed without the point {self.instant}"
        elif reader:
            assert reader.wait(timeout=30) == 0, "the truth could not be read"
        else:
            truth.pmemsave(self.guest, self.truth)
            self.hold.touch()
        error = making.finish()
        if reader and reader.poll() is None:
            reader.kill()
        self.mount.faults()
        return path, error

    def difference(self, branch, kind="mem"):
        """How the branch's memory differs from the truth; empty when it does not."""
        return truth.difference(self.case, self.truth, branch / "memory.bin", truth.NOT_RAM if kind == "pmem" else ())


def refused(code, what, *args):
    """It fails with that errno."""
    try:
        what(*args)
    except OSError as e:
        assert e.errno == code, f"{e} instead of {errno.errorcode[code]}"
        return
    raise AssertionError(f"was not refused with {errno.errorcode[code]}")
