"""Disks of guests: file systems to keep their images on, and what a captured image holds beside the memory of its instant."""

import mmap
import os
import pathlib
import shutil
import struct
import subprocess
import zlib

from .case import Skip

MIB = 1 << 20
RECORD = struct.Struct("<QII")
RECORD_SIZE = 512
# What tests/guest/journal.c writes at the start of its page.
MAGIC = b"fork database 0g"


def filesystem(case, kind, mib=320):
    """Mount a fresh file system (xfs, btrfs or ext4) from an image of the test's own; its directory."""
    image, where = case.dir / f"{kind}.img", case.dir / kind
    with open(image, "wb") as f:
        f.truncate(mib * MIB)
    where.mkdir()
    case.run(f"mkfs.{kind}", "-q", image)
    done = case.run("mount", "-o", "loop", image, where, check=False)
    if done.code != 0:
        raise Skip(f"this machine mounts no {kind} image: {done.err.strip()}")
    case.on_end(lambda: subprocess.run(["umount", str(where)], check=True, stdin=subprocess.DEVNULL))
    return where


def image(case, where, mib=64):
    """A disk image with an empty ext4 file system in it, in a directory."""
    path = pathlib.Path(where) / "root.img"
    with open(path, "wb") as f:
        f.truncate(mib * MIB)
    case.run("mkfs.ext4", "-q", "-F", path)
    return path


def progress(memory):
    """(begun, done) of the guest's program journal, from a memory image."""
    with open(memory, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        found, at = [], m.find(MAGIC)
        while at >= 0:
            if at % mmap.PAGESIZE == 0:
                found.append(struct.unpack_from("<QQ", m, at + len(MAGIC)))
            at = m.find(MAGIC, at + 1)
    assert len(found) == 1, f"{len(found)} pages of memory say how far the journal is: {found}"
    return found[0]


def records(case, disk, work):
    """How many whole records the log on a captured disk has, after its journal was replayed on a copy; fails unless fsck finds
    the file system clean."""
    shutil.copyfile(disk, work)
    os.chmod(work, 0o600)
    replay = case.run("e2fsck", "-p", work, check=False)
    assert replay.code in (0, 1), f"e2fsck -p: {replay.code}: {replay.out}{replay.err}"
    check = case.run("e2fsck", "-f", "-n", work, check=False)
    assert check.code == 0, f"the captured file system is not clean: {check.out}{check.err}"
    log = work.with_name("log")
    case.run("debugfs", "-R", f"dump /log {log}", work)
    data = log.read_bytes()
    count = 0
    for at in range(0, len(data) - RECORD_SIZE + 1, RECORD_SIZE):
        number, crc, zero = RECORD.unpack_from(data, at)
        record = bytearray(data[at:at + RECORD_SIZE])
        record[8:12] = bytes(4)
        if number != count + 1 or zero or zlib.crc32(record) != crc:
            break
        count += 1
    return count


def check_branch(case, branch, disk_id="root"):
    """Fail unless the disk of a branch is clean and of the very instant of its memory; (done, records, begun)."""
    begun, done = progress(branch / "memory.bin")
    count = records(case, branch / "disks" / disk_id, case.dir / "check.img")
    assert done <= count <= begun, f"memory says that {done} records are durable and {begun} begun, the disk has {count}"
    return done, count, begun
