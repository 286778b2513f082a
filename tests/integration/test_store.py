"""Branches in a store: durable, served from it, found again by the next daemon, whole or not there."""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import threading
import time

from forkfs_test import processes, rig

TIMEOUT = {"test_generations": 300, "test_killed_while_written": 300}
LONG_TIMEOUT = {"test_killed_at_random": 3600}
MIB = 1 << 20


def store_rig(case, options="", **guest):
    """A rig whose mount has the store case.dir/store."""
    return rig.Rig(case, options=f"store={case.dir}/store" + options, **guest)


def take(mount, name, branch, store):
    """Take a branch into a kind of store and wait until it is there; its directory."""
    mount.run("branch", name, branch, "--store", store)
    return mount / name / "branches" / branch


def digest(data):
    """A hash of bytes or of a file."""
    if isinstance(data, (str, os.PathLike)):
        with open(data, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else digest_of(f)
    return hashlib.sha256(data).hexdigest()


def digest_of(f):
    """The hash of an open file, in pieces."""
    h = hashlib.sha256()
    while piece := f.read(MIB):
        h.update(piece)
    return h.hexdigest()


def by_mmap(path):
    """The hash of a file through a mapping."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        return hashlib.sha256(m).hexdigest()


def by_sendfile(path):
    """The hash of a file as sendfile(2) sends it."""
    left, right = socket.socketpair()
    h = hashlib.sha256()

    def drain():
        while piece := right.recv(MIB):
            h.update(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(path, "rb") as f:
        size, done = os.fstat(f.fileno()).st_size, 0
        while done < size:
            done += os.sendfile(left.fileno(), f.fileno(), done, size - done)
    left.close()
    reader.join()
    right.close()
    return h.hexdigest()


def remount(case, mount, number):
    """End a daemon and start another on the same store."""
    mount.stop()
    return case.mount(f"again{number}", options=f"store={case.dir}/store")


def status(branch):
    """A branch's status."""
    return json.loads((branch / "status").read_text())


def left_over(case):
    """What lies in the store and is no branch."""
    names = [p.name for p in (case.dir / "store").glob("*/*")]
    return [n for n in names if n.endswith((".partial", ".removing", ".failed")) or n.startswith(".")]


def check_clean(case, seconds=30):
    """Nothing but branches is left, as soon as what was removed has been deleted."""
    deadline = time.monotonic() + seconds
    while left := left_over(case):
        assert time.monotonic() < deadline, f"left in the store: {left}"
        time.sleep(0.01)
    return True


def test_life(case):
    """Three kinds of branches of one guest; what they are in the store; what a second daemon finds; how they end."""
    r = store_rig(case, mib=160, run=["counter", "selfcheck,mib=32,threads=1,step=1,every=16"])
    dense, packed, memory = (take(r.mount, r.guest.name, k[0], k) for k in ("dense", "packed", "memory"))
    assert [status(b)["store"] for b in (dense, packed, memory)] == ["dense", "packed", "memory"]
    plain = r.branch("plain")  # mkdir goes to the store as well
    assert rig.wait_settled(plain) == "ready" and status(plain)["store"] == "dense"
    place = case.dir / "store" / r.guest.name
    assert sorted(p.name for p in place.iterdir()) == ["d", "p", "plain"] and check_clean(case)
    assert (place.stat().st_mode & 0o777, (place / "d" / "memory.bin").stat().st_mode & 0o777) == (0o700, 0o600)
    # a dense file without holes, the same through the mount; a child of it needs no forkfs
    hashes = {b.name: digest(b / "memory.bin") for b in (dense, packed, memory)}
    assert digest(place / "d" / "memory.bin") == hashes["d"]
    assert os.stat(place / "d" / "memory.bin").st_blocks * 512 >= 160 * MIB
    for b in (dense, packed):
        assert by_mmap(b / "memory.bin") == by_sendfile(b / "memory.bin") == hashes[b.name]
    assert sum(f.stat().st_size for f in (place / "p").iterdir()) < 160 * MIB / 2
    manifest = (dense / "manifest.json").read_text()
    assert manifest == (place / "d" / "manifest.json").read_text()
    assert {f["name"] for f in json.loads(manifest)["files"]} == {"memory.bin", "vmstate"}
    r.guest.check_sane()

    mount = remount(case, r.mount, 1)
    branches = mount / r.guest.name / "branches"
    assert sorted(os.listdir(branches)) == ["d", "p", "plain"]
    assert (mount / r.guest.name / "state").read_text() == "detached\n"
    for name in ("d", "p"):
        assert digest(branches / name / "memory.bin") == hashes[name], name
        assert rig.state(branches / name) == "ready" and (branches / name / "wait").read_text() == "ready\n"
        os.sync()
        fd = os.open(branches / name / "memory.bin", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    assert (branches / "d" / "manifest.json").read_text() == manifest
    assert status(branches / "p")["pause_ns"] > 0
    child = r.guest.child("child", branches / "p" / "memory.bin", branches / "p" / "vmstate")
    child.go()
    child.console.wait(r"^ok", timeout=60, start=child.console.mark())
    child.check_sane()
    child.stop()
    foreign = r.guest.child("foreign", place / "d" / "memory.bin", place / "d" / "vmstate")
    foreign.go()
    foreign.console.wait(r"^ok", timeout=60, start=foreign.console.mark())
    foreign.check_sane()
    foreign.stop()

    # names are those of the store; what is open can be read to its end
    os.rename(branches / "p", branches / "q")
    with open(branches / "q" / "memory.bin", "rb") as f:
        os.rmdir(branches / "q")
        assert digest_of(f) == hashes["p"]
    assert sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.endswith(".removing")) == ["d", "plain"]
    mount = remount(case, mount, 2)
    branches = mount / r.guest.name / "branches"
    assert sorted(os.listdir(branches)) == ["d", "plain"]
    # a VM of that name moves in
    mount.attach(r.guest)
    take(mount, r.guest.name, "p", "packed")
    for name in ("d", "plain", "p"):
        os.rmdir(branches / name)
    mount.stop()
    assert os.listdir(case.dir / "store") == [".lock"]


def test_no_store(case):
    """Without a store nothing is promised that is not kept; a store serves one daemon."""
    r = rig.Rig(case, mib=96)
    said = r.mount.run("branch", r.guest.name, "b", "--store", "packed", check=False)
    assert said.code == 1 and "store=DIR" in said.err, said.err
    (case.dir / "m").mkdir()
    refused = case.run(case.forkfs(), "mount", case.dir / "m", "-f", "-o", "default-store=packed", check=False)
    assert refused.code == 1 and "store=DIR" in refused.err, refused.err
    case.mount("one", options=f"store={case.dir}/store")
    (case.dir / "two").mkdir()
    second = case.run(case.forkfs(), "mount", case.dir / "two", "-f", "-o", f"store={case.dir}/store", check=False)
    assert second.code == 1 and "another forkfs daemon" in second.err, second.err
    inside = case.run(case.forkfs(), "mount", case.dir / "two", "-f", "-o", f"store={case.dir}/two/store", check=False)
    assert inside.code == 1 and "below the mount" in inside.err, inside.err


def test_names_while_written(case):
    """A branch that is being written is renamed and removed at once; what it was is not in the store afterwards."""
    r = store_rig(case, mib=96)
    hold = case.dir / "hold"
    r.mount.faults(f"store-manifest hold:{hold}")
    branch = r.branch("b1")
    assert rig.state(branch) == "writing"
    renamed = branch.parent / "b2"
    os.rename(branch, renamed)
    second = r.branch("b1")  # the name is free
    os.rmdir(second)
    hold.touch()
    assert rig.wait_settled(renamed) == "ready"
    r.mount.faults(f"store-memory hold:{hold}2")
    third = r.branch("b3")
    os.rmdir(third)
    (case.dir / "hold2").touch()
    r.mount.faults()
    assert sorted(os.listdir(branch.parent)) == ["b2"]
    os.mkdir(branch.parent / "b3")
    assert rig.wait_settled(third) == "ready"
    mount = remount(case, r.mount, 1)
    assert sorted(os.listdir(mount / r.guest.name / "branches")) == ["b2", "b3"] and check_clean(case)


def test_lock_held_in_passing(case):
    """The lock of a daemon that has ended goes with the last who holds its descriptor: the next one waits for that, not for good."""
    store, refused = case.dir / "store", case.dir / "refused"
    store.mkdir(mode=0o700)
    refused.mkdir()
    fd = os.open(store / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    done = case.run(case.forkfs(), "mount", refused, "-o", f"store={store}", check=False)
    assert done.code == 1 and "another forkfs daemon" in done.err, done.err
    timer = threading.Timer(0.3, os.close, [fd])
    timer.start()
    mount = case.mount(options=f"store={store}")
    timer.join()
    mount.stop()


def test_full_store(case):
    """A store without room fails the branch alone: the guest runs, older branches stay, the sentence says what to do."""
    place = case.dir / "store"
    place.mkdir()
    case.run("mount", "-t", "tmpfs", "-o", "size=150m", "none", place)
    case.on_end(lambda: processes.unmount_all(str(place)))
    r = store_rig(case, mib=96)
    first = r.branch("b1")
    assert rig.wait_settled(first) == "ready"
    before = digest(first / "memory.bin")
    # what would not fit is refused before the pause
    stops = r.guest.stops()
    second = first.with_name("b2")
    try:
        second.mkdir()
        raise AssertionError("a branch of 96 MiB was begun in a store with less room")
    except OSError as e:
        assert e.errno == errno.ENOSPC, e
    sentence = r.mount.error_of(second.parent)
    assert "96 MiB of the store" in sentence and "MiB are free" in sentence and r.guest.stops() == stops, sentence
    # what does not fit any more, since the room went while it was captured, fails alone
    case.run("mount", "-o", "remount,size=300m", place)
    hold = case.dir / "hold"
    r.mount.faults(f"store-memory@1 hold:{hold}")
    second = r.branch("b2")
    while not (case.dir / "hold.held").exists():
        time.sleep(0.01)
    case.run("mount", "-o", f"remount,size={sum(f.stat().st_blocks * 512 for f in place.rglob('*')) // 1024 + 20000}k", place)
    hold.touch()
    assert rig.wait_settled(second) == "failed"
    case.run("mount", "-o", "remount,size=150m", place)
    assert "No space left" in status(second)["error"] and "forkfs rm" in status(second)["error"], status(second)
    try:
        (second / "wait").read_text()
        raise AssertionError("waiting for a branch that failed succeeded")
    except OSError:
        pass
    assert digest(first / "memory.bin") == before
    r.guest.check_runs()
    os.rmdir(second)
    # the room of what was removed comes when the last who has it open closes it, be it a moment later
    late = open(first / "memory.bin", "rb")
    os.rmdir(first)
    threading.Timer(0.1, late.close).start()
    third = r.branch("b3")
    assert rig.wait_settled(third) == "ready"
    mount = remount(case, r.mount, 1)
    assert os.listdir(mount / r.guest.name / "branches") == ["b3"]
    mount.stop()
    case.run("umount", place)


POINTS = ("store-memory", "store-vmstate", "store-sync", "store-manifest", "store-publish", "store-renamed")


def test_killed_while_written(case):
    """kill -9 at each step of writing: afterwards the branch is whole, or failed with the reason; never half."""
    r = store_rig(case, mib=96)
    whole = r.branch("whole")
    assert rig.wait_settled(whole) == "ready"
    expected = digest(whole / "memory.bin")
    mount = r.mount
    for i, point in enumerate(POINTS):
        mount.faults(f"{point} kill")
        os.mkdir(mount / r.guest.name / "branches" / f"b{i}")
        assert processes.wait_gone(mount.pid, 30), f"the daemon has passed {point}"
        mount.clear_dead()
        r.guest.check_runs()
        mount = case.mount(f"after{i}", options=f"store={case.dir}/store,reattach=off")
        branches = mount / r.guest.name / "branches"
        assert digest(branches / "whole" / "memory.bin") == expected
        branch = branches / f"b{i}"
        if point == "store-renamed":
            assert rig.state(branch) == "ready"
            manifest = json.loads((branch / "manifest.json").read_text())
            assert manifest["name"] == f"b{i}" and (branch / "memory.bin").stat().st_size == 96 * MIB
        else:
            assert rig.state(branch) == "failed" and "daemon ended" in status(branch)["error"], point
        os.rmdir(branch)
        check_clean(case)
        mount.attach(r.guest)


def start_and_kill(case, mount, moment):
    """Kill a daemon that has just been started, while it recovers the store."""
    (case.dir / "early").mkdir(exist_ok=True)
    with open(case.dir / "early.log", "ab") as log:
        early = subprocess.Popen([mount.binary, "mount", case.dir / "early", "-f", "-o", f"store={case.dir}/store,reattach=off"], stdout=log, stderr=log)
    time.sleep(moment)  # the moment itself, not an event that is waited for
    early.kill()
    early.wait()
    processes.unmount_all(str(case.dir / "early"))


def test_killed_at_random(case):
    """kill -9 at random moments of branches, conversions, removals and recovery: every branch that is ready is the memory it was."""
    r = store_rig(case, mib=96, run=["counter", "load,mib=16"])
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance, mount, known, kills = random.Random(seed), r.mount, {}, 0
    while kills < (1000 if case.long else 14):
        branches = mount / r.guest.name / "branches"
        chance_kinds = chance.sample(("dense", "packed"), 2)

        def work(rounds=kills, where=branches, kinds=chance_kinds):
            for j in range(20):
                try:
                    os.mkdir(where / f"b{rounds}.{j}")
                    if j % 3 == 2:
                        os.rmdir(where / f"b{rounds}.{j - 1}")
                    if j % 3 == 1 and known:
                        name = random.choice([*known])
                        rig.request(where.parent / "ctl", convert={"name": name, "store": kinds[j % 2]})
                except ValueError:  # half an answer
                    return
                except OSError as e:
                    if e.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT):
                        return

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(chance.uniform(0, 0.6))
        mount.kill(signal.SIGKILL)
        kills += 1
        mount.clear_dead()
        worker.join(30)
        r.guest.check_runs()
        for _ in range(chance.randrange(5)):
            start_and_kill(case, mount, chance.uniform(0, 0.15))
            kills += 1
        mount = case.mount(f"after{kills}", options=f"store={case.dir}/store,reattach=off,default-store={chance_kinds[0]}")
        where = mount / r.guest.name / "branches"
        for name in os.listdir(where) if where.exists() else ():
            if rig.state(where / name) == "failed":
                os.rmdir(where / name)
                continue
            mount.run("verify", f"{r.guest.name}/{name}")
            manifest = json.loads((where / name / "manifest.json").read_text())
            seen = (manifest["id"], manifest["memory"]["xxh3_128"])
            assert known.setdefault(name, seen) == seen, f"{name} has changed"
            if len(known) > 4:
                os.rmdir(where / name)
                del known[name]
        mount.attach(r.guest)
    check_clean(case)
    print(f"{kills} kills")


def test_generations(case):
    """Ten generations of a guest that writes, packed: each is its own truth, also when those between are gone."""
    r = store_rig(case, ",default-store=packed", mib=96, run=["counter", "load,mib=24,seq=1,random=1"])
    truths, sizes = {}, {}
    for i in range(10):
        branch = r.branch_with_truth(f"g{i}")
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        assert r.difference(branch) == ""
        truths[f"g{i}"] = digest(r.truth)
        sizes[f"g{i}"] = status(branch)["disk_bytes"] - status(branch)["disk_shared_bytes"]
    manifest = json.loads((branch / "manifest.json").read_text())
    assert manifest["store"]["shared_with"]["name"] == "g8" and manifest["parent"] == status(branch.with_name("g8"))["id"]
    assert status(branch)["parent"] == manifest["parent"]
    row = r.mount.run("ls", r.guest.name).out.splitlines()[-1].split()
    assert row[0] == "g9" and row.count("MiB") >= 3, row
    assert sizes["g9"] < status(branch)["disk_bytes"] * 0.8, "the generations share little"
    order = [f"g{i}" for i in range(1, 9)]
    random.shuffle(order)
    print(f"order {order}")
    mount = remount(case, r.mount, 1)
    branches = mount / r.guest.name / "branches"
    for name in order:
        os.rmdir(branches / name)
        del truths[name]
    for name, truth in truths.items():
        assert digest(branches / name / "memory.bin") == truth, name


def test_verify_export_import(case):
    """Branches are checked, moved to another store, converted and decoded by the command; what is damaged is named and refused."""
    r = store_rig(case, mib=96, run=["counter", "selfcheck,mib=32,threads=1,step=1,every=16"])
    name, run = r.guest.name, r.mount.run
    packed, memory = take(r.mount, name, "p", "packed"), take(r.mount, name, "m", "memory")
    place, expected = case.dir / "store" / name, digest(packed / "memory.bin")
    assert "ok" in run("verify", f"{name}/p").out
    assert run("verify", case.dir / "store", place / "p").out.count(": ok") == 2
    in_memory = run("verify", f"{name}/m", check=False)
    assert in_memory.code == 1 and "in memory only" in in_memory.err, in_memory.err
    said = json.loads(run("inspect", place / "p").out)
    assert said["kind"] == "packed" and sum(said["index"]["kinds"].values()) == 96 * MIB // 65536, said["index"]["kinds"]
    assert said["index"]["packs"][0]["holders"] == 1

    # through a pipe to a dense branch of a sandbox that has no VM, from a file into a store that nobody serves
    both = f"{case.forkfs()} export {name}/p - --mount {r.mount.path} | {case.forkfs()} import - other/d --store dense --mount {r.mount.path}"
    case.shell("set -o pipefail; " + both)
    dense = r.mount / "other" / "branches" / "d"
    assert digest(dense / "memory.bin") == expected and status(dense)["store"] == "dense"
    assert (r.mount / "other" / "state").read_text() == "detached\n"
    taken = run("import", "/dev/null", "other/d", check=False)
    assert taken.code == 1 and "too early" in taken.err, taken.err
    run("export", f"{name}/m", case.dir / "m.stream")
    assert digest(memory / "memory.bin") != expected
    run("import", case.dir / "m.stream", "x/m", "--store", "packed", "--store-dir", case.dir / "second")
    assert ": ok" in run("verify", case.dir / "second").out
    again = run("import", case.dir / "m.stream", "x/m", "--store-dir", case.dir / "second", check=False)
    assert again.code == 1 and "already" in again.err, again.err
    child = r.guest.child("child", dense / "memory.bin", dense / "vmstate")
    child.go()
    child.console.wait(r"^ok", timeout=60, start=child.console.mark())
    child.check_sane()
    child.stop()

    # Ctrl-C: nothing is left
    fifo = case.dir / "fifo"
    os.mkfifo(fifo)
    importing = case.start(case.forkfs(), "import", fifo, f"{name}/half", "--mount", r.mount.path)
    stream = (case.dir / "m.stream").read_bytes()
    with open(fifo, "wb") as f:
        f.write(stream[:len(stream) // 2])
        f.flush()
        importing.send_signal(signal.SIGINT)
        assert importing.wait(timeout=30) == -signal.SIGINT
    check_clean(case)
    assert not (r.mount / name / "branches" / "half").exists()

    # a damaged pack: verify names it (what reads of it give: test_store_damage)
    os.rmdir(dense)
    with open(place / "p" / "memory.pack.0", "r+b") as f:
        f.seek(f.seek(0, os.SEEK_END) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 4]))
    bad = run("verify", f"{place}/p", check=False)
    assert bad.code == 1 and "memory.pack.0" in bad.err and "offset" in bad.err, bad.err
