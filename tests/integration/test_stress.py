"""Random sequences of branches, readers, cancels, removals, pauses from outside and detaches, against the truth.

FORKFS_STRESS_SEED=N plays a sequence again. 1,000 branches with --long.
"""

import os
import random
import threading
import time

from forkfs_test import rig

TIMEOUT = {"test_sequence": 240}
LONG_TIMEOUT = {"test_sequence": 3600}
SECONDS = 25
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
    branch = r.branch_with_truth(name, mode=mode)
    readers = [Reader(branch, r.truth, chance.randrange(1 << 30)) for _ in range(chance.randrange(4))]
    for reader in readers:
        reader.join()
        assert not reader.wrong, f"{name} ({mode}), read in flight: {reader.wrong[:3]}"
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    assert r.difference(branch) == "", f"{name} ({mode}), ready"
    return branch


def test_sequence(case):
    """Nothing that anybody does makes a byte of a branch wrong."""
    seed = int(os.environ.get("FORKFS_STRESS_SEED", random.randrange(1 << 30)))
    print(f"FORKFS_STRESS_SEED={seed}")
    chance = random.Random(seed)
    r = rig.Rig(case, mib=128, run=RUN, attach=["--track"])
    kept, taken, end = [], 0, time.monotonic() + SECONDS
    while taken < 1000 if case.long else time.monotonic() < end or not taken:
        what = chance.choice(["live", "live", "live", "diff", "full", "cancel", "remove", "pause", "detach"])
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
        while len(kept) > 5:
            kept.pop(0).rmdir()
    print(f"{taken} branches, 0 wrong")
    r.guest.check_sane()
    r.guest.check_runs()
