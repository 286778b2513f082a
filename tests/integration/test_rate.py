"""The copiers can be told how fast, and a branch can be given up while they are at it."""

import errno
import json
import time

from forkfs_test import processes, rig
from forkfs_test.guest import MIB

RUN = ["counter", "load,mib=96,fill=1,rate=200"]
RATE = 16 * MIB


def status(branch):
    """A branch's status."""
    return json.loads((branch / "status").read_text())


def images(pid):
    """How many branches' images a process has open."""
    return sum("forkfs-image" in link for link in processes.open_files(pid).values())


def test_rate(case):
    """At so many bytes a second it takes so long; who reads does not wait, and a removal ends it at once."""
    r = rig.Rig(case, mib=192, run=RUN)
    rig.request(r.sandbox / "ctl", branch={"name": "slow", "max_rate": RATE})
    slow = r.sandbox / "branches/slow"
    first = status(slow)
    assert first["state"] == "writing" and first["captured_bytes"] < first["memory_bytes"] // 2, first
    data = (slow / "memory.bin").read_bytes()  # captures what it needs itself, all of it
    assert rig.wait_settled(slow) == "ready"
    assert (slow / "memory.bin").read_bytes() == data
    slow.rmdir()

    began = time.monotonic()
    r.mount.run("branch", "sbx1", "slow", "--max-rate", "32M")
    took = time.monotonic() - began
    # 192 MiB at 32 MiB a second, less what faults capture; no upper bound: that is the machine's
    assert took > 2, f"the copiers went on for {took:.2f} s only"
    slow.rmdir()
    r.guest.check_sane()
    r.guest.check_runs()


def test_given_up(case):
    """rmdir of a branch that would take minutes: it is gone, with its memory, its reader fails, and the next is taken."""
    r = rig.Rig(case, mib=192, run=RUN)
    rig.request(r.sandbox / "ctl", branch={"name": "slow", "max_rate": MIB})
    slow = r.sandbox / "branches/slow"
    waits = case.start("cat", slow / "wait")
    while status(slow)["image_bytes"] == 0:
        time.sleep(0.01)
    slow.rmdir()
    assert waits.wait(timeout=30) != 0, "who waited for it was told that it is ready"
    deadline = time.monotonic() + 30
    while json.loads((r.sandbox / "status").read_text())["in_flight"]:
        assert time.monotonic() < deadline, "its capture goes on"
        time.sleep(0.01)
    while images(r.mount.pid):
        assert time.monotonic() < deadline, "its memory is not free"
        time.sleep(0.01)
    assert rig.wait_settled(r.branch("next")) == "ready"
    try:
        rig.request(r.sandbox / "ctl", branch={"name": "b", "max_rate": 0})
    except OSError as e:
        assert e.errno == errno.EINVAL and "max_rate" in e.strerror, e
    else:
        raise AssertionError("a rate of 0 was taken")
    r.guest.check_runs()
