"""Forks in the store: what was said to be done is there after a restart, byte for byte, or after a kill; damage is named, and never read."""

import errno
import hashlib
import json
import os
import random
import threading

from forkfs_test import children, processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm
from forkfs_test.rig import refused

TIMEOUT = {"test_killed": 240, "test_killed_at_random": 240}
MIB = 16
PAGE = 4096


def guest(case, options=""):
    """A microVM that publishes a mailbox, attached on a mount with a store."""
    mount = case.mount(options=f"store={case.dir}/store{options}")
    return ApiRig(case, MicroVm(case, "sbx1", mib=MIB, kind="memfd", mailbox="config,s3cret"), mount)


def settled(r, name="b1", store="dense"):
    """A branch that is in the store."""
    rig.request(r.sandbox / "ctl", branch={"name": name, "store": store, "wait": True})
    return r.sandbox / "branches" / name


def again(r, name, kill=False):
    """The next daemon on the same store, without a VM."""
    if kill:
        r.mount.kill()
        r.mount.clear_dead()
    else:
        r.mount.stop()
    r.mount = r.case.mount(name, options=f"store={r.case.dir}/store,reattach=off")
    r.sandbox = r.mount.path / "sbx1"
    return r.sandbox / "branches"


def status(path):
    """What a fork says of itself."""
    return json.loads((path / "status").read_text())


def digest(path):
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fork(branch, name, payload=None):
    """Make a fork, with a payload; its directory."""
    path = branch / "forks" / name
    path.mkdir()
    if payload is not None:
        (path / "mailboxes/config").write_text(payload)
    return path


def write_once(path, data):
    """One write(2); the handle is closed whatever comes."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def described(path):
    """All that a restart must not change of a fork."""
    said = status(path)
    return {k: said[k] for k in ("name", "epoch", "made", "mailboxes", "overlay_pages", "branch_id", "state")} | {
        "payload": (path / "mailboxes/config").read_bytes(), "memory": digest(path / "memory.bin"), "record": (path / "record.json").read_bytes()}


def files(case, name="b1"):
    """The files of a branch's forks in the store."""
    place = case.dir / "store/sbx1" / name / "forks"
    return sorted(os.listdir(place)) if place.exists() else []


def test_life(case):
    """Forks of a dense and of a packed branch are back after a restart, byte for byte, and children of them find their payloads."""
    r = guest(case)
    before = {}
    for store in ("dense", "packed"):
        branch = settled(r, store, store)
        fork(branch, "c1", ' {"task":1,"n":9007199254740993,"a":"\\u00e4ä"}\n\n')
        fork(branch, "empty")
        rig.request(r.sandbox / "ctl", fork={"branch": store, "name": "asked", "mailboxes": [
            {"name": "config:s3cret", "payload": {"by": "ctl"}, "wait_for_ack": True, "ack_timeout_ms": 700}]})
        changed = fork(branch, "changed", '{"first":1}')
        (changed / "mailboxes/config").write_text('{"second":2}')
        taken = fork(branch, "taken", '{"gone":1}')
        (taken / "mailboxes/config").unlink()
        fork(branch, "gone", '{"x":1}').rmdir()
        assert files(case, store) == [f"{n}.json" for n in ("asked", "c1", "changed", "empty", "taken")]
        for f in (branch / "forks").iterdir():
            assert status(f)["stored"] is True
            before[store, f.name] = described(f)
            assert (case.dir / "store/sbx1" / store / "forks" / f"{f.name}.json").read_bytes() == before[store, f.name]["record"]
    assert before["dense", "c1"]["epoch"] != before["packed", "c1"]["epoch"]
    branches = again(r, "mnt2")
    for (store, name), was in before.items():
        f = branches / store / "forks" / name
        assert described(f) == was, name
        assert status(f)["fixed"] is True
    assert len(list((branches / "dense/forks").iterdir())) == 5
    # it may have been read: it never changes again
    refused(errno.EBUSY, write_once, branches / "dense/forks/empty/mailboxes/config", b"{}")
    assert "never changes again" in r.mount.error_of(branches / "dense/forks/empty/mailboxes")
    refused(errno.EEXIST, fork, branches / "dense", "c1")
    for store in ("dense", "packed"):
        (child,), _ = children.run_micro(r.mount, f"sbx1/{store}/c1")
        assert child.mail() == (before[store, "c1"]["epoch"].replace("-", ""), '{"task":1,"n":9007199254740993,"a":"\\u00e4ä"}')
        child.visit_all(MIB, 1)
        child.stop()
    # the names are the branch's, in either form; what is removed stays so
    os.rename(branches / "dense", branches / "renamed")
    r.mount.run("convert", "sbx1/renamed", "--to", "packed")
    r.mount.run("convert", "sbx1/packed", "--to", "dense")
    (branches / "renamed/forks/taken").rmdir()
    fork(branches / "renamed", "new", '{"new":1}')
    before["dense", "new"] = described(branches / "renamed/forks/new")
    del before["dense", "taken"]
    branches = again(r, "mnt3")
    names = {"dense": "renamed", "packed": "packed"}
    for store, name in names.items():
        assert sorted(os.listdir(branches / name / "forks")) == sorted(n for s, n in before if s == store)
    for (store, name), was in before.items():
        assert described(branches / names[store] / "forks" / name) == was, name
    for name in names.values():
        (branches / name).rmdir()
    r.mount.stop()
    assert os.listdir(case.dir / "store") == [".lock"]


def test_in_flight(case):
    """A fork of a branch on its way to the store, renamed meanwhile, is there when the branch is ready; a killed daemon takes both."""
    r = guest(case)
    hold = case.dir / "hold"
    for point in ("store-memory", "store-publish"):
        r.mount.faults(f"{point} hold:{hold}")
        branch = r.branch("b1")
        while not (case.dir / "hold.held").exists():
            assert rig.state(branch) == "writing"
        f = fork(branch, "early", '{"early":1}')
        assert status(f)["stored"] is False and status(f)["state"] == "writing"
        fork(branch, "gone", '{"x":1}').rmdir()
        os.rename(branch, branch.with_name("b2"))
        branch = branch.with_name("b2")
        fork(branch, "later", '{"later":1}')
        hold.touch()
        assert rig.wait_settled(branch) == "ready"
        r.mount.faults()
        fork(branch, "after", '{"after":1}')
        assert files(case, "b2") == ["after.json", "early.json", "later.json"]
        before = {f.name: described(f) for f in (branch / "forks").iterdir()}
        again(r, f"{point}-again", kill=True)
        assert {f.name: described(f) for f in (r.sandbox / "branches/b2/forks").iterdir()} == before
        (r.sandbox / "branches/b2").rmdir()
        hold.unlink()
        (case.dir / "hold.held").unlink()
        r.mount.attach(r.guest)
    r.mount.faults(f"store-memory hold:{hold}")
    fork(r.branch("b3"), "c1", '{"lost":1}')
    branches = again(r, "mnt4", kill=True)
    assert rig.state(branches / "b3") == "failed" and os.listdir(branches / "b3/forks") == []
    (branches / "b3").rmdir()


def test_refused(case):
    """What the store can't take is refused by the call at fault, and is neither in the tree nor in the store."""
    r = guest(case)
    branch = settled(r)
    kept = fork(branch, "kept", '{"kept":1}')
    before = described(fork(branch, "control", '{"kept":1}'))
    for point in ("fork-write", "fork-publish"):
        r.mount.faults(f"{point} error:ENOSPC")
        refused(errno.ENOSPC, fork, branch, "c1")
        assert "store" in r.mount.error_of(branch / "forks") and "forkfs rm" in r.mount.error_of(branch / "forks")
        refused(errno.ENOSPC, lambda: rig.request(r.sandbox / "ctl", fork={"branch": "b1", "name": "c2"}))
        assert sorted(os.listdir(branch / "forks")) == ["control", "kept"]
        refused(errno.ENOSPC, (kept / "mailboxes/config").write_text, '{"more":1}')
        refused(errno.ENOSPC, (kept / "mailboxes/config").unlink)
        assert (kept / "mailboxes/config").read_text() == '{"kept":1}'
        r.mount.faults()
        assert sorted(os.listdir(branch / "forks")) == ["control", "kept"] and len(files(case)) == 2, files(case)
    r.mount.faults("fork-remove error:EIO")
    refused(errno.EIO, kept.rmdir)
    r.mount.faults()
    assert (kept / "mailboxes/config").read_text() == '{"kept":1}'
    # the last step could not be done: whether it would be there after a crash nobody knows
    r.mount.faults("fork-published error:EIO")
    refused(errno.EIO, (kept / "mailboxes/config").write_text, '{"more":1}')
    r.mount.faults()
    assert status(kept)["state"] == "failed" and "published" in status(kept)["error"]
    refused(errno.EIO, (kept / "memory.bin").read_bytes)
    kept.rmdir()
    assert described(branch / "forks/control") == before and files(case) == ["control.json"]


def test_killed(case):
    """kill -9 at each step: the fork, its payload, its removal is there or not, whole."""
    r = guest(case)
    branch = settled(r)
    fork(branch, "old", '{"old":1}')
    expected = digest(branch / "memory.bin")
    steps = {"fork-write": (None, '{"old":1}'), "fork-publish": (None, '{"old":1}'), "fork-published": ("c1", '{"new":1}')}
    for number, (point, (made, payload)) in enumerate(steps.items()):
        r.mount.faults(f"{point} kill")
        dies(fork, branch, "c1")
        branch = again(r, f"a{number}", kill=True) / "b1"
        assert set(os.listdir(branch / "forks")) == {"old"} | ({made} if made else set()), point
        assert all(n.endswith(".json") for n in files(case)), files(case)
        if made:
            assert (branch / "forks" / made / "mailboxes/config").read_bytes() == b""
            (branch / "forks" / made).rmdir()
        (branch / "forks/old").rmdir()
        fork(branch, "old", '{"old":1}')
        r.mount.faults(f"{point} kill")
        dies((branch / "forks/old/mailboxes/config").write_text, '{"new":1}')
        branch = again(r, f"b{number}", kill=True) / "b1"
        assert (branch / "forks/old/mailboxes/config").read_text() == payload, point
        assert digest(branch / "memory.bin") == expected
        (branch / "forks/old").rmdir()
        fork(branch, "old", '{"old":1}')
    r.mount.faults("fork-remove kill")
    dies((branch / "forks/old").rmdir)
    branch = again(r, "c", kill=True) / "b1"
    assert os.listdir(branch / "forks") == ["old"]
    r.mount.run("verify", "sbx1/b1")
    r.guest.check_runs()


def dies(what, *args):
    """The daemon ends in it."""
    try:
        what(*args)
    except OSError as e:
        assert e.errno in (errno.ECONNABORTED, errno.ENOTCONN, errno.EINTR), e
        return
    raise AssertionError("the daemon has passed the point")


def test_killed_at_random(case):
    """kill -9 while four make, change and remove forks: what was said to be done is there, and what is there is whole."""
    r = guest(case)
    branch = settled(r)
    (at,) = status(fork(branch, "probe", "{}"))["overlay_pages"]
    base = (branch / "memory.bin").read_bytes()
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(8):
        sure, maybe, lock = {}, {}, threading.Lock()

        def work(who, number=number, branch=branch, sure=sure, maybe=maybe, lock=lock):
            for i in range(1000):
                name, text = f"f{number}.{who}.{i}", f'{{"who":{who},"i":{i}}}'
                try:
                    with lock:
                        maybe[name] = {"", text}
                    fork(branch, name, text)
                    with lock:
                        sure[name] = text
                    if i % 3 == 2:
                        with lock:
                            del sure[name]
                        (branch / "forks" / name).rmdir()
                        with lock:
                            del maybe[name]
                except OSError:
                    return

        workers = [threading.Thread(target=work, args=(w,), daemon=True) for w in range(4)]
        for w in workers:
            w.start()
        workers[0].join(chance.uniform(0.02, 0.4))  # the moment itself, not an event that is waited for
        r.mount.kill()
        for w in workers:
            w.join(30)
        branch = again(r, f"mnt{number}.2", kill=True) / "b1"
        there = {f.name: f for f in (branch / "forks").iterdir() if f.name != "probe"}
        assert set(sure) <= set(there) <= set(maybe), (set(sure) - set(there), set(there) - set(maybe))
        for name, f in there.items():
            text = (f / "mailboxes/config").read_text()
            assert text in maybe[name] and text == sure.get(name, text), (name, text)
            assert status(f)["state"] == "ready", status(f)
        for name in list(there)[:3]:
            memory = (there[name] / "memory.bin").read_bytes()
            assert memory[:at] == base[:at] and memory[at + PAGE:] == base[at + PAGE:]
            text = (there[name] / "mailboxes/config").read_bytes()
            assert memory[at + 264:at + 264 + len(text)] == text
        for f in there.values():
            f.rmdir()
        assert files(case) == ["probe.json"], files(case)
    r.guest.check_runs()


def test_damaged(case):
    """Garbage, cut off, another's, too large, no file: named by a sentence, removable; the branch and its other forks are as they were."""
    r = guest(case)
    branch, other = settled(r), settled(r, "b2")
    fork(branch, "good", '{"good":1}')
    fork(other, "foreign", '{"foreign":1}')
    good, memory = described(branch / "forks/good"), digest(branch / "memory.bin")
    r.mount.stop()
    place = case.dir / "store/sbx1/b1/forks"
    text = (place / "good.json").read_bytes()
    bad = {"garbage": b"\x00\xff" * 100, "empty": b"", "cut": text[:-200], "text": b"{}", "large": text + b" " * (1 << 20),
           "renamed": text, "foreign": (case.dir / "store/sbx1/b2/forks/foreign.json").read_bytes(),
           "newer": text.replace(b'"format":1', b'"format":2'), "flipped": text.replace(b'"good\\":1', b'"good\\":2')}
    for name, data in bad.items():
        assert name in ("renamed", "foreign") or data != text
        (place / f"{name}.json").write_bytes(data)
    os.mkfifo(place / "fifo.json")
    os.symlink(place / "good.json", place / "link.json")
    (place / ".crashed.new").write_bytes(text[:100])
    (place / "notes.txt").write_text("somebody's own")
    r.mount = case.mount("mnt2", options=f"store={case.dir}/store,reattach=off")
    branch = r.mount.path / "sbx1/branches/b1"
    names = {*bad, "fifo", "link"}
    assert set(os.listdir(branch / "forks")) == {"good", *names}
    for name in names:
        f = branch / "forks" / name
        said = status(f)
        assert said["state"] == "failed" and f"forks/{name}.json" in said["error"], said
        for what in ("memory.bin", "vmstate", "manifest.json", "record.json", "mailboxes/config"):
            refused(errno.EIO, (f / what).read_bytes)
        assert f"forks/{name}.json" in r.mount.error_of(f), name
    assert described(branch / "forks/good") == good and digest(branch / "memory.bin") == memory
    assert not (place / ".crashed.new").exists() and (place / "notes.txt").exists()
    verified = case.run(r.mount.binary, "verify", str(place.parent), check=False)
    assert verified.code == 1 and "forks/" in verified.err, verified.err
    assert r.mount.run("verify", "sbx1/b2").code == 0
    exported = r.mount.run("export", "sbx1/b1", str(case.dir / "out"), check=False)
    assert exported.code == 1 and "forks/" in exported.err and not (case.dir / "out").exists(), exported.err
    inspected = {f["name"]: f for f in json.loads(case.run(r.mount.binary, "inspect", str(place.parent)).out)["forks"]}
    assert set(inspected) == {"good", *names} and inspected["good"]["mailboxes"][0]["payload_bytes"] == 10
    assert all("error" in inspected[n] for n in names)
    for name in names:
        (branch / "forks" / name).rmdir()
    assert sorted(os.listdir(place)) == ["good.json", "notes.txt"]
    assert case.run(r.mount.binary, "verify", str(place.parent)).code == 0
    branch.rmdir()
    assert not place.exists()


def test_moved(case):
    """Export and import carry forks: from the store, from a branch in memory, from a copied directory; a damaged stream publishes nothing."""
    r = guest(case)
    stored, memory = settled(r), settled(r, "m1", "memory")
    for branch in (stored, memory):
        fork(branch, "c1", '{"task":1}')
        fork(branch, "empty")
    assert status(memory / "forks/c1")["stored"] is False
    case.run("cp", "-r", str(case.dir / "store/sbx1/b1"), str(case.dir / "copy"))
    mounts = case.mount("other", options=f"store={case.dir}/store2")
    for name, source, path in (("b1", "sbx1/b1", stored), ("m1", "sbx1/m1", memory), ("copy", case.dir / "copy", stored)):
        r.mount.run("export", source, str(case.dir / f"{name}.stream"))
        mounts.run("import", str(case.dir / f"{name}.stream"), f"sbx9/{name}")
        there = mounts.path / "sbx9/branches" / name / "forks"
        assert sorted(os.listdir(there)) == ["c1", "empty"]
        for f in there.iterdir():
            assert described(f) == described(path / "forks" / f.name)
        mounts.run("verify", f"sbx9/{name}")
    r.mount.run("verify", "sbx1/b1")
    data = (case.dir / "b1.stream").read_bytes()
    at = data.index(b'"fork_xxh3_128"')
    (case.dir / "bad.stream").write_bytes(data[:at - 40] + bytes([data[at - 40] ^ 1]) + data[at - 39:])
    said = mounts.run("import", str(case.dir / "bad.stream"), "sbx9/bad", check=False)
    assert said.code == 1 and "damaged" in said.err and not (mounts.path / "sbx9/branches/bad").exists(), said.err
    mounts.stop()
    mounts = case.mount("other", options=f"store={case.dir}/store2")
    assert described(mounts.path / "sbx9/branches/m1/forks/c1")["payload"] == b'{"task":1}'
    assert processes.alive(r.guest.pid)
