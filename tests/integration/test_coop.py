"""The driver coop: VMMs that hand over a userfaultfd themselves. The VMM is tests/microvm with examples/coop in it."""

import json
import os
import signal
import subprocess
import sys
import time

from forkfs_test import processes, rig
from forkfs_test.api import (PAUSED, SAVED, ApiRig, check_death, check_paused_by_others, check_paused_meanwhile,
                             check_resumed_by_others)
from forkfs_test.microvm import MicroVm

TIMEOUT = {"test_hostile": 180}
BRANCHES = 12

class CoopRig(ApiRig):
    """A microVM, a mount, attached."""

    def __init__(self, case, **vm):
        super().__init__(case, MicroVm(case, "sbx1", **vm))


def checked_branch(r, name):
    """A branch that is what foreign hands read in its pause."""
    branch = r.branch_with_truth(name)
    assert r.difference(branch) == "", name
    return branch


def check_identity(case, **vm):
    """Each image is the memory that foreign hands read in the same pause; a child of the last goes on and judges all of it."""
    r = CoopRig(case, **vm)
    for i in range(BRANCHES):
        branch = r.branch_with_truth(f"b{i}")
        assert r.difference(branch) == "", f"branch {i}"
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        assert r.difference(branch) == "", f"branch {i}, settled"
        if i < BRANCHES - 1:
            branch.rmdir()
    r.guest.check_runs()
    for name in ("memory.bin", "vmstate"):
        (case.dir / name).write_bytes((branch / name).read_bytes())
    child = MicroVm(case, "child", mib=r.guest.mib, restore=case.dir / "memory.bin", vmstate=case.dir / "vmstate")
    child.visit_all()
    r.guest.visit_all(1)
    assert r.guest.left_over() == [], r.guest.left_over()


def test_identity_regions(case):
    """Anonymous memory in three regions, which are one mapping."""
    check_identity(case, mib=96, kind="anonymous", regions=3, fill=1)


def test_identity_memfd(case):
    """Shared memory."""
    check_identity(case, mib=64, kind="memfd")


def test_child_is_branched(case):
    """A child that maps a settled branch privately, from the mount, is a sandbox like any other."""
    r = CoopRig(case, mib=64, kind="memfd")
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    child = MicroVm(case, "child", mib=64, restore=branch / "memory.bin", vmstate=branch / "vmstate").booted()
    sandbox = r.mount.attach(child)
    grandchild = sandbox / "branches/b2"
    grandchild.mkdir()
    assert rig.wait_settled(grandchild) == "ready", (grandchild / "status").read_text()
    last = MicroVm(case, "grandchild", mib=64, restore=grandchild / "memory.bin", vmstate=grandchild / "vmstate")
    last.visit_all()
    child.visit_all(1)
    # while it is attached the daemon has the file open that the child maps; the child's branches, which stay, must not keep it
    last.stop()
    r.mount.run("detach", "child")
    assert rig.state(grandchild) == "ready"
    deadline = time.monotonic() + 30
    while any(link.startswith(f"{r.mount.path}/") for link in processes.open_files(r.mount.pid).values()):
        assert time.monotonic() < deadline, processes.open_files(r.mount.pid)
        time.sleep(0.005)


def test_killed_before_save(case):
    """kill -9 between pause and save."""
    check_death(CoopRig(case), PAUSED, signal.SIGKILL)


def test_killed_before_resume(case):
    """kill -9 between arm and resume."""
    check_death(CoopRig(case), SAVED, signal.SIGKILL)


def test_stopped_before_resume(case):
    """A daemon that stands still: the watchdog resumes over a connection of its own."""
    check_death(CoopRig(case), SAVED, signal.SIGSTOP)


def test_killed_in_capture(case):
    """kill -9 while the image is being copied: the guest's writes go on, nothing stays protected."""
    r = CoopRig(case, mib=96, fill=1)
    r.mount.faults("guest-read delay:20")
    r.branch("b1")
    assert rig.state(r.sandbox / "branches/b1") == "writing"
    r.mount.kill()
    r.guest.wait_free()
    r.guest.check_runs()
    r.guest.visit_all(1)
    r.mount.clear_dead()


def test_paused_by_others(case):
    """See api.check_paused_by_others."""
    check_paused_by_others(CoopRig(case), checked_branch)


def test_resumed_by_others(case):
    """See api.check_resumed_by_others."""
    check_resumed_by_others(CoopRig(case))


def test_paused_meanwhile(case):
    """See api.check_paused_meanwhile."""
    check_paused_meanwhile(CoopRig(case, mib=96))


def test_attached_again(case):
    """Detach and attach, over and over, and the VM's end."""
    r = CoopRig(case)
    for i in range(5):
        assert rig.wait_settled(r.branch(f"b{i}")) == "ready"
        r.mount.run("detach", "sbx1")
        r.guest.wait_free()
        r.mount.attach(r.guest)
    r.guest.check_runs()
    r.guest.stop()
    deadline = time.monotonic() + 30
    while (r.sandbox / "state").read_text() != "exited\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert rig.state(r.sandbox / "branches/b0") == "ready"


WP, REMOVE, UNMAP, REMAP = 1 << 0, 1 << 3, 1 << 6, 1 << 2
ALL = WP | REMAP | REMOVE | UNMAP | 1 << 12 | 1 << 13
REGION = '{"base_host_virt_addr":%s,"size":%s,"offset":%s,"page_size":4096}'


def region(address="%A", size="%S", offset="0"):
    """One region of a message."""
    return REGION % (address, size, offset)


def message(*regions):
    """An order for a message."""
    return {"text": "[" + ",".join(regions) + "]"}


def raw(text):
    """An order for an answer to GET /."""
    return {"root": f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}"}


HOSTILE = [
    ({"silent": True}, "did not hand over"),
    ({"silent": True, "answer": 0}, "does not answer"),
    ({"silent": True, "answer": 400}, "ordered to"),
    ({"answer": 400}, "ordered to"),
    ({"silent": True, "answer": 404}, "does not cooperate"),
    ({"fds": "none"}, "0 descriptors"),
    ({"fds": "two"}, "2 descriptors"),
    ({"fds": "many"}, "more than 8 descriptors"),
    ({"fds": "null"}, "no userfaultfd"),
    ({"cut": 0}, "hung up"),
    ({"cut": 40}, "cut off"),
    ({"text": "[" + " " * 70000 + "]"}, "larger"),
    ({"text": "hello"}, "no JSON array"),
    ({"text": "{}"}, "no JSON array"),
    ({"text": "[] []"}, "no JSON array"),
    ({"text": "[" * 60}, "no JSON array"),
    ({"text": "[]"}, "0 regions"),
    (message(*[region("4096", "4096", str(i * 4096)) for i in range(65)]), "65 regions"),
    ({"text": "[7]"}, "whole numbers"),
    ({"text": '[{"size":4096,"offset":0,"page_size":4096}]'}, "whole numbers"),
    (message(region(size="-4096")), "whole numbers"),
    (message(region(size='"4096"')), "whole numbers"),
    (message(region(size="4096.5")), "whole numbers"),
    (message(region(address="99999999999999999999")), "whole numbers"),
    (message(region(size="0")), "no range"),
    (message(region(address="0")), "no range"),
    (message(region(size="4097")), "no range"),
    (message(region(size="9223372036854771712")), "no range"),
    (message(region(address="140737488351232")), "no range"),
    (message(region(offset="4096")), "leave or share"),
    (message(region(size="8192"), region(offset="4096")), "leave or share"),
    (message(region(size="8192"), region(offset="8192")), "share the address"),
    (message(region(address="65536", size="4096")), "not mapped"),
    (message(region(size="1073741824")), ""),
    (message(region(address="%R", size="4096")), "not readable and writable"),
    ({"text": '[{"base_host_virt_addr":%A,"size":4194304,"offset":0,"page_size":1073741824}]'}, "page_size"),
    ({"text": '[{"base_host_virt_addr":%A,"size":4194304,"offset":0}]'}, "page_size"),
    ({"who": "child"}, "in place of the VMM"),
    ({"who": "space"}, "of another process"),
    ({"keep": True}, "keeps its own copy"),
    ({"features": WP}, "lacks"),
    (raw("nonsense"), "no JSON object"),
    (raw('{"state":"Dancing"}'), "what state"),
    (raw('{"state":"Not started"}'), "not started"),
    ({"root": "SSH-2.0-OpenSSH_9.2\r\n\r\n"}, "no HTTP answer"),
    ({"root": "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"}, "too large"),
    ({"root": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"}, "no HTTP answer"),
    ({"root": "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"}, "no HTTP answer"),
    ({"root": "HTTP/1.1 200 OK\r\nX: " + "y" * 40000}, "too large"),
    ({"root": "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"}, "no such VMM"),
]


def standin(case, number, orders):
    """A stand-in that can be attached; its socket."""
    path = case.dir / f"standin{number}"
    process = case.start(sys.executable, "-m", "forkfs_test.standin", path, json.dumps(orders), stdout=subprocess.PIPE,
                         start_new_session=True)
    case.on_end(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
    assert process.stdout.readline() == b"ready\n"
    return path, process


def descriptors(mount):
    """What files the daemon has open, /dev/fuse apart: each of its threads has one, and they come and go with the load."""
    return sorted(link for link in processes.open_files(mount.pid).values() if link != "/dev/fuse")


def test_hostile(case):
    """What a VMM may say wrongly is refused in words; the daemon goes on, and keeps nothing of it."""
    mount, wrong = case.mount(), []
    before = None
    for number, (orders, expected) in enumerate(HOSTILE):
        path, process = standin(case, number, orders)
        done = mount.run("attach", "x", "--coop", path, check=False, timeout=30)
        if done.code == 0 or expected not in done.err:
            wrong.append(f"{json.dumps(orders)[:100]}: {done.code} {done.err.strip()}")
        if done.code == 0:
            mount.run("detach", "x")
        left = [p.name for p in case.dir.iterdir() if ".forkfs-" in p.name]
        if left:
            wrong.append(f"{json.dumps(orders)[:100]}: left {left}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = before or descriptors(mount)
    assert not wrong, "\n".join(wrong)
    assert descriptors(mount) == before, f"{before} after the first, {descriptors(mount)} now"
    for number, orders in enumerate(({}, {"features": ALL})):
        path, _ = standin(case, f"-good{number}", orders)
        mount.run("attach", f"good{number}", "--coop", path)
        assert json.loads((mount / f"good{number}/status").read_text())["vmm"] == "coop"


def test_refused(case):
    """Sockets that are none, two at once, and the wrong owner."""
    r = CoopRig(case)
    assert "already" in r.mount.run("attach", "x", "--coop", r.guest.api_path, check=False).err
    assert "no socket" in r.mount.run("attach", "x", "--coop", case.dir / "none", check=False).err
    assert r.mount.run("attach", "x", "--coop", "/a", "--qemu", "/b", check=False).code == 2
    r.guest.check_runs()
