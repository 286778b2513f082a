"""Children of children: they are attached, branched, restored and attached again; and children of branches that are not one file."""

import concurrent.futures
import json
import threading

from forkfs_test import children, disks, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

RUN = ["counter", "selfcheck,mib=32,threads=1,step=1,every=16"]
TIMEOUT = {"test_ten_generations": 180, "test_tree": 180}
SMALL = 16
GENERATIONS = 10


def micro_rig(case, mount=None, attach=(), **vm):
    """The microVM, a mount, attached."""
    guest = MicroVm(case, "sbx1", **{"mib": SMALL, "kind": "memfd", "vcpus": 1, **vm})
    if attach:
        guest.attach_options = [*guest.attach_options, *attach]
    return ApiRig(case, guest, mount)


def take(mount, name, branch="b"):
    """A branch of a sandbox, ready."""
    mount.run("branch", name, branch)
    return mount / name / "branches" / branch


def check_image(mount, branch):
    """Every page of a branch is right: a child of it goes on and judges all of its memory."""
    (judge,), _ = children.run_micro(mount, branch)
    judge.visit_all(SMALL)
    judge.stop()


def test_ten_generations(case):
    """Each is a child of the branch of the one before; all go on at once; the last image is right, and so is the first."""
    r = micro_rig(case)
    take(r.mount, "sbx1")
    found, parent = [], "sbx1"
    for i in range(GENERATIONS):
        (child,), _ = children.run_micro(r.mount, f"{parent}/b", "--attach", f"g{i}")
        child.visit_all(SMALL, 1)
        parent = f"g{i}"
        assert json.loads((r.mount / parent / "status").read_text())["pid"] == child.pid
        take(r.mount, parent)
        found.append(child)
    check_image(r.mount, f"g{GENERATIONS - 1}/b")
    check_image(r.mount, "sbx1/b")
    for child in found:
        child.check_sane()


def take_all(r, names):
    """A branch of each at once: none is ready before all have been taken."""
    r.mount.faults("guest-read delay:5")
    start = threading.Barrier(len(names))

    def one(name):
        start.wait(60)
        rig.request(r.mount / name / "ctl", branch={"name": "all"})

    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        for done in [pool.submit(one, name) for name in names]:
            done.result()
    branches = [r.mount / name / "branches/all" for name in names]
    assert {rig.state(b) for b in branches} == {"writing"}, [rig.state(b) for b in branches]
    r.mount.faults()
    for branch in branches:
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()


def test_tree(case):
    """Three generations of four children each, all of them and the source writing, all branched at once; every image is right."""
    r = micro_rig(case, case.mount(options="captures=16"))
    take(r.mount, "sbx1")
    parents, found = ["sbx1"] * 4, []
    for g in range(3):
        for i in range(4):
            found += children.run_micro(r.mount, f"{parents[i]}/b", "--attach", f"g{g}-{i}")[0]
        parents = [f"g{g}-{i}" for i in range(4)]
        for name in parents:
            take(r.mount, name)
    names = ["sbx1"] + [f"g{g}-{i}" for g in range(3) for i in range(4)]
    take_all(r, names)
    for child in found:
        child.check_sane()
        child.stop()  # or they would take the CPUs of those who judge
    for name in names:
        check_image(r.mount, f"{name}/all")
    check_image(r.mount, "sbx1/b")
    r.guest.check_sane()


def test_qemu_child_is_branched(case):
    """A QEMU child is a sandbox like any other, under a name of its own each; so is the child of its branch."""
    r = rig.Rig(case, mib=192, run=RUN)
    take(r.mount, "sbx1")
    found, _ = children.run(r.mount, "sbx1/b", "-n", "2", "--attach", "web")
    assert {c.said["sandbox"] for c in found} == {"web-1", "web-2"}
    found[0].wait_console(r"^ok", count=1)
    take(r.mount, found[0].said["sandbox"])
    (grandchild,), _ = children.run(r.mount, f"{found[0].said['sandbox']}/b", "--attach", "last")
    for child in [*found, grandchild]:
        child.wait_console(r"^ok", count=4)
        child.check_sane()


def test_shared_with_a_parent(case):
    """A branch that shares pages with its parent is no single file: its children get one in memory, outlive the daemon, and can be
    branched."""
    r = micro_rig(case, attach=["--track"])
    take(r.mount, "sbx1", "a")
    take(r.mount, "sbx1", "b")
    assert json.loads((r.mount / "sbx1/branches/b/status").read_text())["shared_bytes"] > 0
    found, _ = children.run_micro(r.mount, "sbx1/b", "-n", "2", "--attach", "c")
    assert all("memfd:forkfs-children" in c.maps() for c in found)
    take(r.mount, "c-1", "again")
    check_image(r.mount, "c-1/again")
    r.mount.kill()
    r.mount.clear_dead()
    for child in found:
        child.visit_all(SMALL)


def test_from_the_store(case):
    """A packed branch, of a sandbox that is gone, found by the next daemon: loaded once for all children; a dense one as it is served."""
    store = f"store={case.dir}/store,default-store=packed"
    r = micro_rig(case, case.mount(options=store))
    take(r.mount, "sbx1", "p")
    r.mount.run("branch", "sbx1", "d", "--store", "dense")
    r.mount.stop()
    r.guest.stop()
    mount = case.mount("later", options=store)
    found, _ = children.run_micro(mount, "sbx1/p", "-n", "2", "--attach", "c")
    take(mount, "c-1", "again")
    check_image(mount, "c-1/again")
    (child,), _ = children.run_micro(mount, "sbx1/d", "--as-served")
    assert "memfd:forkfs-children" not in child.maps()
    for one in [*found, child]:
        one.visit_all(SMALL)


def test_disk(case):
    """A child works on an overlay of the branch's disk, never on the parent's."""
    guest = case.guest(mib=128, run=["journal"], disk="plain", image=disks.image(case, case.dir)).booted()
    mount = case.mount()
    mount.attach(guest, None, "--disk", f"root={guest.disk}")
    take(mount, "sbx1")
    (child,), _ = children.run(mount, "sbx1/b")
    child.wait_console(r"^journal \d+$", count=3)
    child.check_sane()
    assert str(guest.disk) not in [str(p) for p in child.files()]
    assert "/disks/root" in "".join(child.files()), child.files()
    guest.console.wait(r"^journal \d+$", timeout=60, start=guest.console.mark())
    guest.check_sane()


def test_umount(case):
    """A mount that nobody but its own daemon uses (it has the memory of children open) is unmounted; with a child alive it is not."""
    r = micro_rig(case)
    take(r.mount, "sbx1")
    (child,), _ = children.run_micro(r.mount, "sbx1/b", "--attach", "c")
    refused = case.run(r.mount.binary, "umount", r.mount.path, check=False)
    assert refused.code == 1 and f"({child.pid})" in refused.err, refused.err
    child.check_sane()
    assert (r.mount / "c/state").read_text() == "running\n"
    child.stop()
    r.mount.stop()
