"""Children of a stock Firecracker by `forkfs restore`, with both memory back ends. Where there is no Firecracker: skipped."""

import json
import os
import re
import signal
import time

from forkfs_test import children, rig
from forkfs_test.api import Api, ApiRig
from forkfs_test.firecracker import Firecracker, program

WORK = 64
TIMEOUT = {"test_file": 180, "test_uffd": 180}


class Child(children.Child):
    """A Firecracker: its guest's console is the stdout file in its directory."""

    def console(self):
        """What the guest has said since it is this child."""
        return (self.dir / "stdout").read_text(errors="replace")

    def steps(self):
        """The number in the last line it printed; 0 before the first."""
        found = re.findall(r"ok 0 ([0-9a-f]{16})\n", self.console())
        return int(found[-1], 16) if found else 0

    def visit_all(self, times=2, timeout=90):
        """Wait until the guest has visited and judged all its pages so many times."""
        deadline, goal = time.monotonic() + timeout, None
        while goal is None or self.steps() < goal:
            assert self.alive(), f"child {self.pid} has ended: {self.stderr()}"
            assert time.monotonic() < deadline, f"child {self.pid} is too slow: {self.steps()} of {goal}"
            if goal is None and self.steps():
                goal = self.steps() + times * WORK * 256
            time.sleep(0.01)
        assert "MISMATCH" not in self.console(), self.console()[-300:]


def restore(r, branch, *options, check=True):
    """`forkfs restore`; (the children, the command's result)."""
    return children.run(r.mount, branch, "--vmm", program(), *options, kind=Child, check=check)


def new_rig(case, options="", **vm):
    """A Firecracker that has been at work for a while, a mount, attached."""
    guest = Firecracker(case, "sbx1", work=WORK, **vm)
    r = ApiRig(case, guest, case.mount(options=options))
    r.guest.visit_all(1)
    return r


def test_file(case):
    """Three children that map the branch itself: they go on at its instant, are branched again, and share its pages."""
    r = new_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    steps = r.guest.steps()
    found, _ = restore(r, "sbx1/b1", "-n", "3", "--attach", "kid")
    assert len(found) == 3
    for child in found:
        child.visit_all()
        first = int(re.search(r"ok 0 ([0-9a-f]{16})\n", child.console()).group(1), 16)
        assert first <= steps + (1 << 20), (first, steps)
        assert Api(child.said["sockets"]["api"]).state() == "Running"
    assert "memory.bin" in found[0].maps()
    grandparent = r.mount / found[0].said["sandbox"] / "branches/b2"
    grandparent.mkdir()
    assert rig.wait_settled(grandparent) == "ready"
    (grandchild,), _ = restore(r, f"{found[0].said['sandbox']}/b2")
    grandchild.visit_all()
    r.guest.visit_all(1)
    grandchild.stop()
    for child in found:
        r.mount.run("detach", child.said["sandbox"])


def pager_of(r, child):
    """The pid of the pager of a child, and its directory."""
    for path in (r.case.dir / "ch").glob("pager.*"):
        for line in (path / "stdout").read_text().splitlines():
            said = json.loads(line)
            if said["event"] == "listens":
                pager = said["pid"]
            if said["event"] == "serves" and said["pid"] == child.pid:
                return pager, path
    raise AssertionError(f"no pager serves {child.pid}")


def test_uffd(case):
    """Children whose pages come when they are touched, also of a branch that is being captured; the next ones are prefetched."""
    r = new_rig(case, options=f"store={case.dir}/store")
    r.mount.faults("guest-read delay:2")
    branch = r.branch("b1")
    found, _ = restore(r, "sbx1/b1", "-n", "2", "--backend", "uffd")
    r.mount.faults()
    for child in found:
        child.visit_all()
    assert (branch / "wait").read_text()
    assert rig.wait_settled(branch) == "ready"
    (first,), _ = restore(r, "sbx1/b1", "--backend", "uffd")
    first.visit_all()
    _, path = pager_of(r, first)
    file = case.dir / "store/sbx1/b1/working-set"
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, (path / "stderr").read_text()
        time.sleep(0.01)
    (second,), _ = restore(r, "sbx1/b1", "--backend", "uffd")
    second.visit_all()
    pager, path = pager_of(r, second)
    refused = r.mount.run("attach", "x", "--firecracker", second.said["sockets"]["api"], check=False)
    assert refused.code == 1 and "userfaultfd already" in refused.err, refused.err
    # its pager has gone, and so has the VM; those of other pagers go on
    os.kill(pager, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while second.alive():
        assert time.monotonic() < deadline, "it lives on without its pager"
        time.sleep(0.01)
    assert "MISMATCH" not in second.console()
    first.visit_all(1)
    # a pager ends with the last of its children
    pager, path = pager_of(r, first)
    first.stop()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pager}/root") and "exited" in (path / "stdout").read_text():
        assert time.monotonic() < deadline, "the pager lives on without children"
        time.sleep(0.01)
    for child in found:
        child.visit_all(1)
    r.guest.visit_all(1)


def test_released(case):
    """A child that got all its pages from a pager (--all) is a sandbox like any other."""
    r = new_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    socket = case.dir / "pager.sock"
    pager = case.start(case.forkfs(), "pager", "--mount", r.mount.path, "--all", "-n", "1", "sbx1/b1", socket)
    while not socket.exists():
        assert pager.poll() is None
        time.sleep(0.005)
    child = Firecracker(case, "child", load=(socket, branch / "vmstate"), backend="Uffd")
    assert pager.wait(60) == 0
    child.visit_all()
    grandchild = r.mount.attach(child) / "branches/b2"
    grandchild.mkdir()
    assert rig.wait_settled(grandchild) == "ready", (grandchild / "status").read_text()
    Firecracker(case, "grandchild", load=(grandchild / "memory.bin", grandchild / "vmstate")).visit_all()
    child.visit_all(1)


def test_refused(case):
    """What cannot be started is refused before anything is."""
    disk = case.dir / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = {"drive_id": "root", "path_on_host": str(disk), "is_root_device": False, "is_read_only": False}
    r = new_rig(case, devices={"drives": [drive]})
    assert rig.wait_settled(r.branch("b1")) == "ready"
    found, done = restore(r, "sbx1/b1", check=False)
    assert not found and done.code == 1 and "writable drives" in done.err, done.err
    for words, part in ((["--backend", "x"], "file or uffd"), (["--backend", "uffd", "--attach", "x"], "exclude each other")):
        found, done = restore(r, "sbx1/b1", *words, check=False)
        assert not found and done.code == 2 and part in done.err, done.err
    shown = json.loads(restore_show(r))
    assert shown["command"][:2] == [program(), "--api-sock"], shown


def restore_show(r):
    """What `--show` prints for a branch that can be started."""
    guest = Firecracker(r.case, "plain", mib=64, work=16).booted()
    sandbox = r.mount.attach(guest)
    (sandbox / "branches/b1").mkdir()
    assert rig.wait_settled(sandbox / "branches/b1") == "ready"
    return r.mount.run("restore", "plain/b1", "--vmm", program(), "--show").out
