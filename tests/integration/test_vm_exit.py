"""A VM that ends in the middle of things."""

import errno
import os
import pathlib
import time

from forkfs_test import rig


def wait_for(path):
    """Wait for a file."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.001)


def wait_exited(r):
    """Wait until the sandbox says that its VM has ended."""
    deadline = time.monotonic() + 30
    while (r.sandbox / "state").read_text() != "exited\n":
        assert time.monotonic() < deadline, (r.sandbox / "state").read_text()
        time.sleep(0.01)


def check_daemon_works(case, r):
    """The daemon serves another VM."""
    other = case.guest("other", mib=128).booted()
    sandbox = r.mount.attach(other)
    (sandbox / "branches" / "b1").mkdir()
    assert rig.wait_settled(sandbox / "branches" / "b1") == "ready"


def test_settled_branch_stays(case):
    """A branch that was settled outlives its VM; a new one is refused with a reason."""
    r = rig.Rig(case, mib=128)
    r.branch_with_truth("b1")
    branch = r.sandbox / "branches" / "b1"
    assert rig.wait_settled(branch) == "ready"
    r.guest.stop()
    wait_exited(r)
    assert r.difference(branch) == ""
    try:
        os.mkdir(branch.parent / "b2")
        raise AssertionError("a dead VM was branched")
    except OSError as e:
        assert e.errno == errno.ESRCH, e
    assert r.mount.error_of(branch.parent)
    branch.rmdir()
    r.mount.run("detach", "sbx1")
    check_daemon_works(case, r)


def test_during_the_pause(case):
    """Killed while it is held stopped: mkdir fails within seconds, nothing half is left."""
    r = rig.Rig(case, mib=128)
    held = pathlib.Path(f"{r.hold}.held")
    r.mount.faults(f"{rig.INSTANT} hold:{r.hold}")
    making = rig.Making(r.sandbox / "branches" / "b1")
    wait_for(held)
    r.guest.stop()
    r.hold.touch()
    error = making.finish(10)
    branch = r.sandbox / "branches" / "b1"
    assert error is not None or rig.wait_settled(branch) == "failed", "a branch of a dead VM is ready"
    r.mount.faults()
    wait_exited(r)
    check_daemon_works(case, r)


def test_during_the_capture(case):
    """Killed at random moments of the capture: the branch is whole or failed, never torn."""
    ready = 0
    mount = case.mount()
    for i in range(8):
        r = rig.Rig(case, mount=mount, name=f"vm{i}", mib=192, run=["load,mib=96"])
        branch = r.branch_with_truth("b1")
        time.sleep(0.004 * i)
        r.guest.stop()
        state = rig.wait_settled(branch, 20)
        try:
            said = r.difference(branch)
            assert state == "ready" and said == "", f"{state} and readable: {said or 'equal'}"
            ready += 1
        except AssertionError as e:
            if state == "ready":
                raise
            assert os.strerror(errno.EIO) in str(e), e
        mount.run("detach", f"vm{i}")
    print(f"{ready} of 8 captures were complete")
