"""Runs the benchmarks; started by bench/run.sh."""

import argparse
import signal
import sys

from forkfs_test import probe

from . import agent, capture, files, fork, machine, pause, pool, restore, scan, sizes, stall, store
from .record import Record

BENCHES = {"pause": pause, "sizes": sizes, "capture": capture, "stall": stall, "files": files, "store": store,
           "restore": restore, "pool": pool, "fork": fork, "scan": scan, "agent": agent}


def mib_list(text):
    """A list of MiB."""
    return [int(s) for s in text.split(",")]


def main():
    parser = argparse.ArgumentParser(prog="bench/run.sh", description="Measure forkfs beside the alternatives.")
    parser.add_argument("bench", nargs="?", default="all", choices=[*BENCHES, "all"])
    parser.add_argument("--json", metavar="FILE", help="all samples, their spread and the machine")
    parser.add_argument("--csv", metavar="FILE", help="all samples, one a line")
    parser.add_argument("--branches", metavar="N", type=int, default=12, help="live branches of each kind (default 12)")
    parser.add_argument("--sizes", metavar="MIB,…", type=mib_list, help="memory of the guests")
    parser.add_argument("--guest", choices=sizes.GUESTS, help="of sizes: this VMM alone")
    parser.add_argument("--quick", action="store_true", help="4 branches, the smallest size")
    options = parser.parse_args()
    if options.quick:
        options.branches = min(options.branches, 4)
    if options.branches < 1 or options.sizes and min(options.sizes) < 192:
        parser.error("at least one branch, and 192 MiB for a guest")
    given = options.sizes
    # what the alternatives take is long, and varies little
    options.peers = max(1, min(10, options.branches // 4))
    why = probe.reasons()
    if why:
        parser.error(f"this machine cannot take live branches: {'; '.join(why)}")

    chosen = list(BENCHES) if options.bench == "all" else [options.bench]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and everything is cleaned up on the way out
    record = Record(machine.describe())
    print(*[f"{key}: {value}" for key, value in record.machine.items()], sep="\n", flush=True)
    try:
        for name in chosen:
            options.sizes = given or BENCHES[name].SIZES
            if options.quick:
                options.sizes = [min(options.sizes)]
            BENCHES[name].run(record, options)
    finally:
        for name in chosen:
            BENCHES[name].report(record)
        record.save(options.json, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
