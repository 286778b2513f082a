"""`forkfs restore`: children go on where the branch was taken, several at once, and share its memory."""

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

RUN = ["counter", "selfcheck,mib=32,threads=1,step=1,every=16"]


def micro_rig(case, **vm):
    """The microVM, a mount, attached."""
    return ApiRig(case, MicroVm(case, "sbx1", **{"mib": 64, "kind": "memfd", **vm}))


def test_qemu(case):
    """Three children of a QEMU's branch, with no word about them but its name: they go on, and share the branch's pages."""
    r = rig.Rig(case, mib=192, run=RUN)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    found, _ = children.run(r.mount, "sbx1/b1", "-n", "3")
    assert [c.said["child"] for c in found] != [] and {c.said["child"] for c in found} == {1, 2, 3}
    for child in found:
        child.wait_console(r"^(ok|tick)", count=4)
        child.check_sane()
        times = child.said["times"]
        assert times["started_ns"] <= times["loaded_ns"] <= times["running_ns"], times
        assert child.monitor().status() == "running"
    # the pages that none of them has written are there once
    alone = found[0].pss()
    for child in found[1:]:
        child.stop()
    assert found[0].pss() > alone, (found[0].pss(), alone)
    r.guest.check_sane()


def test_microvm(case):
    """Children of the project's own microVM, by what the caller says after --."""
    r = micro_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    found, _ = children.run_micro(r.mount, "sbx1/b1", "-n", "4")
    assert len(found) == 4
    for child in found:
        child.visit_all(64)
    r.guest.visit_all(1)
