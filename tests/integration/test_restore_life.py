"""Children of `forkfs restore` in bad days: the daemon dies, the branch is not ready yet, one of them fails, somebody presses Ctrl-C."""

import ctypes
import json
import mmap
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

from forkfs_test import children, paging, processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.case import Skip
from forkfs_test.microvm import MicroVm

RUN = ["counter", "selfcheck,mib=32,threads=1,step=1,every=16"]
TIMEOUT = {"test_daemon_killed": 180, "test_daemon_killed_stored": 180}
SMALL = 16


def micro_rig(case, **vm):
    """The microVM, a mount, attached."""
    return ApiRig(case, MicroVm(case, "sbx1", **{"mib": SMALL, "kind": "memfd", "vcpus": 1, **vm}))


def evict():
    """Throw away what the page cache can do without."""
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def mapped(path):
    """A file, mapped; nothing of it is read."""
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)


def resident(image):
    """How many pages of a file that is mapped are in memory."""
    found = (ctypes.c_ubyte * (len(image) // 4096))()
    start = ctypes.addressof(ctypes.c_char.from_buffer(image))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(image)), found) == 0
    return sum(x & 1 for x in found)


def pause(found):
    """Stop them, so that what is evicted stays so until they are told to go on."""
    for child in found:
        child.status("pause")


def room_of(case):
    """What can evict the memory of all that the test starts; None where the machine has no such thing."""
    try:
        paging.swap_on(case, 1024)
        return paging.Room(case)
    except Skip:
        return None


def evict_all(room, image, fd=None):
    """Until no page of a file is in memory; or what can be had without a room."""
    evict()
    deadline = time.monotonic() + 30
    while room and resident(image):
        assert time.monotonic() < deadline, f"{resident(image)} pages of the branch are in memory still"
        room.reclaim()
        if fd is not None:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def go_on(found):
    """They go on, and find their memory as it was."""
    for child in found:
        child.status("resume")
    for child in found:
        child.visit_all(SMALL)


def test_daemon_killed(case):
    """kill -9 of the daemon with 20 children of a settled branch: all go on, also when the branch's image was evicted to swap."""
    room = room_of(case)
    r = micro_rig(case)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    found, _ = children.run_micro(r.mount, "sbx1/b1", "-n", "20")
    assert len(found) == 20
    image = mapped(r.sandbox / "branches/b1/memory.bin")
    assert resident(image)
    r.guest.stop()
    r.mount.kill()
    r.mount.clear_dead()
    pause(found)
    evict_all(room, image)
    go_on(found)


def test_daemon_killed_stored(case):
    """The same of a branch that is mapped from the store, when its file was evicted from the page cache: read again from the disk."""
    room = room_of(case)
    base = tempfile.mkdtemp(prefix="forkfs-test-", dir="/var/tmp")
    case.on_end(lambda: shutil.rmtree(base))
    guest = MicroVm(case, "sbx1", mib=SMALL, kind="memfd", vcpus=1, work=2, fill=1)
    r = ApiRig(case, guest, case.mount(options=f"store={base}/store"))
    r.mount.run("branch", "sbx1", "b1", "--store", "dense")
    r.mount.run("wait", "sbx1/b1")
    found, _ = children.run_micro(r.mount, "sbx1/b1", "--as-served", "-n", "20")
    assert len(found) == 20 and all("memfd:forkfs-children" not in c.maps() for c in found)
    r.guest.stop()
    r.mount.kill()
    r.mount.clear_dead()
    pause(found)
    file = pathlib.Path(base) / "store/sbx1/b1/memory.bin"
    image = mapped(file)
    assert resident(image)
    with open(file, "rb") as f:
        evict_all(room, image, f.fileno())
    go_on(found)


def test_daemon_killed_in_flight(case):
    """Of a branch that is still being written: a child runs before it is ready, and ends with the daemon: it never reads zeros."""
    r = rig.Rig(case, mib=192, run=RUN)
    rig.request(r.sandbox / "ctl", branch={"name": "b1", "max_rate": 1 << 20})
    (child,), _ = children.run(r.mount, "sbx1/b1")
    assert rig.state(r.sandbox / "branches/b1") == "writing"
    child.wait_console(r"^(ok|tick)", count=2)
    child.check_sane()
    assert rig.state(r.sandbox / "branches/b1") == "writing"
    r.mount.kill()
    r.mount.clear_dead()
    evict()
    assert processes.wait_gone(child.pid, 60), child.console()[-300:]
    child.check_sane()


def test_branch_removed(case):
    """A branch that is removed while its children run is there for them; its name may be used again."""
    r = micro_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    found, _ = children.run_micro(r.mount, "sbx1/b1", "-n", "2")
    branch.rmdir()
    assert rig.wait_settled(r.branch("b1")) == "ready"
    evict()
    for child in found:
        child.visit_all(SMALL)


def odd_vmm(case, odd):
    """A VMM whose child 2 is another program; its name and the options of `forkfs restore`."""
    script = case.dir / "vmm"
    script.write_text(f'#!/bin/bash\nnumber=$1; shift\n[ "$number" = 2 ] && {{ {odd}; }}\nexec {case.tool("../microvm/microvm")} "$@"\n')
    script.chmod(0o700)
    return ["--vmm", script], ["{number}", *children.MICRO]


def test_one_fails(case):
    """One of three ends at once: exit code 1 and what it said; the others are there, and nothing is left of it."""
    r = micro_rig(case)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    options, vmm = odd_vmm(case, "echo no room for me >&2; exit 3")
    found, result = children.run(r.mount, "sbx1/b1", "-n", "3", *options, kind=children.MicroChild, vmm=vmm, check=False)
    assert result.code == 1 and "child 2" in result.err and "exit code 3" in result.err and "no room for me" in result.err, result.err
    assert {c.said["child"] for c in found} == {1, 3}
    for child in found:
        child.visit_all(SMALL, 1)
    assert {p.name for p in (case.dir / "ch").iterdir()} == {c.dir.name for c in found}


def test_interrupted(case):
    """Ctrl-C while one has not come up: that one is ended, those that run stay."""
    r = micro_rig(case)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    options, vmm = odd_vmm(case, 'echo $$ >pid.new; mv pid.new "../pid"; exec sleep 1000')
    command = [r.mount.binary, "restore", "--mount", r.mount.path, "sbx1/b1", "-n", "3", "--dir", case.dir / "ch", *options, "--", *vmm]
    process = case.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = [children.MicroChild(case, json.loads(process.stdout.readline())) for _ in range(2)]
    while not (case.dir / "ch/pid").exists():
        time.sleep(0.01)
    stuck = int((case.dir / "ch/pid").read_text())
    assert processes.alive(stuck)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT, process.stderr.read()
    assert processes.wait_gone(stuck, 5)
    for child in found:
        child.visit_all(SMALL, 1)


def test_paused(case):
    """--paused leaves them where the branch was taken."""
    r = micro_rig(case)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    (child,), _ = children.run_micro(r.mount, "sbx1/b1", "--paused")
    assert child.said["state"] == "paused" and child.said["times"]["running_ns"] is None
    assert child.status()["state"] == "paused"
    child.status("resume")
    child.visit_all(SMALL, 1)
    q = rig.Rig(case, mount=r.mount, mib=128, name="vm2")
    assert rig.wait_settled(q.branch("b1")) == "ready"
    (child,), _ = children.run(r.mount, "vm2/b1", "--paused")
    monitor = child.monitor()
    assert monitor.status() == "paused"
    monitor.execute("cont")
    child.wait_console(r"^tick", count=2)


def test_refused(case):
    """What can never be restored, or not without being asked for, is refused before anything is started."""
    r = rig.Rig(case, mib=128, options=f"store={case.dir}/store,default-store=memory")

    def refused(branch, *options, part):
        found, result = children.run(r.mount, branch, *options, check=False)
        assert not found and result.code == 1 and part in result.err, result.err
        assert not (case.dir / "ch").exists() or not os.listdir(case.dir / "ch")

    refused("sbx1/none", part="no branch 'none'")
    r.mount.faults("image-write error:ENOSPC")
    branch = r.branch("bad")
    assert rig.wait_settled(branch) == "failed"
    r.mount.faults()
    refused("sbx1/bad", "--trust", "--accept-torn", part="failed and can never be restored")
    assert rig.wait_settled(r.branch("b1")) == "ready"
    refused("sbx1/b1", "--conf", "/proc/self/none", part="none")
    loose = case.dir / "loose.conf"
    loose.write_text("kind = qemu\n")
    loose.chmod(0o666)
    refused("sbx1/b1", "--conf", str(loose), part="can be written by others")
    # imported: its command line is shown, and run only by who says so
    r.mount.run("branch", "sbx1", "p", "--store", "packed")
    r.mount.run("export", "sbx1/p", case.dir / "stream")
    r.mount.run("import", case.dir / "stream", "other/p")
    refused("other/p", part="memory-backend-memfd")
    (child,), _ = children.run(r.mount, "other/p", "--trust")
    child.wait_console(r"^tick", count=2)
    assert "-kernel" in pathlib.Path(f"/proc/{child.pid}/cmdline").read_text()


def test_torn(case):
    """A branch that may be torn is started by who says so only."""
    r = rig.Rig(case, mib=128)
    memfd = r.guest.memfd()
    fd = os.open(memfd, os.O_RDWR)
    r.mount.run("branch", "sbx1", "torn", "--force")
    os.close(fd)
    found, result = children.run(r.mount, "sbx1/torn", check=False)
    assert not found and result.code == 1 and "--accept-torn" in result.err, result.err
    (child,), _ = children.run(r.mount, "sbx1/torn", "--accept-torn")
    child.wait_console(r"^tick", count=2)
