"""Hosts of an agent that come and go: one after the other at a port, and links that are killed."""

import os
import signal
import socket
import subprocess

from forkfs_test import agent, processes, wire

HOSTS = 100
# in quotes, as the kernel keeps them together
BUSY = '"for i in 1 2 3 4; do (while :; do :; done) & done; wait"'


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
    gone."""
    guest = case.guest(agent=True, mib=96, run=["sh", "-c", BUSY]).booted()
    epoch = os.urandom(16)
    for i in range(HOSTS):
        seen = handshake(guest.dir / "agent", epoch)
        assert seen == ["BEGIN", "REBOUND", "ACK", "OUTPUT", "PONG"], (i, seen)
    assert agent.run(case, guest, "echo", "there").out == "there\n"


def test_link_killed(case):
    """Whoever waits for a command when the link is killed hears so, and never of a code that was not told; a log that may not be whole is called that."""
    path, process = agent.service(case)
    p = case.start(*agent.exec_command(case, path, "sh", "-c", "echo one; exec sleep 600"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "one\n"
    os.kill(agent.link_of(path), signal.SIGKILL)
    out, err = p.communicate(timeout=60)
    assert (p.returncode, out) == (125, "") and "hung up on" in err, (p.returncode, out, err)
    agent.wait_for(lambda: not agent.children(process.pid), "the command runs on")
    # its end was told to the link, which has not passed it on
    p = case.start(*agent.exec_command(case, path, "sh", "-c", "echo one; read x; exit 0", options=["-i"]), stdin=subprocess.PIPE,
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "one\n"
    (child,) = [pid for pid, _ in agent.children(process.pid)]
    link = agent.link_of(path)
    os.kill(link, signal.SIGSTOP)
    os.kill(child, signal.SIGKILL)
    assert processes.wait_gone(child, 60)
    os.kill(link, signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 125 and "is lost" in err, (p.returncode, err)
    # a main command whose end is in its file
    file, log = case.dir / "code", case.dir / "main.log"
    path, _ = agent.service(case, "other", options=["--exit-file", file])
    options = ["--main", "--log", log, "--exit-file", file]
    p = case.start(*agent.exec_command(case, path, "sh", "-c", f"echo up; until [ -e {case.dir}/go ]; do sleep 0.05; done; echo last", options=options),
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    agent.wait_text(log, "up")
    link = agent.link_of(path)
    os.kill(link, signal.SIGSTOP)
    (case.dir / "go").touch()
    agent.wait_for(file.exists, "no exit file")
    os.kill(link, signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 0 and "may not be whole" in err and "last" not in log.read_text(), (p.returncode, err)
