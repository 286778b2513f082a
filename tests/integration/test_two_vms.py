"""Two VMs on one mount, branched at the same time."""

from forkfs_test import rig

RUN = ["counter", "selfcheck,mib=32,every=16"]


def test_at_once(case):
    """Ten rounds of a branch of each at the same moment; children of both go on."""
    first = rig.Rig(case, name="one", mib=128, run=RUN)
    second = rig.Rig(case, mount=first.mount, name="two", mib=128, run=RUN)
    for i in range(10):
        making = [rig.Making(r.sandbox / "branches" / f"b{i}") for r in (first, second)]
        for m in making:
            error = m.finish()
            assert error is None, f"{error}: {first.mount.error_of(m.path.parent)}"
        for m in making:
            assert rig.wait_settled(m.path) == "ready", (m.path / "status").read_text()
            if i < 9:
                m.path.rmdir()
    for r in (first, second):
        branch = r.sandbox / "branches" / "b9"
        child = r.guest.child(f"child-{r.guest.name}", branch / "memory.bin", branch / "vmstate")
        child.go()
        for guest in (child, r.guest):
            guest.console.wait("^(ok|MISMATCH)", start=guest.console.mark())
            guest.console.wait("^(ok|MISMATCH)", start=guest.console.mark())
            guest.check_sane()
    assert first.guest.stops() == 10 and second.guest.stops() == 10


def test_detach_one(case):
    """Letting one VM go leaves the other's branch in flight alone, and its own settled branches readable."""
    first = rig.Rig(case, name="one", mib=128)
    second = rig.Rig(case, mount=first.mount, name="two", mib=128)
    settled = second.branch("b1")
    assert rig.wait_settled(settled) == "ready"
    going = first.branch("b1")
    first.mount.run("detach", "two")
    assert rig.wait_settled(going) == "ready", (going / "status").read_text()
    assert second.guest.protected() == 0
    for r in (first, second):
        r.guest.check_runs()
