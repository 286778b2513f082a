"""The daemon is killed, stopped or crashes anywhere: the guest runs within a second, nothing stays protected, nothing is torn."""

import errno
import os
import random
import resource
import signal
import threading
import time

from forkfs_test import faults, processes, rig

TIMEOUT = {"test_killed_at_points": 900, "test_crashed_at_points": 900, "test_stopped_at_points": 900, "test_at_random": 600}
LONG_TIMEOUT = {"test_at_random": 3600}
# Of the points in the sources at least so many are passed by attach and branch.
FEWEST = 20
# Seconds. The watchdog lets go after 0.5 s and the guest speaks every 0.1 s; the rest is for a host that is busy with other things.
RUNS_WITHIN = 3.0
SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}


def prepare(case):
    """A loaded guest; core dumps would be written, and land in the test's directory."""
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.chdir(case.dir)
    case.on_end(lambda: os.chdir("/"))
    return case.guest(mib=160, run=["counter", "load,mib=64"]).booted()


def stopped(pid):
    """True when the process was stopped by a signal."""
    fields = processes.stat_fields(pid)
    return fields is not None and fields[0] in "Tt"


def sequence(mount, guest, count=100):
    """A thread that attaches and takes so many branches, or until something fails."""
    def work():
        result = mount.run("attach", guest.name, "--qemu", guest.qmp_path, check=False, timeout=60)
        if result.code == 0:
            for i in range(count):
                try:
                    os.mkdir(mount / guest.name / "branches" / f"b{i}")
                except OSError:
                    return
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def end_daemon(mount):
    """Kill what is left of a daemon and detach its mount."""
    helpers = mount.helpers()
    mount.kill(signal.SIGKILL)
    mount.clear_dead()
    left = [processes.describe(p) for p in helpers if not processes.wait_gone(p, 5)]
    assert not left, f"helpers outlive their daemon: {left}"


def test_at_random(case):
    """kill -9, SIGSEGV and SIGSTOP at random moments of attach, pause and capture."""
    guest = prepare(case)
    fds, seed = guest.fds(), random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for i in range(300 if case.long else 30):
        name = list(SIGNALS)[i % 3]
        mount = case.mount(f"mnt{i}")
        thread = sequence(mount, guest)
        time.sleep(chance.uniform(0, 0.6))
        mount.kill(SIGNALS[name])
        guest.check_runs(RUNS_WITHIN)
        if name == "stop":
            # what is protected may stay so until the watchdog has looked: it has the same second
            end_daemon(mount)
        else:
            mount.clear_dead()
        guest.check_free(fds)
        thread.join(30)
        assert not thread.is_alive(), "a client of a dead daemon hangs"
        assert not list(case.dir.glob("core*")), "a daemon dumped core"


def reach(mount, thread):
    """Wait until the daemon has died or stopped at its fault point, or the branch has come through; True if it was hit.

    Nothing here touches the mount: that would hang with a stopped daemon."""
    def hit():
        return mount.process.poll() is not None or stopped(mount.pid)

    deadline = time.monotonic() + 30
    while thread.is_alive() and not hit():
        assert time.monotonic() < deadline, "the daemon neither died nor came through"
        time.sleep(0.005)
    if not hit():
        time.sleep(0.3)  # what was not passed before mkdir came back is in the capture
    return hit()


def end_at_points(case, action):
    """`POINT@1 action` for every point: the daemon, or the injecting process, ends there in attach or in the first branch."""
    guest = prepare(case)
    fds, hits, wrong = guest.fds(), 0, []
    for n, point in enumerate(faults.passed(case, guest)):
        if point.startswith("inject-"):
            continue  # passed in the injecting process, which outlives the daemon: unit.inject kills the daemon there
        mount = case.mount(f"mnt{n}", options="branch-rate=0")
        mount.faults(f"{point}@1 {action}")
        thread = sequence(mount, guest, 1)
        try:
            hit = reach(mount, thread)
            hits += hit
            guest.check_runs(RUNS_WITHIN)
            if mount.process.poll() is None:
                end_daemon(mount)
            else:
                mount.clear_dead()
            guest.check_free(fds)
            thread.join(30)
            assert not thread.is_alive(), "a client of a dead daemon hangs"
            assert not list(case.dir.glob("core*")), "the daemon dumped core"
            print(f"{point}: {'hit' if hit else 'not passed by the daemon itself'}")
        except AssertionError as e:
            wrong.append(point)
            print(f"{point}: WRONG: {e}")
            mount.kill(signal.SIGKILL)
            mount.clear_dead()
            fds = guest.fds()
    assert not wrong, f"{action}: {len(wrong)} points end badly: {wrong}"
    assert hits >= FEWEST, f"only {hits} points were hit: are there fault points in this build?"


def test_killed_at_points(case):
    """kill -9 at each point."""
    end_at_points(case, "kill")


def test_crashed_at_points(case):
    """SIGSEGV at each point."""
    end_at_points(case, "segv")


def test_stopped_at_points(case):
    """SIGSTOP at each point."""
    end_at_points(case, "stop")


def test_stopped_daemon_serves_nothing_torn(case):
    """A daemon stopped for two seconds in a capture: the guest is let go, and the branch is failed or right, never torn."""
    guest_runs = ["counter", "load,mib=96"]
    r = rig.Rig(case, mib=192, run=guest_runs)
    outcomes = []
    for i in range(6):
        branch = r.branch_with_truth(f"b{i}")
        r.mount.kill(signal.SIGSTOP)
        r.guest.check_runs(RUNS_WITHIN)
        time.sleep(1)
        r.guest.check_runs(RUNS_WITHIN)
        r.mount.kill(signal.SIGCONT)
        state = rig.wait_settled(branch, 20)
        if state == "ready":
            assert r.difference(branch) == "", f"branch {i} is torn and says ready"
        else:
            try:
                (branch / "memory.bin").read_bytes()
                raise AssertionError("a failed branch was read to its end")
            except OSError as e:
                assert e.errno == errno.EIO, e
        outcomes.append(state)
        branch.rmdir()
        after = r.branch_with_truth("after")
        assert rig.wait_settled(after) == "ready", (after / "status").read_text()
        assert r.difference(after) == ""
        after.rmdir()
    print(f"outcomes: {outcomes}")
