"""How long the guest stands still, split by phase, and what a branch costs."""

import time

from forkfs_test.guest import MIB

from . import machine, peers, record as rec

SIZES = (512,)  # MiB, unless others are asked for

# name, programs of the guest (memory in MiB is put in), disk, busy loops beside it
VARIANTS = (
    ("calm", "load,mib={},fill=1,seq=1,random=1,rate=500", None, 0),
    ("writing", "load,mib={},fill=1,seq=1,random=1", None, 0),
    ("writing, disk", "load,mib={},fill=1,seq=1,random=1,disk=1", "iothread", 0),
    ("calm, busy host", "load,mib={},fill=1,seq=1,random=1,rate=500", None, 2),
    ("writing, busy host", "load,mib={},fill=1,seq=1,random=1", None, 2),
)
PHASES = ("stop", "vmstate", "arm", "resume")


def guest_room(mib):
    """MiB that the guest's programs may have of its memory; its kernel needs the rest."""
    return mib - 112 - mib // 24


def first_bytes(record, name, guest, sandbox, count):
    """open(branch/memory.bin) → first byte, each from a session of its own. The branch is then cancelled or forgotten."""
    path = sandbox / "branch" / "memory.bin"
    for i in range(count):
        need = (guest.mib * MIB) + machine.MARGIN
        deadline = time.monotonic() + 60
        while machine.available() < need:
            assert time.monotonic() < deadline, "old generations do not end"
            time.sleep(0.2)
        try:
            ns = machine.tool_numbers("first", path, 1, start_new_session=True)[0]
            record.add("pause", name, "live", i, first_byte_ms=ns * 1e-6)
        except machine.ToolError as e:
            record.note(f"pause, {name}: {e}: {peers.why(path.parent)}")
        peers.wait_released(guest)


def run_variant(record, options, mib, variant):
    """One guest, all ways to a snapshot of it in turns."""
    what, program, disk, loops = variant
    name = f"{mib} MiB, {what}"
    if not machine.enough_memory(record, name, 3 * mib * MIB):
        return
    print(f"pause: {name} …", flush=True)

    def one(kind, number, function, *arguments):
        done = record.attempt("pause", name, kind, number, function, *arguments)
        if done:
            record.add("pause", name, kind, number, **done["metrics"])

    with machine.bench_case(record, "pause", name) as case, machine.busy_loops(loops):
        guest = case.guest(mib=mib, run=[program.format(guest_room(mib))], disk=disk)
        machine.at_work(guest)
        mount = case.mount(options="lease=1,branch-rate=0,memory=unlimited")
        sandbox = mount.attach(guest)
        other = peers.Alternative(case, "arm-in-pause", "lease=1,branch-rate=0,memory=unlimited")
        record.add("pause", name, "guest", 0, resident_share=guest.memfd_blocks() * 512 / (mib * MIB))
        every = max(1, options.branches // options.peers)
        for i in range(options.branches):
            one("live", i, peers.live, guest, sandbox, f"b{i}")
            if i % every == every - 1:
                peers.wait_released(guest)
                one("armed in it", i, other.live, guest, mount, f"b{i}")
                one("full", i, peers.full, guest, case.dir)
                one("background", i, peers.background_snapshot, guest, case.dir)
        first_bytes(record, name, guest, sandbox, options.peers)
        guest.check_sane()


def run(record, options):
    """All sizes and variants."""
    for mib in options.sizes:
        for variant in VARIANTS:
            run_variant(record, options, mib, variant)


def report(record):
    """Print the tables."""
    cases = list(dict.fromkeys(s[1] for s in record.samples if s[0] == "pause"))
    if not cases:
        return

    def cell(case, kind, metric, digits=2):
        return rec.spread(record.values("pause", case, kind, metric), digits)

    rec.table("Guest stopped, ms by QEMU's own STOP and RESUME events: p50 / p90 / p99 / max",
              ["guest", "live branch", "armed in the pause", "stopped snapshot", "background-snapshot"],
              [[c, cell(c, "live", "stopped_ms"), cell(c, "armed in it", "stopped_ms"), cell(c, "full", "stopped_ms", 0),
                cell(c, "background", "stopped_ms", 1)]
               for c in cases])
    rec.table("Pause of a live branch as the daemon sees it (requests included), ms: p50 / p90 / p99 / max",
              ["guest", "CPU others used, %", "n", "failed", "pause", *PHASES],
              [[c, record.others("pause", c), len(record.values("pause", c, "live", "pause_ms")),
                record.failures("pause", c, "live"),
                cell(c, "live", "pause_ms"),
                *[cell(c, "live", f"{p}_ms") for p in PHASES]] for c in cases])
    rec.table("Before and after it: p50 / p90 / p99 / max",
              ["guest", "pre-arm ms", "converge ms", "rounds", "pages dirty at the pause", "capture ms", "GB/s", "faults",
               "longest fault µs"],
              [[c, *[cell(c, "live", m, d) for m, d in (
                  ("prearm_ms", 0), ("converge_ms", 1), ("converge_rounds", 0), ("dirty_at_pause_pages", 0),
                  ("capture_ms", 0), ("capture_gbs", 2), ("faults", 0), ("fault_max_us", 0))]] for c in cases])
    rec.table("What the caller waits, ms: p50 / p90 / p99 / max",
              ["guest", "mkdir", "open branch/memory.bin → first byte", "until ready", "stopped snapshot",
               "background-snapshot"],
              [[c, cell(c, "live", "mkdir_ms", 1), cell(c, "live", "first_byte_ms", 1), cell(c, "live", "total_ms", 0),
                cell(c, "full", "total_ms", 0), cell(c, "background", "total_ms", 0)] for c in cases])
