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
    truths, ids = {}, {}
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
            assert manifest["parent"] == told(parent)["id"], (name, manifest["parent"])
            assert not in_memory or image_bytes(r.mount) > kept, f"{name}: an image that is open does not count"
        kept_truth = case.dir / f"truth-{name}"
        os.rename(r.truth, kept_truth)
        truths[name], ids[name] = kept_truth, said["id"]
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
