"""Taking a branch, and the other ways to a snapshot of a running VM, each with the same measures.

Every function gives a dictionary of metrics. `stopped_ms` is from QEMU's own STOP and RESUME events, the same for all.
"""

import contextlib
import json
import os
import subprocess
import time

MS = 1e-6


class Failed(Exception):
    """No snapshot came of it; the text says why. Counted, and the run goes on."""


def stopped_since(guest, seen):
    """Milliseconds between the STOP and the RESUME that came after `seen` events, by the times that QEMU put on them."""
    deadline = time.monotonic() + 5
    while True:
        found = {}
        for _, message in list(guest.qmp.events)[seen:]:
            if message["event"] in ("STOP", "RESUME"):
                stamp = message["timestamp"]
                found.setdefault(message["event"], stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3)
        if len(found) == 2:
            return found["RESUME"] - found["STOP"]
        assert time.monotonic() < deadline, f"QEMU did not report a stop and a resume: {found}"
        time.sleep(0.005)


def wait_released(guest, timeout=20):
    """Wait until nobody holds a write protection on the VM any more: the next one needs it for itself."""
    deadline = time.monotonic() + timeout
    while guest.protected():
        assert time.monotonic() < deadline, "guest memory is still registered for write protection"
        time.sleep(0.02)


class Alternative:
    """forkfs going about it in another way (`arm-in-pause`, `one-lock`), which only a build with fault points can."""

    def __init__(self, case, name, options):
        self.mount = case.mount(name=name, options=options, binary=os.environ["FORKFS_ALTERNATIVES_BIN"],
                                environment={"FORKFS_ALTERNATIVE": name})

    def live(self, guest, ours, name):
        """A live branch by it. `ours` is the mount that has the VM otherwise: one daemon at a time has its control socket."""
        with handed_over(guest, ours):
            sandbox = self.mount.attach(guest)
            try:
                return live(guest, sandbox, name)
            finally:
                self.mount.run("detach", guest.name)


@contextlib.contextmanager
def handed_over(guest, mount):
    """A mount lets go of a VM for the time being."""
    mount.run("detach", guest.name)
    try:
        yield
    finally:
        mount.attach(guest)


def why(directory):
    """The sentence that forkfs left for the last failure in a directory."""
    try:
        return os.getxattr(directory, "user.forkfs.error").decode()
    except OSError:
        return "no reason given"


def take(sandbox, name):
    """mkdir of a branch and the wait until it is ready: its path, the two times (ns), when it began and ended."""
    path = sandbox / "branches" / name
    start = time.monotonic_ns()
    try:
        path.mkdir()
    except OSError as e:
        raise Failed(f"mkdir: {e.strerror}: {why(path.parent)}") from e
    made = time.monotonic_ns()
    try:
        (path / "wait").read_bytes()
    except OSError as e:
        text = json.loads((path / "status").read_text()).get("error")
        path.rmdir()
        raise Failed(f"capture: {e.strerror}: {text}") from e
    ready = time.monotonic_ns()
    return path, made - start, ready - start, start / 1e9, ready / 1e9


def live(guest, sandbox, name):
    """A live branch, waited for and removed."""
    seen = len(guest.qmp.events)
    path, made, ready, start, end = take(sandbox, name)
    status = json.loads((path / "status").read_text())
    phases = status["phases"]
    resident = guest.memfd_blocks() * 512
    metrics = {"pause_ms": status["pause_ns"] * MS, "stopped_ms": stopped_since(guest, seen),
               "mkdir_ms": made * MS, "total_ms": ready * MS, "capture_gbs": resident / max(1, phases["capture_ns"]),
               "faults": status["faults"], "fault_max_us": status["fault_max_ns"] / 1e3,
               "converge_rounds": status["converge_rounds"], "dirty_at_pause_pages": status["dirty_at_pause_pages"]}
    for phase in ("prearm", "converge", "stop", "vmstate", "arm", "resume", "capture"):
        metrics[f"{phase}_ms"] = phases[f"{phase}_ns"] * MS
    path.rmdir()
    return {"metrics": metrics, "start": start, "end": end, "faults_us": status["fault_histogram_us"]}


def full(guest, directory):
    """A snapshot with the VM stopped throughout: stop, a copy of its memory to tmpfs, device state, cont."""
    image, state = directory / "full.memory", directory / "full.vmstate"
    memory = guest.memfd()
    seen = len(guest.qmp.events)
    start = time.monotonic()
    guest.qmp.execute("stop")
    try:
        guest.qmp.execute("xen-save-devices-state", filename=str(state), live=False)
        subprocess.run(["cp", "--sparse=never", memory, str(image)], check=True)
    finally:
        guest.qmp.execute("cont")
        end = time.monotonic()
    stopped = stopped_since(guest, seen)
    image.unlink()
    state.unlink()
    return {"metrics": {"stopped_ms": stopped, "total_ms": (end - start) * 1e3}, "start": start, "end": end}


def background_snapshot(guest, directory):
    """QEMU's own: migrate to a file with the capability background-snapshot."""
    path = directory / "background"
    seen = len(guest.qmp.events)
    guest.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": True},
                                                                {"capability": "events", "state": True}])
    # its default is a network's: without this it is held to 128 MiB/s
    guest.qmp.execute("migrate-set-parameters", **{"max-bandwidth": 64 << 30})
    with open(path, "wb") as f:
        guest.qmp.execute("getfd", fd=f.fileno(), fdname="snapshot")
        start = time.monotonic()
        guest.qmp.execute("migrate", uri="fd:snapshot")
        status = "setup"
        while status not in ("completed", "failed"):
            new = [m for _, m in list(guest.qmp.events)[seen:] if m["event"] == "MIGRATION"]
            status = new[-1]["data"]["status"] if new else status
            assert time.monotonic() < start + 120, "background-snapshot does not end"
            time.sleep(0.005)
        end = time.monotonic()
    guest.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "background-snapshot", "state": False}])
    size = path.stat().st_size
    path.unlink()
    if status == "failed":
        raise Failed(f"background-snapshot: {guest.qmp.execute('query-migrate').get('error-desc', 'failed')}")
    return {"metrics": {"stopped_ms": stopped_since(guest, seen), "total_ms": (end - start) * 1e3,
                        "written_gb": size / 1e9}, "start": start, "end": end}
