"""Live, diff and full branches of real guests: byte for byte right, and a second one costs what was written."""

import errno
import json

from forkfs_test import rig
from forkfs_test.guest import MIB

RUN = ["counter", "load,mib=24,seq=1,random=1"]


def status(branch):
    """A branch's status."""
    return json.loads((branch / "status").read_text())


def check(r, name, mode):
    """Take a branch with its truth, compare it in flight and ready; its status."""
    branch = r.branch_with_truth(name, mode=mode)
    assert r.difference(branch) == "", f"{name} ({mode}), before it is known to be ready"
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    assert r.difference(branch) == "", f"{name} ({mode}), ready"
    said = status(branch)
    manifest = json.loads((branch / "manifest.json").read_text())
    for key in ("mode", "parent", "id"):
        assert said[key] == manifest[key], (key, said, manifest)
    assert said["mode"] == mode or rig.revoked(r), said
    return branch, said


def test_full(case):
    """The guest stands still until all is copied; needs neither tracking nor protection."""
    r = rig.Rig(case, mib=192, run=RUN)
    for i in range(4):
        branch, said = check(r, f"b{i}", "full")
        assert said["parent"] is None and said["shared_bytes"] == 0, said
        branch.rmdir()
    r.guest.check_sane()
    r.guest.check_runs()


def modes(case, **guest):
    """Branches of a tracked guest under load, each the child of one before."""
    r = rig.Rig(case, mib=192, run=RUN, attach=["--track"], **guest)
    ids, branches = [], []
    for i, mode in enumerate(["full", "live", "diff", "live", "diff", "full", "diff", "live", "live", "diff"]):
        branch, said = check(r, f"b{i}", "live" if rig.revoked(r) and mode == "diff" else mode)
        if mode != "full" and i and not rig.revoked(r):
            assert said["parent"] == ids[-1], (said, ids)
            assert said["shared_bytes"] > 64 * MIB, said  # the load writes 24 MiB, and some more are opened with them
        ids.append(said["id"])
        branches.append(branch)
        if i % 3 == 2:  # what a child shares does not go with its parent
            branches.pop(0).rmdir()
            assert r.difference(branch) == ""
    r.guest.check_sane()
    r.guest.check_runs()


def test_tracked(case):
    """Shared memory."""
    modes(case)


def test_tracked_private(case):
    """Anonymous memory."""
    modes(case, backend="ram")


def test_second_costs_what_changed(case):
    """A guest that hardly writes: the second branch copies and holds a small part of what the first one did."""
    r = rig.Rig(case, mib=320, run=["counter", "load,mib=224,fill=1,rate=50"], attach=["--track"])
    first = r.branch("first")
    assert rig.wait_settled(first) == "ready"
    second = r.branch("second")
    assert rig.wait_settled(second) == "ready"
    one, two = status(first), status(second)
    assert two["parent"] == one["id"], two
    assert two["image_bytes"] * 20 <= one["image_bytes"], (one["image_bytes"], two["image_bytes"])
    copied = two["memory_bytes"] - two["shared_bytes"]
    assert copied * 20 <= one["memory_bytes"], (copied, one["memory_bytes"])


def test_refused(case):
    """A diff that has nothing to build on says so, and stops nobody."""
    r = rig.Rig(case, mib=128)
    stops = r.guest.stops()
    refused = r.mount.run("branch", "sbx1", "b", "--diff", check=False)
    assert refused.code == 1 and "track" in refused.err, refused.err
    r.mount.run("detach", "sbx1")
    r.mount.attach(r.guest, None, "--track")
    refused = r.mount.run("branch", "sbx1", "b", "--diff", check=False)
    assert refused.code == 1 and "first" in refused.err, refused.err
    assert r.guest.stops() == stops
    r.mount.run("branch", "sbx1", "b", "--full")
    r.mount.run("branch", "sbx1", "c", "--diff")
    assert status(r.sandbox / "branches/c")["parent"] == status(r.sandbox / "branches/b")["id"]
    try:
        rig.request(r.sandbox / "ctl", branch={"name": "d", "mode": "quick"})
    except OSError as e:
        assert e.errno == errno.EINVAL and "quick" in e.strerror, e
    else:
        raise AssertionError("a mode that does not exist was taken")
    r.guest.check_runs()
