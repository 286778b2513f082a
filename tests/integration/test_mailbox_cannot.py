"""A payload for a VM that can't be branched: refused by the write that completes it, before the guest is stopped, and nothing is left of it."""

import errno
import mmap
import os

from forkfs_test import rig
from forkfs_test.guest import Guest
from forkfs_test.rig import refused


class Unsaveable(Guest):
    """A QEMU with a device whose state it can't save."""

    def _command(self, memory):
        return [*super()._command(memory), "-device", "nvme,serial=x"]


def write_once(path, data):
    """One write(2); the handle is closed whatever comes."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def check_refused(r, code, words):
    """Every way to a payload or to its branch is refused with that errno and sentence; the guest was never stopped."""
    box = r.sandbox / "mailboxes"
    assert os.listdir(box) == ["config"]  # looking can be done
    refused(code, write_once, box / "config", b'{"task":7}')
    assert words in r.mount.error_of(box), r.mount.error_of(box)
    assert box.joinpath("config").read_bytes() == b""
    refused(errno.ENOENT, box.joinpath("config").unlink)
    refused(code, os.open, r.sandbox / "branch/memory.bin", os.O_RDONLY)
    refused(code, os.mkdir, r.sandbox / "branches/b1")
    assert r.guest.stops() == 0, "the guest was stopped for what can't be done"
    assert rig.metric(r, "generations") == 0 and rig.metric(r, "generations_total") == 0
    assert os.listdir(r.sandbox / "branches") == []
    r.guest.check_runs(within=5)


def test_unsaveable(case):
    """QEMU has a device whose state can't be saved: EOPNOTSUPP, naming it."""
    guest = Unsaveable(case, "sbx1", run=["counter", "mailbox,config,s3cret"], machine="q35", mib=96)
    guest.console.wait("^mailbox config ready$", timeout=60)
    check_refused(rig.Rig(case, guest=guest), errno.EOPNOTSUPP, "nvme")


def test_foreign(case):
    """Another process can write the guest's memory: EBUSY, naming it; once it can't the same payload is taken."""
    r = rig.Rig(case, mib=96, run=["counter", "mailbox,config,s3cret"])
    r.guest.console.wait("^mailbox config ready$", timeout=60)
    fd = os.open(r.guest.memfd(), os.O_RDWR)
    mapping = mmap.mmap(fd, 4096)
    os.close(fd)
    check_refused(r, errno.EBUSY, str(os.getpid()))
    mapping.close()
    write_once(r.sandbox / "mailboxes/config", b'{"task":7}')
    assert (r.sandbox / "mailboxes/config").read_bytes() == b'{"task":7}' and r.guest.stops() == 1
