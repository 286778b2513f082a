"""Branches of children in a packed store hold only what the children changed, whoever the sandbox is."""

import json

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

SIZE = 32
CHUNK = 65536
GENERATIONS = 10
TIMEOUT = {"test_ten": 180}


def packed_rig(case):
    """A microVM whose memory is full, of which it writes two MiB; a packed store."""
    guest = MicroVm(case, "sbx1", mib=SIZE, kind="memfd", vcpus=1, work=2, fill=1)
    return ApiRig(case, guest, case.mount(options=f"store={case.dir}/store,default-store=packed"))


def take(mount, name):
    """A branch `b` of a sandbox that is in the store; its directory there."""
    mount.run("branch", name, "b")
    mount.run("wait", f"{name}/b")
    return mount.case.dir / "store" / name / "b"


def inspect(case, store):
    """The packed index."""
    return json.loads(case.run(case.forkfs(), "inspect", store, "--chunks").out)["index"]


def own_chunks(case, store, others):
    """How many chunks the branch brought with it: those in packs that no branch of `others` has. Its packs' ids go there."""
    index = inspect(case, store)
    ours = {i for i, pack in enumerate(index["packs"]) if pack["id"] not in others}
    others |= {pack["id"] for pack in index["packs"]}
    return sum(c.get("pack") in ours for c in index["chunk_list"])


def changed(a, b):
    """How many chunks of two images differ."""
    with open(a, "rb") as x, open(b, "rb") as y:
        return sum(x.read(CHUNK) != y.read(CHUNK) for _ in range((SIZE << 20) // CHUNK))


def test_ten(case):
    """Ten generations, each a child of the branch before, attached under a name of its own: each brings what it changed, no more."""
    r = packed_rig(case)
    ids, parent = set(), "sbx1"
    before = take(r.mount, parent)
    whole = own_chunks(case, before, ids)
    r.guest.stop()
    for i in range(GENERATIONS):
        (child,), _ = children.run_micro(r.mount, f"{parent}/b", "--attach", f"g{i}")
        child.visit_all(2, 1)
        store = take(r.mount, f"g{i}")
        child.check_sane()
        child.stop()
        image = [r.mount / name / "branches/b/memory.bin" for name in (parent, f"g{i}")]
        differ, own = changed(*image), own_chunks(case, store, ids)
        assert 0 < differ < whole // 2 and own <= differ, (i, own, differ, whole)
        manifest = json.loads((store / "manifest.json").read_text())
        assert manifest["parent"] == manifest["store"]["shared_with"]["id"] == json.loads((before / "manifest.json").read_text())["id"]
        assert json.loads((r.mount / f"g{i}/status").read_text())["restored_from"] == manifest["parent"]
        before, parent = store, f"g{i}"
    # those between go; the last is whole, and right
    for name in ["sbx1", *(f"g{i}" for i in range(GENERATIONS - 1))]:
        r.mount.run("rm", f"{name}/b")
    r.mount.run("verify", f"{parent}/b")
    (judge,), _ = children.run_micro(r.mount, f"{parent}/b")
    judge.visit_all(SIZE, 1)


def test_never_by_name(case):
    """A VM that is attached as the child of a branch it has nothing to do with shares what is equal, and its branch is its own memory; of a
    branch that is not there it shares nothing; both after a restart of the daemon too."""
    r = packed_rig(case)
    origin = json.loads((take(r.mount, "sbx1") / "manifest.json").read_text())["id"]
    other = MicroVm(case, "other", mib=SIZE, kind="memfd", vcpus=1, work=4)
    for name, claimed in (("lies", origin), ("dreams", "00000000-0000-4000-8000-000000000000")):
        request = {"name": name, "coop": str(other.api_path), "restored_from": claimed}
        rig.request(r.mount / ".forkfs/ctl", attach=request)
        r.mount.kill()
        r.mount.clear_dead()
        r.mount = case.mount(f"{name}-again", options=f"store={case.dir}/store,default-store=packed")
        deadline = rig.time.monotonic() + 30
        while not (r.mount / name / "ctl").exists() or rig.metric(r, "reattaching"):
            assert rig.time.monotonic() < deadline, "it is not attached again"
            rig.time.sleep(0.02)
        store = take(r.mount, name)
        manifest = json.loads((store / "manifest.json").read_text())
        assert manifest["parent"] == claimed
        assert (manifest["store"]["shared_with"] or {}).get("id") == (claimed if claimed == origin else None)
        r.mount.run("verify", f"{name}/b")
        r.mount.run("detach", name)
        (judge,), _ = children.run_micro(r.mount, f"{name}/b")
        judge.visit_all(SIZE, 1)
        judge.stop()
    for wrong in ("x" * 37, 7):
        try:
            rig.request(r.mount / ".forkfs/ctl", attach={"name": "x", "coop": str(other.api_path), "restored_from": wrong})
        except OSError as e:
            assert "restored_from" in str(e), e
        else:
            raise AssertionError(f"{wrong} was taken")
