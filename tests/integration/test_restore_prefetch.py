"""The working set of children that map their branch: recorded by the first, read ahead for the next, as a pager's is."""

import ctypes
import mmap
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.case import Skip
from forkfs_test.microvm import MicroVm
from forkfs_test.pager import Pager, UffdVmm

MIB = 1 << 20
SIZE = 48
UNIT = 65536
LIMIT = 60
libc = ctypes.CDLL(None, use_errno=True)


def wait_until(condition, what):
    """Wait until it holds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def store_directory(case):
    """A directory on a disk."""
    base = tempfile.mkdtemp(prefix="forkfs-test-", dir="/var/tmp")
    case.on_end(lambda: shutil.rmtree(base))
    return base


def disk_rig(case, kind):
    """The microVM, a mount whose store is on a disk, and a branch `b` of that kind in it; the branch's file in the store."""
    base = store_directory(case)
    guest = MicroVm(case, "sbx1", mib=SIZE, kind="memfd", vcpus=1, work=4, fill=1)
    r = ApiRig(case, guest, case.mount(options=f"store={base}/store"))
    r.mount.run("branch", "sbx1", "b", "--store", kind)
    r.store = rig.pathlib.Path(base) / "store/sbx1/b"
    wait_until(lambda: (r.store / "manifest.json").exists(), lambda: "it is not in the store")
    wait_until(lambda: rig.metric(r, "image_bytes") == 0, lambda: "its image is still in memory")
    return r


def spans(path, mib=SIZE):
    """What a working set says."""
    text = path.read_bytes()
    magic, form, size, memory, n = struct.unpack_from("<8sIIQQ", text)
    assert (magic, form, size, memory, len(text)) == (b"forkfsWS", 1, 64, mib * MIB, 64 + 16 * n)
    return [struct.unpack_from("<QQ", text, 64 + 16 * i) for i in range(n)]


def total(ranges):
    """The bytes of it."""
    return sum(length for _, length in ranges)


def resident(path):
    """Which pages of a file are in the page cache."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as m:
        found = (ctypes.c_ubyte * (len(m) // 4096))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(m))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(m)), found) == 0, os.strerror(ctypes.get_errno())
        return {i * 4096 for i, here in enumerate(found) if here & 1}


def missing(path, ranges):
    """The pages of those ranges that are not."""
    here = resident(path)
    return [at for offset, length in ranges for at in range(offset, offset + length, 4096) if at not in here]


def evict(*paths):
    """Throw a file's pages out of the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if len(resident(paths[0])) > SIZE * 16:
        raise Skip(f"what is in {paths[0]} stays in memory: no disk is below it")


class Held:
    """`forkfs restore` of one child whose VMM does not begin until it is told to."""

    def __init__(self, case, r, name, *options):
        self.case, self.go, self.begun = case, case.dir / f"{name}.go", case.dir / f"{name}.begun"
        script = case.dir / f"{name}.vmm"
        script.write_text(f'#!/bin/bash\ntouch {self.begun}\nuntil [ -e {self.go} ]; do sleep 0.02; done\n'
                          f'exec {case.tool("../microvm/microvm")} "$@"\n')
        script.chmod(0o700)
        self.process = case.start(r.mount.binary, "restore", "--mount", r.mount.path, "sbx1/b", "--as-served", "--dir",
                                  case.dir / "ch", *options, "--vmm", script, "--", *children.MICRO,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: self.begun.exists() or self.process.poll() is not None, lambda: "no VMM was started")

    def wait_idle(self):
        """Until the command has nothing to do but to wait for its children."""
        wait_until(lambda: rig.pathlib.Path(f"/proc/{self.process.pid}/syscall").read_text().startswith("0 "), lambda: "it is busy")

    def let_go(self):
        """It begins; the child."""
        self.go.touch()
        out, errors = self.process.communicate(timeout=LIMIT)
        assert self.process.returncode == 0 and not errors, errors
        return children.lines(self.case, out, children.MicroChild)[0]


def record(r):
    """What the first child has touched at its start."""
    file = r.store / "working-set"
    while not file.exists():  # on a machine that is busy enough it has not run by then
        (child,), result = children.run_micro(r.mount, "sbx1/b", "--as-served")
        assert not result.err, result.err
        child.stop()
    found = spans(file)
    assert 0 < total(found) < SIZE * MIB // 2 and all(o % UNIT == 0 and n % UNIT == 0 for o, n in found), found
    return found


def check_next(case, r, served):
    """The next child finds in the page cache what the first one touched, before its VMM begins; not with --no-prefetch."""
    found = record(r)
    evict(served, r.store / "manifest.json")
    assert missing(served, found)
    held = Held(case, r, "next")
    wait_until(lambda: not missing(served, found), lambda: f"not read ahead: {missing(served, found)}")
    child = held.let_go()
    child.visit_all(SIZE, 1)
    child.stop()
    evict(served, r.store / "manifest.json")
    held = Held(case, r, "without", "--no-prefetch")
    held.wait_idle()
    assert not resident(served), "it was read ahead"
    held.let_go().visit_all(SIZE, 1)


def test_dense(case):
    """From a store on a disk."""
    r = disk_rig(case, "dense")
    check_next(case, r, r.store / "memory.bin")
    # a set that is damaged is ignored, in words, and recorded anew
    file = r.store / "working-set"
    good = file.read_bytes()
    bad = good[:70] + bytes([good[70] ^ 1]) + good[71:]
    file.write_bytes(bad)
    while file.read_bytes() == bad:
        (child,), result = children.run_micro(r.mount, "sbx1/b", "--as-served")
        assert "is damaged" in result.err and "it is ignored" in result.err, result.err
        child.visit_all(SIZE, 1)
        child.stop()
    assert spans(file)


def test_with_a_pager(case):
    """What children that map the branch have recorded a pager puts into its VMs, and what a pager recorded is read ahead for those."""
    r = disk_rig(case, "dense")
    memory, file = r.store / "memory.bin", r.store / "working-set"
    found = record(r)
    pager = Pager(case, "sbx1/b", "-n", "1", mount=r.mount, name="first")
    vmm = UffdVmm(case, pager, memory)
    pager.event("serves")
    wait_until(lambda: int(vmm.ask("resident")) >= total(found), lambda: vmm.ask("resident"))
    vmm.process.kill()
    assert pager.event("exited")["prefetched_bytes"] == total(found)
    assert pager.process.wait(LIMIT) == 0, pager.log()
    file.unlink()
    pager = Pager(case, "sbx1/b", mount=r.mount, name="second")
    vmm = UffdVmm(case, pager, memory)
    for off in (20 * MIB, 40 * MIB):
        vmm.check(f"read {off} {UNIT}")
    pager.process.send_signal(signal.SIGUSR1)
    wait_until(file.exists, pager.log)
    vmm.check()
    pager.stop()
    vmm.process.kill()
    vmm.process.wait()
    assert spans(file) == [(20 * MIB, UNIT), (40 * MIB, UNIT)]
    evict(memory)
    held = Held(case, r, "third")
    wait_until(lambda: not missing(memory, spans(file)), lambda: "not read ahead")
    held.let_go().visit_all(SIZE, 1)
    assert spans(file) == [(20 * MIB, UNIT), (40 * MIB, UNIT)], "it was written again"
    while total(spans(file)) == 2 * UNIT:
        children.run_micro(r.mount, "sbx1/b", "--as-served", "--no-prefetch")
    now = spans(file)
    assert not any(o <= at < o + n for o, n in now for at in (20 * MIB, 40 * MIB)), "it was not recorded anew"


def test_loaded(case):
    """A branch that is loaded into memory first has nothing to read ahead, but what its first child touched is recorded for others."""
    r = disk_rig(case, "packed")
    file = r.store / "working-set"
    while not file.exists():
        found, result = children.run_micro(r.mount, "sbx1/b", "-n", "2", "--attach", "c")
        assert not result.err and all("memfd:forkfs-children" in c.maps() for c in found), result.err
        for child in found:
            r.mount.run("detach", child.said["sandbox"])
            child.stop()
    assert 0 < total(spans(file)) < SIZE * MIB


def test_qemu(case):
    """Of a QEMU: the same, and its children are right; one that says when it is ready adds what it touched until then."""
    base = store_directory(case)
    r = rig.Rig(case, mib=128, run=["counter", "selfcheck,mib=32,threads=1,step=1,every=16", "mailbox,config,s3cret"],
                options=f"store={base}/store")
    r.guest.console.wait("^mailbox config ready$")
    r.mount.run("branch", "sbx1", "b", "--store", "dense")
    r.mount.run("wait", "sbx1/b")
    r.store = rig.pathlib.Path(base) / "store/sbx1/b"
    wait_until((r.store / "manifest.json").exists, lambda: "it is not in the store")
    file, size = r.store / "working-set", 0
    for _ in range(3):
        (child,), result = children.run(r.mount, "sbx1/b", "--as-served")
        assert not result.err, result.err
        child.wait_console(r"^(ok|tick)", count=4)
        child.check_sane()
        child.stop()
        now = total(spans(file, 128)) if file.exists() else 0
        assert size in (0, now), "it was written again"
        size = now
    assert 0 < size < 128 * MIB
    file.unlink()
    pager = Pager(case, "sbx1/b", mount=r.mount)
    vmm = UffdVmm(case, pager, r.store / "memory.bin")
    vmm.check(f"read {100 * MIB} {UNIT}")
    pager.process.send_signal(signal.SIGUSR1)
    wait_until(file.exists, pager.log)
    assert spans(file, 128) == [(100 * MIB, UNIT)]
    rig.request(r.sandbox / "ctl", fork={"branch": "b", "name": "f", "mailboxes": [{"name": "config", "payload": {"task": 1},
                                                                                   "wait_for_ack": True, "ack_timeout_ms": 30000}]})
    (child,), result = children.run(r.mount, "sbx1/b/f", "--as-served")
    assert child.said["acks"][0]["state"] == "applied" and not result.err, result.err
    child.check_sane()
    now = spans(file, 128)
    assert total(now) > UNIT and any(o <= 100 * MIB < o + n for o, n in now), now
    # a branch in memory has no place for one, and needs none
    r.mount.run("branch", "sbx1", "m", "--store", "memory")
    (child,), result = children.run(r.mount, "sbx1/m")
    assert not result.err and not (r.store.parent / "m").exists(), result.err


def test_packed(case):
    """From the daemon, which decodes what is packed."""
    r = disk_rig(case, "packed")
    check_next(case, r, r.mount / "sbx1/branches/b/memory.bin")
