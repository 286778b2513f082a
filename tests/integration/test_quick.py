"""The way of the README: mount, attach, cp, a child that goes on. With the release build, in the background, as a user has it."""

import json
import os


def ticks(guest, start=0):
    """(time, number) of the ticks a guest printed."""
    return [(when, int(match.group(1))) for when, match in guest.console.all(r"^tick (\d+)$", start)]


def test_snapshot_and_child(case):
    """cp takes a pair, one pause long; the child goes on at the very tick; the parent does not notice."""
    forkfs, mnt = case.forkfs(release=True), case.dir / "mnt"
    guest = case.guest(run=["counter"], mib=192).booted()
    mnt.mkdir()
    case.run(forkfs, "mount", mnt)
    case.on_end(lambda: case.run(forkfs, "umount", mnt))
    os.environ["FORKFS"] = str(mnt)
    case.run(forkfs, "attach", "vm", "--pid", guest.pid)
    assert (mnt / "vm" / "state").read_text() == "running\n"
    guest.console.wait("tick 10$")

    case.shell(f"cp {mnt}/vm/branch/memory.bin memory.bin && cp {mnt}/vm/branch/vmstate vmstate")
    assert guest.stops() == 1, f"the pair took {guest.stops()} pauses"
    stopped = guest.qmp.times("STOP")[0]
    paused = guest.qmp.times("RESUME")[0] - stopped
    assert paused < 0.25, f"the guest was stopped for {paused:.3f} s"
    status = json.loads(case.run(forkfs, "status", "vm", "--json").out)
    assert 0 < status["last_branch"]["pause_ns"] < 250e6, status
    assert os.stat(case.dir / "memory.bin").st_size == 192 << 20

    before = [number for when, number in ticks(guest) if when <= stopped][-1]
    child = guest.child("child", case.dir / "memory.bin", case.dir / "vmstate")
    child.go()
    child.console.wait(rf"tick {before + 8}$", timeout=20)
    numbers = [number for _, number in ticks(child)]
    assert abs(numbers[0] - (before + 1)) <= 1, f"the parent was at {before}, the child begins with {numbers[0]}"
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), numbers
    guest.check_runs()
    ours = [number for _, number in ticks(guest)]
    assert ours == list(range(ours[0], ours[0] + len(ours))), ours
    case.run(forkfs, "detach", "vm")
    assert guest.protected() == 0
    guest.check_runs()


def test_commands(case):
    """branch, wait, ls, status and rm do what they say."""
    mount = case.mount(release=True)
    guest = case.guest(mib=128).booted()
    mount.attach(guest)
    mount.run("branch", "sbx1", "b1")
    assert (mount / "sbx1/branches/b1/state").read_text() == "ready\n"
    mount.run("branch", "sbx1", "b2", "--no-wait")
    mount.run("wait", "sbx1/b2")
    assert (mount / "sbx1/branches/b2/state").read_text() == "ready\n"
    assert "sbx1" in mount.run("ls").out
    said = mount.run("ls", "sbx1").out
    assert "b1" in said and "b2" in said, said
    status = json.loads(mount.run("status", "sbx1/b1", "--json").out)
    assert status["state"] == "ready" and status["memory_bytes"] == 128 << 20, status
    mount.run("rm", "sbx1/b1")
    assert sorted(os.listdir(mount / "sbx1/branches")) == ["b2"]
    mount.run("detach", "sbx1")
    guest.check_runs()
