"""What goes wrong is refused at once, by the right errno or exit code and with a sentence; daemon and guest go on."""

import errno
import mmap
import os
import subprocess

from forkfs_test import processes, rig
from forkfs_test.calls import errno_of

WRITE_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBADF)


def refused(result, *words):
    """The command failed and its sentence has these words."""
    assert result.code not in (0, -6, -11), f"should have failed: {result.out}"
    for word in words:
        assert str(word) in result.err, f"'{word}' is missing in: {result.err!r}"


def test_attach(case):
    """Not a VMM, a dead pid, no such socket, a name in use, a VM attached already."""
    r = rig.Rig(case, mib=128)
    other = case.start("sleep", "1000")
    dead = subprocess.Popen(["true"])
    dead.wait()
    refused(r.mount.run("attach", "x", "--pid", other.pid, check=False), other.pid)
    refused(r.mount.run("attach", "x", "--pid", dead.pid, check=False), dead.pid)
    refused(r.mount.run("attach", "x", "--qemu", case.dir / "none", check=False), case.dir / "none")
    refused(r.mount.run("attach", "bad/name", "--pid", r.guest.pid, check=False), "bad/name")
    refused(r.mount.run("attach", "x", check=False))
    refused(r.mount.run("attach", "again", "--pid", r.guest.pid, check=False), "sbx1")
    assert processes.alive(other.pid)
    second = case.guest("second", mib=128).booted()
    refused(r.mount.run("attach", "sbx1", "--qemu", second.qmp_path, check=False), "sbx1")
    r.mount.attach(second)
    r.branch("still")
    for guest in (r.guest, second):
        guest.check_runs()


def test_commands(case):
    """Options and names that do not exist."""
    r = rig.Rig(case, mib=128)
    refused(r.mount.run("ls", "--nonsense", check=False), "--nonsense")
    refused(r.mount.run("nonsense", check=False), "nonsense")
    refused(r.mount.run("branch", "nobody", "b1", check=False), "nobody")
    refused(r.mount.run("branch", "sbx1", "a b", check=False), "a b")
    refused(r.mount.run("branch", "sbx1", "b1", "--live", "--full", check=False), "--live", "--full")
    refused(r.mount.run("rm", "sbx1/none", check=False), "none")
    refused(r.mount.run("wait", "sbx1/none", check=False), "none")
    refused(r.mount.run("detach", "nobody", check=False), "nobody")
    refused(case.run(r.mount.binary, "status", "--mount", case.dir, check=False), case.dir)
    refused(case.run(r.mount.binary, "mount", case.dir / "nowhere", check=False), "nowhere")
    (case.dir / "m2").mkdir()
    refused(case.run(r.mount.binary, "mount", case.dir / "m2", "-o", "nonsense=1", check=False), "nonsense")
    assert not processes.mounts_under(str(case.dir / "m2"))
    assert r.guest.stops() == 0, "a refused command stopped the VM"
    r.branch("b1")
    r.guest.check_runs()


def test_files(case):
    """Writing what is immutable, making what has no place, names against the rule."""
    r = rig.Rig(case, mib=128)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    before = (branch / "memory.bin").read_bytes()
    branches = branch.parent
    assert errno_of(os.mkdir, branch) == errno.EEXIST
    assert errno_of(os.mkdir, branches / "a b") == errno.EINVAL
    assert "a b" in r.mount.error_of(branches)
    assert errno_of(os.mkdir, branches / ("x" * 65)) in (errno.EINVAL, errno.ENAMETOOLONG)
    assert errno_of(os.listdir, r.mount / "nobody") == errno.ENOENT
    for path in (r.mount / "new", r.sandbox / "new", branch / "new", branches / "new"):
        assert errno_of(path.touch) in WRITE_REFUSED, path
    assert errno_of(os.mkdir, r.mount / "newdir") in WRITE_REFUSED
    for path in (branch / "memory.bin", branch / "vmstate", r.sandbox / "state"):
        assert errno_of(os.open, path, os.O_WRONLY) in WRITE_REFUSED, path
        assert errno_of(os.truncate, path, 0) in WRITE_REFUSED, path
        assert errno_of(os.unlink, path) in WRITE_REFUSED, path
    fd = os.open(branch / "memory.bin", os.O_RDWR)
    assert errno_of(os.pwrite, fd, b"x", 0) in WRITE_REFUSED
    try:
        with mmap.mmap(fd, 4096) as shared:
            shared[0:4] = b"evil"
    except OSError:
        pass
    os.close(fd)
    assert (branch / "memory.bin").read_bytes() == before, "the branch has been changed"
    r.branch("b2")
    r.guest.check_runs()
