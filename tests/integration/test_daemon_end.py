"""The daemon ends, by a signal, by umount or by kill -9, while readers, waiters and children use the mount."""

import errno
import hashlib
import json
import mmap
import os
import signal
import subprocess
import time

from forkfs_test import processes, rig

TIMEOUT = {"test_child_outlives_daemon": 240}
MIB = 128
GUEST = {"mib": MIB, "run": ["counter"]}
SELFCHECK = {"mib": MIB, "run": ["counter", "selfcheck,mib=32,threads=1,step=1,every=16"]}


def has_passthrough(mount):
    """True where settled branches are served by the kernel."""
    return json.loads((mount / ".forkfs/capabilities").read_text())["passthrough"] is True


def sha256(fd):
    """Of a whole open file, by pread."""
    h, at = hashlib.sha256(), 0
    while part := os.pread(fd, 1 << 20, at):
        h.update(part)
        at += len(part)
    return at, h.hexdigest()


def ready(branch):
    """Wait until a branch is ready."""
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    return branch


def check_goes_on(guest):
    """A child, or a parent, goes on and finds nothing wrong in its memory."""
    for _ in range(2):
        guest.console.wait(r"^(ok|MISMATCH|ended)", timeout=60, start=guest.console.mark())
    guest.check_sane()


def opened_for_reading(guest, path):
    """True when each of the VMM's files of that path is open for reading only, and there is one."""
    flags = []
    for fd, link in processes.open_files(guest.pid).items():
        if link == str(path):
            with open(fd.replace("/fd/", "/fdinfo/")) as info:
                flags += [int(line.split()[1], 8) & os.O_ACCMODE for line in info if line.startswith("flags:")]
    return flags and not any(flags)


def end_mount(r):
    """Whatever is left of the mount of a daemon that ended by itself."""
    assert processes.wait_gone(r.mount.pid, 15), f"the daemon has not ended:\n{processes.stacks(r.mount.pid)}"
    assert r.mount.process.wait() == 0, f"exit status {r.mount.process.returncode}: {r.mount.log()[-1000:]}"
    assert not processes.mounts_under(str(r.mount.path)), "an ended daemon has left its mount"


def test_sigterm(case):
    """SIGTERM with readers, waiters, requests and a capture under way: all end, the guest is free, the next mount works."""
    r = rig.Rig(case, **GUEST)
    r.mount.run("detach", "sbx1")
    fds = r.guest.fds()
    r.mount.attach(r.guest)
    branch = ready(r.branch_with_truth("b1"))
    size, right = sha256_of_truth(r)
    passed, written = os.open(branch / "memory.bin", os.O_RDONLY), os.open(branch / "memory.bin", os.O_RDWR)
    kept = mmap.mmap(passed, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    by_kernel = has_passthrough(r.mount)
    r.mount.faults("guest-read delay:4")
    late = r.branch("b2")
    assert rig.state(late) == "writing"
    clients = [case.start("bash", "-c", script, cwd=r.mount.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for script in (
        "cat .forkfs/events", "cat sbx1/branches/b2/wait", "cat sbx1/branches/b2/manifest.json", "sync sbx1/branches/b2/memory.bin",
        "while cat sbx1/branches/b2/memory.bin; do :; done", "while cat sbx1/branches/b1/memory.bin; do :; done",
        "exec 3<>sbx1/ctl; echo '{\"branch\":{\"name\":\"b3\",\"wait\":true}}' >&3; cat <&3")]
    time.sleep(0.3)
    os.kill(r.mount.pid, signal.SIGTERM)
    end_mount(r)
    r.guest.check_runs(1.0)
    r.guest.check_free(fds)
    for client in clients:
        client.wait(timeout=30)
    if by_kernel:
        assert sha256(passed) == (size, right), "a file served by the kernel has changed"
        assert hashlib.sha256(kept).hexdigest() == right, "a mapping served by the kernel has changed"
    try:
        os.pread(written, 4096, 5 << 20)
        raise AssertionError("a file served by a daemon that has ended can be read")
    except OSError as e:
        assert e.errno in (errno.ENOTCONN, errno.EIO, errno.ECONNABORTED), e
    kept.close()
    os.close(passed)
    os.close(written)
    again = case.mount("again")
    sandbox = again.attach(r.guest)
    (sandbox / "branches/b1").mkdir()
    ready(sandbox / "branches/b1")


def sha256_of_truth(r):
    """Size and hash of the truth."""
    fd = os.open(r.truth, os.O_RDONLY)
    try:
        return sha256(fd)
    finally:
        os.close(fd)


def test_other_signals(case):
    """SIGINT and SIGHUP end it in the same way; the request `shutdown` too."""
    guest = case.guest(**GUEST).booted()
    fds = guest.fds()
    for n, number in enumerate((signal.SIGINT, signal.SIGHUP, None)):
        mount = case.mount(f"mnt{n}")
        (mount.attach(guest) / "branches/b1").mkdir()
        if number:
            os.kill(mount.pid, number)
        else:
            case.shell(f"exec 3<>{mount.path}/.forkfs/ctl; echo '{{\"shutdown\":{{}}}}' >&3; cat <&3")
        assert processes.wait_gone(mount.pid, 15), processes.stacks(mount.pid)
        assert mount.process.wait() == 0 and not processes.mounts_under(str(mount.path)), number
        guest.check_runs(1.0)
        guest.check_free(fds)


def test_umount_of_a_childs_memory(case):
    """umount while a child maps memory.bin: refused, the child is named; nothing is lost by it; afterwards it goes."""
    r = rig.Rig(case, **SELFCHECK)
    branch = ready(r.branch("b1"))
    child = r.guest.child("child", branch / "memory.bin", branch / "vmstate")
    child.go()
    result = case.run(r.mount.binary, "umount", r.mount.path, check=False)
    assert result.code == 1 and "in use" in result.err and f"({child.pid})" in result.err and "qemu" in result.err, result.err
    assert rig.state(branch) == "ready"
    check_goes_on(child)
    assert r.branch("b2").exists(), "the mount does not work after a refused umount"
    child.stop()
    case.run(r.mount.binary, "umount", r.mount.path)
    assert processes.wait_gone(r.mount.pid, 10)
    check_goes_on(r.guest)


def test_lazy_umount(case):
    """umount -l while a child maps memory.bin and a file is open: both go on, and the daemon ends with the last of them."""
    r = rig.Rig(case, **SELFCHECK)
    branch = ready(r.branch_with_truth("b1"))
    fd = os.open(branch / "memory.bin", os.O_RDWR)
    child = r.guest.child("child", branch / "memory.bin", branch / "vmstate")
    child.go()
    case.run("umount", "-l", r.mount.path)
    check_goes_on(child)
    assert sha256(fd) == sha256_of_truth(r), "an open file has changed"
    assert r.mount.process.poll() is None, "the daemon has left a child alone"
    child.stop()
    os.close(fd)
    end_mount(r)
    r.guest.check_runs(1.0)
    assert r.guest.protected() == 0


def test_child_outlives_daemon(case):
    """kill -9 of the daemon: a child whose memory the kernel serves goes on, with the mount dead and then gone."""
    r = rig.Rig(case, **SELFCHECK)
    if not has_passthrough(r.mount):
        print("no passthrough on this machine: children go with the daemon")
        return
    branch = ready(r.branch("b1"))
    os.environ.update(LD_PRELOAD=case.tool("../../tools/forkfs-open-read-only.so"), FORKFS_OPEN_READ_ONLY=str(r.mount.path))
    child = r.guest.child("child", branch / "memory.bin", branch / "vmstate")
    del os.environ["LD_PRELOAD"]
    assert opened_for_reading(child, branch / "memory.bin"), "the child has its memory open for writing"
    child.go()
    r.mount.kill(signal.SIGKILL)
    r.guest.check_runs(1.0)
    check_goes_on(child)
    try:
        os.listdir(r.mount.path)
        raise AssertionError("a dead mount can be listed")
    except OSError as e:
        assert e.errno in (errno.ENOTCONN, errno.ECONNABORTED), e
    check_goes_on(child)
    r.mount.clear_dead()
    check_goes_on(child)
    check_goes_on(r.guest)


def test_without_passthrough(case):
    """The quick way, served by the daemon and the page cache: cp of the pair, a child of the copy, a child from the mount."""
    r = rig.Rig(case, options="passthrough=off", **SELFCHECK)
    said = json.loads((r.mount / ".forkfs/capabilities").read_text())
    assert said["passthrough"] is False and said["serving_settled"] == "cached" and said["passthrough_reason"], said
    r.guest.console.wait("tick 5$")
    case.shell(f"cp {r.sandbox}/branch/memory.bin m && cp {r.sandbox}/branch/vmstate v")
    assert r.guest.stops() == 1, r.guest.stops()
    copied = r.guest.child("copied", case.dir / "m", case.dir / "v")
    copied.go()
    check_goes_on(copied)
    copied.stop()
    branch = r.branch_with_truth("b1")
    mapped = r.guest.child("mapped", branch / "memory.bin", branch / "vmstate")
    mapped.go()
    assert rig.wait_settled(branch) == "ready"
    check_goes_on(mapped)
    assert r.difference(branch) == ""
    branch.rmdir()
    check_goes_on(mapped)
    mapped.stop()
    check_goes_on(r.guest)
