"""Acknowledgements by vsock. The peer speaks as a Firecracker does on the host's side: it connects to the child's socket for the port that
the payload names. The VMM is the project's own, and the waiter the command's; a real Firecracker: test_firecracker_ack.py."""

import json
import os
import pathlib
import re
import socket
import threading
import time

from forkfs_test import agent, children, microvm, processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

MIB = 16
PORT = 5242
WITH_VSOCK = [*children.MICRO, "--vsock={vsock}"]
TIMEOUT = {"test_attacks": 120}


def micro_rig(case):
    """A microVM whose guest acknowledges nothing, and its branch b1."""
    r = ApiRig(case, MicroVm(case, "sbx1", mib=MIB, kind="memfd", mailbox="config,s3cret", silent=1))
    assert rig.wait_settled(r.branch("b1")) == "ready"
    return r


def fork(r, name, payload=None, ms=30000):
    """A fork of b1 whose payload is to be acknowledged; its epoch as hex digits."""
    box = {"name": "config", "payload": payload or {"task": name}, "wait_for_ack": True, "ack_timeout_ms": ms}
    rig.request(r.sandbox / "ctl", fork={"branch": "b1", "name": name, "mailboxes": [box]})
    return json.loads((r.sandbox / "branches/b1/forks" / name / "status").read_text())["epoch"].replace("-", "")


class Waiting(threading.Thread):
    """Runs `forkfs restore` of one child, whose guest has its payload when this object is there."""

    def __init__(self, r, target, vmm=None):
        super().__init__(daemon=True)
        self.r, self.target, self.vmm = r, target, vmm or WITH_VSOCK
        self.found = self.result = self.error = None
        self.before = set((r.mount.case.dir / "ch").glob("*"))
        self.start()
        self.dir, self.payload = self._mail()

    def run(self):
        """The thread."""
        try:
            self.found, self.result = children.run(self.r.mount, self.target, *children.micro_options(self.r.mount.case),
                                                   kind=children.MicroChild, vmm=self.vmm, check=False)
        except AssertionError as e:
            self.error = e

    def _mail(self):
        while self.is_alive():
            for directory in set((self.r.mount.case.dir / "ch").glob("*")) - self.before:
                try:
                    found = microvm.mails((directory / "stdout").read_bytes())
                except FileNotFoundError:
                    continue
                if found:
                    return directory, found[0][1]
            time.sleep(0.002)
        raise AssertionError(f"the child has got nothing: {self.result and self.result.err} {self.error}")

    def dial(self):
        """What a Firecracker does when its guest connects to that port of the host."""
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(f"{self.dir}/vsock_{PORT}")  # with a time-out it would not wait for room in the queue
        peer.settimeout(30)
        return peer

    def say(self, *pieces, close=True):
        """A connection with that in it, piece by piece; what the host does then."""
        with self.dial() as peer:
            for piece in pieces:
                peer.sendall(piece)
            if close:
                peer.shutdown(socket.SHUT_WR)
            return closed(peer)

    def end(self):
        """The command's result."""
        self.join(60)
        assert not self.is_alive() and not self.error, self.error
        return self.found, self.result


def closed(peer):
    """Wait until the host has closed it; whether that was in order."""
    try:
        assert not peer.recv(1)
        return True
    except ConnectionResetError:
        return False


def text(epoch, name="config"):
    """The right one."""
    return f"stage=applied mailbox={name} epoch={epoch}\n".encode()


def test_said(case):
    """The payload names the port; the exact text counts, whatever its order; the connection is closed for it, and nothing is left."""
    r = micro_rig(case)
    epoch = fork(r, "c1", {"n": 9007199254740993, "a": "ä"})
    waiting = Waiting(r, "sbx1/b1/c1")
    assert re.fullmatch(r'{"ack_vsock_port":5242,"ack_port":\d+,"n": ?9007199254740993, ?"a": ?"(ä|\\u00e4)"}', waiting.payload), waiting.payload
    assert waiting.say(f"ms=3 epoch={epoch}  mailbox=config stage=applied\n".encode(), close=False)
    (child,), result = waiting.end()
    assert result.code == 0 and child.said["acks"][0]["state"] == "applied", child.said
    assert not sum(child.said["acks_ignored"].values()), child.said
    assert child.said["sockets"]["vsock"] == str(child.dir / "vsock")
    assert not list(child.dir.glob("vsock_*")), list(child.dir.iterdir())
    child.check_sane()
    # each child has its own: an ACK of one is none of its sibling's
    first, second = Waiting(r, "sbx1/b1/c1"), Waiting(r, "sbx1/b1/c1")
    assert first.dir != second.dir and first.say(text(epoch))
    assert first.end()[1].code == 0 and second.is_alive()
    assert second.say(text(epoch)) and second.end()[1].code == 0


def test_attacks(case):
    """Half a line, one without end, two at once, another epoch, what came before, connections that stay open or close: ignored, counted, bounded."""
    r = micro_rig(case)
    epoch = fork(r, "c1")
    waiting = Waiting(r, "sbx1/b1/c1")
    command, = (p for p, _ in agent.children(os.getpid()) if b"restore" in pathlib.Path(f"/proc/{p}/cmdline").read_bytes())
    files = len(processes.open_files(command))
    right = text(epoch)
    waiting.say(right[:-1])  # a text that has no end: the beginning of another, for all one knows
    waiting.say(b"x" * 600)
    waiting.say(right[:-1] + b" " * 600 + b"\n")
    waiting.say(b"stage=applied mailbox=config10 epoch=" + epoch.encode() + b"\n" + text("0" * 32))  # two at once
    waiting.say(text("0" * 32), close=False)
    waiting.say(b"stage=applied mailbox=config\n", close=False)
    waiting.say(b"\n", close=False)
    waiting.say(b"\xff\0\n")
    waiting.say()
    waiting.dial().close()
    with waiting.dial() as hurried:
        hurried.sendall(right[:20])
    # they stay, up to a bound: whoever was first goes when others come
    staying = [waiting.dial()]
    staying[0].sendall(right[:-1])
    staying += [waiting.dial() for _ in range(100)]
    closed(staying[0])
    flood = waiting.dial()
    try:
        for _ in range(64):
            flood.sendall(b"y" * 65536)
        closed(flood)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert len(processes.open_files(command)) - files <= 16 + 1, processes.open_files(command)
    assert waiting.is_alive()
    assert waiting.say(right[:10], right[10:30], right[30:])
    (child,), result = waiting.end()
    ignored = child.said["acks_ignored"]
    assert result.code == 0 and child.said["acks"][0]["state"] == "applied", result.err
    # without an end: right[:-1], x, right[:20], flood, and perhaps staying[0]; then too long, "", and no text
    assert {k: v for k, v in ignored.items() if k != "malformed"} == {"other": 1, "forged": 3, "duplicate": 0, "late": 0}, ignored
    assert 7 <= ignored["malformed"] <= 8, ignored
    for peer in staying:
        closed(peer)
        peer.close()
    flood.close()
    child.check_sane()


def test_listening(case):
    """A failure when it listens, or another who has that socket, is a failure of the child, and leaves nothing; what is another's stays."""
    r = micro_rig(case)
    fork(r, "c1")
    rules = case.dir / "restore-faults"
    rules.write_text("restore-vsock-loaded error:EIO\n")
    os.environ["FORKFS_FAULT_FILE"] = str(rules)
    try:
        found, result = children.run(r.mount, "sbx1/b1/c1", *children.micro_options(case), "-n", "2", kind=children.MicroChild, vmm=WITH_VSOCK, check=False)
    finally:
        del os.environ["FORKFS_FAULT_FILE"]
    assert not found and result.err.count("restore-vsock-loaded: ") == 2, result.err
    children.nothing_left(case)
    # a VMM that takes the place before its starter does: a link, which is not followed
    program = case.dir / "vmm"
    target = case.dir / "target"
    program.write_text(f'#!/bin/sh\nln -s {target} vsock_{PORT}\nexec {case.tool("../microvm/microvm")} "$@"\n')
    program.chmod(0o755)
    found, result = children.run(r.mount, "sbx1/b1/c1", "--vmm", program, vmm=WITH_VSOCK, check=False)
    assert not found and f"vsock_{PORT}, where acknowledgements come by vsock: Address already in use" in result.err, result.err
    assert not target.exists()
    children.nothing_left(case)


def test_missing(case):
    """What came too late or was forged ends the child in its time; a VMM that has no vsock, and a payload without room, have no such port."""
    r = micro_rig(case)
    epoch = fork(r, "c1", ms=5000)
    waiting = Waiting(r, "sbx1/b1/c1")
    waiting.say(text("1" * 32))
    with waiting.dial() as late:
        late.sendall(text(epoch)[:-1])
        found, result = waiting.end()
        assert not found and result.code == 1 and "not acknowledged within 5000 ms; ignored: 1 forged" in result.err, result.err
    children.nothing_left(case)
    epoch = fork(r, "c2")
    waiting = Waiting(r, "sbx1/b1/c2", children.MICRO)
    assert "ack_vsock_port" not in waiting.payload and not list(waiting.dir.glob("vsock*")), waiting.payload
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest:
        guest.sendto(text(epoch), ("127.0.0.1", json.loads(waiting.payload)["ack_port"]))
    assert waiting.end()[1].code == 0
    # 3832 bytes are all there is, and the other port has its place in them
    epoch = fork(r, "c3", {"f": "x" * (3832 - len('{"ack_port":65535,"f": ""}'))})
    waiting = Waiting(r, "sbx1/b1/c3")
    assert '"ack_port":' in waiting.payload and "ack_vsock_port" not in waiting.payload, waiting.payload[:60]
    assert waiting.say(text(epoch)) and waiting.end()[1].code == 0
