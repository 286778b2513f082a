"""The warm pool over Linux guests that have the agent: main commands of their own, once each; children that are healthy before anybody asks."""

import json
import os
import time

from forkfs_test import agent, pool, rig

TIMEOUT = {"test_main": 240, "test_healthy": 240}


def guest(case):
    """A guest whose process 1 is the agent, and that has no main command yet; its branch b1, which is ready."""
    r = rig.Rig(case, guest=case.guest(agent=True, mib=128, run=[]).booted())
    assert rig.wait_settled(r.branch("b1")) == "ready"
    return r


def check_main(p, child, text):
    """Its main command is this one, ran once, and no other can be."""
    child.wait_console(rf"^{text}\r?$")
    done = p.case.run(p.mount.binary, "exec", "--socket", child.dir / "agent.sock", "--main", "--", "true", check=False)
    assert done.code == 125 and "already spawned" in done.err, done.err
    done = p.case.run(p.mount.binary, "exec", "--socket", child.dir / "agent.sock", "--", "cat", "/tmp/count")
    assert done.out == f"{text}\n", done.out


def script(text):
    """A main command that says a line on the console and counts how often it has run."""
    return ["sh", "-c", f'echo "$WHO" >> /tmp/count; echo "$WHO"; exec sleep 1000 # {text}']


def test_main(case):
    """Idle children stand still; who asks says what the main command is, and it runs once, with their variables. A wrong one ends its child only."""
    r = guest(case)
    p = pool.Pool(r.mount, "sbx1/b1", low=2, high=4)
    got = agent.side_by_side(3, lambda i: p.acquire("--main", "--env", f"WHO=task-{i}", "--", *script(i)))
    assert len({c.pid for c in got}) == 3 and all(c.said["main"]["pid"] > 1 for c in got), [c.said for c in got]
    for i, child in enumerate(got):
        check_main(p, child, f"task-{i}")
    said = p.refused("--main", "--", "no-such-main")
    assert "the main command was not started" in said, said
    status = p.wait(lambda s: s["out"] == 3 and s["idle"] == 1)
    assert status["failures"] == 0, status
    p.release(got[0])
    p.drain("--end-all")
    p.check_gone()
    # the source's own is still to come
    assert agent.run(case, r.guest, "true", options=["--main"]).code == 0


def test_log(case):
    """The main command's output goes to a file of the host, where that is asked for; the command is there once."""
    r = guest(case)
    p = pool.Pool(r.mount, "sbx1/b1", low=1, high=2)
    log = case.dir / "main.log"
    child = p.acquire("--main", "--log", log, "--", "sh", "-c", "echo one; echo two >&2; exec sleep 1000")
    deadline = time.monotonic() + 30
    while not log.exists() or log.read_text().count("\n") < 2:
        assert time.monotonic() < deadline and child.alive(), log.exists() and log.read_text()
        time.sleep(0.01)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((s["log"], s["stream"]) for s in said) == [("one\n", "stdout"), ("two\n", "stderr")], said
    p.drain("--end-all")
    p.check_gone()


def test_ack(case):
    """An acknowledgement is awaited where one is wanted; without it the child is ended, at once when who asked has gone or has waited long enough."""
    r = rig.Rig(case, mib=96, run=["counter", "mailbox,config,s3cret", "mailbox,silent,tok,ack=0"])
    for box in ("config", "silent"):
        r.guest.console.wait(rf"^mailbox {box} ready$")
    assert rig.wait_settled(r.branch("b1")) == "ready"
    p = pool.Pool(r.mount, "sbx1/b1", low=1, high=3)
    child = p.acquire("--mailbox", 'config={"task":1}', "--ack", "0")
    assert [(a["mailbox"], a["state"]) for a in child.said["acks"]] == [("config", "applied")], child.said
    assert child.said["times"]["acknowledged_ns"] >= child.said["times"]["running_ns"]
    child.wait_console(r'^mailbox config took \d+ epoch \S+ flags 3: .*"task":1')
    p.release(child)
    assert "mailbox silent was not acknowledged within 300 ms" in p.refused("--mailbox", 'silent={"task":2}', "--ack", "300")
    assert "not ready in time" in p.refused("--mailbox", 'silent={"task":3}', "--ack", "30000", "--timeout", "1")
    asking = p.asking("--mailbox", 'silent={"task":4}', "--ack", "30000")
    p.wait(lambda s: s["handing"] == 1)
    asking.kill()
    status = p.wait(lambda s: s["handing"] == 0 and s["idle"] == 1 and s["ending"] == 0)
    assert status["out"] == 0 and status["hits"] == 1, status
    p.drain()
    p.check_gone()


def test_healthy(case):
    """With --healthy an idle child's agent has answered already, and who asks gets it at once; payloads are for pools whose children stand still."""
    r = guest(case)
    p = pool.Pool(r.mount, "sbx1/b1", "--healthy", low=1, high=2)
    child = p.acquire("--main", "--env", "WHO=me", "--", *script("me"))
    assert child.said["from"] == "pool" and child.said["times"]["healthy_ns"] > 0, child.said
    timing = json.loads((child.dir / "timing.json").read_text())
    assert timing["pid"] == child.pid and timing["phases_ns"]["healthy"] >= 0, timing
    check_main(p, child, "me")
    p.wait(lambda s: s["idle"] == 1)
    assert "run already" in p.refused("--mailbox", 'config={"a":1}')
    assert p.wait(lambda s: s["idle"] == 1)["returned"] == 1
    p.process.kill()
    p.process.wait()
    p.check_gone([child.pid], [child.dir])
    assert os.path.exists(child.dir / "agent.sock")
