"""What is behind a branch: the copying beside memcpy, a second branch with tracking beside the first, what callers wait."""

import os
import time

from forkfs_test import case as kit
from forkfs_test.guest import MIB
from forkfs_test.microvm import MicroVm

from . import files, machine, record as rec, sizes

SIZES = (2048,)  # MiB, unless others are asked for
DIRTIED = 100  # one page in so many is written between two branches


def copiers(daemon):
    """How many threads the daemon copies with."""
    names = []
    for tid in os.listdir(f"/proc/{daemon}/task"):
        with open(f"/proc/{daemon}/task/{tid}/comm", encoding="ascii") as f:
            names.append(f.read().strip())
    return names.count("forkfs-copier")


def gbs(kind, mib, threads):
    """memcpy of so much memory by so many threads, GB/s."""
    ns, size = machine.tool_numbers(kind, mib * MIB, threads)
    return size / ns


def attached(mount, guest, track):
    """Attach, with tracking or without."""
    return mount.attach(guest, None, *(["--track"] if track else []))


def copying(record, rounds, name, guest, mount):
    """Captures, and memcpy of the same size by as many threads."""
    sandbox = attached(mount, guest, False)
    threads = copiers(mount.pid)
    record.add("capture", name, "copiers", 0, threads=threads)
    for number in range(rounds):
        done = record.attempt("capture", name, "capture", number, lambda: sizes.one(sandbox, "b", wait=True))
        if done:
            seconds = done["metrics"]["capture_ms"] / 1e3
            record.add("capture", name, "copying", number, capture_gbs=guest.mib * MIB / 1e9 / seconds)
        record.add("capture", name, "copying", number, memcpy_gbs=gbs("memcpy", guest.mib, threads),
                   fresh_gbs=gbs("fresh", guest.mib, threads))
    mount.run("detach", guest.name)


def second_branch(record, rounds, name, guest, mount):
    """A tracked VM: the first branch, and one after a hundredth of its pages was written."""
    for number in range(rounds):
        sandbox = attached(mount, guest, True)
        paths = []
        for kind in ("first", "second"):
            done = record.attempt("capture", name, kind, number,
                                  lambda kind=kind: sizes.one(sandbox, kind, keep=True, wait=True))
            if not done:
                break
            m = done["metrics"]
            paths.append(done["path"])
            record.add("capture", name, kind, number, protect_ms=m["prearm_ms"] + m["converge_ms"] + m["arm_ms"],
                       capture_ms=m["capture_ms"], image_mib=m["image_mib"], round_trip_ms=m["round_trip_ms"])
            guest.visit_all(times=1 / DIRTIED)  # it writes all of its working set at least once
        for path in reversed(paths):
            path.rmdir()
        mount.run("detach", guest.name)


def settle(branch):
    """Wait until a branch is ready, and remove it."""
    (branch / "wait").read_bytes()
    branch.rmdir()


def first_byte(sandbox):
    """open(branch/memory.bin) → first byte in a session of its own, ms."""
    return machine.tool_numbers("first", sandbox / "branch" / "memory.bin", 1, start_new_session=True)[0] * 1e-6


def callers(record, rounds, name, guest, mount):
    """How long the three ways to a branch take until the caller can go on, with tracking and without."""
    for track in (False, True):
        kind = "tracked" if track else "untracked"
        sandbox = attached(mount, guest, track)
        branches = sandbox / "branches"
        if track:
            (branches / "parent").mkdir()
            (branches / "parent" / "wait").read_bytes()
        for number in range(rounds):
            start = time.monotonic_ns()
            (branches / "made").mkdir()
            metrics = {"mkdir_ms": (time.monotonic_ns() - start) * 1e-6}
            settle(branches / "made")
            ns = machine.timed(mount.binary, "branch", "--mount", mount.path, guest.name, "asked", "--no-wait")
            metrics["no_wait_ms"] = ns * 1e-6
            settle(branches / "asked")
            metrics["first_byte_ms"] = first_byte(sandbox)
            files.wait_forgotten(sandbox)
            record.add("capture", name, kind, number, **metrics)
        if track:
            (branches / "parent").rmdir()
        mount.run("detach", guest.name)


def run(record, options):
    """One guest a size."""
    for mib in options.sizes:
        name = f"{mib} MiB"
        if not machine.enough_memory(record, name, 4 * mib * MIB):
            continue
        print(f"capture: {name} …", flush=True)
        rounds = max(3, options.branches // 2)
        try:
            with machine.bench_case(record, "capture", name) as case:
                guest = MicroVm(case, "sbx1", mib=mib, kind="memfd", vcpus=1, work=mib // DIRTIED, fill=1).booted()
                mount = case.mount(options="lease=1,branch-rate=0,memory=unlimited")
                for part in (copying, second_branch, callers):
                    part(record, rounds, name, guest, mount)
                guest.check_sane()
        except kit.Skip as e:
            record.note(f"capture left out: {e}")


def report(record):
    """Print the tables."""
    cases = list(dict.fromkeys(s[1] for s in record.samples if s[0] == "capture"))
    copied, seconds, waits = [], [], []
    for case in cases:
        def values(kind, metric, case=case):
            return record.values("capture", case, kind, metric)

        def ratio(kind, metric, beside, case=case):
            own, other = (record.values("capture", case, k, metric) for k in (kind, beside))
            return rec.between([100 * a / b for a, b in zip(own, other) if b], 1)

        ours, theirs = values("copying", "capture_gbs"), values("copying", "memcpy_gbs")
        if ours:
            copied.append([case, record.others("capture", case), *values("copiers", "threads"), rec.between(ours),
                           rec.between(theirs), rec.between(values("copying", "fresh_gbs")),
                           rec.between([a / b for a, b in zip(ours, theirs)])])
        for metric, words in (("protect_ms", "protecting, ms"), ("capture_ms", "copying, ms"), ("image_mib", "memory, MiB"),
                              ("round_trip_ms", "until ready, ms")):
            if values("second", metric):
                seconds.append([case, words, rec.between(values("first", metric)), rec.between(values("second", metric)),
                                ratio("second", metric, "first")])
        for kind in ("untracked", "tracked"):
            if values(kind, "mkdir_ms"):
                waits.append([case, kind, *[rec.spread(values(kind, m), 1) for m in ("mkdir_ms", "no_wait_ms", "first_byte_ms")]])
    if cases:
        rec.table("Captured, GB/s: median (min – max)",
                  ["memory", "CPU others used, %", "copiers", "capture", "memcpy, present", "memcpy, fresh large pages",
                   "capture / memcpy, present"], copied)
        rec.table("With tracking: a branch after one page in a hundred was written, beside the first: median (min – max)",
                  ["memory", "what", "first", "second", "second, % of the first"], seconds)
        rec.table("What the caller waits, ms: p50 / p90 / p99 / max",
                  ["memory", "sandbox", "mkdir", "forkfs branch --no-wait", "open branch/memory.bin → first byte"], waits)
