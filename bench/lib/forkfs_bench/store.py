"""Writing branches to a store, and reading them from it, beside lz4, zstd and a sparse copy of the same memory."""

import json
import os
import pathlib
import shutil
import time

from forkfs_test.guest import MIB

from . import machine, pause, record as rec

SIZES = (512,)  # MiB, unless others are asked for

RANDOM_READS = 5000
OTHERS = (("lz4 -1", "lz4 -1 -q -f {source} {target}"), ("zstd -1", "zstd -1 -q -f {source} -o {target}"),
          ("cp --sparse", "cp --sparse=always {source} {target}"))


def ours(record, name, number, kind, mount, guest):
    """One branch to the store and back; its directory."""
    branch = mount / guest.name / "branches" / f"{kind}{number}"
    mount.run("branch", guest.name, branch.name, "--store", kind, timeout=600)
    size = (branch / "memory.bin").stat().st_size
    status, manifest = (json.loads((branch / f).read_text()) for f in ("status", "manifest.json"))
    ns, read = machine.tool_numbers("seq", branch / "memory.bin", MIB)
    assert read == size, f"{branch}: {read} of {size} bytes"
    cold, _, cold_p99, _ = machine.tool_numbers("cold", branch / "memory.bin", RANDOM_READS)
    p50, _, p99, _ = machine.tool_numbers("random", branch / "memory.bin", RANDOM_READS)
    record.add("store", name, kind, number, write_gbs=size / manifest["store"]["write_ns"], read_gbs=size / ns,
               random_us=p50 / 1e3, random_p99_us=p99 / 1e3, cold_us=cold / 1e3, cold_p99_us=cold_p99 / 1e3, disk_mib=status["disk_bytes"] / MIB,
               own_mib=(status["disk_bytes"] - status["disk_shared_bytes"]) / MIB)
    return branch


def restored(record, name, number, kind, branch, guest):
    """A child from a branch: until it runs, and until it has said something."""
    start = time.monotonic()
    child = guest.child(f"{kind}{number}", branch / "memory.bin", branch / "vmstate")
    child.go()
    runs = time.monotonic()
    child.console.wait(r"^load \d", timeout=120)
    record.add("store", name, kind, number, restore_ms=(runs - start) * 1e3, tick_ms=(time.monotonic() - start) * 1e3)
    child.stop()


def others(record, name, number, source, directory):
    """The same memory by other tools, from a dense file."""
    size = os.stat(source).st_size
    for kind, command in OTHERS:
        if not shutil.which(command.split()[0]):
            record.note(f"{command.split()[0]} is not installed: not measured")
            continue
        target = pathlib.Path(directory) / "other"
        ns = machine.timed(*command.format(source=source, target=target).split())
        record.add("store", name, kind, number, write_gbs=size / ns, disk_mib=target.stat().st_blocks * 512 / MIB)
        target.unlink()


def run(record, options):
    """One size, a guest that writes."""
    mib = min(options.sizes)
    name = f"{mib} MiB"
    if not machine.enough_memory(record, name, 6 * mib * MIB):
        return
    print(f"store: {name} …", flush=True)
    with machine.bench_case(record, "store", name) as case:
        guest = case.guest(mib=mib, run=[f"load,mib={pause.guest_room(mib)},fill=1,seq=1,random=1,rate=500"])
        machine.at_work(guest)
        mount = case.mount(options=f"store={case.dir}/store")
        mount.attach(guest)
        packed = None
        for number in range(max(3, options.branches // 8)):
            dense = ours(record, name, number, "dense", mount, guest)
            restored(record, name, number, "dense", dense, guest)
            others(record, name, number, case.dir / "store" / guest.name / dense.name / "memory.bin", case.dir)
            dense.rmdir()
            before, packed = packed, ours(record, name, number, "packed", mount, guest)
            restored(record, name, number, "packed", packed, guest)
            if before:
                before.rmdir()
        packed.rmdir()
        guest.check_sane()


ROWS = (("write_gbs", "written, GB of memory a second", 2), ("disk_mib", "on disk, MiB", 0),
        ("own_mib", "of that not shared, MiB", 0), ("read_gbs", "read, 1 MiB at a time, GB/s", 2),
        ("cold_us", "read of 4 KiB at random, not cached, median µs", 1), ("cold_p99_us", "the same, p99 µs", 1),
        ("restore_ms", "a child from it runs after, ms", 0), ("tick_ms", "and has said its next line (one a second) after, ms", 0),
        ("random_us", "read of 4 KiB at random, cached, median µs", 1), ("random_p99_us", "the same, p99 µs", 1))


def report(record):
    """Print the table."""
    kinds = ["dense", "packed", *[kind for kind, _ in OTHERS]]
    rows = []
    for case in dict.fromkeys(s[1] for s in record.samples if s[0] == "store"):
        for metric, words, digits in ROWS:
            values = [record.values("store", case, kind, metric) for kind in kinds]
            rows.append([case, words, *[rec.between(v, digits) if v else "–" for v in values]])
    if rows:
        rec.table("Branches in a store (on tmpfs) beside other ways to keep the same memory: median (min – max)",
                  ["what", "measure", *kinds], rows)
