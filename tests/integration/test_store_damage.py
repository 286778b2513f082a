"""A packed branch whose pack is damaged: every way to read it fails where it is damaged, and is right everywhere else."""

import errno
import hashlib
import os
import pathlib
import signal
import subprocess
import sys

from forkfs_test import rig

MIB = 1 << 20
CHUNK = 64 << 10
# Maps a file and touches a byte, privately writable or not.
TOUCH = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR if sys.argv[3] == "private" else os.O_RDONLY)
flags = mmap.MAP_PRIVATE if sys.argv[3] == "private" else mmap.MAP_SHARED
m = mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ)
print(m[int(sys.argv[2])])
"""


def find_damaged(directory, pack):
    """An offset of memory whose chunk is in the pack, and an offset in the pack: in the middle of what is stored of it."""
    said = pathlib.Path(directory)
    index = (said / "memory.idx").read_bytes()
    n = int.from_bytes(index[32:40], "little")
    columns = {name: int.from_bytes(index[at:at + 8], "little") for name, at in (("offset", 56), ("stored", 64), ("pack", 72), ("kind", 80))}

    def number(column, width, i):
        at = columns[column] + width * i
        return int.from_bytes(index[at:at + width], "little")

    for i in range(n // 3, n):
        if index[columns["kind"] + i] == 2 and number("pack", 2, i) == pack and number("stored", 4, i) > 1000:
            return i * CHUNK, number("offset", 4, i) + number("stored", 4, i) // 2
    raise AssertionError("no chunk of the pack is compressed")


def sent(path, start, length):
    """The bytes that sendfile(2) sends of a file; OSError where it fails."""
    left, right = os.pipe()
    got = b""
    with open(path, "rb") as f:
        while len(got) < length:
            n = os.sendfile(right, f.fileno(), start + len(got), min(16384, length - len(got)))
            if not n:
                break
            got += os.read(left, n)
    os.close(left)
    os.close(right)
    return got


def test_every_way_to_read(case):
    """read, mmap (private and shared), sendfile: EIO or SIGBUS in the damaged chunk, never wrong bytes; the neighbours are as they were."""
    r = rig.Rig(case, mib=96, run=["counter", "load,mib=16"], options=f"store={case.dir}/store")
    r.mount.run("branch", "sbx1", "p", "--store", "packed")
    branch, place = r.sandbox / "branches" / "p" / "memory.bin", case.dir / "store" / "sbx1" / "p"
    whole = branch.read_bytes()
    r.mount.stop()
    at, byte = find_damaged(place, 0)
    with open(place / "memory.pack.0", "r+b") as f:
        f.seek(byte)
        old = f.read(100)
        f.seek(byte)
        f.write(os.urandom(100))  # one bit of what is compressed may change nothing: a run can be told in several ways
    again = case.mount("again", options=f"store={case.dir}/store")
    memory = again / "sbx1" / "branches" / "p" / "memory.bin"
    wrong = {i * CHUNK for i in range(len(whole) // CHUNK) if whole[i * CHUNK:(i + 1) * CHUNK] == whole[at:at + CHUNK]}
    refused = set()
    fd = os.open(memory, os.O_RDONLY)
    for offset in range(0, len(whole), CHUNK):
        try:
            assert os.pread(fd, CHUNK, offset) == whole[offset:offset + CHUNK], f"wrong bytes at {offset}"
        except OSError as e:
            assert e.errno == errno.EIO, e
            refused.add(offset)
    os.close(fd)
    assert refused == wrong, (refused, wrong)
    try:
        sent(memory, at, CHUNK)
        raise AssertionError("sendfile sends a damaged chunk")
    except OSError as e:
        assert e.errno == errno.EIO, e
    good = next(o for o in range(0, len(whole), CHUNK) if o not in wrong and any(whole[o:o + CHUNK]))
    assert sent(memory, good, CHUNK) == whole[good:good + CHUNK]
    for how in ("shared", "private"):
        for offset, code in ((at + 5000, -signal.SIGBUS), (good + 5000, 0)):
            done = subprocess.run([sys.executable, "-c", TOUCH, memory, str(offset), how], capture_output=True, text=True, check=False)
            assert done.returncode == code, f"{how}, at {offset}: {done.returncode} {done.stderr}"
            assert code or int(done.stdout) == whole[offset], f"{how}: a wrong byte at {offset}"
    # exporting is refused, and leaves nothing
    for source, sentence in (("sbx1/p", "Input/output error"), (place, f"memory at offset {at} is damaged")):
        out = again.run("export", source, case.dir / "stream", check=False)
        assert out.code == 1 and sentence in out.err, out.err
        assert not (case.dir / "stream").exists() and not (case.dir / "stream.partial").exists()
    # put right, it is right: nothing was remembered
    with open(place / "memory.pack.0", "r+b") as f:
        f.seek(byte)
        f.write(old)
    assert hashlib.sha256(memory.read_bytes()).digest() == hashlib.sha256(whole).digest()
    assert ": ok" in again.run("verify", "sbx1/p").out
