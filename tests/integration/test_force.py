"""A foreign process that can write guest memory: refused with its name, and taken with a mark by who insists."""

import errno
import json
import mmap
import os

from forkfs_test import rig


def map_guest(guest):
    """Map guest memory as a vhost-user back end does."""
    fd = os.open(guest.memfd(), os.O_RDWR)
    mapping = mmap.mmap(fd, 4096)
    os.close(fd)
    return mapping


def marks(branch):
    """What status and manifest say of possible tears; the same in both."""
    said = json.loads((branch / "status").read_text()).get("torn_possible")
    assert json.loads((branch / "manifest.json").read_text()).get("torn_possible") == said
    return said


def test_branch(case):
    """One that comes after the attach: each branch is refused, or marked; the mark ends with the mapping."""
    r = rig.Rig(case, mib=128)
    stops = r.guest.stops()
    mapping = map_guest(r.guest)
    try:
        os.mkdir(r.sandbox / "branches/no")
    except OSError as e:
        assert e.errno == errno.EBUSY, e
        said = r.mount.error_of(r.sandbox / "branches")
        assert str(os.getpid()) in said and "force" in said, said
    else:
        raise AssertionError("a branch was taken although its memory can be written by another process")
    refused = r.mount.run("branch", "sbx1", "no", "--full", check=False)
    assert refused.code == 1 and str(os.getpid()) in refused.err, refused.err
    assert r.guest.stops() == stops, "the guest was stopped for a branch that was refused"
    r.mount.run("branch", "sbx1", "torn", "--force")
    assert any(str(os.getpid()) in text for text in marks(r.sandbox / "branches/torn"))
    mapping.close()
    r.mount.run("branch", "sbx1", "whole")
    assert marks(r.sandbox / "branches/whole") is None
    r.guest.check_runs()


def test_attach(case):
    """One that is there before: attach is refused, and with force every branch is taken and marked."""
    guest = case.guest(mib=128).booted()
    mount = case.mount()
    mapping = map_guest(guest)
    refused = mount.run("attach", "sbx1", "--qemu", guest.qmp_path, check=False)
    assert refused.code == 1 and str(os.getpid()) in refused.err, refused.err
    sandbox = mount.attach(guest, None, "--force")
    os.mkdir(sandbox / "branches/b1")
    assert rig.wait_settled(sandbox / "branches/b1") == "ready"
    assert any(str(os.getpid()) in text for text in marks(sandbox / "branches/b1"))
    mapping.close()
    guest.check_runs()
