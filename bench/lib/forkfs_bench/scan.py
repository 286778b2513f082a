"""How long the look for other writers of guest memory takes on a host with many processes: by the kernel's iterators, and in /proc."""

import contextlib
import json
import os
import subprocess
import time

from forkfs_test import case as kit
from forkfs_test.microvm import MicroVm

from . import machine, peers, record as rec

SIZES = (192,)  # MiB; it makes no difference here
PROCESSES = 2000
FILES = 12  # descriptors of each, beside its standard ones


@contextlib.contextmanager
def crowd(count):
    """So many processes that sleep, each with descriptors of its own."""
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(FILES)]
    crowded = []
    try:
        for _ in range(count):
            crowded.append(subprocess.Popen(["/bin/sleep", "3600"], stdin=subprocess.DEVNULL, pass_fds=files))
        yield
    finally:
        for process in crowded:
            process.kill()
        for process in crowded:
            process.wait()
        for fd in files:
            os.close(fd)


def look(record, rounds, case_name, guest, mount, kind):
    """Attach, and branches: the look of each, and what attach takes."""
    start = time.monotonic_ns()
    sandbox = mount.attach(guest)
    record.add("scan", case_name, kind, 0, attach_ms=(time.monotonic_ns() - start) * 1e-6)
    for number in range(rounds):
        path = peers.take(sandbox, f"b{number}")[0]
        phases = json.loads((path / "status").read_text())["phases"]
        record.add("scan", case_name, kind, number, scan_ms=phases["scan_ns"] * 1e-6)
        path.rmdir()
    mount.run("detach", guest.name)


def run(record, options):
    """One guest, alone and in a crowd."""
    mib = min(options.sizes)
    options_of_mount = "lease=1,branch-rate=0"
    for count in (0, PROCESSES):
        name = f"{count} processes more"
        print(f"scan: {name} …", flush=True)
        try:
            with machine.bench_case(record, "scan", name) as case, crowd(count):
                guest = MicroVm(case, "sbx1", mib=mib, kind="memfd", vcpus=1, work=1, fill=1).booted()
                mounts = {"by the kernel": case.mount(options=options_of_mount),
                          "in /proc": peers.Alternative(case, "look-in-proc", options_of_mount).mount}
                for _ in range(3):
                    for kind, mount in mounts.items():
                        look(record, max(4, options.branches // 3), name, guest, mount, kind)
                guest.check_sane()
        except kit.Skip as e:
            record.note(f"scan left out: {e}")


def report(record):
    """Print the table."""
    rows = []
    for case in dict.fromkeys(s[1] for s in record.samples if s[0] == "scan"):
        for kind in ("by the kernel", "in /proc"):
            looks = record.values("scan", case, kind, "scan_ms")
            if looks:
                rows.append([case, record.others("scan", case), kind, rec.spread(looks, 1),
                             rec.between(record.values("scan", case, kind, "attach_ms"))])
    if rows:
        rec.table("The look for other writers of guest memory, ms",
                  ["machine", "CPU others used, %", "it looks", "before a branch: p50 / p90 / p99 / max",
                   "attach, all of it: median (min – max)"], rows)
