"""A branch of the store is given the other form in place: it stays the same branch, and there is always exactly one of it."""

import hashlib
import json
import mmap
import os
import pathlib
import signal
import time

from forkfs_test import processes, rig

MIB = 1 << 20


def digest(path):
    """The hash of a file, read in pieces."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(MIB):
            h.update(piece)
    return h.hexdigest()


def told(branch):
    """A branch's status."""
    return json.loads((branch / "status").read_text())


def wait_for(path):
    """Wait until a file is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.005)


def stored_rig(case, *kinds, **guest):
    """A rig with a store and a branch of each kind, named by it; their directories in the tree and in the store."""
    r = rig.Rig(case, options=f"store={case.dir}/store", mib=96, **guest)
    for kind in kinds:
        r.mount.run("branch", r.guest.name, kind, "--store", kind)
    return r, r.sandbox / "branches", case.dir / "store" / r.guest.name


def only_form(directory):
    """The form of a branch's directory, which has one and all of it."""
    names = {p.name for p in directory.iterdir()}
    assert {"manifest.json", "vmstate"} <= names and ("memory.bin" in names) != ("memory.idx" in names), names
    return "dense" if "memory.bin" in names else "packed"


def taken(directory):
    """What the files below take, each once."""
    return sum({s.st_ino: s.st_blocks * 512 for s in (f.stat() for f in directory.rglob("*"))}.values())


def test_in_place(case):
    """Both ways, while they are read: the same id, parent and bytes; who has the old form open reads on; a child starts from it."""
    r, branches, place = stored_rig(case, "dense", "packed", run=["counter", "selfcheck,mib=32,threads=1,step=1,every=16"])
    dense, packed = branches / "dense", branches / "packed"
    before = {b.name: (digest(b / "memory.bin"), json.loads((b / "manifest.json").read_text())) for b in (dense, packed)}
    old = [open(b / "memory.bin", "rb") for b in (dense, packed)]
    old_state = [open(b / "vmstate", "rb") for b in (dense, packed)]
    maps = [mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) for f in old]
    heads = [m[:MIB] for m in maps]
    r.mount.run("convert", "sbx1/dense", "--to", "packed")
    r.mount.run("convert", "sbx1/packed", "--to", "dense")
    r.mount.run("convert", "sbx1/packed", "--to", "dense")  # is what it is to be
    for branch, kind in ((dense, "packed"), (packed, "dense")):
        memory, manifest = before[branch.name]
        assert told(branch)["store"] == kind == only_form(place / branch.name)
        now = json.loads((branch / "manifest.json").read_text())
        assert (now["id"], now["instant"], now["parent"], now["vmm"]) == tuple(manifest[k] for k in ("id", "instant", "parent", "vmm"))
        assert now["memory"] == manifest["memory"] and (branch / "manifest.json").stat().st_size == len((branch / "manifest.json").read_bytes())
        assert digest(branch / "memory.bin") == memory and digest(branch / "vmstate") == hashlib.sha256((branch / "vmstate").read_bytes()).hexdigest()
        assert ": ok" in r.mount.run("verify", f"sbx1/{branch.name}").out and ": ok" in r.mount.run("verify", place / branch.name).out
    for f, state, m, head, branch in zip(old, old_state, maps, heads, (dense, packed)):
        assert m[:MIB] == head and hashlib.sha256(m).hexdigest() == before[branch.name][0]
        h = hashlib.sha256()
        while piece := f.read(MIB):
            h.update(piece)
        assert h.hexdigest() == before[branch.name][0] and state.read() == (branch / "vmstate").read_bytes()
        m.close()
        f.close()
        state.close()
    # a plain dense file without holes, and no trace of the old forms
    assert os.stat(place / "packed" / "memory.bin").st_blocks * 512 >= 96 * MIB
    assert sorted(p.name for p in place.iterdir()) == ["dense", "packed"]
    assert told(branches / "dense")["disk_bytes"] < 96 * MIB
    child = r.guest.child("child", packed / "memory.bin", packed / "vmstate")
    child.go()
    child.console.wait(r"^ok", timeout=60, start=child.console.mark())
    child.check_sane()
    child.stop()
    r.mount.stop()
    # without a daemon, by its directory; the next daemon finds it
    case.run(case.forkfs(), "convert", place / "dense", "--to", "dense")
    assert only_form(place / "dense") == "dense"
    again = case.mount("again", options=f"store={case.dir}/store")
    assert digest(again / "sbx1" / "branches" / "dense" / "memory.bin") == before["dense"][0]
    served = case.run(case.forkfs(), "convert", place / "dense", "--to", "packed", check=False)
    assert served.code == 1 and "sbx1/dense" in served.err, served.err


def test_refused(case):
    """What cannot be converted is said, and by what name to try."""
    r, branches, place = stored_rig(case, "dense", "memory")
    run = r.mount.run
    for words, code, sentence in ((("sbx1/memory", "--to", "packed"), 1, "in memory only"), (("sbx1/none", "--to", "packed"), 1, "none"),
                                  (("sbx1/dense", "--to", "tape"), 2, "dense or packed"), (("sbx1/dense",), 2, "--to"),
                                  ((branches / "dense", "--to", "packed"), 1, "NAME/BRANCH"), (("sbx1", "--to", "dense"), 2, "BRANCH")):
        said = run("convert", *words, check=False)
        assert said.code == code and sentence in said.err, f"{words}: {said.code} {said.err}"
    # damage is not carried over
    with open(place / "dense" / "memory.bin", "r+b") as f:
        f.seek(50 * MIB)
        byte = f.read(1)
        f.seek(50 * MIB)
        f.write(bytes([byte[0] ^ 1]))
    bad = run("convert", "sbx1/dense", "--to", "packed", check=False)
    assert bad.code == 1 and f"offset {50 * MIB}" in bad.err, bad.err
    assert only_form(place / "dense") == "dense" and told(branches / "dense")["store"] == "dense"
    assert sorted(p.name for p in place.iterdir()) == ["dense"]


def test_meanwhile(case):
    """Renamed, removed, given up while it is converted: the old form is all there is; nothing else is left."""
    r, branches, place = stored_rig(case, "dense", "packed")
    memory = digest(branches / "dense" / "memory.bin")
    hold = case.dir / "hold"

    def held(number):
        """A conversion that is complete but for the step after which it exists."""
        mark = pathlib.Path(f"{hold}{number}")
        r.mount.faults(f"store-publish hold:{mark}")
        converting = case.start(r.mount.binary, "convert", "sbx1/dense", "--to", "packed", "--mount", r.mount.path)
        wait_for(pathlib.Path(f"{mark}.held"))
        return converting, mark

    converting, mark = held(1)
    assert told(branches / "dense")["converting_to"] == "packed" and told(branches / "dense")["converted_bytes"] >= 96 * MIB
    second = r.mount.run("convert", "sbx1/dense", "--to", "packed", check=False)
    assert second.code == 1 and "just being converted" in second.err, second.err
    os.rename(branches / "dense", branches / "other")
    os.rename(branches / "packed", branches / "dense")  # not to be replaced by it
    mark.touch()
    assert converting.wait(30) == 1
    r.mount.faults()
    assert only_form(place / "other") == "dense" and only_form(place / "dense") == "packed"
    assert digest(branches / "other" / "memory.bin") == memory
    os.rename(branches / "dense", branches / "packed")
    os.rename(branches / "other", branches / "dense")

    converting, mark = held(2)
    converting.send_signal(signal.SIGINT)
    assert converting.wait(30) == -signal.SIGINT
    mark.touch()
    r.mount.faults()
    deadline = time.monotonic() + 30
    while sorted(p.name for p in place.iterdir()) != ["dense", "packed"] or "converting_to" in told(branches / "dense"):
        assert time.monotonic() < deadline, sorted(p.name for p in place.iterdir())
        time.sleep(0.01)
    # whether it came in time or not: it is whole, and of one form
    assert only_form(place / "dense") == told(branches / "dense")["store"] and digest(branches / "dense" / "memory.bin") == memory


def test_killed(case):
    """kill -9 at each step: the next daemon finds the branch, whole, in one of its forms."""
    r, branches, place = stored_rig(case, "dense")
    memory, mount = digest(branches / "dense" / "memory.bin"), r.mount
    identity = told(branches / "dense")["id"]
    kinds = ["dense", "packed"]
    for number, point in enumerate(("store-sync", "store-manifest", "store-publish", "store-renamed")):
        mount.faults(f"{point} kill")
        was = only_form(place / "dense")
        to = kinds[was == "dense"]
        done = mount.run("convert", "sbx1/dense", "--to", to, check=False)
        assert done.code == 1, f"{point}: {done.code} {done.err}"
        assert processes.wait_gone(mount.pid, 30), f"the daemon has passed {point}"
        mount.clear_dead()
        mount = case.mount(f"after{number}", options=f"store={case.dir}/store")
        branch = mount / "sbx1" / "branches" / "dense"
        assert sorted(p.name for p in place.iterdir()) == ["dense"], point
        assert only_form(place / "dense") == (to if point == "store-renamed" else was) == told(branch)["store"], point
        assert told(branch)["id"] == identity and digest(branch / "memory.bin") == memory, point
    r.guest.check_runs()


def test_no_room(case):
    """A store without room for the new form keeps the old one, and says how much is missing."""
    place = case.dir / "store"
    place.mkdir()
    case.run("mount", "-t", "tmpfs", "-o", "size=250m", "none", place)
    case.on_end(lambda: processes.unmount_all(str(place)))
    r, branches, place = stored_rig(case, "packed")
    memory = digest(branches / "packed" / "memory.bin")
    case.run("mount", "-o", f"remount,size={taken(place.parent) // 1024 + 40000}k", place.parent)
    refused = r.mount.run("convert", "sbx1/packed", "--to", "dense", check=False)
    assert refused.code == 1 and "MiB are free" in refused.err, refused.err
    # the room goes while it is written (each step of it: unit store-errors)
    case.run("mount", "-o", "remount,size=250m", place.parent)
    r.mount.faults("store-manifest error:ENOSPC")
    failed = r.mount.run("convert", "sbx1/packed", "--to", "dense", check=False)
    assert failed.code == 1 and "No space left" in failed.err and "forkfs rm" in failed.err, failed.err
    r.mount.faults()
    assert only_form(place / "packed") == "packed" and digest(branches / "packed" / "memory.bin") == memory
    assert sorted(p.name for p in place.iterdir()) == ["packed"]
    r.mount.stop()
    case.run("umount", place.parent)
