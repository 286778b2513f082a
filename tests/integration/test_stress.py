"""Random sequences of branches, readers, cancels, removals, pauses from outside, detaches and kills of the daemon, against the truth.

FORKFS_STRESS_SEED=N plays a sequence again. 1,000 branches with --long.
"""

import os
import random
import signal
import threading
import time

from forkfs_test import rig

TIMEOUT = {"test_sequence": 240}
LONG_TIMEOUT = {"test_sequence": 3600}
SECONDS = 25
STORES = ["memory"] * 3 + ["packed", "dense"]
RUN = ["counter", "load,mib=48,seq=1,random=1"]


class Reader(threading.Thread):
    """Reads at random offsets while the branch is captured, and compares with the truth."""

    def __init__(self, branch, truth, seed):
        super().__init__(daemon=True)
        self.branch, self.truth, self.chance, self.wrong = branch, truth, random.Random(seed), []
        self.start()

    def run(self):
        """The thread."""
        try:
            self.wrong = self._compare()
        except OSError as e:
            self.wrong = [str(e)]

    def _compare(self):
        found = []
        with open(self.branch / "memory.bin", "rb", buffering=0) as image, open(self.truth, "rb", buffering=0) as truth:
            size = os.fstat(truth.fileno()).st_size
            for _ in range(200):
                at, length = self.chance.randrange(size), self.chance.choice([1, 64, 4096, 65536, 300000])
                if os.pread(image.fileno(), length, at) != os.pread(truth.fileno(), length, at):
                    found.append(f"{length} bytes at {at:#x}")
        return found


def check(r, name, mode, chance):
    """Take a branch, read it from several threads in flight, and as a whole when it is ready."""
    branch = r.branch_with_truth(name, mode=mode, store=chance.choice(STORES))
    readers = [Reader(branch, r.truth, chance.randrange(1 << 30)) for _ in range(chance.randrange(4))]
    for reader in readers:
        reader.join()
        assert not reader.wrong, f"{name} ({mode}), read in flight: {reader.wrong[:3]}"
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    assert r.difference(branch) == "", f"{name} ({mode}), ready"
    return branch


def end_and_find_again(r, chance):
    """kill -9 with a capture in flight that is being read: the guest is free at once, and the next daemon has it back."""
    if chance.random() < 0.7:
        rig.request(r.sandbox / "ctl", branch={"name": "in-flight", "max_rate": 1 << 20})
        reader = Reader(r.sandbox / "branches/in-flight", r.truth, chance.randrange(1 << 30))
    else:
        reader = None
    r.mount.kill(signal.SIGKILL)
    r.mount.clear_dead()
    if reader:
        reader.join(30)
        assert not reader.is_alive(), "a reader of a dead daemon hangs"
    deadline = time.monotonic() + 30
    while r.guest.protected():
        assert time.monotonic() < deadline, "what a dead daemon has protected stays so"
        time.sleep(0.005)
    r.guest.check_runs(3)
    r.mount.log_path.unlink()
    mount_again(r)
    deadline = time.monotonic() + 30
    while rig.metric(r, "reattaching"):
        assert time.monotonic() < deadline, r.mount.log()
        time.sleep(0.005)
    assert rig.metric(r, "reattached_total") == 1, r.mount.log()
    for branch in (r.sandbox / "branches").iterdir():  # of the store, and what the store knows to have failed
        branch.rmdir()


def mount_again(r):
    """A daemon on the same store."""
    r.mount = r.case.mount(options=f"store={r.case.dir}/store")


def test_sequence(case):
    """Nothing that anybody does makes a byte of a branch wrong."""
    seed = int(os.environ.get("FORKFS_STRESS_SEED", random.randrange(1 << 30)))
    print(f"FORKFS_STRESS_SEED={seed}")
    chance = random.Random(seed)
    r = rig.Rig(case, mount=case.mount(options=f"store={case.dir}/store"), mib=128, run=RUN, attach=["--track"])
    kept, taken, kills, end = [], 0, 0, time.monotonic() + SECONDS
    while taken < 1000 if case.long else time.monotonic() < end or not taken:
        what = chance.choice(["live", "live", "live", "diff", "full", "cancel", "remove", "pause", "detach", "kill"])
        if what in ("live", "full", "diff"):
            parent = kept and not rig.revoked(r)
            kept.append(check(r, f"b{taken}", "live" if what == "diff" and not parent else what, chance))
            taken += 1
        elif what == "cancel":
            rig.request(r.sandbox / "ctl", branch={"name": "given-up", "max_rate": 1 << 20})
            (r.sandbox / "branches/given-up").rmdir()
        elif what == "remove" and len(kept) > 1:  # the last one is the parent of the next
            kept.pop(chance.randrange(len(kept) - 1)).rmdir()
        elif what == "pause":
            r.guest.qmp.execute("stop")
            branch = r.branch("paused")
            assert r.guest.qmp.status() == "paused", "a VM that was found paused must stay so"
            r.guest.go()
            assert rig.wait_settled(branch) == "ready"
            branch.rmdir()
        elif what == "detach" and chance.random() < 0.3:
            while kept:
                kept.pop().rmdir()
            r.mount.run("detach", "sbx1")
            r.mount.attach(r.guest, None, "--track")
        elif what == "kill" and chance.random() < 0.3:
            kept, kills = [], kills + 1
            end_and_find_again(r, chance)
        while len(kept) > 5:
            kept.pop(0).rmdir()
    print(f"{taken} branches, {kills} daemons killed, 0 wrong")
    r.guest.check_sane()
    r.guest.check_runs()
