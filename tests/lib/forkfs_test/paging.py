"""A host that needs its memory: swap, and what makes it use that."""

import ctypes
import os
import pathlib
import subprocess

from . import processes
from .case import Skip

BYTES = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
SYS_PROCESS_MADVISE, MADV_PAGEOUT = 440, 21
GROUPS = pathlib.Path("/sys/fs/cgroup")


def page_out(pid, start, size):
    """Page a part of a process's memory out, as a host without memory does."""
    pidfd = os.pidfd_open(pid)
    try:
        for at in range(start, start + size, 2 * BYTES):  # a call holds the mmap lock of the VMM, and who serves its faults waits for that
            where = (ctypes.c_size_t * 2)(at, 2 * BYTES)
            if libc.syscall(SYS_PROCESS_MADVISE, pidfd, where, ctypes.c_size_t(1), MADV_PAGEOUT, 0) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "MADV_PAGEOUT")
    finally:
        os.close(pidfd)


def swapped_out():
    """Pages that the host has written to swap since it started."""
    for line in pathlib.Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("pswpout "):
            return int(line.split()[1])
    return 0


def swap_on(case, mib):
    """Swap in compressed memory for the length of the test."""
    control = pathlib.Path("/sys/class/zram-control")
    try:
        number = (control / "hot_add").read_text().strip()
    except OSError as e:
        raise Skip(f"no zram to swap to: {e.strerror}") from e
    case.on_end(lambda: (control / "hot_remove").write_text(number))
    pathlib.Path(f"/sys/block/zram{number}/disksize").write_text(str(mib * BYTES))
    case.run("mkswap", f"/dev/zram{number}")
    case.run("swapon", f"/dev/zram{number}")
    case.on_end(lambda: subprocess.run(["swapoff", f"/dev/zram{number}"], check=True))


class Room:
    """A memory cgroup in which this test is from now on, with all it starts: reclaim() evicts them, and what they had the kernel read."""

    def __init__(self, case):
        old = (GROUPS / "memory/cgroup.procs").exists()
        if not old and "memory" not in self._read(GROUPS / "cgroup.subtree_control").split():
            raise Skip("no memory cgroup can be made")
        base = GROUPS / "memory" if old else GROUPS
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
        here = next(x.split(":", 2)[2] for x in lines if (":memory:" in x if old else x.startswith("0::")))
        self.before, self.path = base / here.lstrip("/"), base / case.dir.name
        self.path.mkdir()
        case.on_end(self._leave)
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        self.knob, self.word = (self.path / "memory.force_empty", "0") if old else (self.path / "memory.reclaim", "4G")

    @staticmethod
    def _read(path):
        return path.read_text() if path.exists() else ""

    def _leave(self):
        (self.before / "cgroup.procs").write_text(str(os.getpid()))
        processes.remove_cgroup(self.path)

    def reclaim(self):
        """Evict what can be evicted."""
        try:
            self.knob.write_text(self.word)
        except OSError:
            pass  # not all of it could be
