"""The pause, the round trip and the time until ready, by the size of the memory: every kind of branch in turns.

The VM is the microVM of tests/microvm: its vCPU writes from inside KVM, and its own stop takes next to nothing, so that what
is left is what depends on the size; then Firecracker, where there is one ($FIRECRACKER, or in PATH), and QEMU, whose guests translate where there is no real KVM, each up to a size.
A guest at a time.
"""

import json
import time

from forkfs_test import case as kit
from forkfs_test import rig
from forkfs_test.firecracker import Firecracker
from forkfs_test.guest import MIB
from forkfs_test.microvm import MicroVm

from . import machine, pause, peers, record as rec

SIZES = (512, 1024, 2048, 4096, 8192, 16384)  # MiB, unless others are asked for
PAUSE_ONLY = 16384  # from here on the capture is cancelled: there is no memory for its image
COPIED = 24 << 10  # MiB that the branches of one size may copy in all: the rounds of a size are bounded by it
FIRECRACKER_MOST = 4096  # MiB
QEMU_MOST = 1024  # MiB; it takes long to boot
WRITTEN = 64  # MiB that the guest writes over and over
PHASES = ("prearm", "converge", "stop", "vmstate", "arm", "resume", "capture")


def ask(sandbox, name, **how):
    """Ask for a branch: its directory, and milliseconds until the answer."""
    start = time.monotonic_ns()
    try:
        rig.request(sandbox / "ctl", branch={"name": name, **how})
    except OSError as e:
        raise peers.Failed(f"{how}: {e.strerror}") from e
    return sandbox / "branches" / name, (time.monotonic_ns() - start) * peers.MS


def one(sandbox, name, cancel=False, keep=False, **how):
    """One branch; its metrics. cancel: it is removed as soon as the guest runs."""
    start = time.monotonic_ns()
    path, answered = ask(sandbox, name, **how)
    metrics = {"round_trip_ms": answered}
    if not cancel:
        try:
            (path / "wait").read_bytes()
        except OSError as e:
            text = json.loads((path / "status").read_text()).get("error")
            path.rmdir()
            raise peers.Failed(f"capture: {e.strerror}: {text}") from e
        metrics["ready_ms"] = (time.monotonic_ns() - start) * peers.MS
    status = json.loads((path / "status").read_text())
    metrics |= {"pause_ms": status["pause_ns"] * peers.MS, "dirty_at_pause_pages": status["dirty_at_pause_pages"],
                "image_mib": status["image_bytes"] / MIB, "copied_mib": (status["captured_bytes"] - status["shared_bytes"]) / MIB}
    phases = status["phases"]
    for phase in PHASES:
        if not (cancel and phase == "capture"):
            metrics[f"{phase}_ms"] = phases[f"{phase}_ns"] * peers.MS
    if not keep:
        path.rmdir()
    return {"metrics": metrics, "path": path}


class Turns:
    """The branches of one guest, each kind in its turn."""

    def __init__(self, record, name, guest, mount):
        self.record, self.name, self.guest, self.mount = record, name, guest, mount

    def take(self, kind, number, sandbox, **how):
        """One of a kind, recorded; its directory when it is kept."""
        done = self.record.attempt("sizes", self.name, kind, number,
                                   lambda: one(sandbox, kind.replace(" ", "-").replace(",", ""), **how))
        if done:
            self.record.add("sizes", self.name, kind, number, **done["metrics"])
        return done["path"] if done else None

    def round(self, number, whole):
        """All kinds once; where memory has no room for a whole image only the pause."""
        sandbox = self.mount.attach(self.guest)
        self.take("live, cancelled", number, sandbox, cancel=True, wait=False)
        if whole:
            self.take("live, wait", number, sandbox, wait=True)
            self.take("live, no-wait", number, sandbox, wait=False)
            self.take("full", number, sandbox, mode="full")
        self.mount.run("detach", self.guest.name)
        if whole:
            sandbox = self.mount.attach(self.guest, None, "--track")
            parent = self.take("tracked, first", number, sandbox, keep=True, wait=True)
            if parent:
                self.take("tracked, live", number, sandbox, wait=False)
                self.take("tracked, diff", number, sandbox, mode="diff")
                parent.rmdir()
            self.mount.run("detach", self.guest.name)


def rounds_of(options, mib):
    """How many: a whole round copies the memory four times."""
    return max(1, min(options.branches, COPIED // (4 * mib)))


def microvm(case, mib):
    """Its vCPU writes as fast as it can."""
    return MicroVm(case, "sbx1", mib=mib, kind="memfd", vcpus=1, work=WRITTEN, fill=1).booted()


def firecracker(case, mib):
    """The same guest on the stock program."""
    guest = Firecracker(case, "sbx1", mib=mib, work=WRITTEN, fill=True)
    guest.check_runs(120)
    return guest


def qemu(case, mib):
    """Two writers of 500 pages a second."""
    guest = case.guest(mib=mib, run=[f"load,mib={pause.guest_room(mib)},fill=1,seq=1,random=1,rate=500"])
    machine.at_work(guest)
    return guest


def run_size(record, options, mib, boot):
    """One guest."""
    name = f"{boot.__name__}, {mib} MiB"
    whole = mib < PAUSE_ONLY
    if not machine.enough_memory(record, name, (2 * mib if whole else mib + 1024) * MIB):
        return
    print(f"sizes: {name} …", flush=True)
    with machine.bench_case(record, "sizes", name) as case:
        guest = boot(case, mib)
        turns = Turns(record, name, guest, case.mount(options="branch-rate=0,memory=unlimited"))
        rounds = rounds_of(options, mib)
        for number in range(rounds):
            turns.round(number, whole)
        for number in range(rounds, options.branches):
            turns.round(number, False)
        guest.check_sane()


GUESTS = {"microvm": (microvm, 1 << 30), "firecracker": (firecracker, FIRECRACKER_MOST), "qemu": (qemu, QEMU_MOST)}


def run(record, options):
    """All sizes."""
    for name, (boot, most) in GUESTS.items():
        try:
            for mib in options.sizes:
                if mib <= most and options.guest in (None, name):
                    run_size(record, options, mib, boot)
        except kit.Skip as e:
            record.note(f"sizes, {name} left out: {e}")


def report(record):
    """Print the tables."""
    cases = list(dict.fromkeys(s[1] for s in record.samples if s[0] == "sizes"))
    kinds = ("live, cancelled", "live, wait", "live, no-wait", "full", "tracked, first", "tracked, live", "tracked, diff")
    rows, phases = [], []
    for case in cases:
        for kind in kinds:
            def cell(metric, digits=2, case=case, kind=kind):
                return rec.spread(record.values("sizes", case, kind, metric), digits)

            pauses = record.values("sizes", case, kind, "pause_ms")
            if pauses:
                rows.append([case, record.others("sizes", case), kind, len(pauses), record.failures("sizes", case, kind),
                             cell("pause_ms", 1 if kind == "full" else 2), cell("round_trip_ms", 1), cell("ready_ms", 0)])
                phases.append([case, kind, *[cell(f"{p}_ms", 2) for p in PHASES], cell("dirty_at_pause_pages", 0),
                               cell("copied_mib", 0)])
    if rows:
        rec.table("By size, the guest writing; ms, p50 / p90 / p99 / max",
                  ["guest", "CPU others used, %", "branch", "n", "failed", "pause", "round trip", "ready"], rows)
        rec.table("Its phases, ms: p50 / p90 / p99 / max", ["guest", "branch", *PHASES, "pages dirty at the pause", "copied MiB"],
                  phases)
        first = record.values("sizes", cases[0], "live, cancelled", "pause_ms")
        for case in cases[1:]:
            pauses = record.values("sizes", case, "live, cancelled", "pause_ms")
            if first and pauses and case.split(",")[0] == cases[0].split(",")[0]:
                print(f"pause at {case} / at {cases[0]}: {rec.quantile(pauses, 0.5) / rec.quantile(first, 0.5):.2f} (p50)")
