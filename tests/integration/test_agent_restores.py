"""Guests with the agent that are branched and restored over and over: the source after a hundred branches, a hundred children one after the
other (with --long), children of children as fast as they come."""

import json

from forkfs_test import agent, children, rig

TIMEOUT = {"test_in_a_row": 240}
LONG_TIMEOUT = {"test_in_a_row": 1800}
TOGETHER = 10


def source(case):
    """A guest whose process 1 is the agent, attached, and talked to."""
    r = rig.Rig(case, guest=case.guest(agent=True, mib=96, run=[]).booted())
    agent.run(case, r.guest, "true")
    return r


def test_source(case):
    """The source is branched a hundred times, and a command runs in it after each; its agent's connection is the same all the time."""
    r = source(case)
    for i in range(100):
        branch = r.branch(f"b{i}")
        assert agent.run(case, r.guest, "echo", str(i)).out == f"{i}\n"
        branch.rmdir()
    known = json.loads(r.mount.run("health", "sbx1", "--json").out)
    assert known["healthy"] and known["guest_was"] == "first", known


def test_in_a_row(case):
    """One child after the other is healthy, and ten commands at the same time run in each: none times out. A hundred children with --long."""
    r, slowest = source(case), 0.0
    assert rig.wait_settled(r.branch("b1")) == "ready"
    for i in range(100 if case.long else 3):
        (child,), _ = children.run(r.mount, "sbx1/b1", "--healthy")
        done = agent.side_by_side(TOGETHER, lambda n, child=child: agent.run(case, child.dir / "agent.sock", "echo", str(n)))
        assert [d.out for d in done] == [f"{n}\n" for n in range(TOGETHER)], f"child {i}"
        slowest = max(slowest, *(d.seconds for d in done))
        child.stop()
    print(f"the slowest of ten commands side by side, in all children: {slowest * 1e3:.0f} ms")
    assert agent.run(case, r.guest, "echo", "there").out == "there\n"


def test_chain(case):
    """A child of a child of a child, each as soon as the one before is healthy: each has an epoch of its own, and all answer in the end."""
    r, name, epochs, sockets = source(case), "sbx1", [], []
    for generation in range(1, 4):
        (r.mount.path / name / "branches/b").mkdir()
        (child,), _ = children.run(r.mount, f"{name}/b", "--healthy", "--attach", f"g{generation}")
        timing = json.loads((child.dir / "timing.json").read_text())
        assert timing["guest_was"] == "restored", timing
        epochs.append(timing["epoch"])
        sockets.append(child.dir / "agent.sock")
        name = f"g{generation}"
    assert len(set(epochs)) == len(epochs), epochs
    for path in [r.guest.dir / "agent", *sockets]:
        assert agent.run(case, path, "echo", "there").out == "there\n"
