"""Memory for images and permits to capture: refused before the pause, held during the capture, fair, and visible."""

import errno
import json
import os
import re
import threading
import time

from forkfs_test import rig

MIB = 1 << 20


def metric(mount, name):
    """A number of .forkfs/metrics."""
    return int(re.search(rf"^forkfs_{name} (\d+)$", (mount / ".forkfs" / "metrics").read_text(), re.M).group(1))


def wait_metric(mount, name, wanted):
    """Read a metric until it is what is wanted: images are freed, and captures end, outside of any request."""
    for _ in range(3000):
        if wanted(metric(mount, name)):
            return
        time.sleep(0.01)
    raise AssertionError(f"{name} stays {metric(mount, name)}")


def mkdir_error(path):
    """errno of a mkdir that must fail."""
    try:
        os.mkdir(path)
    except OSError as e:
        return errno.errorcode[e.errno]
    raise AssertionError(f"mkdir {path} was not refused")


def test_memory_is_refused_and_given_back(case):
    """A branch that would not fit is refused before the pause, with the figures; memory is back when the last opener is gone."""
    r = rig.Rig(case, mib=128, run=["counter", "load,mib=64,fill=1,rate=100"], options="memory=200M")
    first = r.branch("b1")
    assert rig.wait_settled(first) == "ready"
    taken = metric(r.mount, "image_bytes")
    assert 72 * MIB < taken <= 128 * MIB, f"the image of 64 filled MiB is said to take {taken} bytes"
    assert json.loads((first / "status").read_text())["image_bytes"] == taken
    assert metric(r.mount, "image_reserved_bytes") == 0 and metric(r.mount, "image_limit_bytes") == 200 * MIB
    stops = r.guest.stops()
    for _ in range(2):
        assert mkdir_error(r.sandbox / "branches" / "b2") == "ENOSPC"
    sentence = r.mount.error_of(r.sandbox / "branches")
    assert "128 MiB" in sentence and f"{(200 * MIB - taken) // MIB} MiB of the 200 MiB" in sentence, sentence
    assert r.guest.stops() == stops, "the guest was stopped for a branch that does not fit"
    # branch/ is no way round it
    done = case.run("head", "-c", "1", r.sandbox / "branch" / "memory.bin", check=False)
    assert "No space left" in done.err and r.guest.stops() == stops, done.err
    with open(first / "memory.bin", "rb") as held:
        first.rmdir()
        assert metric(r.mount, "image_bytes") == taken, "an image that is open counts no longer"
        assert mkdir_error(r.sandbox / "branches" / "b2") == "ENOSPC"
        assert len(held.read(MIB)) == MIB
    wait_metric(r.mount, "image_bytes", lambda n: n == 0)
    assert rig.wait_settled(r.branch("b2")) == "ready"
    r.guest.check_runs(within=10)


def test_running_out_in_flight(case):
    """A capture that gets no memory fails alone: the guest, the older branch and the account are as before."""
    r = rig.Rig(case, mib=128, run=["counter", "load,mib=48,fill=1,rate=100"], options="memory=300M")
    older = r.branch("older")
    assert rig.wait_settled(older) == "ready"
    before, taken = (older / "memory.bin").read_bytes(), metric(r.mount, "image_bytes")
    r.mount.faults("image-write@100 error:ENOSPC")
    failed = r.sandbox / "branches" / "failed"
    failed.mkdir()
    assert rig.wait_settled(failed) == "failed"
    r.mount.faults()
    assert metric(r.mount, "image_bytes") == taken and metric(r.mount, "image_reserved_bytes") == 0, \
        "a branch that failed keeps memory"
    r.guest.check_runs(within=10)
    assert (older / "memory.bin").read_bytes() == before
    assert rig.wait_settled(r.branch("next")) == "ready"


def ask(sandbox, name):
    """Ask by ctl for a branch, in a thread; (thread, list that gets the answer)."""
    answers = []

    def run():
        with open(sandbox / "ctl", "r+b", buffering=0) as f:
            f.write(json.dumps({"branch": {"name": name, "wait": True}}).encode())
            answers.append(json.loads(f.read(1 << 20)))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, answers


def test_writers_in_turn(case):
    """One branch at a time is written to the store: a sandbox with many does not hold up another's, and status shows the places."""
    r = rig.Rig(case, mib=128, options=f"store={case.dir}/store")
    second = r.mount.attach(case.guest("sbx2", mib=128).booted())
    hold = case.dir / "hold"
    r.mount.faults(f"store-memory@1 hold:{hold}")
    events = open(r.mount / ".forkfs" / "events", "rb", buffering=0)
    branches = [r.branch("b1")]
    while not (case.dir / "hold.held").exists():
        time.sleep(0.01)
    branches += [r.branch("b2"), r.branch("b3"), second / "branches" / "c1"]
    branches[3].mkdir()

    def places():
        return [json.loads((b / "status").read_text()).get("write_place") for b in branches]

    for _ in range(3000):
        if places() == [0, 2, 3, 1]:
            break
        time.sleep(0.01)
    assert places() == [0, 2, 3, 1], places()
    hold.touch()
    for b in branches:
        assert rig.wait_settled(b) == "ready"
    said = [json.loads(line) for line in events.read(1 << 20).splitlines()]
    events.close()
    assert [e["branch"] for e in said if e["event"] == "ready"] == ["b1", "c1", "b2", "b3"], said


def test_permits(case):
    """One capture at once: mkdir says how to wait, ctl waits its turn and status shows the place."""
    r = rig.Rig(case, mib=128, options="captures=1")
    other = case.guest("sbx2", mib=128).booted()
    second = r.mount.attach(other)
    release = case.dir / "release"
    r.mount.faults(f"settle@1 hold:{release}")
    flying = r.branch("b1")
    stops = other.stops()
    assert mkdir_error(second / "branches" / "c1") == "EAGAIN"
    sentence = r.mount.error_of(second / "branches")
    assert '{"branch":{"name":"c1"}}' in sentence and "captures=" in sentence, sentence
    assert other.stops() == stops
    thread, answers = ask(second, "c1")
    wait_metric(r.mount, "captures_waiting", lambda n: n == 1)
    assert json.loads((second / "status").read_text())["queue"] == [{"name": "c1", "place": 1}]
    assert json.loads((r.sandbox / "status").read_text())["queue"] == []
    assert rig.state(flying) == "writing" and metric(r.mount, "captures") == 1
    release.touch()
    thread.join(60)
    assert answers and answers[0]["branch"]["state"] == "ready", answers
    assert rig.wait_settled(flying) == "ready"
    wait_metric(r.mount, "captures", lambda n: n == 0)
    assert json.loads((second / "status").read_text())["queue"] == []
    # a permit is not lost by those who fail, or never came to their turn
    r.mount.faults("vmm-pause error:EIO")
    assert mkdir_error(second / "branches" / "c2") == "EIO"
    r.mount.faults()
    assert rig.wait_settled(r.branch("b2")) == "ready"
    r.guest.check_runs(within=10)
    other.check_runs(within=10)
