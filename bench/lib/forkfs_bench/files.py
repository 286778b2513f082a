"""Reading, copying and listing branches, beside files on tmpfs that hold the same bytes."""

import json
import os
import shutil
import time

from forkfs_test.guest import MIB, Guest

from . import machine, pause, peers, record as rec

SIZES = (1024,)  # MiB, unless others are asked for
RANDOM_READS = 100000
LOOKUPS = 5000
LISTED = 1000


class Blank(Guest):
    """A VM of 16 MiB without a kernel: its BIOS finds nothing to boot. Small enough for a thousand branches."""

    def _command(self, memory):
        command = super()._command(memory)
        for option in ("-kernel", "-initrd", "-append"):
            at = command.index(option)
            del command[at:at + 2]
        return command


def in_turns(number, kinds):
    """The kinds of file, in another order every other round."""
    return kinds if number % 2 == 0 else kinds[::-1]


def copied(source, target):
    """Nanoseconds of a cp to a new file."""
    ns = machine.timed("cp", source, target)
    target.unlink()
    return ns


def settled(record, options, name, case, guest, sandbox):
    """One branch that is ready; the guest is stopped, so that it costs no CPU."""
    branch = sandbox / "branches" / "settled"
    branch.mkdir()
    (branch / "wait").read_bytes()
    guest.qmp.execute("stop")
    beside = case.dir / "beside"
    shutil.copyfile(branch / "memory.bin", beside)
    size = beside.stat().st_size
    kinds = [("branch", branch / "memory.bin"), ("tmpfs", beside)]
    for number in range(-1, options.rounds):
        for kind, path in in_turns(number, kinds):
            ns, read = machine.tool_numbers("seq", path, MIB)
            assert read == size, f"{path}: {read} of {size} bytes"
            metrics = {"seq_gbs": size / ns}
            p50, _, p99, _ = machine.tool_numbers("random", path, RANDOM_READS)
            metrics |= {"random_us": p50 / 1e3, "random_p99_us": p99 / 1e3}
            metrics["cp_gbs"] = size / copied(path, case.dir / "copy")
            p50, _, p99, _ = machine.tool_numbers("stat", path, LOOKUPS)
            metrics |= {"stat_us": p50 / 1e3, "stat_p99_us": p99 / 1e3}
            p50, _, p99, _ = machine.tool_numbers("first", path, LOOKUPS)
            metrics |= {"first_byte_us": p50 / 1e3, "first_byte_p99_us": p99 / 1e3}
            if number >= 0:
                record.add("files", f"{name}, settled", kind, number, **metrics)
    guest.qmp.execute("cont")
    branch.rmdir()
    return beside


def wait_forgotten(sandbox, timeout=60):
    """Wait until the generations of branch/ have ended: their memory is free again."""
    deadline = time.monotonic() + timeout
    while json.loads((sandbox / "status").read_text()).get("generations"):
        assert time.monotonic() < deadline, "generations do not end"
        time.sleep(0.1)


def in_flight(record, options, name, case, sandbox, beside):
    """cp of branch/memory.bin, with the pause and the capture in it; the guest runs."""
    size = beside.stat().st_size
    kinds = [("branch", sandbox / "branch" / "memory.bin"), ("tmpfs", beside)]
    for number in range(-1, options.rounds):
        for kind, path in in_turns(number, kinds):
            wait_forgotten(sandbox)
            target = case.dir / "copy"
            try:
                gbs = size / copied(path, target)
            except machine.ToolError as e:
                target.unlink(missing_ok=True)
                record.add("files", f"{name}, in flight", kind, number, failed=1)
                record.note(f"files, {name}, in flight: {e}: {peers.why(sandbox / 'branch')}")
                continue
            if number >= 0:
                record.add("files", f"{name}, in flight", kind, number, cp_gbs=gbs)


def listing(record, options, count):
    """ls -l of so many branches, warm."""
    with machine.bench_case(record, "files", f"ls -l of {count} branches") as case:
        guest = Blank(case, "blank", mib=16, smp=1)
        mount = case.mount(options="lease=1,branch-rate=0")
        sandbox = mount.attach(guest)
        many, plain = sandbox / "branches", case.dir / "plain"
        plain.mkdir()
        begin = time.monotonic()
        for i in range(count):
            (many / f"b{i:04}").mkdir()
            (many / f"b{i:04}" / "wait").read_bytes()
            (plain / f"b{i:04}").mkdir()
        seconds = time.monotonic() - begin
        name = f"ls -l of {count} branches"
        record.add("files", name, "branch", 0, made_and_ready_ms=seconds * 1e3 / count)
        assert len(os.listdir(many)) == count
        for number in range(-1, options.rounds):
            for kind, path in in_turns(number, [("branch", many), ("tmpfs", plain)]):
                ns = machine.timed("ls", "-l", path)
                if number >= 0:
                    record.add("files", name, kind, number, ls_ms=ns / 1e6)


def run(record, options):
    """One size, the guest calm and writing; then the listing."""
    options.rounds = max(5, options.branches // 2)
    mib = max(s for s in options.sizes if s <= 1024) if min(options.sizes) <= 1024 else min(options.sizes)
    writers = "load,mib={},fill=1,seq=1,random=1"
    for what, program in (("calm", writers + ",rate=500"), ("writing", writers)):
        name = f"{mib} MiB, {what}"
        if not machine.enough_memory(record, name, 6 * mib * MIB):
            continue
        print(f"files: {name} …", flush=True)
        with machine.bench_case(record, "files", name) as case:
            guest = case.guest(mib=mib, run=[program.format(pause.guest_room(mib))])
            machine.at_work(guest)
            mount = case.mount(options="lease=1,branch-rate=0")
            sandbox = mount.attach(guest)
            capabilities = json.loads((mount / ".forkfs/capabilities").read_text())
            record.machine["serving_settled"] = capabilities.get("serving_settled")
            if what == "calm":
                beside = settled(record, options, name, case, guest, sandbox)
            else:
                beside = case.dir / "beside"
                shutil.copyfile(sandbox / "branch" / "memory.bin", beside)
            in_flight(record, options, name, case, sandbox, beside)
            guest.check_sane()
    print("files: listing …", flush=True)
    listing(record, options, 100 if options.quick else LISTED)


ROWS = (("seq_gbs", "read, 1 MiB at a time, GB/s", 2), ("random_us", "read of 4 KiB at random, median µs", 2),
        ("random_p99_us", "the same, p99 µs", 2), ("cp_gbs", "cp to tmpfs, GB/s", 2), ("stat_us", "stat, median µs", 2),
        ("first_byte_us", "open → first byte, median µs", 2), ("first_byte_p99_us", "the same, p99 µs", 2),
        ("ls_ms", "ls -l, ms", 1))


def report(record):
    """Print the table."""
    rows = []
    for case in dict.fromkeys(s[1] for s in record.samples if s[0] == "files"):
        for metric, words, digits in ROWS:
            ours, theirs = (record.values("files", case, kind, metric) for kind in ("branch", "tmpfs"))
            if ours:
                rows.append([case, words, len(ours), rec.between(ours, digits), rec.between(theirs, digits),
                             rec.between(record.ratios("files", case, metric, "branch", "tmpfs"))])
    for case in dict.fromkeys(s[1] for s in record.samples if s[0] == "files" and s[2] == "host"):
        print(f"{case}: others used {record.others('files', case)} % of the CPUs")
    if rows:
        rec.table("Branches beside files on tmpfs: median (min – max) of the rounds",
                  ["what", "measure", "n", "branch", "tmpfs", "branch / tmpfs: median (min – max)"], rows)
