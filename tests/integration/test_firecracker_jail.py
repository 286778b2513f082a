"""Jailed children of a stock Firecracker, by `forkfs restore --jailer`. Where there is no Firecracker: skipped."""

import json
import os
import pathlib
import signal
import time

from forkfs_test import processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.case import Skip
from forkfs_test.firecracker import Firecracker, drive, jail_options, restore, wait_pagers

UID, GID, WORK = 12345, 12346, 32
TIMEOUT = {"test_file": 180}


def new_rig(case, options="", owner=None, **vm):
    """A Firecracker that has been at work for a while, a mount, attached."""
    r = ApiRig(case, Firecracker(case, "sbx1", mib=64, work=WORK, **vm), case.mount(options=options))
    case.on_end(lambda: wait_pagers(case))
    if owner:
        r.mount.run("detach", "sbx1")
        r.mount.attach(r.guest, None, "--owner", owner)
    r.guest.visit_all(1)
    return r


def jailed(r, branch, *options, theirs=(), uid=UID, check=True):
    """`forkfs restore --jailer`."""
    ours, words = jail_options(r.case, uid, GID)
    return restore(r.mount, branch, *ours, *options, "--", *words, *theirs, check=check)


def check_jailed(child):
    """It runs as it shall, in its jail."""
    status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
    assert f"Uid:\t{UID}" in status and f"Gid:\t{GID}" in status and "CapEff:\t0000000000000000" in status, status
    root = pathlib.Path(child.said["jail"])
    assert os.stat(f"/proc/{child.pid}/root").st_ino == root.stat().st_ino
    assert child.said["sockets"]["api"] == str(root / "api") and (root / "api").is_socket(), child.said


def nothing_left(case):
    """Nothing of children is there."""
    for name in ("ch", "jails/firecracker"):
        assert not list((case.dir / name).iterdir()), list((case.dir / name).iterdir())
    assert not [m for m in processes.mounts_under(str(case.dir)) if "/jails/" in m or "/ch/" in m]


def test_file(case):
    """Children of a memory branch, side by side: they go on, are branched again, and so are their own children."""
    r = new_rig(case)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    found, _ = jailed(r, "sbx1/b1", "-n", "2", "--attach", "kid")
    assert len(found) == 2
    for child in found:
        check_jailed(child)
        child.visit_all(WORK)
        assert "loaded into memory" in " ".join(child.said["notes"]), child.said
    grandparent = r.mount / found[0].said["sandbox"] / "branches/b2"
    grandparent.mkdir()
    assert rig.wait_settled(grandparent) == "ready", (grandparent / "status").read_text()
    (grandchild,), _ = jailed(r, f"{found[0].said['sandbox']}/b2", theirs=("--new-pid-ns",))
    check_jailed(grandchild)
    grandchild.visit_all(WORK)
    r.guest.visit_all(1)
    for child in found:
        r.mount.run("detach", child.said["sandbox"])


def test_lent(case):
    """A jail's user to whom the sandbox is lent maps the branch's own image; of a fork each child has the payload."""
    r = new_rig(case, options="allow_other", owner=f"{UID}:{GID}", mailbox=True)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    (branch / "forks/c1").mkdir()
    (branch / "forks/c1/mailboxes/config").write_text('{"task":1}\n')
    found, _ = jailed(r, "sbx1/b1/c1", "-n", "2", theirs=("--", "--level", "Off"))
    image = (branch / "memory.bin").stat()
    for child in found:
        check_jailed(child)
        assert "loaded into memory" not in " ".join(child.said.get("notes", [])), child.said
        assert f" {image.st_ino} " in child.maps(), child.maps()
        assert [payload for _, payload in child.mail()] == ['{"task":1}']
        child.visit_all(WORK)


def test_uffd(case):
    """Served by a pager whose socket is in the jail, while the branch is captured; they end with it."""
    r = new_rig(case)
    r.mount.faults("guest-read delay:2")
    branch = r.branch("b1")
    found, _ = jailed(r, "sbx1/b1", "-n", "2", "--backend", "uffd")
    r.mount.faults()
    for child in found:
        check_jailed(child)
        child.visit_all(WORK)
    assert rig.wait_settled(branch) == "ready"
    (line,) = [json.loads(text) for path in (case.dir / "ch").glob("pager.*/stdout") for text in path.read_text().splitlines()
               if '"listens"' in text]
    os.kill(line["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(child.alive() for child in found):
        assert time.monotonic() < deadline, "they live on without their pager"
        time.sleep(0.01)
    assert not any("MISMATCH" in child.console() for child in found)
    r.guest.visit_all(1)


def test_drives(case):
    """A jail has the branch's disks under their own names, and drives of the caller's; without those nothing is started."""
    root, data, cold = case.dir / "root.img", case.dir / "data.img", case.dir / "cold.img"
    root.write_bytes(b"before" + bytes(3 << 20))
    data.write_bytes(b"data" + bytes((1 << 20) - 4))
    cold.write_bytes(b"cold" + bytes((1 << 20) - 4))
    cold.chmod(0o444)
    guest = Firecracker(case, "sbx1", mib=64, work=WORK, devices={"drives": [drive(root, "root"), drive(data, "data", True)]}).booted()
    mount = case.mount()
    sandbox = mount.attach(guest, None, "--disk", f"root={root}")
    (sandbox / "branches/b1").mkdir()
    assert rig.wait_settled(sandbox / "branches/b1") == "ready"
    root.write_bytes(b"after!" + bytes(3 << 20))
    ours, theirs = jail_options(case, UID, GID)
    found, done = restore(mount, "sbx1/b1", *ours, "--", *theirs, check=False)
    assert not found and done.code == 1 and "--drive data=" in done.err, done.err
    found, _ = restore(mount, "sbx1/b1", "-n", "2", *ours, "--drive", f"data={cold}", "--", *theirs)
    for child in found:
        check_jailed(child)
        own = pathlib.Path(child.said["jail"] + str(root))
        assert own.read_bytes()[:6] == b"before" and own.stat().st_uid == UID
        inside = os.listdir(f"/proc/{child.pid}/root{case.dir}")
        assert sorted(inside) == ["data.img", "root.img"], inside
        assert pathlib.Path(f"/proc/{child.pid}/root{data}").read_bytes()[:4] == b"cold"
        child.visit_all(WORK, 1)
    assert data.read_bytes()[:4] == b"data"
    for child in found:
        child.stop()
    # a drive that the jail's user cannot read: nothing is left of the child (Firecracker may end before it has said why)
    cold.chmod(0o400)
    before = set((case.dir / "jails/firecracker").iterdir())
    found, done = restore(mount, "sbx1/b1", *ours, "--drive", f"data={cold}", "--", *theirs, check=False)
    assert not found and done.code == 1 and "child 1" in done.err, done.err
    assert set((case.dir / "jails/firecracker").iterdir()) == before
    guest.visit_all(1)


def pids_hierarchy():
    """Where cgroups that limit processes are made: the version, and the directory."""
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        _, place, kind, words = line.split()[:4]
        if kind == "cgroup" and "pids" in words.split(","):
            return "1", place
        if kind == "cgroup2" and "pids" in pathlib.Path(place, "cgroup.controllers").read_text().split():
            return "2", place
    raise Skip("no cgroup hierarchy has the controller pids")


def test_nothing_is_left(case):
    """A jailer that is given what it does not know, a cgroup that cannot be, and a VM that cannot load: no jail, cgroup or directory is left."""
    r = new_rig(case)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    number, hierarchy = pids_hierarchy()
    parent = pathlib.Path(hierarchy) / f"forkfs-test-{os.getpid()}"
    parent.mkdir()
    case.on_end(parent.rmdir)
    group = ("--cgroup-version", number, "--parent-cgroup", parent.name, "--cgroup", "pids.max=1000")
    for theirs, part in ((("--no-such-option", "x"), "no-such-option"), ((*group, "--cgroup", "pids.nothing=1"), "child 1"),
                         ((*group, "--", "--no-such-option"), "no-such-option"),
                         ((*group, "--new-pid-ns", "--", "--no-such-option"), "child 1")):
        found, done = jailed(r, "sbx1/b1", theirs=theirs, check=False)
        assert not found and done.code == 1 and part in done.err, (theirs, done.err)
        nothing_left(case)
        assert not [p for p in parent.iterdir() if p.is_dir()], list(parent.iterdir())
    (child,), _ = jailed(r, "sbx1/b1", theirs=group)
    check_jailed(child)
    child.visit_all(WORK, 1)
    (own,) = [p for p in parent.iterdir() if p.is_dir()]
    assert str(child.pid) in (own / "cgroup.procs").read_text().split() and own.name == pathlib.Path(child.said["jail"]).parent.name
    child.stop()
    processes.remove_cgroup(own)
