"""The file `ack` of a fork whose children others start: the daemon listens for what they say; it waits, and starves nobody."""

import errno
import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm
from forkfs_test.rig import refused

MIB = 16


def guest(case, options=""):
    """A microVM that publishes a mailbox, attached; a branch of it."""
    mount = case.mount(options=options)
    r = ApiRig(case, MicroVm(case, "sbx1", mib=MIB, kind="memfd", mailbox="config,s3cret"), mount)
    rig.request(r.sandbox / "ctl", branch={"name": "b1", "wait": True})
    return r


def fork(r, name, ms=30000):
    """A fork whose payload is to be acknowledged."""
    rig.request(r.sandbox / "ctl", fork={"branch": "b1", "name": name, "mailboxes": [
        {"name": "config", "payload": {"n": 9007199254740993, "task": name}, "wait_for_ack": True, "ack_timeout_ms": ms}]})
    return r.sandbox / "branches/b1/forks" / name


def status(f):
    """What a fork says of itself."""
    return json.loads((f / "status").read_text())


def say(port, *texts):
    """As the guest of a child says it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for text in texts:
            s.sendto(text if isinstance(text, bytes) else text.encode(), ("127.0.0.1", port))


def ignored(f, count, timeout=60):
    """Wait until so many have come that were none."""
    deadline = time.monotonic() + timeout
    while sum(status(f)["ack"]["ignored"].values()) < count:
        assert time.monotonic() < deadline, status(f)["ack"]
        time.sleep(0.005)


def started(r, name, f):
    """A child that somebody else starts from the fork's files: (port that its payload names, its epoch)."""
    child = MicroVm(r.case, f"child-{name}", mib=MIB, kind="anonymous", restore=f / "memory.bin", vmstate=f / "vmstate")
    deadline = time.monotonic() + 60
    while not child.mails():
        assert time.monotonic() < deadline, child.status()
        time.sleep(0.005)
    epoch, payload = child.mails()[0]
    m = re.fullmatch(rf'{{"ack_port":(\d+),"n": ?9007199254740993, ?"task": ?"{name}"}}', payload)
    assert m, payload
    assert epoch == status(f)["epoch"].replace("-", "")
    return child, int(m.group(1)), epoch


class Reader(threading.Thread):
    """cat of a file, in a process of its own."""

    def __init__(self, case, path):
        super().__init__(daemon=True)
        self.process = subprocess.Popen(["cat", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        case.on_end(self.process.kill)
        self.said = None
        self.start()

    def run(self):
        """The thread."""
        self.said = self.process.communicate()

    def finish(self, timeout=60):
        """What it has said."""
        self.join(timeout)
        assert not self.is_alive(), "it still waits"
        return self.said


def parked(r, readers):
    """Wait until the readers are in the daemon's hands: each is asleep in its read."""
    deadline = time.monotonic() + 30
    while any("fuse" not in open(f"/proc/{x.process.pid}/wchan", encoding="ascii").read()
              and "request_wait" not in open(f"/proc/{x.process.pid}/wchan", encoding="ascii").read() for x in readers):
        assert time.monotonic() < deadline and all(x.process.poll() is None for x in readers)
        time.sleep(0.005)


def test_applied(case):
    """A child started from the fork's files says that it is applied; who reads `ack` waits for that; what else comes is ignored and counted."""
    r = guest(case)
    f = fork(r, "c1")
    assert status(f)["ack"]["state"] == "pending"
    reader = Reader(case, f / "ack")
    child, port, epoch = started(r, "c1", f)
    assert status(f)["ack"]["port"] == port
    say(port, "hello", b"\xff" * 2000, f"stage=applied mailbox=config10 epoch={epoch}", f"stage=failed mailbox=config epoch={epoch}",
        "stage=applied mailbox=config", f"stage=applied mailbox=config epoch={'0' * 32}")
    ignored(f, 6)
    assert reader.is_alive(), reader.said
    say(port, f"ms=3 epoch={epoch} mailbox=config stage=applied\n")
    assert reader.finish() == ("applied\n", "")
    say(port, f"stage=applied mailbox=config epoch={epoch}")
    ignored(f, 7)
    assert status(f)["ack"] == {"state": "applied", "port": port, "mailboxes": {"config": "applied"}, "ignored": {
        "malformed": 2, "other": 2, "forged": 2, "duplicate": 1, "late": 0}}, status(f)["ack"]
    assert (f / "ack").read_text() == "applied\n"
    text = (r.mount / ".forkfs/metrics").read_text()
    assert rig.metric(r, "acks_total") == 1 and 'forkfs_acks_ignored_total{why="forged"} 2' in text
    # the file is for forks that ask; what was written is read back without the port
    plain = r.sandbox / "branches/b1/forks/plain"
    plain.mkdir()
    assert "ack" not in os.listdir(plain) and "ack" not in status(plain)
    refused(errno.ENOENT, (plain / "ack").read_text)
    assert json.loads((f / "mailboxes/config").read_text()) == {"n": 9007199254740993, "task": "c1"}
    child.check_sane()
    r.guest.check_runs()


def test_timeout(case):
    """Time runs when both the memory and `ack` were opened, for each fork by itself; what comes afterwards is late."""
    r = guest(case)
    quick, slow = fork(r, "quick", 300), fork(r, "slow")
    # nobody has opened its memory: nothing times out
    fd = os.open(quick / "ack", os.O_RDONLY | os.O_NONBLOCK)
    time.sleep(0.5)
    refused(errno.EAGAIN, os.read, fd, 100)
    assert status(quick)["ack"]["state"] == "pending"
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == []
    for f in (quick, slow):
        with open(f / "memory.bin", "rb") as memory:
            memory.read(1)
    assert poll.poll(30000) == [(fd, select.POLLIN)] and os.read(fd, 100) == b"timeout\n"
    os.close(fd)
    assert (quick / "ack").read_text() == "timeout\n"
    said = status(quick)
    say(said["ack"]["port"], f"stage=applied mailbox=config epoch={said['epoch']}")
    ignored(quick, 1)
    assert status(quick)["ack"]["ignored"]["late"] == 1
    assert (quick / "ack").read_text() == "timeout\n"
    # its memory was read, and nobody has asked: no time has begun
    said = status(slow)
    assert said["ack"]["state"] == "pending"
    say(said["ack"]["port"], f"stage=applied mailbox=config epoch={said['epoch']}")
    assert (slow / "ack").read_text() == "applied\n"


def test_waiting(case):
    """A hundred that wait hold nobody up; a signal ends one, removing the fork ends the others with a sentence."""
    r = guest(case)
    f, other = fork(r, "c1"), fork(r, "c2")
    readers = [Reader(case, f / "ack") for _ in range(100)]
    parked(r, readers)
    # every worker of the daemon is free
    assert len((r.sandbox / "branches/b1/memory.bin").read_bytes()) == MIB << 20
    said = status(other)
    say(said["ack"]["port"], f"stage=applied mailbox=config epoch={said['epoch']}")
    assert (other / "ack").read_text() == "applied\n"
    readers[0].process.send_signal(signal.SIGINT)
    readers[0].finish()
    assert readers[0].process.returncode == -signal.SIGINT and all(x.is_alive() for x in readers[1:])
    f.rmdir()
    for x in readers[1:]:
        assert x.finish() == ("", f"cat: {f}/ack: No such file or directory\n") and x.process.returncode == 1
    other.rmdir()
    r.mount.stop()


def test_restore(case):
    """`forkfs restore` waits for its own children, at a port of its own: the file has nothing of them."""
    r = guest(case)
    f = fork(r, "c1")
    (child,), result = children.run_micro(r.mount, "sbx1/b1/c1")
    assert result.code == 0 and child.said["acks"][0]["state"] == "applied", child.said
    (epoch, payload), port = child.mail(), status(f)["ack"]["port"]
    assert f'"ack_port":{port},' not in payload and '"ack_port":' in payload, payload
    assert status(f)["ack"]["state"] == "pending" and not sum(status(f)["ack"]["ignored"].values())
    # not waited for by the command: what such a child says comes to the daemon
    (plain,), _ = children.run_micro(r.mount, "sbx1/b1/c1", "--no-ack")
    assert f'"ack_port":{port},' in plain.mail()[1] and plain.mail()[0] == epoch
    say(port, f"stage=applied mailbox=config epoch={epoch}")
    assert (f / "ack").read_text() == "applied\n"


def test_restart(case):
    """The next daemon listens at the same port, which is in the fork's memory; where another has it, the file says so."""
    r = guest(case, options=f"store={case.dir}/store")
    kept, taken = fork(r, "kept"), fork(r, "taken")
    memory, ports = (kept / "memory.bin").read_bytes(), [status(f)["ack"]["port"] for f in (kept, taken)]
    epoch = status(kept)["epoch"]
    r.mount.kill()
    r.mount.clear_dead()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", ports[1]))
        r.mount = case.mount("mnt2", options=f"store={case.dir}/store,reattach=off")
        forks = r.mount.path / "sbx1/branches/b1/forks"
        assert (forks / "kept/memory.bin").read_bytes() == memory and status(forks / "kept")["ack"]["port"] == ports[0]
        reader = Reader(case, forks / "kept/ack")
        say(ports[0], f"stage=applied mailbox=config epoch={epoch}")
        assert reader.finish() == ("applied\n", "")
        refused(errno.EADDRINUSE, (forks / "taken/ack").read_text)
        assert str(ports[1]) in r.mount.error_of(forks / "taken") and str(ports[1]) in status(forks / "taken")["ack"]["error"]
        assert len((forks / "taken/memory.bin").read_bytes()) == MIB << 20
    bad = case.run(case.forkfs(), "mount", case.dir / "mnt2", "-f", "-o", "ack-address=nowhere", check=False)
    assert bad.code and "ack-address" in bad.err, bad.err
