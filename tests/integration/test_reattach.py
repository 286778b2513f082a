"""A daemon ends, however it ends, and the next one finds the VMs again: those, and no others."""

import json
import os
import signal
import time

from forkfs_test import processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

GUEST = {"mib": 96, "run": ["counter", "load,mib=32"]}
WITHIN = 30


class GuestRig(rig.Rig):
    """A guest whose files are known from before it was attached."""

    def __init__(self, case, *attach):  # pylint: disable=super-init-not-called
        self.case = case
        self.guest = case.guest(**GUEST).booted()
        self.fds = self.guest.fds()
        self.mount = case.mount()
        self.sandbox = self.mount.attach(self.guest, None, *attach)
        self.hold, self.truth = case.dir / "hold", case.dir / "truth"


def again(r, options=""):
    """The next daemon on the same directory, when it is done with attaching."""
    r.mount = r.case.mount("mnt", options=options)
    settled(r)


def settled(r, left=0):
    """Wait until no more than `left` VMs are still being attached again."""
    deadline = time.monotonic() + WITHIN
    while rig.metric(r, "reattaching") > left:
        assert time.monotonic() < deadline, f"still attaching: {r.mount.log()[-2000:]}"
        time.sleep(0.01)


def kill(r):
    """kill -9, and detach the dead mount."""
    r.mount.kill(signal.SIGKILL)
    r.mount.clear_dead()


def attached(r, name="sbx1"):
    """The sandbox's status, None when there is none attached."""
    try:
        status = json.loads((r.mount / name / "status").read_text())
    except FileNotFoundError:
        return None
    return None if status["state"] == "detached" else status


def records(case, store=None):
    """The records on disk, by name."""
    directories = [store / ".attached"] if store else list((case.dir / "run").glob("*"))
    return {p.name: p for d in directories for p in (d.iterdir() if d.is_dir() else ())}


def check_identical(r, name, **how):
    """A branch of the new daemon is what foreign hands read."""
    branch = r.branch_with_truth(name, **how)
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    assert r.difference(branch) == "", name


def check_gone(r, what, name="sbx1"):
    """It is not attached, the log says why, it counts, and it is tried no more."""
    assert attached(r, name) is None, attached(r, name)
    assert f"{name} was attached before and cannot be again" in r.mount.log() and what in r.mount.log(), r.mount.log()[-2000:]
    assert rig.metric(r, "reattach_failed_total") == 1
    assert name not in records(r.case)


def test_killed_in_capture(case):
    """kill -9 with a capture under way: no protection is left, and the next daemon has the VM back, tracked, with its owner."""
    r = GuestRig(case, "--track", "--owner", "1234:1235")
    first = attached(r)
    check_identical(r, "b1")
    r.mount.faults("guest-read delay:20")
    branch = r.branch("b2")
    assert rig.state(branch) == "writing" and r.guest.protected()
    kill(r)
    r.guest.check_free(r.fds)
    r.guest.check_runs()
    again(r)
    status = attached(r)
    assert status and status["pid"] == r.guest.pid and status["tracking"] is True, status
    assert status["regions"] == first["regions"] and os.stat(r.sandbox).st_uid == 1234
    assert rig.metric(r, "reattached_total") == 1
    check_identical(r, "b3")
    check_identical(r, "b4", mode="diff")
    kill(r)
    again(r)
    check_identical(r, "b5", mode="full")
    assert attached(r)["tracking"] is True


def test_held_in_passing(case):
    """What is left of the daemon before, its watchdog say, still has the VM for a moment when the next one begins."""
    r = GuestRig(case)
    kill(r)
    r.guest.check_free(r.fds)
    r.mount = case.mount("mnt", rules=("attach@1 error:EBUSY", "fs-attach@3 error:EBUSY"))
    settled(r)
    assert attached(r) and rig.metric(r, "reattached_total") == 1 and rig.metric(r, "reattach_failed_total") == 0, r.mount.log()
    check_identical(r, "b1")


def test_microvm(case):
    """The same with the driver coop, whose VMM hands its userfaultfd over anew."""
    r = ApiRig(case, MicroVm(case, "sbx1", mib=96, fill=1))
    r.mount.faults("guest-read delay:20")
    assert rig.state(r.branch("b1")) == "writing" and r.guest.protected()
    kill(r)
    r.guest.wait_free()
    r.guest.check_runs()
    again(r)
    assert attached(r)["pid"] == r.guest.pid
    check_identical(r, "b2")
    r.guest.visit_all(1)


def test_signal_and_umount(case):
    """After SIGTERM the next daemon goes on; who unmounts, or detaches, is done with the VM."""
    r = ApiRig(case, MicroVm(case, "sbx1"))
    os.kill(r.mount.pid, signal.SIGTERM)
    assert processes.wait_gone(r.mount.pid, 15)
    r.mount.process.wait()
    assert list(records(case)) == ["sbx1"]
    again(r)
    check_identical(r, "b1")
    r.mount.stop()
    assert not list((case.dir / "run").iterdir()), "umount leaves records"
    again(r)
    assert attached(r) is None
    r.mount.attach(r.guest)
    r.mount.run("detach", "sbx1")
    assert not records(case)
    kill(r)
    again(r)
    assert attached(r) is None and rig.metric(r, "reattach_failed_total") == 0


def test_turned_off(case):
    """reattach=off leaves no word and forgets what an earlier daemon has left."""
    r = ApiRig(case, MicroVm(case, "sbx1"))
    kill(r)
    assert list(records(case)) == ["sbx1"]
    again(r, "reattach=off")
    assert attached(r) is None and not records(case)
    r.mount.attach(r.guest)
    assert not records(case)
    kill(r)
    again(r)
    assert attached(r) is None


def test_store(case):
    """With a store the records are in it; a VM that has ended is reported and dropped, its branches stay; the other is there."""
    store = case.dir / "store"
    r = ApiRig(case, MicroVm(case, "sbx1"), case.mount(options=f"store={store}"))
    other = MicroVm(case, "sbx2").booted()
    r.mount.attach(other)
    for name in ("sbx1", "sbx2"):
        (r.mount / name / "branches/b1").mkdir()
        (r.mount / name / "branches/b1/wait").read_text()
    assert sorted(records(case, store)) == ["sbx1", "sbx2"] and not records(case)
    assert os.stat(store / ".attached/sbx1").st_mode & 0o777 == 0o600
    kill(r)
    r.guest.stop()
    again(r, f"store={store}")
    assert attached(r, "sbx2")["pid"] == other.pid
    check_gone(r, f"process {r.guest.pid}, has exited")
    assert list(records(case, store)) == ["sbx2"]
    assert (r.mount / "sbx1/state").read_text() == "detached\n"
    for name in ("sbx1", "sbx2"):
        assert rig.state(r.mount / name / "branches/b1") == "ready"
    (r.mount / "sbx2/branches/b2").mkdir()
    assert rig.wait_settled(r.mount / "sbx2/branches/b2") == "ready"


def test_another_vm(case):
    """Never another VM than the one that was attached: records whose process, socket or boot is another's, damaged ones, and at
    last a new VM that serves the socket of one that has ended."""
    r = rig.Rig(case, **GUEST)
    other = case.guest("sbx2", **GUEST).booted()
    kill(r)
    record = records(case)["sbx1"]
    right = json.loads(record.read_text())
    changes = [("start", right["start"] + 1, "has exited"), ("boot", "00000000-0000-0000-0000-000000000000", "has exited"),
               ("pid", other.pid, "has exited"), ("attach", {**right["attach"], "qemu": other.qmp_path}, "belongs to process"),
               ("attach", {**right["attach"], "qemu": "relative"}, "absolute path"),
               ("attach", {**right["attach"], "name": "sbx9"}, "its record is of 'sbx9'")]
    for key, value, what in changes:
        record.write_text(json.dumps({**right, key: value}))
        (record.parent / "torn").write_text(record.read_text()[:40])
        (record.parent / ".sbx3.new").write_text("{")
        again(r)
        check_gone(r, what)
        assert "torn of a VM is dropped" in r.mount.log() and not records(case)
        kill(r)
        (r.mount.log_path).unlink()
    record.write_text(json.dumps(right))
    record.parent.chmod(0o777)
    again(r)
    assert attached(r) is None and "can be written by others" in r.mount.log()
    record.parent.chmod(0o700)
    kill(r)
    again(r)
    check_identical(r, "b1")
    kill(r)
    r.guest.stop()
    os.rename(other.qmp_path, r.guest.qmp_path)
    again(r)
    check_gone(r, f"process {r.guest.pid}, has exited")
    assert other.protected() == 0 and other.stops() == 0


def test_hanging_vm(case):
    """A VMM that does not answer keeps nobody else waiting, and is detached or attached like any other later."""
    r = ApiRig(case, MicroVm(case, "sbx1"))
    other = MicroVm(case, "sbx2").booted()
    r.mount.attach(other)
    kill(r)
    os.kill(r.guest.pid, signal.SIGSTOP)
    try:
        r.mount = case.mount("mnt")
        settled(r, 1)
        assert attached(r, "sbx2")["pid"] == other.pid
        busy = r.mount.run("attach", "sbx1", *r.guest.attach_options, check=False)
        assert busy.code == 1, busy.out
        (r.mount / "sbx2/branches/b1").mkdir()
        assert rig.wait_settled(r.mount / "sbx2/branches/b1") == "ready"
    finally:
        os.kill(r.guest.pid, signal.SIGCONT)
    settled(r)
    if attached(r) is None:  # it was given up before it went on: the record is for the next daemon
        assert "the next daemon tries once more" in r.mount.log(), r.mount.log()[-2000:]
        kill(r)
        again(r)
    check_identical(r, "b1")


def test_events(case):
    """Who listens hears of a VM that is attached again, and of one that is gone."""
    r = ApiRig(case, MicroVm(case, "sbx1"))
    other = MicroVm(case, "sbx2").booted()
    r.mount.attach(other)
    kill(r)
    for guest in (r.guest, other):
        os.kill(guest.pid, signal.SIGSTOP)
    try:
        r.mount = case.mount("mnt")
        events = os.open(r.mount / ".forkfs/events", os.O_RDONLY)
        other.process.kill()
        other.process.wait()
    finally:
        os.kill(r.guest.pid, signal.SIGCONT)
    heard = {}
    while len(heard) < 2:
        for line in os.read(events, 1 << 16).decode().splitlines():
            event = json.loads(line)
            heard[event["sandbox"]] = event
    os.close(events)
    settled(r)
    assert heard["sbx2"]["event"] == "gone" and f"process {other.pid}, has exited" in heard["sbx2"]["error"], heard
    assert heard["sbx1"]["event"] == "attach" or "next daemon" in r.mount.log(), heard
    assert "sbx2" not in records(case)
