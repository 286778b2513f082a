"""Forks: until the guest has its payload and has acknowledged it, what a hundred children with a hundred payloads take, and the search for mailboxes."""

import concurrent.futures
import ctypes
import os
import pathlib
import re
import time

from forkfs_test import case as kit
from forkfs_test import processes, rig
from forkfs_test.guest import MIB
from forkfs_test.microvm import MicroVm

from . import machine, pause, record as rec, restore, sizes, start

SIZES = (256,)  # MiB, unless others are asked for
SEARCHED = 4096  # MiB that are resident when memory is searched
SEARCHES = 10
POLL = 0.0002  # seconds between two looks at what a guest has said
PAGE = 4096


def microvm(case, mib):
    """As in `restore`, with a mailbox."""
    return MicroVm(case, "sbx1", mib=mib, kind="memfd", vcpus=1, work=start.MicroWay.written, fill=1, mailbox="config,s3cret").booted()


def qemu(case, mib):
    """The same; its program looks at the mailbox every millisecond."""
    return case.guest(mib=mib, run=[f"load,mib={pause.guest_room(mib)},fill=1,seq=1,random=1,rate=20",
                                    "mailbox,config,s3cret,ms=1"]).booted()


# guest, how its children are started, how many of them at the same time; the file with what it says, how it says that it has its payload
PREFETCH = ("none", "mapped", "and written")
GUESTS = ((microvm, start.MicroWay, 100, "stdout", rb"^mail [0-9a-f]{32} "), (qemu, start.Way, 10, "con.log", rb"^mailbox config took "))


# ---- pages of a child


def memory_of(pid):
    """Where a child has the guest's memory: (address, bytes) of its largest private mapping of a file."""
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ [1-9]\d*", pathlib.Path(f"/proc/{pid}/maps").read_text(encoding="ascii"), re.M)
    first, end = max(((int(a, 16), int(b, 16)) for a, b in found), key=lambda m: m[1] - m[0])
    return first, end - first


def present(pid):
    """Pages of the guest's memory that the child has mapped, by their numbers, and those of them that it has written."""
    first, size = memory_of(pid)
    with open(f"/proc/{pid}/pagemap", "rb") as f:
        f.seek(first // PAGE * 8)
        entries = memoryview(f.read(size // PAGE * 8)).cast("Q")
    mapped = [i for i, e in enumerate(entries) if e >> 63]
    return mapped, [i for i in mapped if not entries[i] >> 61 & 1]  # a page of its own is no file's


class Iovec(ctypes.Structure):
    """struct iovec"""

    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


def touch(pid, pages, write=False):
    """Have the child map these pages before its guest asks for them: a byte of each is read in its place, and written again."""
    libc, (first, _) = ctypes.CDLL(None, use_errno=True), memory_of(pid)
    for at in range(0, len(pages), 1024):
        some = pages[at:at + 1024]
        buf = ctypes.create_string_buffer(len(some))
        local, remote = Iovec(ctypes.addressof(buf), len(some)), (Iovec * len(some))(*[Iovec(first + p * PAGE, 1) for p in some])
        for move in (libc.process_vm_readv, libc.process_vm_writev)[:1 + write]:
            done = move(pid, ctypes.byref(local), 1, remote, len(some), 0)
            assert done == len(some), os.strerror(ctypes.get_errno())


def faults(pid):
    """Minor faults of a process so far."""
    return int(processes.stat_fields(pid)[7])


class Forks(restore.Turns):
    """All that is measured of one guest."""

    bench = "fork"

    def __init__(self, record, name, guest, mount, make, many, says):
        super().__init__(record, name, guest, mount, make, many)
        self.log, self.pattern, self.count = says[0], re.compile(says[1], re.M), 0
        self.mapped, self.written = [], []  # by a child before

    def make(self):
        """A fork with a payload of its own, to be acknowledged; NAME/BRANCH/FORK."""
        self.count += 1
        name = f"c{self.count}"
        rig.request(self.sandbox / "ctl", fork={"branch": "settled", "name": name, "mailboxes": [
            {"name": "config", "payload": {"task": self.count}, "wait_for_ack": True, "ack_timeout_ms": 30000}]})
        return f"{self.label}/{name}"

    def logs(self):
        """What the children say."""
        return set((self.case.dir / "ch").glob(f"*/{self.log}"))

    def wait_seen(self, logs, more=lambda: True):
        """Wait until one of these files says that the guest has its payload."""
        while more():
            for log in logs():
                try:
                    if self.pattern.search(log.read_bytes()):
                        return time.monotonic()
                except FileNotFoundError:
                    continue
            time.sleep(POLL)
        raise AssertionError("the command has ended, and no guest has its payload")

    def one(self, number, pool):
        """One fork and its child: until the payload was seen, until the command knew of the acknowledgement."""
        before, begin = self.logs(), time.monotonic()
        target = self.make()
        made = start.since(begin)
        job = pool.submit(self.way.command, target)
        seen = self.wait_seen(lambda: self.logs() - before, lambda: not job.done() or self.logs() - before)
        found, total = job.result()
        said = found[0].said
        assert said["acks"][0]["state"] == "applied", said
        self.add("fork", number, made_ms=made, seen_ms=(seen - begin) * 1e3, acknowledged_ms=made + total,
                 ack_ms=said["acks"][0]["after_ns"] / 1e6, command_ms=total)
        self.way.end(found)

    def prefetched(self, number, kind):
        """A child that was left stopped, its pages mapped beforehand or not: from then until its guest has the payload."""
        (child,), _ = self.way.command(self.make(), "--paused")
        begin = time.monotonic()
        if kind != "none":
            touch(child.pid, self.mapped)
        if kind == "and written":
            touch(child.pid, self.written, write=True)
        fetched = start.since(begin)
        before, begin = faults(child.pid), time.monotonic()
        if isinstance(child, start.MicroWay.kind):
            child.status("resume")
        else:
            monitor = child.monitor()
            monitor.execute("cont")
        seen = self.wait_seen(lambda: [child.dir / self.log])
        taken = faults(child.pid) - before
        if kind == "none":
            self.mapped, self.written = present(child.pid)
        self.add(f"prefetch: {kind}", number, seen_ms=(seen - begin) * 1e3, faults_pages=taken, fetch_ms=fetched,
                 mapped_pages=len(self.mapped), written_pages=len(self.written))
        if not isinstance(child, start.MicroWay.kind):
            monitor.close()
        self.way.end([child])

    def herd_of_forks(self, number, one, *options):
        """As many payloads as children, by one command or a command for each: until all have acknowledged (--paused: are loaded, with
        their payloads), and the memory of each."""
        begin = time.monotonic()
        targets = [self.make() for _ in range(self.many)]
        made = start.since(begin)

        def known(child):
            assert options or child.said["acks"][0]["state"] == "applied", child.said
            if self.way.herd and not options:  # each would take a CPU to itself
                child.status("pause")
                child.drop()
            return child

        cpus = os.cpu_count()
        if one:
            found = [known(child) for child in self.way.told(*targets, *options)]
        else:
            with concurrent.futures.ThreadPoolExecutor(2 * cpus if cpus > 2 else 4) as pool:
                found = list(pool.map(lambda target: known(self.way.command(target, *options)[0][0]), targets))
        total = start.since(begin)
        assert {c.said["fork"] for c in found} == {t.rsplit("/", 1)[1] for t in targets}
        self.add(f"{self.many} × forks, {'one command' if one else 'a command each'}{', paused' if options else ''}", number, made_ms=made,
                 runs_ms=total, **self.memory_of(found))
        self.way.end(found)


def run_guest(record, options, mib, boot, make, many, *says):
    """One guest."""
    name = f"{boot.__name__}, {mib} MiB"
    if not machine.enough_memory(record, name, (4 * mib + 1536) * MIB):
        return
    print(f"fork: {name} …", flush=True)
    with machine.bench_case(record, "fork", name) as case:
        guest = boot(case, mib)
        turns = Forks(record, name, guest, case.mount(options="branch-rate=0,memory=unlimited"), make, many, says)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for number in range(many if options.branches > 4 else options.branches):
                turns.one(number, pool)
        for number in range(options.branches):
            for kind in PREFETCH:
                turns.prefetched(number, kind)
        for number in range(max(1, options.branches // 4)):
            for one in (True, False) if number % 2 else (False, True):
                turns.herd_of_forks(number, one)
                if turns.way.herd:
                    turns.herd_of_forks(number, one, *turns.way.herd)
            turns.herd("tmpfs", number)
        guest.check_sane()


def search(record, kind):
    """How long memory is searched: of a VM that runs, of a branch that is ready, of one that is being captured."""
    mib = SEARCHED * 8 // 7 + 8 & ~7  # the guest leaves an eighth untouched
    name = f"search, {kind}, {SEARCHED} MiB"
    if not machine.enough_memory(record, name, (2 * SEARCHED + 1024) * MIB):
        return
    print(f"fork: {name} …", flush=True)
    with machine.bench_case(record, "fork", name) as case:
        guest = MicroVm(case, "sbx1", mib=mib, kind=kind, vcpus=1, work=start.MicroWay.written, fill=1, mailbox="config,s3cret").booted()
        resident = sum(restore.smaps(guest.pid)[n] for n in ("Rss",)) / 1024
        sandbox = case.mount(options="branch-rate=0,memory=unlimited").attach(guest)

        def listed(directory):
            begin = time.monotonic()
            assert os.listdir(directory) == ["config"]
            return start.since(begin)

        for number in range(SEARCHES):
            record.add("fork", name, "running", number, search_ms=listed(sandbox / "mailboxes"), resident_mib=resident)
        for number in range(3):
            branch, _ = sizes.ask(sandbox, "b", wait=True)
            (branch / "forks/c").mkdir()
            record.add("fork", name, "ready", number, search_ms=listed(branch / "forks/c/mailboxes"))
            branch.rmdir()
            branch, _ = sizes.ask(sandbox, "b", wait=False)
            (branch / "forks/c").mkdir()
            record.add("fork", name, "in flight", number, search_ms=listed(branch / "forks/c/mailboxes"))
            rig.wait_settled(branch)
            branch.rmdir()
        guest.check_sane()


def run(record, options):
    """Both VMMs, and the search."""
    for guest in GUESTS:
        for mib in options.sizes:
            try:
                run_guest(record, options, mib, *guest)
            except kit.Skip as e:
                record.note(f"fork, {guest[0].__name__} left out: {e}")
                break
    for kind in ("memfd", "anonymous"):
        try:
            search(record, kind)
        except kit.Skip as e:
            record.note(f"fork, search left out: {e}")


def report(record):
    """Print the tables."""
    one, fetched, many, searched = [], [], [], []
    for case in dict.fromkeys(s[1] for s in record.samples if s[0] == "fork"):
        def values(kind, metric, case=case):
            return record.values("fork", case, kind, metric)

        others = record.others("fork", case)
        if values("fork", "seen_ms"):
            one.append([case, others, len(values("fork", "seen_ms")),
                        *[rec.spread(values("fork", m), 1) for m in ("made_ms", "seen_ms", "acknowledged_ms", "ack_ms")]])
        for kind in PREFETCH:
            kind = f"prefetch: {kind}"
            if values(kind, "seen_ms"):
                fetched.append([case, kind.split(": ")[1], len(values(kind, "seen_ms")), rec.spread(values(kind, "seen_ms"), 2),
                                *[rec.between(values(kind, m), d) for m, d in (("fetch_ms", 2), ("faults_pages", 0), ("mapped_pages", 0),
                                                                               ("written_pages", 0))]])
        for kind in dict.fromkeys(s[2] for s in record.samples if s[:2] == ("fork", case) and " × " in s[2]):
            many.append([case, others, kind, rec.between(values(kind, "runs_ms"), 0), rec.between(values(kind, "made_ms"), 0),
                         *[f"{rec.between(values(kind, m), 0)}; {max(values(kind, f'most_{m}'))}"
                           for m in ("pss_kib", "private_kib", "private_dirty_kib")]])
        for kind in ("running", "ready", "in flight"):
            if values(kind, "search_ms"):
                searched.append([case, others, kind, len(values(kind, "search_ms")), rec.between(values(kind, "search_ms"), 0)])
    spread = "p50 / p90 / p99 / max"
    if one:
        rec.table(f"One fork and its child, ms: {spread}",
                  ["guest", "CPU others used, %", "n", "made", "payload seen by the guest", "acknowledged, command ended",
                   "acknowledged, since it runs"], one)
    if fetched:
        rec.table(f"The pages that a child before it had mapped, mapped before it runs; ms: {spread}; median (min – max)",
                  ["guest", "prefetched", "n", "until the payload is seen", "prefetching", "faults until then", "pages mapped by one before",
                   "written"], fetched)
    if many:
        rec.table("Many at the same time: ms until the last has acknowledged (tmpfs: runs, or is loaded); KiB of each, mean of a round; the most of any",
                  ["guest", "CPU others used, %", "started", "all", "of that making the forks", "Pss", "Private", "Private_Dirty"], many)
    if searched:
        rec.table("The search for mailboxes, ms: median (min – max)", ["memory", "CPU others used, %", "of", "n", "ms"], searched)
