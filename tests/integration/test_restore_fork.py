"""`forkfs restore NAME/BRANCH/FORK`: children with payloads of their own, over one image that all of them share."""

import hashlib
import json
import os
import pathlib
import re

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

MIB = 1 << 20
SIZE = 128


def guest(case):
    """A guest that publishes a mailbox, attached."""
    r = rig.Rig(case, mib=SIZE, run=["counter", "mailbox,config,s3cret"])
    r.guest.console.wait(r"^mailbox config ready$")
    return r


def digest(path):
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fork(branch, name, payload=None):
    """Make a fork."""
    path = branch / "forks" / name
    path.mkdir()
    if payload:
        (path / "mailboxes/config").write_text(payload + "\n")
    return path


def took(child):
    """What the guest of a child found in its mailbox: (epoch, payload)."""
    line = r"^mailbox config took \d+ epoch ([0-9a-f]+) flags \d+: (.*?)\r?$"
    child.wait_console(line)
    (found,) = re.findall(line, child.console(), re.M)
    return found


def image(pid):
    """The mapping that is the guest's memory: (device and inode, bytes of it shared with others)."""
    found = []
    for m in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ (\S+ \d+)(.*\n(?:[A-Z].*\n)+)", pathlib.Path(f"/proc/{pid}/smaps").read_text(), re.M):
        if int(m[2], 16) - int(m[1], 16) == SIZE * MIB:
            found.append((m[3], sum(int(n) << 10 for n in re.findall(r"^Shared_(?:Clean|Dirty):\s+(\d+) kB", m[4], re.M))))
    (one,) = found
    return one


def refused(r, target, *parts, options=()):
    """It is not started, with a sentence that has these words, and leaves nothing."""
    found, result = children.run(r.mount, target, *options, check=False)
    assert not found and result.code == 1, (result.out, result.err)
    assert all(p in result.err for p in parts), result.err
    base = r.mount.case.dir / "ch"
    assert not base.exists() or not list(base.iterdir()), list(base.iterdir())


def test_children(case):
    """Children of three forks find their own payload each, and share the image of the branch, which stays as it was."""
    r = guest(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    before = digest(branch / "memory.bin")
    payloads = {f"c{i}": f'{{"task":{i},"n":9007199254740993}}' for i in range(3)}
    started = []
    for name, payload in payloads.items():
        f = fork(branch, name, payload)
        found, _ = children.run(r.mount, f"sbx1/b1/{name}", "-n", "2" if name == "c0" else "1")
        for child in found:
            assert child.said["fork"] == name and child.said["branch"] == "sbx1/b1", child.said
            assert took(child) == (json.loads((f / "status").read_text())["epoch"].replace("-", ""), payload)
            child.check_sane()
        started += found
    (plain,), _ = children.run(r.mount, "sbx1/b1")
    assert plain.said["fork"] is None
    plain.wait_console(r"^tick", count=2)
    assert "mailbox config took" not in plain.console()
    assert len(started) == 4
    images = [image(c.pid) for c in started]
    assert all(n > 4 * MIB for _, n in images), images
    assert images[0][0] == images[1][0], images
    if json.loads((r.mount.path / ".forkfs/capabilities").read_text())["passthrough"]:
        assert len({where for where, _ in images}) == 1, images
    assert digest(branch / "memory.bin") == before
    assert not r.guest.console.all("^mailbox config took")
    r.guest.check_runs()


def test_one_command(case):
    """One command for ten forks of a branch that is loaded into memory first: each child has its own payload, and all one image."""
    r = rig.Rig(case, mib=SIZE, run=["counter", "mailbox,config,s3cret"], options=f"store={case.dir}/store,default-store=packed")
    r.guest.console.wait(r"^mailbox config ready$")
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    want = {}
    for i in range(10):
        payload = f'{{"task":{i},"n":9007199254740993}}'
        status = json.loads((fork(branch, f"c{i}", payload) / "status").read_text())
        want[f"c{i}"] = (status["epoch"].replace("-", ""), payload)
    first, *others = [f"sbx1/b1/{name}" for name in want]
    found, _ = children.run(r.mount, first, *others)
    assert sorted(c.said["fork"] for c in found) == sorted(want)
    for child in found:
        assert took(child) == want[child.said["fork"]]
    assert len({image(c.pid)[0] for c in found}) == 1
    for child in found:
        child.wait_console(r"^tick", count=2)
        child.check_sane()
    assert not r.guest.console.all("^mailbox config took")
    r.guest.check_runs()


def test_attached(case):
    """A child of a fork is a VM to be branched again, and its branch has the payload's traces, not the parent's."""
    r = guest(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    f = fork(branch, "c1", '{"task":1}')
    (child,), _ = children.run(r.mount, "sbx1/b1/c1", "--attach", "web")
    assert took(child)[1] == '{"task":1}'
    (r.mount.path / "web/branches/b2").mkdir()
    assert rig.wait_settled(r.mount.path / "web/branches/b2") == "ready"
    (at,) = json.loads((f / "status").read_text())["overlay_pages"]
    with open(r.mount.path / "web/branches/b2/memory.bin", "rb") as m:
        m.seek(at + 264)
        assert m.read(10) == b'{"task":1}'
    child.check_sane()


def test_refused(case):
    """A fork that is not there, was removed, or is of a branch that failed is refused with a sentence."""
    r = guest(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    refused(r, "sbx1/b1/nobody", "has no fork 'nobody'", "forkfs fork")
    fork(branch, "c1", '{"task":1}')
    (branch / "forks/c1").rmdir()
    refused(r, "sbx1/b1/c1", "has no fork 'c1'")
    rig.request(r.sandbox / "ctl", branch={"name": "bad", "max_rate": MIB})
    bad = r.sandbox / "branches/bad"
    fork(bad, "c1")
    r.mount.faults("image-write error:ENOSPC")
    assert rig.wait_settled(bad) == "failed"
    r.mount.faults()
    refused(r, "sbx1/bad/c1", "failed and can never be restored")
    r.guest.check_runs()


def test_mapped_elsewhere(case):
    """A VMM that has mapped something else than the branch's image never runs without its payloads: refused, and ended."""
    r = guest(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    fork(branch, "c1", '{"task":1}')
    vmm = case.dir / "vmm"
    vmm.write_text("#!/bin/bash\ncase $* in *-incoming*) cat <&3 >copy; exec 3<copy ;; esac\n"
                   f"exec {os.readlink(f'/proc/{r.guest.pid}/exe')} \"$@\"\n")
    vmm.chmod(0o755)
    refused(r, "sbx1/b1/c1", "has mapped page", "nowhere", options=["--vmm", vmm])
    (child,), _ = children.run(r.mount, "sbx1/b1", "--vmm", vmm)
    child.wait_console(r"^tick", count=2)


def test_runs_by_itself(case):
    """A VMM that does not wait between load and run would get its payloads too late: refused."""
    r = ApiRig(case, MicroVm(case, "sbx1", mib=16, kind="memfd"))
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    fork(branch, "c1")
    vmm = [word for word in children.MICRO if word != "--paused=1"]
    found, result = children.run(r.mount, "sbx1/b1/c1", *children.micro_options(case), kind=children.MicroChild, vmm=vmm, check=False)
    assert not found and result.code == 1 and "too late" in result.err, result.err
    (child,), _ = children.run_micro(r.mount, "sbx1/b1/c1")
    child.visit_all(16)
