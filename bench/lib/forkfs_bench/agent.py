"""Children until the agent in their guest is healthy, and until a first command has run in it, beside a cold boot of the same guest and the VMM's own restore."""

import json
import shutil
import time

from forkfs_test import agent, children, rig

from . import machine, record as rec, start

SIZES = (256,)  # MiB, unless others are asked for
TOGETHER = 10
PER_BRANCH = 9  # children for each branch that is asked for: a hundred and some
SELDOM = 4  # what is only compared with, in every so many rounds
PHASES = ("start", "load", "run", "connected", "begun", "rebound", "acknowledged", "output", "healthy")
PARTS = ("rebind", "clock", "entropy", "network")


def boot(case, name, mib):
    """A guest whose process 1 is the agent."""
    return case.guest(name, agent=True, mib=mib, run=[])


def wait_gone(found):
    """End children."""
    for child in found:
        child.stop()
        shutil.rmtree(child.dir, ignore_errors=True)


def healthy(case, mount, branch):
    """One child until it is healthy, its first command, ten side by side; the metrics."""
    (child,), result = children.run(mount, branch, "--healthy")
    timing, times = json.loads((child.dir / "timing.json").read_text()), child.said["times"]
    path = child.dir / "agent.sock"
    first = agent.run(case, path, "true").seconds * 1e3
    ten = [d.seconds * 1e3 for d in agent.side_by_side(TOGETHER, lambda _: agent.run(case, path, "true"))]
    after = (times["healthy_ns"] - times["running_ns"]) / 1e6
    metrics = {"total_ms": times["healthy_ns"] / 1e6, "command_ms": result.seconds * 1e3, "healthy_ms": after, "exec_ms": first,
               "first_exec_ms": after + first, "slowest_of_ten_ms": max(ten), "median_of_ten_ms": rec.quantile(ten, 0.5)}
    metrics |= {f"phase_{p}_ms": timing["phases_ns"][p] / 1e6 for p in PHASES}
    metrics |= {f"guest_{p}_ms": timing["guest_ns"][p] / 1e6 for p in PARTS}
    wait_gone([child])
    return metrics


def at_once(case, mount, branch):
    """A child that is not waited for, and a command in it as soon as it runs: milliseconds from there to the command's end."""
    (child,), _ = children.run(mount, branch)
    took = agent.run(case, child.dir / "agent.sock", "true").seconds * 1e3
    wait_gone([child])
    return took


def cold(case, number, mib):
    """A guest from the start of its VMM until a command has run in it."""
    began = time.monotonic()
    guest = boot(case, f"cold{number}", mib)
    agent.run(case, guest, "true")
    took = start.since(began)
    guest.stop()
    return took


def run_guest(record, options, mib):
    """One size."""
    name = f"QEMU, {mib} MiB"
    if not machine.enough_memory(record, name, (4 * mib + 1024) << 20):
        return
    print(f"agent: {name} …", flush=True)
    with machine.bench_case(record, "agent", name) as case:
        guest = boot(case, "sbx1", mib).booted()
        agent.run(case, guest, "true")
        mount = case.mount(options="branch-rate=0")
        branch = mount.attach(guest) / "branches/b1"
        branch.mkdir()
        assert rig.wait_settled(branch) == "ready"
        way = start.Way(mount, "sbx1/b1")
        for number in range(-1, options.branches * PER_BRANCH):  # the first one brings the programs into memory
            metrics = healthy(case, mount, "sbx1/b1")
            if number < 0:
                continue
            record.add("agent", name, "child", number, **metrics)
            if number % SELDOM == 0:
                child = way.direct(branch / "memory.bin", branch / "vmstate")
                record.add("agent", name, "VMM", number, total_ms=child.said["runs_ms"])
                way.end([child])
                record.add("agent", name, "at once", number, first_exec_ms=at_once(case, mount, "sbx1/b1"))
        for number in range(options.peers):
            record.add("agent", name, "cold", number, first_exec_ms=cold(case, number, mib))


def run(record, options):
    """All sizes."""
    for mib in options.sizes:
        run_guest(record, options, mib)


def report(record):
    """Print the tables."""
    cases = dict.fromkeys(s[1] for s in record.samples if s[0] == "agent")
    rows, phases = [], []
    for case in cases:
        def values(kind, metric, case=case):
            return record.values("agent", case, kind, metric)

        def row(label, kind, metric, case=case):
            rows.append([case, record.others("agent", case), label, len(values(kind, metric)), rec.spread(values(kind, metric), 1)])

        row("the VMM's own restore, until it runs", "VMM", "total_ms")
        row("`restore --healthy`, from its start until healthy", "child", "total_ms")
        row("runs → healthy", "child", "healthy_ms")
        row("runs → first command has ended", "child", "first_exec_ms")
        row("the same, not waited for: `restore`, `exec` at once", "at once", "first_exec_ms")
        row("a command in a healthy guest", "child", "exec_ms")
        row(f"the slowest of {TOGETHER} side by side", "child", "slowest_of_ten_ms")
        row("cold boot → first command has ended", "cold", "first_exec_ms")
        if values("VMM", "total_ms") and values("child", "total_ms"):
            beyond = rec.quantile(values("child", "total_ms"), 0.5) - rec.quantile(values("VMM", "total_ms"), 0.5)
            record.note(f"agent, {case}: healthy {beyond:.0f} ms beyond the VMM's own restore (medians)")
        for phase in PHASES:
            phases.append([case, phase, rec.spread(values("child", f"phase_{phase}_ms"), 1)])
        for part in PARTS:
            phases.append([case, f"in the guest: {part}", rec.spread(values("child", f"guest_{part}_ms"), 1)])
    if rows:
        rec.table("Agents, ms: p50 / p90 / p99 / max", ["guest", "CPU others used, %", "", "n", "ms"], rows)
        rec.table("What it takes until a child is healthy, by phase, ms: p50 / p90 / p99 / max", ["guest", "phase", "ms"], phases)
