"""`forkfs restore --healthy`: children that count when the agent in their guest does; what that took; who fails is ended alone."""

import json
import os
import signal
import subprocess
import time

from forkfs_test import agent, children, processes, rig

EDGES = ["connected", "begun", "rebound", "acknowledged", "output", "healthy"]


def with_agent(case):
    """A guest whose process 1 is the agent, and a branch of it that is ready."""
    r = rig.Rig(case, guest=case.guest(agent=True, mib=128, run=[]).booted())
    agent.run(case, r.guest, "true")  # so that it is of the source's epoch
    assert rig.wait_settled(r.branch("b1")) == "ready"
    return r


def without_agent(case, **how):
    """A guest that has the port, and no agent that listens there; a branch of it."""
    r = rig.Rig(case, guest=case.guest(agent="port", mib=96, run=["counter"], **how).booted())
    assert rig.wait_settled(r.branch("b1")) == "ready"
    return r


def check_timing(child):
    """The phases of timing.json are the total, in the order in which they happened; the line of the child agrees."""
    timing, times = json.loads((child.dir / "timing.json").read_text()), child.said["times"]
    phases = timing["phases_ns"]
    assert list(phases) == ["start", "load", "run", "mailboxes", *EDGES], phases
    assert all(ns >= 0 for ns in phases.values()) and all(phases[p] for p in ("start", "load", "run", "connected", "begun")), phases
    assert abs(sum(phases.values()) - timing["total_ns"]) <= 0.05 * timing["total_ns"], timing
    assert set(timing["guest_ns"]) == {"rebind", "clock", "entropy", "network"}
    assert (timing["pid"], timing["child"], timing["guest_was"]) == (child.pid, child.said["child"], "restored"), timing
    assert times["started_ns"] < times["loaded_ns"] < times["running_ns"] < times["healthy_ns"], times
    assert timing["total_ns"] <= times["healthy_ns"], (timing, times)
    assert not (child.dir / "timing.json.new").exists()
    return timing


def asked(case, n):
    """Wait until so many children are asked for their health; their pids."""
    deadline = time.monotonic() + 60
    while True:
        found = [pid for where, pid in children.vms(case) if (where / "agent.sock.link").exists()]
        if len(found) == n:
            return found
        assert time.monotonic() < deadline, f"{found} of {n} children are asked"
        time.sleep(0.01)


def test_restore(case):
    """Two children are healthy when their lines are there: a command runs at once. Children without an agent are not asked for one."""
    r = with_agent(case)
    found, _ = children.run(r.mount, "sbx1/b1", "-n", "2", "--healthy", "--attach", "c")
    epochs = {check_timing(child)["epoch"] for child in found}
    assert len(epochs) == 2, epochs
    for child in found:
        assert agent.shell(case, child.said["sockets"]["agent"], "echo $((6 * 7))").out == "42\n"
    (plain,), _ = children.run(r.mount, "sbx1/b1")
    assert "healthy_ns" not in plain.said["times"] and not (plain.dir / "timing.json").exists()
    for words in (["--healthy", "--paused"], ["--ready-timeout", "3"], ["--healthy", "--ready-timeout", "0"]):
        done = r.mount.run("restore", "sbx1/b1", *words, check=False)
        assert done.code == 2 and "usage:" in done.err, (words, done.err)


def test_one_fails(case):
    """One of three has nothing behind its agent's port: it is ended, the two others are healthy."""
    r = with_agent(case)
    script = case.dir / "vmm"
    script.write_text("#!/bin/bash\n"
                      "[[ $* == *forkfs-control* ]] && mkdir ../first 2>/dev/null && set -- \"${@/#socket,id=agent,*/null,id=agent}\"\n"
                      'exec qemu-system-x86_64 "$@"\n')
    script.chmod(0o700)
    found, result = children.run(r.mount, "sbx1/b1", "-n", "3", "--healthy", "--vmm", script, check=False)
    assert result.code == 1 and result.err.count("child") == 1 and "the socket of the guest's agent" in result.err, result.err
    assert len(found) == 2 and all(check_timing(child) for child in found)
    (case.dir / "ch/first").rmdir()
    assert {p.name for p in (case.dir / "ch").iterdir()} == {child.dir.name for child in found}


def test_nobody_answers(case):
    """No agent: each of two children is waited for side by side, and ended by itself; the error names the edge. One that is killed meanwhile fails at once."""
    r = without_agent(case)
    found, result = children.run(r.mount, "sbx1/b1", "--healthy", "--ready-timeout", "1", "-n", "2", check=False)
    assert not found and result.code == 1, result.err
    assert result.err.count("has not answered the host's HELLO within 1.0 s (edge 'begun')") == 2, result.err
    children.nothing_left(case)
    command = [r.mount.binary, "restore", "--mount", r.mount.path, "sbx1/b1", "--dir", case.dir / "ch", "-n", "2", "--healthy", "--ready-timeout", "3600"]
    process = case.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting = asked(case, 2)
    os.kill(waiting[0], signal.SIGKILL)
    said = process.stderr.readline()
    assert "signal 9" in said or "VM ended" in said, said
    assert process.poll() is None and processes.alive(waiting[1])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    assert all(processes.wait_gone(pid, 10) for pid in waiting)
    children.nothing_left(case)
