"""Branches of a stock Firecracker whose guest uses its devices: connections over the vsock are counted, the drive is consistent with the
memory. Where there is no Firecracker: skipped."""

import json
import pathlib
import re
import socket
import threading
import time

from forkfs_test import rig
from forkfs_test.api import ApiRig
from forkfs_test.firecracker import Firecracker, drive, jail_options, restore

WORK, PORT = 16, 52
QUIET = ("--", "--level", "Off")  # a child's log would be in the middle of what its guest says
TIMEOUT = {"test_vsock": 180, "test_drive": 180}


class Echo:
    """Listens where a Firecracker looks for port 52 of the host, and sends back what comes."""

    def __init__(self, case, path):
        self.accepted = 0
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(f"{path}_{PORT}")
        self._listening.listen()
        path.parent.joinpath(f"{path.name}_{PORT}").chmod(0o666)
        case.on_end(lambda: self._listening.shutdown(socket.SHUT_RDWR))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        try:
            while True:
                peer, _ = self._listening.accept()
                self.accepted += 1
                threading.Thread(target=self._answer, args=(peer,), daemon=True).start()
        except OSError:
            self._listening.close()

    @staticmethod
    def _answer(peer):
        with peer:
            try:
                while some := peer.recv(4096):
                    peer.sendall(some)
            except OSError:
                pass


def wait(what, text, pattern, count=1, timeout=60):
    """Wait until what `text()` gives has so many lines of a pattern."""
    deadline = time.monotonic() + timeout
    while len(re.findall(pattern, text(), re.M)) < count:
        assert "MISMATCH" not in text(), text()[-500:]
        assert time.monotonic() < deadline, f"{what} has not said {pattern} {count} times: {text()[-500:]}"
        time.sleep(0.005)


def lost(text):
    """How many connections have got lost."""
    return len(re.findall(r"^vsock lost$", text, re.M))


def console(guest):
    """All that a guest has said."""
    return (guest.dir / "console").read_text(errors="replace")


def exchanged(guest_console, timeout=60):
    """Wait until numbers come back over a connection that is open now."""
    seen = len(re.findall(r"^vsock [0-9a-f]{16}$", guest_console(), re.M))
    wait("the guest", guest_console, r"^vsock [0-9a-f]{16}$", seen + 2, timeout)


def test_vsock(case):
    """A branch costs as many connections as are open: none, or one; the guest connects anew, and so does the guest of a child."""
    path = case.dir / "vsock"
    guest = Firecracker(case, "sbx1", mib=64, work=WORK, drivers=True, devices={"vsock": {"guest_cid": 3, "uds_path": str(path)}})
    r = ApiRig(case, guest)
    # nobody listens, nothing is open
    assert rig.wait_settled(r.branch("none")) == "ready"
    guest.visit_all(1)
    assert "vsock open" not in console(guest) and lost(console(guest)) == 0
    echo = Echo(case, path)
    exchanged(lambda: console(guest))
    before = echo.accepted
    for i in range(4):
        assert rig.wait_settled(r.branch(f"b{i}")) == "ready"
        wait("the guest", lambda: console(guest), "^vsock open$", i + 2)
        exchanged(lambda: console(guest))
        assert (lost(console(guest)), echo.accepted - before) == (i + 1, i + 1), console(guest)[-500:]
    assert json.loads((r.sandbox / "branches/b0/manifest.json").read_text())["vmm"]["resets_vsock"] is True
    assert json.loads((r.sandbox / "status").read_text())["resets_vsock"] is True
    version = tuple(int(n) for n in json.loads((r.sandbox / "status").read_text())["vmm_version"].split(".")[:2])
    if version >= (1, 16):
        (child,), _ = restore(r.mount, "sbx1/b3", *QUIET)
        own = Echo(case, child.dir / "vsock")
        wait("the child", child.console, "^vsock open$")
        exchanged(child.console)
        assert (lost(child.console()), own.accepted) == (1, 1), child.console()[-500:]
        child.visit_all(WORK, 1)
        ours, theirs = jail_options(case, 12345, 12346)
        (jailed,), _ = restore(r.mount, "sbx1/none", *ours, "--", *theirs, *QUIET)
        assert jailed.said["sockets"]["vsock"] == f"{jailed.said['jail']}/vsock", jailed.said
        own = Echo(case, pathlib.Path(jailed.said["sockets"]["vsock"]))
        exchanged(jailed.console)
        assert (lost(jailed.console()), own.accepted) == (0, 1), jailed.console()[-500:]
    assert lost(console(guest)) == 4
    guest.visit_all(1)


def test_drive(case):
    """The guest writes its drive without end and judges what it reads: parent and children never find another disk than their memory
    knows; a child that is given the disk of a later instant does."""
    disk = case.dir / "disk"
    disk.write_bytes(bytes(1 << 20))
    guest = Firecracker(case, "sbx1", mib=64, work=WORK, drivers=True, devices={"drives": [drive(disk, "root")]}).booted()
    mount = case.mount()
    sandbox = mount.attach(guest, None, "--disk", f"root={disk}")
    wait("the guest", lambda: console(guest), "^disk [0-9a-f]{16}$", 2)
    for i in range(4):
        branch = sandbox / "branches" / f"b{i}"
        branch.mkdir()
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        seen = len(re.findall("^disk ", console(guest), re.M))
        wait("the guest", lambda: console(guest), "^disk [0-9a-f]{16}$", seen + 2)  # pylint: disable=cell-var-from-loop
    found, _ = restore(mount, "sbx1/b0", "-n", "2", *QUIET)
    ours, theirs = jail_options(case, 12345, 12346)
    found += [restore(mount, f"sbx1/b{i}", *ours, "--", *theirs, *QUIET)[0][0] for i in (1, 2, 3)]
    for child in found:
        wait("the child", child.console, "^disk [0-9a-f]{16}$", 3)
        child.visit_all(WORK, 1)
    later = case.dir / "later"
    later.write_bytes((sandbox / "branches/b3/disks/root").read_bytes())
    (wrong,), _ = restore(mount, "sbx1/b0", "--drive", f"root={later}", *QUIET)
    deadline = time.monotonic() + 60
    while "DISK MISMATCH" not in wrong.console():
        assert wrong.alive() and time.monotonic() < deadline, wrong.console()[-300:]
        time.sleep(0.01)
    guest.visit_all(1)
    assert "MISMATCH" not in console(guest)
