"""`forkfs pager` and its VMMs: the stand-in of tests/lib/uffd-vmm.c, which judges every byte."""

import json
import os
import queue
import signal
import subprocess
import threading

TIMEOUT = 60


class Lines:
    """The lines of a pipe, by a thread, so that waiting for one has an end."""

    def __init__(self, pipe):
        self.all, self.queue = [], queue.Queue()
        threading.Thread(target=self._read, args=(pipe,), daemon=True).start()

    def _read(self, pipe):
        for line in pipe:
            self.all.append(line.rstrip("\n"))
            self.queue.put(line.rstrip("\n"))
        self.queue.put(None)

    def next(self, timeout=TIMEOUT):
        """The next line; None at the end."""
        return self.queue.get(timeout=timeout)


class Pager:
    """One that listens. `source`: NAME/BRANCH of `mount`, or a file."""

    def __init__(self, case, source, *options, mount=None, name="pager", binary=None):
        self.case, self.socket, self.log_path = case, case.dir / f"{name}.sock", case.dir / f"{name}.log"
        self.fault_file = case.dir / f"{name}.faults"
        self.faults()
        command = [binary or case.forkfs(), "pager", str(source), str(self.socket), *[str(o) for o in options]]
        if mount:
            command[2:2] = ["--mount", str(mount.path)]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                                            env=dict(os.environ, FORKFS_FAULT_FILE=str(self.fault_file)))
        case.on_end(lambda: (self.process.kill(), self.process.wait()))
        self.lines = Lines(self.process.stdout)
        first = self.lines.next()
        assert first and json.loads(first)["event"] == "listens", f"no pager: {self.log()}"

    def faults(self, *rules):
        """Put these fault points, and no others, in force."""
        fresh = self.case.dir / "faults.new"
        fresh.write_text("".join(r + "\n" for r in rules))
        fresh.rename(self.fault_file)

    def log(self):
        """What it has said."""
        return self.log_path.read_text(errors="replace")

    def event(self, kind):
        """Wait for an event of a kind; the others before it are passed over."""
        while True:
            line = self.lines.next()
            assert line is not None, f"the pager has ended without '{kind}': {self.lines.all} {self.log()}"
            event = json.loads(line)
            if event["event"] == kind:
                return event

    def guard(self):
        """The pid of the process that guards its VMs."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as f:
            found = f.read().split()
        assert len(found) == 1, found
        return int(found[0])

    def stop(self, code=0):
        """End it as a user does; what it ends with must be `code`."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(TIMEOUT) == code, self.log()


class UffdVmm:
    """The stand-in, with its memory handed over."""

    def __init__(self, case, pager, image, *options, **how):
        self.process = subprocess.Popen([case.tool("uffd-vmm"), str(pager.socket), str(image), *options], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)
        case.on_end(lambda: (self.process.kill(), self.process.wait()))
        self.pid = self.process.pid
        self.lines = Lines(self.process.stdout)
        self.errors = Lines(self.process.stderr)
        first = self.lines.next()
        assert first == "sent", f"no VMM: {first} {self.errors.all}"

    def say(self, order):
        """An order, whose answer is not waited for."""
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()

    def ask(self, order):
        """An order and its answer; None where it has ended."""
        self.say(order)
        return self.lines.next()

    def check(self, order="race 4"):
        """Fail unless all that it reads is right."""
        said = self.ask(order)
        assert said == "same", f"{order}: {said}"

    def check_killed(self):
        """Fail unless it ends by SIGKILL, and has never seen a wrong byte."""
        assert self.process.wait(TIMEOUT) == -signal.SIGKILL
        wrong = [line for line in self.lines.all if line.startswith("differs")]
        assert not wrong, f"it has read wrong memory: {wrong}"


def image(path, mib, zeros=()):
    """An image of random bytes, none of whose pages is zero but for those MiB."""
    with open(path, "wb") as f:
        for i in range(mib):
            f.write(bytes(1 << 20) if i in zeros else os.urandom(1 << 20))
    return path
