"""Mailboxes of the microVM on KVM: a hundred forks of one branch, and what its guest makes of damaged and repeated ones."""

import hashlib
import json
import os

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

MIB = 16
PAGE, CRC, EPOCH, SEQ, PAYLOAD = 4096, 224, 240, 256, 264


def guest(case):
    """A microVM that publishes a mailbox, attached; a settled branch of it."""
    r = ApiRig(case, MicroVm(case, "sbx1", mib=MIB, kind="memfd", mailbox="config,s3cret"))
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    return r, branch


def fork(branch, name, payload):
    """Make a fork; its epoch as hex digits."""
    path = branch / "forks" / name
    path.mkdir()
    (path / "mailboxes/config").write_text(payload + "\n")
    return json.loads((path / "status").read_text())["epoch"].replace("-", "")


def digest(path):
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hundred(case):
    """A hundred forks of one branch: each child finds its own payload and epoch and nothing else; branch, source, siblings are as before."""
    r, branch = guest(case)
    before = digest(branch / "memory.bin")
    want = {f"c{i}": f'{{"task":{i},"n":9007199254740993}}' for i in range(100)}
    epochs = {name: fork(branch, name, payload) for name, payload in want.items()}
    assert len(set(epochs.values())) == len(want)
    some = {name: digest(branch / "forks" / name / "memory.bin") for name in ("c0", "c42", "c99")}
    started = {}
    for name, payload in want.items():
        (child,), _ = children.run_micro(r.mount, f"sbx1/b1/{name}")
        assert child.said["fork"] == name, child.said
        assert child.mail() == (epochs[name], payload), (name, child.mails())
        child.status("pause")  # or each would take a CPU
        child.drop()
        started[name] = child
    assert digest(branch / "memory.bin") == before
    for name, was in some.items():
        assert digest(branch / "forks" / name / "memory.bin") == was, name
    for name in ("c99", "c0"):
        started[name].status("resume")
        started[name].visit_all(MIB, 1)
        started[name].status("pause")
    for name, child in started.items():
        assert child.mails() == [(epochs[name], want[name])], (name, child.mails())
        child.check_sane()
        child.drop()
    assert r.guest.mails() == []
    r.guest.check_runs()


def test_generations(case):
    """A fork's child takes a payload of its own fork: each generation its own, and its parent's never again."""
    r, branch = guest(case)
    epoch = fork(branch, "c0", '{"generation":0}')
    target, says = "sbx1/b1/c0", (epoch, '{"generation":0}')
    for n in range(1, 4):
        (child,), _ = children.run_micro(r.mount, target, "--attach", f"g{n}")
        assert child.mail() == says
        branch = r.mount.path / f"g{n}/branches/b"
        branch.mkdir()
        assert rig.wait_settled(branch) == "ready"
        assert child.mails() == [says], child.mails()
        child.stop()
        target, says = f"g{n}/b/c", (fork(branch, "c", f'{{"generation":{n}}}'), f'{{"generation":{n}}}')
    (child,), _ = children.run_micro(r.mount, target)
    assert child.mail() == says
    child.visit_all(MIB, 1)
    assert child.mails() == [says], child.mails()


def test_distrusts(case):
    """The guest takes no payload whose checksum is wrong, and notices one that it had before."""
    r, branch = guest(case)
    epoch = fork(branch, "c1", '{"task":1}')
    (at,) = json.loads((branch / "forks/c1/status").read_text())["overlay_pages"]
    (child,), _ = children.run_micro(r.mount, "sbx1/b1/c1")
    assert child.mail() == (epoch, '{"task":1}')
    frame = (branch / "forks/c1/memory.bin").read_bytes()[at:at + PAGE]
    child.status("pause")
    memory = os.open(f"/proc/{child.pid}/mem", os.O_RDWR)
    try:
        hva = child.status()["hva"] + at
        said = [(epoch, '{"task":1}')]
        assert os.pread(memory, 4, hva + SEQ) == bytes(4), "the guest has not freed its mailbox"
        for flip in (None, CRC, CRC + 8, EPOCH, SEQ + 4, PAYLOAD, PAYLOAD + 9):
            again = bytearray(frame)
            if flip is not None:
                again[flip] ^= 1
            os.pwrite(memory, bytes(again), hva)
            child.status("resume")
            said.append(("again", '{"task":1}') if flip is None else ("damaged", ""))
            assert child.mail(len(said)) == said[-1], (flip, child.mails())
            child.status("pause")
        assert child.mails() == said, child.mails()
    finally:
        os.close(memory)
    child.check_sane()
