"""`forkfs restore`: children go on where the branch was taken, several at once, and share its memory."""

import json
import os
import pathlib
import re
import shutil

from forkfs_test import children, processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.guest import kit
from forkfs_test.microvm import MicroVm

RUN = ["counter", "selfcheck,mib=32,threads=1,step=1,every=16"]


def micro_rig(case, **vm):
    """The microVM, a mount, attached."""
    return ApiRig(case, MicroVm(case, "sbx1", **{"mib": 64, "kind": "memfd", **vm}))


def test_qemu(case):
    """Three children of a QEMU's branch, with no word about them but its name: they go on, and share the branch's pages."""
    r = rig.Rig(case, mib=192, run=RUN)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    found, _ = children.run(r.mount, "sbx1/b1", "-n", "3")
    assert [c.said["child"] for c in found] != [] and {c.said["child"] for c in found} == {1, 2, 3}
    for child in found:
        child.wait_console(r"^(ok|tick)", count=4)
        child.check_sane()
        times = child.said["times"]
        assert times["started_ns"] <= times["loaded_ns"] <= times["running_ns"], times
        assert child.monitor().status() == "running"
    # the pages that none of them has written are there once
    alone = found[0].pss()
    for child in found[1:]:
        child.stop()
    assert found[0].pss() > alone, (found[0].pss(), alone)
    r.guest.check_sane()


def test_microvm(case):
    """Children of the project's own microVM, by what the caller says after --."""
    r = micro_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    found, _ = children.run_micro(r.mount, "sbx1/b1", "-n", "4")
    assert len(found) == 4
    for child in found:
        child.visit_all(64)
    r.guest.visit_all(1)


def test_recipe(case):
    """The recipe of README.md, as written."""
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    recipe = next(block for block in re.findall(r"```sh\n(.*?)```", text, re.S) if "forkfs restore" in block)
    for name in ("vmlinuz", "initrd"):
        (case.dir / name).symlink_to(f"{kit()}/{name}")
    (case.dir / "bin").mkdir()
    (case.dir / "bin/forkfs").symlink_to(case.forkfs())

    def end_all():
        (case.dir / "console").touch()
        for pid in processes.marked(case.id):
            if processes.program(pid).startswith("qemu-system"):
                processes.kill([pid])
        case.run(case.forkfs(), "umount", case.dir / "forkfs", check=False)

    case.on_end(end_all)
    done = case.run("bash", "-euc", recipe, cwd=case.dir, env=dict(os.environ, PATH=f"{case.dir}/bin:{os.environ['PATH']}"), timeout=100)
    said = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert [s["sandbox"] for s in sorted(said, key=lambda s: s["child"])] == ["child-1", "child-2"], done.out
    for one in said:
        child = children.QemuChild(case, one)
        assert child.monitor().status() == "running"
        child.stop()
        shutil.rmtree(child.dir)
    assert rig.state(case.dir / "forkfs/child-1/branches/b1") == "ready"
