"""`forkfs restore --jailer`: what is put into a jail, and that nothing of a child that fails is left. The jailer and the Firecracker are
a stand-in (lib/forkfs_test/jailer.py); the real ones are in test_firecracker_jail.py."""

import ctypes
import hashlib
import json
import os
import pathlib
import signal
import sys
import time

from forkfs_test import children, processes, rig
from forkfs_test import jailer as stand_in
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

UID, GID = 12345, 12346


class Hash128(ctypes.Structure):
    """XXH128_hash_t."""

    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


def rewrite(manifest, change):
    """Change a manifest of a store, and its hash."""
    xxh = ctypes.CDLL("libxxhash.so.0")
    xxh.XXH3_128bits.restype = Hash128
    xxh.XXH3_128bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    text = manifest.read_text()
    old = json.loads(text)["manifest_xxh3_128"]
    text = change(text).replace(old, "0" * 32).encode()
    found = xxh.XXH3_128bits(text, len(text))
    manifest.write_bytes(text.replace(b"0" * 32 + b'"\n', f'{found.high:016x}{found.low:016x}"\n'.encode()))


def firecracker_branch(case):
    """A mount with sbx1/b1, of a microVM, which says that it is a Firecracker's; the mount."""
    store = f"store={case.dir}/store"
    guest = MicroVm(case, "sbx1", mib=16, kind="memfd")
    r = ApiRig(case, guest, case.mount(options=store))
    assert rig.wait_settled(r.branch("b1")) == "ready"
    r.mount.run("detach", "sbx1")
    r.mount.stop()
    guest.stop()
    manifest = case.dir / "store/sbx1/b1/manifest.json"
    rewrite(manifest, lambda text: text.replace('"kind":"coop"', '"kind":"firecracker"'))
    return case.mount(name="mnt2", options=store)


def programs(case):
    """The jailer, a file that it shall start, and the directory of the jails."""
    program = case.dir / "jailer"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(pathlib.Path(stand_in.__file__).parents[1])!r})\n"
                       "from forkfs_test import jailer\njailer.main()\n")
    program.chmod(0o755)
    (case.dir / "firecracker").write_text("")
    (case.dir / "jails").mkdir()
    return program, case.dir / "firecracker", case.dir / "jails"


def options(case, *words):
    """Of the command, and of the jailer."""
    program, vmm, jails = programs(case) if not (case.dir / "jails").exists() else (case.dir / "jailer", case.dir / "firecracker", case.dir / "jails")
    return ("--vmm", vmm, "--jailer", program), ("--uid", str(UID), "--gid", str(GID), "--chroot-base-dir", jails, *words)


def left(case):
    """What there is of children: directories, jails, mounts."""
    found = [p for d in ("ch", "jails/firecracker") if (case.dir / d).exists() for p in (case.dir / d).iterdir()]
    return found + [m for m in processes.mounts_under(str(case.dir)) if "/jails/" in m or "/ch/" in m]


def test_what_is_there(case):
    """In its jail a child finds the branch's memory and device state, read-only, and is who it shall be; its sockets are told."""
    mount = firecracker_branch(case)
    want = {f: hashlib.sha256((mount / "sbx1/branches/b1" / f).read_bytes()).hexdigest() for f in ("memory.bin", "vmstate")}
    for words in ((), ("--new-pid-ns",)):
        ours, theirs = options(case, *words)
        found, _ = children.run(mount, "sbx1/b1", "-n", "2", *ours, vmm=theirs, kind=children.Child)
        assert len(found) == 2
        for child in found:
            root = pathlib.Path(child.said["jail"])
            assert root.parts[-4:-2] == ("jails", "firecracker") and child.said["sockets"] == {"api": str(root / "api")}, child.said
            seen = json.loads((root / "seen").read_text())
            assert (seen["uid"], seen["gid"]) == (UID, GID), seen
            assert (seen["memory"], seen["vmstate"]) == (want["memory.bin"], want["vmstate"]), seen
            assert seen["load"]["snapshot_path"] == "/vmstate" and seen["load"]["mem_backend"]["backend_path"] == "/memory", seen
            status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
            assert f"Uid:\t{UID}" in status and ("NSpid:\t%d\t1" % child.pid in status) == bool(words), status
            assert os.stat(f"/proc/{child.pid}/root").st_ino == root.stat().st_ino
            # nothing of it is mounted where the host sees it
            assert not [m for m in left(case) if isinstance(m, str)] and (root / "memory").stat().st_size == 0
            child.stop()


def test_failures(case):
    """A jailer that fails, a VMM that refuses, and one that never answers: no jail, no directory, no process is left."""
    mount = firecracker_branch(case)
    for words, part in ((("--then", "fail"), "the jailer has failed"), (("--then", "refuse"), "no such branch"),
                        (("--then", "fail", "--new-pid-ns"), "the jailer has failed"), (("--then", "refuse", "--new-pid-ns"), "no such branch")):
        ours, theirs = options(case, *words)
        found, done = children.run(mount, "sbx1/b1", "-n", "2", *ours, vmm=theirs, kind=children.Child, check=False)
        assert not found and done.code == 1 and part in done.err, done.err
        assert not left(case), (words, left(case))
    for words in ((), ("--new-pid-ns",)):
        ours, theirs = options(case, "--then", "silent", *words)
        command = case.start(case.forkfs(), "restore", "--mount", mount.path, "--dir", case.dir / "ch", "sbx1/b1", *ours, "--", *theirs)
        deadline = time.monotonic() + 60
        while not list(case.dir.glob("jails/firecracker/*/root/seen")):
            assert command.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        inode = next(case.dir.glob("jails/firecracker/*/root")).stat().st_ino
        command.send_signal(signal.SIGINT)
        assert command.wait(30) != 0
        assert not left(case), left(case)
        assert not in_jail(inode)


def in_jail(inode):
    """Processes whose root directory that is."""
    found = []
    for pid in os.listdir("/proc"):
        try:
            found += [pid] if os.stat(f"/proc/{pid}/root").st_ino == inode else []
        except OSError:
            continue
    return found


def test_words(case):
    """What is run, shown; and what is refused before anything is made."""
    mount = firecracker_branch(case)
    ours, theirs = options(case, "--netns", "/run/netns/vm{number}")
    shown = json.loads(mount.run("restore", "sbx1/b1", "--show", *ours, "--", *theirs, "--", "--level", "Off").out)["command"]
    jails = str(case.dir / "jails")
    assert shown == [str(case.dir / "jailer"), "--id", "b1-1", "--exec-file", str(case.dir / "firecracker"), "--uid", str(UID), "--gid", str(GID),
                     "--chroot-base-dir", jails, "--netns", "/run/netns/vm1", "--", "--api-sock", "/api", "--level", "Off"], shown
    conf = case.dir / "fc.conf"
    conf.write_text(f"kind = firecracker\nbinary = {case.dir}/firecracker\njailer = {case.dir}/jailer\n"
                    f"arg = --uid\narg = 7{{number}}\narg = --gid\narg = 8\narg = --chroot-base-dir\narg = {jails}\narg = --\n")
    shown = json.loads(mount.run("restore", "sbx1/b1", "--show", "--conf", conf, "--", "--level", "Off").out)["command"]
    assert shown[0] == str(case.dir / "jailer") and shown[5:9] == ["--uid", "71", "--gid", "8"] and shown[-2:] == ["--level", "Off"], shown

    def refused(words, part, *more):
        done = mount.run("restore", "sbx1/b1", *ours, *more, "--", *words, check=False)
        assert done.code == 1 and part in done.err and not left(case), (done.err, left(case))

    user = ("--uid", "1", "--gid", "1")
    refused((), "--uid UID --gid GID")
    refused((*theirs, "--id", "x"), "forkfs names each jail")
    refused((*theirs, "--daemonize"), "forkfs names each jail")
    refused((*theirs, "--", "--api-sock", "/x"), "forkfs's to name")
    refused((*user, "--chroot-base-dir", "/nonexistent"), "--chroot-base-dir")
    (case.dir / "nodev").mkdir()
    case.run("mount", "-t", "tmpfs", "-o", "nodev", "none", case.dir / "nodev")
    case.on_end(lambda: case.run("umount", case.dir / "nodev"))
    refused((*user, "--chroot-base-dir", case.dir / "nodev"), "is mounted nodev")
    # what would not fit is not cut: a jail's directory, the name of its group
    long = case.dir / ("vmm-" + "x" * 60)
    long.write_text("")
    done = mount.run("restore", "sbx1/b1", "--vmm", long, "--jailer", case.dir / "jailer", "--", *theirs, check=False)
    assert done.code == 1 and "too long a directory" in done.err and not left(case), (done.err, left(case))
    assert not list((case.dir / "jails").iterdir()), list((case.dir / "jails").iterdir())
    refused((*theirs, "--cgroup", "pids.max=9", "--parent-cgroup", "g" * 158), "too long a name of a cgroup")
    assert not list((case.dir / "jails").iterdir()), list((case.dir / "jails").iterdir())
    refused(("--uid", "root", "--gid", "1", "--chroot-base-dir", jails), "--uid is a number")
    refused(("--uid", "1{number}", "--gid", "1", "--chroot-base-dir", jails), "of different users", "--backend", "uffd")
