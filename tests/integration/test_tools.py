"""Tools as everybody has them, on real branches: docs/tools.md is the table of what comes out.

What reads is compared with the truth that foreign hands read from the stopped VMM; what only looks must not stop the VM.
"""

import ctypes
import hashlib
import mmap
import os
import pathlib
import struct
import subprocess
import tarfile
import time

from forkfs_test import rig

TIMEOUT = {"test_named": 180, "test_named_without_passthrough": 180, "test_now": 180}
MIB = 128
SIZE = MIB << 20
GUEST = {"mib": MIB, "run": ["counter", "load,mib=32"]}

# Each in bash, in an empty directory, with $B the branch's directory and $T the truth; what it leaves as `out` must be the truth.
COPIES = [
    "cp $B/memory.bin out",
    "cp -r $B all; mv all/memory.bin out; cmp all/vmstate $B/vmstate; cmp all/manifest.json $B/manifest.json",
    "cp -a $B all; mv all/memory.bin out",
    "cp --sparse=always $B/memory.bin out",
    "cp --sparse=never $B/memory.bin out",
    "cp --reflink=auto $B/memory.bin out",
    "cat $B/memory.bin >out",
    "cat <$B/memory.bin | cat >out",
    "install -m 600 $B/memory.bin out",
    "rsync -a $B/ all/; mv all/memory.bin out; cmp all/vmstate $B/vmstate; cmp all/manifest.json $B/manifest.json",
    "rsync -a --whole-file --sparse $B/memory.bin out",
    "cp $T out; printf x | dd of=out conv=notrunc bs=1 seek=5000000 status=none; rsync --inplace --no-whole-file --ignore-times $B/memory.bin out",
    "tar -cf t -C $B memory.bin vmstate manifest.json; tar -xf t; mv memory.bin out; cmp vmstate $B/vmstate",
    "tar -cSf t -C $B memory.bin; tar -xf t; mv memory.bin out",
    "dd if=$B/memory.bin of=out bs=1M status=none",
    "dd if=$B/memory.bin of=out bs=1M iflag=direct status=none",
    "dd if=$B/memory.bin of=out bs=65536 iflag=direct,fullblock oflag=append conv=notrunc status=none",
    "dd if=$B/memory.bin of=out bs=999983 status=none",
    "dd if=$B/memory.bin of=out bs=999983 iflag=direct status=none",
    "dd if=$B/memory.bin of=out bs=3M conv=sparse status=none; truncate -s $(stat -c %s $T) out",
    "(dd bs=1M count=7; dd bs=12345 count=100; cat) <$B/memory.bin >out 2>/dev/null",
    "head -c 1234567 $B/memory.bin >out; tail -c +1234568 $B/memory.bin >>out",
    "split -b 20000000 $B/memory.bin part.; cat part.* >out",
]
# Their output must be the same on $B/memory.bin and on $T; FILE stands for either.
SAME = [
    "sha256sum <FILE", "cksum FILE | cut -d' ' -f1,2", "wc -c FILE | cut -d' ' -f1", "wc -c <FILE", "grep -c e FILE", "grep -abo Linux FILE",
    "md5sum <FILE", "head -c 5000 FILE | sha256sum", "tail -c 5000 FILE | sha256sum", "tail -c 70000001 FILE | sha256sum",
    "od -An -tx1 -j 1048577 -N 999 FILE", "strings -n 12 FILE | sha256sum", "stat -c %s FILE", "stat -Lc %s FILE", "du -b FILE | cut -f1",
    "du --apparent-size -m FILE | cut -f1", f"find FILE -size {MIB}M | wc -l", "test -f FILE -a -s FILE -a -r FILE; echo $?", "cmp FILE $T; echo $?",
    "diff -q FILE $T; echo $?", "dd if=FILE bs=4096 skip=777 count=3 status=none | sha256sum",
    "dd if=FILE bs=511 skip=99 count=3 iflag=direct status=none | sha256sum",
]
# Refused, with what is said.
REFUSED = [
    ("cp --reflink=always $B/memory.bin out", "failed to clone"),
    ("cp $T $B/memory.bin", "Operation not permitted"),
    ("mv $B/memory.bin out", "Operation not permitted"),
    ("rm -f $B/memory.bin", "Operation not permitted"),
    ("ln $B/memory.bin $B/other", "Operation not permitted"),
    ("ln -s x $B/other", "Operation not permitted"),
    ("touch $B/memory.bin", "Operation not permitted"),
    ("touch $B/other", "Operation not permitted"),
    ("truncate -s 0 $B/memory.bin", "Operation not permitted"),
    ("chmod 777 $B/memory.bin", "Operation not permitted"),
    ("chown 1 $B/memory.bin", "Operation not permitted"),
    ("fallocate -p -l 4096 $B/memory.bin", "Operation not permitted"),
    ("echo x >>$B/memory.bin", "Operation not permitted"),
    ("dd if=$T of=$B/memory.bin conv=notrunc count=1", "Operation not permitted"),
    ("sed -i s/a/b/ $B/manifest.json", "Operation not permitted"),
    ("rsync --inplace --ignore-times $T $B/memory.bin", "Operation not permitted"),
    ("tar -cf - -C / etc/hostname | tar -xf - -C $B", "Operation not permitted"),
    ("setfattr -n user.x -v y $B/memory.bin || python3 -c \"import os; os.setxattr('$B/memory.bin', 'user.x', b'y')\"", "not supported"),
]
# In the sandbox's directory, each by one session; $O is a new name.
ONE_PAUSE = [
    "sha256sum branch/memory.bin branch/vmstate", "head -c 1 branch/memory.bin", "tail -c 5 branch/memory.bin", "cat branch/vmstate",
    "stat -c %s branch/memory.bin; cat branch/manifest.json", "grep -c x branch/memory.bin || true", "cp -r branch $O",
]
# Neither these (run in the sandbox's directory) nor watching and walking take a branch.
LOOKS = [
    "ls -laR .", "find . -ls", "find . -type f -size +1c -readable", "find . -empty", "find . -newer /etc/passwd", "du -a .", "du -sb branch",
    "stat branch/memory.bin branch/vmstate branch/manifest.json", "rsync -an branch/ /nowhere/",
    "test branch/memory.bin -nt /etc/passwd || true", "readlink -f branch/memory.bin", "df branch", "compgen -f branch/", "tree . || true",
]


def shell(case, script, where, check=True, **names):
    """Run bash in a directory; a Result."""
    return case.run("bash", "-ec", "set -o pipefail; " + script, cwd=where, check=check, env=dict(os.environ, LC_ALL="C", **names),
                    start_new_session=True)


def tools_on(case, branch, truth):
    """All of COPIES and SAME on a named branch."""
    names = {"B": str(branch), "T": str(truth)}
    wrong = []
    for n, script in enumerate(COPIES):
        where = case.dir / f"tool-{n}"
        where.mkdir()
        start = time.monotonic()
        result = shell(case, script, where, check=False, **names)
        same = result.code == 0 and case.run(case.tool("compare"), truth, where / "out", check=False)
        if not same or same.code != 0:
            wrong.append(f"{script}: exit status {result.code}: {result.err.strip()[-300:]} {same.out + same.err if same else ''}")
        print(f"{time.monotonic() - start:.2f} s  {script}")
        shell(case, f"rm -rf {where}", case.dir)
    for script in SAME:
        ours = shell(case, script.replace("FILE", str(branch / "memory.bin")), case.dir, check=False, **names)
        theirs = shell(case, script.replace("FILE", str(truth)), case.dir, check=False, **names)
        if (ours.code, ours.out.replace(str(branch / "memory.bin"), "F")) != (theirs.code, theirs.out.replace(str(truth), "F")):
            wrong.append(f"{script}: {ours.code} {ours.out[-100:]!r} {ours.err[-300:]!r}, should be {theirs.code} {theirs.out[-100:]!r}")
    assert not wrong, "\n".join(wrong)


def python_on(branch, truth):
    """mmap, readinto, tarfile, shutil's way: what Python programs do."""
    right = truth.read_bytes()
    with open(branch / "memory.bin", "rb") as f:
        assert f.seek(0, os.SEEK_END) == len(right)
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m:
            assert m[:] == right, "a mapping for reading"
            assert m.find(right[40_000_000:40_000_064], 40_000_000) == 40_000_000
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as m:
            m[12345:12350] = b"hello"
            assert m[12345:12350] == b"hello" and m[12350:] == right[12350:], "a private mapping"
        assert os.pread(f.fileno(), 5, 12345) == right[12345:12350], "a private mapping has changed the branch"
    with open(branch / "memory.bin", "r+b") as f, mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as m:
        assert hashlib.sha256(m).digest() == hashlib.sha256(right).digest(), "a private mapping of a file opened for writing"
    archive = truth.with_name("python.tar")
    with tarfile.open(archive, "w") as t:
        t.add(branch / "memory.bin", "m")
        t.add(branch / "vmstate", "v")
    with tarfile.open(archive) as t:
        assert t.extractfile("m").read() == right and t.extractfile("v").read() == (branch / "vmstate").read_bytes()
    archive.unlink()


def named(case, options):
    """Every tool on a named branch."""
    r = rig.Rig(case, options=options, **GUEST)
    branch = r.branch_with_truth("b1")
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    stops = r.guest.stops()
    tools_on(case, branch, r.truth)
    python_on(branch, r.truth)
    wrong = []
    for script, said in REFUSED:
        result = shell(case, script, case.dir, check=False, B=str(branch), T=str(r.truth))
        if result.code == 0 or said not in result.err:
            wrong.append(f"{script}: {result.code} {result.err.strip()[-200:]}")
    assert not wrong, "\n".join(wrong)
    assert r.difference(branch) == "", "somebody has changed the branch"
    assert os.stat(branch / "memory.bin").st_blocks * 512 >= SIZE, "a branch should look dense"
    assert r.guest.stops() == stops, "reading a named branch stopped the VM"


def test_named(case):
    """Tools on a named branch, served as this machine can."""
    named(case, "")


def test_named_without_passthrough(case):
    """The same, served by the daemon and the page cache."""
    named(case, "passthrough=off")


def test_in_flight(case):
    """Copies that are made while the branch is being written are right; so is what waits for it."""
    r = rig.Rig(case, **GUEST)
    plain = r.mount.faults
    r.mount.faults = lambda *rules: plain(*rules, "guest-read delay:1")
    for script in ("cp $B/memory.bin out", "dd if=$B/memory.bin of=out bs=999983 iflag=direct status=none",
                   "cp -r $B all; mv all/memory.bin out; grep -q ready all/wait; cmp all/manifest.json $B/manifest.json",
                   "sync $B/memory.bin; [ $(cat $B/state) = ready ]; cp $B/memory.bin out"):
        branch = r.branch_with_truth("b1")
        assert rig.state(branch) == "writing", script
        shell(case, script, case.dir, B=str(branch))
        assert case.run(case.tool("compare"), r.truth, case.dir / "out", check=False).out == "", script
        assert rig.wait_settled(branch) == "ready"
        shell(case, "rm -rf all out", case.dir)
        branch.rmdir()


def now_with_truth(r, script):
    """Run a script that takes a branch of `branch/`, and read the truth by foreign hands at its instant."""
    r.case.run(*rig.truth.foreign_command(r.case, r.guest, r.truth))
    for _ in range(rig.HOLDS):
        held = pathlib.Path(f"{r.hold}.held")
        for mark in (r.hold, held):
            rig.remove(mark)
        shell(r.case, "rm -rf out all", r.case.dir)
        r.mount.faults(f"{rig.INSTANT} hold:{r.hold}")
        reader = r.case.start(*rig.truth.foreign_command(r.case, r.guest, r.truth, r.hold))
        tool = r.case.start("bash", "-ec", script, cwd=r.case.dir, start_new_session=True, env=dict(os.environ, S=str(r.sandbox)),
                            stderr=subprocess.PIPE, text=True)
        while not held.exists() and tool.poll() is None:
            time.sleep(0.0005)
        r.mount.faults()
        assert reader.wait(timeout=60) == 0
        _, said = tool.communicate(timeout=60)
        if tool.returncode == 0:
            return
        print(f"again: {said}")
    raise AssertionError(f"{script}: {said}")


def test_now(case):
    """Tools on `branch/`: each takes one pause, and what it gets is that instant."""
    r = rig.Rig(case, options="branch-rate=0", **GUEST)
    for script in ("cp -r $S/branch all; mv all/memory.bin out", "cp $S/branch/memory.bin out", "rsync -a $S/branch/ all/; mv all/memory.bin out",
                   "dd if=$S/branch/memory.bin of=out bs=999983 iflag=direct status=none", "cat $S/branch/memory.bin >out"):
        now_with_truth(r, script)
        assert case.run(case.tool("compare"), r.truth, case.dir / "out", check=False).out == "", script
        if (case.dir / "all").exists():
            assert (case.dir / "all/vmstate").stat().st_size > 1000, f"{script}: vmstate is empty"
            # rsync sizes it by fstat, when it is not complete yet: documented
            assert "rsync" in script or (case.dir / "all/manifest.json").stat().st_size > 100, f"{script}: no manifest"
    for n, script in enumerate(ONE_PAUSE + ["diff -r branch branch@k || true"]):
        before = r.guest.stops()
        shell(case, f"({script}) >/dev/null", r.sandbox, O=str(case.dir / f"now-{n}"))
        taken = r.guest.stops() - before
        print(f"{taken} pauses: {script}")
        assert taken == (2 if "branch@k" in script else 1), f"{script}: {taken} pauses"
    # GNU tar sizes by fstat after it opened, as rsync does: what has its size then is whole
    shell(case, "rm -rf now-* out all; mkdir whole alone", case.dir)
    shell(case, "tar -cf - -C $S branch | tar -xf - -C whole", case.dir, S=str(r.sandbox))
    shell(case, "tar -cf - -C $S/branch vmstate | tar -xf - -C alone", case.dir, S=str(r.sandbox))
    sizes = {name: (case.dir / name).stat().st_size
             for name in ("whole/branch/memory.bin", "whole/branch/vmstate", "whole/branch/manifest.json", "alone/vmstate")}
    print(sizes)
    assert sizes["whole/branch/memory.bin"] == SIZE and sizes["whole/branch/vmstate"] > 1000 and sizes["alone/vmstate"] > 1000, sizes
    before = r.guest.stops()
    child = r.guest.child("child", r.sandbox / "branch/memory.bin", r.sandbox / "branch/vmstate")
    assert r.guest.stops() == before + 1, "a child straight from branch/ should be one pause"
    child.go()
    child.console.wait(r"^tick \d+$", timeout=30)
    child.stop()
    r.guest.check_runs()


def test_looking(case):
    """Walkers, dry runs, a version control system above the mount: no pause."""
    r = rig.Rig(case, **GUEST)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    stops = r.guest.stops()
    for script in LOOKS:
        shell(case, f"({script}) >/dev/null", r.sandbox, check=False)
        assert r.guest.stops() == stops, f"'{script}' stopped the VM"
    for directory, names, files in os.walk(r.mount.path):
        for name in names + files:
            os.lstat(os.path.join(directory, name))
            os.access(os.path.join(directory, name), os.R_OK)
        for entry in os.scandir(directory):
            entry.stat()
    assert list(pathlib.Path(r.mount.path).rglob("memory.bin")), "rglob finds nothing"
    if shell(case, "command -v git", case.dir, check=False).code == 0:
        said = shell(case, "git init -q . && git status --porcelain -uall", case.dir).out
        assert "branches/b1/memory.bin" in said, said
        shell(case, "git add -n mnt/sbx1/branches/b1; git clean -nd; git diff --stat", case.dir)
    assert r.guest.stops() == stops, "walking stopped the VM"


class Inotify:
    """inotify(7) by ctypes."""

    CREATE, DELETE, MOVED_FROM, MOVED_TO, ISDIR, OPEN = 0x100, 0x200, 0x40, 0x80, 0x40000000, 0x20

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)

    def watch(self, path, mask=0xfff):
        """Watch a file or directory."""
        assert self.libc.inotify_add_watch(self.fd, os.fsencode(path), mask) >= 0, os.strerror(ctypes.get_errno())

    def events(self):
        """What has happened, as (mask, name)."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return []
        found = []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            found.append((mask, data[16:16 + length].rstrip(b"\0").decode()))
            data = data[16 + length:]
        return found


def test_inotify(case):
    """A watcher sees branches come, move and go, takes none, and is in nobody's way."""
    r = rig.Rig(case, **GUEST)
    watcher = Inotify()
    for path in (r.sandbox, r.sandbox / "branch", r.sandbox / "branch/memory.bin", r.sandbox / "branches", r.sandbox / "status"):
        watcher.watch(path)
    assert r.guest.stops() == 0, "watching stopped the VM"
    watcher.events()
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    branch.rename(branch.with_name("b2"))
    branch.with_name("b2").rmdir()
    seen = [(mask & ~Inotify.ISDIR, name) for mask, name in watcher.events()]
    for event in ((Inotify.CREATE, "b1"), (Inotify.MOVED_FROM, "b1"), (Inotify.MOVED_TO, "b2"), (Inotify.DELETE, "b2")):
        assert event in seen, (event, seen)
    assert r.guest.stops() == 1, r.guest.stops()
    os.close(watcher.fd)


