"""The README's recipes for Firecracker's children, run as they are written."""

import os
import pathlib
import re
import time

from forkfs_test import processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.firecracker import Firecracker, program

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"
WORK = 16


def recipe(name):
    """The commands below `<!-- recipe: NAME -->`."""
    found = re.search(rf"<!-- recipe: {name} -->\n\n((?:    .*\n)+)", README.read_text())
    assert found, f"README.md has no recipe {name}"
    return re.sub(r"^    ", "", found.group(1), flags=re.M)


def check_recipe(case, name):
    """Run it with this test's mount and sockets in place of /forkfs and /run; the child goes on from the branch."""
    r = ApiRig(case, Firecracker(case, "fc1", mib=64, work=WORK))
    r.guest.visit_all(1)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    steps = r.guest.steps()
    script = recipe(name).replace("/forkfs/", f"{r.mount.path}/").replace("/run/", f"{case.dir}/")
    out = case.dir / "console"
    environment = dict(os.environ, FORKFS=str(r.mount.path), PATH=f"{case.dir}/bin:{os.environ['PATH']}")
    (case.dir / "bin").mkdir()
    for command, path in (("forkfs", case.forkfs()), ("firecracker", program())):
        (case.dir / "bin" / command).symlink_to(pathlib.Path(path).resolve())
    with open(out, "wb") as console:
        shell = case.start("bash", "-c", script, stdout=console, stderr=console, env=environment, cwd=case.dir,
                           start_new_session=True)
    case.on_end(lambda: processes.kill([p for p in processes.marked(case.id) if os.getsid(p) == shell.pid]))
    assert shell.wait(60) == 0, out.read_text()
    deadline, seen = time.monotonic() + 60, []
    while len(seen) < 2 or int(seen[-1], 16) < int(seen[0], 16) + 2 * WORK * 256:
        assert time.monotonic() < deadline, out.read_text()[-500:]
        time.sleep(0.01)
        seen = re.findall(r"ok 0 ([0-9a-f]{16})\n", out.read_text())
    assert "MISMATCH" not in out.read_text()
    assert int(seen[0], 16) <= steps + (1 << 20), (seen[0], steps)


def test_file(case):
    """The File back end."""
    check_recipe(case, "firecracker-file")


def test_uffd(case):
    """The Uffd back end and the pager."""
    check_recipe(case, "firecracker-uffd")
