"""Processes of a test: how they are told from all others, looked at and ended.

Every process that a test starts, however deep, has FORKFS_TEST_ID in its environment: that, and never a name, is what
selects the ones to end.
"""

import os
import select
import signal
import subprocess
import time

MARKER = "FORKFS_TEST_ID"


def marked(test_id):
    """The pids of all living processes that belong to a test, the caller left out."""
    wanted = f"{MARKER}={test_id}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as f:
                environment = f.read().split(b"\0")
        except OSError:
            continue
        if wanted in environment and alive(int(name)):
            found.append(int(name))
    return found


def stat_fields(pid):
    """The fields of /proc/PID/stat from the state on, or None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()
    except OSError:
        return None


def alive(pid):
    """True while the process runs or sleeps; a zombie does not live."""
    fields = stat_fields(pid)
    return fields is not None and fields[0] not in "ZX"


def describe(pid):
    """A process in words, for messages: its pid, command line, state and where it waits in the kernel."""
    fields = stat_fields(pid)
    texts = []
    for name in ("cmdline", "wchan"):
        try:
            with open(f"/proc/{pid}/{name}") as f:
                texts.append(f.read().replace("\0", " ").strip()[:120])
        except OSError:
            texts.append("?")
    return f"{pid} ({texts[0]}; state {fields[0] if fields else 'gone'}; in {texts[1]})"


def wait_gone(pid, timeout):
    """Wait until the process has ended; True if it has."""
    deadline = time.monotonic() + timeout
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll(max(0, (deadline - time.monotonic()) * 1000))
    finally:
        os.close(pidfd)
    return not alive(pid)


def kill(pids, timeout=10):
    """SIGKILL these processes and wait for their end; those that are still there are returned."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    deadline = time.monotonic() + timeout
    return [p for p in pids if not wait_gone(p, max(0.01, deadline - time.monotonic()))]


def stacks(pid):
    """The stacks of all threads of a process, as gdb tells them."""
    try:
        r = subprocess.run(
            ["gdb", "-q", "-batch", "-p", str(pid), "-ex", "set pagination off", "-ex", "thread apply all bt"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
        return r.stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"no stacks of {pid}: {e}\n"


def mounts_under(directory):
    """Mount points at or under a directory, the innermost first."""
    found = []
    with open("/proc/self/mountinfo") as f:
        for line in f:
            point = line.split()[4].encode().decode("unicode_escape")
            if point == directory or point.startswith(directory + "/"):
                found.append(point)
    return found[::-1]


def unmount_all(directory):
    """Detach every mount under a directory; the mount points that were found."""
    found = mounts_under(directory)
    for point in found:
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
    return found


def program(pid):
    """The name of the program that a process runs; empty for one that has ended."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return ""


def is_daemon(pid):
    """True for a forkfs daemon or one of its helpers, told by the program it runs."""
    return program(pid) == "forkfs"


def open_files(pid):
    """What each of a process's descriptors leads to, by its path in /proc; left out is what is closed meanwhile."""
    found = {}
    where = f"/proc/{pid}/fd"
    for name in os.listdir(where):
        try:
            found[f"{where}/{name}"] = os.readlink(f"{where}/{name}")
        except FileNotFoundError:
            pass
    return found


def protected(pid):
    """How many mappings of a process are registered for write protection."""
    with open(f"/proc/{pid}/smaps") as f:
        return sum(1 for line in f if line.startswith("VmFlags:") and " uw" in line)


def wait_free(pid, name, within):
    """Fail unless nothing of a process is registered within so many seconds, and no userfaultfd is left open in it."""
    deadline = time.monotonic() + within
    while protected(pid):
        assert time.monotonic() < deadline, f"{name} is still protected after {within} s"
        time.sleep(0.005)
    links = list(open_files(pid).values())
    assert "anon_inode:[userfaultfd]" not in links, links


def remove_cgroup(path):
    """Remove a control group in which nothing runs any more."""
    deadline = time.monotonic() + 20
    while True:
        try:
            path.rmdir()  # a process that has ended may be in it a moment longer
            return
        except OSError:
            assert time.monotonic() < deadline, (path / "cgroup.procs").read_text()
            time.sleep(0.01)
