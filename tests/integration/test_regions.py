"""RAM in two places of the guest's address space, most of it never touched."""

import json

from forkfs_test import rig, truth
from forkfs_test.guest import MIB

SIZE_MIB = 3072
BELOW = 2048 * MIB  # of q35 with so much memory; the rest begins at 4 GiB
HIGH = 4096 * MIB
GROWTH = 16 * MIB // 512


def test_above_the_hole(case):
    """The branch has both ranges at their places, and what was never touched stays so, in the VM as in the branch."""
    r = rig.Rig(case, machine="q35", mib=SIZE_MIB, run=["counter", "load,mib=32,rate=2000"])
    before = r.guest.memfd_blocks()
    branch = r.branch_with_truth("b1", kind="memfd")
    assert truth.difference(case, r.truth, branch / "memory.bin") == ""
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    assert truth.difference(case, r.truth, branch / "memory.bin") == ""
    after = r.guest.memfd_blocks()
    assert after - before < GROWTH, f"the VM's memory has grown from {before} to {after} blocks"

    status = json.loads((r.sandbox / "status").read_text())
    assert status["memory_bytes"] == SIZE_MIB * MIB, status
    places = sorted((region["gpa"], region["offset"], region["size"]) for region in status["regions"])
    assert (0, 0) == places[0][:2] and (HIGH, BELOW) in [p[:2] for p in places], status["regions"]
    r.guest.check_runs()


def test_high_memory_by_address(case):
    """What pmemsave reads above 4 GiB is what the branch has behind the low memory."""
    r = rig.Rig(case, machine="q35", mib=SIZE_MIB, run=["counter"])
    part = 32 * MIB
    at = SIZE_MIB * MIB - BELOW - part  # Linux allocates from the top
    r.guest.qmp.execute("stop")
    r.guest.qmp.execute("pmemsave", val=HIGH + at, size=part, filename=str(r.truth))
    branch = r.branch("b1")
    assert (r.sandbox / "state").read_text() == "paused\n"
    assert r.guest.qmp.status() == "paused", "a VM that was found paused must stay so"
    with open(branch / "memory.bin", "rb") as f:
        f.seek(BELOW + at)
        data = f.read(part)
    assert data == r.truth.read_bytes()
    assert data.count(0) < part, "that memory is empty: the comparison says nothing"
    r.guest.go()
    r.guest.check_runs()
