"""Mailboxes of the agent: each fork of a guest reports its own payload through the agent's command, and says so to the host."""

import json
import os
import re
import socket
import struct

from forkfs_test import agent, children, rig
from forkfs_test.case import Skip
from forkfs_test.mailbox import MAGIC, frame

FORKS = 10
COMMAND = 'p=$(cat); echo took $FORKFS_MAILBOX $FORKFS_EPOCH $p; case $p in $FORKFS_PAYLOAD);; *) exit 4;; esac; case $p in *fail*) exit 3;; esac'


def fork(sandbox, branch, name, payloads, timeout_ms=30000):
    """A fork whose payloads are to be acknowledged; its epoch."""
    boxes = [{"name": n, "payload": p, "wait_for_ack": True, "ack_timeout_ms": timeout_ms} for n, p in payloads.items()]
    rig.request(sandbox / "ctl", fork={"branch": branch, "name": name, "mailboxes": boxes})
    return json.loads((sandbox / "branches" / branch / "forks" / name / "status").read_text())["epoch"]


def report(child, mailbox, epoch, task):
    """Wait for what the command in the child says; and it must be the only thing."""
    child.wait_console(rf'^took {mailbox} {epoch} {{"ack_port":\d+,"task": {task}}}')


def test_forks(case):
    """Ten forks of a Linux guest whose process 1 is the agent have ten payloads; two mailboxes at once; a fork of a child; a command that fails."""
    append = f'forkfs.mailbox=config:s3cret forkfs.mailbox=other forkfs.on_mailbox="{COMMAND}"'
    r = rig.Rig(case, guest=case.guest(agent=True, mib=128, run=[], append=append).booted())
    assert rig.wait_settled(r.branch("b1")) == "ready"
    memory = (r.sandbox / "branches/b1/memory.bin").read_bytes()
    found = [m.start() for m in re.finditer(re.escape(MAGIC), memory)]
    assert len(found) == 2 and not any(at % 4096 for at in found), found
    epochs = {i: fork(r.sandbox, "b1", f"c{i}", {"config": {"task": i}}) for i in range(FORKS)}
    for i, epoch in epochs.items():
        (child,), _ = children.run(r.mount, f"sbx1/b1/c{i}")
        assert [(a["mailbox"], a["state"]) for a in child.said["acks"]] == [("config", "applied")], child.said
        assert not sum(child.said["acks_ignored"].values()), child.said
        report(child, "config", epoch, i)
        assert len(re.findall("^took", child.console(), re.M)) == 1, child.console()
        child.stop()
    epoch = fork(r.sandbox, "b1", "two", {"config": {"task": 1}, "other": {"task": 2}})
    (child,), _ = children.run(r.mount, "sbx1/b1/two", "--attach", "web")
    assert [a["state"] for a in child.said["acks"]] == ["applied", "applied"], child.said
    report(child, "config", epoch, 1)
    report(child, "other", epoch, 2)
    web = r.mount.path / "web"
    (web / "branches/b2").mkdir()
    assert rig.wait_settled(web / "branches/b2") == "ready"
    epoch = fork(web, "b2", "d1", {"other": {"task": 3}})
    (second,), _ = children.run(r.mount, "web/b2/d1")
    report(second, "other", epoch, 3)
    assert len(re.findall("^took", second.console(), re.M)) == 1, second.console()
    epoch = fork(r.sandbox, "b1", "bad", {"config": {"task": "fail"}}, 2000)
    none, result = children.run(r.mount, "sbx1/b1/bad", check=False)
    assert not none and "mailbox config was not acknowledged within 2000 ms" in result.err, result.err


def service_memory(pid):
    """The memory of a process in which a mailbox may be: a file, and [(begin, end)]."""
    ranges = []
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        for line in maps:
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            if line.split()[1].startswith("rw") and end - begin <= 1 << 20:
                ranges.append((begin, end))
    return f"/proc/{pid}/mem", ranges


class Page:
    """The mailbox of an agent, written as a host writes into a fork. memory: a file, and where to look in it."""

    def __init__(self, memory, name):
        self.memory = os.open(memory[0], os.O_RDWR)
        self.at, = [at for begin, end in memory[1] for at in range(begin, end, 4096) if self._marker(at) == name]

    def _marker(self, at):
        marker = os.pread(self.memory, 89, at)
        return marker[24:].split(b"\0")[0].decode("latin-1") if marker.startswith(MAGIC) else None

    def put(self, payload, epoch, flags=3, damage=None):
        """Payload, extension, length, and seq last."""
        for at, data in frame(payload, epoch, flags):
            data = bytes([data[0] ^ 1]) + data[1:] if at == damage else data
            os.pwrite(self.memory, data, self.at + at)

    def word(self):
        """The ACK in the page: (is it there, its checksum)."""
        return struct.unpack("<II", os.pread(self.memory, 8, self.at + 232))

    def taken(self):
        """True when the mailbox is free again."""
        return not any(os.pread(self.memory, 4, self.at + 256))


def test_service(case):
    """What is damaged or was there before is dropped; a payload that comes while the command runs is next; an ACK over UDP, none of a failure."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(60)
        port = host.getsockname()[1]
        said, gate = case.dir / "said", case.dir / "gate"
        script = (f"cat >> {said}; echo \" $FORKFS_MAILBOX $FORKFS_EPOCH\" >> {said}; "
                  f"case $FORKFS_PAYLOAD in *wait*) while [ ! -e {gate} ]; do sleep 0.02; done;; *fail*) exit 3;; esac")
        path, process = agent.service(case, options=["--mailbox", "config:s3cret", "--mailbox", "config:again", "--mailbox", "a/b", "--on-mailbox", script,
                                                     "--ack-address", "127.0.0.1"])
        log = case.dir / "agent.log"
        page = Page(service_memory(process.pid), "config")

        def lines():
            return said.read_text().splitlines() if said.exists() else []

        epochs = [bytes([i] * 16) for i in range(8)]
        page.put(b'{"a":{"ack_port":1},"b":"ack_port","ack_port": %d}' % port, epochs[1])
        assert host.recv(512) == b"stage=applied mailbox=config epoch=" + epochs[1].hex().encode() + b"\n"
        assert page.word()[0] == 1 and page.taken()
        uuid = "01010101-0101-0101-0101-010101010101"
        assert lines() == [f'{{"a":{{"ack_port":1}},"b":"ack_port","ack_port": {port}}} config {uuid}'], lines()
        page.put(b'{"task":1}', epochs[2], damage=264)
        agent.wait_text(log, "a damaged payload is dropped")
        page.put(b'{"task":1}', epochs[1])
        agent.wait_text(log, "a payload that was here before is dropped")
        assert page.word()[0] == 0 and len(lines()) == 1
        page.put(b'{"fail":1,"ack_port":%d}' % port, epochs[3])
        agent.wait_text(log, "no ACK, its command has ended with 3")
        assert page.word()[0] == 0 and len(lines()) == 2
        # a fork of this moment: what it was told is next, and the ACK of what went on before is not its
        page.put(b'{"wait":1,"ack_port":%d}' % port, epochs[4])
        agent.wait_for(lambda: len(lines()) == 3, "the command has not begun")
        page.put(b'{"next":1,"ack_port":%d}' % port, epochs[5])
        gate.touch()
        assert epochs[4].hex().encode() in host.recv(512)
        assert epochs[5].hex().encode() in host.recv(512)
        agent.wait_for(lambda: page.word()[0] == 1, "no ACK in the page")
        assert len(lines()) == 4
        # one of the original layout: no extension, no wish for an ACK in the page
        page.put(b'{"old":1,"ack_port":%d}' % port, None)
        assert host.recv(512).startswith(b"stage=applied mailbox=config ")
        assert len(lines()) == 5
        text = log.read_text()
        assert "mailbox config is named twice" in text and "mailbox 'a/b': a name has 1 to 64" in text, text
        assert not agent.children(process.pid)
        assert agent.run(case, path, "true").code == 0


def test_command(case):
    """A program without a shell; one that is not there; mailboxes without a command are refused, and the agent works on."""
    for command, said in (("/nowhere/program", "mailbox config: /nowhere/program: No such file or directory"),
                          ("false", "no ACK, its command has ended with 1"), (None, "there is no --on-mailbox")):
        name = f"agent-{command and os.path.basename(command)}"
        options = ["--mailbox", "config", *(["--on-mailbox", command] if command else [])]
        path, process = agent.service(case, name, options=options)
        if command:
            Page(service_memory(process.pid), "config").put(b"{}", bytes(range(16)))
        agent.wait_text(case.dir / f"{name}.log", said)
        assert agent.run(case, path, "echo", "there").out == "there\n"


def test_vsock(case):
    """The ACK of a Linux guest by vsock, at the port that the payload names: the guest itself has that port here, by the kernel's loopback.
    Where nobody listens nothing is said, for the host has heard of it in another way."""
    guest = case.guest(agent=True, mib=128, run=[], append="forkfs.mailbox=config forkfs.on_mailbox=true").booted()
    for module in ("vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback"):
        if agent.shell(case, guest, f"ls /modules/{module}.ko && insmod /modules/{module}.ko", check=False).code:
            raise Skip(f"this guest's kernel has no {module}")
    page = Page((guest.memfd(), [(0, 128 << 20)]), "config")
    first, second = bytes(range(16)), bytes(range(1, 17))
    page.put(b'{"ack_vsock_port":5242}', first)
    agent.wait_for(lambda: page.word()[0] == 1, "no ACK in the page")
    agent.shell(case, guest, "setsid hear port=70000 > /tmp/heard & while ! grep -q ready /tmp/heard; do sleep 0.02; done")
    page.put(b'{"x":{"ack_vsock_port":1},"ack_vsock_port" : 70000}', second, flags=1)

    def heard():
        return agent.shell(case, guest, "cat /tmp/heard").out.splitlines()[1:]

    agent.wait_for(heard, "no ACK by vsock")
    assert heard() == [f"hear stage=applied mailbox=config epoch={second.hex()}"], heard()
    assert not guest.console.all("vsock port"), guest.console.all("vsock port")


def test_gateway(case):
    """The ACK of a guest in QEMU's user network comes to the port of this machine that the payload names: the host is its gateway."""
    guest = case.guest(agent=True, mib=128, run=[], network=True, append="forkfs.mailbox=config forkfs.on_mailbox=true").booted()
    agent.shell(case, guest, "ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up && ip route add default via 10.0.2.2")
    page = Page((guest.memfd(), [(0, 128 << 20)]), "config")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(60)
        page.put(b'{"ack_port":%d}' % host.getsockname()[1], bytes(range(16)), flags=1)
        assert host.recv(512) == b"stage=applied mailbox=config epoch=" + bytes(range(16)).hex().encode() + b"\n"
    assert page.word()[0] == 0, "nobody has asked for that"
