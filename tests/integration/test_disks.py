"""Disks named at attach are part of a branch: of the same instant as its memory, clean, and nobody's to write."""

import errno
import json
import os

from forkfs_test import disks, processes, rig

TIMEOUT = {"test_same_instant_xfs": 240}


def journal_guest(case, where, disk="plain"):
    """A guest that writes a journaled file system whose image is in a directory."""
    return case.guest(mib=128, run=["journal"], disk=disk, image=disks.image(case, where)).booted()


def attach(case, guest, path=None):
    """Mount, and attach the guest with its disk; (mount, sandbox)."""
    mount = case.mount()
    return mount, mount.attach(guest, None, "--disk", f"root={path or guest.disk}")


def take(mount, sandbox, name):
    """A named branch; its directory."""
    path = sandbox / "branches" / name
    try:
        path.mkdir()
    except OSError as e:
        raise AssertionError(f"mkdir {path}: {e.strerror}: {mount.error_of(path.parent)}") from e
    return path


def check_branches(case, guest, mount, sandbox, count, how):
    """Take so many branches of a guest at work; each disk is clean and of its memory's instant. Returns how far it got."""
    seen = []
    for i in range(count):
        branch = take(mount, sandbox, f"b{i}")
        seen.append(disks.check_branch(case, branch)[0])
        assert rig.wait_settled(branch) == "ready"
        described = json.loads((branch / "manifest.json").read_text())["disks"]
        assert [(d["id"], d["path"], d["how"]) for d in described] == [("root", str(guest.disk), how)], described
        if i % 2 == 0:
            branch.rmdir()
        guest.console.wait(r"^journal \d+$", timeout=60, start=guest.console.mark())
    assert seen == sorted(set(seen)), f"the branches are not one after the other: {seen}"
    guest.check_sane()
    return seen


def test_same_instant_xfs(case):
    """20 branches of a guest that writes ext4 on a disk on XFS: every clone is clean and agrees with memory to the record."""
    guest = journal_guest(case, disks.filesystem(case, "xfs"))
    mount, sandbox = attach(case, guest)
    check_branches(case, guest, mount, sandbox, 20, "clone")


def test_same_instant_btrfs(case):
    """The same on btrfs, the disk served by a thread of its own in the VMM."""
    guest = journal_guest(case, disks.filesystem(case, "btrfs"), disk="iothread")
    mount, sandbox = attach(case, guest)
    check_branches(case, guest, mount, sandbox, 4, "clone")


def test_copied_with_a_warning(case):
    """Where no blocks are shared the disk is copied inside the pause, and status and manifest say what that cost."""
    guest = journal_guest(case, disks.filesystem(case, "ext4"))
    mount, sandbox = attach(case, guest)
    check_branches(case, guest, mount, sandbox, 3, "copy")
    status = json.loads((sandbox / "branches" / "b1" / "status").read_text())
    disk = status["disks"][0]
    assert "copied inside the pause" in disk["warning"], disk
    assert status["phases"]["disks_ns"] >= disk["capture_ns"] > 0, status
    assert status["pause_ns"] >= status["phases"]["disks_ns"], status


def test_mutant_is_found(case):
    """A build that captures the disks after the resume is caught: the disk is ahead of memory."""
    guest = journal_guest(case, disks.filesystem(case, "xfs"))
    mount, sandbox = attach(case, guest)
    mount.faults("mutant:disks-after-resume on", "disk-capture delay:400")
    wrong = 0
    for i in range(5):
        branch = take(mount, sandbox, f"m{i}")
        try:
            disks.check_branch(case, branch)
        except AssertionError as e:
            wrong += "the disk has" in str(e)
    assert wrong, "five disks captured 400 ms after the resume agree with memory all the same"


def test_child_on_the_captured_disk(case):
    """A child goes on with memory and disk of the instant: its file system finds nothing wrong; the captured disk stays as it is."""
    guest = journal_guest(case, disks.filesystem(case, "xfs"))
    mount, sandbox = attach(case, guest)
    branch = take(mount, sandbox, "b1")
    assert rig.wait_settled(branch) == "ready"
    disk = branch / "disks" / "root"
    before = disk.read_bytes()
    child = guest.child("child", branch / "memory.bin", branch / "vmstate", disk=disk)
    child.go()
    child.console.wait(r"^journal \d+$", timeout=60)
    child.check_sane()
    bad = [m.string for _, m in child.console.all(r"EXT4-fs error|I/O error|journal: ")]
    assert not bad, f"the child's file system: {bad[:3]}"
    assert disk.read_bytes() == before, "the child has written the branch's disk"
    child.stop()
    guest.check_runs(within=10)


def test_qcow2_overlay(case):
    """An image with metadata of its own: a child runs on the captured one, whose backing file nobody writes."""
    where = disks.filesystem(case, "xfs")
    guest = journal_guest(case, where)
    overlay = where / "overlay.qcow2"
    guest.qmp.execute("blockdev-snapshot-sync", device="d0", **{"snapshot-file": str(overlay)})
    guest.console.wait(r"^journal \d+$", timeout=60, start=guest.console.mark())
    mount, sandbox = attach(case, guest, overlay)
    for name in ("b1", "b2"):
        branch = take(mount, sandbox, name)
        assert rig.wait_settled(branch) == "ready"
        child = guest.child(name, branch / "memory.bin", branch / "vmstate", disk=branch / "disks" / "root", image_format="qcow2")
        child.go()
        child.console.wait(r"^journal \d+$", timeout=60)
        child.check_sane()
        bad = [m.string for _, m in child.console.all(r"EXT4-fs error|I/O error|journal: ")]
        assert not bad, f"the child's file system: {bad[:3]}"
        child.stop()
        guest.console.wait(r"^journal \d+$", timeout=60, start=guest.console.mark())


def test_tree(case):
    """disks/ is a directory of read-only files, of a branch that has any; their size is the image's."""
    guest = journal_guest(case, disks.filesystem(case, "xfs"))
    mount, sandbox = attach(case, guest)
    assert json.loads((sandbox / "status").read_text())["disks"] == {"root": str(guest.disk)}
    branch = take(mount, sandbox, "b1")
    disk = branch / "disks" / "root"
    assert os.listdir(branch / "disks") == ["root"]
    assert disk.stat().st_size == guest.disk.stat().st_size
    rig.refused(errno.EPERM, os.open, disk, os.O_RDWR)
    rig.refused(errno.EPERM, os.open, disk, os.O_WRONLY)
    rig.refused(errno.EPERM, os.truncate, disk, 0)
    rig.refused(errno.EPERM, os.unlink, disk)
    rig.refused(errno.EPERM, os.mkdir, branch / "disks" / "x")
    rig.refused(errno.ENOENT, os.stat, branch / "disks" / "other")
    assert rig.wait_settled(branch) == "ready"
    with open(disk, "rb") as f:
        first = f.read(1 << 20)
        branch.rmdir()
        f.seek(0)
        assert f.read(1 << 20) == first, "an open disk changes when its branch is removed"
        assert os.fstat(f.fileno()).st_size == guest.disk.stat().st_size
    mount.run("branch", "sbx1", "copy")
    case.run("cp", "-r", sandbox / "branches" / "copy", case.dir / "copy")
    assert (case.dir / "copy" / "disks" / "root").stat().st_size == guest.disk.stat().st_size
    # a live generation has no disks, and a branch can be asked for without
    assert "disks" not in os.listdir(sandbox / "branch")
    answer = case.shell(f"exec 3<>'{sandbox}/ctl'; echo '{{\"branch\":{{\"name\":\"bare\",\"disks\":false,\"wait\":true}}}}' >&3; cat <&3")
    assert json.loads(answer.out)["branch"]["disks"] == [], answer.out
    assert os.listdir(sandbox / "branches" / "bare" / "disks") == []


def test_refused_at_attach(case):
    """What is not the VMM's disk is refused when it is named."""
    where = disks.filesystem(case, "xfs")
    guest = journal_guest(case, where)
    mount = case.mount()
    other = where / "other.img"
    other.write_bytes(guest.disk.read_bytes()[:4096])
    wrong = [(f"root={other}", "does not have"), (f"root={where}/none", "No such file"), (f"root={where}", "no regular file"),
             ("root", "is not ID=PATH"), (f"a/b={guest.disk}", "disk name"), (f"root={mount.path}/.forkfs/version", "of this mount")]
    for argument, sentence in wrong:
        done = mount.run("attach", "sbx1", "--qemu", guest.qmp_path, "--disk", argument, check=False)
        assert done.code != 0 and sentence in done.err, f"--disk {argument}: {done.err}"
    done = mount.run("attach", "sbx1", "--qemu", guest.qmp_path, "--disk", f"root={guest.disk}", "--disk", f"root={guest.disk}",
                     check=False)
    assert done.code != 0 and "twice" in done.err, done.err
    # a link to the very file is as good as the file
    link = where / "link.img"
    link.symlink_to(guest.disk)
    take(mount, mount.attach(guest, None, "--disk", f"root={link}"), "b1")
    assert guest.stops() == 1


def test_refused_before_the_pause(case):
    """No room, a disk that was switched, a clone that fails: the guest is not stopped, or runs on, and no branch is there."""
    where = disks.filesystem(case, "xfs")
    guest = journal_guest(case, where)
    mount, sandbox = attach(case, guest)

    def fails(*rules, sentence, code, stopped):
        mount.faults(*rules)
        stops = guest.stops()
        rig.refused(code, os.mkdir, sandbox / "branches" / "b1")
        mount.faults()
        assert sentence in mount.error_of(sandbox / "branches"), mount.error_of(sandbox / "branches")
        assert (guest.stops() > stops) == stopped, f"{rules}: the guest was {'' if stopped else 'not '}to be stopped"
        assert os.listdir(sandbox / "branches") == []

    fails("disk-room error:EIO", sentence="MiB are free", code=errno.ENOSPC, stopped=False)
    fails("disk-prepare error:EIO", sentence="disk root", code=errno.EIO, stopped=False)
    fails("disk-flush error:EIO", "disk-dirty error:EIO", sentence="page cache of disk root", code=errno.EIO, stopped=False)
    fails("disk-capture error:EIO", sentence="disk root", code=errno.EIO, stopped=True)
    fails("disk-seal error:EIO", sentence="disk root", code=errno.EIO, stopped=True)
    guest.check_runs(within=10)
    # the VM goes on to another file: what was named is no longer its disk
    guest.qmp.execute("blockdev-snapshot-sync", device="d0", **{"snapshot-file": str(where / "overlay.qcow2")})
    fails(sentence="gone on to another file", code=errno.EBUSY, stopped=False)
    guest.check_runs(within=10)


def test_stored(case):
    """With a store the disk is part of the durable branch: the same bytes after a restart, still of its memory's instant."""
    where = disks.filesystem(case, "xfs")
    guest = journal_guest(case, where)
    mount = case.mount(options=f"store={where}/store")
    sandbox = mount.attach(guest, None, "--disk", f"root={guest.disk}")
    branch = take(mount, sandbox, "b1")
    before = (branch / "disks" / "root").read_bytes()
    assert rig.wait_settled(branch) == "ready"
    mount.stop()
    again = case.mount(options=f"store={where}/store")
    branch = again / "sbx1" / "branches" / "b1"
    assert (branch / "disks" / "root").read_bytes() == before
    disks.check_branch(case, branch)
    rig.refused(errno.EPERM, os.open, branch / "disks" / "root", os.O_RDWR)
    again.stop()
    guest.check_runs(within=10)


def test_nothing_is_left(case):
    """The captured blocks go with the branch, and with a killed daemon."""
    where = disks.filesystem(case, "xfs")
    guest = journal_guest(case, where)
    mount, sandbox = attach(case, guest)
    take(mount, sandbox, "b1")
    assert sorted(os.listdir(where)) == ["root.img"], "a branch leaves a name beside the disk"
    mount.kill()
    mount.clear_dead()
    assert sorted(os.listdir(where)) == ["root.img"]
    guest.check_runs(within=10)


def test_killed_while_captured(case):
    """kill -9 of the daemon before, in and after the clone of a disk: the guest runs on, nothing is left, the next daemon's branch is right."""
    where = disks.filesystem(case, "xfs")
    guest = journal_guest(case, where)
    for number, point in enumerate(("disk-prepare", "disk-capture", "disk-seal", "store-vmstate")):
        mount = case.mount(f"m{number}", options=f"store={where}/store,reattach=off")
        sandbox = mount.attach(guest, None, "--disk", f"root={guest.disk}")
        mount.faults(f"{point} kill")
        try:
            (sandbox / "branches" / f"b{number}").mkdir()
        except OSError:
            pass
        assert processes.wait_gone(mount.pid, 30), f"the daemon has passed {point}"
        mount.clear_dead()
        guest.check_runs(within=10)
        assert sorted(os.listdir(where)) == ["root.img", "store"], point
    mount = case.mount("last", options=f"store={where}/store,reattach=off")
    sandbox = mount.attach(guest, None, "--disk", f"root={guest.disk}")
    for number in range(4):
        assert rig.state(sandbox / "branches" / f"b{number}") == "failed"
        (sandbox / "branches" / f"b{number}").rmdir()
    branch = take(mount, sandbox, "b")
    disks.check_branch(case, branch)
    assert rig.wait_settled(branch) == "ready"
    disks.check_branch(case, branch)
    assert sorted(p.name for p in (where / "store" / "sbx1").iterdir()) == ["b"]
