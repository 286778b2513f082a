"""Hosts of an agent that come and go: one after the other at a port."""

import os
import signal
import socket
import subprocess

from forkfs_test import agent, wire

HOSTS = 100
BUSY = "for i in 1 2 3 4; do (while :; do :; done) & done; wait"


def handshake(path, epoch):
    """A host at the port: what it hears until its first PING is answered, and then it goes."""
    nonce, seen = os.urandom(16), []
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(30)
        s.connect(str(path))
        s.sendall(wire.encode("HELLO", nonce + epoch + bytes(8 + 32 + 16 + 6 + 4 + 1 + 4)))
        try:
            for name, _, payload in wire.Reader(s):
                if name == "PONG" or payload[:16] == nonce:
                    seen.append(name)
                if name == "OUTPUT":
                    s.sendall(wire.encode("ACCEPT", nonce) + wire.encode("PING", b"x"))
                if name == "PONG":
                    break
        except TimeoutError:
            pass
    return seen


def test_one_after_the_other(case):
    """Each of a hundred hosts that take each other's place at once has a whole handshake, in a guest that is so busy that it hears late who has
    gone; and commands of one that is gone for good are hung up on."""
    guest = case.guest(agent=True, mib=96, run=["sh", "-c", BUSY]).booted()
    epoch = os.urandom(16)
    for i in range(HOSTS):
        seen = handshake(guest.dir / "agent", epoch)
        assert seen == ["BEGIN", "REBOUND", "ACK", "OUTPUT", "PONG"], (i, seen)
    p = case.start(*agent.exec_command(case, guest, "sh", "-c", "trap 'echo hung up >/dev/console' HUP; echo up; while :; do sleep 0.1; done"),
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "up\n"
    os.kill(agent.link_of(guest.dir / "agent"), signal.SIGKILL)
    assert p.wait(timeout=60) == 125
    guest.console.wait("hung up", timeout=60)
    assert agent.run(case, guest, "echo", "there").out == "there\n"
