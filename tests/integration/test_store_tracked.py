"""Branches that share pages with a parent in memory, written to the store: whole there, and their memory is given back."""

import json
import os
import re
import time

from forkfs_test import rig, truth

MIB = 1 << 20


def told(branch):
    """A branch's status."""
    return json.loads((branch / "status").read_text())


def image_bytes(mount):
    """What complete images take, as .forkfs/metrics says."""
    return int(re.search(r"^forkfs_image_bytes (\d+)$", (mount / ".forkfs" / "metrics").read_text(), re.M).group(1))


def wait_image_bytes(mount, wanted):
    """Images are freed outside of any request."""
    deadline = time.monotonic() + 60
    while not wanted(image_bytes(mount)):
        assert time.monotonic() < deadline, f"images still take {image_bytes(mount)} bytes"
        time.sleep(0.01)


def test_whole_in_the_store(case):
    """Children of a branch in memory, live and diff, dense and packed: equal to the stopped guest in flight, when stored, after a restart and
    without their parent; the memory of what is stored is given back with its last opener."""
    r = rig.Rig(case, mib=128, run=["counter", "load,mib=24,seq=1,random=1"], attach=["--track"], options=f"store={case.dir}/store")
    parent = r.branch_with_truth("parent", mode="live", store="memory")
    assert rig.wait_settled(parent) == "ready" and told(parent)["store"] == "memory"
    kept = image_bytes(r.mount)
    assert kept > 24 * MIB
    truths, ids, last = {}, {}, told(parent)["id"]
    for name, how in (("live-dense", {"mode": "live", "store": "dense"}), ("diff-packed", {"mode": "diff", "store": "packed"}),
                      ("live-packed", {"mode": "live", "store": "packed"}), ("diff-dense", {"mode": "diff", "store": "dense"})):
        branch = r.branch_with_truth(name, **how)
        opened = open(branch / "memory.bin", "rb")  # the image, as long as it is open
        in_memory = rig.state(branch) == "writing"  # unless it is in the store already
        assert r.difference(branch) == "", f"{name}, in flight"
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        assert r.difference(branch) == "", f"{name}, stored"
        manifest = json.loads((branch / "manifest.json").read_text())
        said = told(branch)
        assert said["store"] == manifest["store"]["kind"] == how["store"], said
        if not rig.revoked(r):
            assert manifest["parent"] == last, (name, manifest["parent"])
            assert not in_memory or image_bytes(r.mount) > kept, f"{name}: an image that is open does not count"
        kept_truth = case.dir / f"truth-{name}"
        os.rename(r.truth, kept_truth)
        truths[name], ids[name] = kept_truth, said["id"]
        last = said["id"]
        assert truth.difference(case, kept_truth, opened.name, ()) == ""
        opened.close()
        wait_image_bytes(r.mount, lambda n: n <= kept)
        assert ": ok" in r.mount.run("verify", f"sbx1/{name}").out
    parent.rmdir()
    wait_image_bytes(r.mount, lambda n: n == 0)
    r.guest.check_sane()
    r.mount.stop()
    again = case.mount("again", options=f"store={case.dir}/store")
    for name, path in truths.items():
        branch = again / "sbx1" / "branches" / name
        assert told(branch)["id"] == ids[name] and truth.difference(case, path, branch / "memory.bin", ()) == "", name


def damage(path):
    """Change one byte in each 2 MiB of a file."""
    with open(path, "r+b") as f:
        for at in range(4096, os.stat(path).st_size, 2 << 20):
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1]))


def test_parent_in_the_store(case):
    """A branch that is in the store, and in no memory, is the parent of the next: dense, packed, converted, removed; one that is damaged
    hands nothing on."""
    r = rig.Rig(case, mib=128, run=["counter", "load,mib=8,seq=1,random=1"], attach=["--track"], options=f"store={case.dir}/store")
    last, kinds = None, ("dense", "packed", "dense", "packed")
    for i, kind in enumerate(kinds):
        if last:
            wait_image_bytes(r.mount, lambda n: n == 0)
        branch = r.branch_with_truth(f"b{i}", mode="diff" if i % 2 else "live", store=kind)
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        assert r.difference(branch) == "", f"{kind}, child of {last}"
        said = told(branch)
        if not rig.revoked(r):
            assert said.get("parent") == last
        assert ": ok" in r.mount.run("verify", f"sbx1/b{i}").out
        last = said["id"]

    # in memory, over a parent that is converted, and then removed
    child = r.branch_with_truth("child", mode="live", store="memory")
    shared = told(child)["shared_bytes"]
    assert rig.revoked(r) or shared > 64 * MIB, told(child)
    assert r.difference(child) == ""
    r.mount.run("convert", "sbx1/b3", "--to", "dense")
    assert r.difference(child) == "", "its parent was converted"
    (r.sandbox / "branches/b3").rmdir()
    assert not list((case.dir / "store/sbx1").glob("b3*"))
    assert rig.wait_settled(child) == "ready"
    assert r.difference(child) == "", "its parent was removed"
    child.rmdir()
    r.guest.check_sane()


def test_damaged_parent(case):
    """What is damaged in the store is never part of another branch: a child of it fails, and the next one copies everything."""
    r = rig.Rig(case, mib=128, run=["counter"], attach=["--track"], options=f"store={case.dir}/store")
    rig.request(r.sandbox / "ctl", branch={"name": "parent", "store": "dense"})
    branches = r.sandbox / "branches"
    assert rig.wait_settled(branches / "parent") == "ready"
    wait_image_bytes(r.mount, lambda n: n == 0)
    damage(case.dir / "store/sbx1/parent/memory.bin")
    rig.request(r.sandbox / "ctl", branch={"name": "child", "store": "packed"})
    child = branches / "child"
    if not rig.revoked(r):
        assert rig.wait_settled(child) == "failed", (child / "status").read_text()
        assert "damaged" in r.mount.log()
    child.rmdir()
    branch = r.branch_with_truth("next", mode="live", store="packed")
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    assert r.difference(branch) == "" and told(branch)["parent"] is None
    r.guest.check_sane()
