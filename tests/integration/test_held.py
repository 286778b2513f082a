"""Whatever is held in the daemon for seconds: everything but the directory that the kernel locks can be listed and read meanwhile."""

import errno
import json
import os
import pathlib
import threading
import time

from forkfs_test import rig

# Each operation is held at least so long.
HELD = 2.0


class Work(threading.Thread):
    """A call in a thread; `error` is what it raised, `value` what it gave."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self.call, self.error, self.value = (function, args), None, None
        self.start()

    def run(self):
        """The thread."""
        try:
            self.value = self.call[0](*self.call[1])
        except OSError as e:
            self.error = e

    def finish(self, timeout=30):
        """Wait for it; its value."""
        self.join(timeout)
        assert not self.is_alive(), f"{self.call} has not come back after {timeout} s"
        assert self.error is None, f"{self.call}: {self.error}"
        return self.value


class Held:
    """`function(*args)` waits at a fault point until `end`."""

    def __init__(self, r, point, function, *args):
        self.r, self.point = r, point
        self.release = r.case.dir / f"release-{point}"
        r.mount.faults(f"{point} hold:{self.release}")
        self.start = time.monotonic()
        self.work = Work(function, *args)
        held = pathlib.Path(f"{self.release}.held")
        while not held.exists():
            assert self.work.is_alive(), f"{point} was not passed: {self.work.error or self.work.value}"
            assert time.monotonic() < self.start + 20, f"{point} was not reached in 20 s"
            time.sleep(0.005)
        r.case.on_end(self.release.touch)

    def look(self, *looks):
        """Look again and again as long as it must be held; it must still be held after each look."""
        rounds = 0
        while rounds < 2 or time.monotonic() < self.start + HELD:
            for look in looks:
                look()
                assert self.work.is_alive(), f"{self.point} is not held any more: {self.work.error or self.work.value}"
            rounds += 1

    def end(self):
        """Let it go on; what it gives."""
        self.r.mount.faults()
        self.release.touch()
        return self.work.finish()


def with_left_branch(case):
    """sbx1, attached, with the branch b0; and `other`, detached, which is there for its branch b0."""
    r = rig.Rig(case, mib=128, options="branch-rate=0")
    rig.wait_settled(r.branch("b0"))
    r.mount.run("detach", "sbx1")
    os.rename(r.sandbox / "branches/b0", r.sandbox / "branches/left")
    r.mount.attach(r.guest, "other")
    rig.wait_settled(r.sandbox.parent / "sbx1/branches/left")
    (r.mount / "other/branches/b0").mkdir()
    rig.wait_settled(r.mount / "other/branches/b0")
    r.mount.run("detach", "other")
    r.mount.attach(r.guest, "sbx1")
    return r


def ls(case, *args):
    """A look: ls -l of these within 20 s, without a complaint."""
    def look():
        result = case.run("ls", "-l", *args, timeout=20)
        assert result.out and not result.err, result.err
    return look


def read(path, expected=None):
    """A look: read the start of a file, which must be the same each time."""
    def look():
        with open(path, "rb") as f:
            content = f.read(65536)
        assert expected is None or content == expected, f"{path} has changed"
    return look


def stats(*paths):
    """A look: stat of every path."""
    def look():
        for path in paths:
            os.stat(path)
    return look


def elsewhere(r):
    """Looks at all that is not below sbx1/branches."""
    other = r.mount / "other/branches/b0"
    start = (other / "memory.bin").open("rb").read(65536)
    return (ls(r.case, r.mount.path), ls(r.case, "-R", r.mount / ".forkfs", r.mount / "other"), ls(r.case, r.sandbox),
            ls(r.case, r.sandbox / "branch"), stats(r.sandbox / "branches", r.sandbox / "status", r.sandbox / "ctl"),
            read(r.sandbox / "state", b"running\n"), read(r.sandbox / "status"), read(r.mount / ".forkfs/metrics"),
            read(other / "memory.bin", start), read(other / "manifest.json"), read(other / "status"))


def test_names(case):
    """mkdir, rename and rmdir: the kernel locks branches/ of that VM, and nothing else may wait."""
    r = with_left_branch(case)
    branches = r.sandbox / "branches"
    inside = os.open(branches / "left", os.O_RDONLY | os.O_DIRECTORY)
    case.on_end(lambda: os.close(inside))

    def opened():
        # a directory that is open already is no name in branches/
        assert "memory.bin" in os.listdir(inside)
        assert os.stat("memory.bin", dir_fd=inside).st_size == 128 << 20
        fd = os.open("state", os.O_RDONLY, dir_fd=inside)
        assert os.read(fd, 100) == b"ready\n"
        os.close(fd)

    looks = elsewhere(r)
    held = Held(r, "fs-mkdir", os.mkdir, branches / "b1")
    held.look(*looks, opened)
    held.end()
    assert rig.wait_settled(branches / "b1") == "ready"

    held = Held(r, "fs-rename", os.rename, branches / "b1", branches / "b2")
    held.look(*looks, opened)
    held.end()
    assert sorted(os.listdir(branches)) == ["b2", "left"]

    held = Held(r, "fs-rmdir", os.rmdir, branches / "b2")
    held.look(*looks, opened)
    held.end()
    assert os.listdir(branches) == ["left"]
    r.guest.check_runs()


def test_fsync(case):
    """fsync of a file: the whole tree, that file and its directory too, can be looked at."""
    r = with_left_branch(case)
    left = r.sandbox / "branches/left"
    fd = os.open(left / "memory.bin", os.O_RDONLY)
    case.on_end(lambda: os.close(fd))
    start = os.pread(fd, 65536, 0)
    held = Held(r, "fs-fsync", os.fsync, fd)
    held.look(ls(case, "-R", r.mount.path), *elsewhere(r), read(left / "memory.bin", start), stats(left / "memory.bin"))
    held.end()


def request(path, value):
    """Write a request and read its answer."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.write(fd, json.dumps(value).encode())
        return json.loads(os.read(fd, 1 << 16))
    finally:
        os.close(fd)


def test_ctl_write(case):
    """A write to a ctl: the whole tree can be looked at, and other opens of ctl are not in its way."""
    r = with_left_branch(case)
    held = Held(r, "fs-ctl-write@1", request, r.sandbox / "ctl", {"branch": {"name": "c1", "wait": True}})
    more = iter(range(1000))
    held.look(ls(case, "-R", r.mount.path), *elsewhere(r),
              lambda: request(r.sandbox / "ctl", {"branch": {"name": f"m{next(more)}", "wait": True}}))
    assert held.end()["branch"]["state"] == "ready"
    assert "m0" in os.listdir(r.sandbox / "branches")


def test_attach(case):
    """attach and detach: the whole tree can be looked at; the name is reserved."""
    r = with_left_branch(case)
    ctl = r.mount / ".forkfs/ctl"
    r.mount.run("detach", "sbx1")
    left = r.sandbox / "branches/left"

    def refused():
        fd = os.open(ctl, os.O_RDWR)
        try:
            os.write(fd, json.dumps(attach).encode())
        except OSError as e:
            assert e.errno == 16, e
            assert "sbx1" in json.loads(os.read(fd, 4096))["error"]
        else:
            raise AssertionError("a name that is being attached was given away twice")
        finally:
            os.close(fd)

    attach = {"attach": {"name": "sbx1", "qemu": r.guest.qmp_path}}
    held = Held(r, "fs-attach", request, ctl, attach)
    held.look(ls(case, "-R", r.mount.path), read(left / "memory.bin"), read(r.mount / "other/status"), refused)
    assert "attach" in held.end()
    r.branch("b1")

    held = Held(r, "fs-detach", request, ctl, {"detach": {"name": "sbx1"}})
    held.look(ls(case, "-R", r.mount.path), read(left / "memory.bin"), refused)
    assert held.end()["detach"]["branches_left"] == 2
    r.guest.check_runs()


def test_open_now(case):
    """An open in branch/ that waits for its branch locks nothing: not the directory, not the same file for another key."""
    r = with_left_branch(case)

    def first(path):
        with open(path, "rb") as f:
            return f.read(4096)

    held = Held(r, "fs-open@1", first, r.sandbox / "branch@one/memory.bin")
    held.look(ls(case, "-R", r.mount.path), *elsewhere(r), ls(case, r.sandbox / "branch@one"),
              lambda: first(r.sandbox / "branch@two/memory.bin"))
    assert len(held.end()) == 4096
    r.guest.check_runs()


def test_removed_while_awaited(case):
    """rmdir of a branch that is still written: who waits for it by ctl or `wait` is told so at once, and nothing is kept for them."""
    r = rig.Rig(case, mib=128)
    gone = r.sandbox / "branches/gone"

    def awaited():
        answer = request(r.sandbox / "ctl", {"branch": {"name": "gone", "wait": True}})
        assert answer.get("code") == "ENOENT", answer

    def waited():
        try:
            (gone / "wait").read_text()
        except OSError as e:
            return e.errno
        return 0

    held = Held(r, "settle", awaited)
    waits = Work(waited)
    deadline = time.monotonic() + 20
    while rig.metric(r, "open_files") < 3:  # theirs and that of the metrics
        assert time.monotonic() < deadline, "the two who wait have not opened their files"
        time.sleep(0.005)
    assert held.work.is_alive() and waits.is_alive(), "somebody did not wait for a branch that is being written"
    gone.rmdir()
    held.work.finish()
    assert waits.finish() == errno.ENOENT
    held.end()
    r.branch("gone")
    assert rig.wait_settled(gone) == "ready"
    r.guest.check_runs()
