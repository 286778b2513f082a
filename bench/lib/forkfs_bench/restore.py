"""Children: until one runs, of a settled branch and of one in flight, and what many take, beside the same VMM and files on tmpfs."""

import concurrent.futures
import os
import pathlib
import re
import shutil
import time

from forkfs_test import case as kit
from forkfs_test import rig
from forkfs_test.guest import MIB
from forkfs_test.microvm import MicroVm

from . import machine, pause, record as rec, sizes, start

SIZES = (256,)  # MiB, unless others are asked for

SLOW = 0.8  # seconds that a branch in flight is made to take, where it shall be seen that nobody waits for it
MOST_ROUNDS = 6


def microvm(case, mib):
    """Its vCPU writes a few MiB as fast as it can; all else is resident."""
    return MicroVm(case, "sbx1", mib=mib, kind="memfd", vcpus=1, work=start.MicroWay.written, fill=1).booted()


def qemu(case, mib):
    """Writes little, so that children that have run for a moment longer do not take more."""
    guest = case.guest(mib=mib, run=[f"load,mib={pause.guest_room(mib)},fill=1,seq=1,random=1,rate=20"])
    machine.at_work(guest)
    return guest


# guest, how its children are started, how many of them at the same time
GUESTS = ((microvm, start.MicroWay, 100), (qemu, start.Way, 10))


def smaps(pid):
    """KiB of a process by their names in smaps_rollup."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return {name: int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}


def of_command(way, branch, *options):
    """Children by the command, and the metrics of their start: the last of them counts."""
    found, total = way.command(branch, *options)
    runs, started = max((c.said["times"]["running_ns"] or c.said["times"]["loaded_ns"], c.said["times"]["started_ns"]) for c in found)
    return found, {"total_ms": total, "runs_ms": runs / 1e6, "before_vmm_ms": started / 1e6, "vmm_ms": (runs - started) / 1e6}


class Turns:
    """All that is measured of one guest."""

    bench = "restore"

    def __init__(self, record, name, guest, mount, make, many):
        self.record, self.name, self.guest, self.many, self.case = record, name, guest, many, mount.case
        self.sandbox = mount.attach(guest)
        self.settled = sizes.ask(self.sandbox, "settled", wait=True)[0]
        self.label = f"{guest.name}/settled"
        self.way = make(mount, self.label)
        self.tmpfs = self.case.dir / "tmpfs"
        self.tmpfs.mkdir()
        for file in ("memory.bin", "vmstate"):
            shutil.copyfile(self.settled / file, self.tmpfs / file)
        for directory in (self.tmpfs, self.settled):  # the first ones of all bring the VMM's program and libraries into memory
            self.way.end([self.way.direct(directory / "memory.bin", directory / "vmstate")])
        dense = os.stat(self.tmpfs / "memory.bin").st_blocks * 512
        self.add("tmpfs", 0, dense_mib=dense / MIB)

    def add(self, kind, number, **metrics):
        """Samples."""
        self.record.add(self.bench, self.name, kind, number, **metrics)

    def direct(self, kind, number, directory):
        """One child of a directory's two files, without forkfs's command; ended."""
        child = self.way.direct(directory / "memory.bin", directory / "vmstate")
        self.way.works(child)
        self.add(kind, number, runs_ms=child.said["runs_ms"], works_ms=start.since(child.said["start"]))
        self.way.end([child])

    def in_flight(self, kind, number, rate, command):
        """One child of a branch that was asked for a moment ago: until it runs, and until the branch is ready."""
        how = {"max_rate": rate} if rate else {}
        branch, _ = sizes.ask(self.sandbox, "flight", wait=False, **how)
        began = time.monotonic()
        if command:
            found, metrics = of_command(self.way, f"{self.guest.name}/flight")
        else:
            found = [self.way.direct(branch / "memory.bin", branch / "vmstate")]
            metrics = {"runs_ms": found[0].said["runs_ms"]}
        metrics["still_writing"] = int(rig.state(branch) == "writing")
        if not command:
            self.way.works(found[0])
            metrics["works_ms"] = start.since(found[0].said["start"])
        state = rig.wait_settled(branch)
        metrics["ready_ms"] = start.since(began)
        if state == "ready":
            self.add(kind, number, **metrics)
        else:
            self.add(kind, number, failed=1)
            self.record.note(f"restore, {self.name}: {kind} {number}: the branch failed")
        self.way.end(found)
        branch.rmdir()

    def round(self, number, mib):
        """Each kind once; the two that are compared take turns at being the first."""
        both = [("mount", self.settled), ("tmpfs", self.tmpfs)]
        number *= self.way.repeat
        for again in range(number, number + self.way.repeat):
            for kind, directory in both if again % 2 else reversed(both):
                self.direct(kind, again, directory)
            found, metrics = of_command(self.way, self.label)
            self.add("command", again, **metrics)
            self.way.end(found)
        slow = int(mib * MIB / SLOW)
        for kind, rate, command in (("in flight", 0, False), ("in flight, slow", slow, False), ("command, in flight", slow, True)):
            self.record.attempt("restore", self.name, kind, number, self.in_flight, kind, number, rate, command)

    def side_by_side(self, directory):
        """Many children, as many at the same time as the command starts; milliseconds until the last of them ran."""
        cpus = os.cpu_count()
        files = directory / "memory.bin", directory / "vmstate"
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(2 * cpus if cpus > 2 else 4) as pool:
            found = list(pool.map(lambda i: self.way.direct(*files, number=i, paused=bool(self.way.herd)), range(self.many)))
        return found, max(c.said["start"] - began + c.said["runs_ms"] / 1e3 for c in found) * 1e3

    def herd(self, kind, number):
        """Many of them: until all run (or are loaded), and the memory of each when it has written what it writes."""
        if kind == "command":
            found, metrics = of_command(self.way, self.label, "-n", str(self.many), *self.way.herd)
        else:
            found, runs = self.side_by_side(self.settled if kind == "mount" else self.tmpfs)
            metrics = {"runs_ms": runs}
        self.add(f"{self.many} × {kind}", number, **metrics, **self.memory_of(found))
        self.way.end(found)

    def memory_of(self, found):
        """Memory of each of many children when it has written what it writes: means, and the most of any."""
        assert len(found) == self.many, f"{len(found)} of {self.many} children run"
        for child in found:
            self.way.at_work(child)
        of_all, metrics = [smaps(child.pid) for child in found], {}
        for child in found:
            child.check_sane()
        for metric, names in (("pss_kib", ("Pss",)), ("private_kib", ("Private_Clean", "Private_Dirty")),
                              ("private_dirty_kib", ("Private_Dirty",))):
            each = [sum(one[n] for n in names) for one in of_all]
            metrics |= {metric: sum(each) / len(each), f"most_{metric}": max(each)}
        return metrics


def run_guest(record, options, mib, boot, make, many):
    """One guest."""
    name = f"{boot.__name__}, {mib} MiB"
    # itself, a settled branch, its copy, one in flight; and what the children have of their own
    if not machine.enough_memory(record, name, (4 * mib + 1536) * MIB):
        return
    print(f"restore: {name} …", flush=True)
    with machine.bench_case(record, "restore", name) as case:
        guest = boot(case, mib)
        turns = Turns(record, name, guest, case.mount(options="branch-rate=0,memory=unlimited"), make, many)
        rounds = max(1, min(MOST_ROUNDS, options.branches // 2))
        for number in range(rounds):
            turns.round(number, mib)
        for number in range(max(1, rounds // 3)):
            for kind in ("mount", "tmpfs", "command") if number % 2 else ("command", "tmpfs", "mount"):
                turns.herd(kind, number)
        guest.check_sane()


def run(record, options):
    """Both VMMs, each with all sizes."""
    for guest in GUESTS:
        for mib in options.sizes:
            try:
                run_guest(record, options, mib, *guest)
            except kit.Skip as e:
                record.note(f"restore, {guest[0].__name__} left out: {e}")
                break


def beside(record, case, metric, kind, other):
    """The ratio of two kinds round by round, and of their medians, in words."""
    ratios = record.ratios("restore", case, metric, kind, other)
    if kind == other or not ratios:
        return "-"
    medians = [rec.quantile(record.values("restore", case, k, metric), 0.5) for k in (kind, other)]
    return f"{rec.between(ratios)}; {medians[0] / medians[1]:.2f}"


def starts(record, case):
    """Rows of the first table: one child."""
    rows = []
    for kind in ("tmpfs", "mount", "in flight", "in flight, slow", "command", "command, in flight"):
        def cell(metric, digits=1, kind=kind):
            return rec.between(record.values("restore", case, kind, metric), digits)

        writing = record.values("restore", case, kind, "still_writing")
        rows.append([case, record.others("restore", case), kind, len(record.values("restore", case, kind, "runs_ms")),
                     record.failures("restore", case, kind), cell("runs_ms"), beside(record, case, "runs_ms", kind, "tmpfs"),
                     cell("works_ms"), beside(record, case, "works_ms", kind, "tmpfs"), cell("vmm_ms"), cell("before_vmm_ms"), cell("total_ms"), cell("ready_ms", 0),
                     f"{sum(writing)} of {len(writing)}" if writing else "-"])
    return rows


def herds(record, case, many):
    """Rows of the second: many of them."""
    rows = []
    for kind in ("tmpfs", "mount", "command"):
        def values(metric, kind=kind):
            return record.values("restore", case, f"{many} × {kind}", metric)

        if values("runs_ms"):
            rows.append([case, f"{many} × {kind}", rec.between(values("runs_ms"), 0),
                         beside(record, case, "runs_ms", f"{many} × {kind}", f"{many} × tmpfs"),
                         rec.between(values("total_ms"), 0),
                         *[f"{rec.between(values(m), 0)}; {max(values(f'most_{m}'))}"
                           for m in ("pss_kib", "private_kib", "private_dirty_kib")]])
    return rows


def report(record):
    """Print the tables."""
    one, all_rows = [], []
    for case in dict.fromkeys(s[1] for s in record.samples if s[0] == "restore"):
        one += starts(record, case)
        for boot, _, many in GUESTS:
            if case.startswith(boot.__name__):
                all_rows += herds(record, case, many)
    if one:
        rec.table("One child, ms: median (min – max); ratios round by round; of the medians",
                  ["guest", "CPU others used, %", "started from", "n", "failed", "runs", "/ tmpfs", "has done something", "/ tmpfs",
                   "VMM's part of it", "before the VMM", "command, to its end", "branch ready", "writing when it ran"], one)
    if all_rows:
        rec.table("Many at the same time: ms until the last runs, median (min – max); KiB of each, mean of a round; the most of any",
                  ["guest", "started from", "all run", "/ tmpfs", "command, to its end", "Pss", "Private", "Private_Dirty"], all_rows)
