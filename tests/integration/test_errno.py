"""The errno matrix: every operation on every kind of node, the errno that it must fail with, and nothing else.

The table below is the contract: a row is an operation, a column a kind of node. All of it is done twice on each mount: an
operation that was answered ENOSYS once is never asked for again by the kernel, and would answer something else the second time.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import time

from forkfs_test import rig
from forkfs_test.calls import call, mapped, opened

TIMEOUT = {"test_matrix": 240, "test_matrix_without_passthrough": 240}

# What the words of the table mean: 0 works; - is not asked here; EINTR: it waits, and a signal ends it; busy: EBUSY while a branch is
# in flight; sync: it waits for a branch in flight. ENOTSUP is EOPNOTSUPP.
# Columns: root, .forkfs or another directory of the daemon's, branches/, a branch's directory (the same in flight), a small text
# file, events, ctl, memory.bin (settled, branch/ or in flight), vmstate, manifest.json (settled; in flight), wait (settled; in flight).
TABLE = """
                   root    dir     branches branch  flying  text    events  ctl     memory  vmstate manifest writing wait    waiting
open_rdonly        0       0       0        0       0       0       0       0       0       0       0        0       0       0
open_nonblock      0       0       0        0       0       0       0       0       0       0       0        0       0       0
open_direct        EINVAL  EINVAL  EINVAL   EINVAL  EINVAL  0       0       0       0       0       0        0       0       0
open_path          0       0       0        0       0       0       0       0       0       0       0        0       0       0
open_append        EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  EPERM   EPERM   0       EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
open_wronly        EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  EPERM   EPERM   0       EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
open_rdwr          EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  EPERM   EPERM   0       0       0       EPERM    EPERM   EPERM   EPERM
open_trunc         EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  EPERM   EPERM   0       EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
open_creat         EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  0       0       0       0       0       0        0       0       0
open_creat_excl    EEXIST  EEXIST  EEXIST   EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST   EEXIST  EEXIST  EEXIST
open_directory     0       0       0        0       0       ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
open_tmpfile       ENOTSUP ENOTSUP ENOTSUP  ENOTSUP ENOTSUP ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
open_below         ENOENT  ENOENT  ENOENT   ENOENT  ENOENT  ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
create_below       EPERM   EPERM   EPERM    EPERM   EPERM   ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
mknod_below        EPERM   EPERM   EPERM    EPERM   EPERM   ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
read               EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  0       EINTR   0       0       0       0        EINTR   0       EINTR
read_nonblock      EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  0       EAGAIN  0       0       0       0        EAGAIN  0       EAGAIN
read_after_eof     EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  0       ESPIPE  ESPIPE  0       0       0        EINTR   0       EINTR
read_rw_handle     -       -       -        -       -       -       -       EINVAL  0       0       -        -       -       -
write_ro           EBADF   EBADF   EBADF    EBADF   EBADF   EBADF   EBADF   EBADF   EBADF   EBADF   EBADF    EBADF   EBADF   EBADF
write_rw           -       -       -        -       -       -       -       0       EPERM   EPERM   -        -       -       -
pwrite_rw          -       -       -        -       -       -       -       ESPIPE  EPERM   EPERM   -        -       -       -
truncate           EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  EPERM   EPERM   0       EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
ftruncate_ro       EINVAL  EINVAL  EINVAL   EINVAL  EINVAL  EINVAL  EINVAL  EINVAL  EINVAL  EINVAL  EINVAL   EINVAL  EINVAL  EINVAL
ftruncate_rw       -       -       -        -       -       -       -       0       EPERM   EPERM   -        -       -       -
fallocate_ro       EBADF   EBADF   EBADF    EBADF   EBADF   EBADF   EBADF   EBADF   EBADF   EBADF   EBADF    EBADF   EBADF   EBADF
fallocate_rw       -       -       -        -       -       -       -       EPERM   EPERM   EPERM   -        -       -       -
punch_hole_rw      -       -       -        -       -       -       -       EPERM   EPERM   EPERM   -        -       -       -
mmap_shared_rw_ro  EACCES  EACCES  EACCES   EACCES  EACCES  EACCES  EACCES  EACCES  EACCES  EACCES  EACCES   EACCES  EACCES  EACCES
mmap_shared_rw     -       -       -        -       -       -       -       ENODEV  ENODEV  ENODEV  -        -       -       -
mmap_private       ENODEV  ENODEV  ENODEV   ENODEV  ENODEV  0       0       0       0       0       0        0       0       0
mmap_private_rw    -       -       -        -       -       -       -       0       0       0       -        -       -       -
link               EPERM   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
symlink_below      EPERM   EPERM   EPERM    EPERM   EPERM   ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
symlink_over       EEXIST  EEXIST  EEXIST   EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST   EEXIST  EEXIST  EEXIST
readlink           EINVAL  EINVAL  EINVAL   EINVAL  EINVAL  EINVAL  EINVAL  EINVAL  EINVAL  EINVAL  EINVAL   EINVAL  EINVAL  EINVAL
rename             EBUSY   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
rename_outside     EBUSY   EXDEV   EXDEV    EXDEV   EXDEV   EXDEV   EXDEV   EXDEV   EXDEV   EXDEV   EXDEV    EXDEV   EXDEV   EXDEV
unlink             EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
mkdir              EEXIST  EEXIST  EEXIST   EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST  EEXIST   EEXIST  EEXIST  EEXIST
mkdir_below        EPERM   EPERM   EINVAL   EPERM   EPERM   ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
rmdir              EBUSY   EPERM   EPERM    -       -       ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
chmod              EPERM   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
fchmod             EPERM   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
chown              EPERM   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
utimens            EPERM   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   0       EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
stat               0       0       0        0       0       0       0       0       0       0       0        0       0       0
access             0       0       0        0       0       0       0       0       0       0       0        0       0       0
statfs             0       0       0        0       0       0       0       0       0       0       0        0       0       0
listdir            0       0       0        0       0       ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR ENOTDIR  ENOTDIR ENOTDIR ENOTDIR
setxattr           ENOTSUP ENOTSUP ENOTSUP  ENOTSUP ENOTSUP ENOTSUP ENOTSUP ENOTSUP ENOTSUP ENOTSUP ENOTSUP  ENOTSUP ENOTSUP ENOTSUP
setxattr_error     EPERM   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
getxattr           ENODATA ENODATA ENODATA  ENODATA ENODATA ENODATA ENODATA ENODATA ENODATA ENODATA ENODATA  ENODATA ENODATA ENODATA
listxattr          0       0       0        0       0       0       0       0       0       0       0        0       0       0
removexattr        ENODATA ENODATA ENODATA  ENODATA ENODATA ENODATA ENODATA ENODATA ENODATA ENODATA ENODATA  ENODATA ENODATA ENODATA
removexattr_error  EPERM   EPERM   EPERM    EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM   EPERM    EPERM   EPERM   EPERM
seek_data          -       -       -        -       -       ENXIO   ESPIPE  ESPIPE  0       0       0        ENXIO   ENXIO   ENXIO
seek_hole          -       -       -        -       -       ENXIO   ESPIPE  ESPIPE  0       0       0        ENXIO   ENXIO   ENXIO
seek_data_at_end   -       -       -        -       -       ENXIO   ESPIPE  ESPIPE  ENXIO   ENXIO   ENXIO    ENXIO   ENXIO   ENXIO
copy_range_into_ro EISDIR  EISDIR  EISDIR   EISDIR  EISDIR  EBADF   EBADF   EBADF   EBADF   EBADF   EBADF    EBADF   EBADF   EBADF
copy_range_into_rw -       -       -        -       -       -       -       EPERM   EPERM   EPERM   -        -       -       -
flock              0       0       0        0       0       0       0       0       0       0       0        0       0       0
lock_read          0       0       0        0       0       0       0       0       0       0       0        0       0       0
lock_write_ro      EBADF   EBADF   EBADF    EBADF   EBADF   EBADF   EBADF   EBADF   EBADF   EBADF   EBADF    EBADF   EBADF   EBADF
poll               0       0       0        0       0       0       0       0       0       0       0        0       0       0
fsync              0       0       busy     0       EBUSY   0       0       0       sync    sync    0        EINTR   0       0
fdatasync          0       0       busy     0       EBUSY   0       0       0       sync    sync    0        EINTR   0       0
ioctl              ENOTTY  ENOTTY  ENOTTY   ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY   ENOTTY  ENOTTY  ENOTTY
ioctl_getflags     ENOTTY  ENOTTY  ENOTTY   ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY  ENOTTY   ENOTTY  ENOTTY  ENOTTY
"""
# A call that waits is sent a signal after so long, and must have ended a second later.
PATIENCE, PROMPT = 0.15, 1.0
FS_IOC_GETFLAGS, TCGETS, FALLOC_FL_PUNCH_HOLE = 0x80086601, 0x5401, 3


def with_fd(function, flags=os.O_RDONLY):
    """An operation on an open file."""
    def operation(path):
        with opened(path, flags) as fd:
            function(fd)
    return operation


def an_open(flags, mode=0o600):
    """open(2) with these flags."""
    return lambda path: os.close(os.open(path, flags, mode))


def below(function):
    """An operation on a new name in the directory; this name is no good one for a branch either."""
    return lambda path: function(path / ".new")


def map_it(access):
    """A mapping of the first page."""
    flags, prot = {"shared": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
                   "private": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)}[access]

    def operation(fd):
        with mapped(fd, prot, flags):
            pass
    return operation


def poll_it(fd):
    """poll(2) without waiting."""
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLOUT)
    assert not any(revents & select.POLLNVAL for _, revents in poller.poll(0))


class Operations:
    """The rows of the table by their names."""

    def __init__(self, source, outside):
        def copy(fd):
            os.copy_file_range(source, fd, 4096, 0)

        rw, ro = os.O_RDWR, os.O_RDONLY
        self.of = {
            "open_rdonly": an_open(ro), "open_nonblock": an_open(ro | os.O_NONBLOCK), "open_direct": an_open(ro | os.O_DIRECT),
            "open_path": an_open(os.O_PATH), "open_append": an_open(os.O_WRONLY | os.O_APPEND),
            "open_wronly": an_open(os.O_WRONLY), "open_rdwr": an_open(rw), "open_trunc": an_open(os.O_WRONLY | os.O_TRUNC),
            "open_creat": an_open(os.O_CREAT), "open_creat_excl": an_open(os.O_CREAT | os.O_EXCL | rw),
            "open_directory": an_open(os.O_DIRECTORY), "open_tmpfile": an_open(os.O_TMPFILE | rw),
            "open_below": below(an_open(ro)), "create_below": below(an_open(os.O_CREAT | rw)),
            "mknod_below": below(lambda p: os.mknod(p, 0o600 | 0o010000)),
            "read": with_fd(lambda fd: os.read(fd, 4096)),
            "read_nonblock": with_fd(lambda fd: os.read(fd, 4096), os.O_NONBLOCK),
            "read_after_eof": with_fd(lambda fd: os.pread(fd, 4096, 1 << 40)),
            "read_rw_handle": with_fd(lambda fd: os.read(fd, 4096), rw),
            "write_ro": with_fd(lambda fd: os.write(fd, b" ")), "write_rw": with_fd(lambda fd: os.write(fd, b" "), rw),
            "pwrite_rw": with_fd(lambda fd: os.pwrite(fd, b" ", 8192), rw),
            "truncate": lambda p: os.truncate(p, 0),
            "ftruncate_ro": with_fd(lambda fd: os.ftruncate(fd, 0)), "ftruncate_rw": with_fd(lambda fd: os.ftruncate(fd, 0), rw),
            "fallocate_ro": with_fd(lambda fd: os.posix_fallocate(fd, 0, 4096)),
            "fallocate_rw": with_fd(lambda fd: call("fallocate64", fd, 0, ctypes.c_long(0), ctypes.c_long(4096)), rw),
            "punch_hole_rw": with_fd(
                lambda fd: call("fallocate64", fd, FALLOC_FL_PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(4096)), rw),
            "mmap_shared_rw_ro": with_fd(map_it("shared")), "mmap_shared_rw": with_fd(map_it("shared"), rw),
            "mmap_private": with_fd(map_it("private")), "mmap_private_rw": with_fd(map_it("private"), rw),
            "link": lambda p: os.link(p, outside[0] / "link"), "symlink_below": below(lambda p: os.symlink("x", p)),
            "symlink_over": lambda p: os.symlink("x", p), "readlink": os.readlink,
            "rename": lambda p: os.rename(p, (outside[0] if p.parent.name == "branches" else p.parent) / "renamed"),
            "rename_outside": lambda p: os.rename(p, outside[1] / "renamed"),
            "unlink": lambda p: call("unlink", os.fsencode(p)), "mkdir": os.mkdir, "mkdir_below": below(os.mkdir),
            "rmdir": os.rmdir, "chmod": lambda p: os.chmod(p, 0o777), "fchmod": with_fd(lambda fd: os.fchmod(fd, 0o777)),
            "chown": lambda p: os.chown(p, 1, 1), "utimens": lambda p: os.utime(p, (1, 1)), "stat": os.stat,
            "access": lambda p: call("access", os.fsencode(p), os.R_OK), "statfs": os.statvfs, "listdir": os.listdir,
            "setxattr": lambda p: os.setxattr(p, "user.x", b"y"),
            "setxattr_error": lambda p: os.setxattr(p, "user.forkfs.error", b"y"),
            "getxattr": lambda p: os.getxattr(p, "user.x"), "listxattr": os.listxattr,
            "removexattr": lambda p: os.removexattr(p, "user.x"),
            "removexattr_error": lambda p: os.removexattr(p, "user.forkfs.error"),
            "seek_data": with_fd(lambda fd: os.lseek(fd, 0, os.SEEK_DATA)),
            "seek_hole": with_fd(lambda fd: os.lseek(fd, 0, os.SEEK_HOLE)),
            "seek_data_at_end": with_fd(lambda fd: os.lseek(fd, 1 << 40, os.SEEK_DATA)),
            "copy_range_into_ro": with_fd(copy), "copy_range_into_rw": with_fd(copy, rw),
            "flock": with_fd(lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)),
            "lock_read": with_fd(lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)),
            "lock_write_ro": with_fd(lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)),
            "poll": with_fd(poll_it), "fsync": with_fd(os.fsync), "fdatasync": with_fd(os.fdatasync),
            "ioctl": with_fd(lambda fd: fcntl.ioctl(fd, TCGETS, b"\0" * 64)),
            "ioctl_getflags": with_fd(lambda fd: fcntl.ioctl(fd, FS_IOC_GETFLAGS, b"\0" * 8)),
        }


def interrupted(number, frame):
    """The signal of a call that waits: it must not be tried again by Python."""
    raise OSError(errno.EINTR, "interrupted by the test")


def outcome(operation, path):
    """0 or the errno's name; a call that waits is interrupted, and must end promptly."""
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    try:
        operation(path)
        result = "0"
    except OSError as e:
        result = errno.errorcode.get(e.errno, str(e.errno))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - start
    assert result != "EINTR" or seconds < PATIENCE + PROMPT, f"{path}: a signal ended it after {seconds:.2f} s only"
    return result


def rows():
    """The table as {operation: {column: outcome}}."""
    lines = [line.split() for line in TABLE.strip().splitlines()]
    columns = lines[0]
    assert all(len(line) == len(columns) + 1 for line in lines[1:]), "a row of the table has too few columns"
    return {line[0]: dict(zip(columns, line[1:])) for line in lines[1:]}


def check(operations, nodes, flying):
    """Do every operation on every node; what differs from the table."""
    wrong = []
    for name, expected in rows().items():
        for path, column in nodes:
            # what depends on whether a branch is in flight
            want = {"busy": "EBUSY" if flying else "0"}.get(expected[column], expected[column])
            if want == "sync":
                want = "EINTR" if "flying" in path.parts else "0"
            if want == "-":
                continue
            try:
                got = outcome(operations.of[name], path)
            except AssertionError as e:
                got = str(e)
            if got != want:
                wrong.append(f"{name} {path}: {got}, should be {want}")
    return wrong


def nodes_of(r, flying):
    """Every kind of node with its column of the table."""
    m, s = r.mount.path, r.sandbox
    meta, live, keyed, b1 = m / ".forkfs", s / "branch", s / "branch@key", s / "branches/b1"
    nodes = [(m, "root"), (meta, "dir"), (s, "dir"), (s / "branches", "branches"), (live, "dir"), (keyed, "dir"),
             (b1, "branch"), (meta / "version", "text"), (meta / "capabilities", "text"), (meta / "metrics", "text"),
             (meta / "events", "events"), (meta / "ctl", "ctl"), (s / "status", "text"), (s / "state", "text"), (s / "ctl", "ctl"),
             (b1 / "status", "text"), (b1 / "state", "text"), (b1 / "wait", "wait")]
    for d in (live, keyed, b1):
        nodes += [(d / "memory.bin", "memory"), (d / "vmstate", "vmstate"), (d / "manifest.json", "manifest")]
    if flying:
        f = s / "branches/flying"
        nodes.remove((s, "dir"))  # its fsync says EBUSY now
        nodes += [(f, "flying"), (f / "memory.bin", "memory"), (f / "vmstate", "vmstate"), (f / "manifest.json", "writing"),
                  (f / "status", "text"), (f / "state", "text"), (f / "wait", "waiting")]
    return nodes


def still_works(case, r):
    """What an ENOSYS would have ended for good: sync, the sentence, lseek, xattrs; and the guest."""
    b1 = r.sandbox / "branches/b1"
    case.run("sync", b1 / "memory.bin", b1 / "vmstate")
    assert outcome(os.mkdir, b1) == "EEXIST"
    assert outcome(lambda p: os.mkdir(p / "a b"), b1.parent) == "EINVAL"
    assert "a b" in r.mount.error_of(b1.parent)
    assert "user.forkfs.error" in os.listxattr(b1.parent)
    with opened(b1 / "memory.bin") as fd:
        assert os.lseek(fd, 0, os.SEEK_HOLE) == os.fstat(fd).st_size
    assert (b1 / "wait").read_text() == "ready\n"
    assert json.loads((r.sandbox / "status").read_text())["state"] == "running"
    r.guest.check_runs()


def matrix(case, options):
    """The whole table, twice, on a mount with these options; then again with a branch in flight."""
    signal.signal(signal.SIGALRM, interrupted)
    r = rig.Rig(case, mib=128, options=f"branch-rate=0,{options}".rstrip(","))
    b1 = r.branch("b1")
    assert rig.wait_settled(b1) == "ready"
    for live in ("branch", "branch@key"):  # held open, so that its generation is one for the whole test
        keep = os.open(r.sandbox / live / "memory.bin", os.O_RDONLY)
        case.on_end(lambda fd=keep: os.close(fd))
        (r.sandbox / live / "manifest.json").read_bytes()
    source = os.open(b1 / "memory.bin", os.O_RDONLY)
    case.on_end(lambda: os.close(source))
    before = (b1 / "memory.bin").read_bytes()
    operations = Operations(source, (r.sandbox, case.dir))
    missing = set(rows()) ^ set(operations.of)
    assert not missing, f"operations and rows do not match: {missing}"

    wrong = []
    for i in (1, 2):
        wrong += [f"pass {i}: {w}" for w in check(operations, nodes_of(r, False), False)]
    print(*wrong, sep="\n")
    still_works(case, r)
    release = case.dir / "settle"
    case.on_end(release.touch)
    r.mount.faults(f"settle@1 hold:{release}")
    flying = r.branch("flying")
    wrong += [f"in flight: {w}" for w in check(operations, nodes_of(r, True), True)]
    assert outcome(with_fd(os.fsync), r.sandbox) == "EBUSY"
    assert rig.state(flying) == "writing", "the branch was not held in flight"
    release.touch()
    assert rig.wait_settled(flying) == "ready", (flying / "status").read_text()
    r.mount.faults()
    still_works(case, r)
    assert (b1 / "memory.bin").read_bytes() == before
    print(*(w for w in wrong if w.startswith("in flight")), sep="\n")
    assert not wrong, f"{len(wrong)} operations end otherwise than the table says"


def test_matrix(case):
    """As it is mounted by default: ready branches by passthrough where the kernel has it."""
    matrix(case, "")


def test_matrix_without_passthrough(case):
    """Ready branches from the page cache."""
    matrix(case, "passthrough=off")


def test_failed_branch(case):
    """A branch that failed says EIO wherever its bytes are asked for, and its reason; the rest of it can be read."""
    signal.signal(signal.SIGALRM, interrupted)
    r = rig.Rig(case, mib=128)
    r.mount.faults("settle@1 error:EIO")
    b = r.branch("bad")
    assert rig.wait_settled(b) == "failed"
    for name in ("memory.bin", "vmstate", "manifest.json"):
        assert outcome(an_open(os.O_WRONLY), b / name) == "EPERM", name
        assert outcome(an_open(os.O_RDONLY), b / name) == "EIO", name
        assert "cannot settle" in r.mount.error_of(b), r.mount.error_of(b)
        assert outcome(os.stat, b / name) == "0", name
    assert outcome(with_fd(lambda fd: os.read(fd, 100)), b / "wait") == "EIO"
    assert outcome(with_fd(os.fsync), b) == "EIO"
    with opened(b / "wait") as fd:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        assert poller.poll(0)[0][1] == select.POLLIN | select.POLLERR
    assert json.loads((b / "status").read_text())["error"]
    os.rmdir(b)
    assert outcome(os.stat, b) == "ENOENT"
    r.mount.faults()
    assert rig.wait_settled(r.branch("bad")) == "ready"


def test_detached_sandbox(case):
    """A sandbox that is there for its branches has no VM: ESRCH, and no branch/."""
    r = rig.Rig(case, mib=128)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    live = os.open(r.sandbox / "branch", os.O_RDONLY | os.O_DIRECTORY)
    r.mount.run("detach", "sbx1")
    assert outcome(os.listdir, r.sandbox / "branch") == "ENOENT"
    assert outcome(os.stat, r.sandbox / "branch@x") == "ENOENT"
    assert outcome(lambda p: os.close(os.open("memory.bin", os.O_RDONLY, dir_fd=live)), r.sandbox) in ("ESRCH", "ENOENT")
    os.close(live)
    assert outcome(os.mkdir, r.sandbox / "branches/b2") == "ESRCH"
    assert "detached" in r.mount.error_of(r.sandbox / "branches")
    assert (r.sandbox / "state").read_text() == "detached\n"
    with opened(r.sandbox / "ctl", os.O_RDWR) as fd:
        assert outcome(lambda p: os.write(fd, b'{"branch":{"name":"b2"}}'), "ctl") == "ESRCH"
        assert json.loads(os.read(fd, 4096))["code"] == "ESRCH"
    case.run("sync", r.sandbox / "branches/b1/memory.bin")
    os.rmdir(r.sandbox / "branches/b1")
    deadline = time.monotonic() + 30
    while outcome(os.stat, r.sandbox) == "0":
        assert time.monotonic() < deadline, "a detached sandbox without branches is still there"
        time.sleep(0.02)
