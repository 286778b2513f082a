"""Branches by key: the same key is the same branch, taken once; old ones go by themselves, a user's own never."""

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


def ask(sandbox, **request):
    """A request for a branch to a sandbox's ctl; the answer."""
    with open(sandbox / "ctl", "r+b", buffering=0) as f:
        f.write(json.dumps({"branch": request}).encode())
        return json.loads(f.read(1 << 20))


def asker(sandbox, answers, **request):
    """The same in a thread, which appends the answer."""
    thread = threading.Thread(target=lambda: answers.append(ask(sandbox, **request)), daemon=True)
    thread.start()
    return thread


def names(sandbox):
    """The branches that a sandbox has, as a listing and as lookups say."""
    listed = set(os.listdir(sandbox / "branches"))
    assert all((sandbox / "branches" / n).exists() for n in listed)
    return listed


def wait_gone(path):
    """Wait until a branch has been let go, for the kernel too."""
    for _ in range(3000):
        if not path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} is still there")


def wait_no_images(mount):
    """Wait until no image is left in memory."""
    for _ in range(3000):
        if metric(mount, "image_bytes") == 0:
            return
        time.sleep(0.01)
    raise AssertionError(f"images still take {metric(mount, 'image_bytes')} bytes")


def test_one_winner(case):
    """Ten ask for a key at once: the guest is stopped once, all have that branch; so has who asks later."""
    r = rig.Rig(case, mib=128)
    answers = []
    threads = [asker(r.sandbox, answers, key="image:v1 / as any text", wait=True) for _ in range(10)]
    for t in threads:
        t.join(60)
    branches = [a["branch"] for a in answers]
    assert len(branches) == 10 and len({b["id"] for b in branches}) == 1, answers
    assert r.guest.stops() == 1, f"the guest was stopped {r.guest.stops()} times"
    assert sorted(b["cached"] for b in branches) == [False] + [True] * 9
    assert {b["key"] for b in branches} == {"image:v1 / as any text"} and {b["state"] for b in branches} == {"ready"}
    name = branches[0]["name"]
    assert names(r.sandbox) == {name}
    assert (metric(r.mount, "cache_misses_total"), metric(r.mount, "cache_hits_total")) == (1, 9)
    done = r.mount.run("branch", "sbx1", "--key", "image:v1 / as any text", "--json")
    assert json.loads(done.out)["id"] == branches[0]["id"] and r.guest.stops() == 1
    other = json.loads(r.mount.run("branch", "sbx1", "--key", "image:v2", "--json").out)
    assert other["id"] != branches[0]["id"] and r.guest.stops() == 2
    assert len((r.sandbox / "branches" / other["name"] / "memory.bin").read_bytes()) == 128 * MIB
    # with a name of its user's it is no longer the key's
    os.rename(r.sandbox / "branches" / name, r.sandbox / "branches" / "mine")
    assert "key" not in json.loads((r.sandbox / "branches" / "mine" / "status").read_text())
    again = ask(r.sandbox, key="image:v1 / as any text", wait=True)["branch"]
    assert not again["cached"] and again["id"] != branches[0]["id"] and names(r.sandbox) == {"mine", name, other["name"]}
    for wrong in ({"key": ""}, {"key": "x", "name": "y"}, {"key": 7}, {"key": "x" * 1025}):
        answer = ask_refused(r.sandbox, wrong)
        assert answer["code"] == "EINVAL", answer
    assert r.mount.run("branch", "sbx1", "b1", "--key", "x", check=False).code == 2


def ask_refused(sandbox, request):
    """The answer to a request whose write fails."""
    with open(sandbox / "ctl", "r+b", buffering=0) as f:
        try:
            f.write(json.dumps({"branch": request}).encode())
        except OSError:
            return json.loads(f.read(1 << 20))
    raise AssertionError(f"{request} was not refused")


def test_winner_dies(case):
    """The one who takes it is killed: another takes it, nobody is left waiting."""
    r = rig.Rig(case, mib=128)
    hold, held = case.dir / "hold", case.dir / "hold.held"
    r.mount.faults(f"fs-mkdir@1 hold:{hold}")
    first = case.start(r.mount.binary, "branch", "--mount", str(r.mount.path), "sbx1", "--key", "k")
    while not held.exists():
        time.sleep(0.01)
    answers = []
    second = asker(r.sandbox, answers, key="k", wait=True)
    first.kill()
    first.wait()
    hold.touch()
    second.join(60)
    assert answers and answers[0]["branch"]["state"] == "ready" and not answers[0]["branch"]["cached"], answers
    assert names(r.sandbox) == {answers[0]["branch"]["name"]}


def test_failed_is_taken_anew(case):
    """A branch of a key that failed is of no use: the next who asks gets a good one."""
    r = rig.Rig(case, mib=128)
    r.mount.faults("image-write@20 error:EIO")
    first = ask(r.sandbox, key="k", wait=True)
    assert "error" in first, first
    r.mount.faults()
    again = ask(r.sandbox, key="k", wait=True)["branch"]
    assert again["state"] == "ready" and not again["cached"] and len(names(r.sandbox)) == 1


def test_pruned_by_size(case):
    """Beyond cache-size the least recently used go, not what is open, and never a user's own."""
    r = rig.Rig(case, mib=128, run=["counter", "load,mib=48,fill=1,rate=50"], options="cache-size=250M")
    r.branch("mine")
    kept = [ask(r.sandbox, key=k, wait=True)["branch"]["name"] for k in ("a", "b")]
    assert names(r.sandbox) == {"mine", *kept}
    with open(r.sandbox / "branches" / kept[0] / "memory.bin", "rb") as f:
        f.read(4096)
        before = metric(r.mount, "cache_pruned_total")
        for k in ("c", "d", "e"):
            kept.append(ask(r.sandbox, key=k, wait=True)["branch"]["name"])
        wait_gone(r.sandbox / "branches" / kept[1])
        left = names(r.sandbox)
        assert {"mine", kept[0], kept[4]} <= left and metric(r.mount, "cache_pruned_total") > before, left
    r.guest.check_runs(within=10)


def test_pruned_by_age(case):
    """What nobody has used for cache-age goes by itself; who has it open goes on."""
    r = rig.Rig(case, mib=128, options="cache-age=1")
    r.branch("mine")
    name = ask(r.sandbox, key="a", wait=True)["branch"]["name"]
    with open(r.sandbox / "branches" / name / "memory.bin", "rb") as f:
        assert len(f.read(MIB)) == MIB
        time.sleep(1.5)
        assert name in names(r.sandbox), "it was let go while it is open"
    wait_gone(r.sandbox / "branches" / name)
    assert names(r.sandbox) == {"mine"}
    assert not ask(r.sandbox, key="a", wait=True)["branch"]["cached"]


def test_makes_room(case):
    """A branch that does not fit into the memory for images takes the room of cached ones, not of a user's own."""
    r = rig.Rig(case, mib=128, run=["counter", "load,mib=64,fill=1,rate=50"], options="memory=240M")
    name = ask(r.sandbox, key="a", wait=True)["branch"]["name"]
    mine = r.branch("mine")
    assert rig.wait_settled(mine) == "ready"
    wait_gone(r.sandbox / "branches" / name)
    assert names(r.sandbox) == {"mine"}
    second = ask(r.sandbox, name="second")
    assert second.get("code") == "ENOSPC", second
    assert rig.state(mine) == "ready"


def test_stored(case):
    """A cached branch in the store is found by its key after a restart, and goes beyond cache-store; a user's own stays."""
    store = case.dir / "store"
    mount = case.mount(options=f"store={store}")
    guest = case.guest(mib=128).booted()
    sandbox = mount.attach(guest)
    first = ask(sandbox, key="a", wait=True)["branch"]
    assert first["store"] == "dense" and first["state"] == "ready", first
    wait_no_images(mount)  # from memory to the store: nobody has it open
    os.rename(sandbox / "branches" / ask(sandbox, key="b", wait=True)["branch"]["name"], sandbox / "branches" / "mine")
    mount.stop()
    again = case.mount(options=f"store={store},cache-store=200M")
    sandbox = again.attach(guest)
    stops = guest.stops()
    found = ask(sandbox, key="a", wait=True)["branch"]
    assert found["cached"] and found["id"] == first["id"] and guest.stops() == stops, found
    assert "key" not in json.loads((sandbox / "branches" / "mine" / "status").read_text())
    for k in ("c", "d"):
        assert not ask(sandbox, key=k, wait=True)["branch"]["cached"]
    wait_gone(sandbox / "branches" / found["name"])
    assert "mine" in names(sandbox) and not (store / "sbx1" / found["name"]).exists()
    guest.check_runs(within=10)
