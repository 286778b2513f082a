"""`forkfs exec` through the vsock of a Firecracker: what its socket answers, and what it might."""

import os
import subprocess
import sys

from forkfs_test import agent, rig
from forkfs_test.api import ApiRig
from forkfs_test.firecracker import Firecracker


def stand_in(case, name, mode):
    """A socket like a Firecracker's vsock, before an agent of this machine; (the words of --socket, its process)."""
    service, _ = agent.service(case, f"{name}-agent")
    path = case.dir / f"{name}.vsock"
    process = case.start(sys.executable, "-m", "forkfs_test.vsock", path, service, mode, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return f"vsock:{path}", process


def test_commands(case):
    """Output, codes, stdin, ten at a time; one link for all of them, which asks for the port once."""
    target, process = stand_in(case, "good", "good")
    done = agent.shell(case, target, "echo out; echo err >&2; exit 7", check=False)
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n"), (done.code, done.out, done.err)
    codes = agent.side_by_side(10, lambda i: agent.shell(case, target, f"echo {i}; exit {i}", check=False))
    assert [(c.code, c.out) for c in codes] == [(i, f"{i}\n") for i in range(10)]
    assert process.stdout.readline() == "CONNECT 5241\n"
    assert case.run(case.forkfs(), "health", "--socket", target).code == 0
    burst = agent.shell(case, target, "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the last line").out
    assert len(burst) == 3_000_000 + 15 and burst.endswith("\nthe last line\n")
    process.kill()
    process.wait()
    done = agent.run(case, target, "true", check=False)
    assert done.code == 125, done.err
    assert os.path.exists(case.dir / "good.vsock") and not os.path.exists(case.dir / "good.vsock.link")


def test_later(case):
    """Nobody listens in the guest yet: asked again until somebody does. An answer in pieces is one."""
    for mode in ("refuse", "byte"):
        target, process = stand_in(case, mode, mode)
        assert agent.run(case, target, "echo", "there").out == "there\n"
        asked = 4 if mode == "refuse" else 1
        assert [process.stdout.readline() for _ in range(asked)] == ["CONNECT 5241\n"] * asked


def test_answers(case):
    """What is no Firecracker is told so at once, with what it says; what never ends its line is waited for no longer than asked for."""
    for number, (mode, said) in enumerate((
            ("HTTP/1.1 400 Bad\r\n", "is no vsock of a Firecracker, it answers 'HTTP/1.1 400 Bad?'"), ("OK\n", "it answers 'OK'"),
            ("OK 12x\n", "it answers 'OK 12x'"), ("\x1b[2Jno\n", "it answers '?[2Jno'"), ("x" * 200, f"it answers '{'x' * 39}'"))):
        target, _ = stand_in(case, f"a{number}", mode)
        done = agent.run(case, target, "true", check=False)
        assert done.code == 125 and said in done.err, (mode, done.err)
    for mode, said in (("OK 10", "has answered half of a line, 'OK 10'"), ("", "no agent listens in the guest (vsock port 5241")):
        target, _ = stand_in(case, f"half{len(mode)}", mode)
        done = agent.run(case, target, "true", options=["--ready-timeout", "1"], check=False)
        assert done.code == 125 and said in done.err, (mode, done.err)


def test_ends(case):
    """A VM that ends while its answer is awaited ends the wait."""
    target, process = stand_in(case, "ends", "OK 1")
    waiting = case.start(*agent.exec_command(case, target, "true"), stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "CONNECT 5241\n"
    process.kill()
    process.wait()
    said = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 125 and ("has ended" in said or "ended before" in said or "answers 'OK 1'" in said), said


def test_firecracker(case):
    """The sandbox of a stock Firecracker: its vsock is found by its API; without one that is said. (Its guest here has no agent.)"""
    path = case.dir / "vm-with/v.sock"
    r = ApiRig(case, Firecracker(case, "with", devices={"vsock": {"guest_cid": 3, "uds_path": str(path)}}))
    name = r.sandbox.name
    done = r.mount.run("exec", name, "--ready-timeout", "1", "--", "true", check=False)
    assert done.code == 125 and f"no agent listens in the guest (vsock port 5241, by {path})" in done.err, done.err
    plain = Firecracker(case, "plain").booted()
    r.mount.attach(plain)
    done = r.mount.run("exec", "plain", "--", "true", check=False)
    assert done.code == 125 and "the VM has no vsock" in done.err, done.err
    assert rig.wait_settled(r.branch("b1")) == "ready"
