"""What a branch's state means for its children, also when another daemon says it: only a whole one is ever restored. And what children take."""

import os
import pathlib
import re
import time

from forkfs_test import children, processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

SIZE = 32
MIB = 1 << 20


def micro_rig(case, mount=None, **vm):
    """The microVM, a mount, attached."""
    return ApiRig(case, MicroVm(case, "sbx1", **{"mib": SIZE, "kind": "memfd", "vcpus": 1, "work": 2, "fill": 1, **vm}), mount)


def refused(mount, branch, part):
    """No child of it is started in any way; the sentence says why."""
    base = mount.case.dir / "ch"
    before = os.listdir(base) if base.exists() else []
    for options in ([], ["--trust", "--accept-torn"], ["--as-served"], ["-n", "2", "--attach", "x"]):
        found, result = children.run_micro(mount, branch, *options, check=False)
        assert not found and result.code == 1 and part in result.err, (options, result.err)
    assert (os.listdir(base) if base.exists() else []) == before


def wait_writing(mount, mark):
    """Until the branch is being written to the store."""
    deadline = time.monotonic() + 30
    while not mark.exists():
        assert time.monotonic() < deadline, mount.log()
        time.sleep(0.01)


def test_after_restart(case):
    """Writing, ready and failed, before and after the daemon was killed: what was partial is failed then, and is never restored."""
    store = case.dir / "store"
    options = f"store={store},default-store=dense"
    r = micro_rig(case, case.mount(options=options))
    r.mount.run("branch", "sbx1", "whole")
    r.mount.faults("store-vmstate hold:" + str(r.hold))
    r.mount.run("branch", "sbx1", "partial", "--no-wait")
    wait_writing(r.mount, rig.pathlib.Path(f"{r.hold}.held"))  # its memory is there, and nothing else
    branches = r.mount / "sbx1/branches"
    assert (rig.state(branches / "whole"), rig.state(branches / "partial")) == ("ready", "writing")
    # complete in memory and not yet durable: a child of it maps what it has, and ends with the daemon that has it, or goes on; never wrong
    (early,), _ = children.run_micro(r.mount, "sbx1/partial")
    early.visit_all(2, 1)
    r.mount.kill()
    r.mount.clear_dead()
    assert list((store / "sbx1/partial.partial").iterdir()) and not (store / "sbx1/partial").exists()
    if processes.alive(early.pid):
        early.visit_all(2, 1)
    for again in range(2):  # and it stays so
        mount = case.mount(f"again{again}", options=options + ",reattach=off")
        branches = mount / "sbx1/branches"
        assert (rig.state(branches / "whole"), rig.state(branches / "partial")) == ("ready", "failed")
        refused(mount, "sbx1/partial", "failed and can never be restored")
        assert not (store / "sbx1/partial.partial").exists()
        (child,), _ = children.run_micro(mount, "sbx1/whole")
        child.visit_all(2, 1)
        child.stop()
        mount.stop()


def test_failed_in_flight(case):
    """A branch whose capture fails while a child of it is there: that stops where it touches what was not captured; no later one is started."""
    r = micro_rig(case, work=0, fill=0)
    r.mount.faults("guest-read delay:20")
    r.mount.run("branch", "sbx1", "b", "--no-wait")
    (child,), _ = children.run_micro(r.mount, "sbx1/b", "--paused")
    assert child.status()["state"] == "paused" and rig.state(r.mount / "sbx1/branches/b") == "writing"
    r.mount.faults("image-write error:ENOSPC")
    assert rig.wait_settled(r.mount / "sbx1/branches/b") == "failed"
    try:
        child.status("resume")
    except OSError:
        pass  # it has ended by now
    # a page that cannot be had ends a VMM that touches it itself, and the KVM_RUN of a guest that does
    deadline = time.monotonic() + 60
    while processes.alive(child.pid) and "KVM_RUN -1" not in child.stderr():
        assert time.monotonic() < deadline, "it runs on, of a branch that failed"
        time.sleep(0.01)
    assert "MISMATCH" not in (child.dir / "stdout").read_text(errors="replace")
    refused(r.mount, "sbx1/b", "failed and can never be restored")


def memory_of(child):
    """(Pss, private, Rss) of the mapping that is the guest's memory, in bytes."""
    start = child.status()["hva"]
    text = pathlib.Path(f"/proc/{child.pid}/smaps").read_text()
    part = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M)
    mine = next(p for p in part if p.startswith(f"{start:x}-"))
    values = {k: int(v) << 10 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", mine, re.M)}
    return values["Pss"], values["Private_Dirty"], values["Rss"]


def test_what_ten_take(case):
    """Ten children that have all of the branch in their memory: what each has for itself is what it dirtied, and their shares add up to one
    image and that."""
    r = micro_rig(case)
    assert rig.wait_settled(r.branch("b")) == "ready"
    found, _ = children.run_micro(r.mount, "sbx1/b", "-n", "10")
    for child in found:
        child.visit_all(2, 1)
        child.status("pause")
        with open(f"/proc/{child.pid}/mem", "rb", buffering=0) as f:
            f.seek(child.status()["hva"])
            assert len(f.read(SIZE * MIB)) == SIZE * MIB
    r.mount.kill()  # it has no page of theirs for itself
    r.mount.clear_dead()
    sizes = [memory_of(child) for child in found]
    dirtied = sum(private for _, private, _ in sizes)
    assert all(private <= 3 * MIB and rss >= SIZE * MIB * 7 // 8 for _, private, rss in sizes), sizes
    assert abs(sum(pss for pss, _, _ in sizes) - dirtied) <= SIZE * MIB, sizes
