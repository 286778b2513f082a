"""Memory and vmstate are of one instant: guests that keep their expectations in registers go on without a mismatch."""

import shutil

from forkfs_test import rig

TIMEOUT = {"test_children": 600, "test_torn_is_noticed": 180}
RUN = ["counter", "selfcheck,mib=32,threads=1,step=1,every=16", "selfcheck,mib=32,threads=1,step=2731,every=16"]


def rounds(guest, count):
    """Wait until a guest has checked all its memory some times more, and was content."""
    for _ in range(count):
        guest.console.wait(r"^(ok|MISMATCH|ended)", timeout=60, start=guest.console.mark())
    guest.check_sane()


def test_children(case):
    """50 children, half from copies and half straight from the mount, go on; so does the parent."""
    r = rig.Rig(case, mib=192, run=RUN)
    copies = case.dir / "copies"
    copies.mkdir()
    for i in range(50):
        branch = r.branch(f"b{i}")
        memory, stream = branch / "memory.bin", branch / "vmstate"
        if i % 2 == 0:
            memory, stream = shutil.copy(memory, copies), shutil.copy(stream, copies)
        child = r.guest.child(f"child{i}", memory, stream)
        child.go()
        rounds(child, 4)
        child.stop()
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        branch.rmdir()
    rounds(r.guest, 4)


def test_torn_is_noticed(case):
    """The control: memory of one branch with the vmstate of another is noticed."""
    r = rig.Rig(case, mib=192, run=RUN)
    early, late = r.branch("early"), r.branch("late")
    assert rig.wait_settled(early) == "ready" and rig.wait_settled(late) == "ready"
    torn = r.guest.child("torn", early / "memory.bin", late / "vmstate")
    torn.go()
    torn.check_torn()
    rounds(r.guest, 2)
