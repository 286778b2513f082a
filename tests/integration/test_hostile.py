"""Clients that are careless, many, hostile or dead: no byte of a branch changes, nothing is left of them, and each can be stopped."""

import collections
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import pathlib
import random
import re
import select
import signal
import struct
import time

from forkfs_test import processes, rig
from forkfs_test.calls import call, errno_of, mapped, opened

TIMEOUT = {"test_unchanged": 180, "test_unchanged_without_passthrough": 180, "test_many_clients": 180, "test_ten_thousand_opens": 180,
           "test_killed_clients": 180}
MIB = 1 << 20
# A signal ends whoever waits within a second, or never where that is broken: the rest is for the machine, which may be busy.
PROMPT = 5.0


# ---- what the attacks are made of


def write_shared(fd):
    """Write through a shared mapping."""
    for flags in (mmap.MAP_SHARED, 0x3):  # the second is MAP_SHARED_VALIDATE
        with mapped(fd, mmap.PROT_READ | mmap.PROT_WRITE, flags) as at:
            ctypes.memmove(at, b"evil", 4)


def write_protected(fd):
    """Make a shared read-only mapping writable."""
    with mapped(fd, mmap.PROT_READ, mmap.MAP_SHARED) as at:
        call("mprotect", ctypes.c_void_p(at), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memmove(at, b"evil", 4)


def write_by_mem(fd):
    """Write through /proc/self/mem, which passes by the protection of a mapping."""
    with mapped(fd, mmap.PROT_READ, mmap.MAP_SHARED) as at, opened("/proc/self/mem", os.O_RDWR) as mem:
        os.pwrite(mem, b"evil", at)


def remove_pages(fd):
    """Punch a hole by madvise."""
    with mapped(fd, mmap.PROT_READ, mmap.MAP_SHARED) as at:
        call("madvise", ctypes.c_void_p(at), ctypes.c_size_t(4096), 9)  # MADV_REMOVE


def through_map_files(fd):
    """Open what the kernel has behind a mapping."""
    with mapped(fd, mmap.PROT_READ, mmap.MAP_PRIVATE) as at, \
            opened(f"/proc/self/map_files/{at:x}-{at + 4096:x}", os.O_RDWR) as again:
        os.pwrite(again, b"evil", 0)


def into_pipe(fd):
    """Splice bytes from a pipe into the file."""
    r, w = os.pipe()
    try:
        os.write(w, b"evil" * 1024)
        os.splice(r, fd, 4096, offset_dst=0)
    finally:
        os.close(r)
        os.close(w)


def direct_write(path):
    """Write past the page cache."""
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
        os.pwritev(fd, [mmap.mmap(-1, 4096)], 0)


def reopened(flags, function):
    """Open a read-only handle again through /proc/self/fd."""
    def attack(fd):
        with opened(f"/proc/self/fd/{fd}", flags) as again:
            function(again)
    return attack


def overwrite(fd):
    """Write bytes that are surely not there."""
    os.pwrite(fd, b"evil" * 1024, 0)


def fallocate(mode):
    """fallocate(2) with this mode."""
    return lambda fd: call("fallocate64", fd, mode, ctypes.c_long(0), ctypes.c_long(65536))


def set_flags(fd):
    """FS_IOC_SETFLAGS."""
    fcntl.ioctl(fd, 0x40086602, struct.pack("l", 0))


def attacks(evil):
    """Every way to change an open file, as (name, on a handle, function). `evil` is a file with other bytes on the same machine."""
    handles = {
        "pwrite": overwrite, "pwrite at the end": lambda fd: os.pwrite(fd, b"evil", os.fstat(fd).st_size),
        "write": lambda fd: os.write(fd, b"evil"), "writev": lambda fd: os.writev(fd, [b"evil", b"evil"]),
        "ftruncate": lambda fd: os.ftruncate(fd, 0), "grow": lambda fd: os.ftruncate(fd, 1 << 40),
        "allocate": fallocate(0), "punch": fallocate(3), "zero": fallocate(0x10), "collapse": fallocate(8), "insert": fallocate(0x20),
        "MAP_SHARED": write_shared, "mprotect": write_protected, "/proc/self/mem": write_by_mem, "MADV_REMOVE": remove_pages,
        "map_files": through_map_files, "splice": into_pipe, "sendfile": lambda fd: os.sendfile(fd, evil, 0, 4096),
        "copy_file_range": lambda fd: os.copy_file_range(evil, fd, 4096, 0, 0), "FICLONE": lambda fd: fcntl.ioctl(fd, 0x40049409, evil),
        "FS_IOC_SETFLAGS": set_flags, "F_ADD_SEALS": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10),
        "reopen to write": reopened(os.O_WRONLY, overwrite), "reopen": reopened(os.O_RDWR, overwrite),
        "reopen and map": reopened(os.O_RDWR, write_shared), "reopen and punch": reopened(os.O_RDWR, fallocate(3)),
        "reopen and truncate": reopened(os.O_RDWR | os.O_TRUNC, overwrite), "fchmod": lambda fd: os.fchmod(fd, 0o777),
        "fsetxattr": lambda fd: os.setxattr(fd, "user.evil", b"x"),
    }
    paths = {
        "truncate": lambda p: os.truncate(p, 0), "O_TRUNC": lambda p: os.close(os.open(p, os.O_RDWR | os.O_TRUNC)),
        "O_WRONLY": lambda p: os.close(os.open(p, os.O_WRONLY)), "O_DIRECT": direct_write, "utime": lambda p: os.utime(p, (1, 1)),
        "unlink": os.unlink, "rename": lambda p: os.rename(p, f"{p}.evil"), "chmod": lambda p: os.chmod(p, 0o777),
        "O_CREAT": lambda p: os.close(os.open(p, os.O_CREAT | os.O_EXCL | os.O_RDWR)),
    }
    return handles, paths


def attack_file(path, handles, paths):
    """Try everything on a file; the names of what was not refused."""
    done = [f"{name} {path}" for name, function in paths.items() if errno_of(function, path) == 0]
    for flags, how in ((os.O_RDONLY, "O_RDONLY"), (os.O_RDWR, "O_RDWR"), (os.O_RDWR | os.O_APPEND, "O_APPEND")):
        for name, function in handles.items():
            try:
                fd = os.open(path, flags)
            except OSError as e:
                assert flags != os.O_RDONLY and e.errno == errno.EPERM, f"{how} {path}: {e}"
                break
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, fd)
                if errno_of(function, fd) == 0:
                    done.append(f"{name} ({how}) {path}")
                else:
                    assert os.pread(fd, 4, 0) != b"evil", f"{name} ({how}) {path} was refused and has changed the file"
    # what a private mapping has written is its own
    with opened(path) as fd, mapped(fd, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE) as at:
        ctypes.memmove(at, b"evil", 4)
    return done


def digests(path):
    """The hash of a file, once by read, once through a mapping, once through a handle that could write, where there may be one."""
    with opened(path) as fd, open(fd, "rb", closefd=False) as f:
        found = [hashlib.file_digest(f, "sha1").hexdigest()]
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as m:
            found.append(hashlib.sha1(m).hexdigest())
    if errno_of(lambda: os.close(os.open(path, os.O_RDWR))) == 0:
        with open(path, "r+b", buffering=0) as f:
            found.append(hashlib.file_digest(f, "sha1").hexdigest())
    assert len(set(found)) == 1, f"{path} is different through different handles: {found}"
    return found[0]


def unchanged(case, options):
    """Attack every file of settled, live and in-flight branches; hashes before and after."""
    r = rig.Rig(case, mib=128, options=f"branch-rate=0,{options}".rstrip(","))
    evil = os.open(case.dir / "evil", os.O_RDWR | os.O_CREAT)
    case.on_end(lambda: os.close(evil))
    os.write(evil, b"evil" * 16384)
    settled = r.branch("b1")
    assert rig.wait_settled(settled) == "ready"
    for live in ("branch", "branch@key"):
        fd = os.open(r.sandbox / live / "memory.bin", os.O_RDONLY)
        case.on_end(lambda fd=fd: os.close(fd))
        (r.sandbox / live / "manifest.json").read_bytes()
    release = case.dir / "settle"
    case.on_end(release.touch)
    r.mount.faults(f"settle@1 hold:{release}")
    flying = r.branch("flying")
    names = ("memory.bin", "vmstate", "manifest.json")
    files = [d / n for d in (settled, r.sandbox / "branch", r.sandbox / "branch@key") for n in names]
    files += [flying / "memory.bin", flying / "vmstate"]
    old = [os.open(p, os.O_RDONLY) for p in files]  # handles that saw all of it
    for fd in old:
        case.on_end(lambda fd=fd: os.close(fd))
    before = {p: digests(p) for p in files}
    handles, paths = attacks(evil)
    done = []
    for path in files:
        done += attack_file(path, handles, paths)
    small = [p for d in (r.mount / ".forkfs", r.sandbox, settled, flying) for p in d.iterdir()
             if p.name in ("version", "capabilities", "metrics", "status", "state")]
    for path in small:
        with opened(path) as fd:
            done += [f"{name} {path}" for name, f in paths.items() if errno_of(f, path) == 0]
            done += [f"{name} {path}" for name, f in handles.items() if errno_of(f, fd) == 0]
    assert not done, f"not refused: {done}"
    assert {p: digests(p) for p in files} == before, "a branch has changed"
    assert rig.state(flying) == "writing", "the branch was not held in flight"
    release.touch()
    assert rig.wait_settled(flying) == "ready", (flying / "status").read_text()
    r.mount.faults()
    assert {p: digests(p) for p in files} == before, "a branch has changed when it settled"
    for path in files:
        done += attack_file(path, handles, paths)
    assert not done, f"not refused when settled: {done}"
    assert {p: digests(p) for p in files} == before, "a branch has changed"
    for path, fd in zip(files, old):
        with open(fd, "rb", closefd=False) as f:
            assert hashlib.file_digest(f, "sha1").hexdigest() == before[path], f"an old handle of {path} reads something else"
    r.guest.check_runs()


def test_unchanged(case):
    """As it is mounted by default."""
    unchanged(case, "")


def test_unchanged_without_passthrough(case):
    """Ready branches from the page cache."""
    unchanged(case, "passthrough=off")


# ---- garbage


def transact(path, data):
    """Write bytes to a ctl, then read: (errno of the write, errno of the read, answer)."""
    with opened(path, os.O_RDWR) as fd:
        wrote, left = 0, memoryview(data)
        try:
            while left:
                left = left[os.write(fd, left[:65536]):]
        except OSError as e:
            wrote = e.errno
        try:
            return wrote, 0, os.read(fd, 1 << 20)
        except OSError as e:
            return wrote, e.errno, b""


def garbage():
    """Requests that are none, with the errno of their refusal; None: they are incomplete."""
    def named(value):
        return json.dumps({"branch": {"name": value}}).encode()

    bad = [named(v) for v in (1, 1.5, None, True, [], {}, [["b"]], {"name": "b"}, "", ".", "..", "a/b", "a b", ".hidden", "x" * 65,
                              "x" * 100000, "a\0b", "\u00e9", "\n", "b\n", "%n%s", "branch@x", "*")]
    # a number ends only with what follows it
    bad += [json.dumps(v).encode() + b"\n" for v in (
        [], [{"branch": {"name": "b"}}], "branch", "", 17, None, True, {}, {"branch": None}, {"branch": []}, {"branch": "b"},
        {"branch": {}}, {"Branch": {"name": "b"}}, {"branch": {"name": "b"}, "detach": {"name": "b"}}, {"nonsense": {}},
        {"branch": {"name": "b", "nonsense": 1}}, {"branch": {"name": "b", "wait": "yes"}}, {"branch": {"name": "b", "wait": 1}},
        {"branch": {"name": "b", "mode": 1}}, {"branch": {"name": "b", "mode": "quick"}}, {"branch": {"name": "b", "store": []}},
        {"branch": {"name": "b", "\0": 1}}, {"": {}}, {"x" * 100000: {}}, {"attach": {"name": "b", "pid": 1}}, {"shutdown": {}})]
    bad += [b'{"branch":{"name":"b"}}{"branch":{"name":"c"}}', b'{"branch":{"name":"b"}} x', b"{'branch':{'name':'b'}}", b"}", b"nonsense",
            b'{"branch":{"name":"\xff\xfe"}}', b'{"branch":{"name":"b",}}', b'{"branch":{"name":b}}', b"\0", b'{"branch"\0:{"name":"b"}}',
            b"[" * 100000, b'{"branch":' * 10000, b'{"branch":{"name":"\\ud800"}}', b"\xef\xbb\xbf{}", b'{"branch":{"name":"\\u0000"}}']
    pairs = [(data, (errno.EINVAL,)) for data in bad]
    pairs += [(b'{"branch":{"name":"' + b"x" * (300 << 10), (errno.EFBIG,)),
              (b'{"branch":{"name":"b","x":[' + b"1," * 200000, (errno.EFBIG,)),
              (b'{"branch":{"name":"b","store":"packed"}}', (errno.EOPNOTSUPP,))]
    pairs += [(data, None) for data in (b"", b"{", b'{"branch"', b'{"branch":{"name":"b"}', b" \n\t ", b"[[[[")]
    return pairs


def test_garbage(case):
    """Requests that are none, in one write, byte by byte and at random: refused with a sentence, and nothing comes of them."""
    r = rig.Rig(case, mib=128)
    for path in (r.sandbox / "ctl", r.mount / ".forkfs/ctl"):
        meta = path.parent.name == ".forkfs"
        for data, codes in garbage():
            if meta and (b"shutdown" in data or codes == (errno.EOPNOTSUPP,)):
                continue
            if meta and data.startswith(b'{"attach'):
                codes = None if codes is None else (0,)  # admitted, then it fails
            wrote, got, answer = transact(path, data)
            shown = data[:60]
            if codes is None:
                assert (wrote, got) == (0, errno.EINVAL), f"{shown}: {wrote}, {got}"
                continue
            assert wrote in codes and got == 0, f"{shown}: write: errno {wrote}, read: errno {got} {answer[:200]}"
            said = json.loads(answer)
            assert said["error"] and getattr(errno, said["code"]) == said["errno"] and wrote in (0, said["errno"]), answer
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    whole = b'{"branch":{"name":"fuzz","mode":"live","wait":true}}'
    for _ in range(300):
        data = bytearray(whole if chance.random() < 0.7 else chance.randbytes(chance.randrange(1, 2000)))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        transact(r.sandbox / "ctl", bytes(data))
        for name in os.listdir(r.sandbox / "branches"):  # some are a good request still
            os.rmdir(r.sandbox / "branches" / name)
    with opened(r.sandbox / "ctl", os.O_RDWR) as fd:
        for i in range(len(whole)):
            os.write(fd, whole[i:i + 1])
        assert json.loads(os.read(fd, 65536))["branch"]["name"] == "fuzz"
        assert errno_of(os.write, fd, whole) == errno.EBUSY
    assert sorted(os.listdir(r.mount.path)) == [".forkfs", "sbx1"]
    assert os.listdir(r.sandbox / "branches") == ["fuzz"]
    r.guest.check_runs()


def test_odd_names(case):
    """Names against the rule are refused wherever one can be given, and looking for them finds nothing."""
    r = rig.Rig(case, mib=128)
    branches = os.fsencode(r.sandbox / "branches")
    b1 = r.branch("b1")
    rig.wait_settled(b1)
    odd = [b".b", b"..b", b"a b", b" ", b"\n", b"a\nb", b"\x01", b"\xff\xfe", "é".encode(), b"a\\b", b"a;b", b"$(x)", b"*", b"%s%n",
           b"a,b", b"a=b", b"a@b", b"'", b'"', b"x" * 65, b"x" * 255]
    for name in odd:
        path = branches + b"/" + name
        assert errno_of(os.mkdir, path) == errno.EINVAL, name
        said = os.getxattr(branches, "user.forkfs.error")
        assert b"branch name" in said and not any(c < 0x20 or c == 0x7f for c in said), f"the sentence has control characters: {said}"
        assert errno_of(os.rename, os.fsencode(b1), path) == errno.EINVAL, name
        assert errno_of(os.stat, path) == errno.ENOENT, name
        assert errno_of(os.rmdir, path) == errno.ENOENT, name
        assert errno_of(os.stat, os.fsencode(r.mount.path) + b"/" + name) == errno.ENOENT, name
        assert errno_of(os.stat, os.fsencode(r.sandbox) + b"/branch@" + name) == errno.ENOENT, name
    for name in (b"x" * 256, b"x" * 4000):
        assert errno_of(os.mkdir, branches + b"/" + name) in (errno.EINVAL, errno.ENAMETOOLONG)
    assert errno_of(os.stat, os.fsencode(r.sandbox) + b"/branch@") == errno.ENOENT
    stops = r.guest.stops()
    for name in ("x" * 64, "A-z_0.9:", "0", "b.."):
        os.rename(b1, b1.parent / name)
        os.rename(b1.parent / name, b1)
        os.stat(r.sandbox / f"branch@{name}")
    assert r.guest.stops() == stops, "a look at branch@KEY has stopped the VM"


# ---- many, dead and interrupted clients


def open_files(pid):
    """What the daemon has open, each with how often; not counted: /dev/fuse, of which each thread that was ever needed has one."""
    found = collections.Counter(re.sub(r"\d+", "N", link) for link in processes.open_files(pid).values())
    del found["/dev/fuse"]
    return found


def check_files(pid, before, timeout=20):
    """Wait until the daemon has no more open than it had."""
    deadline = time.monotonic() + timeout
    while more := open_files(pid) - before:
        assert time.monotonic() < deadline, f"the daemon has open what it had not: {dict(more)}"
        time.sleep(0.05)


def own_memory(pid):
    """KiB of memory that is a process's alone."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError(f"no RssAnon of {pid}")


def settle_to(what, value, limit, timeout=10):
    """Wait until a count has come down to a limit."""
    deadline = time.monotonic() + timeout
    while value() > limit:
        assert time.monotonic() < deadline, f"{what}: {value()}, were {limit}"
        time.sleep(0.05)


class Client:
    """A forked child that runs function(step), where step(n) says that it has come so far."""

    def __init__(self, case, function):
        r, w = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(r)
                os.setsid()
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                function(lambda n: os.write(w, bytes([n])))
                code = 0
            except BaseException as e:  # the child must not come back into the test
                os.write(2, f"client: {e!r}\n".encode())
            finally:
                os._exit(code)
        os.close(w)
        self.steps, self.ended = r, None
        case.on_end(self.end)

    def reach(self, n, timeout=30):
        """Wait until it said step(n)."""
        deadline = time.monotonic() + timeout
        while True:
            ready, _, _ = select.select([self.steps], [], [], max(0, deadline - time.monotonic()))
            said = os.read(self.steps, 1) if ready else b""
            assert said, f"a client has not reached step {n}"
            if said[0] == n:
                return self

    def signal(self, number):
        """Send a signal."""
        os.kill(self.pid, number)
        return self

    def wait(self, timeout):
        """Its exit code, negative: the signal; an error when it lives on."""
        deadline = time.monotonic() + timeout
        while self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = os.waitstatus_to_exitcode(status)
                break
            assert time.monotonic() < deadline, f"client {self.pid} lives on: {pathlib.Path(f'/proc/{self.pid}/wchan').read_text()}"
            time.sleep(0.005)
        return self.ended

    def end(self):
        """Kill it if need be."""
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(10)
        os.close(self.steps)


def again(function, *codes):
    """Do it again as long as it fails with one of these."""
    while True:
        code = errno_of(function)
        if code == 0:
            return
        if code not in codes:
            raise OSError(code, os.strerror(code))
        time.sleep(0.1)


def test_many_clients(case):
    """64 clients at once on one VM, of every kind; each gets what it asks for."""
    r = rig.Rig(case, mib=128, options="lease=1")
    b1 = r.branch("b1")
    assert rig.wait_settled(b1) == "ready"
    truth = [hashlib.sha1(part).digest() for part in iter(lambda f=(b1 / "memory.bin").open("rb"): f.read(MIB), b"")]
    files, branches = open_files(r.mount.pid), r.sandbox / "branches"

    def reader(n):
        chance = random.Random(n)
        with opened(b1 / "memory.bin", os.O_RDWR if n % 3 == 0 else os.O_RDONLY) as fd:
            for _ in range(40):
                i = chance.randrange(len(truth))
                assert hashlib.sha1(os.pread(fd, MIB, i * MIB)).digest() == truth[i], f"MiB {i} is wrong"

    def maker(n):
        path = branches / f"m{n}"
        again(lambda: os.mkdir(path), errno.EAGAIN)
        assert (path / "wait").read_text() == "ready\n"
        os.rmdir(path)

    def requester(n):
        def request():
            wrote, got, answer = transact(r.sandbox / "ctl", json.dumps({"branch": {"name": f"c{n}", "wait": True}}).encode())
            code = wrote or got or json.loads(answer).get("errno", 0)
            if code:
                raise OSError(code, answer.decode())
        again(request, errno.EAGAIN)
        os.rmdir(branches / f"c{n}")

    def snapshooter(n):
        def shoot():
            with opened(r.sandbox / f"branch/{'memory.bin' if n % 2 else 'vmstate'}") as fd:
                assert os.read(fd, 65536)
        again(shoot, errno.EAGAIN)

    def walker(n):
        for _ in range(5):
            for directory, _, names in os.walk(r.mount.path):
                for name in names:
                    errno_of(os.lstat, os.path.join(directory, name))  # some are gone again
            assert json.loads((r.sandbox / "status").read_text())["state"] == "running"

    def rival(n):
        code = errno_of(os.mkdir, branches / "same")
        assert code in (0, errno.EEXIST, errno.EBUSY, errno.EAGAIN), code

    kinds = [reader] * 3 + [maker, requester, snapshooter, walker, rival]
    clients = [Client(case, lambda step, i=i: kinds[i % len(kinds)](i)) for i in range(64)]
    failed = [kinds[i % len(kinds)].__name__ for i, c in enumerate(clients) if c.wait(120) != 0]
    assert not failed, f"clients failed: {failed}"
    assert set(os.listdir(branches)) <= {"b1", "same"}
    for name in os.listdir(branches):
        rig.wait_settled(branches / name)
    if (branches / "same").exists():
        os.rmdir(branches / "same")
    check_files(r.mount.pid, files)
    r.guest.check_runs()


def test_ten_thousand_opens(case):
    """10,000 opens and closes of every kind of file leave no file, no node and no memory behind."""
    r = rig.Rig(case, mib=128)
    b1 = r.branch("b1")
    assert rig.wait_settled(b1) == "ready"
    targets = [(r.mount / ".forkfs/version", os.O_RDONLY), (r.mount / ".forkfs/ctl", os.O_RDWR), (r.mount / ".forkfs/events", os.O_RDONLY),
               (r.sandbox / "status", os.O_RDONLY), (r.sandbox / "ctl", os.O_RDWR), (r.sandbox / "ctl", os.O_WRONLY),
               (b1 / "memory.bin", os.O_RDONLY), (b1 / "memory.bin", os.O_RDWR), (b1 / "vmstate", os.O_RDONLY),
               (b1 / "manifest.json", os.O_RDONLY), (b1 / "wait", os.O_RDONLY), (b1, os.O_RDONLY), (r.mount.path, os.O_RDONLY)]

    def rounds(n):
        for i in range(n):
            path, flags = targets[i % len(targets)]
            fd = os.open(path, flags)
            if flags == os.O_RDONLY and path.name in ("status", "memory.bin", "manifest.json", "wait", "version"):
                os.read(fd, 4096)
            elif flags == os.O_RDWR and path.name == "ctl" and i % 3 == 0:
                os.write(fd, b'{"branch":{"na')
            elif path.is_dir():
                os.listdir(fd)
            os.close(fd)

    counts = {"handles": lambda: rig.metric(r, "open_files"), "nodes": lambda: rig.metric(r, "nodes")}
    rounds(1300)
    time.sleep(0.5)
    before = {name: count() for name, count in counts.items()}
    files, memory = open_files(r.mount.pid), own_memory(r.mount.pid)
    rounds(10000)
    check_files(r.mount.pid, files)
    for name, count in counts.items():
        settle_to(name, count, before[name])
    grown = own_memory(r.mount.pid) - memory
    assert grown < 2048, f"the daemon has grown by {grown} KiB in 10,000 opens"
    r.guest.check_runs()


def test_many_keys(case):
    """A key for every snapshot: what the kernel remembers of them costs the daemon no open files."""
    r = rig.Rig(case, mib=128, options="branch-rate=0,lease=1")
    files = open_files(r.mount.pid)
    for i in range(24):
        with opened(r.sandbox / f"branch@key{i}" / ("vmstate", "memory.bin")[i % 2]) as fd:
            assert os.read(fd, 4096)
    assert r.guest.stops() == 24
    check_files(r.mount.pid, files)
    assert rig.metric(r, "generations") == 0
    r.guest.check_runs()


def test_killed_clients(case):
    """A client killed with SIGKILL at each step, also while the daemon works for it: it dies at once, and nothing of it is left."""
    r = rig.Rig(case, mib=128, options="branch-rate=0,lease=1")
    b1, branches = r.branch("b1"), r.sandbox / "branches"
    assert rig.wait_settled(b1) == "ready"
    request = b'{"branch":{"name":"victim","wait":true}}'

    def transaction(step):
        fd = os.open(r.sandbox / "ctl", os.O_RDWR)
        step(1)
        os.write(fd, request[:10])
        step(2)
        os.write(fd, request[10:])
        step(3)
        os.read(fd, 65536)
        step(4)
        signal.pause()

    def reading(step):
        fd = os.open(b1 / "memory.bin", os.O_RDWR)
        step(1)
        os.read(fd, MIB)
        m = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        step(2)
        while True:
            hashlib.sha1(m[:MIB * 16])

    def now(step):
        step(1)
        fd = os.open(r.sandbox / "branch/memory.bin", os.O_RDONLY)
        os.read(fd, MIB)
        step(2)
        with open(r.sandbox / "branch/manifest.json", "rb") as f:
            f.read()
        step(3)
        signal.pause()

    def making(step):
        step(1)
        os.mkdir(branches / "victim")

    def undone():
        return "victim" not in os.listdir(branches)

    files, handles = open_files(r.mount.pid), rig.metric(r, "open_files")
    # (what, step, fault point that holds the daemon, what must be left: True: no branch, None: whatever)
    steps = [(transaction, 1, None, True), (transaction, 2, None, True), (transaction, 2, "fs-ctl-write@2", True),
             (transaction, 3, "fs-mkdir", True), (transaction, 3, "settle", None), (transaction, 4, None, False),
             (reading, 1, None, True), (reading, 2, None, True), (now, 1, "fs-open", True), (now, 1, "qmp-cont", None),
             (now, 2, "settle", None), (now, 3, None, True), (making, 1, "fs-mkdir", True), (making, 1, "qmp-cont", None)]
    for n, (function, step, point, left) in enumerate(steps):
        what = f"{function.__name__} killed at step {step}{' in ' + point if point else ''}"
        release = case.dir / f"release{n}"
        r.mount.faults(*([f"{point} hold:{release}"] if point else []))
        client = Client(case, function).reach(step)
        held = pathlib.Path(f"{release}.held")
        deadline = time.monotonic() + 20
        while point and not held.exists():
            assert time.monotonic() < deadline, f"{what}: not reached"
            time.sleep(0.002)
        client.signal(signal.SIGKILL)
        code = client.wait(PROMPT)
        assert code == -signal.SIGKILL, f"{what}: {code}"
        r.mount.faults()
        release.touch()
        r.guest.check_runs(3)
        if left is not None:
            deadline = time.monotonic() + 30
            while left != undone():
                assert time.monotonic() < deadline, f"{what}: branches are {os.listdir(branches)}"
                time.sleep(0.02)
        # the name can be had again: whatever was under way has come to its end
        deadline = time.monotonic() + 30
        while True:
            errno_of(os.rmdir, branches / "victim")
            code = errno_of(os.mkdir, branches / "victim")
            if code == 0:
                break
            assert code in (errno.EBUSY, errno.EAGAIN, errno.EEXIST) and time.monotonic() < deadline, f"{what}: then errno {code}"
            time.sleep(0.05)
        rig.wait_settled(branches / "victim")
        os.rmdir(branches / "victim")
        try:
            check_files(r.mount.pid, files)
        except AssertionError as e:
            raise AssertionError(f"after a {what}: {e}") from e
    settle_to("handles", lambda: rig.metric(r, "open_files"), handles)
    check_files(r.mount.pid, files)
    r.guest.check_runs()


def test_interrupted_clients(case):
    """Ctrl-C ends whoever waits within a second, whatever it waits for; the same can be done afterwards."""
    r = rig.Rig(case, mib=128, options="branch-rate=0")
    b1, branches, meta = r.branch("b1"), r.sandbox / "branches", r.mount / ".forkfs"
    assert rig.wait_settled(b1) == "ready"
    serial = itertools.count()

    def ctl(path, value):
        return ("bash", "-c", f"exec 3<>{path}; echo '{json.dumps(value)}' >&3; exec cat <&3")

    def check(point, *commands, before=None):
        release = case.dir / f"release{next(serial)}"
        r.mount.faults(f"{point} hold:{release}")
        case.on_end(release.touch)
        if before:
            before()
        for command in commands:
            waiting = case.start(*command, start_new_session=True)
            time.sleep(0.7)
            assert waiting.poll() is None, f"{command} does not wait at {point}: {waiting.returncode}"
            start = time.monotonic()
            waiting.send_signal(signal.SIGINT)
            waiting.wait(timeout=10)
            seconds = time.monotonic() - start
            assert seconds < PROMPT, f"{point}: {command} ended {seconds:.2f} s after Ctrl-C"
        r.mount.faults()
        release.touch()

    flying = branches / "flying"
    check("settle@1", ("cat", flying / "wait"), ("cat", flying / "manifest.json"), ("sync", flying / "memory.bin"),
          ("bash", "-c", f"exec 3<{flying}/wait; read <&3"), before=lambda: r.branch("flying"))
    assert rig.wait_settled(flying) == "ready", (flying / "status").read_text()
    check("settle@1", ctl(r.sandbox / "ctl", {"branch": {"name": "waited", "wait": True}}))
    check("fs-mkdir", ("mkdir", branches / "m"), ctl(r.sandbox / "ctl", {"branch": {"name": "c"}}))
    check("fs-open", ("cat", r.sandbox / "branch/memory.bin"), ("cp", "-r", r.sandbox / "branch@x", case.dir / "copy"))
    check("fs-rename", ("mv", b1, branches / "b2"))
    check("fs-rmdir", ("rmdir", b1))
    check("fs-fsync", ("sync", b1 / "memory.bin"))
    check("fs-ctl-write", ctl(r.sandbox / "ctl", {"branch": {"name": "w"}}))
    check("fs-detach@99", ("cat", meta / "events"))
    assert b1.is_dir(), "an interrupted rmdir or mv was carried out"
    r.mount.run("detach", "sbx1")
    check("fs-attach", ctl(meta / "ctl", {"attach": {"name": "sbx1", "qemu": r.guest.qmp_path}}))
    deadline = time.monotonic() + 30
    while r.mount.run("attach", "sbx1", "--qemu", r.guest.qmp_path, check=False).code != 0:
        assert time.monotonic() < deadline, "what was interrupted is in the way for ever"
        time.sleep(0.1)
    for name in ("m2", "m3"):
        again(lambda name=name: os.mkdir(branches / name), errno.EAGAIN)
        assert rig.wait_settled(branches / name) == "ready"
    left = set(os.listdir(branches))
    assert left <= {"b1", "flying", "waited", "m2", "m3"}, left
    r.guest.check_runs()
