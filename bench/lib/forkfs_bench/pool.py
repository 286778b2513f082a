"""The warm pool: until who asks has a child that runs, from an idle one and from one that is restored for them, beside `forkfs restore`."""

import json
import pathlib
import time

from forkfs_test import pool
from forkfs_test import case as kit

from . import machine, record as rec, restore, sizes, start

SIZES = (256,)  # MiB, unless others are asked for

ROUNDS = 10  # times options.branches: a p99 needs a hundred
KINDS = ("hit", "miss", "restore")


def smaps_pss(pids):
    """KiB of memory that are these processes' own, their share of common pages included."""
    return sum(restore.smaps(pid)["Pss"] for pid in pids)


class Turns:
    """Both pools and the command, of one guest's branch."""

    def __init__(self, record, name, guest, mount, make):
        self.record, self.name, self.mount = record, name, mount
        sizes.ask(mount.attach(guest), "settled", wait=True)
        self.label = f"{guest.name}/settled"
        self.way = make(mount, self.label)
        how = {"kind": self.way.kind, "vmm": self.way.vmm}
        self.warm = pool.Pool(mount, self.label, *self.way.options, name="warm", low=1, high=3, **how)
        self.cold = pool.Pool(mount, self.label, *self.way.options, name="cold", low=0, high=1, **how)

    def restored(self):
        """One child by the command, as each asker gets one from a pool."""
        (child,), total = self.way.command(self.label)
        return child, {"total_ms": total, "runs_ms": child.said["times"]["running_ns"] / 1e6}

    def acquired(self, p, wanted):
        """One child of a pool; it has to be of that kind."""
        result = p.ask("acquire")
        child = p.kind(p.case, json.loads(result.out))
        assert child.said["from"] == wanted, child.said
        return child, {"total_ms": result.seconds * 1e3, "runs_ms": child.said["times"]["running_ns"] / 1e6}

    def round(self, number):
        """Each kind once, in turns."""
        ways = {"hit": lambda: self.acquired(self.warm, "pool"), "miss": lambda: self.acquired(self.cold, "restored"),
                "restore": self.restored}
        for kind in KINDS[number % 3:] + KINDS[:number % 3]:
            for p, idle in ((self.warm, 1), (self.cold, 0)):  # nothing else goes on meanwhile
                p.wait(lambda s, idle=idle: s["idle"] == idle and not s["starting"] and not s["ending"] and not s["out"])
            child, metrics = ways[kind]()
            self.record.add("pool", self.name, kind, number, **metrics)
            child.stop()
        for p in (self.warm, self.cold):
            for ended in p.status()["ended"]:
                p.ask("release", str(ended))

    def idle(self):
        """What an idle child takes: its memory, and CPU time in two seconds."""
        (pid,) = [c["pid"] for c in self.warm.wait(lambda s: s["idle"] == 1)["children"]]
        before = self.cpu(pid)
        time.sleep(2)
        self.record.add("pool", self.name, "idle", 0, pss_kib=smaps_pss([pid]), cpu_ms=self.cpu(pid) - before)

    @staticmethod
    def cpu(pid):
        """Milliseconds of CPU that a process has used."""
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * 10


def run_guest(record, options, mib, boot, make):
    """One guest."""
    name = f"{boot.__name__}, {mib} MiB"
    if not machine.enough_memory(record, name, (4 * mib + 512) << 20):
        return
    print(f"pool: {name} …", flush=True)
    with machine.bench_case(record, "pool", name) as case:
        turns = Turns(record, name, boot(case, mib), case.mount(options="branch-rate=0,memory=unlimited"), make)
        for number in range(options.branches * ROUNDS):
            turns.round(number)
        turns.idle()


def run(record, options):
    """Both VMMs, each with all sizes."""
    for boot, make in ((restore.microvm, start.MicroWay), (restore.qemu, start.Way)):
        for mib in options.sizes:
            try:
                run_guest(record, options, mib, boot, make)
            except kit.Skip as e:
                record.note(f"pool, {boot.__name__} left out: {e}")
                break


def report(record):
    """Print the tables."""
    rows, idle = [], []
    for case in dict.fromkeys(s[1] for s in record.samples if s[0] == "pool"):
        for kind in KINDS:
            def values(metric, kind=kind, case=case):
                return record.values("pool", case, kind, metric)

            ratios = record.ratios("pool", case, "total_ms", kind, "restore")
            rows.append([case, record.others("pool", case), kind, len(values("total_ms")), rec.spread(values("runs_ms")),
                         rec.spread(values("total_ms")), rec.between(ratios) if kind != "restore" else "-"])
        if record.values("pool", case, "idle", "pss_kib"):
            idle.append([case, record.values("pool", case, "idle", "pss_kib")[0], record.values("pool", case, "idle", "cpu_ms")[0]])
    if rows:
        rec.table("Until a child runs, ms: p50 / p90 / p99 / max; the command's ratio round by round",
                  ["guest", "CPU others used, %", "child", "n", "asked → runs", "command, to its end", "/ restore"], rows)
    if idle:
        rec.table("An idle child", ["guest", "Pss, KiB", "CPU in 2 s, ms"], idle)
