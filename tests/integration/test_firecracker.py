"""The driver firecracker, on the stock program with its seccomp filter in force. Where there is none, these tests are skipped."""

import json
import os
import pathlib
import signal

from forkfs_test import rig
from forkfs_test.api import (PAUSED, SAVED, ApiRig, check_death, check_paused_by_others, check_paused_meanwhile,
                             check_resumed_by_others)
from forkfs_test.firecracker import Firecracker, drive

TIMEOUT = {"test_identity": 180}
LONG_TIMEOUT = {"test_identity": 900}
BRANCHES, LONG_BRANCHES, TRIES = 8, 200, 10
JAIL_UID = 12345


def new_rig(case, **vm):
    """A Firecracker, a mount, attached."""
    return ApiRig(case, Firecracker(case, "sbx1", **vm))


def same(case, first, second):
    """Fail unless two files are equal."""
    result = case.run(case.tool("compare"), first, second, check=False)
    assert result.code == 0, f"{first} and {second}: {result.out}{result.err}"


def full_snapshot(r, name):
    """A branch, held in its pause while Firecracker itself writes a whole snapshot; the branch's directory."""
    for _ in range(TRIES):
        making = r.held(name, SAVED)
        r.guest.api.call("PUT", "/snapshot/create", {
            "snapshot_type": "Full", "snapshot_path": str(r.case.dir / "full.vmstate"), "mem_file_path": str(r.truth)})
        r.hold.touch()
        error = making.finish()
        r.mount.faults()
        if error is None:
            return r.sandbox / "branches" / name
        assert "watchdog" in r.mount.log() or "1 s" in r.mount.error_of(r.sandbox / "branches"), error
    raise AssertionError(f"{error}: {r.mount.error_of(r.sandbox / 'branches')}")


def checked_branch(r, name):
    """A branch that is what Firecracker itself says."""
    branch = full_snapshot(r, name)
    same(r.case, r.truth, branch / "memory.bin")
    return branch


def test_identity(case):
    """Each image is Firecracker's own Full snapshot of the same pause, byte for byte; the guest never sees wrong memory."""
    r = new_rig(case)
    assert r.guest.filtered(), "no seccomp filter is in force"
    differ = []
    for i in range(LONG_BRANCHES if case.long else BRANCHES):
        branch = checked_branch(r, f"b{i}")
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        same(case, r.truth, branch / "memory.bin")
        ours, theirs = (branch / "vmstate").read_bytes(), (case.dir / "full.vmstate").read_bytes()
        assert len(ours) == len(theirs)
        differ.append(sum(a != b for a, b in zip(ours, theirs)))
        branch.rmdir()
    # the two states are saved one after the other: clocks go on
    assert max(differ) < 200, differ
    r.guest.visit_all(1)
    assert r.guest.left_over() == []


def test_child(case):
    """A child from the mount goes on and judges all its memory; it is branched again, and so is that one's child."""
    r = new_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    parent, last = branch, None
    for generation in range(2):
        child = Firecracker(case, f"child{generation}", load=(parent / "memory.bin", parent / "vmstate"))
        child.visit_all()
        sandbox = r.mount.attach(child)
        parent = sandbox / "branches/b1"
        parent.mkdir()
        assert rig.wait_settled(parent) == "ready", (parent / "status").read_text()
        last = child
    for name in ("memory.bin", "vmstate"):
        (case.dir / name).write_bytes((parent / name).read_bytes())
    Firecracker(case, "copy", load=(case.dir / "memory.bin", case.dir / "vmstate")).visit_all()
    last.visit_all(1)
    r.guest.visit_all(1)
    # a daemon reads a child's memory through its own mount: so they are let go before it is unmounted
    for generation in (1, 0):
        r.mount.run("rm", f"child{generation}/b1")
        r.mount.run("detach", f"child{generation}")


def test_two_regions(case):
    """More than 3 GiB: the guest's work is above 4 GiB, and a child goes on with it."""
    r = new_rig(case, mib=3328 + 256, at=4096 + 16, work=32)
    status = json.loads((r.sandbox / "status").read_text())
    low = 3328 << 20 if tuple(int(n) for n in status["vmm_version"].split(".")[:2]) < (1, 13) else 3 << 30
    assert [(g["gpa"], g["offset"], g["size"]) for g in status["regions"]] == [
        (0, 0, low), (4 << 30, low, (3584 << 20) - low)], status["regions"]
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    Firecracker(case, "child", work=32, load=(branch / "memory.bin", branch / "vmstate")).visit_all()
    r.guest.visit_all(1)


def test_jail(case):
    """In the jailer's chroot, as another user, without privileges, in a pid namespace of its own."""
    r = new_rig(case, jail=JAIL_UID)
    status = pathlib.Path(f"/proc/{r.guest.pid}/status").read_text()
    assert f"Uid:\t{JAIL_UID}" in status and "CapEff:\t0000000000000000" in status and r.guest.filtered(), status
    for i in range(3):
        assert rig.wait_settled(r.branch(f"b{i}")) == "ready"
    assert r.guest.left_over() == []
    Firecracker(case, "child", load=(r.sandbox / "branches/b2/memory.bin", r.sandbox / "branches/b2/vmstate")).visit_all()
    r.guest.visit_all(1)
    r.mount.run("detach", "sbx1")
    r.guest.wait_free()


def test_hugetlb(case):
    """Memory in pages of 2 MiB."""
    pool = pathlib.Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    case.on_end(lambda: pool.write_text(before))
    pool.write_text(str(int(before) + 80))
    assert int(pool.read_text()) == int(before) + 80, "no huge pages to be had"
    r = new_rig(case, machine={"huge_pages": "2M"})
    branch = checked_branch(r, "b1")
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    same(case, r.truth, branch / "memory.bin")
    r.guest.visit_all(1)


def test_vsock_is_named(case):
    """A save resets the guest's vsock, and status says so."""
    r = new_rig(case, devices={"vsock": {"guest_cid": 3, "uds_path": str(case.dir / "vsock")}})
    assert rig.wait_settled(r.branch("b1")) == "ready"
    manifest = json.loads((r.sandbox / "branches/b1/manifest.json").read_text())
    assert manifest["vmm"]["resets_vsock"] is True and manifest["vmm"]["version"], manifest["vmm"]
    r.guest.check_runs()


def test_refused(case):
    """What is no Firecracker, one that has not started, and one whose memory is served by a userfaultfd already."""
    mount = case.mount()
    guest = Firecracker(case, "sbx1").booted()
    said = mount.run("attach", "x", "--coop", guest.api_path, check=False).err
    assert "refuses to hand over" in said or "does not cooperate" in said, said
    mount.attach(guest)
    other = case.mount(name="mnt2")
    said = other.run("attach", "x", "--firecracker", guest.api_path, check=False).err
    assert not said or "userfaultfd already" in said, said
    idle = Firecracker(case, "idle", load=None, mib=64)
    idle.api.call("PATCH", "/vm", {"state": "Paused"})
    branch = mount.attach(idle) / "branches/b1"
    branch.mkdir()
    assert idle.api.state() == "Paused"
    guest.check_runs()


def test_devices_refused(case):
    """A balloon in a VM that maps a file, and memory that is plugged in later: refused at attach, in words, and the VM goes on."""
    r = new_rig(case, devices={"balloon": {"amount_mib": 0, "deflate_on_oom": False}})
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    child = Firecracker(case, "child", load=(branch / "memory.bin", branch / "vmstate"))
    said = r.mount.run("attach", "child", "--firecracker", child.api_path, check=False)
    assert said.code == 1 and "has a balloon" in said.err, said.err
    child.visit_all(1)
    version = json.loads((r.sandbox / "status").read_text())["vmm_version"]
    if tuple(int(n) for n in version.split(".")[:2]) >= (1, 14):
        plugged = Firecracker(case, "plugged", mib=64, work=16, devices={"memory-hotplug": {"total_size_mib": 128}}).booted()
        said = r.mount.run("attach", "plugged", "--firecracker", plugged.api_path, check=False)
        assert said.code == 1 and "memory-hotplug" in said.err, said.err
        plugged.check_runs()
    r.guest.visit_all(1)


def test_drives_changed(case):
    """Drives that others change after attach: a branch names those that there are now, and is refused where disks were named."""
    files = [case.dir / f"disk{i}" for i in range(3)]
    for path in files:
        path.write_bytes(bytes(1 << 20))
    guest = Firecracker(case, "sbx1", mib=64, work=16, devices={"drives": [drive(files[0], "root"), drive(files[1], "data", True)]}).booted()
    mount = case.mount()

    def patch(name, path):
        guest.api.call("PATCH", f"/drives/{name}", {"drive_id": name, "path_on_host": str(path)})

    def branch(name):
        path = mount / "sbx1/branches" / name
        path.mkdir()
        assert rig.wait_settled(path) == "ready", (path / "status").read_text()
        return {d["id"]: d["path"] for d in json.loads((path / "manifest.json").read_text())["vmm"]["drives"]}

    mount.attach(guest)
    assert branch("b1") == {"root": str(files[0]), "data": str(files[1])}
    patch("root", files[2])
    assert branch("b2") == {"root": str(files[2]), "data": str(files[1])}
    assert "its drives were changed: root was" in mount.log(), mount.log()
    mount.run("detach", "sbx1")
    mount.attach(guest, None, "--disk", f"root={files[2]}")
    branch("b3")
    patch("data", files[0])
    done = mount.run("branch", "sbx1", "b4", check=False)
    assert done.code == 1 and f"data was {files[1]}, and is {files[0]}" in done.err and "attach it again" in done.err, done.err
    assert not (mount / "sbx1/branches/b4").exists() or rig.state(mount / "sbx1/branches/b4") == "failed"
    guest.check_runs()
    assert guest.left_over() == []
    patch("data", files[1])
    branch("b5")
    mount.run("detach", "sbx1")
    mount.attach(guest, None, "--disk", f"root={files[2]}")
    branch("b6")
    guest.visit_all(1)


def test_vcpus(case):
    """Two vCPUs, of which the guest uses one: the state of both is in the branch, and a child goes on with it."""
    r = new_rig(case, machine={"vcpu_count": 2})
    branch = checked_branch(r, "b1")
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    Firecracker(case, "child", load=(branch / "memory.bin", branch / "vmstate")).visit_all()
    r.guest.visit_all(1)


def test_killed_before_save(case):
    """kill -9 between pause and save."""
    check_death(new_rig(case), PAUSED, signal.SIGKILL)


def test_killed_before_resume(case):
    """kill -9 between arm and resume."""
    check_death(new_rig(case), SAVED, signal.SIGKILL)


def test_stopped_before_resume(case):
    """A daemon that stands still: the watchdog resumes over a connection of its own."""
    check_death(new_rig(case), SAVED, signal.SIGSTOP)


def test_left_in_open(case):
    """A daemon that dies while Firecracker waits in open(2) for a reader of the state: the watchdog is one."""
    r = new_rig(case)
    r.held("b1", PAUSED)
    seen = next(n for n in os.listdir(r.guest.root) if n.endswith(".forkfs-state"))
    r.mount.kill(signal.SIGSTOP)
    r.guest.api.request("PUT", "/snapshot/create", json.dumps({
        "snapshot_type": "Full", "snapshot_path": str(r.guest.root / seen), "mem_file_path": "/none/none"}))
    r.mount.kill()
    r.guest.check_runs(within=5)
    r.mount.clear_dead()
    assert r.guest.api.getresponse().status == 400
    r.guest.wait_free()
    r.guest.visit_all(1)


def test_paused_by_others(case):
    """See api.check_paused_by_others."""
    check_paused_by_others(new_rig(case), checked_branch)


def test_resumed_by_others(case):
    """See api.check_resumed_by_others."""
    check_resumed_by_others(new_rig(case))


def test_paused_meanwhile(case):
    """See api.check_paused_meanwhile."""
    check_paused_meanwhile(new_rig(case))
