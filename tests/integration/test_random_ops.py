"""Random reads in every way there is, by several processes, whatever happens to the branch meanwhile: no wrong byte, ever.

The reference is read by foreign hands out of the stopped VMM. What is read is told by a seed, which is printed: set
FORKFS_TEST_SEED to it to have the same operations again.
"""

import os
import random
import signal
import subprocess

from forkfs_test import rig

TIMEOUT = {"test_passthrough_auto": 180, "test_passthrough_off": 180, "test_outlives_daemon": 180}
LONG_TIMEOUT = {"test_passthrough_auto": 1800, "test_passthrough_off": 1800, "test_outlives_daemon": 1800}
PROCESSES = 4
GUEST = {"mib": 128, "run": ["counter", "load,mib=48"]}


class Readers:
    """The program random-ops on a branch: `run` begins operations, `done` waits for them and judges."""

    def __init__(self, case, reference, file):
        seed = int(os.environ.get("FORKFS_TEST_SEED", random.randrange(1, 1 << 30)))
        print(f"seed {seed}", flush=True)
        self.process = case.start(case.tool("random-ops"), "--seed", seed, "--processes", PROCESSES, reference, file,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.operations = self.refused = 0

    def say(self, line):
        """A line to the program, see tests/lib/random-ops.c."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def done(self):
        """Wait until it is through with a line."""
        words = self.process.stdout.readline().split()
        assert words, f"random-ops has ended with {self.process.wait()}"
        self.operations, wrong, self.refused = (int(w) for w in words[1:])
        assert wrong == 0, f"{wrong} of {self.operations} operations were wrong, see above"

    def ask(self, line):
        """A line that is done at once."""
        self.say(line)
        self.done()

    def run(self, count, *meanwhile):
        """So many operations, while these functions are called one after the other."""
        self.say(f"run {count}")
        for action in meanwhile:
            action()
        self.done()

    def end(self, at_least):
        """All of them are through, and there were so many."""
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0, "an operation was wrong"
        print(f"{self.operations} operations, {self.refused} refused as documented")
        assert self.operations >= at_least, self.operations


def slow_branch(r, name):
    """A branch with its truth that is being written for seconds, until r.hold_settle exists."""
    plain, r.hold_settle = r.mount.faults, r.case.dir / f"settle-{name}"
    r.mount.faults = lambda *rules: plain(*rules, "guest-read delay:1", f"settle hold:{r.hold_settle}")
    branch = r.branch_with_truth(name)
    r.mount.faults = plain
    return branch


def settle(r, branch):
    """Let a slow branch be ready."""
    r.hold_settle.touch()
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    r.mount.faults()


def through_a_life(case, options, count):
    """`count` operations from a branch's first moment until its sandbox is gone."""
    r = rig.Rig(case, options=options, **GUEST)
    branch = slow_branch(r, "b1")
    assert rig.state(branch) == "writing", rig.state(branch)
    readers = Readers(case, r.truth, branch / "memory.bin")
    readers.run(count // 10)
    assert rig.state(branch) == "writing", "the operations came too late for the capture"
    readers.run(count // 10, lambda: settle(r, branch))
    readers.ask("settled")
    readers.run(count // 5)

    renamed = branch.with_name("b2")
    readers.run(count // 10, lambda: branch.rename(renamed))
    readers.ask(f"path {renamed}/memory.bin")
    # a second branch, of other content, takes the first one's name: nobody may be given its bytes
    readers.run(count // 10, branch.mkdir, lambda: rig.wait_settled(branch))
    readers.run(count // 10, lambda: r.mount.run("detach", "sbx1"))
    readers.run(count // 10, renamed.rmdir)
    readers.ask("path -")
    readers.run(count // 5, branch.rmdir)
    readers.end(count)
    r.guest.check_runs()


def test_passthrough_auto(case):
    """With passthrough where the machine has it."""
    through_a_life(case, "", 500_000 if case.long else 50_000)


def test_passthrough_off(case):
    """All served by the daemon and the page cache."""
    through_a_life(case, "passthrough=off", 500_000 if case.long else 50_000)


def test_outlives_daemon(case):
    """What the kernel serves from the sealed memory goes on when the daemon is killed, and when the mount is gone."""
    r = rig.Rig(case, **GUEST)
    if '"passthrough":true' not in (r.mount / ".forkfs/capabilities").read_text().replace(" ", ""):
        print("no passthrough on this machine")
        return
    branch = r.branch_with_truth("b1")
    assert rig.wait_settled(branch) == "ready"
    readers = Readers(case, r.truth, branch / "memory.bin")
    readers.ask("settled")
    count = 50_000 if case.long else 5_000
    readers.run(count)
    readers.ask("severed")
    readers.run(count, lambda: r.mount.kill(signal.SIGKILL))
    readers.run(count, r.mount.clear_dead)
    readers.run(count)
    readers.end(4 * count)
    r.guest.check_runs()


def test_notices_one_byte(case):
    """The control: one wrong byte of a file, and a file that changes, are found in every way of reading."""
    reference, file = case.dir / "reference", case.dir / "file"
    content = bytearray(random.Random(1).randbytes(1 << 18))
    reference.write_bytes(content)
    content[100_001] ^= 1
    file.write_bytes(content)
    result = case.run("bash", "-c", 'echo run 20000 | "$@"', "-", case.tool("random-ops"), "--seed", 1, "--processes", 2, reference,
                      file, check=False)
    assert result.code == 1, result.err
    _, operations, wrong, _ = result.out.split()
    assert operations == "20000" and int(wrong) > 100, result.out
    assert "byte 100001 is" in result.err, result.err
