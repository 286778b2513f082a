"""The handshake with agents in real, restored guests, when frames of it are late or never come; and the health of those that are through."""

import json
import os
import signal
import socket
import subprocess
import threading

from forkfs_test import agent, children, rig, wire

# An edge, the frame of the guest by which it happens, and the time that it has, as the error says it.
EDGES = [("begun", "BEGIN", "2.0"), ("rebound", "REBOUND", "5.0"), ("acknowledged", "ACK", "5.0"), ("output", "OUTPUT", "30.0"),
         ("healthy", "PONG", "30.0")]
READY = ["--ready-timeout", "2"]


def some_children(case, n):
    """Children of a guest whose agent was talked to: the sockets of their agents. Nobody has connected to them."""
    r = rig.Rig(case, guest=case.guest(agent=True, mib=128, run=[]).booted())
    agent.run(case, r.guest, "true")
    assert rig.wait_settled(r.branch("b1")) == "ready"
    found, _ = children.run(r.mount, "sbx1/b1", "-n", str(n))
    return [child.dir / "agent.sock" for child in found]


def silent_from(frame):
    """Nothing of the guest goes on from that frame on."""
    gone = threading.Event()

    def may_pass(name, _):
        if name == frame:
            gone.set()
        return not gone.is_set() or wire.TYPES[name] < wire.TYPES["BEGIN"]

    return may_pass


def without(frame):
    """That frame does not go on; the others do."""
    return lambda name, _: name != frame


def try_all(case, sockets, edges, rule):
    """A command in each guest, behind a proxy with that rule for its edge; (edge, frame, proxy, what the command did)."""
    proxies = [wire.Proxy(case, f"{s}.{rule.__name__}", s, rule(frame)) for s, (_, frame, _) in zip(sockets, edges)]
    results = agent.side_by_side(len(edges), lambda i: agent.run(case, proxies[i].path, "true", options=READY, check=False, timeout=100))
    for (edge, frame, _), proxy, done in zip(edges, proxies, results):
        assert done.code == 125 and "EXEC" not in proxy.log and frame.lower() not in proxy.log, (edge, proxy.log, done.err)
        assert ("PING" in proxy.log) == (edge == "healthy"), (edge, proxy.log)
        assert not os.path.exists(f"{proxy.path}.link")
        proxy.stop()
    return [done.err for done in results]


def test_missing(case):
    """Each edge of the handshake never comes, in a restored guest of its own: the command fails at its bound and names it; health is not asked
    for before its time, nothing is run; and a host that hears everything has the guest afterwards. With --long also those that have 30 s."""
    edges = EDGES if case.long else EDGES[:3]
    sockets = some_children(case, len(edges))
    for (edge, _, seconds), said in zip(edges, try_all(case, sockets, edges, silent_from)):
        assert f"within {seconds} s (edge '{edge}')" in said, (edge, said)
    for (edge, _, _), said in zip(EDGES[:3], try_all(case, sockets, EDGES[:3], without)):
        assert f"when '{edge}' was due" in said, (edge, said)
    said = agent.side_by_side(len(edges), lambda i: agent.shell(case, sockets[i], f"echo {i}").out)
    assert said == [f"{i}\n" for i in range(len(edges))], said


def test_late(case):
    """Each edge comes, and only when it is let: until then the guest is not healthy, and the edge is what is waited for."""
    (path,) = some_children(case, 1)
    held, go = {edge: threading.Event() for edge, _, _ in EDGES}, {edge: threading.Event() for edge, _, _ in EDGES}
    edge_of = {frame: edge for edge, frame, _ in EDGES}

    def may_pass(name, _):
        if name in edge_of:
            held[edge_of[name]].set()
            assert go[edge_of[name]].wait(100)
        return True

    proxy = wire.Proxy(case, f"{path}.proxy", path, may_pass)
    running = case.start(*agent.exec_command(case, proxy.path, "echo", "there"), stdout=subprocess.PIPE)
    for edge, frame, _ in EDGES:
        assert held[edge].wait(60), f"'{edge}' does not come: {proxy.log}"
        known = wire.what_link_knows(proxy.path)
        assert (known["due"], known["healthy"], known["error"]) == (edge, False, None), known
        assert ("PING" in proxy.log) == (edge == "healthy") and "EXEC" not in proxy.log, (edge, proxy.log)
        go[edge].set()
    assert running.communicate(timeout=60)[0] == b"there\n" and running.returncode == 0
    order = [name for name in dict.fromkeys(proxy.log) if name in ("begin", "rebound", "ack", "output", "PING", "pong", "EXEC")]
    assert order == ["begin", "rebound", "ack", "output", "PING", "pong", "EXEC"], proxy.log
    known = wire.what_link_knows(proxy.path)
    assert (known["due"], known["healthy"], known["guest_was"]) == (None, True, "restored"), known


def test_not_connected(case):
    """A VM that takes no connection: the edge 'connected'."""
    path = case.dir / "busy.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        fillers = []
        while True:
            filler = socket.socket(socket.AF_UNIX)
            filler.setblocking(False)
            fillers.append(filler)
            if filler.connect_ex(str(path)):
                break
        done = agent.run(case, path, "true", options=READY, check=False)
        assert done.code == 125 and "within 2.0 s (edge 'connected')" in done.err, done.err
        for filler in fillers:
            filler.close()


class Agent(wire.Listener):
    """An agent that is none: it says `before` when a host has come, then what is right until it has said `last`."""

    def __init__(self, case, before, after_begin=b""):
        self.before, self.after_begin = before, after_begin
        super().__init__(case, case.dir / f"fake-{len(before)}-{len(after_begin)}.sock")

    def serve(self, sock):
        sock.sendall(self.before)
        for name, _, payload in wire.Reader(sock):
            if name == "HELLO":
                nonce, epoch = payload[:16], payload[16:32]
                sock.sendall(wire.encode("BEGIN", nonce + epoch + b"\2") + self.after_begin + wire.encode("REBOUND", nonce) +
                             wire.encode("ACK", nonce + bytes(33)) + wire.encode("OUTPUT", nonce))
            elif name == "PING":
                sock.sendall(wire.encode("PONG", payload))


def test_older_session(case):
    """What an older session has left in the channel (errors, answers, ends of commands, half a frame) is passed over; an error of this one counts."""
    other = bytes(range(16))
    left = wire.encode("EXIT", b"\0\3", 0x10001) + wire.encode("ERROR", b"of another time") + wire.encode("PONG", b"health") + \
        wire.encode("BEGIN", other * 2 + b"\2") + wire.encode("REBOUND", other) + wire.encode("OUTPUT", other) + wire.encode("ACK", other)[:20]
    fake = Agent(case, left)
    assert case.run(case.forkfs(), "health", "--socket", fake.path).out == "healthy\n"
    fake = Agent(case, b"", wire.encode("ERROR", b"no room"))
    done = case.run(case.forkfs(), "health", "--socket", fake.path, check=False)
    assert done.code == 1 and "the guest's agent says: no room" in done.err, done.err


def test_health(case):
    """`forkfs health`: an agent that answers, one that has stopped to, one that does again, none at all."""
    path, process = agent.service(case)
    command = [case.forkfs(), "health", "--socket", path]
    assert case.run(*command).out == "healthy\n"
    known = json.loads(case.run(*command, "--json").out)
    assert known["healthy"] and known["due"] is None and not known["missed"], known
    os.kill(process.pid, signal.SIGSTOP)
    done = case.run(*command, "--wait", "1", check=False)
    assert done.code == 1 and not done.out and "has not answered within 1 s" in done.err, done
    done = case.run(*command, "--wait", "1", "--json", check=False)
    assert done.code == 1 and not json.loads(done.out)["healthy"], done.out
    waiting = case.start(*command, "--wait", "100", stdout=subprocess.PIPE)
    os.kill(process.pid, signal.SIGCONT)
    assert waiting.communicate(timeout=60)[0] == b"healthy\n" and waiting.returncode == 0
    process.kill()
    process.wait()
    assert case.run(*command, check=False).code == 1
    silent = case.dir / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(silent))
        listener.listen(5)
        done = case.run(case.forkfs(), "health", "--socket", silent, "--wait", "1", check=False)
        assert done.code == 1 and "at the edge 'begun'" in done.err, done.err
    for words in ([], ["a", "b"], ["--socket", "/x", "sbx1"], ["sbx1", "--wait", "x"]):
        done = case.run(case.forkfs(), "health", *words, check=False)
        assert done.code == 2 and "usage:" in done.err, (words, done.err)
