"""How long a guest's writes wait while it is branched, as the guest itself sees it, and the throughput it loses.

The guest program `stall` (tests/guest/stall.c) says every 50 ms how many of its writes to random pages took how long.
"""

import collections
import time

from forkfs_test.guest import MIB

from . import machine, pause, peers, record as rec

SIZES = (512,)  # MiB, unless others are asked for

QUIET_S = 1.5
AFTER_S = 0.3  # protection is taken off for a moment after a branch is ready
WAITED_NS = 4000  # a served fault takes longer than this, an ordinary write hardly ever
# name, programs of the guest (they share its memory), busy loops beside it. All of its memory is present; a working set of
# 64 MiB is a program's, writes everywhere are the worst that a guest can do.
VARIANTS = (
    ("working set of 64 MiB", ("stall,mib={},hot=64",), 0),
    ("writes everywhere", ("stall,mib={}",), 0),
    ("writes everywhere, two vCPUs", ("stall,mib={}", "load,mib={},fill=1,seq=1,random=0"), 0),
    ("working set of 64 MiB, busy host", ("stall,mib={},hot=64",), 2),
)


def upper_ns(bucket):
    """The largest value of a bucket, see stall.c."""
    if bucket < 8:
        return bucket
    e = bucket // 8 + 2
    return ((8 + bucket % 8 + 1) << (e - 3)) - 1


class Windows:
    """What the guest said, window by window."""

    def __init__(self, guest):
        self.guest = guest
        self.seen = 0
        self.last = None
        self.windows = []  # (begin, end, histogram)

    def update(self):
        """Take in the lines that have come."""
        lines = self.guest.console.lines
        while self.seen < len(lines):
            when, text = lines[self.seen]
            self.seen += 1
            words = text.split()
            if len(words) < 3 or words[0] != "stall" or not words[1].isdigit():
                continue
            histogram = collections.Counter()
            for word in words[3:]:
                bucket, count = word.split(":")
                histogram[int(bucket, 16)] += int(count, 16)
            if self.last is not None:
                self.windows.append((self.last, when, histogram))
            self.last = when

    def between(self, begin, end, whole):
        """The sum of the windows in this time, and its seconds: those that lie in it as a whole, or all that touch it."""
        self.update()
        total, seconds = collections.Counter(), 0.0
        for first, last, histogram in self.windows:
            if (first >= begin and last <= end) if whole else (last > begin and first < end):
                total.update(histogram)
                seconds += last - first
        return total, seconds

    def longest(self, begin, end):
        """Seconds of the longest of the windows that touch this time: the guest says something every 50 ms, when it can."""
        return max((last - first for first, last, _ in self.windows if last > begin and first < end), default=0.0)


def quantile_ns(histogram, q):
    """The latency that a share q of the writes does not exceed."""
    total = sum(histogram.values())
    seen = 0
    for bucket in sorted(histogram):
        seen += histogram[bucket]
        if seen >= q * total:
            return upper_ns(bucket)
    return 0


def excess(histogram, seconds, quiet, quiet_seconds):
    """The writes that waited, less what the quiet guest shows in the same time."""
    scale = seconds / quiet_seconds
    found = collections.Counter()
    for bucket, count in histogram.items():
        more = count - quiet.get(bucket, 0) * scale
        if upper_ns(bucket) >= WAITED_NS and more > 0:
            found[bucket] = more
    return found


def rate(histogram, seconds):
    """Writes a second."""
    return sum(histogram.values()) / seconds if seconds else None


class Measure:
    """Branches of one guest; sums over all of them by kind."""

    def __init__(self, record, name, guest):
        self.record, self.name = record, name
        self.windows = Windows(guest)
        self.sums = collections.defaultdict(lambda: [collections.Counter(), 0.0])

    def sum(self, kind, histogram, seconds):
        """Add to the sums of a kind."""
        self.sums[kind][0].update(histogram)
        self.sums[kind][1] += seconds

    def one(self, kind, number, take):
        """A quiet moment, one snapshot of this kind, a quiet moment."""
        begin = time.monotonic()
        time.sleep(QUIET_S)
        quiet = time.monotonic()
        done = self.record.attempt("stall", self.name, kind, number, take)
        if not done:
            return None
        time.sleep(AFTER_S + QUIET_S)
        end = time.monotonic()
        before = self.windows.between(begin, quiet, True)
        touched = self.windows.between(done["start"], done["end"], False)
        inside = self.windows.between(done["start"], done["end"], True)
        after = self.windows.between(done["end"] + AFTER_S, end, True)
        self.sum("none", *before)
        self.sum(kind, *touched)
        usual = rate(*before)
        metrics = {"max_us": upper_ns(max(touched[0])) / 1e3, "total_ms": (done["end"] - done["start"]) * 1e3,
                   "silent_ms": self.windows.longest(done["start"], done["end"]) * 1e3}
        if usual and rate(*inside) is not None:
            metrics["lost_percent"] = 100 * (1 - rate(*inside) / usual)
        if usual and rate(*after) is not None:
            metrics["lost_after_percent"] = 100 * (1 - rate(*after) / usual)
        self.record.add("stall", self.name, kind, number, **metrics)
        self.record.add("stall", self.name, "none", number, max_us=upper_ns(max(before[0])) / 1e3)
        return done

    def finish(self):
        """The spread over all writes, and over those that waited."""
        quiet, quiet_seconds = self.sums["none"]
        for kind, (histogram, seconds) in self.sums.items():
            more = excess(histogram, seconds, quiet, quiet_seconds) if kind != "none" else collections.Counter()
            self.record.add("stall", self.name, f"{kind}, all", 0, writes=sum(histogram.values()), seconds=seconds,
                            p50_us=quantile_ns(histogram, 0.5) / 1e3, p99_us=quantile_ns(histogram, 0.99) / 1e3,
                            p999_us=quantile_ns(histogram, 0.999) / 1e3, max_us=upper_ns(max(histogram)) / 1e3,
                            waited=round(sum(more.values())), waited_p50_us=quantile_ns(more, 0.5) / 1e3,
                            waited_p90_us=quantile_ns(more, 0.9) / 1e3, waited_p99_us=quantile_ns(more, 0.99) / 1e3)


def run_variant(record, options, mib, variant):
    """One guest."""
    what, programs, loops = variant
    name = f"{mib} MiB, {what}"
    if not machine.enough_memory(record, name, 3 * mib * MIB):
        return
    print(f"stall: {name} …", flush=True)
    with machine.bench_case(record, "stall", name) as case, machine.busy_loops(loops):
        room = pause.guest_room(mib) // len(programs)
        guest = case.guest(mib=mib, run=[p.format(room) for p in programs])
        machine.at_work(guest)
        mount = case.mount(options="lease=1,branch-rate=0")
        sandbox = mount.attach(guest)
        other = peers.Alternative(case, "one-lock", "lease=1,branch-rate=0")
        measure = Measure(record, name, guest)
        faults = collections.Counter()
        count = max(2, options.branches // 2)
        every = max(1, count // options.peers)
        for i in range(count):
            done = measure.one("live", i, lambda: peers.live(guest, sandbox, f"b{i}"))
            if done:
                record.add("stall", name, "daemon", i, faults=done["metrics"]["faults"],
                           fault_max_us=done["metrics"]["fault_max_us"])
                for bucket, served in enumerate(done["faults_us"]):
                    faults[bucket] += served
            if i % every == every - 1:
                peers.wait_released(guest)
                measure.one("one lock", i, lambda: other.live(guest, mount, f"b{i}"))
                measure.one("background", i, lambda: peers.background_snapshot(guest, case.dir))
        measure.finish()
        for bucket, served in sorted(faults.items()):
            record.add("stall", name, "daemon", bucket, **{"served_below_2^round_us": served})
        guest.check_sane()


def run(record, options):
    """All sizes and variants."""
    for mib in options.sizes:
        for variant in VARIANTS:
            run_variant(record, options, mib, variant)


def daemon_quantile(record, case, q):
    """Below how many µs the daemon served a share q of the faults."""
    counts = [(s[3], s[5]) for s in record.samples
              if s[:3] == ("stall", case, "daemon") and s[4] == "served_below_2^round_us"]
    total, seen = sum(n for _, n in counts), 0
    for bucket, n in sorted(counts):
        seen += n
        if seen >= q * total:
            return f"< {1 << bucket}"
    return "-"


def report(record):
    """Print the tables."""
    cases = list(dict.fromkeys(s[1] for s in record.samples if s[0] == "stall"))
    waits, lost, daemon = [], [], []
    for case in cases:
        for kind, words in (("none", "no branch"), ("live", "live branch"), ("one lock", "live branch, one lock for the copy"),
                            ("background", "background-snapshot")):
            def all_of(metric, scale=1, digits=1, kind=kind, case=case):
                values = record.values("stall", case, f"{kind}, all", metric)
                return f"{values[0] / scale:.{digits}f}" if values else "-"

            waits.append([case, words, all_of("seconds", 1), all_of("writes", 1e6),
                          " / ".join(all_of(m, 1, 2) for m in ("p50_us", "p99_us", "p999_us")), all_of("max_us", 1e3, 2),
                          all_of("waited", 1, 0),
                          " / ".join(all_of(m, 1, 0) for m in ("waited_p50_us", "waited_p90_us", "waited_p99_us"))])
            if kind != "none":
                lost.append([case, words, record.failures("stall", case, kind),
                             *[rec.spread(record.values("stall", case, kind, m), d) for m, d in
                               (("total_ms", 0), ("lost_percent", 0), ("lost_after_percent", 1), ("silent_ms", 0))]])
        daemon.append([case, record.others("stall", case),
                       *[rec.spread(record.values("stall", case, "daemon", m), 0) for m in ("faults", "fault_max_us")],
                       " / ".join(daemon_quantile(record, case, q) for q in (0.5, 0.99, 0.999))])
    if cases:
        rec.table("A write to a random page, seen by the guest (pauses are not in it)",
                  ["guest", "meanwhile", "s", "writes, 10⁶", "all: p50 / p99 / p99.9 µs", "max ms", "writes that waited",
                   "of them: p50 / p90 / p99 µs"], waits)
        rec.table("Throughput the guest loses against the second before, %: p50 / p90 / p99 / max",
                  ["guest", "meanwhile", "failed", "it took ms", "during it", "afterwards",
                   "longest silence, ms (50 without a branch)"], lost)
        rec.table("The same by the daemon's own count",
                  ["guest", "CPU others used, %", "faults a branch", "longest a branch µs", "p50 / p99 / p99.9 of all µs"],
                  daemon)
